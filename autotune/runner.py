"""Running candidates in another process, from this side: requests with deadlines, the gate, and who is the incumbent.

A candidate can only hurt the process that it runs in. If that dies or does not answer in time, the candidate is written down as
``crashed`` or ``timed-out``, and the next one finds a fresh process.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from graphopt.autotune.arena import Arena
from graphopt.autotune.measure import Built, CannotTry, Incumbent, Race, Subject, Timing, Trial, Verdict, spread
from graphopt.autotune.records import Measured, Status
from graphopt.child_process import start_python
from graphopt.errors import GraphoptError, WorkerError, first_line

START = 120.0  # seconds that a process may take to be ready
MOST_CASES = 3  # sets of inputs that winners are tried on, besides the first: of other sizes, where these are symbolic
RACE_CALLS = 40  # of a candidate that is raced alone, however long each takes: for its pace, timed, seen not to leak, judged
MOST_RESULTS = 2  # right results of a case that are kept


class Failed(Exception):
    """A candidate did not do what it was asked to."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Gone(Failed):
    """The process that was asked gave no answer: it died, or was killed as it took too long."""


class Harm(Failed):
    """What a candidate did to the process stays: memory that it keeps, or what it wrote where it should not have."""


class RunnerProcess:
    """The supervisor and its child. ``ask`` sends one request at a time.

    Args:
        loader: handed to the ``main`` of ``module``: what loads a kernel.
        module: of the program that it runs.
        does: what it is there for, in words.
    """

    def __init__(self, loader: str, module: str = "graphopt.autotune.runner_process", does: str = "runs candidates") -> None:
        self._name = f"the process that {does}"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = start_python(f"from {module} import main; main({loader!r})", self._errors)
        self._rest = b""
        self._child = 0  # pid; 0 while there is none that is ready
        self.started = False  # whether there ever was one
        self._requests = 0

    def ready(self) -> None:
        """Wait for a child. Raises WorkerError if none can be had."""
        while not self._child:
            answer = self._line(time.monotonic() + START)
            if answer is None:
                raise WorkerError(f"{self._name} does not start: {self._last_words()}")
            self._child = answer.get("ready", 0)
            self.started = self.started or self._child > 0

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            Gone: the child died, or was killed as it gave no answer in time.
            Failed: the child says that it could not be done.
        """
        self.ready()
        assert self._process.stdin is not None
        self._requests += 1
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"id": self._requests, **request}).encode() + b"\n")
            self._process.stdin.flush()
        end = time.monotonic() + seconds
        answer = self._line(end)
        while answer is not None and answer.get("id", self._requests) != self._requests:
            answer = self._line(end)  # a child that died between two requests left the first to its successor
        if answer is None:
            self._kill_child()
            raise Gone(Status.TIMED_OUT, f"no answer for {seconds:.2g} s")
        if "died" in answer:
            self._child = 0
            raise Gone(Status.CRASHED, died_of(answer["died"]))
        if "lost" in answer:
            raise Gone(Status.LOST, answer["lost"])
        if "spoilt" in answer:
            self._kill_child()
            raise Gone(Status.CRASHED, answer["spoilt"])
        if "failed" in answer:
            raise Failed(Status(answer.get("status", Status.CRASHED)), answer["failed"])
        return answer

    def renew(self) -> None:
        """End the child: the next request finds a fresh one."""
        if self._child:
            self._kill_child()

    def _kill_child(self) -> None:
        child, self._child = self._child, 0
        _kill_group(child)
        end = time.monotonic() + START
        while (answer := self._line(end)) is not None and "died" not in answer:
            pass  # an answer that came too late

    def _line(self, end: float) -> dict[str, Any] | None:
        """The next message; None if there is none in time."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                return None
            data = os.read(fd, 1 << 20)
            if not data:
                raise WorkerError(f"{self._name} is gone: {self._last_words()}")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return dict(json.loads(line))

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.poll()}"

    def close(self) -> None:
        """End supervisor and child, and what that started."""
        self._process.kill()
        if self._child:
            _kill_group(self._child)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _kill_group(child: int) -> None:
    """Kill a child with all that it started, such as an assembler."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def died_of(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"it ended the process with exit status {code}"
    try:
        return f"it was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"it was killed by signal {-code}"


@dataclass
class TaskSession:
    """The cases of the subject that is being measured, and which of them the child has.

    Attributes:
        right: of each case, the last results that were right, with the verdict on them.
    """

    subject: Subject
    arenas: dict[int, Arena]
    loaded: int | None = None
    wins: int = 0
    right: dict[int, deque[tuple[list[torch.Tensor], Verdict]]] = field(default_factory=dict)

    def another(self) -> int:
        """The case to try the next winner on. Odd: those have other sizes than the one that is timed (:class:`Subject`)."""
        self.wins += 1
        return 2 * (self.wins % MOST_CASES) + 1

    def judged(self, n: int) -> Verdict:
        """The verdict on what lies in the arena of case n. Raises Failed if it is wrong.

        A result of millions of elements takes a second to judge against f64, and milliseconds to compare with one that was right: a
        candidate's second results are most often its first, and those of many candidates are sums in the same order.
        """
        arena = self.arenas[n]
        if damage := arena.damage():
            raise Harm(Status.WRONG, damage)
        results = arena.results()
        right = self.right.setdefault(n, deque(maxlen=MOST_RESULTS))
        for known, verdict in right:
            if all(map(torch.equal, results, known)):
                return verdict
        verdict = arena.case.judge(results)
        if verdict.reason:
            raise Failed(Status.WRONG, verdict.reason)
        right.append(([x.clone() for x in results], verdict))
        return verdict


class ProcessRunner:
    """Measures candidates in one process that is started again as often as they break it.

    Args:
        loader: ``module:function``, imported there: (file, entry) -> kernel; or whatever the ``main`` of ``module`` takes.
        threads: that each kernel may use.
        module: of the program that the process runs.
    """

    def __init__(self, loader: str, threads: int, timing: Timing | None = None, seed: int = 0,
                 module: str = "graphopt.autotune.runner_process") -> None:  # fmt: skip
        self.loader, self.threads, self.timing, self.seed, self.module = loader, threads, timing or Timing(), seed, module
        self._process: RunnerProcess | None = None
        self._session: TaskSession | None = None

    def start(self) -> None:
        """Start the process; it gets ready while others work."""
        if self._process is None:
            self._process = self._new_process()

    def _new_process(self) -> RunnerProcess:
        return RunnerProcess(self.loader, self.module)

    def ready(self) -> None:
        """Wait until it can take candidates. Raises WorkerError if it cannot be started."""
        self.start()
        assert self._process is not None
        self._process.ready()

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None
        self._forget()

    def _forget(self) -> None:
        for arena in self._session.arenas.values() if self._session else ():
            arena.close()
        self._session = None

    def measure(self, subject: Subject, candidates: Sequence[Built], incumbent: Incumbent | None) -> Iterator[Trial]:
        self.start()
        if self._session is None or self._session.subject is not subject:
            self._forget()
            self._session = TaskSession(subject, {})
        for built in candidates:
            start = time.perf_counter()
            try:
                trial = self._trial(self._session, built, incumbent)
            except Failed as failure:
                trial = Trial(built, Measured(failure.status, reason=failure.reason))
                if isinstance(failure, Harm):
                    self._renew()
                if isinstance(failure, Gone):
                    self._session.loaded = None
            seconds = time.perf_counter() - start
            trial = replace(trial, measured=replace(trial.measured, build_seconds=built.seconds, trial_seconds=built.seconds + seconds))
            if trial.won:
                assert trial.measured.seconds is not None
                incumbent = Incumbent(built, trial.measured.seconds)
            yield trial

    def _trial(self, session: TaskSession, built: Built, incumbent: Incumbent | None) -> Trial:
        if built.failure:
            raise Failed(Status.BUILD_FAILED, built.failure)
        verdict, seconds = self._check(session, 0, built, incumbent)
        race = self._race(session, built, incumbent, self.timing.floor, seconds)
        if incumbent is None:
            other = self._check(session, session.another(), built, None)[0] if session.subject.sizes else verdict
            return Trial(built, _measured(race, None, max(verdict.error, other.error), True), won=True)
        if self._won(race, incumbent):
            other, _ = self._check(session, session.another(), built, incumbent)
            self._check(session, 0, built, incumbent)
            race = self._race(session, built, incumbent, self.timing.recheck, seconds)
            won = self._won(race, incumbent)
            measured = _measured(race, incumbent, max(verdict.error, other.error), won)
            if won:
                self._believe(session.subject, measured)
            return Trial(built, measured, won)
        return Trial(built, _measured(race, incumbent, verdict.error, False))

    def _won(self, race: Race, incumbent: Incumbent) -> bool:
        """Whether a candidate is faster than the incumbent. Raises Failed if something slowed the incumbent down."""
        if not race.won(self.timing.margin):
            return False
        if (times := median(race.incumbent) / incumbent.seconds) >= self.timing.slowed:
            raise Failed(Status.DISTURBED, f"the incumbent took {times:.3g} times as long as it does")
        return True

    def _believe(self, subject: Subject, m: Measured) -> None:
        """Raises Failed if a winner's time is shorter than any kernel's could be: then something else slowed the incumbent down."""
        if m.seconds is not None and m.seconds * self.timing.incredible < subject.least:
            raise Failed(Status.INCREDIBLE, f"{m.seconds * 1e6:.3g} us, where the machine's limits ask for {subject.least * 1e6:.3g}")

    # --- requests ------------------------------------------------------------------------------------------------------

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._process is not None
        try:
            return self._process.ask(request, seconds)
        except GraphoptError:  # even the supervisor is gone
            if not self._process.started:
                raise  # through no fault of a candidate's
            self._process.close()
            self._process = self._new_process()
            raise Gone(Status.CRASHED, "it took the process that watches over it down, too") from None

    def _renew(self) -> None:
        """Let the next candidate find a process that no other one was in."""
        assert self._process is not None and self._session is not None
        self._process.renew()
        self._session.loaded = None

    def _load_case(self, session: TaskSession, n: int) -> Arena:
        """Case n of the subject, in shared memory and known to the child. Raises CannotTry if there is none."""
        if n not in session.arenas:
            try:
                session.arenas[n] = Arena(session.subject.case(2 * self.seed + n))
            except (GraphoptError, RuntimeError, MemoryError, OSError) as error:  # PyTorch's allocator raises RuntimeError
                raise CannotTry(f"its inputs and results could not be made: {first_line(error)}") from error
        arena = session.arenas[n]
        if session.loaded != n:
            session.loaded = None
            self._send_case({"do": "case", **arena.description, "weights": list(session.subject.weights),
                             "between": session.subject.between, "threads": self.threads})  # fmt: skip
            session.loaded = n
        return arena

    def _send_case(self, request: dict[str, Any]) -> None:
        """Hand the child a case. No candidate has a part in it, but what one before left there may be in the way.

        Raises:
            WorkerError: not even a fresh child can take it.
        """
        try:
            self._ask(request, START)
        except Failed:
            assert self._process is not None
            self._process.renew()
            try:
                self._ask(request, START)
            except Failed as failure:
                size = f"{request['size'] / (1 << 20):.3g} MiB"
                raise WorkerError(f"the process that runs candidates cannot take {size} of a kernel's inputs and outputs: "
                                  f"{first_line(failure)}") from failure  # fmt: skip

    def _check(self, session: TaskSession, n: int, built: Built, incumbent: Incumbent | None) -> tuple[Verdict, float]:
        """Run once on case n, and judge; also the seconds that the call took. Raises Failed."""
        arena = self._load_case(session, n)
        arena.poison()
        answer = self._ask({"do": "check", "which": [built.path, built.entry]}, self._patience(incumbent))
        return session.judged(n), answer["seconds"]

    def _patience(self, incumbent: Incumbent | None) -> float:
        """Seconds that the calls of a candidate may take."""
        return max(self.timing.patience, self.timing.patience_ratio * incumbent.seconds if incumbent else 0.0)

    def _race(self, session: TaskSession, built: Built, incumbent: Incumbent | None, floor: float, first: float) -> Race:
        """Time it on case 0, and judge its last results. Raises Failed.

        Args:
            first: seconds of its first call. One that nothing is faster than yet may be as slow as that; with an incumbent, one that is
                as much slower as patience allows has lost.
        """
        t = self.timing
        arena = session.arenas[0]
        arena.poison()
        other = [incumbent.built.path, incumbent.built.entry] if incumbent else None
        seconds = 10.0 * floor + self._patience(incumbent) + (0.0 if incumbent else RACE_CALLS * first)
        answer = self._ask({"do": "race", "candidate": [built.path, built.entry], "incumbent": other, "floor": floor, "slice": t.slice,
                            "hopeless": t.hopeless, "leak": t.leak, "tolerable": t.tolerable}, seconds)  # fmt: skip
        if answer.get("leaked"):
            raise Harm(Status.LEAKED, f"resident memory grows by {answer['leaked']:.0f} bytes a call")
        if arena.case.in_place is None:
            session.judged(0)
        return Race(tuple(answer["candidate"]), tuple(answer["incumbent"]))


def _measured(race: Race, incumbent: Incumbent | None, error: float, won: bool) -> Measured:
    """The time of a candidate, in the incumbent's measure; no gain for one that was not shown to be faster."""
    if incumbent is None:
        return Measured(Status.OK, median(race.candidate), spread(race.candidate), error)
    ratio = race.ratio if won else max(race.ratio, 1.0)
    return Measured(Status.OK, incumbent.seconds * ratio, spread(race.candidate), error, 1.0 / ratio)

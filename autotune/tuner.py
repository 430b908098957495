"""The tuner: rounds of proposing, building, measuring and writing down, until the budget ends.

In a round one task gets a batch of candidates. They are built side by side, a core each; then, with the build processes idle, they are
timed one after the other: on a machine with few cores a time that was taken while something else was compiled is no time.
Every trial is in the database as soon as it was made, so that whatever ends the tuner loses none.

Reference: Zheng et al., "Ansor: Generating High-Performance Tensor Programs for Deep Learning", OSDI 2020.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from graphopt.autotune.measure import Builder, Built, Incumbent, Runner, Subject, Trial
from graphopt.autotune.records import Measured
from graphopt.autotune.space import Schedule, Workload


@dataclass(frozen=True)
class Task:
    """One workload to tune.

    Attributes:
        subject: the workload as it stands in the model, and how to try kernels of it.
        name: for people.
        default: the schedule that is used without tuning.
        calls: how often a run of the models calls its kernel.
        seconds: of one call, as it was found in the model; 0 if not known.
        least: seconds that no kernel can do without: the roofline. 0 if not known.
        library: seconds of a call of PyTorch's kernels for the same. 0 if not known.
        flops, read: of a call: floating-point operations, and bytes that come from memory.
    """

    subject: Subject
    name: str
    default: Schedule
    calls: int = 1
    seconds: float = 0.0
    least: float = 0.0
    library: float = 0.0
    flops: float = 0.0
    read: float = 0.0

    @property
    def workload(self) -> Workload:
        return self.subject.workload


class Proposer(Protocol):
    """What the tuner asks of a search (:class:`~graphopt.autotune.search.Search`)."""

    @property
    def exhausted(self) -> bool:
        """Whether there is nothing left to propose."""

    def propose(self, n: int) -> list[Schedule]:
        """New candidates."""

    def observe(self, results: Sequence[tuple[Schedule, Measured]]) -> None:
        """Take in what was measured."""


@dataclass
class Progress:
    """Where a task stands.

    Attributes:
        default: what the default schedule gave; None before it was tried.
        incumbent: the fastest so far.
        trials: candidates tried in this run; ``spent``: seconds for them.
        curve: (seconds since the run began, seconds of the incumbent) at every change.
        statuses: how often trials ended how.
    """

    task: Task
    search: Proposer
    default: Measured | None = None
    incumbent: Incumbent | None = None
    trials: int = 0
    spent: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)

    @property
    def best(self) -> float | None:
        """Seconds of the incumbent."""
        return self.incumbent.seconds if self.incumbent else None

    @property
    def gain(self) -> float | None:
        """Time of the default schedule in times of the incumbent's."""
        if self.default is None or self.default.seconds is None or self.incumbent is None:
            return None
        return self.default.seconds / self.incumbent.seconds

    @property
    def exhausted(self) -> bool:
        return self.search.exhausted


class Scheduler(Protocol):
    """Chooses which task gets the next batch."""

    def next(self, tasks: Sequence[Progress]) -> int | None:
        """Index of a task, or None if none is worth going on with."""


class MostTime:
    """The task on which the models spend most time for the trials that it has had: each in turn, the dear ones oftener.

    A task near its roofline, or that has been through its space, gets no more.

    Args:
        near: how many times its least time a task may take and count as near.
    """

    def __init__(self, near: float = 1.1) -> None:
        self.near = near

    def next(self, tasks: Sequence[Progress]) -> int | None:
        open_tasks = [i for i, p in enumerate(tasks) if not p.exhausted and not self._done(p)]
        fresh = [i for i in open_tasks if not tasks[i].trials]
        return max(fresh or open_tasks, key=lambda i: self._worth(tasks[i]), default=None)

    def _done(self, p: Progress) -> bool:
        return p.best is not None and p.trials > 0 and p.best <= self.near * p.task.least

    def _worth(self, p: Progress) -> float:
        return p.task.calls * max(0.0, (p.best or p.task.seconds) - p.task.least) / (p.trials + 8)


@dataclass(frozen=True)
class Budget:
    """When to end: after some seconds, or some trials, counted over the whole run, resumed parts included."""

    seconds: float | None = None
    trials: int | None = None


@dataclass(frozen=True)
class RoundBegins:
    """A batch of a task is about to be built."""

    task: int
    size: int


@dataclass(frozen=True)
class TimingBegins:
    """A batch was built and is about to be timed."""

    task: int


@dataclass(frozen=True)
class Tried:
    """A trial was made and written down."""

    task: int
    trial: Trial


@dataclass(frozen=True)
class GoesOn:
    """A task takes up where an earlier part of the run stood."""

    task: int
    seconds: float
    default: float | None


Event = RoundBegins | TimingBegins | Tried | GoesOn
Listener = Callable[[Event], None]
Record = Callable[[Task, Trial, int], None]
"""(task, trial, number of the trial in the run): written down when it returns."""


@dataclass(frozen=True)
class Standing:
    """Where a task stood at the end of an earlier part of the run: its incumbent, and what its default schedule gave."""

    schedule: Schedule
    seconds: float
    default: Measured | None = None


@dataclass
class Outcome:
    """How a run ended: ``why`` is one of ``budget``, ``trials``, ``done`` (nothing left to try), ``interrupted``."""

    why: str
    progress: list[Progress]
    seconds: float
    trials: int

    @property
    def rate(self) -> float:
        """Candidates a second."""
        return self.trials / self.seconds if self.seconds else 0.0


class Tuner:
    """Tunes tasks.

    Args:
        search: task -> where its candidates come from.
        builder, runner: build and run candidates.
        record: writes a trial down.
        batch: candidates a round.
        known: where an earlier part of the run stood, by task.
        done: trials of earlier parts of the run.
    """

    def __init__(self, tasks: Sequence[Task], *, search: Callable[[Task], Proposer], builder: Builder, runner: Runner, record: Record,
                 scheduler: Scheduler | None = None, batch: int = 16, known: Mapping[int, Standing] | None = None, done: int = 0,
                 listener: Listener | None = None) -> None:  # fmt: skip
        self.progress = [Progress(t, search(t)) for t in tasks]
        self._builder, self._runner, self._record = builder, runner, record
        self._scheduler = scheduler or MostTime()
        self._batch, self._known, self._trials = batch, dict(known or {}), done
        self._done = done
        self._listener = listener or (lambda event: None)
        self._start = time.monotonic()

    def run(self, budget: Budget) -> Outcome:
        """Tune until the budget ends, nothing is left to try, or Ctrl-C."""
        self._start = time.monotonic()
        why = "interrupted"
        with contextlib.suppress(KeyboardInterrupt):
            why = self._rounds(budget)
        return Outcome(why, self.progress, time.monotonic() - self._start, self._trials - self._done)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def _rounds(self, budget: Budget) -> str:
        while True:
            if over := self._over(budget):
                return over
            task = self._scheduler.next(self.progress)
            if task is None:
                return "done"
            size = self._batch
            if budget.trials is not None:
                size = min(size, budget.trials - self._trials)
            if not self._round(task, size, budget):
                return self._over(budget)

    def _over(self, budget: Budget) -> str:
        if budget.seconds is not None and self.elapsed >= budget.seconds:
            return "budget"
        return "trials" if budget.trials is not None and self._trials >= budget.trials else ""

    def _round(self, index: int, size: int, budget: Budget) -> bool:
        """One batch of a task. Returns False if the budget ended it early."""
        p = self.progress[index]
        start = time.monotonic()
        if p.incumbent is None and index in self._known:
            self._reinstate(p, index)
        schedules = p.search.propose(size)
        if p.default is None and p.incumbent is None and p.task.default not in schedules:
            schedules = [p.task.default, *schedules[: max(0, size - 1)]]
        if not schedules:
            return True
        schedules.sort(key=lambda s: s != p.task.default)  # first: it is the incumbent that the others are timed against
        self._listener(RoundBegins(index, len(schedules)))
        built = self._builder.build(p.task.workload, schedules)
        self._listener(TimingBegins(index))
        results: list[tuple[Schedule, Measured]] = []
        try:
            for trial in self._tried(p, built):
                self._trials += 1
                self._record(p.task, trial, self._trials)
                self._note(p, trial)
                results.append((trial.schedule, trial.measured))
                self._listener(Tried(index, trial))
                if self._over(budget):
                    return len(results) == len(built)
        finally:
            p.search.observe(results)
            p.spent += time.monotonic() - start
        return True

    def _tried(self, p: Progress, built: Sequence[Built]) -> Iterator[Trial]:
        return self._runner.measure(p.task.subject, built, p.incumbent)

    def _reinstate(self, p: Progress, index: int) -> None:
        """The incumbent of an earlier part of the run, built again."""
        known = self._known[index]
        built = self._builder.build(p.task.workload, [known.schedule])[0]
        p.default = known.default
        if not built.failure:
            p.incumbent = Incumbent(built, known.seconds)
            p.curve.append((self.elapsed, known.seconds))
            self._listener(GoesOn(index, known.seconds, known.default.seconds if known.default else None))

    def _note(self, p: Progress, trial: Trial) -> None:
        m = trial.measured
        p.trials += 1
        p.statuses[m.status.value] = p.statuses.get(m.status.value, 0) + 1
        if trial.schedule == p.task.default:
            p.default = m
        if trial.won:
            assert m.seconds is not None
            p.incumbent = Incumbent(trial.built, m.seconds)
            p.curve.append((self.elapsed, m.seconds))

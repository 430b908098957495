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
from dataclasses import dataclass

from graphopt.autotune.cost_model import ranked
from graphopt.autotune.measure import Builder, Built, CannotTry, Incumbent, Runner, Trial
from graphopt.autotune.records import Measured, Status
from graphopt.autotune.scheduler import ByGain
from graphopt.autotune.space import Schedule
from graphopt.autotune.tasks import Progress, Proposer, Scheduler, Task

FEW, EARLY = 8, 32  # candidates of a round while so many trials of a task have not been made: each result says most then


def round_size(tried: int, batch: int) -> int:
    """Candidates of a task's next round, after so many trials, where a later one has ``batch``."""
    return min(batch, FEW) if tried < EARLY else batch


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
    """Where a task stood at the end of an earlier part of the run: its incumbent, what its default schedule gave, and trials so far."""

    schedule: Schedule
    seconds: float
    default: Measured | None = None
    trials: int = 0


@dataclass
class Outcome:
    """How a run ended: ``why`` is one of ``budget``, ``trials``, ``done`` (nothing left to try), ``interrupted``.

    ``why_unranked``: why there is no cost model, in words; empty if there is one.
    """

    why: str
    progress: list[Progress]
    seconds: float
    trials: int
    why_unranked: str = ""

    @property
    def ranked(self) -> tuple[int, float]:
        """Pairs of candidates that the cost model had ranked before they were measured; the share of them that it had in order."""
        return ranked(batch for p in self.progress for batch in p.search.predictions)

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
        batch: candidates a round, after the first rounds (:func:`round_size`).
        known: where an earlier part of the run stood, by task.
        done: trials of earlier parts of the run.
    """

    def __init__(self, tasks: Sequence[Task], *, search: Callable[[Task], Proposer], builder: Builder, runner: Runner, record: Record,
                 scheduler: Scheduler | None = None, batch: int = 16, known: Mapping[int, Standing] | None = None, done: int = 0,
                 listener: Listener | None = None) -> None:  # fmt: skip
        self.progress = [Progress(t, search(t)) for t in tasks]
        for i, stood in (known or {}).items():
            p = self.progress[i]
            p.earlier, p.default, p.stood, p.curve = stood.trials, stood.default, stood.seconds, [(0.0, stood.seconds)]
        self._builder, self._runner, self._record = builder, runner, record
        self._scheduler = scheduler or ByGain()
        self._batch, self._known, self._trials = batch, dict(known or {}), done
        self._done = done
        self._listener = listener or (lambda event: None)
        self._start = time.monotonic()

    def run(self, budget: Budget) -> Outcome:
        """Tune until the budget ends, nothing is left to try, or Ctrl-C."""
        self._start = time.monotonic()
        for i, stood in self._known.items():
            self._listener(GoesOn(i, stood.seconds, stood.default.seconds if stood.default else None))
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
            p = self.progress[task]
            size = round_size(p.earlier + p.trials, self._batch)
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
        if p.stood is not None:
            self._reinstate(p, self._known[index])
        schedules = p.search.propose(size)
        if p.wants_default and p.task.default not in schedules:
            schedules = [p.task.default, *schedules]  # one more than usual: what was proposed is never proposed again
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
                if trial.schedule == p.task.default and trial.measured.status is Status.DISTURBED:
                    p.search.give_back([b.schedule for b in built[len(results) :]])  # none may lead that was not timed beside the default
                    return True
                if self._over(budget):
                    return len(results) == len(built)
        except CannotTry as error:
            p.left_out = str(error)
        finally:
            p.search.observe(results)
            p.spent += time.monotonic() - start
            p.rounds.append((p.earlier + p.trials, p.best))
        return True

    def _tried(self, p: Progress, built: Sequence[Built]) -> Iterator[Trial]:
        return self._runner.measure(p.task.subject, built, p.incumbent)

    def _reinstate(self, p: Progress, known: Standing) -> None:
        """Build the incumbent of an earlier part of the run again; if that fails, the next one that runs takes its place."""
        built = self._builder.build(p.task.workload, [known.schedule])[0]
        p.incumbent, p.stood = None if built.failure else Incumbent(built, known.seconds), None

    def _note(self, p: Progress, trial: Trial) -> None:
        m = trial.measured
        p.trials += 1
        p.statuses[m.status.value] = p.statuses.get(m.status.value, 0) + 1
        if trial.schedule == p.task.default and m.says_nothing:
            p.lost += 1
            if m.status is Status.DISTURBED and not p.wants_default:
                p.left_out = f"its default schedule could not be timed: {m.reason}"
        elif trial.schedule == p.task.default:
            p.default = m
        if trial.won:
            assert m.seconds is not None
            p.incumbent = Incumbent(trial.built, m.seconds)
            p.curve.append((self.elapsed, m.seconds))

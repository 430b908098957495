"""Tasks: one workload to tune each; where each stands; and what a tuner asks of a search and of a scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from graphopt.autotune.measure import Incumbent, Subject
from graphopt.autotune.records import Measured
from graphopt.autotune.space import Schedule, Workload

MOST_LOST = 3  # trials of a task's default schedule that the machine did not survive


@dataclass(frozen=True)
class Task:
    """One workload to tune.

    Attributes:
        subject: the workload as it stands in the model, and how to try kernels of it.
        name: for people.
        default: the schedule that is used without tuning.
        calls: how often a run of the models calls its kernel.
        seconds: of one call, as it was found in the model; 0 if not known.
        library: seconds of a call of PyTorch's kernels for the same. 0 if not known.
        flops, read: of a call: floating-point operations, and bytes that come from memory.
    """

    subject: Subject
    name: str
    default: Schedule
    calls: int = 1
    seconds: float = 0.0
    library: float = 0.0
    flops: float = 0.0
    read: float = 0.0

    @property
    def workload(self) -> Workload:
        return self.subject.workload

    @property
    def least(self) -> float:
        """Seconds that no kernel can do without: the roofline. 0 if not known."""
        return self.subject.least


class Proposer(Protocol):
    """What the tuner asks of a search (:class:`~graphopt.autotune.search.Search`)."""

    @property
    def exhausted(self) -> bool:
        """Whether there is nothing left to propose."""

    @property
    def predictions(self) -> list[tuple[list[float], list[float]]]:
        """(scores that a cost model gave, seconds that were then measured) of every batch that it had ranked."""

    def propose(self, n: int) -> list[Schedule]:
        """New candidates."""

    def give_back(self, schedules: Sequence[Schedule]) -> None:
        """Take back candidates that were proposed and not tried: they are proposed again."""

    def observe(self, results: Sequence[tuple[Schedule, Measured]]) -> None:
        """Take in what was measured."""


@dataclass
class Progress:
    """Where a task stands.

    Attributes:
        default: what the default schedule gave; None before it was tried. ``lost``: how often the machine was lost meanwhile.
        incumbent: the fastest so far. ``stood``: seconds of that of an earlier part of the run, which is built again when it is needed.
        trials: candidates tried in this part of the run, ``earlier`` in those before; ``spent``: seconds for them.
        rounds: (trials so far, those of earlier parts included; seconds of the incumbent) at the end of every round.
        curve: (seconds since the run began, seconds of the incumbent) at every change.
        statuses: how often trials ended how.
        left_out: why there can be no more trials, in words; empty if there can.
    """

    task: Task
    search: Proposer
    default: Measured | None = None
    incumbent: Incumbent | None = None
    trials: int = 0
    earlier: int = 0
    spent: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)
    rounds: list[tuple[int, float | None]] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    stood: float | None = None
    left_out: str = ""

    @property
    def best(self) -> float | None:
        """Seconds of the incumbent."""
        return self.incumbent.seconds if self.incumbent else self.stood

    @property
    def gain(self) -> float | None:
        """Time of the default schedule in times of the incumbent's."""
        if self.default is None or self.default.seconds is None or self.best is None:
            return None
        return self.default.seconds / self.best

    def at_roofline(self, near: float) -> bool:
        """Whether the fastest takes its least time, or ``near`` times that at most. If it is faster by as much, the limit is not one."""
        return self.best is not None and self.task.least / near <= self.best <= near * self.task.least

    @property
    def refused(self) -> str:
        """Why the default schedule does not count, so that the fastest of the others does though it may be slower; empty if it does."""
        return "" if self.default is None or self.default.ok else f"{self.default.status.value}: {self.default.reason}".rstrip(": ")

    @property
    def wants_default(self) -> bool:
        """Whether the default schedule is to be tried: without it, nobody knows what the others are worth."""
        return self.default is None and self.lost < MOST_LOST

    @property
    def exhausted(self) -> bool:
        return self.search.exhausted and not (self.lost and self.wants_default)


class Scheduler(Protocol):
    """Chooses which task gets the next batch."""

    def next(self, tasks: Sequence[Progress]) -> int | None:
        """Index of a task, or None if none is worth going on with."""

"""What measuring speaks of: a built candidate, a case to try it on, the trial; and the rule by which a candidate beats the incumbent.

Times on a real machine drift: clocks change, other programs come and go. A candidate is therefore never compared with a time that
was taken earlier. It runs in turns with the incumbent (A B, B A, A B ...), and what counts is the ratio within each pair. A
candidate that wins is tried again with fresh repeats and fresh inputs before it becomes the incumbent. Its time is written down as
the incumbent's time multiplied with the ratio, and one that was not shown to be faster is never given a smaller time than the
incumbent's: so the best record of a run is the schedule that won, whatever the machine did meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

import torch

from graphopt.autotune.records import Measured
from graphopt.autotune.space import Schedule, Workload
from graphopt.errors import GraphoptError


@dataclass(frozen=True)
class Timing:
    """How long things are tried, all in seconds.

    Attributes:
        floor: timed calls of a candidate that is about as fast as the incumbent, half of it the incumbent's.
        recheck: the same, when one that has won is tried again.
        slice: calls between two readings of the clock, for kernels that are shorter.
        hopeless: a candidate this many times slower than the incumbent is given up early.
        margin: share of the incumbent's time by which a candidate must win.
        slowed: an incumbent that takes this many times the time that stands for it is slowed down by something else, and not beaten.
        tolerable: share of the time of a candidate that is timed alone that threads may have waited for processors in it, where there are
            no better times; from 1 on, of pairs with an incumbent, too, of which waiting slows down one more than the other.
        patience: for the first call of a candidate; or ``patience_ratio`` times the incumbent's time, if that is longer.
        leak: bytes of growth of resident memory over the timed calls that are looked into.
        incredible: a time this many times shorter than the machine's limits allow is not believed. Not 1: some of the weights
            may be in a cache.
    """

    floor: float = 0.02
    recheck: float = 0.06
    slice: float = 3e-4
    hopeless: float = 1.15
    margin: float = 0.01
    slowed: float = 3.0
    tolerable: float = 0.3
    patience: float = 10.0
    patience_ratio: float = 200.0
    leak: int = 256 << 10
    incredible: float = 3.0


@dataclass(frozen=True)
class Built:
    """A candidate that was built, or why it could not be.

    Attributes:
        path, entry: file of the kernel, and its name in there.
        seconds: its share of the time of a build process.
        failure: in words; empty if it was built.
    """

    schedule: Schedule
    path: str = ""
    entry: str = ""
    seconds: float = 0.0
    failure: str = ""


class Builder(Protocol):
    """Builds candidates, several at once."""

    def build(self, w: Workload, schedules: Sequence[Schedule]) -> list[Built]:
        """One answer a schedule, in order. Raises nothing for a candidate's sake."""


@dataclass(frozen=True)
class Output:
    """A tensor that a kernel fills: shape and strides in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Verdict:
    """Attributes:
        error: the largest difference to the f64 result, relative to its largest element.
        reason: why the results are wrong; empty if they are right.
    """

    error: float
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """One set of inputs of a workload, and how to judge what comes out.

    Attributes:
        sizes: values of the workload's symbols, in sorted order of name.
        in_place: the input in whose memory the only output lies, for a workload that updates.
        judge: results -> verdict.
    """

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[Output, ...]
    judge: Callable[[Sequence[torch.Tensor]], Verdict]
    sizes: tuple[int, ...] = ()
    in_place: int | None = None


@dataclass(frozen=True)
class Subject:
    """What is measured: a workload as it stands in a model.

    Attributes:
        case: seed -> a case; the same seed gives the same one. Even seeds are drawn at ``sizes``, the ones that are timed,
            odd ones at others; where nothing is symbolic, all are drawn at the same.
        weights: inputs that nothing writes between two runs of the model: they are as cold as all that it reads meanwhile
            makes them, while the other inputs were written just before.
        between: bytes that the model reads between two calls of a kernel: weights are rotated over copies of that size in all.
        least: seconds that no kernel can do without: the roofline. 0 if not known.
    """

    workload: Workload
    case: Callable[[int], Case]
    weights: tuple[int, ...] = ()
    between: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    least: float = 0.0


@dataclass(frozen=True)
class Incumbent:
    """The fastest candidate so far, and the time that stands for it."""

    built: Built
    seconds: float

    @property
    def schedule(self) -> Schedule:
        return self.built.schedule


@dataclass(frozen=True)
class Trial:
    """What trying one candidate gave; ``won``: it is the incumbent from now on."""

    built: Built
    measured: Measured
    won: bool = False

    @property
    def schedule(self) -> Schedule:
        return self.built.schedule


class CannotTry(GraphoptError):
    """There is nothing to try kernels of a workload on: no memory for inputs and what must come out, or no sizes that make sense."""


class Runner(Protocol):
    """Runs candidates, away from this process."""

    def measure(self, subject: Subject, candidates: Sequence[Built], incumbent: Incumbent | None) -> Iterator[Trial]:
        """Try candidates one after the other; each winner is the incumbent of those behind it.

        Without an incumbent, the first candidate that is right becomes it.

        Raises:
            CannotTry: there is nothing to try them on.
        """

    def close(self) -> None:
        """End its processes."""


# --- deciding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Race:
    """Times of a candidate and of the incumbent in turns: pair i ran side by side.

    Attributes:
        candidate, incumbent: seconds of a call, one an pair.
    """

    candidate: tuple[float, ...]
    incumbent: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Time of the candidate in times of the incumbent: the median over the pairs."""
        return median(c / i for c, i in zip(self.candidate, self.incumbent, strict=True))

    def won(self, margin: float) -> bool:
        """Whether the candidate is faster by the margin, and is so in three of four pairs."""
        faster = sum(c < i for c, i in zip(self.candidate, self.incumbent, strict=True))
        return self.ratio < 1.0 - margin and faster >= 0.75 * len(self.candidate)


def spread(times: Sequence[float]) -> float:
    """(p90 - p10) / median."""
    ordered, last = sorted(times), len(times) - 1
    return (ordered[round(0.9 * last)] - ordered[round(0.1 * last)]) / median(ordered)

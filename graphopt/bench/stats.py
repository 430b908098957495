"""Statistics of times: medians with their spread, ratios of medians and how sure they are, geometric means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

import numpy as np

RESAMPLES = 1000
TURNS = 3  # fewer say nothing about how much they differ


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of sorted values, linear between neighbours; q in 0 .. 1."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True)
class Times:
    """Seconds of the timed calls of one system on one model.

    Attributes:
        turns: of each turn, the calls in the order in which they were made.
    """

    turns: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.turns or not all(self.turns):
            raise ValueError("times need one turn at least, and each turn one call")

    @property
    def samples(self) -> tuple[float, ...]:
        """All calls, in order."""
        return tuple(s for turn in self.turns for s in turn)

    def quantile(self, q: float) -> float:
        return quantile(sorted(self.samples), q)

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def p10(self) -> float:
        return self.quantile(0.1)

    @property
    def p90(self) -> float:
        return self.quantile(0.9)

    @property
    def spread(self) -> float:
        """Interquartile range, relative to the median."""
        return (self.quantile(0.75) - self.quantile(0.25)) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Ratio:
    """A ratio of two medians, and where it may lie: a 95% interval, from bootstrapping whole turns.

    Calls of one turn share what the machine was like in it (its clock, the memory that neighbours of a virtual machine leave), so the
    turns are what is drawn again, those of both systems together: what slows both in a round is no doubt about their ratio.
    Reference: Efron, Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 8 and 13.
    """

    value: float
    low: float
    high: float
    turns: int

    @property
    def uncertainty(self) -> float:
        """The larger distance to an end of the interval, relative to the ratio; infinite if there were too few turns to tell."""
        return max(self.high / self.value - 1, 1 - self.low / self.value) if self.turns >= TURNS else math.inf


@lru_cache(maxsize=256)  # asked for by each table, and for what is written
def ratio_of_medians(above: Times, below: Times) -> Ratio:
    """The median of ``above`` over that of ``below``, which took turns with it. The same times give the same interval."""
    count = min(len(above.turns), len(below.turns))
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    found = _medians(above, drawn) / _medians(below, drawn)
    low, high = np.quantile(found, (0.025, 0.975))
    return Ratio(above.median / below.median, float(low), float(high), count)


def _medians(times: Times, drawn: np.ndarray) -> np.ndarray:
    """The median of all calls of the drawn turns, for each row of their numbers."""
    turns = [np.array(t) for t in times.turns]
    return np.array([np.median(np.concatenate([turns[i] for i in row])) for row in drawn])


def geometric_mean(ratios: Sequence[float]) -> float | None:
    """exp(mean(log ratios)); None of nothing."""
    return math.exp(fmean(math.log(r) for r in ratios)) if ratios else None

"""Statistics of times: medians with their spread, ratios of medians and how sure they are, geometric means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, median, stdev

TURNS = 4  # fewer say nothing about how much they differ
LOOKS = 3  # after how many rounds it is seen whether a ratio is sure: as many as were asked for, twice, four times


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
    """A ratio of two medians, and where it may lie: a 95% interval by Student's t over the logarithms of the turns' own ratios.

    Calls of one turn share what the machine was like in it (its clock, the memory that neighbours of a virtual machine leave), so turns are
    what is counted, and each gives one ratio: what slows both systems in a round is no doubt about it. The interval is that of ``LOOKS``
    looks, after each of which the rounds may end (Bonferroni).
    """

    value: float
    low: float
    high: float
    turns: int

    @property
    def uncertainty(self) -> float:
        """The larger distance to an end of the interval, relative to the ratio; infinite if there were too few turns to tell."""
        return max(self.high / self.value - 1, 1 - self.low / self.value)


@lru_cache(maxsize=256)  # asked for by each table, and for what is written
def ratio_of_medians(above: Times, below: Times) -> Ratio:
    """The median of ``above`` over that of ``below``, which took turns with it; of fewer than ``TURNS`` turns it may lie anywhere."""
    logs = [math.log(median(a) / median(b)) for a, b in zip(above.turns, below.turns, strict=False)]
    value, count = above.median / below.median, len(logs)
    if count < TURNS:
        return Ratio(value, 0.0, math.inf, count)
    middle, step = fmean(logs), _student(count - 1) * stdev(logs) / math.sqrt(count)
    return Ratio(value, math.exp(middle - step), math.exp(middle + step), count)


def _student(freedom: int) -> float:
    """The quantile of Student's t for the interval: within 3% from 3 degrees of freedom on.

    Reference: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.5.
    """
    z = NormalDist().inv_cdf(1 - 0.05 / LOOKS / 2)
    parts = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(p / freedom**i for i, p in enumerate(parts))


def geometric_mean(ratios: Sequence[float]) -> float | None:
    """exp(mean(log ratios)); None of nothing."""
    return math.exp(fmean(math.log(r) for r in ratios)) if ratios else None

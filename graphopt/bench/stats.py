"""Statistics of times: medians with their spread, ratios of medians, geometric means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


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
        samples: in the order in which they were taken.
    """

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("times need one sample at least")

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


def geometric_mean(ratios: Sequence[float]) -> float | None:
    """exp(mean(log ratios)); None of nothing."""
    return math.exp(fmean(math.log(r) for r in ratios)) if ratios else None

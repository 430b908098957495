"""Medians, quantiles, spread, geometric means."""

from __future__ import annotations

import statistics

import pytest

from graphopt.bench.stats import Times, geometric_mean, quantile


@pytest.mark.parametrize("samples", [(3.0,), (4.0, 1.0), (5.0, 1.0, 2.0), tuple(float(x * x % 17) + 1 for x in range(40))])
def test_quantiles_agree_with_the_standard_library(samples: tuple[float, ...]) -> None:
    times = Times(samples)
    assert times.median == pytest.approx(statistics.median(samples))
    if len(samples) > 1:
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        assert (times.p10, times.p90) == (pytest.approx(deciles[0]), pytest.approx(deciles[-1]))


def test_ends() -> None:
    assert quantile([1.0, 2.0, 4.0], 0.0) == 1.0
    assert quantile([1.0, 2.0, 4.0], 1.0) == 4.0


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert Times((1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx((4 - 2) / 3)
    assert Times((2.0, 2.0)).spread == 0.0


def test_one_outlier_moves_neither_median_nor_spread() -> None:
    calm = (1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.0, 1.0)
    assert Times((*calm, 50.0)).median == pytest.approx(1.0)
    assert Times((*calm, 50.0)).spread < 0.05


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert geometric_mean([1.2, 1.2, 1.2]) == pytest.approx(1.2)
    assert geometric_mean([]) is None


def test_no_samples() -> None:
    with pytest.raises(ValueError):
        Times(())

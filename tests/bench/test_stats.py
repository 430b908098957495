"""Medians, quantiles, spread, geometric means."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from graphopt.bench.stats import Times, _student, geometric_mean, quantile, ratio_of_medians


@pytest.mark.parametrize("samples", [(3.0,), (4.0, 1.0), (5.0, 1.0, 2.0), tuple(float(x * x % 17) + 1 for x in range(40))])
def test_quantiles_agree_with_the_standard_library(samples: tuple[float, ...]) -> None:
    times = Times((samples,))
    assert times.median == pytest.approx(statistics.median(samples))
    if len(samples) > 1:
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        assert (times.p10, times.p90) == (pytest.approx(deciles[0]), pytest.approx(deciles[-1]))


def test_ends() -> None:
    assert quantile([1.0, 2.0, 4.0], 0.0) == 1.0
    assert quantile([1.0, 2.0, 4.0], 1.0) == 4.0


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert Times(((1.0, 2.0), (3.0, 4.0, 5.0))).spread == pytest.approx((4 - 2) / 3)
    assert Times(((2.0, 2.0),)).spread == 0.0


def test_one_outlier_moves_neither_median_nor_spread() -> None:
    calm = (1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.0, 1.0)
    assert Times(((*calm, 50.0),)).median == pytest.approx(1.0)
    assert Times(((*calm, 50.0),)).spread < 0.05


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert geometric_mean([1.2, 1.2, 1.2]) == pytest.approx(1.2)
    assert geometric_mean([]) is None


@pytest.mark.parametrize("turns", [(), ((),), ((1.0,), ())])
def test_no_samples(turns: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(ValueError):
        Times(turns)


def test_rounds_that_slow_both_leave_the_ratio_sure() -> None:
    """Memory of a virtual machine reads at half its speed for some rounds: both systems take twice as long in them."""
    speed = (1.0, 2.0, 1.0, 1.9, 2.0, 1.0, 1.1, 2.0)
    ours, theirs = (Times(tuple(tuple(base * s * (1 + k / 1000) for k in range(9)) for s in speed)) for base in (2.0, 7.0))
    assert ours.spread > 0.5
    found = ratio_of_medians(theirs, ours)
    assert found.value == pytest.approx(3.5, rel=1e-3) and found.low <= found.value <= found.high
    assert found.uncertainty < 0.01


def test_rounds_that_slow_one_of_them_make_the_ratio_unsure() -> None:
    ours = Times(((1.0, 1.0),) * 8)
    theirs = Times(tuple((t, t) for t in (1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0)))
    found = ratio_of_medians(theirs, ours)
    assert found.low < 1.1 and found.high > 1.9 and found.uncertainty > 0.3


def test_students_quantiles() -> None:
    """Of 0.05 / 3 / 2 above, from tables."""
    for freedom, want in ((3, 4.857), (5, 3.534), (11, 2.826), (47, 2.483)):
        assert _student(freedom) == pytest.approx(want, rel=0.03)


@pytest.mark.parametrize("rounds", [4, 5, 12])
@pytest.mark.parametrize("noise", [0.03, 0.08])
def test_the_interval_covers_as_often_as_it_says(rounds: int, noise: float) -> None:
    """Of 300 measurements that end as soon as one of three looks is sure, no more miss the true ratio than one in twenty, and chance."""
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(300):
        both, mine, other = (rng.lognormal(0.0, s, size=(4 * rounds, 1)) for s in (0.3, noise, noise))
        calls = rng.lognormal(0.0, 0.05, size=(2, 4 * rounds, 7))
        ours, theirs = (both * mine * calls[0]).tolist(), (2.0 * both * other * calls[1]).tolist()
        for look in (rounds, 2 * rounds, 4 * rounds):
            found = ratio_of_medians(*(Times(tuple(map(tuple, t[:look]))) for t in (theirs, ours)))
            if found.uncertainty <= 0.05:
                break
        missed += not found.low <= 2.0 <= found.high
    assert missed <= 24


def test_few_rounds_tell_nothing() -> None:
    one = Times(((1.0, 1.0, 1.0),))
    assert ratio_of_medians(one, one).uncertainty == math.inf

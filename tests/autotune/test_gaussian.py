"""Gaussian processes: what they say between values, far from them, of names, in spite of outliers, and which points they pick."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.autotune.gaussian import Array, Points, Process, strided

RNG = np.random.default_rng


def points(numbers: Array, names: Array | None = None) -> Points:
    return Points(numbers, np.zeros((len(numbers), 0)) if names is None else names)


def smooth(x: Array) -> Array:
    out: Array = np.sin(2 * x[:, 0]) + 0.5 * x[:, 1] ** 2
    return out


def some(count: int, seed: int) -> Array:
    return RNG(seed).uniform(-1, 1, (count, 2))


def error(process: Process) -> float:
    """Of what it expects at points that it has not seen, as a share of their spread."""
    x = some(200, seed=99)
    return float((process.mean(points(x)) - smooth(x)).std() / smooth(x).std())


def test_it_finds_a_smooth_function_through_noise() -> None:
    x = some(100, seed=0)
    assert error(Process(points(x), smooth(x))) < 0.05
    noisy = smooth(x) + 0.2 * RNG(1).standard_normal(100)
    assert error(Process(points(x), noisy)) < 0.1  # the noise is 0.25 of the spread


def test_numbers_count_by_their_spread_and_constants_not_at_all() -> None:
    x = some(60, seed=0)
    scaled = np.c_[1e6 * x[:, 0] + 3e7, 1e-3 * x[:, 1], np.full(60, 7.0)]
    z = some(20, seed=1)
    far = np.c_[1e6 * z[:, 0] + 3e7, 1e-3 * z[:, 1], np.full(20, -7.0)]
    got, expected = Process(points(scaled), smooth(x)).mean(points(far)), Process(points(x), smooth(x)).mean(points(z))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_names_are_alike_or_not_whatever_their_numbers() -> None:
    """Effects of two names that no line fits; only half of the combinations are known."""
    a, b = np.array([0.0, 5.0, 1.0, -3.0, 2.0]), np.array([0.0, 1.0, -4.0])
    names = np.array([(i, j) for i in range(5) for j in range(3) if (i + j) % 2 == 0], dtype=float)
    left = np.array([(i, j) for i in range(5) for j in range(3) if (i + j) % 2 == 1], dtype=float)

    def value(rows: Array) -> Array:
        out: Array = a[rows[:, 0].astype(int)] + b[rows[:, 1].astype(int)]
        return out

    nothing = np.zeros((len(names), 1)), np.zeros((len(left), 1))
    got = Process(Points(nothing[0], names), value(names)).mean(Points(nothing[1], left))
    assert np.corrcoef(got, value(left))[0, 1] > 0.9


def test_an_outlier_does_not_bend_its_neighbourhood() -> None:
    x = some(100, seed=0)
    y = smooth(x) + 0.05 * RNG(1).standard_normal(100)
    spoilt = y.copy()
    spoilt[::20] += 4.0
    assert error(Process(points(x), spoilt)) < 0.29  # 0.33 if outliers count in full
    assert error(Process(points(x), y)) < 0.1


@pytest.mark.parametrize("count", [1, 2, 30])
def test_values_that_are_all_the_same(count: int) -> None:
    process = Process(points(some(count, seed=0)), np.full(count, 3.0))
    np.testing.assert_allclose(process.mean(points(some(9, seed=1))), 3.0, atol=1e-6)
    assert len(set(process.pick(points(some(9, seed=1)), np.zeros(9), 5, curiosity=1.0))) == 5


def test_a_point_that_was_measured_twice() -> None:
    x = np.repeat(some(20, seed=0), 2, axis=0)
    assert np.isfinite(Process(points(x), smooth(x)).mean(points(x))).all()


def test_picked_by_mean_alone_or_where_little_is_known() -> None:
    x = some(80, seed=0)
    x = x[x[:, 0] < 0.0]  # nothing is known of the other half
    process, z = Process(points(x), smooth(x)), some(60, seed=3)
    means = process.mean(points(z))
    assert process.pick(points(z), means, 8, curiosity=0.0) == list(np.argsort(-means, kind="stable")[:8])
    curious = process.pick(points(z), np.zeros(60), 8, curiosity=1.0)
    assert len(set(curious)) == 8 and (z[curious[:4], 0] > 0.0).all()


def test_of_points_that_say_the_same_one_is_picked_at_first() -> None:
    x = some(40, seed=0)
    process = Process(points(x), smooth(x))
    z = np.concatenate([np.full((5, 2), 3.0), [[-1.5, 1.5], [1.5, -1.5]]])  # five are one point, the least known of
    assert set(process.pick(points(z), np.zeros(7), 3, curiosity=1.0)) == {0, 5, 6}
    assert sorted(process.pick(points(z), np.zeros(7), 9, curiosity=1.0)) == list(range(7))


def test_strided_indices() -> None:
    assert list(strided(3, 10)) == [0, 1, 2]
    assert list(strided(11, 3)) == [0, 5, 10]
    assert len(strided(1001, 1000)) == 1000

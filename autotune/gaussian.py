"""Gaussian-process regression: a smooth function of points from a few hundred noisy values, with how sure it is.

    y = mean + f(x) + noise
    f ~ GP(0, scale * k)
    k(a, b) = alone (1 - unlike(a, b) / names) + (1 - alone) exp(-|a - b|^2 / (2 near^2) - unlike(a, b) / far)

``|a - b|^2`` is the mean over standardised numbers, ``unlike`` counts the names that differ. The first term is a sum of effects that names
have each alone; it reaches as far as the names do. ``alone``, ``far`` and the noise are those of a small grid under which the values
are likeliest (the scale follows from them). A value further from what all the others say of it than is likely counts as that far,
no further: a time that something disturbed does not bend its neighbourhood.

Reference: Rasmussen and Williams, "Gaussian Processes for Machine Learning", MIT Press 2006, chapters 2.2, 5.4.1 and 5.4.2; Desautels,
Krause and Burdick, "Parallelizing Exploration-Exploitation Tradeoffs in Gaussian Process Bandit Optimization", JMLR 15, 2014.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_NEAR, _ALONE, _FAR, _NOISE = 2.0, (0.0, 0.3, 0.7), (3.0, 9.0, 27.0), (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_JUDGED = 256  # values by which the grid is judged: it costs their number cubed
_OUTLYING = 3.0  # deviations from what the other values say that count in full
_SAME = 1e-6  # spread of a number that is taken for constant


@dataclass(frozen=True)
class Points:
    """Points of a space.

    Attributes:
        numbers: what is compared by how far apart it is, [points, numbers].
        names: what is compared by whether it is the same, [points, names].
    """

    numbers: Array
    names: Array

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, which: npt.NDArray[np.intp]) -> Points:
        return Points(self.numbers[which], self.names[which])


class Process:
    """What values at some points say of others.

    Args:
        points: where values are known, one at least.
        values: at each of them, noisy.
    """

    def __init__(self, points: Points, values: Array) -> None:
        spread = points.numbers.std(axis=0)
        self._used = spread > _SAME
        self._middle, self._spread = points.numbers.mean(axis=0)[self._used], spread[self._used]
        self._differ = np.ptp(points.names, axis=0) > 0
        self._points = self._prepared(points)
        self._level, self._scale = float(values.mean()), max(float(values.std()), _SAME)
        y = (values - self._level) / self._scale

        some = strided(len(y), _JUDGED)
        self._shape, self._noise = _likeliest(self._points.take(some), y[some])
        self._inverse = np.linalg.inv(_kernel(self._points, self._points, self._shape) + self._noise * np.eye(len(y)))
        self._weights = self._inverse @ y
        variance = float(y @ self._weights) / len(y)
        alone = 1.0 / np.diag(self._inverse)  # variance of a value, given the others, in units of f's
        limit = _OUTLYING * np.sqrt(variance * alone)
        beyond = self._weights * alone  # a value less what the others say
        self._weights = self._inverse @ (y - (beyond - np.clip(beyond, -limit, limit)))
        self._variance = self._scale**2 * variance  # of f

    def mean(self, points: Points) -> Array:
        """What is expected at each point."""
        return self._level + self._scale * (_kernel(self._prepared(points), self._points, self._shape) @ self._weights)

    def pick(self, points: Points, means: Array, n: int, curiosity: float) -> list[int]:
        """n points to look at together: great values first, and those of which little is known.

        One after the other, the greatest mean + curiosity * deviation is taken, deviations being what they will be once the ones
        before are known: of points that say much of each other one is taken at first.

        Args:
            means: what is expected at each point, whoever says so.
        """
        z = self._prepared(points)
        k = _kernel(z, self._points, self._shape)
        left = self._variance * (_kernel(z, z, self._shape) - k @ self._inverse @ k.T)
        noise = self._variance * self._noise
        means, out = means.copy(), list[int]()
        for _ in range(min(n, len(points))):
            i = int(np.argmax(means + curiosity * np.sqrt(np.maximum(0.0, np.diag(left)))))
            out.append(i)
            left -= np.outer(left[:, i], left[i]) / (left[i, i] + noise + 1e-12)
            means[i] = -np.inf
        return out

    def _prepared(self, points: Points) -> Points:
        """Standardised, without what is the same everywhere."""
        return Points((points.numbers[:, self._used] - self._middle) / self._spread, points.names[:, self._differ])


def strided(count: int, most: int) -> npt.NDArray[np.intp]:
    """Indices below a count, all of them or as many as are wanted, evenly apart."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.intp))


def _likeliest(points: Points, y: Array) -> tuple[tuple[float, float], float]:
    """(alone, far) and the noise of the greatest marginal likelihood."""
    apart = _apart(points, points)
    return max((likely, shape, noise) for shape in product(_ALONE, _FAR) for noise, likely in _likelihoods(_shaped(*apart, shape), y))[1:]


def _likelihoods(k: Array, y: Array) -> Iterator[tuple[float, float]]:
    """(noise, log of the likelihood but for a constant) with the likeliest scale, for every noise of the grid."""
    values, vectors = np.linalg.eigh(k)
    parts = (vectors.T @ y) ** 2
    for noise in _NOISE:
        spectrum = np.maximum(values, 0.0) + noise
        yield noise, -0.5 * (len(y) * float(np.log((parts / spectrum).mean() + 1e-12)) + float(np.log(spectrum).sum()))


def _kernel(a: Points, b: Points, shape: tuple[float, float]) -> Array:
    """k of every pair, [a, b]."""
    return _shaped(*_apart(a, b), shape)


def _apart(a: Points, b: Points) -> tuple[Array, Array, int]:
    """Mean squared difference of the numbers and names that differ, of every pair, [a, b]; how many names there are."""
    x, z = a.numbers, b.numbers
    squared = np.maximum(0.0, (x**2).sum(1)[:, None] + (z**2).sum(1)[None] - 2.0 * (x @ z.T)) / max(1, x.shape[1])
    unlike = np.zeros(squared.shape)
    for one, other in zip(a.names.T, b.names.T, strict=True):
        unlike += one[:, None] != other[None, :]
    return squared, unlike, max(1, a.names.shape[1])


def _shaped(squared: Array, unlike: Array, names: int, shape: tuple[float, float]) -> Array:
    alone, far = shape
    out: Array = alone * (1.0 - unlike / names) + (1.0 - alone) * np.exp(squared * (-0.5 / _NEAR**2) - unlike / far)
    return out

"""A learned cost model: gradient-boosted trees and a Gaussian process over program features, trained on what the tuner measures.

    label = log(the workload's best time / a candidate's time)       one that failed: e times as slow as the slowest that did not
    score = exp(trees / 4 + process * 3 / 4)                         the share of the best one's speed that is expected

The trees learn from all workloads, and what was learned of one serves the next; the process (:mod:`gaussian`) learns from the
measurements of the workload in question alone, and knows where they say little. A search measures what is fast, so what it has not
seen is mostly slower than all that it has: there trees repeat their outermost leaf, and a process goes on as its neighbours do.

The trees are fitted anew when enough is new, the process whenever something is (some hundred rows take a fraction of a second), so
that labels follow a workload's best time.
What is kept between runs is the measurements as features: any version of the library can learn from them again.

Needs xgboost (``pip install graphopt[tune]``); without it nothing is predicted, and ``why_not`` says so.

Reference: Zheng et al., "Ansor: Generating High-Performance Tensor Programs for Deep Learning", OSDI 2020, section 5.2; Chen and
Guestrin, "XGBoost: A Scalable Tree Boosting System", KDD 2016.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from zipfile import BadZipFile

import numpy as np

from graphopt.autotune.features import NAMES, Vector, features
from graphopt.autotune.gaussian import Array, Points, Process, strided
from graphopt.autotune.records import Measured
from graphopt.autotune.space import LoopNest, Schedule, SearchSpace, Workload
from graphopt.errors import UsageError
from graphopt.target import Target

LEAST = 8  # measurements before anything is predicted
MOST = 20_000  # measurements that are kept, the newest
_FRESH = 0.05  # share of new measurements after which the trees are fitted again
_PARAMS = {"max_depth": 3, "eta": 0.1, "min_child_weight": 0.5, "subsample": 0.7, "colsample_bytree": 0.5, "lambda": 1.0,
           "tree_method": "hist", "max_bin": 64, "nthread": 1, "verbosity": 0, "objective": "reg:squarederror"}  # fmt: skip
_ROUNDS = 150
_SHARE = 0.75  # of the process in what is expected
_OWN = 1000  # measurements of a workload that its process learns from: it costs their number cubed
_PICKED_FROM = 256  # candidates of the greatest scores that a batch is picked from
_CURIOSITY = 1.0  # deviations by which a batch is picked that much higher
_NAMED = np.array([n.split()[0] in ("template", "sketch", "knob") for n in NAMES])


class CostModel:
    """Scores for candidates: the greater, the faster; comparable within a workload.

    Args:
        seed: of the trees.

    Attributes:
        why_not: why nothing is ever predicted, in words; empty if it will be.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.why_not = _missing()
        self._rows: list[Vector] = []
        self._seconds: list[float] = []  # inf for a candidate that failed
        self._groups: list[str] = []  # the workload of each row
        self._known: dict[tuple[str, float, bytes], None] = {}  # the same as keys
        self._trees: Any = None
        self._fitted = 0  # rows that the trees have seen
        self._process: tuple[str, Process] | None = None  # of the workload that was asked for last
        self._cache: dict[tuple[str, str, Schedule], Vector] = {}

    def __len__(self) -> int:
        """Measurements that it knows."""
        return len(self._rows)

    # --- what the search calls -------------------------------------------------------------------------------------------

    def observe(self, w: Workload, target: Target, results: Sequence[tuple[Schedule, Measured]], spaces: Sequence[SearchSpace]) -> None:
        """Learn from what was measured of a workload; one that was lost says nothing, and what is told twice counts once: a run that is
        gone on with tells what it had measured before."""
        if len(self._known) != len(self._rows):
            self._known = {(g, t, r.tobytes()): None for g, t, r in zip(self._groups, self._seconds, self._rows, strict=True)}
        for s, m in results:
            row = self._features(w, target, s, _nests(spaces))
            seconds = m.seconds if m.ok and m.seconds is not None else math.inf
            key = w.key, seconds, row.tobytes()
            if m.says_nothing or key in self._known:
                continue
            self._known[key] = None
            self._rows.append(row)
            self._seconds.append(seconds)
            self._groups.append(w.key)
        self._process = None
        if len(self._rows) > MOST:
            del self._rows[:-MOST], self._seconds[:-MOST], self._groups[:-MOST]
            self._fitted = 0

    def predict(self, w: Workload, target: Target, schedules: Sequence[Schedule], spaces: Sequence[SearchSpace]) -> list[float] | None:
        """A score for each schedule; None while too little is known."""
        if self.why_not or not schedules or not self._ready():
            return None
        return [float(x) for x in np.exp(self._expected(w, self._rows_of(w, target, schedules, spaces)))]

    def pick(self, w: Workload, target: Target, schedules: Sequence[Schedule], spaces: Sequence[SearchSpace],
             n: int) -> list[Schedule] | None:  # fmt: skip
        """The n schedules to measure next, together: what may be fast, and says much of others; None while too little is known."""
        if self.why_not or not schedules or not self._ready():
            return None
        rows = self._rows_of(w, target, schedules, spaces)
        expected = self._expected(w, rows)
        first = np.argsort(-expected, kind="stable")[: max(n, _PICKED_FROM)]
        process = self._process_of(w)
        chosen = first[:n] if process is None else first[process.pick(_points(rows[first]), expected[first], n, _CURIOSITY)]
        return [schedules[i] for i in chosen]

    # --- keeping it --------------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """All that it has learned from."""
        out = io.BytesIO()
        rows = np.stack(self._rows) if self._rows else np.zeros((0, len(NAMES)), np.float32)
        seconds, groups = np.array(self._seconds), np.array(self._groups, dtype=str)
        np.savez_compressed(out, names=np.array(NAMES), rows=rows, seconds=seconds, groups=groups)
        return out.getvalue()

    @staticmethod
    def from_bytes(data: bytes, seed: int = 0) -> CostModel:
        """The inverse of ``to_bytes``.

        Raises:
            UsageError: they are no model's, or one's with other features.
        """
        model = CostModel(seed)
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as kept:
                if tuple(kept["names"]) != NAMES:
                    raise UsageError("the cost model was learned from other features; it is learned anew")
                rows, model._seconds, model._groups = kept["rows"], kept["seconds"].tolist(), kept["groups"].tolist()
                if rows.shape != (len(model._seconds), len(NAMES)) or len(model._groups) != len(rows) or np.isnan(model._seconds).any():
                    raise UsageError("not a cost model: its measurements do not fit together")
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise UsageError(f"not a cost model: {error}") from None
        model._rows = list(rows)
        return model

    # --- learning ----------------------------------------------------------------------------------------------------------

    def _rows_of(self, w: Workload, target: Target, schedules: Sequence[Schedule], spaces: Sequence[SearchSpace]) -> Vector:
        nests = _nests(spaces)
        return np.stack([self._features(w, target, s, nests) for s in schedules])

    def _features(self, w: Workload, target: Target, s: Schedule, nests: dict[str, Callable[[Schedule], LoopNest] | None]) -> Vector:
        key = (w.key, target.fingerprint, s)
        found = self._cache.get(key)
        if found is None:
            if len(self._cache) > MOST:
                self._cache.clear()
            found = self._cache[key] = features(w, s, target, nests.get(f"{s.template}/{s.sketch}"))
        return found

    def _ready(self) -> bool:
        """Fit the trees if that is due; whether there are any."""
        count = len(self._rows)
        if count < LEAST:
            return False
        if self._trees is None or count - self._fitted >= max(4.0, _FRESH * count):
            self._fit()
        return True

    def _fit(self) -> None:
        import xgboost

        data = xgboost.DMatrix(np.stack(self._rows), label=self._labels(range(len(self._rows))), nthread=1)
        self._trees = xgboost.train({**_PARAMS, "seed": self.seed}, data, _ROUNDS)
        self._fitted = len(self._rows)

    def _process_of(self, w: Workload) -> Process | None:
        """What the measurements of a workload say; None if they are few."""
        if self._process is None or self._process[0] != w.key:
            own = [i for i, g in enumerate(self._groups) if g == w.key]
            if len(own) < LEAST:
                return None
            some = [own[i] for i in strided(len(own), _OWN)]
            self._process = w.key, Process(_points(np.stack([self._rows[i] for i in some])), self._labels(some))
        return self._process[1]

    def _expected(self, w: Workload, rows: Vector) -> Array:
        """The label that each row of features may have."""
        import xgboost

        expected: Array = self._trees.predict(xgboost.DMatrix(rows, nthread=1)).astype(np.float64)
        process = self._process_of(w)
        return expected if process is None else (1.0 - _SHARE) * expected + _SHARE * process.mean(_points(rows))

    def _labels(self, rows: Sequence[int]) -> Array:
        """For each of the rows, the logarithm of its speed as a share of the best of its workload's among them."""
        ran: dict[str, list[float]] = {}
        for i in rows:
            if self._seconds[i] < math.inf:
                ran.setdefault(self._groups[i], []).append(self._seconds[i])
        ends = {group: (min(seconds), max(seconds) * math.e) for group, seconds in ran.items()}
        best, failed = zip(*(ends.get(self._groups[i], (1.0, 1.0)) for i in rows), strict=True)
        out: Array = np.log(np.array(best) / np.minimum([self._seconds[i] for i in rows], failed))
        return out


def _points(rows: Vector) -> Points:
    """Features as a process compares them: all by how far apart they are, those of the schedule also by whether they are the same."""
    wide = rows.astype(np.float64)
    return Points(wide, wide[:, _NAMED])


def pairwise_accuracy(scores: Sequence[float], seconds: Sequence[float], apart: float = 0.0) -> float:
    """Share of pairs that scores put in the order of the times; a tie of scores counts half. 0.5 is chance; nan without pairs.

    Args:
        apart: pairs whose times differ by no more than this share of the shorter one are not counted.
    """
    right = _pairs(scores, seconds, apart)
    return float(np.mean(right)) if len(right) else math.nan


def ranked(batches: Iterable[tuple[Sequence[float], Sequence[float]]]) -> tuple[int, float]:
    """Pairs of candidates within batches, each (scores, seconds), and the share of them that the scores put in order."""
    right = np.concatenate([np.zeros(0), *(_pairs(scores, seconds) for scores, seconds in batches)])
    return len(right), float(np.mean(right)) if len(right) else math.nan


def _pairs(scores: Sequence[float], seconds: Sequence[float], apart: float = 0.0) -> Array:
    """For each pair with different times 1 if the scores say which is faster, 0 if they say the other, 0.5 if neither."""
    x, t = np.asarray(scores, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    i, j = np.triu_indices(len(x), 1)
    counted = np.abs(t[i] - t[j]) > apart * np.minimum(t[i], t[j])
    i, j = i[counted], j[counted]
    out: Array = (np.sign(x[i] - x[j]) * np.sign(t[j] - t[i]) + 1) / 2
    return out


def _nests(spaces: Sequence[SearchSpace]) -> dict[str, Callable[[Schedule], LoopNest] | None]:
    """The loops of each sketch."""
    return {f"{space.template}/{sketch}": space.nest for space in spaces for sketch in space.sketches}


def _missing() -> str:
    try:
        import xgboost  # noqa: F401
    except Exception as error:  # a library that does not load is as good as none
        return f"no cost model, the search goes by what it measures alone: xgboost cannot be used ({error}); pip install graphopt[tune]"
    return ""

"""A learned cost model: gradient-boosted trees over program features, trained on what the tuner measures.

    label = the workload's best time / a candidate's time, 0 for one that failed        (normalised throughput)

The trees are fitted anew from all measurements whenever enough are new (some hundred rows take a fraction of a second), so that
labels follow a workload's best time, and what was learned of one workload serves the next. What is kept between runs is the
measurements as features, not the trees: any version of the library can learn from them again.

Needs xgboost (``pip install graphopt[tune]``); without it nothing is predicted, and ``why_not`` says so.

Reference: Zheng et al., "Ansor: Generating High-Performance Tensor Programs for Deep Learning", OSDI 2020, section 5.2; Chen and
Guestrin, "XGBoost: A Scalable Tree Boosting System", KDD 2016.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any
from zipfile import BadZipFile

import numpy as np

from graphopt.autotune.features import NAMES, Vector, features
from graphopt.autotune.records import Measured
from graphopt.autotune.space import LoopNest, Schedule, SearchSpace, Workload
from graphopt.errors import UsageError
from graphopt.target import Target

LEAST = 16  # measurements before anything is predicted
MOST = 20_000  # measurements that are kept, the newest
_FRESH = 0.05  # share of new measurements after which the trees are fitted again
_PARAMS = {"max_depth": 6, "eta": 0.2, "min_child_weight": 0.5, "subsample": 1.0, "colsample_bytree": 0.7, "lambda": 1.0,
           "tree_method": "hist", "max_bin": 64, "nthread": 1, "verbosity": 0}  # fmt: skip
_ROUNDS = 80


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
        self._trees: Any = None
        self._fitted = 0  # rows that the trees have seen
        self._cache: dict[tuple[str, str, Schedule], Vector] = {}

    def __len__(self) -> int:
        """Measurements that it knows."""
        return len(self._rows)

    # --- what the search calls -------------------------------------------------------------------------------------------

    def observe(self, w: Workload, target: Target, results: Sequence[tuple[Schedule, Measured]], spaces: Sequence[SearchSpace]) -> None:
        """Learn from what was measured of a workload."""
        for s, m in results:
            self._rows.append(self._features(w, target, s, _nests(spaces)))
            self._seconds.append(m.seconds if m.ok and m.seconds is not None else math.inf)
            self._groups.append(w.key)
        if len(self._rows) > MOST:
            del self._rows[:-MOST], self._seconds[:-MOST], self._groups[:-MOST]
            self._fitted = 0

    def predict(self, w: Workload, target: Target, schedules: Sequence[Schedule], spaces: Sequence[SearchSpace]) -> list[float] | None:
        """A score for each schedule; None while too little is known."""
        if self.why_not or not schedules or not self._ready():
            return None
        import xgboost

        nests = _nests(spaces)
        rows = np.stack([self._features(w, target, s, nests) for s in schedules])
        return [float(x) for x in self._trees.predict(xgboost.DMatrix(rows, nthread=1))]

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
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise UsageError(f"not a cost model: {error}") from None
        model._rows = list(rows)
        return model

    # --- learning ----------------------------------------------------------------------------------------------------------

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

        labels = self._labels()
        data = xgboost.DMatrix(np.stack(self._rows), label=labels, weight=np.maximum(labels, 0.05), nthread=1)
        self._trees = xgboost.train({**_PARAMS, "seed": self.seed, "objective": "reg:squarederror"}, data, _ROUNDS)
        self._fitted = len(self._rows)

    def _labels(self) -> Vector:
        """Normalised throughput, 0 .. 1."""
        best: dict[str, float] = {}
        for group, seconds in zip(self._groups, self._seconds, strict=True):
            best[group] = min(best.get(group, math.inf), seconds)
        labels = [best[g] / t if t < math.inf else 0.0 for g, t in zip(self._groups, self._seconds, strict=True)]
        return np.asarray(labels, dtype=np.float32)


def pairwise_accuracy(scores: Sequence[float], seconds: Sequence[float], apart: float = 0.0) -> float:
    """Share of pairs that scores put in the order of the times; a tie of scores counts half. 0.5 is chance; nan without pairs.

    Args:
        apart: pairs whose times differ by no more than this share of the shorter one are not counted.
    """
    x, t = np.asarray(scores, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if len(x) < 2:
        return math.nan
    i, j = np.triu_indices(len(x), 1)
    counted = np.abs(t[i] - t[j]) > apart * np.minimum(t[i], t[j])
    i, j = i[counted], j[counted]
    if not len(i):
        return math.nan
    agreement = np.sign(x[i] - x[j]) * np.sign(t[j] - t[i])
    return float(np.mean((agreement + 1) / 2))


def _nests(spaces: Sequence[SearchSpace]) -> dict[str, Callable[[Schedule], LoopNest] | None]:
    """The loops of each sketch."""
    return {f"{space.template}/{sketch}": space.nest for space in spaces for sketch in space.sketches}


def _missing() -> str:
    try:
        import xgboost  # noqa: F401
    except Exception as error:  # a library that does not load is as good as none
        return f"no cost model, the search goes by what it measures alone: xgboost cannot be used ({error}); pip install graphopt[tune]"
    return ""

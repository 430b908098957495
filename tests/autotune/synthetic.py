"""A search space with structure and a synthetic time for each of its points, for tests that need no device."""

from __future__ import annotations

import math

from graphopt.autotune.records import Measured, Status
from graphopt.autotune.space import Constraint, Param, Schedule, SearchSpace, Workload
from graphopt.target import Target

TARGET = Target("cpu", "x86_64", "synthetic", ("avx2", "fma"), 4)
WORKLOAD = Workload("pointwise", "graph @g(%x: f32[64]) -> f32[64] {\n %0: f32[64] = relu(%x)\n return %0\n}")

TILE = tuple((a, b, c) for a in (1, 2, 4, 8, 16) for b in (1, 2, 4, 8, 16) for c in (1, 2, 4, 8, 16) if a * b * c == 64)


def space(template: str = "synthetic", sketches: tuple[str, ...] = ("plain", "packed")) -> SearchSpace:
    """About 50,000 points: too many to list."""
    return SearchSpace(
        template,
        sketches,
        (
            Param("rows", (8, 1, 2, 4, 6, 12, 16), "tile"),
            Param("columns", (16, 32, 48, 64), "tile"),
            Param("block", (128, 32, 64, 256, 512, 1024), "cache"),
            Param("tile", TILE),
            Param("order", ("rows", "columns")),
            Param("parallel", (True, False)),
        ),
        (Constraint("more accumulators than registers", lambda k: int(str(k["rows"])) * int(str(k["columns"])) // 16 <= 28),),
    )


def small() -> SearchSpace:
    """24 points, of which 4 are rejected."""
    return SearchSpace(
        "small", params=(Param("a", (1, 2, 4, 8)), Param("b", (True, False)), Param("c", ("x", "y", "z"))),
        constraints=(Constraint("8 z is too much", lambda k: not (k["a"] == 8 and k["c"] == "z")),
                     Constraint("1 x is too little", lambda k: not (k["a"] == 1 and k["c"] == "x"))),
    )  # fmt: skip


def seconds(s: Schedule) -> float:
    """A smooth landscape: tiles of 12 by 32 in blocks of 256 are best, serial runs four times as long."""
    k = dict(s.knobs)
    far = abs(math.log2(s["rows"] / 12)) + abs(math.log2(s["columns"] / 32)) + 0.5 * abs(math.log2(s["block"] / 256))
    far += 0.3 * sum(abs(math.log2(x / 4)) for x in s["tile"])
    return (1 + 0.2 * far) * (1 if k["parallel"] else 4) * (1.1 if k["order"] == "rows" else 1) * (0.9 if s.sketch == "packed" else 1)


def measured(s: Schedule) -> Measured:
    """Tiles of 16 rows crash."""
    if s["rows"] == 16:
        return Measured(Status.CRASHED, reason="it crashed")
    return Measured(Status.OK, seconds=seconds(s), spread=0.0)

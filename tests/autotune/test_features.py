"""Features: one length for all, and every sketch and knob in a place of its own."""

from __future__ import annotations

import numpy as np
from synthetic import TARGET, WORKLOAD

from graphopt.autotune.features import NAMES, features
from graphopt.autotune.space import Schedule
from graphopt.backends.tvm.tileform import BLOCKED, PLAIN


def row(s: Schedule) -> dict[str, float]:
    return dict(zip(NAMES, features(WORKLOAD, s, TARGET).tolist(), strict=True))


def places(s: Schedule, what: str) -> dict[str, float]:
    return {n: x for n, x in row(s).items() if n.startswith(f"{what} ")}


def test_the_sketches_of_a_product_differ() -> None:
    seen = {tuple(places(Schedule.make("tile", sketch), "sketch").values()) for sketch in (*PLAIN, *BLOCKED)}
    assert len(seen) == 4


def test_a_knob_has_the_same_place_in_every_sketch() -> None:
    """One more knob, early in the alphabet, moves none of the others."""
    without = {"mr": 8, "nr": 48, "unroll": 4, "parallel": True}
    a, b = places(Schedule.make("tile", **without), "knob"), places(Schedule.make("tile", "blocked", block=128, **without), "knob")
    differ = [n for n in a if a[n] != b[n]]
    assert len(differ) == 1 and a[differ[0]] == -1.0 and b[differ[0]] == np.float32(np.log2(129))


def test_values_of_a_knob_differ_and_false_is_not_absent() -> None:
    values: tuple[bool | int | str | tuple[int, ...], ...] = (False, True, 2, 4, "rows", "columns", (2, 4), (4, 2))
    assert len({tuple(places(Schedule.make("t", knob=v), "knob").values()) for v in values}) == len(values)
    assert places(Schedule.make("t"), "knob") != places(Schedule.make("t", knob=False), "knob")


def test_more_knobs_than_places_are_cut_off() -> None:
    many = Schedule.make("t", **{f"k{i}": i + 2 for i in range(60)})
    assert len(features(WORKLOAD, many, TARGET)) == len(NAMES) and -1.0 not in places(many, "knob").values()

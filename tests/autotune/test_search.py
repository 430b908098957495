"""The search: deterministic, without repeats, within the constraints, complete on small spaces, better than chance on large ones."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from statistics import median

import pytest
from synthetic import TARGET, TILE, WORKLOAD, measured, seconds, small, space

from graphopt.autotune.moves import move
from graphopt.autotune.records import Measured, Status
from graphopt.autotune.search import Evolution, Search
from graphopt.autotune.sketch import Sketch
from graphopt.autotune.space import Constraint, Param, Schedule, SearchSpace

LARGE = space()
OK = Measured(Status.OK, seconds=1.0)


def search(*spaces: SearchSpace, seed: int = 0, **options: object) -> Search:
    return Search(WORKLOAD, TARGET, spaces or (LARGE,), seed=seed, **options)  # type: ignore[arg-type]


def run(s: Search, trials: int, batch: int = 16) -> list[Schedule]:
    """Everything that is proposed in some trials; each batch is measured before the next."""
    out: list[Schedule] = []
    while len(out) < trials and not s.exhausted:
        new = s.propose(min(batch, trials - len(out)))
        s.observe([(c, measured(c) if c.template == "synthetic" else OK) for c in new])
        out += new
    return out


@pytest.mark.parametrize("sort", ["large", "small"])
def test_same_seed_same_candidates(sort: str) -> None:
    spaces = (LARGE, space("other", ("plain",))) if sort == "large" else (small(),)
    a, b, c = (run(search(*spaces, seed=n), 20) for n in (3, 3, 4))
    assert a == b
    assert a != c


@pytest.mark.parametrize("seed", range(3))
def test_nothing_twice_and_nothing_that_is_rejected(seed: int) -> None:
    s = search(seed=seed)
    found = run(s, 200)
    assert len(found) == len(set(found)) == 200
    assert all(LARGE.rejection(c) is None for c in found)
    assert set(s.rejected) == {"more accumulators than registers"}
    assert s.rejected.total() > 0


def test_defaults_come_first_then_seeds_at_their_nearest_point() -> None:
    odd = Schedule.make("synthetic", "packed", rows=5, columns=32, block=200, tile=(4, 4, 4), order="rows", parallel=True)
    elsewhere = Schedule.make("synthetic", "gone", rows=2, tile=(64, 1, 1), order="diagonal", unroll=4)
    first = search(seeds=[odd, elsewhere, Schedule.make("another", rows=4)]).propose(4)
    assert first[:2] == [k.default() for k in (Sketch(LARGE, "plain"), Sketch(LARGE, "packed"))]
    assert dict(first[2].knobs) == {"rows": 6, "columns": 32, "block": 256, "tile": (4, 4, 4), "order": "rows", "parallel": True}
    assert first[3].sketch == "plain" and first[3]["rows"] == 2 and first[3]["order"] == "rows" and first[3]["tile"][0] == 16


def test_known_candidates_are_not_proposed_and_are_learned_from() -> None:
    before = run(search(seed=1), 40)
    known = [(c, measured(c)) for c in before]
    s = search(seed=2, known=[*known, (Schedule.make("gone"), OK)])
    assert s.best is not None and s.best[1].seconds == min(m.seconds for _, m in known if m.seconds is not None)
    assert not set(run(s, 100)) & set(before)


def test_a_small_space_is_proposed_whole_and_then_exhausted() -> None:
    s = search(small())
    assert s.size == 20 and not s.exhausted
    found = run(s, 1000, batch=7)
    assert len(found) == 20 and s.exhausted and s.propose(5) == []
    assert s.rejected == {"8 z is too much": 2, "1 x is too little": 2}


def test_a_large_space_with_few_points_ends() -> None:
    """More points than are listed, of which a constraint leaves three."""
    params = tuple(Param(f"p{i}", tuple(range(10))) for i in range(4))
    three = ([0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2])
    few = SearchSpace("few", params=params, constraints=(Constraint("only three", lambda k: list(k.values()) in three),))
    s = search(few)
    found = run(s, 50)
    assert s.exhausted and 1 <= len(found) <= 3


def test_a_space_without_knobs_has_one_point() -> None:
    s = search(SearchSpace("fixed"))
    assert s.propose(8) == [SearchSpace("fixed").default()] and s.exhausted


def test_failures_are_survived() -> None:
    s = search()
    for _ in range(5):
        s.observe([(c, Measured(Status.CRASHED, reason="always")) for c in s.propose(8)])
    assert s.best is None and len(s.measured) == 40
    assert len(s.propose(8)) == 8


def test_epsilon_keeps_some_of_every_batch_random() -> None:
    """With nothing but chance allowed, the search is random search; without any, its points descend from the best."""
    def mean_of_last(epsilon: float) -> float:
        last = [run(search(seed=n, evolution=Evolution(epsilon=epsilon)), 96)[-32:] for n in range(5)]
        return sum(seconds(c) for batch in last for c in batch) / 160

    assert mean_of_last(0.0) < 0.8 * mean_of_last(1.0)


def test_evolution_beats_chance_where_there_is_structure() -> None:
    def best(epsilon: float, seed: int) -> float:
        return min(seconds(c) for c in run(search(seed=seed, evolution=Evolution(epsilon=epsilon)), 128))

    evolved, random = ([best(e, n) for n in range(7)] for e in (0.15, 1.0))
    assert median(evolved) < median(random)


def test_a_sketch_of_few_points_does_not_take_half_of_the_random_ones() -> None:
    """Twelve points beside thousands: chance among points would take none, chance among sketches 100."""
    few = SearchSpace("few", params=(Param("a", (1, 2, 3)), Param("b", (1, 2, 3, 4))))
    s = search(few, LARGE, evolution=Evolution(epsilon=1.0))
    assert 1 <= sum(c.template == "few" for c in s.propose(202)) <= 12
    drawn = [s._random().template for _ in range(300)]
    assert drawn.count("few") < 20


class Favours:
    """A model that likes many rows best, and picks what has few columns."""

    def observe(self, *_: object) -> None:
        pass

    def predict(self, w: object, t: object, schedules: Sequence[Schedule], spaces: object) -> list[float]:
        return [float(s["rows"]) for s in schedules]

    def pick(self, w: object, t: object, schedules: Sequence[Schedule], spaces: object, n: int) -> list[Schedule]:
        return sorted(schedules, key=lambda s: int(s["columns"]))[:n]


@pytest.mark.parametrize("enumerated", [0, 10**6])
def test_a_batch_is_what_the_model_picks(enumerated: int) -> None:
    s = search(model=Favours(), evolution=Evolution(epsilon=0.25, enumerated=enumerated))
    s.observe([(c, measured(c)) for c in s.propose(16)])
    batch = s.propose(16)
    assert [c["columns"] for c in batch[:12]] == [16] * 12
    assert len({c["columns"] for c in batch[12:]}) > 1 or enumerated  # the rest is random


def test_a_number_moves_to_a_neighbour_and_tiles_move_a_factor() -> None:
    rng = Random(0)
    number, tile, name = Param("n", (8, 1, 2, 4, 16)), Param("t", TILE), Param("s", ("x", "y"))
    moved = [move(number, 4, rng) for _ in range(400)]
    assert set(moved) == {1, 2, 8, 16} and moved.count(2) + moved.count(8) > 300
    for _ in range(50):
        new = move(tile, (4, 4, 4), rng)
        assert isinstance(new, tuple) and new[0] * new[1] * new[2] == 64 and sum(a != b for a, b in zip(new, (4, 4, 4), strict=True)) == 2
    assert {move(name, "x", rng) for _ in range(5)} == {"y"}


def test_a_child_takes_groups_whole() -> None:
    rng, sketch = Random(0), Sketch(LARGE, "plain")
    a, b = (sketch.make({**dict(sketch.default().knobs), "rows": r, "columns": c}) for r, c in ((1, 64), (4, 32)))
    children = {(c["rows"], c["columns"]) for c in (sketch.child(a, b, rng) for _ in range(40))}
    assert children == {(1, 64), (4, 32)}

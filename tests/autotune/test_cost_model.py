"""The cost model: what it learns, keeps and says; it needs xgboost, and the search does without."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import TARGET, WORKLOAD, measured, seconds, space

from graphopt.autotune import cost_model
from graphopt.autotune.cost_model import LEAST, CostModel, pairwise_accuracy
from graphopt.autotune.records import Measured, Status
from graphopt.autotune.search import Evolution, Search
from graphopt.autotune.sketch import Sketch
from graphopt.autotune.space import Schedule, SearchSpace, Workload
from graphopt.errors import UsageError

SPACE = space()


def points(count: int, seed: int) -> list[Schedule]:
    rng, found = Random(seed), dict.fromkeys(list[Schedule]())
    while len(found) < count:
        s = Sketch(SPACE, rng.choice(SPACE.sketches)).random(rng)
        if SPACE.rejection(s) is None:
            found[s] = None
    return list(found)


def learned(count: int, seed: int = 0, w: Workload = WORKLOAD) -> CostModel:
    pytest.importorskip("xgboost")
    model = CostModel()
    model.observe(w, TARGET, [(s, measured(s)) for s in points(count, seed)], [SPACE])
    return model


def accuracy(model: CostModel, w: Workload = WORKLOAD) -> float:
    unseen = [s for s in points(200, seed=99) if measured(s).ok]
    scores = model.predict(w, TARGET, unseen, [SPACE])
    assert scores is not None
    return pairwise_accuracy(scores, [seconds(s) for s in unseen])


def test_it_orders_candidates_that_it_has_not_seen() -> None:
    assert accuracy(learned(200)) > 0.85


def test_what_it_learned_of_one_workload_serves_another() -> None:
    other = Workload("pointwise", WORKLOAD.text.replace("64", "96"))
    assert accuracy(learned(200), other) > 0.8


def test_what_a_search_leaves_out_is_ordered_better_with_the_process() -> None:
    """Mostly fast ones were measured, mostly slow ones are asked for."""
    pytest.importorskip("xgboost")
    rng, model = Random(0), CostModel()
    fast_first = sorted((s for s in points(500, seed=3) if measured(s).ok), key=lambda s: seconds(s) * math.exp(rng.gauss(0, 0.6)))
    model.observe(WORKLOAD, TARGET, [(s, measured(s)) for s in fast_first[:150]], [SPACE])
    left = fast_first[150:]

    def order(share: float) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cost_model, "_SHARE", share)
            scores = model.predict(WORKLOAD, TARGET, left, [SPACE])
        assert scores is not None
        return pairwise_accuracy(scores, [seconds(s) for s in left])

    together, trees = order(cost_model._SHARE), order(0.0)
    assert together > 0.93 and together > trees + 0.02


def test_same_seed_same_scores_and_picks() -> None:
    a, b, c = (learned(120, seed=0), learned(120, seed=0), CostModel(seed=1))
    c.observe(WORKLOAD, TARGET, [(s, measured(s)) for s in points(120, 0)], [SPACE])
    asked = points(40, 7)
    first, second, other = (m.predict(WORKLOAD, TARGET, asked, [SPACE]) for m in (a, b, c))
    assert first == second != other
    assert a.pick(WORKLOAD, TARGET, asked, [SPACE], 8) == b.pick(WORKLOAD, TARGET, asked, [SPACE], 8)


def test_what_is_picked_is_fast() -> None:
    asked = [s for s in points(300, 7) if measured(s).ok]
    picked = learned(200).pick(WORKLOAD, TARGET, asked, [SPACE], 16)
    assert picked is not None and len(set(picked)) == 16 and set(picked) <= set(asked)
    assert sum(map(seconds, picked)) / 16 < 0.7 * sum(map(seconds, asked)) / len(asked)


def test_of_another_workload_the_greatest_scores_are_picked() -> None:
    """There is no process that could say where little is known."""
    other, model, asked = Workload("pointwise", WORKLOAD.text.replace("64", "96")), learned(200), points(40, 7)
    scores = model.predict(other, TARGET, asked, [SPACE])
    assert scores is not None
    order = sorted(range(40), key=lambda i: -scores[i])
    assert model.pick(other, TARGET, asked, [SPACE], 5) == [asked[i] for i in order[:5]]


def test_new_measurements_count_at_once() -> None:
    """However many rows of other workloads there are, the process of this one is fitted to what was just measured."""
    model = learned(400)
    other = Workload("pointwise", WORKLOAD.text.replace("64", "96"))
    backwards = [(s, Measured(Status.OK, seconds=1.0 / seconds(s))) for s in points(20, 5)]  # fewer than refit the trees
    before = model.predict(other, TARGET, points(60, 6), [SPACE])
    model.observe(other, TARGET, backwards[:16], [SPACE])
    assert (between := model.predict(other, TARGET, points(60, 6), [SPACE])) is not None
    model.observe(other, TARGET, backwards[16:], [SPACE])
    after = model.predict(other, TARGET, points(60, 6), [SPACE])
    assert after != between
    assert before is not None and after is not None
    truth = [1.0 / seconds(s) for s in points(60, 6)]
    assert pairwise_accuracy(after, truth) > pairwise_accuracy(before, truth) + 0.2


def test_failures_rank_last() -> None:
    scores = learned(300).predict(WORKLOAD, TARGET, points(200, seed=5), [SPACE])
    assert scores is not None
    failed = [x for x, s in zip(scores, points(200, seed=5), strict=True) if not measured(s).ok]
    fine = [x for x, s in zip(scores, points(200, seed=5), strict=True) if measured(s).ok]
    assert sum(failed) / len(failed) < 0.5 * sum(fine) / len(fine)


def test_what_was_lost_teaches_nothing() -> None:
    model = CostModel()
    model.observe(WORKLOAD, TARGET, [(s, Measured(Status.LOST)) for s in points(3, seed=0)], [SPACE])
    assert len(model) == 0


def test_little_is_not_enough() -> None:
    assert learned(LEAST - 1).predict(WORKLOAD, TARGET, points(3, 1), [SPACE]) is None
    assert learned(LEAST).predict(WORKLOAD, TARGET, points(3, 1), [SPACE]) is not None
    assert learned(LEAST).predict(WORKLOAD, TARGET, [], [SPACE]) is None
    assert learned(LEAST - 1).pick(WORKLOAD, TARGET, points(3, 1), [SPACE], 2) is None


def test_only_failures_give_no_error() -> None:
    model = CostModel()
    model.observe(WORKLOAD, TARGET, [(s, Measured(Status.CRASHED)) for s in points(30, 0)], [SPACE])
    pytest.importorskip("xgboost")
    scores = model.predict(WORKLOAD, TARGET, points(3, 1), [SPACE])
    assert scores is not None and all(math.isfinite(x) for x in scores)


def test_it_survives_its_bytes_and_gives_the_same_scores() -> None:
    model = learned(120)
    back = CostModel.from_bytes(model.to_bytes())
    assert len(back) == len(model) == 120
    assert back.predict(WORKLOAD, TARGET, points(20, 7), [SPACE]) == model.predict(WORKLOAD, TARGET, points(20, 7), [SPACE])
    assert len(CostModel.from_bytes(CostModel().to_bytes())) == 0


@pytest.mark.parametrize("data", [b"", b"not a model", b"PK\x03\x04 torn"])
def test_bytes_of_something_else(data: bytes) -> None:
    with pytest.raises(UsageError, match="not a cost model"):
        CostModel.from_bytes(data)


def test_bytes_with_other_features(monkeypatch: pytest.MonkeyPatch) -> None:
    data = CostModel().to_bytes()
    monkeypatch.setattr(cost_model, "NAMES", (*cost_model.NAMES, "one more"))
    with pytest.raises(UsageError, match="other features"):
        CostModel.from_bytes(data)


def test_without_xgboost_the_search_goes_on_and_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "xgboost", None)
    model = CostModel()
    assert "xgboost" in model.why_not and "graphopt[tune]" in model.why_not
    search = Search(WORKLOAD, TARGET, [SPACE], seed=0, model=model)
    for _ in range(4):
        search.observe([(s, measured(s)) for s in search.propose(16)])
    assert len(search.measured) == 64 and search.predictions == [] and len(model) == 64


@pytest.mark.parametrize("enumerated", [0, 10**6])
def test_the_search_finds_more_with_it(enumerated: int) -> None:
    pytest.importorskip("xgboost")

    def best(model: CostModel | None, seed: int) -> float:
        search = Search(WORKLOAD, TARGET, [small_enough()], seed=seed, model=model, evolution=Evolution(enumerated=enumerated))
        for _ in range(5):
            search.observe([(s, measured(s)) for s in search.propose(16)])
        assert bool(search.predictions) == (model is not None)
        return min(seconds(s) for s, m in search.measured.items() if m.ok)

    with_model, without = (sum(best(CostModel() if use else None, n) for n in range(3)) for use in (True, False))
    assert with_model < without


def small_enough() -> SearchSpace:
    """Some thousand points."""
    from dataclasses import replace

    return replace(SPACE, params=tuple(replace(p, choices=p.choices[:8]) for p in SPACE.params))


# --- the measure -------------------------------------------------------------------------------------------------------------


def test_pairwise_accuracy() -> None:
    assert pairwise_accuracy([3, 2, 1], [1.0, 2.0, 3.0]) == 1.0
    assert pairwise_accuracy([1, 2, 3], [1.0, 2.0, 3.0]) == 0.0
    assert pairwise_accuracy([0, 0, 0], [1.0, 2.0, 3.0]) == 0.5
    assert pairwise_accuracy([2, 1, 3], [1.0, 1.01, 0.5], apart=0.05) == 1.0
    assert math.isnan(pairwise_accuracy([1], [1.0])) and math.isnan(pairwise_accuracy([1, 2], [1.0, 1.0]))


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(0.1, 9)), min_size=2, max_size=12))
def test_pairwise_accuracy_counts_pairs(pairs: list[tuple[float, float]]) -> None:
    scores, times = [x for x, _ in pairs], [t for _, t in pairs]
    counted = [(1.0 if (x - y) * (u - t) > 0 else 0.5 if x == y else 0.0)
               for i, (x, t) in enumerate(pairs) for y, u in pairs[i + 1 :] if t != u]  # fmt: skip
    got = pairwise_accuracy(scores, times)
    assert (math.isnan(got) and not counted) or got == pytest.approx(sum(counted) / len(counted))


def test_what_is_told_twice_counts_once() -> None:
    results = [(s, measured(s)) for s in points(40, 0)]
    model = CostModel()
    model.observe(WORKLOAD, TARGET, results[:30], [SPACE])
    once = len(model)
    model.observe(WORKLOAD, TARGET, results[:30], [SPACE])
    assert len(model) == once
    model = CostModel.from_bytes(model.to_bytes())
    model.observe(WORKLOAD, TARGET, results, [SPACE])
    assert once < len(model) <= 40

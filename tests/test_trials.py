"""Cases that kernels are tried on: their sizes, and what is no case."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.autotune.space import Workload
from graphopt.errors import GraphoptError
from graphopt.ir import parse_graph
from graphopt.target import detect
from graphopt.trials import case_maker
from graphopt.tuning_tasks import tasks_of

SYMBOLIC = Workload.of(parse_graph("""
graph @g(%x: f32[N, 4]) -> f32[N, 4] where 1 <= N {
  %0: f32[N, 4] = exp(%x)
  return %0
}"""), "pointwise")  # fmt: skip
FIXED = Workload.of(parse_graph("""
graph @g(%x: f32[6, 4]) -> f32[6, 4] {
  %0: f32[6, 4] = exp(%x)
  return %0
}"""), "pointwise")  # fmt: skip


def test_even_seeds_have_the_sizes_that_are_timed_and_odd_ones_others() -> None:
    (symbol,) = SYMBOLIC.graph.symbols
    make = case_maker(SYMBOLIC, {symbol: 6})
    cases = [make(seed) for seed in range(8)]
    assert {c.sizes for c in cases[::2]} == {(6,)}
    assert (6,) not in {c.sizes for c in cases[1::2]}
    assert len({c.sizes for c in cases[1:6:2]}) == 3, "three winners one after the other are tried at three sizes"
    for c in cases:
        assert c.inputs[0].shape == c.outputs[0].shape == (*c.sizes, 4)
        assert not c.judge([c.inputs[0].exp()]).reason and c.judge([c.inputs[0].sin()]).reason


def test_a_workload_without_other_sizes_is_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: object, **options: object) -> None:
        raise GraphoptError("no values were found")

    compiled = graphopt.compile(torch.nn.Linear(4, 4), (torch.randn(2, 4),), tuning_db=None)
    profile = compiled.profile(torch.randn(2, 4), runs=1)
    monkeypatch.setattr("graphopt.trials.sample_bindings", none)
    found = tasks_of([profile], detect())
    assert not found.tasks and ("no values were found" in why for _, why in found.left_out)


def test_without_symbols_all_seeds_have_the_same_sizes_and_other_numbers() -> None:
    first, second = map(case_maker(FIXED), (0, 1))
    assert first.sizes == second.sizes == () and first.inputs[0].shape == second.inputs[0].shape == (6, 4)
    assert not first.inputs[0].equal(second.inputs[0])

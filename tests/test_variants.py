"""Variants for hot sizes: which are made, which runs, that values and weights stay right, and that no call compiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import graphopt
from graphopt.capture.captured import Captured
from graphopt.errors import UsageError
from graphopt.ir import parse_graph
from graphopt.ir.dims import Range
from graphopt.variants import Domain, plan_domains
from tests.test_symbolic_sizes import CASES, compiled, judge, randn

GRAPH = "graph @g(%x: f32[B, S], %y: f32[2*S, 4]) -> f32[B, S]\nwhere 1 <= B, 2 <= S <= 512 {\n return %x\n}"


pytestmark = pytest.mark.usefixtures("fresh")


def captured(**examples: int) -> Captured:
    return Captured(parse_graph(GRAPH), [], [], [], {}, examples=examples, input_names={0: "tokens", 1: "y"})


def planned(hot: Any, **examples: int) -> list[str]:
    return [str(d) for d in plan_domains(captured(**examples), hot)[0]]


# --- which variants there are ------------------------------------------------------------------------------------------


def test_the_sizes_of_the_examples_are_one_variant() -> None:
    assert planned("auto", B=2, S=128) == ["B == 2 and S == 128"]
    assert planned("none", B=2, S=128) == []
    assert planned("auto", B=2) == []  # the size of an axis that the examples do not show
    assert planned("auto", B=2, S=1024) == []  # outside of what was captured


def test_declared_sizes_by_axis_and_by_symbol() -> None:
    assert planned({"tokens[1]": [128, 64]}) == ["S == 128", "S == 64"]
    assert planned({"S": [128], "tokens[0]": [1, 8]}) == ["B == 1 and S == 128", "B == 8 and S == 128"]


def test_the_narrowest_domain_comes_first() -> None:
    assert planned({"S": [(2, 64), (2, 16), 8]}) == ["S == 8", "2 <= S <= 16", "2 <= S <= 64"]


def test_a_range_is_cut_to_what_the_size_can_be() -> None:
    assert planned({"S": [(0, 16), (256, 9999)]}) == ["2 <= S <= 16", "256 <= S <= 512"]
    with pytest.raises(UsageError, match="cannot be 600; it is from 2 to 512"):
        planned({"tokens[1]": [600]})


def test_names_that_are_no_size_of_this_graph_are_noted() -> None:
    domains, notes = plan_domains(captured(), {"token[1]": [8], "y[1]": [4], "y[0]": [8]})
    assert not domains
    assert "no size 'token[1]' (did you mean 'tokens[1]'?)" in notes[0]
    assert "y[1] is always 4" in notes[1] and "y[0] is 2*S: give sizes of S instead" in notes[2]


def test_sizes_of_a_graph_that_has_none() -> None:
    static = Captured(parse_graph("graph @g(%x: f32[2]) -> f32[2] {\n return %x\n}"), [], [], [], {})
    domains, notes = plan_domains(static, {"x[9]": [1]})
    assert not domains and notes == ["hot_sizes: this graph has no symbolic sizes, so none is 'x[9]'"]
    assert plan_domains(static, "auto") == plan_domains(static, "none") == plan_domains(static, {}) == ([], [])


def test_too_many_variants_are_refused() -> None:
    with pytest.raises(UsageError, match="20 variants of one graph; at most 16"):
        planned({"B": [1, 2, 3, 4], "S": [2, 3, 4, 5, 6]})


@pytest.mark.parametrize("value", ["often", {"x": 3}, {"x[0]": []}, {"x[0]": [-1]}, {"x[0]": [(5, 2)]}, {"x[0]": ["8"]}, 7])
def test_values_that_the_option_cannot_have(value: Any) -> None:
    with pytest.raises(UsageError, match="hot_sizes must be"):
        graphopt.Options(hot_sizes=value)


def test_both_ends_of_a_domain_belong_to_it() -> None:
    domain = Domain((("B", Range(1, 1)), ("S", Range(2, 16))), "")
    assert [({"B": 1, "S": s} in domain) for s in (1, 2, 16, 17)] == [False, True, True, False]
    assert {"B": 2, "S": 8} not in domain


# --- which one runs ----------------------------------------------------------------------------------------------------

tvm = pytest.mark.tvm


def runs(report: graphopt.Report) -> dict[str, int]:
    return {v.condition or "general": v.runs for v in (*report.variants, report)}


@tvm
def test_each_call_takes_the_variant_of_its_size() -> None:
    module = nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 7)).eval()
    run = compiled(module, (5, 40), (Dim.AUTO, None), hot_sizes={"input[0]": [8, (2, 16), 1000]})
    (name,) = run.report.variants[0].condition.split(" == ")[:1]
    for n in (2, 8, 16, 17, 1000, 8):
        judge(module, run, randn(n, 40))
    expected = {f"{name} == 8": 2, f"{name} == 1000": 1, f"2 <= {name} <= 16": 2, "general": 1}
    assert runs(run.report) == expected
    assert "2 <= " in run.report.summary() and "all others" in run.report.summary()
    assert [v["runs"] for v in run.report.to_json()["variants"]] == [2, 1, 2]


@tvm
@pytest.mark.parametrize("name", CASES)
def test_a_variant_never_changes_values(name: str) -> None:
    """The sizes next to a variant's, at both of its ends, and its own."""
    module, shape, axes = CASES[name]
    torch.manual_seed(0)
    run = compiled(module, shape(6), axes)
    for n in (5, 6, 7, 6):
        judge(module, run, randn(*shape(n)))
    assert [v.runs for v in run.report.variants] == [2] and run.report.runs == 2
    assert not dims_left(run.report.variants[0])


def dims_left(report: graphopt.Report) -> bool:
    return "where" in report.text_after.splitlines()[1]


@tvm
def test_no_new_size_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(40, 50), nn.LayerNorm(50)).eval()
    run = torch.compile(module, backend="graphopt", dynamic=True)
    run(randn(6, 40))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something is compiled")

    monkeypatch.setattr("graphopt.compiler.compile_prepared", refuse)
    for n in (2, 6, 7, 64, 129):
        torch.testing.assert_close(run(randn(n, 40)), module(randn(n, 40)))
    (report,) = graphopt.reports()
    assert [v.runs for v in report.variants] == [2] and report.runs == 4


@tvm
def test_names_of_arguments_under_dynamo() -> None:
    class Two(nn.Module):
        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return (tokens * mask).softmax(-1)

    run = torch.compile(Two(), backend="graphopt", dynamic=True, options={"hot_sizes": {"mask[1]": [64], "nothing[0]": [1]}})
    for n in (6, 64, 65):
        torch.testing.assert_close(run(randn(4, n), randn(4, n)), Two()(randn(4, n), randn(4, n)))
    (report,) = graphopt.reports()
    assert list(runs(report).values()) == [1, 2] and "no size 'nothing[0]'" in report.notes[0]


# --- weights and inputs ------------------------------------------------------------------------------------------------


@tvm
def test_variants_share_the_values_made_from_weights_and_follow_their_changes() -> None:
    module = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    run = compiled(module, (6, 64), (Dim.AUTO, None))
    program = run._compiled.program
    for n in (6, 7, 6):
        judge(module, run, randn(n, 64))
    assert program.staged.computed == 1
    every = program.staged._entries[0].values
    packed = [p._mine(every) for p in (program.general, program.variants[0].program)]
    assert packed[0] and all(a is b for a, b in zip(*packed, strict=True)), "a weight is packed twice"
    module[0].weight.mul_(-1.5)
    for n in (7, 6):
        judge(module, run, randn(n, 64))
    assert program.staged.computed == 2


@tvm
def test_a_variant_refuses_inputs_that_contradict_each_other() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x + y)

    n = Dim("n", min=2)
    run = graphopt.compile(Sum(), (randn(6, 4), randn(6, 4)), dynamic_shapes=({0: n}, {0: n}))
    with pytest.raises(ValueError, match="compiled for"):
        run(randn(6, 4), randn(5, 4))
    torch.testing.assert_close(run(randn(6, 4), randn(6, 4)), torch.tanh(2 * randn(6, 4)))


@tvm
def test_inputs_in_another_layout() -> None:
    run = compiled(CASES["gram"][0], (6, 9), (Dim.AUTO, None))
    for n in (6, 7):
        judge(CASES["gram"][0], run, randn(9, n).t())
        judge(CASES["gram"][0], run, randn(n, 18)[:, ::2])


@tvm
def test_variants_of_a_model_that_owns_its_weights() -> None:
    module = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    expected = [module(randn(n, 64)) for n in (6, 7)]
    run = compiled(module, (6, 64), (Dim.AUTO, None), own_weights=True)
    assert run.given_up
    for n, own in zip((6, 7), expected, strict=True):
        torch.testing.assert_close(run(randn(n, 64)), own)
    assert [v.runs for v in run.report.variants] == [1] and run.report.runs == 1

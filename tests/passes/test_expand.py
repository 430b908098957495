"""expand: which composites go, and that their expansion computes the same."""

from __future__ import annotations

import pytest
import torch
from fusing import regions, run

from graphopt.errors import UsageError
from graphopt.ir import Graph, evaluate, parse_graph
from graphopt.pass_manager import PassContext, make_pass, run_passes
from graphopt.passes.expand import Expand
from graphopt.passes.fusion import Fuse
from graphopt.target import Target
from graphopt.testing import check_pass


def ops(g: Graph) -> list[str]:
    return [n.op.name for n in g.nodes()]


def one(inputs: str, node: str, result: str) -> Graph:
    return parse_graph(f"graph @g({inputs}) -> {result} where 1 <= B {{\n %0: {result} = {node}\n return %0 }}")


def test_rope() -> None:
    check_pass(Expand(), """
        graph @g(%x: f32[B, 4], %c: f32[B, 4], %s: f32[B, 4]) -> f32[B, 4] where 1 <= B {
          %0: f32[B, 4] = rope(%x, %c, %s)
          return %0
        }""", """
        graph @g(%x: f32[B, 4], %c: f32[B, 4], %s: f32[B, 4]) -> f32[B, 4] where 1 <= B {
          %0: f32[B, 2] = slice(%x) {axis = 1, stop = 2}
          %1: f32[B, 2] = slice(%x) {axis = 1, start = 2, stop = 4}
          %2: f32[B, 2] = neg(%1)
          %3: f32[B, 4] = concat(%2, %0) {axis = 1}
          %4: f32[B, 4] = mul(%x, %c)
          %5: f32[B, 4] = mul(%3, %s)
          %6: f32[B, 4] = add(%4, %5)
          return %6
        }""")  # fmt: skip


GONE = {
    "attention": ("%q: f64[B, 2, 4], %k: f64[B, 3, 4], %m: f64[B, 2, 3]", "attention(%q, %k, %k, %m) {scale = 0.5}", "f64[B, 2, 4]"),
    "causal attention": ("%q: f64[B, 3, 4]", "attention(%q, %q, %q) {scale = 0.5, causal = true}", "f64[B, 3, 4]"),
    "batch norm": ("%x: f32[B, 3, 4], %m: f32[3]", "batch_norm(%x, %m, %m) {eps = 9.0}", "f32[B, 3, 4]"),
    "group norm": ("%x: f32[B, 4, 5], %w: f32[4]", "group_norm(%x, %w, %w) {groups = 2}", "f32[B, 4, 5]"),
    "softmax of columns": ("%x: f32[B, 4, 5]", "softmax(%x) {axis = 1}", "f32[B, 4, 5]"),
    "log_softmax of columns": ("%x: f32[B, 4, 15]", "log_softmax(%x) {axis = 1}", "f32[B, 4, 15]"),
    "variance of columns": ("%x: f32[4, B]", "var(%x) {axes = [0]}", "f32[B]"),
    "mean of columns": ("%x: f32[4, B]", "mean(%x) {axes = [0]}", "f32[B]"),
}
STAYS = {
    "softmax": ("%x: f32[B, 4]", "softmax(%x) {axis = -1}", "f32[B, 4]"),
    "layer_norm": ("%x: f32[B, 4, 5]", "layer_norm(%x) {axes = 2}", "f32[B, 4, 5]"),
    "gelu": ("%x: f32[B, 4]", "gelu(%x)", "f32[B, 4]"),
    "mean": ("%x: f32[B, 4]", "mean(%x) {axes = [1]}", "f32[B]"),
    "attention": ("%q: f32[B, 32, 4], %k: f32[B, 3, 4], %m: f32[B, 32, 3]", "attention(%q, %k, %k, %m) {scale = 0.5}", "f32[B, 32, 4]"),
    "complex": ("%x: c64[4, B]", "mean(%x) {axes = [0]}", "c64[B]"),
}


@pytest.mark.parametrize(("size", "kept"), [("4, 15", False), ("4, 16", True), ("50000, 24", False), ("50000, 2000", True)])
def test_few_long_columns_are_no_strips(size: str, kept: bool) -> None:
    """They would be a task or two, each reading memory that no cache holds twice."""
    g = parse_graph(f"graph @g(%x: f32[{size}]) -> f32[{size}] {{\n %0: f32[{size}] = softmax(%x) {{axis = 0}}\n return %0\n}}")
    Expand().run(g, PassContext(target=Target.from_name("cpu:x86-64-v4")))
    assert ("softmax" in [n.name for n in g]) is kept


def test_a_softmax_of_columns_that_lie_side_by_side_stays_whole() -> None:
    text = "graph @g(%x: f32[4, B]) -> f32[4, B]\nwhere 1 <= B {\n %0: f32[4, B] = softmax(%x) {axis = 0}\n return %0\n}"
    for target, kept in (("cpu:x86-64-v4", True), ("cuda:sm_90", False)):
        g = parse_graph(text)
        Expand().run(g, PassContext(target=Target.from_name(target)))
        assert ("softmax" in [n.name for n in g]) is kept


@pytest.mark.parametrize("case", GONE)
def test_expanded(case: str) -> None:
    g = one(*GONE[case])
    name = GONE[case][1].split("(")[0]
    ctx = run(g, [Expand()])
    assert name not in ops(g)
    assert all(Expand()._why(n, ctx) is None for n in g.nodes())
    assert any(name in r.message for r in ctx.remarks)


@pytest.mark.parametrize("batch", ["2", "B"])
def test_a_group_norm_is_one_region(batch: str) -> None:
    """Scale, shift and the activation after it go with the rows that are normalized."""
    where = " where 1 <= B" if batch == "B" else ""
    g = parse_graph(f"""graph @g(%x: f32[{batch}, 4, 5, 3], %w: f32[4], %b: f32[4]) -> f32[{batch}, 4, 5, 3]{where} {{
      %0: f32[{batch}, 4, 5, 3] = group_norm(%x, %w, %b) {{groups = 2}}
      return %0
    }}""")
    run(g, [Expand(), Fuse()])
    assert [kind for kind, _ in regions(g)] == ["rowwise"]


@pytest.mark.parametrize("case", STAYS)
def test_kept(case: str) -> None:
    g = one(*STAYS[case])
    assert not run_passes(g, [Expand()])


def test_keep_is_an_option() -> None:
    g = one(*STAYS["gelu"])
    assert run_passes(g, [make_pass("expand", {"keep": ()})])
    assert "erf" in ops(g) and "gelu" not in ops(g)
    with pytest.raises(UsageError, match="did you mean 'softmax'"):
        run_passes(g, [Expand(keep=("sofmax",))])


def test_half_precision_sums_are_expanded_in_f32() -> None:
    before = """graph @g(%x: bf16[B, 64, 5]) -> bf16[B, 64, 5]
    where 1 <= B {
      %0: bf16[B, 64, 5] = log_softmax(%x) {axis = 1}
      return %0
    }"""
    g = parse_graph(before)
    run_passes(g, [Expand()])
    assert [str(n.result.dtype) for n in g if n.name in ("exp", "sum", "log", "max")] == ["f32"] * 4
    x = torch.randn(2, 64, 5) * 4
    exact = torch.log_softmax(x.bfloat16().double(), 1)
    (mine,) = evaluate(g, [x.bfloat16()])
    eager = torch.log_softmax(x.bfloat16(), 1)
    assert (mine.double() - exact).abs().max() <= 1.01 * (eager.double() - exact).abs().max()

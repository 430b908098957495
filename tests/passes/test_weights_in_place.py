"""weights-in-place: products of few rows read their weights where they lie."""

from __future__ import annotations

import pytest
from fusing import run

from graphopt.ir import Graph, parse_graph
from graphopt.pass_manager import run_passes
from graphopt.passes.fusion import Fuse
from graphopt.passes.layout import PackWeights, WeightsInPlace
from graphopt.rewrite import PassContext
from graphopt.target import Target
from graphopt.testing import check_pass

BEFORE = """
    graph @g(%x: f32[1, 4], weight %a: f32[6, 4], weight %b: f32[2, 4]) -> f32[1, 8] {
      %0: f32[8, 4] = concat(%a, %b) {axis = 0}
      %1: f32[1, 8] = fusion(%x, %0) {kind = "matmul"} body (%x: f32[1, 4], %w: f32[8, 4]) -> f32[1, 8] {
        %0: f32[4, 8] = transpose(%w) {perm = [1, 0]}
        %1: f32[1, 8] = matmul(%x, %0)
        %2: f32[1, 8] = relu(%1)
        return %2
      }
      return %1
    }"""
AFTER = """
    graph @g(%x: f32[1, 4], weight %a: f32[6, 4], weight %b: f32[2, 4]) -> f32[1, 8] {
      %0: f32[1, 8] = fusion(%x, %a, %b) {kind = "matmul"} body (%x: f32[1, 4], %w: f32[6, 4], %w_1: f32[2, 4]) -> f32[1, 8] {
        %0: f32[4, 6] = transpose(%w) {perm = [1, 0]}
        %1: f32[4, 2] = transpose(%w_1) {perm = [1, 0]}
        %2: f32[4, 8] = concat(%0, %1) {axis = 1}
        %3: f32[1, 8] = matmul(%x, %2)
        %4: f32[1, 8] = relu(%3)
        return %4
      }
      return %0
    }"""


def test_before_and_after() -> None:
    check_pass(WeightsInPlace(depth=4), BEFORE, AFTER)


def test_a_symbolic_number_of_rows_is_left() -> None:
    text = BEFORE.replace("f32[1, ", "f32[B, ").replace("-> f32[B, 8] {", "-> f32[B, 8] where 1 <= B {")
    g = parse_graph(text)
    before = str(g)
    run_passes(g, [WeightsInPlace(depth=4)], ctx := PassContext())
    assert str(g) == before and not ctx.remarks


@pytest.mark.parametrize(("change", "said"), [
    (("weight %b", "%b"), "no frozen matrices"),
    (("f32[1, ", "f32[3, "), None),  # more rows
    (("f32[6, 4], weight", "f32[6, 4; 1, 6], weight"), "no frozen matrices"),
], ids=["computed", "rows", "strides"])  # fmt: skip
def test_must_not_fire(change, said) -> None:
    g = parse_graph(BEFORE.replace(*change))
    before = str(g)
    ctx = run(g, [WeightsInPlace(depth=4)])
    assert str(g) == before
    assert [r.message for r in ctx.remarks if r.kind == "missed"] == [] if said is None else said in ctx.remarks[0].message


def test_a_weight_that_stands_twice_in_a_join_is_read_by_one_input() -> None:
    g = parse_graph(BEFORE.replace("concat(%a, %b)", "concat(%a, %a)").replace("f32[1, 8]", "f32[1, 12]").replace("f32[8, 4]", "f32[12, 4]")
                    .replace("f32[4, 8]", "f32[4, 12]"))  # fmt: skip
    run(g, [WeightsInPlace(depth=4)])
    (region,) = (n for n in g.nodes() if n.op.name == "fusion")
    assert [v.hint for v in region.operands] == ["x", "a"]


def test_a_join_that_is_returned_too_stays() -> None:
    text = BEFORE.replace("-> f32[1, 8] {\n      %0: f32[8, 4]", "-> (f32[1, 8], f32[8, 4]) {\n      %0: f32[8, 4]")
    g = parse_graph(text.replace("return %1\n    }", "return %1, %0\n    }"))
    before = str(g)
    ctx = run(g, [WeightsInPlace(depth=4)])
    assert str(g) == before and "something else reads" in ctx.remarks[0].message


def _product(depth: int = 512, rows: int = 1, dtype: str = "f32") -> Graph:
    g = parse_graph(f"""graph @g(%x: {dtype}[{rows}, {depth}], weight %w: {dtype}[64, {depth}]) -> {dtype}[{rows}, 64] {{
      %0: {dtype}[{depth}, 64] = transpose(%w) {{perm = [1, 0]}}
      %1: {dtype}[{rows}, 64] = matmul(%x, %0)
      return %1
    }}""")
    run_passes(g, [Fuse()])
    return g


@pytest.mark.parametrize(("graph", "context", "packed"), [
    (_product(), {}, False),
    (_product(depth=128), {}, True),  # sums across lanes would be a large part
    (_product(rows=3), {}, True),
    (_product(rows=2), {}, False),
    (_product(dtype="bf16"), {}, False),
    (_product(), {"owns_weights": True}, False),
    (_product(), {"variants": True}, False),
    (_product(), {"owns_weights": True, "variants": True}, True),  # other programs read it packed: it would be kept twice
], ids=["one row", "short", "rows", "two rows", "bf16", "owned", "variants", "owned variants"])  # fmt: skip
def test_which_weights_are_not_packed(graph, context, packed) -> None:
    g = graph.clone()
    ctx = PassContext(target=Target.from_name("cpu:znver4:2"), **context)
    run_passes(g, [WeightsInPlace(), PackWeights()], ctx)
    assert any(n.op.name == "pad" or n.op.name == "reshape" for n in g.nodes()) == packed
    assert packed or any("as fast where it lies" in r.message for r in ctx.remarks)


def test_on_a_gpu_nothing_happens() -> None:
    g = parse_graph(BEFORE)
    before = str(g)
    run_passes(g, [WeightsInPlace(depth=4)], PassContext(target=Target.from_name("cuda:sm_90")))
    assert str(g) == before

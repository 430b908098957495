"""halve-weights: the packed form, and which weights are left."""

from __future__ import annotations

from fusing import run

from graphopt.ir import Graph, parse_graph
from graphopt.passes.fusion import Fuse
from graphopt.passes.layout import HalveWeights, PackWeights
from graphopt.target import Target
from graphopt.testing import check_pass

BEFORE = """
    graph @g(%x: f32[B, 32], weight %w: f32[40, 32], %b: f32[40]) -> f32[B, 40] where 1 <= B {
      %0: f32[B, 40] = fusion(%x, %w, %b) {kind = "matmul"} body (%x: f32[B, 32], %w: f32[40, 32], %b: f32[40]) -> f32[B, 40] where 1 <= B {
        %0: f32[32, 40] = transpose(%w) {perm = [1, 0]}
        %1: f32[B, 40] = matmul(%x, %0)
        %2: f32[B, 40] = add(%1, %b)
        return %2
      }
      return %0
    }"""


def matmul(x: str, w: str, result: str) -> str:
    return f"graph @g(%x: {x}, weight %w: {w}) -> {result} where 1 <= B {{\n %r: {result} = matmul(%x, %w)\n return %r }}"


def halved(text: str, target: str = "cpu:graniterapids") -> tuple[Graph, list[str]]:
    g = parse_graph(text)
    ctx = run(g, [Fuse(), HalveWeights()], Target.from_name(target))
    return g, [r.message for r in ctx.remarks if r.kind == "missed" and r.pass_name == "halve-weights"]


def region(g: Graph) -> list[str]:
    (node,) = [n for n in g.nodes() if n.body is not None]
    return [str(v.type) for v in node.operands]


def test_before_and_after() -> None:
    g = check_pass(HalveWeights(tiles=True), BEFORE)
    assert region(g) == ["f32[B, 32]", "f16[2, 1, 2, 2, 16, 16, 2]", "f32[64]", "f32[32]", "f32[40]"]
    (node,) = [n for n in g.nodes() if n.body is not None]
    assert [n.op.name for n in node.body.nodes()] == [
        "transpose", "reshape", "slice", "cast", "slice", "cast", "add", "reshape", "mul", "mul", "slice", "matmul", "add",
    ]  # fmt: skip


def test_other_targets_keep_their_weights() -> None:
    check_pass(HalveWeights(), BEFORE, fires=False)
    g, missed = halved(matmul("f32[B, 64]", "f32[64, 96]", "f32[B, 96]"), "cpu:sapphirerapids")
    assert region(g) == ["f32[B, 64]", "f32[64, 96]"] and not missed


def test_what_fills_no_tile_is_left_with_a_reason() -> None:
    for k, n in ((48, 64), (64, 24)):
        g, missed = halved(matmul(f"f32[B, {k}]", f"f32[{k}, {n}]", f"f32[B, {n}]"))
        assert region(g) == [f"f32[B, {k}]", f"f32[{k}, {n}]"]
        assert missed == [f"the weight is not split into halves: {k} rows by {n} columns do not fill tiles of 32 by 32"]


def test_one_row_is_left_to_pack_weights() -> None:
    g, missed = halved(matmul("f32[1, 64]", "f32[64, 96]", "f32[1, 96]"))
    assert region(g) == ["f32[1, 64]", "f32[64, 96]"] and not missed


def test_an_operand_that_is_no_weight_is_left() -> None:
    g, missed = halved(matmul("f32[B, 64]", "f32[64, 96]", "f32[B, 96]").replace("weight ", ""))
    assert region(g) == ["f32[B, 64]", "f32[64, 96]"] and not missed


def test_a_weight_of_two_products_is_split_once_and_pack_weights_leaves_it() -> None:
    g = parse_graph("""
        graph @g(%x: f32[B, 32], %y: f32[B, 32], weight %w: f32[32, 64]) -> (f32[B, 64], f32[B, 64]) where 1 <= B {
          %0: f32[B, 64] = matmul(%x, %w)
          %1: f32[B, 64] = matmul(%y, %w)
          return %0, %1
        }""")
    ctx = run(g, [Fuse(), HalveWeights(), PackWeights()], Target.from_name("cpu:graniterapids"))
    regions = [n for n in g.nodes() if n.body is not None]
    assert len(regions) == 2 and regions[0].operands[1] is regions[1].operands[1]
    assert not [r for r in ctx.remarks if r.pass_name == "pack-weights"]

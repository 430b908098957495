"""sibling-matmuls: which products become one, and which stay apart."""

from __future__ import annotations

import pytest
from fusing import regions, run

from graphopt.ir import parse_graph
from graphopt.pass_manager import run_passes
from graphopt.passes.fusion import Fuse, SiblingMatmuls
from graphopt.passes.layout import PackWeights
from graphopt.rewrite import PassContext
from graphopt.target import Target
from graphopt.testing import check_pass

HEAD = """graph @g(%x: f32[B, 4], %y: f32[B, 4], weight %a: f32[6, 4], weight %b: f32[2, 4], weight %c: f32[4, 6],
         weight %p: f32[6], weight %q: f32[2], %v: f32[4, 6]) -> {result} where 1 <= B {{
"""
BEFORE = HEAD.format(result="f32[B, 3, 2]") + """
  %0: f32[4, 6] = transpose(%a) {perm = [1, 0]}
  %1: f32[B, 6] = matmul(%x, %0)
  %2: f32[B, 6] = add(%1, %p)
  %3: f32[B, 3, 2] = reshape(%2) {shape = [B, 3, 2]}
  %4: f32[4, 2] = transpose(%b) {perm = [1, 0]}
  %5: f32[B, 2] = matmul(%x, %4)
  %6: f32[B, 2] = add(%5, %q)
  %7: f32[B, 1, 2] = reshape(%6) {shape = [B, 1, 2]}
  %8: f32[B, 3, 2] = mul(%3, %7)
  return %8
}"""
AFTER = HEAD.format(result="f32[B, 3, 2]") + """
  %0: f32[8, 4] = concat(%a, %b) {axis = 0}
  %1: f32[4, 8] = transpose(%0) {perm = [1, 0]}
  %2: f32[B, 8] = matmul(%x, %1)
  %3: f32[8] = concat(%p, %q) {axis = 0}
  %4: f32[B, 8] = add(%2, %3)
  %5: f32[B, 6] = slice(%4) {axis = 1, stop = 6}
  %6: f32[B, 2] = slice(%4) {axis = 1, start = 6, stop = 8}
  %7: f32[B, 3, 2] = reshape(%5) {shape = [B, 3, 2]}
  %8: f32[B, 1, 2] = reshape(%6) {shape = [B, 1, 2]}
  %9: f32[B, 3, 2] = mul(%7, %8)
  return %9
}"""


def test_before_and_after() -> None:
    check_pass(SiblingMatmuls(always=True), BEFORE, AFTER)


def test_plain_and_transposed_weights_without_bias() -> None:
    check_pass(SiblingMatmuls(always=True), HEAD.format(result="f32[B, 3, 2]") + """
      %0: f32[4, 6] = transpose(%a) {perm = [1, 0]}
      %1: f32[B, 6] = matmul(%x, %0)
      %2: f32[B, 3, 2] = reshape(%1) {shape = [B, 3, 2]}
      %3: f32[B, 6] = matmul(%x, %c)
      %4: f32[B, 3, 2] = reshape(%3) {shape = [B, 3, 2]}
      %5: f32[B, 3, 2] = mul(%2, %4)
      return %5
    }""", HEAD.format(result="f32[B, 3, 2]") + """
      %0: f32[4, 6] = transpose(%a) {perm = [1, 0]}
      %1: f32[4, 12] = concat(%0, %c) {axis = 1}
      %2: f32[B, 12] = matmul(%x, %1)
      %3: f32[B, 6] = slice(%2) {axis = 1, stop = 6}
      %4: f32[B, 6] = slice(%2) {axis = 1, start = 6, stop = 12}
      %5: f32[B, 3, 2] = reshape(%3) {shape = [B, 3, 2]}
      %6: f32[B, 3, 2] = reshape(%4) {shape = [B, 3, 2]}
      %7: f32[B, 3, 2] = mul(%5, %6)
      return %7
    }""")  # fmt: skip


def test_readers_take_the_slices_in() -> None:
    """No copy is left: the kernels behind read the wide result in place, and its weight is packed."""
    g = parse_graph(BEFORE)
    run(g, [SiblingMatmuls(always=True), Fuse(), PackWeights(lanes=2)])
    assert [(kind, ops[-1]) for kind, ops in regions(g)] == [("matmul", "matmul"), ("pointwise", "mul")]
    assert not [n for n in g.nodes() if n.op.name == "slice"]


@pytest.mark.parametrize(("change", "reason"), [
    (("matmul(%x, %4)", "matmul(%y, %4)"), None),
    (("weight %b: f32[2, 4]", "%b: f32[2, 4]"), "its weight is no frozen matrix"),
    (("%4: f32[4, 2] = transpose(%b) {perm = [1, 0]}", "%9: f32[2, 4] = neg(%b)\n %4: f32[4, 2] = transpose(%9) {perm = [1, 0]}"),
     "its weight is no frozen matrix"),
    (("%6: f32[B, 2] = add(%5, %q)", "%9: f32[B, 2] = add(%5, %q)\n %6: f32[B, 2] = relu(%9)"), "relu joins its own kernel"),
    (("%6: f32[B, 2] = add(%5, %q)", "%6: f32[B, 2] = reshape(%5) {shape = [B, 2]}"), None),
    (("%7: f32[B, 1, 2] = reshape(%6) {shape = [B, 1, 2]}",
      "%9: f32[B, 2] = aten(%6) {target = \"aten.tanh.default\", args = [$0]}\n"
      " %7: f32[B, 1, 2] = reshape(%9) {shape = [B, 1, 2]}"), "aten is no kernel"),
])  # fmt: skip
def test_must_not_fire(change: tuple[str, str], reason: str | None) -> None:
    text = BEFORE.replace(*change)
    assert text != BEFORE
    check_pass(SiblingMatmuls(always=True), text, fires=False, reason=reason)


def test_a_result_that_is_returned_stays() -> None:
    text = BEFORE.replace("-> f32[B, 3, 2]", "-> (f32[B, 3, 2], f32[B, 6])").replace("return %8", "return %8, %2")
    check_pass(SiblingMatmuls(always=True), text, fires=False, reason="it is returned")


def test_a_weight_that_is_converted_stays() -> None:
    old = "%4: f32[4, 2] = transpose(%b) {perm = [1, 0]}"
    new = "%9: f32[2, 4] = cast(%b) {dtype = f32}\n %4: f32[4, 2] = transpose(%9) {perm = [1, 0]}"
    text = BEFORE.replace("weight %b: f32[2, 4]", "weight %b: f64[2, 4]").replace(old, new)
    check_pass(SiblingMatmuls(always=True), text, fires=False, reason="its weight is no frozen matrix")


def test_a_gate_is_left_to_fusion() -> None:
    """Products that meet in one pointwise op share a kernel that writes neither of them."""
    check_pass(SiblingMatmuls(always=True), HEAD.format(result="f32[B, 6]") + """
      %0: f32[4, 6] = transpose(%a) {perm = [1, 0]}
      %1: f32[B, 6] = matmul(%x, %0)
      %2: f32[B, 6] = matmul(%x, %c)
      %3: f32[B, 6] = mul(%1, %2)
      return %3
    }""", fires=False, reason="mul joins its own kernel")  # fmt: skip


def test_at_most() -> None:
    g = parse_graph(BEFORE)
    run(g, [SiblingMatmuls(most=1, always=True)])
    assert len([n for n in g.nodes() if n.op.name == "matmul"]) == 2


LARGE = """graph @g(%x: f32[{rows}, 768], weight %a: f32[768, 768], weight %b: f32[768, 768]) -> f32[{rows}, 12, 64]{where} {{
  %0: f32[{rows}, 768] = matmul(%x, %a)
  %1: f32[{rows}, 768] = matmul(%x, %b)
  %2: f32[{rows}, 12, 64] = reshape(%0) {{shape = [{rows}, 12, 64]}}
  %3: f32[{rows}, 12, 64] = reshape(%1) {{shape = [{rows}, 12, 64]}}
  %4: f32[{rows}, 12, 64] = mul(%2, %3)
  return %4
}}"""


@pytest.mark.parametrize(
    ("rows", "where", "name", "count"),
    [
        (1, "", "znver5", 1),
        (16, "", "znver5", 1),
        (16, "", "neoverse-n1", 2),  # narrow vectors have more to do for each byte
        (128, "", "znver5", 2),
        ("B", " where 1 <= B <= 16", "znver5", 1),
        ("B", " where 1 <= B", "znver5", 2),
        (128, "", "sapphirerapids", 1),  # each product would split the rows into thirds
        ("B", " where 1 <= B", "sapphirerapids", 1),
    ],
)
def test_products_that_gain_become_one(rows: object, where: str, name: str, count: int) -> None:
    g = parse_graph(LARGE.format(rows=rows, where=where))
    run_passes(g, [SiblingMatmuls()], PassContext(target=Target.from_name(f"cpu:{name}")))
    assert len([n for n in g.nodes() if n.op.name == "matmul"]) == count

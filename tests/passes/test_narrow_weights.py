"""narrow-weights: weights that are exact in bf16, and the mark that says so."""

from __future__ import annotations

import pytest

from graphopt.ir import parse_graph, print_graph, types
from graphopt.pass_manager import run_passes
from graphopt.passes.precision.narrow_weights import NarrowWeights
from graphopt.rewrite import PassContext
from graphopt.target import Target
from graphopt.testing import check_pass

BEFORE = """
graph @g(%x: f32[B, 64], weight(bf16) %w: f32[32, 64]) -> f32[B, 32]
where 1 <= B {
  %0: f32[64, 32] = transpose(%w) {perm = [1, 0]}
  %1: f32[B, 32] = matmul(%x, %0)
  return %1
}"""
AFTER = """
graph @g(%x: f32[B, 64], weight(bf16) %w: f32[32, 64]) -> f32[B, 32]
where 1 <= B {
  %0: f32[64, 32] = transpose(%w) {perm = [1, 0]}
  %1: bf16[64, 32] = cast(%0) {dtype = bf16}
  %2: f32[B, 32] = matmul(%x, %1) {acc = f32}
  return %2
}"""
JOINED = """
graph @g(%x: f32[B, 64], weight(bf16) %w: f32[32, 64], weight %v: f32[32, 64]) -> f32[B, 64]
where 1 <= B {
  %0: f32[64, 64] = concat(%w, %v) {axis = 0}
  %1: f32[64, 64] = transpose(%0) {perm = [1, 0]}
  %2: f32[B, 64] = matmul(%x, %1)
  return %2
}"""


def test_an_exact_weight_is_kept_as_bf16() -> None:
    check_pass(NarrowWeights(), BEFORE, AFTER)
    check_pass(NarrowWeights(), JOINED.replace("weight %v", "weight(bf16) %v"))


@pytest.mark.parametrize(("text", "reason"), [
    (BEFORE.replace("weight(bf16)", "weight"), None), (JOINED, "only some of the weights"),
    (BEFORE.replace("64", "16"), "do not fill a panel"),
])  # fmt: skip
def test_what_is_left(text: str, reason: str | None) -> None:
    check_pass(NarrowWeights(), text, fires=False, reason=reason)


def test_by_target() -> None:
    """Without tiles, only products of few rows; nothing on a GPU."""
    one = BEFORE.replace("B", "1").replace("\nwhere 1 <= 1", "")
    for name, text, fires in (("cpu:sapphirerapids", BEFORE, True), ("cpu:znver4", BEFORE, False), ("cpu:znver4", one, True),
                              ("cpu:x86-64-v3", one, False), ("cuda:sm_90", one, False)):  # fmt: skip
        g = parse_graph(text)
        run_passes(g, [NarrowWeights()], PassContext(target=Target.from_name(name)))
        assert any(n.op.name == "cast" for n in g.nodes()) == fires, name


def test_the_mark_is_part_of_the_text() -> None:
    g = parse_graph(BEFORE)
    assert g.inputs[1].exact == types.bf16 and "weight(bf16) %w" in print_graph(g.clone())

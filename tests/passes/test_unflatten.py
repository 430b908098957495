"""unflatten: a linear layer on flattened tokens gets its axes back before the matmul."""

from __future__ import annotations

import pytest
from fusing import regions, run

from graphopt.ir import parse_graph
from graphopt.pass_manager import run_passes
from graphopt.passes.fusion import Fuse
from graphopt.passes.layout import Unflatten
from graphopt.testing import check_pass

HEAD = "graph @g(%x: f32[B, S, 4], %w: f32[4, 8], %b: f32[8], %r: f32[B, S, 8], %f: f32[B*S, 8]) -> f32[B, S, 8] where 1 <= B, 1 <= S"
BEFORE = HEAD + """ {
      %0: f32[B*S, 4] = reshape(%x) {shape = [B*S, 4]}
      %1: f32[B*S, 8] = matmul(%0, %w)
      %2: f32[B*S, 8] = add(%1, %b)
      %3: f32[B*S, 8] = gelu(%2)
      %4: f32[B, S, 8] = reshape(%3) {shape = [B, S, 8]}
      %5: f32[B, S, 8] = add(%4, %r)
      return %5
    }"""
AFTER = HEAD + """ {
      %0: f32[B, S, 8] = matmul(%x, %w)
      %1: f32[B, S, 8] = add(%0, %b)
      %2: f32[B, S, 8] = gelu(%1)
      %3: f32[B, S, 8] = add(%2, %r)
      return %3
    }"""


def test_before_and_after() -> None:
    check_pass(Unflatten(), BEFORE, AFTER)


def test_the_residual_joins_the_matmul() -> None:
    g = parse_graph(BEFORE)
    run(g, [Unflatten(), Fuse()])
    assert regions(g) == [("matmul", ["matmul", "add", "gelu", "add"])]


def test_an_operand_of_the_full_shape_is_reshaped() -> None:
    g = parse_graph(BEFORE.replace("add(%1, %b)", "add(%f, %1)"))
    run(g, [Unflatten(), Fuse()])
    assert regions(g) == [("matmul", ["reshape", "matmul", "add", "gelu", "add"])]


def test_an_operand_that_was_not_flattened_is_reshaped() -> None:
    check_pass(Unflatten(), """
        graph @g(%x: f32[6, 4], %w: f32[4, 8]) -> f32[2, 3, 8] {
          %0: f32[6, 8] = matmul(%x, %w)
          %1: f32[2, 3, 8] = reshape(%0) {shape = [2, 3, 8]}
          return %1
        }""", """
        graph @g(%x: f32[6, 4], %w: f32[4, 8]) -> f32[2, 3, 8] {
          %0: f32[2, 3, 4] = reshape(%x) {shape = [2, 3, 4]}
          %1: f32[2, 3, 8] = matmul(%0, %w)
          return %1
        }""")  # fmt: skip


def test_other_uses_are_in_the_way() -> None:
    check_pass(Unflatten(), """
        graph @g(%x: f32[6, 4], %w: f32[4, 8]) -> (f32[2, 3, 8], f32[6, 8]) {
          %0: f32[6, 8] = matmul(%x, %w)
          %1: f32[2, 3, 8] = reshape(%0) {shape = [2, 3, 8]}
          return %1, %0
        }""", fires=False, reason="the result of matmul has other uses")  # fmt: skip


@pytest.mark.parametrize("change", [
    ("%4: f32[B, S, 8] = reshape(%3) {shape = [B, S, 8]}", "%7: f32[B*S*8] = reshape(%3) {shape = [B*S*8]}\n"
     "%4: f32[B, S, 8] = reshape(%7) {shape = [B, S, 8]}"),
    ("gelu(%2)", "softmax(%2) {axis = 1}"),
])  # fmt: skip
def test_other_forms_stay(change: tuple[str, str]) -> None:
    assert not run_passes(parse_graph(BEFORE.replace(*change)), [Unflatten()])


def test_heads_are_no_rows() -> None:
    g = parse_graph("""
        graph @g(%x: f32[6, 4], %w: f32[4, 8]) -> f32[2, 3, 2, 4] {
          %0: f32[6, 8] = matmul(%x, %w)
          %1: f32[2, 3, 2, 4] = reshape(%0) {shape = [2, 3, 2, 4]}
          return %1
        }""")
    assert not run_passes(g, [Unflatten()])

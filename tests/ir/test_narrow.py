"""Narrowing: sizes that became known, ranges that shrank, layouts that became row-major."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import TypeInferenceError
from graphopt.ir import evaluate, parse_graph, structurally_equal, verify
from graphopt.ir.dims import Range
from graphopt.ir.narrow import narrow

GENERAL = """graph @g(%x: f32[B, S, 4; 4*S, 4, 1], weight %w: f32[4, 6]) -> f32[B*S, 6; 6, 1]
where 1 <= B, 2 <= S <= 512 {
  %0: f32[B*S, 4] = reshape(%x) {shape = [B*S, 4]}
  %1: f32[B*S, 6] = matmul(%0, %w)
  %2: f32[B*S, 6] = fusion(%1) {kind = "pointwise"} body (%a: f32[B*S, 6]) -> f32[B*S, 6]
  where 1 <= B, 2 <= S <= 512 {
    %0: i64[] = constant() {value = S, dtype = i64}
    %1: f32[] = cast(%0) {dtype = f32}
    %2: f32[B*S, 6] = div(%a, %1)
    return %2
  }
  return %2
}"""


def test_a_value_for_every_symbol_gives_the_static_graph() -> None:
    expected = parse_graph("""graph @g(%x: f32[2, 8, 4], weight %w: f32[4, 6]) -> f32[16, 6] {
      %0: f32[16, 4] = reshape(%x) {shape = [16, 4]}
      %1: f32[16, 6] = matmul(%0, %w)
      %2: f32[16, 6] = fusion(%1) {kind = "pointwise"} body (%a: f32[16, 6]) -> f32[16, 6] {
        %0: i64[] = constant() {value = 8, dtype = i64}
        %1: f32[] = cast(%0) {dtype = f32}
        %2: f32[16, 6] = div(%a, %1)
        return %2
      }
      return %2
    }""")
    graph = narrow(parse_graph(GENERAL), {"B": Range(2, 2), "S": Range(8, 8)})
    verify(graph)
    assert structurally_equal(graph, expected), f"{graph}\n{expected}"


def test_the_rest_stays_symbolic_and_the_original_as_it_was() -> None:
    general = parse_graph(GENERAL)
    text = str(general)
    graph = narrow(general, {"B": Range(1, 1), "S": Range(2, 16)})
    verify(graph)
    assert str(general) == text
    assert graph.symbols == {"S": Range(2, 16)} and str(graph.outputs[0].type) == "f32[S, 6]"
    inputs = [torch.randn(1, 5, 4), torch.randn(4, 6)]
    torch.testing.assert_close(evaluate(graph, inputs), evaluate(general, inputs))


def test_sizes_at_which_an_op_does_not_exist_are_refused() -> None:
    general = parse_graph("""graph @g(%x: f32[S, 4]) -> f32[4, S - 3]
    where 4 <= S {
      %0: f32[4, S] = transpose(%x) {perm = [1, 0]}
      %1: f32[4, S - 3] = slice(%0) {axis = 1, start = 3, stop = S}
      return %1
    }""")
    assert str(narrow(general, {"S": Range(4, 4)}).outputs[0].type) == "f32[4, 1]"
    with pytest.raises(TypeInferenceError):
        narrow(general, {"S": Range(2, 2)})

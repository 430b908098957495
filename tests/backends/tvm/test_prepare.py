"""Regions in the form that templates read: rows under one axis, with the same memory and the same values."""

from __future__ import annotations

import pytest
import torch

from graphopt.backends.forms.prepare import flatten_rows, turn_column
from graphopt.ir import Graph, evaluate, parse_graph

LINEAR = """graph @g(%x: f32[2, 3, 2, 8], %w: f32[2, 8, 8], %b: f32[15], %s: f32[1, 1, 1, 15], %r: f32[2, 3, 2, 15]) -> f32[2, 3, 2, 15] {
  %0: f32[8, 2, 8] = transpose(%w) {perm = [1, 0, 2]}
  %1: f32[8, 16] = reshape(%0) {shape = [8, 16]}
  %2: f32[8, 15] = slice(%1) {axis = 1, stop = 15}
  %3: f32[2, 3, 2, 15] = matmul(%x, %2)
  %4: f32[2, 3, 2, 15] = add(%3, %b)
  %5: f32[2, 3, 2, 15] = mul(%4, %s)
  %6: f32[2, 3, 2, 15] = add(%5, %r)
  %7: f32[2, 3, 2, 15] = gelu(%6)
  return %7
}"""


def values(graph: Graph) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn([int(d) for d in v.shape], generator=generator) for v in graph.inputs]


def test_rows_become_one_axis() -> None:
    graph = parse_graph(LINEAR)
    flat = flatten_rows(graph)

    product = next(n for n in flat.nodes() if n.name == "matmul")
    assert [v.type.rank for v in flat.inputs] == [2, 3, 1, 2, 2]
    assert str(product.result.type) == "f32[12, 15]"
    x, w, b, s, r = values(graph)
    (expected,) = evaluate(graph, [x, w, b, s, r])
    (found,) = evaluate(flat, [x.reshape(-1, 8), w, b, s.reshape(1, 15), r.reshape(-1, 15)])
    torch.testing.assert_close(found.reshape(expected.shape), expected)


def test_what_was_flat_stays() -> None:
    text = """graph @g(%x: f32[3, 8], %w: f32[8, 5], %r: f32[1, 3, 1, 5]) -> f32[1, 3, 1, 5] {
  %0: f32[1, 3, 1, 8] = reshape(%x) {shape = [1, 3, 1, 8]}
  %1: f32[1, 3, 1, 5] = matmul(%0, %w)
  %2: f32[1, 3, 1, 5] = add(%1, %r)
  return %2
}"""
    flat = flatten_rows(parse_graph(text))
    assert [n.name for n in flat.nodes()] == ["matmul", "add"]
    assert [str(v.type) for v in (*flat.inputs, *flat.outputs)] == ["f32[3, 8]", "f32[8, 5]", "f32[3, 5]", "f32[3, 5]"]


@pytest.mark.parametrize(
    "text",
    [
        LINEAR.replace("[2, 3, 2, ", "[1, 1, 2, "),
        LINEAR.replace("%r: f32[2, 3, 2, 15]", "%r: f32[2, 15]"),
        LINEAR.replace("%r: f32[2, 3, 2, 15]", "%r: f32[2, 3, 2, 15; 90, 30, 1, 2]"),
        "graph @g(%x: f32[4, 6, 8], %w: f32[4, 8, 50]) -> f32[4, 6, 50] {\n  %0: f32[4, 6, 50] = matmul(%x, %w)\n  return %0\n}",
        "graph @g(%x: f32[6, 8], %w: f32[8, 5]) -> f32[6, 5] {\n  %0: f32[6, 5] = matmul(%x, %w)\n  return %0\n}",
        "graph @g(%x: f32[6, 4, 8], %w: f32[8, 50]) -> f32[4, 6, 50] {\n  %t: f32[4, 6, 8] = transpose(%x) {perm = [1, 0, 2]}\n"
        "  %0: f32[4, 6, 50] = matmul(%t, %w)\n  return %0\n}",
        "graph @g(%x: f32[4, 1, 5], %w: f32[5, 5]) -> f32[4, 5, 5] {\n  %0: f32[4, 1, 5] = matmul(%x, %w)\n"
        "  %1: f32[4, 5, 5] = add(%0, %w)\n  return %1\n}",
        LINEAR.replace("[2, 3, 2, ", "[2, 3, 4, "),
        LINEAR.replace("[2, 3, 2, ", "[B, 3, 2, ").replace("15] {\n  %0: f32[8", "15]\nwhere 1 <= B {\n  %0: f32[8"),
    ],
    ids=[
        "one batch",
        "an operand of some rows",
        "strides",
        "several matrices",
        "no batch",
        "a view of the rows",
        "a weight added, too",
        "more rows than columns",
        "rows of any number",
    ],
)
def test_other_forms_stay(text: str) -> None:
    graph = parse_graph(text)
    assert flatten_rows(graph) is graph


COLUMN = """graph @g(%x: f32[2, 7, 8], %y: f32[2, 8, 1], %b: f32[1], %r: f32[2, 7, 1]) -> f32[2, 7, 1] {
  %0: f32[2, 7, 8] = relu(%x)
  %1: f32[2, 7, 1] = matmul(%0, %y)
  %2: f32[2, 7, 1] = add(%1, %b)
  %3: f32[2, 7, 1] = mul(%2, %r)
  return %3
}"""


def test_one_column_becomes_one_row() -> None:
    graph = parse_graph(COLUMN)
    turned = turn_column(graph)

    product = next(n for n in turned.nodes() if n.name == "matmul")
    assert [str(v.type) for v in product.operands] == ["f32[2, 1, 8]", "f32[2, 8, 7]"]
    assert [v.shape for v in turned.inputs] == [(2, 7, 8), (2, 8, 1), (1,), (2, 1, 7)]
    x, y, b, r = values(graph)
    (expected,) = evaluate(graph, [x, y, b, r])
    (found,) = evaluate(turned, [x, y, b, r.reshape(2, 1, 7)])
    torch.testing.assert_close(found.reshape(expected.shape), expected)


@pytest.mark.parametrize(
    "text",
    [
        COLUMN.replace("%y: f32[2, 8, 1]", "%y: f32[2, 8, 5]").replace("7, 1] =", "7, 5] =").replace("-> f32[2, 7, 1]", "-> f32[2, 7, 5]"),
        COLUMN.replace("2, 7, ", "2, 1, "),
        COLUMN.replace("%r: f32[2, 7, 1]", "%r: f32[2, 7, 1; 14, 2, 1]"),
        COLUMN.replace("-> f32[2, 7, 1]", "-> f32[2, 7, 1; 1, 2, 1]"),
        COLUMN.replace("mul(%2, %r)", "mul(%2, %y)").replace("%y: f32[2, 8, 1]", "%y: f32[2, 7, 1]").replace("2, 7, 8]", "2, 7, 7]"),
        COLUMN.replace("2, 7, ", "2, N, ").replace("1] {\n  %0: f32[2, N, 8]", "1]\nwhere 1 <= N {\n  %0: f32[2, N, 8]"),
    ],
    ids=["several columns", "one element", "strides", "strides of the result", "a factor beside the product", "rows of any number"],
)
def test_other_columns_stay(text: str) -> None:
    graph = parse_graph(text)
    assert turn_column(graph) is graph

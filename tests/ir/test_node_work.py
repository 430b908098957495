"""Arithmetic and traffic of nodes: by op, inside of fusions, of tables that are read in part, and as sizes where sizes are symbolic."""

from __future__ import annotations

import pytest

from graphopt.ir import parse_graph
from graphopt.ir.dims import format_dim
from graphopt.ir.work import bytes_moved, bytes_read, flops


@pytest.mark.parametrize(
    ("signature", "line", "arithmetic", "moved"),
    [
        ("%x: f32[B, 8], %w: f32[8, 4]", "f32[B, 4] = matmul(%x, %w)", "64*B", "48*B + 128"),
        ("%x: f32[B, 8], %w: f32[8, 8]", "f32[B, 8] = add(%x, %x)", "0", "64*B"),
        (
            "%x: f32[B, 6, 9, 9], %w: f32[4, 3, 3, 3]",
            "f32[B, 4, 4, 4] = conv(%x, %w) {stride = [2, 2], padding = [0, 0], dilation = [1, 1], groups = 2}",
            "3456*B", "2200*B + 432",
        ),
        (
            "%x: f32[B, 9, 9, 6], %w: f32[3, 3, 3, 4]",
            "f32[B, 4, 4, 4] = conv(%x, %w) {stride = [2, 2], padding = [0, 0], dilation = [1, 1], groups = 2, channels_last = true}",
            "3456*B", "2200*B + 432",
        ),
        ("%x: f16[2, B, 8], %w: f16[2, 7, 8]", "f16[2, B, 8] = attention(%x, %w, %w) {scale = 0.5}", "448*B", "64*B + 224"),
        ("%x: f32[1000, 8], %w: i64[B]", "f32[B, 8] = take(%x, %w)", "0", "40*B + min(32*B, 32000)"),
        ("%x: f32[8, 8], %w: f32[B]", "f32[2, 8] = slice(%x) {axis = 0, stop = 2}", "0", "128"),
    ],
)  # fmt: skip
def test_a_node(signature: str, line: str, arithmetic: str, moved: str) -> None:
    result = line.partition(" = ")[0]
    text = f"graph @g({signature}) -> {result}\nwhere 1 <= B {{\n  %0: {line}\n  return %0\n}}"
    (node,) = parse_graph(text).nodes()
    assert (format_dim(flops(node)), format_dim(bytes_moved(node))) == (arithmetic, moved)


FUSED = """graph @g(%t: f32[100, 8], %i: i64[3], %w: f32[8, 5], %b: f32[5]) -> f32[3, 5] {
  %0: f32[3, 5] = fusion(%t, %i, %w, %b) {kind = "matmul"} body (%t: f32[100, 8], %i: i64[3], %w: f32[8, 5], %b: f32[5]) -> f32[3, 5] {
    %0: f32[8, 100] = transpose(%t) {perm = [1, 0]}
    %1: f32[100, 8] = transpose(%0) {perm = [1, 0]}
    %2: f32[3, 8] = take(%1, %i)
    %3: f32[3, 5] = matmul(%2, %w)
    %4: f32[3, 5] = add(%3, %b)
    return %4
  }
  return %0
}"""


def test_a_fusion_does_what_its_body_does_and_moves_what_crosses_its_border() -> None:
    graph = parse_graph(FUSED)
    (node,) = graph.nodes()
    assert flops(node) == 2 * 3 * 8 * 5
    assert bytes_moved(node) == 4 * (3 * 8 + 8 * 5 + 5 + 3 * 5) + 8 * 3
    assert [bytes_read(x) for x in graph.inputs] == [4 * 24, 8 * 3, 4 * 40, 4 * 5]


def test_what_is_read_twice_counts_once_and_what_nobody_reads_not_at_all() -> None:
    graph = parse_graph(
        "graph @g(%x: f32[4], %unused: f32[4]) -> (f32[4], f32[4]) {\n  %0: f32[4] = exp(%x)\n  %1: f32[4] = neg(%x)\n  return %0, %1\n}"
    )
    assert [bytes_read(x) for x in graph.inputs] == [16, 0]

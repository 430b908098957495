"""Arithmetic and weight bytes, counted from graphs."""

from __future__ import annotations

import pytest

from graphopt.bench.work import Work, count
from graphopt.ir import parse_graph


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "graph @m(%x: f32[6, 8], weight %w: f32[8, 4]) -> f32[6, 4] {\n  %0: f32[6, 4] = matmul(%x, %w)\n"
            "  %1: f32[6, 4] = exp(%0)\n  return %1\n}",
            Work(2 * 6 * 8 * 4, 4 * 32),
        ),
        (
            "graph @c(%x: f32[1, 6, 9, 9], weight %w: f32[4, 3, 3, 3]) -> f32[1, 4, 4, 4] {\n"
            "  %0: f32[1, 4, 4, 4] = conv(%x, %w) {stride = [2, 2], padding = [0, 0], dilation = [1, 1], groups = 2}\n  return %0\n}",
            Work(2 * 64 * 27, 4 * 108),
        ),
        (
            "graph @a(%q: f32[1, 2, 5, 8], %k: f32[1, 2, 7, 8], %v: f32[1, 2, 7, 16]) -> f32[1, 2, 5, 16] {\n"
            "  %0: f32[1, 2, 5, 16] = attention(%q, %k, %v) {scale = 0.5}\n  return %0\n}",
            Work(2 * 2 * 5 * 7 * (8 + 16), 0),
        ),
        (  # of a table only the rows that are taken are read
            "graph @e(weight %t: f32[1000, 8], %i: i64[3], weight %unused: f32[5]) -> f32[3, 8] {\n"
            "  %0: f32[3, 8] = take(%t, %i)\n  return %0\n}",
            Work(0, 4 * 24),
        ),
        (  # a table that is also a factor is read whole, once
            "graph @h(weight %t: f32[10, 8], %i: i64[3]) -> f32[3, 10] {\n  %0: f32[3, 8] = take(%t, %i)\n"
            "  %1: f32[8, 10] = transpose(%t) {perm = [1, 0]}\n  %2: f32[3, 10] = matmul(%0, %1)\n  return %2\n}",
            Work(2 * 3 * 8 * 10, 4 * 80),
        ),
    ],
)  # fmt: skip
def test_counts(text: str, expected: Work) -> None:
    assert count(parse_graph(text)) == expected


def test_unknown_sizes_are_not_counted() -> None:
    text = "graph @s(%x: f32[B, 8], weight %w: f32[8, 4]) -> f32[B, 4]\nwhere 1 <= B {\n  %0: f32[B, 4] = matmul(%x, %w)\n  return %0\n}"
    assert count(parse_graph(text)) is None

"""Recognizing a weight that is packed in pairs, and the schedules of a product with it. Looks at the IR only."""

from __future__ import annotations

from graphopt.autotune.space import Param
from graphopt.backends.tvm.panelform import products_of
from graphopt.ir import types
from graphopt.ir.graph import Graph, Value
from graphopt.target import Target

COLUMNS = 32  # of a panel
_DOT_ROWS = 12  # with two vectors of columns: 24 sums, two vectors of the weight and a pair of the first factor in 32 registers


def packed_pairs(v: Value) -> Value | None:
    """The packed input ``[panels, depth / 2, 32, 2]`` that a factor ``[K, N]`` is unpacked from, or None."""
    for name in ("slice", "slice", "reshape", "transpose"):
        node = v.producer
        if node is None or node.name != name:
            return None
        v = node.operands[0]
    if not v.is_input or v.type.rank != 4 or v.type.strides is not None or v.shape[2:] != (COLUMNS, 2):
        return None
    return v if node is not None and node.attrs["perm"] == (1, 3, 0, 2) else None


def refusal(graph: Graph, t: Target) -> str | None:
    """Why a region of products of one first factor is not for pairs, or None."""
    if not t.has("avx512_bf16"):
        return "the target has no dot instructions for bf16"
    for node in products_of(graph):
        if any(v.dtype != types.bf16 for v in node.operands) or node.result.dtype not in (types.bf16, types.f32):
            return "not a product of bf16"
        if packed_pairs(node.operands[1]) is None:
            return "the second factor is not packed in pairs"
        if not all(isinstance(d, int) for d in node.operands[1].shape):
            return "a weight of unknown size"
    return None


def params(graph: Graph, t: Target) -> tuple[Param, ...]:
    """The knobs."""
    node = products_of(graph)[0]
    rows = node.result.type.numel
    total = rows // int(node.result.shape[-1]) if isinstance(rows, int) else None
    tile = _even(total, _DOT_ROWS if total is not None else 8)  # each of unknown rows has a pointer of its own
    packed = packed_pairs(node.operands[1])
    assert packed is not None
    tiles, panels = -(-total // tile) if total is not None else 16, int(packed.shape[0])
    group = 64
    while group > 1 and (group >= 2 * tiles or panels * -(-tiles // group) < 4 * t.cores):
        group //= 2
    return (
        Param("rows", tuple(dict.fromkeys((tile, *(_even(total, r) for r in (12, 8, 4)))))),
        Param("group", tuple(dict.fromkeys((group, 1, 4, 16, 64)))),
        Param("parallel", (True, False)),
    )


def _even(total: int | None, most: int) -> int:
    """Rows of a tile, so that the same number of tiles is filled evenly."""
    return most if total is None else -(-total // -(-total // most))

"""Which products of f32 are summed from halves on AMX tiles, and their schedules. Looks at the IR only."""

from __future__ import annotations

from graphopt.autotune.space import Constraint, Param, SearchSpace
from graphopt.backends.forms.support import materialized
from graphopt.backends.tvm.thirdform import COLUMNS, TILE, divisors, grouped, rows_of
from graphopt.ir import types
from graphopt.ir.graph import Graph, Value
from graphopt.target import Target

_BLOCKS = (128, 96, 64, 160, 192, 256, 32)  # of a weight that several row tiles are multiplied by
_ONCE = (512, 384, 256, 320, 192, 128, 96, 64, 32)  # of one that is read once


def packed_halves(v: Value) -> tuple[Value, Value, Value] | None:
    """The packed inputs that a factor ``[K, N]`` is made of, or None: halves ``f16[panels, K / 32, 2, 2, 16, 16, 2]``, units ``f32[N]``,
    shares ``f32[K]``."""
    cut = v.defined_by("slice")
    product = cut.operands[0].defined_by("mul") if cut is not None else None
    inner = product.operands[0].defined_by("mul") if product is not None else None
    total = inner.operands[0].defined_by("add") if inner is not None else None
    column = inner.operands[1].defined_by("reshape") if inner is not None else None
    if product is None or total is None or column is None or not (product.operands[1].is_input and column.operands[0].is_input):
        return None
    source: Value | None = None
    for part, x in enumerate(total.operands):
        cast = x.defined_by("cast")
        piece = cast.operands[0].defined_by("slice") if cast is not None else None
        if piece is None or piece.attrs["axis"] != 0 or piece.attrs["start"] != part * int(product.result.shape[0]):
            return None
        merged = piece.operands[0].defined_by("reshape")
        moved = merged.operands[0].defined_by("transpose") if merged is not None else None
        if moved is None or moved.attrs["perm"] != (2, 1, 6, 4, 0, 3, 5) or source not in (None, moved.operands[0]):
            return None
        source = moved.operands[0]
    if source is None or not source.is_input or source.dtype != types.f16 or source.type.strides is not None:
        return None
    return (source, product.operands[1], column.operands[0]) if source.shape[2:] == (2, 2, TILE, TILE, 2) else None


def refusal(graph: Graph, t: Target) -> str | None:
    """Why a region of products of one first factor is not for halves, or None."""
    if not t.f32_halves:
        return "the target has no AMX-FP16"
    for node in materialized(graph):
        if any(v.dtype != types.f32 for v in (*node.operands, node.result)):
            return "not a product of f32"
        if packed_halves(node.operands[1]) is None:
            return "the second factor is not split into halves"
    shares = [packed_halves(node.operands[1]) for node in materialized(graph)]
    return None if len({p[2] for p in shares if p is not None}) == 1 else "products of different shares"


def space(graph: Graph, t: Target) -> SearchSpace:
    """All schedules.

    ``block``: of the summed axis, whose sums are then added to the totals. ``rows``: of a tile. ``tiles``: of rows that are multiplied
    at once. ``group``: so many of them are a task's. ``chunk``: blocks of the summed axis, so that the first factor's halves stay in
    the second-level cache. ``panels``: of a task. ``ahead``: whether the next block of the weight is asked for.
    """
    node = materialized(graph)[0]
    rows, depth = rows_of(graph), int(node.operands[0].shape[-1])
    panels = -(-int(node.result.shape[-1]) // COLUMNS)
    tiles = 1 if isinstance(rows, int) and rows <= TILE else 2
    tile, group, groups = grouped(rows, tiles)
    blocks = [b for b in (_ONCE if group == 1 else _BLOCKS) if depth % b == 0]
    room = 2 * t.cache[1] // 5 // (tiles * group * tile * 4)
    chunks = [c for c in divisors(depth // blocks[0]) if c * blocks[0] <= room] or [1]
    share = -(-panels // max(1, -(-t.cores // groups)))  # each task splits its rows of the first factor: no more tasks than cores
    params = (
        Param("block", tuple(blocks), "tasks"),
        Param("rows", tuple(dict.fromkeys((tile, TILE))), "tile"),
        Param("tiles", tuple(dict.fromkeys((tiles, 2))), "tile"),
        Param("group", tuple(dict.fromkeys((group, 2, 4, 8, 16))), "tasks"),
        Param("chunk", tuple(dict.fromkeys((chunks[-1], *divisors(depth // blocks[0])))), "tasks"),
        Param("panels", tuple(dict.fromkeys((share, -(-share // 2), -(-share // 4), -(-share // 8)))), "tasks"),
        Param("ahead", (True, False)),
        Param("parallel", (True, False), "tasks"),
    )
    whole = Constraint("chunks that do not divide the depth", lambda k: depth % (int(str(k["block"])) * int(str(k["chunk"]))) == 0)
    return SearchSpace("halves", params=params, constraints=(whole,))

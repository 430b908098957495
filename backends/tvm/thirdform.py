"""Which products of f32 are summed from thirds on AMX tiles, and their schedules. Looks at the IR only."""

from __future__ import annotations

from graphopt.autotune.space import Constraint, Param, SearchSpace
from graphopt.backends.forms.support import materialized
from graphopt.ir import dims, types
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph, Value
from graphopt.target import Target

COLUMNS = 32  # of a panel: two tiles
STEP = 32  # of the summed axis: what a row of a tile holds
TILE = 16  # rows of a tile
FEW = 24  # rows below which splitting the weight costs more than the multiplications that it saves
_BLOCKS = (64, 96, 128, 160, 192, 256, 32)
_GROUP = 8  # places (of one or two row tiles) that are worth one splitting of the weight


def packed_panels(v: Value) -> Value | None:
    """The packed input ``[panels, K, 32]`` that a factor ``[K, N]`` is unpacked from, or None."""
    for name in ("slice", "reshape", "transpose"):
        node = v.producer
        if node is None or node.name != name:
            return None
        v = node.operands[0]
    if not v.is_input or v.type.rank != 3 or v.type.strides is not None or v.shape[2] != COLUMNS:
        return None
    return v if node is not None and node.attrs["perm"] == (1, 0, 2) else None


def refusal(graph: Graph, t: Target) -> str | None:
    """Why a region of products of one first factor is not for thirds, or None."""
    if not t.f32_thirds:
        return "the target has no AMX tiles"
    for node in materialized(graph):
        if any(v.dtype != types.f32 for v in (*node.operands, node.result)):
            return "not a product of f32"
        if packed_panels(node.operands[1]) is None:
            return f"the second factor is not packed in panels of {COLUMNS}"
        if not isinstance(depth := node.operands[0].shape[-1], int) or depth % STEP:
            return f"the summed axis is no multiple of {STEP}"
    least = dims.bounds(rows_of(graph), graph.symbols)[0]
    return None if least is not None and least >= FEW else f"it may have fewer than {FEW} rows"


def rows_of(graph: Graph) -> Dim:
    """Rows of the product, all of its leading axes together."""
    return dims.numel(materialized(graph)[0].result.shape[:-1])


def params(graph: Graph, t: Target) -> tuple[Param, ...]:
    """The knobs.

    ``block``: of the summed axis, whose sums are then added to the totals. ``rows``: of a tile. ``group``: pairs of row tiles of a
    task. ``chunk``: of the summed axis, so that the first factor's thirds stay in the second-level cache. ``panels``: of a task.
    """
    node = materialized(graph)[0]
    rows, depth = rows_of(graph), int(node.operands[0].shape[-1])
    panels = -(-int(node.result.shape[-1]) // COLUMNS)
    blocks = [b for b in _BLOCKS if depth % b == 0 and b <= depth]
    tile, group, groups = grouped(rows, 2)
    room = 2 * t.cache[1] // 5 // (2 * group * tile * 6)
    chunks = [c for c in divisors(depth // blocks[0]) if c * blocks[0] <= room] or [1]
    share = -(-panels // max(1, -(-t.cores // groups)))  # each task splits its rows of the first factor: no more tasks than cores
    return (
        Param("block", tuple(blocks), "tasks"),
        Param("rows", tuple(dict.fromkeys((tile, TILE))), "tile"),
        Param("group", tuple(dict.fromkeys((group, 2, 4, 8, 16))), "tasks"),
        Param("chunk", tuple(dict.fromkeys((chunks[-1], *divisors(depth // blocks[0])))), "tasks"),
        Param("panels", tuple(dict.fromkeys((share, -(-share // 2), -(-share // 4), -(-share // 8)))), "tasks"),
        Param("ahead", (True, False)),
        Param("parallel", (True, False), "tasks"),
    )


def space(graph: Graph, t: Target) -> SearchSpace:
    """All schedules."""
    depth = int(materialized(graph)[0].operands[0].shape[-1])
    whole = Constraint("chunks that do not divide the depth", lambda k: depth % (int(str(k["block"])) * int(str(k["chunk"]))) == 0)
    return SearchSpace("thirds", params=params(graph, t), constraints=(whole,))


def grouped(rows: Dim, tiles: int) -> tuple[int, int, int]:
    """(rows of a tile, places of a task, tasks) where so many tiles of rows are multiplied at once, at a place."""
    if not isinstance(rows, int):
        return TILE, _GROUP // 2, 1
    places = -(-rows // (tiles * TILE))
    group = -(-places // -(-places // _GROUP))
    return -(-rows // (tiles * places)), group, -(-places // group)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]

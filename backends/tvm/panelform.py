"""What products with a packed weight have in common: one first factor, an epilogue of their shape, how tasks are cut. Looks at IR only."""

from __future__ import annotations

from collections.abc import Callable

from graphopt.autotune.space import Param
from graphopt.backends.forms.support import VIEWS, is_materialized
from graphopt.ir import dims, types
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import Trait
from graphopt.target import Target

COLUMNS = 32  # of a panel: two tiles
TILE = 16  # rows of a tile
LINE = 64  # bytes of a tile's row
_BLOCK = 1 << 15  # bytes of a panel of bytes that stay in the first-level cache beside the tiles of the first factor; half of bf16
_GROUP = 8  # pairs of row tiles of a task


def products_of(graph: Graph) -> list[Node]:
    """The products of a region, in order."""
    return [n for n in graph.nodes() if n.name == "matmul"]


def statistic_of(graph: Graph) -> Node | None:
    """The reduction over the rows of the first factor that its scales are made of, if there is one."""
    return next((n for n in graph.nodes() if is_materialized(n) and n.name != "matmul"), None)


def refusal(graph: Graph, packed: Callable[[Value], Value | None]) -> str | None:
    """Why a region is not one product, or two of one first factor, with an epilogue of its shape, or None.

    Args:
        packed: the input that a second factor is unpacked from, or None.
    """
    nodes = products_of(graph)
    first = nodes[0]
    left, shape = first.operands[0], first.result.shape
    if any(n.operands[0] is not left or packed(n.operands[1]) is None for n in nodes):
        return "products of different first factors, or a second one that is not packed"
    if not all(isinstance(d, int) for n in nodes for d in (*n.operands[1].shape, n.result.shape[-1], left.shape[-1])):
        return "a weight of unknown size"
    if any(d == 0 for d in (*left.shape, *shape)) or not all(dims.same_shape(v.shape, shape) for v in graph.outputs):
        return "a result that has not the product's shape, or no elements"
    return _row_refusal(graph, left) or _epilogue_refusal(graph, left)


def _row_refusal(graph: Graph, left: Value) -> str | None:
    """Why the first factor is not made row by row."""
    others = [n for n in graph.nodes() if is_materialized(n) and n.name != "matmul"]
    if not others:
        return None
    node = others[0]
    x = node.operands[0]
    magnitudes = node.name == "max" and x.producer is not None and x.producer.name == "abs" and x.dtype == types.f32
    if len(others) > 1 or not magnitudes or not _over_rows(node) or not dims.same_shape(x.shape, left.shape):
        return "more than the largest magnitude of a row of the first factor"
    return None


def _over_rows(node: Node) -> bool:
    """Whether a reduction leaves one element of a row, and its axis."""
    rank = node.operands[0].type.rank
    return bool(node.attrs["keepdims"]) and [a % rank for a in node.attrs["axes"]] == [rank - 1]


def _epilogue_refusal(graph: Graph, left: Value) -> str | None:
    """Why what is computed of the products, or of the rows' scales, cannot be computed element by element."""
    below: dict[Value, None] = {}
    for node in graph.nodes():
        after = any(v in below for v in node.operands)
        if after and not node.op.has(Trait.POINTWISE) and node.name != "matmul":
            return f"{node.name} after a product or a scale"
        if node.name == "matmul" and any(v in below for v in node.operands[1:]):
            return "a product of a product"
        if after or is_materialized(node):
            below.update(dict.fromkeys(node.results))
    views = [n for n in graph.nodes() if n.name in VIEWS and n.operands[0] is left]
    return "the first factor is read through a view" if views else None


def rows_of(graph: Graph) -> Dim:
    """Rows of the product, all of its leading axes together."""
    return dims.numel(products_of(graph)[0].result.shape[:-1])


def tasks(graph: Graph, t: Target, engine: str, most: int, size: int, parts: int = 1, alone: bool = False) -> tuple[Param, ...]:
    """The knobs of :class:`~graphopt.backends.tvm.panelproduct.PanelProduct`.

    Args:
        most: rows of a tile.
        size: bytes of an element of the first factor, of which there are ``parts``.
        alone: whether each task makes rows for itself, so that there should be no more of them than cores.
    """
    node, step = products_of(graph)[0], LINE // size
    rows, depth = rows_of(graph), -(-int(node.operands[0].shape[-1]) // step) * step
    panels = -(-int(node.result.shape[-1]) // COLUMNS)
    tile = most if not isinstance(rows, int) else -(-rows // -(-rows // most))
    height = tile * (2 if engine == "amx" and not (isinstance(rows, int) and rows <= tile) else 1)
    room = max(1, t.cache[1] * 3 // 5 // (height * depth * size * parts))  # row tiles that stay in the second-level cache
    largest = min(_GROUP, room) if engine == "amx" else 4 * _GROUP
    tiles = -(-rows // height) if isinstance(rows, int) else largest
    group = -(-tiles // -(-tiles // largest))
    groups = -(-tiles // group) if isinstance(rows, int) else 1
    share = -(-panels // max(1, -(-(1 if alone else 4) * t.cores // groups)))
    block = _BLOCK // (COLUMNS * size * size)
    return (
        Param("lanes", (t.lanes(4),)),
        Param("rows", tuple(dict.fromkeys((tile, *(r for r in (16, 8, 6, 4, 2, 1) if r < tile)))), "tile"),
        Param("group", tuple(dict.fromkeys((group, 1, 2, 4, 8, 16))), "tasks"),
        Param("panels", tuple(dict.fromkeys((share, 1, 2, 4, 8, 16))), "tasks"),
        Param("block", tuple(dict.fromkeys((min(depth, block), block // 2, block * 2, 1 << 20))), "tasks"),
        Param("ahead", (True, False)),
        Param("beside", (True, False)),
        Param("parallel", (True, False), "tasks"),
    )

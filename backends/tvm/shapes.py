"""The shape of a region: rows and columns, or the roles of a product's axes. Looks at the IR only."""

from __future__ import annotations

from graphopt.backends.tvm.support import REDUCTIONS, is_materialized
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph, Value
from graphopt.ir.ops import Trait


def row_shape(graph: Graph) -> tuple[Dim, Dim] | str:
    """(rows, columns) of a region whose composites are expanded, or why it does not go row by row."""
    found: tuple[Dim, Dim] | None = None
    below: dict[Value, None] = {}  # what depends on a reduction
    for node in graph.nodes():
        dependent = any(v in below for v in node.operands)
        if node.name in ("argmax", "argmin", "matmul"):
            return f"{node.name} does not go row by row"
        if node.name in REDUCTIONS:
            x = node.operands[0]
            axes = sorted(a % x.type.rank for a in node.attrs["axes"]) if x.type.rank else []
            if not axes or axes != list(range(x.type.rank - len(axes), x.type.rank)):
                return f"{node.name} over axes {tuple(axes)} of {x.type}: not the trailing ones"
            shape = (dims.numel(x.shape[: axes[0]]), dims.numel(x.shape[axes[0] :]))
            if found is not None and not all(dims.same(a, b) for a, b in zip(found, shape, strict=True)):
                return "reductions over rows of different lengths"
            found = shape
        elif dependent and not (node.op.has(Trait.POINTWISE) or node.name in ("reshape", "broadcast_to")):
            return f"{node.name} after a reduction"
        if dependent or node.name in REDUCTIONS:
            below.update(dict.fromkeys(node.results))
    if found is None:
        return "no reduction"
    if found[0] == 0 or found[1] == 0:
        return "empty rows"
    for v in graph.outputs:
        if v.is_input or not (dims.same(v.type.numel, dims.mul(*found)) or dims.same(v.type.numel, found[0])):
            return f"an output of shape {v.type} beside rows of {dims.format_dim(found[1])}"
    return found


def product_of(graph: Graph) -> str | None:
    """Why a region is not one product with an epilogue of its shape, or None if it is."""
    nodes = [n for n in graph.nodes() if is_materialized(n)]
    if len(nodes) != 1 or nodes[0].name != "matmul":
        return "not exactly one matmul"
    node = nodes[0]
    if not node.result.dtype.is_float:
        return f"a product of {node.result.dtype}"
    if any(d == 0 for v in (*node.operands, node.result) for d in v.shape):
        return "a product without elements"
    for v in graph.outputs:
        if not dims.same_shape(v.shape, node.result.shape):
            return f"the output {v.type} has not the product's shape"
    return None

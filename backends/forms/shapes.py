"""The shape of a region: rows and columns, or the roles of a product's axes. Looks at the IR only."""

from __future__ import annotations

from graphopt.backends.forms.support import REDUCTIONS, is_materialized, materialized
from graphopt.ir import dims
from graphopt.ir.dims import Dim, Shape
from graphopt.ir.graph import Graph, Node, Value
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


def column_axes(graph: Graph) -> tuple[Shape, tuple[int, ...]] | str:
    """(shape, reduced axes) of a region whose reductions all go over the same axes, which are not the last ones; or why it is none."""
    found: tuple[Shape, tuple[int, ...]] | None = None
    below: dict[Value, None] = {}  # what depends on a reduction
    for node in graph.nodes():
        dependent = any(v in below for v in node.operands)
        if node.name in REDUCTIONS:
            x = node.operands[0]
            if node.name.startswith("arg") or not node.attrs["keepdims"] or not x.type.rank:
                return f"{node.name} does not go column by column"
            axes = tuple(sorted(a % x.type.rank for a in node.attrs["axes"]))
            if not axes or axes != tuple(range(axes[0], axes[-1] + 1)) or axes[-1] == x.type.rank - 1:
                return f"{node.name} over axes {axes} of {x.type}: not whole columns"
            if found is not None and not (dims.same_shape(found[0], x.shape) and found[1] == axes):
                return "reductions of different shapes"
            found = (x.shape, axes)
        elif dependent and not (node.op.has(Trait.POINTWISE) or node.name == "broadcast_to"):
            return f"{node.name} after a reduction"
        elif is_materialized(node):
            return f"{node.name} beside columns"
        if dependent or node.name in REDUCTIONS:
            below.update(dict.fromkeys(node.results))
    if found is None:
        return "no reduction"
    shape, axes = found
    if any(d == 0 for d in shape):
        return "empty columns"
    one = tuple(1 if k in axes else d for k, d in enumerate(shape))
    for v in (*graph.outputs, *below):
        if v.is_input or not (dims.same_shape(v.shape, shape) or dims.same_shape(v.shape, one)):
            return f"{v.type} beside columns of {dims.format_dim(dims.numel([shape[a] for a in axes]))}"
    return found


def product_of(graph: Graph, integers: bool = False) -> str | None:
    """Why a region is not one product, or several of one left factor and type, with an epilogue of its shape; None if it is.

    Args:
        integers: products of 8-bit integers that are summed in 32 bits count, too.
    """
    nodes = materialized(graph)
    if not nodes or any(n.name != "matmul" for n in nodes):
        return "not matmuls alone"
    node = nodes[0]
    if any(n.operands[0] is not node.operands[0] or n.result.dtype != node.result.dtype for n in nodes):
        return "products of different left factors"
    if not node.result.dtype.is_float and not (integers and node.attrs["acc"] is not None):
        return f"a product of {node.result.dtype}"
    if any(d == 0 for n in nodes for v in (*n.operands, n.result) for d in v.shape):
        return "a product without elements"
    for v in (*graph.outputs, *(n.result for n in nodes)):
        if not dims.same_shape(v.shape, node.result.shape):
            return f"{v.type} has not the product's shape"
    for n in nodes:
        if any(m in _upstream(n) for m in nodes):
            return "a product of a product"
    return None


def _upstream(node: Node) -> dict[Node, None]:
    """The nodes that a node depends on."""
    found: dict[Node, None] = {}
    stack = [node]
    while stack:
        for v in stack.pop().operands:
            if v.producer is not None and v.producer not in found:
                found[v.producer] = None
                stack.append(v.producer)
    return found

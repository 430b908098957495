"""Bringing a region into the form that the templates read: composites over rows become their expansion, rows stand under one axis."""

from __future__ import annotations

from graphopt.backends.forms.support import ROW_OPS
from graphopt.ir import Trait, dims, types
from graphopt.ir.builder import Builder
from graphopt.ir.dims import Shape
from graphopt.ir.graph import Graph, Node, Value, is_view
from graphopt.ir.types import TensorType

NARROW = (types.f16, types.bf16)


def expand_rows(graph: Graph) -> Graph:
    """A copy in which softmax, the normalizations and variance are spelled out; activations stay.

    On narrow floats they are computed in f32 and rounded once, as eager does.
    """
    copy = graph.clone()
    changed = True
    while changed:
        changed = False
        for node in copy.nodes():
            if node.name in ROW_OPS:
                copy.replace(node.result, _expand(copy, node))
                copy.erase(node)
                changed = True
    return copy


def _expand(graph: Graph, node: Node) -> Value:
    b = Builder(graph, before=node)
    dtype = node.result.dtype
    if dtype not in NARROW:
        return b.expand(node)
    wide: Value = b.create(node.name, [b.cast(v, types.f32) for v in node.operands], dict(node.attrs))
    return b.cast(wide, dtype)


def flatten_rows(graph: Graph) -> Graph:
    """A matmul region with all axes of its rows made one: ``[*B, M, K] @ [K, N]`` becomes ``[B * M, K] @ [K, N]``.

    Row-major memory reads the same, so a kernel of the result computes the region; tiles of rows no longer end where
    the last of several short axes ends, and the second factor is read once, not once a batch. Where there are more rows
    than columns the batches stay: they are what a thread keeps in its cache while it goes through the second factor. A region of
    another form is returned as it is: one with a second factor of several matrices, with views of what has rows, or with strides.
    A product with one column is turned first, see :func:`turn_column`.
    """
    graph = turn_column(graph)
    products = [n for n in graph.nodes() if n.name == "matmul"]
    if len(products) != 1 or products[0].result.type.rank < 3 or products[0].operands[1].type.rank != 2:
        return graph
    (product,) = products
    lead = product.result.shape[:-1]
    if all(d == 1 for d in lead[:-1]) or any(s is not None for s in graph.output_strides):
        return graph
    views, rows, columns = _views_behind(product.operands[1]), dims.numel(lead), product.result.shape[-1]
    if not (isinstance(rows, int) and isinstance(columns, int) and rows <= columns):
        return graph

    def flat(v: Value) -> Shape | None:
        """The shape that a value has then; None if it does not lend itself."""
        if v.type.rank == len(lead) + 1 and dims.same_shape(v.shape[:-1], lead):
            return (rows, v.shape[-1])
        if v.type.rank == 2 and dims.same(v.shape[0], rows):
            return v.shape
        return v.shape if v.type.rank < 2 else v.shape[-2:] if all(d == 1 for d in v.shape[:-1]) else None

    mapping: dict[Value, Value] = {}
    out = Graph(graph.name)
    out.symbols.update(graph.symbols)
    of_weight = {v for n in views for v in n.operands} | {product.operands[1]}
    for v in graph.inputs:
        shape = v.shape if v in of_weight else flat(v)
        if shape is None or (v.type.strides is not None and shape != v.shape):
            return graph
        mapping[v] = out.add_input(TensorType(v.dtype, shape, v.type.strides), v.hint)
    b = Builder(out)
    for n in graph.nodes():
        if n.name == "reshape" and n not in views and flat(n.result) == mapping[n.operands[0]].shape:
            mapping[n.result] = mapping[n.operands[0]]
            continue
        moves = n in views or n is product or n.name == "constant" or n.op.has(Trait.POINTWISE)
        beside = n not in views and n is not product and any(v in of_weight for v in n.operands)
        if not moves or beside or (n not in views and flat(n.result) is None):
            return graph
        mapping[n.result] = b.create(n.name, [mapping[v] for v in n.operands], dict(n.attrs))
    out.set_outputs([mapping[v] for v in graph.outputs])
    return out


def turn_column(graph: Graph) -> Graph:
    """A matmul region with one column as one with one row: ``[*B, M, K] @ [*B, K, 1]`` becomes ``[*B, 1, K] @ [*B, K, M]``.

    The results lie in memory as before, and vectors of them are neighbours; the first factor, whose elements are used but once, is read
    in the order in which it lies. A region of another form is returned as it is: one with views behind the product, or with strides.
    """
    products = [n for n in graph.nodes() if n.name == "matmul"]
    if len(products) != 1 or products[0].result.shape[-1] != 1 or any(s is not None for s in graph.output_strides):
        return graph
    (product,) = products
    if not isinstance(product.result.shape[-2], int) or product.result.shape[-2] == 1:
        return graph
    before = _upstream(product)

    def turned(v: Value) -> Shape | None:
        """The shape that a value beside or behind the product has then; None if it does not lend itself."""
        if v.type.rank < 2:
            return v.shape
        return (*v.shape[:-2], 1, v.shape[-2]) if v.shape[-1] == 1 else None

    mapping: dict[Value, Value] = {}
    out = Graph(graph.name)
    out.symbols.update(graph.symbols)
    for v in graph.inputs:
        shape = v.shape if v in before else turned(v)
        if shape is None or (v not in before and v.type.strides is not None):
            return graph
        mapping[v] = out.add_input(TensorType(v.dtype, shape, v.type.strides), v.hint)
    b = Builder(out)
    for n in graph.nodes():
        if n is product:
            left, right = (b.transpose(mapping[v], perm=[*range(v.type.rank - 2), v.type.rank - 1, v.type.rank - 2]) for v in n.operands)
            mapping[n.result] = b.create("matmul", [right, left], dict(n.attrs))
            continue
        inside = n.result in before
        if not inside and (any(v in before for v in n.operands) or not (n.name == "constant" or n.op.has(Trait.POINTWISE))):
            return graph
        if not inside and turned(n.result) is None:
            return graph
        mapping[n.result] = b.create(n.name, [mapping[v] for v in n.operands], dict(n.attrs))
    out.set_outputs([mapping[v] for v in graph.outputs])
    return out


def _upstream(node: Node) -> dict[Value, None]:
    """The values that a node depends on."""
    found: dict[Value, None] = {}
    stack = list(node.operands)
    while stack:
        v = stack.pop()
        if v not in found:
            found[v] = None
            stack += v.producer.operands if v.producer is not None else ()
    return found


def _views_behind(v: Value) -> list[Node]:
    """The views, and joins of them, between inputs and a value, in order."""
    node = v.producer
    if node is None or not (is_view(node) or node.name == "concat"):
        return []
    return list(dict.fromkeys([*(n for x in node.operands for n in _views_behind(x)), node]))

"""Bringing a region into the form that the templates read: composites over rows become their expansion."""

from __future__ import annotations

from graphopt.backends.tvm.support import ROW_OPS
from graphopt.ir import types
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph, Node, Value

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

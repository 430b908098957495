"""Bringing a region into the form that the templates read: composites over rows and positions of extremes become simpler ops."""

from __future__ import annotations

from functools import lru_cache

from graphopt.autotune.space import Workload
from graphopt.backends.forms.prepare import expand_rows
from graphopt.ir import types
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph, Node, Value


@lru_cache(maxsize=1024)
def prepared(w: Workload) -> Graph:
    """A region's graph with softmax, normalizations, variance, argmax and argmin spelled out. Not to be changed."""
    graph = expand_rows(w.graph)
    for node in graph.nodes():
        if node.name in ("argmax", "argmin"):
            graph.replace(node.result, _position(graph, node))
            graph.erase(node)
    return graph


def _position(graph: Graph, node: Node) -> Value:
    """The least position of an element that is the extreme, or nan: ``min(where(x == max x | isnan x, iota, size))``."""
    b, x = Builder(graph, before=node), node.operands[0]
    axis = node.attrs["axis"] % max(x.type.rank, 1)
    if not x.type.rank:
        return b.constant(0, types.i64)
    size = x.shape[axis]
    extreme = b.create("max" if node.name == "argmax" else "min", [x], {"axes": (axis,), "keepdims": True})
    hit = b.logical_or(b.eq(x, extreme), b.isnan(x)) if x.dtype.is_float else b.eq(x, extreme)
    shape = tuple(size if k == axis else 1 for k in range(x.type.rank))
    at = b.broadcast_to(b.reshape(b.iota(size=size), shape=shape), shape=x.shape)
    found = b.where(hit, at, b.broadcast_to(b.constant(size, types.i64), shape=x.shape))
    return b.create("min", [found], {"axes": (axis,), "keepdims": node.attrs["keepdims"]})  # type: ignore[no-any-return]

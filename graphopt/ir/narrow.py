"""A graph for fewer sizes than it was captured for: symbols take a value, or a smaller range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

from graphopt.ir import dims
from graphopt.ir.dims import Dim, Range, Shape
from graphopt.ir.graph import Graph, Value
from graphopt.ir.types import TensorType


def narrow(graph: Graph, ranges: Mapping[str, Range]) -> Graph:
    """A copy in which the symbols keep to these ranges; a range of one value puts that value in the symbol's place.

    Inputs, nodes and outputs correspond one by one to those of the graph. Strides that are row-major at the sizes that have
    become known are dropped, as in a graph that was captured at those sizes.

    Raises:
        TypeInferenceError: an op does not exist at these sizes.
    """
    values = {dims.symbol(s): r.lo for s, r in ranges.items() if r.lo == r.hi}

    def dim(d: Dim) -> Dim:
        return d if isinstance(d, int) else dims.simplify(d.subs(values).doit())

    def shape(s: Shape) -> Shape:
        return tuple(dim(d) for d in s)

    def type_(t: TensorType) -> TensorType:
        out = TensorType(t.dtype, shape(t.shape), None if t.strides is None else shape(t.strides))
        return out.logical if out.is_contiguous else out

    def attribute(a: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(attribute(x) for x in a)
        return dim(a) if isinstance(a, sympy.Expr) else a

    kept = {s: ranges.get(s, r) for s, r in graph.symbols.items() if dims.symbol(s) not in values}
    out = Graph(graph.name, kept)
    mapping: dict[Value, Value] = {v: out.add_input(type_(v.type), v.hint, v.weight, v.exact) for v in graph.inputs}
    for node in graph.nodes():
        new = out.create(node.op, [mapping[v] for v in node.operands], {k: attribute(a) for k, a in node.attrs.items()}, loc=node.loc,
                         types=[type_(r.type) for r in node.results], body=narrow(node.body, ranges) if node.body else None)  # fmt: skip
        for a, b in zip(node.results, new.results, strict=True):
            b.hint = a.hint
            mapping[a] = b
    strides = [None if s is None else type_(TensorType(v.dtype, v.shape, s)).strides
               for v, s in zip(graph.outputs, graph.output_strides, strict=True)]  # fmt: skip
    out.set_outputs([mapping[v] for v in graph.outputs], strides)
    return out

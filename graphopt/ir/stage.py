"""Which values depend on frozen weights and constants alone.

Such *staged* values are computed once, at the first call, kept, and computed again only when a weight has changed. Passes
may therefore write weight arithmetic (folding a batch norm, packing a matrix) as ordinary nodes: it costs nothing later,
and no weight is ever stale.
"""

from __future__ import annotations

from graphopt.ir import dims
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import Trait

# A staged value is kept in memory for good. One that is much larger than what it is made of (a materialised mask, an
# expanded row) and large in itself is cheaper to make again on each call.
_GROWTH = 4
_SMALL = 1 << 20  # elements


class Staged:
    """The staged values of a graph: ``value in staged``. A snapshot; take it again after changing the graph."""

    def __init__(self, graph: Graph) -> None:
        self._values: dict[Value, None] = {v: None for v in graph.inputs if v.weight}
        for node in graph.nodes():
            if all(v in self._values for v in node.operands) and _fit(node):
                for r in node.results:
                    self._values[r] = None

    def __contains__(self, value: object) -> bool:
        return value in self._values

    def node(self, node: Node) -> bool:
        """Whether the node's results are staged."""
        return bool(node.results) and node.results[0] in self._values


def _fit(node: Node) -> bool:
    if node.has_effect or not all(r.type.is_static for r in node.results) or node.op.name == "fusion":
        return False
    if node.op.name == "dequantize" and node.result.type.rank > 1:  # kept as small integers: floats of them would be what was saved
        return False
    if any(dims.free_symbols([a]) for a in node.attrs.values() if not isinstance(a, str | tuple) and hasattr(a, "free_symbols")):
        return False
    if node.op.has(Trait.VIEW) and node.op.name != "flip":
        return True
    size = sum(int(r.type.numel) for r in node.results)
    return size <= _SMALL or size <= _GROWTH * sum(int(v.type.numel) for v in node.operands)


def staged_values(graph: Graph) -> Staged:
    """The values that depend on weights and constants alone."""
    return Staged(graph)

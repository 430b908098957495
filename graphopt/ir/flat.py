"""Graphs in files: pickles of objects that hold graphs, nodes and values.

A graph's links lead from node to node, deeper than a pickler follows, and each way back. So graphs are written as plain data, values
by number; nodes and values that other objects refer to are written as (graph, number).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Hashable
from typing import Any, TypeVar

from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import op

T = TypeVar("T", bound=Hashable)


def dumps(obj: Any) -> bytes:
    """Pickle an object that may refer to graphs, and to nodes and values that are in them.

    Raises:
        KeyError: it refers to a node that was erased, or to a value of no graph.
        pickle.PicklingError, AttributeError, TypeError: it holds what cannot be pickled.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(obj)
    flat = [pickler.flatten(g) for g in pickler.graphs]  # grows meanwhile: bodies
    return pickle.dumps((flat, buffer.getvalue()), protocol=5)


def loads(data: bytes) -> Any:
    """The object that :func:`dumps` was given, with graphs of its own. A value's uses are in the order of the nodes."""
    flat, rest = pickle.loads(data)
    return _Unpickler(io.BytesIO(rest), [Graph() for _ in flat], flat).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.graphs: list[Graph] = []
        self._of: dict[Graph, int] = {}
        self._numbers: list[dict[Node | Value, int]] = []
        self._same: dict[Any, Any] = {}

    def number(self, graph: Graph) -> int:
        """Of a graph; a new one if it was not met before."""
        if graph not in self._of:
            self._of[graph] = len(self.graphs)
            self.graphs.append(graph)
            nodes = [*graph.nodes(), graph.ret]
            values = [*graph.inputs, *(r for n in nodes for r in n.results)]
            self._numbers.append({**{n: i for i, n in enumerate(nodes)}, **{v: i for i, v in enumerate(values)}})
        return self._of[graph]

    def persistent_id(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is Graph:
            return (self.number(obj),)
        if kind is Node:
            g = self.number(obj.graph)
            return g, "node", self._numbers[g][obj]
        if kind is Value:
            g = self.number(obj.producer.graph) if obj.producer is not None else self._owner(obj)
            return g, "value", self._numbers[g][obj]
        return None

    def _owner(self, value: Value) -> int:
        """The graph that a value is an input of: a value does not say; it is one that was met before, or one of its users'."""
        for user in value.users:
            self.number(user.graph)
        found = [i for i, g in enumerate(self.graphs) if value.index < len(g.inputs) and g.inputs[value.index] is value]
        if not found:
            raise KeyError(f"{value!r} is in no graph")
        return found[0]

    def flatten(self, graph: Graph) -> tuple[Any, ...]:
        of = self._numbers[self.number(graph)]
        inputs = [(self._shared(v.type), v.hint, v.weight, v.exact) for v in graph.inputs]
        nodes = [
            (n.op.name, [of[v] for v in n.operands], n.attrs, [self._shared(r.type) for r in n.results], [r.hint for r in n.results],
             self._shared(n.loc), None if n.body is None else self.number(n.body))
            for n in graph.nodes()
        ]  # fmt: skip
        return graph.name, graph.symbols, inputs, nodes, [of[v] for v in graph.outputs], graph.output_strides

    def _shared(self, x: T) -> T:
        """Equal objects are written once."""
        return self._same.setdefault(x, x)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, graphs: list[Graph], flat: list[tuple[Any, ...]]) -> None:
        super().__init__(file)
        self._graphs = graphs
        made = [self._fill(g, *f) for g, f in zip(graphs, flat, strict=True)]
        self._made = [{"node": nodes, "value": values} for nodes, values in made]

    def _fill(self, graph: Graph, name: str, symbols: Any, inputs: Any, nodes: Any, outputs: Any,
              strides: Any) -> tuple[list[Node], list[Value]]:  # fmt: skip
        graph.name, graph.symbols = name, symbols
        values = [graph.add_input(*i) for i in inputs]
        made = []
        for kind, operands, attrs, types, hints, loc, body in nodes:
            node = Node(graph, op(kind), [values[i] for i in operands], attrs, types, loc, None if body is None else self._graphs[body])
            graph.append(node)
            for r, hint in zip(node.results, hints, strict=True):
                r.hint = hint
            values += node.results
            made.append(node)
        graph.set_outputs([values[i] for i in outputs], strides)
        return [*made, graph.ret], values

    def persistent_load(self, pid: Any) -> Any:
        if len(pid) == 1:
            return self._graphs[pid[0]]
        graph, kind, i = pid
        return self._made[graph][kind][i]

"""Outlining: nodes become one ``fusion`` node with a nested graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from graphopt.ir import dims
from graphopt.ir.graph import Graph, Node, Value, copy_nodes
from graphopt.ir.ops import op
from graphopt.ir.types import TensorType


def outline(graph: Graph, nodes: Sequence[Node], kind: str) -> Node:
    """Put a fusion node in the place of the last of ``nodes``, and let it take over the users of that node's results.

    Args:
        nodes: in execution order; the last one is the root, and no other one's result may be used outside by anything
            that is to go away with them. The nodes themselves stay; those left without users are dead.

    Returns:
        The fusion node. Its operands are in the order in which the body first reads them, each one once.
    """
    nodes = in_operand_order(nodes)
    root, inside = nodes[-1], dict.fromkeys(nodes)
    body = Graph("body")
    outer = list(dict.fromkeys(v for n in nodes for v in n.operands if v.producer is None or v.producer not in inside))
    mapping: dict[Value, Value] = {v: body.add_input(_body_type(v.type), v.hint) for v in outer}
    copy_nodes(nodes, mapping, body)
    body.set_outputs([mapping[r] for r in root.results])
    names = _symbols(body)
    body.symbols = {name: r for name, r in graph.symbols.items() if name in names}
    fusion = graph.create(op("fusion"), outer, {"kind": kind}, before=root, loc=root.loc, body=body)
    for old, new in zip(root.results, fusion.results, strict=True):
        graph.replace(old, new)
    return fusion


def in_operand_order(nodes: Sequence[Node]) -> list[Node]:
    """The nodes in the order in which the last one's operands, left to right, need them.

    Equal regions then read equal, however the graph around them was ordered, and share one kernel.
    """
    inside, out = dict.fromkeys(nodes), dict[Node, None]()
    stack: list[tuple[Node, bool]] = [(nodes[-1], False)]
    while stack:
        node, ready = stack.pop()
        if node in out:
            continue
        if ready:
            out[node] = None
            continue
        stack.append((node, True))
        stack += [(v.producer, False) for v in reversed(node.operands) if v.producer in inside and v.producer not in out]  # type: ignore[misc]
    return list(out)


def _body_type(t: TensorType) -> TensorType:
    """Strides are kept only where they differ from row-major ones: equal regions must read equal."""
    return t.logical if t.is_contiguous else t


def _symbols(body: Graph) -> dict[str, None]:
    found: dict[str, None] = {}

    def note(value: Any) -> None:
        if isinstance(value, tuple):
            for item in value:
                note(item)
        elif isinstance(value, sympy.Expr):
            found.update(dict.fromkeys(dims.free_symbols([value])))

    for v in body.inputs:
        note(v.type.shape)
        note(v.type.strides)
    for node in body.nodes():
        note(tuple(node.attrs.values()))
        for r in node.results:
            note(r.type.shape)
    return found

"""The text form, printing. See :mod:`graphopt.ir.text` for the grammar and the parser."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import sympy

from graphopt.errors import GraphoptError
from graphopt.ir import dims
from graphopt.ir.ops import Ref, TorchConst
from graphopt.ir.types import DType, TensorType

if TYPE_CHECKING:
    from graphopt.ir.graph import Graph, Node, Value

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*\Z")


def format_attr(value: Any) -> str:
    """Text of an attribute value."""
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            if math.isnan(value):
                return "nan"
            return ("inf" if value > 0 else "-inf") if math.isinf(value) else repr(value)
        case complex():
            return f"complex({format_attr(value.real)}, {format_attr(value.imag)})"
        case str():
            return json.dumps(value)
        case DType():
            return value.name
        case Ref(index=index):
            return f"${index}"
        case TorchConst(name=name):
            return f"@{name}"
        case sympy.Expr():
            return dims.format_dim(value)
        case tuple():
            return "[" + ", ".join(map(format_attr, value)) + "]"
    raise GraphoptError(f"an attribute of type {type(value).__name__} has no text: {value!r}")


def print_graph(graph: Graph, *, canonical: bool = False) -> str:
    """Text of a graph.

    Args:
        canonical: leave out names, source lines and unused symbols, so that equal structure gives equal text.
    """
    header = f"graph @{'g' if canonical else graph.name}"
    return "\n".join(_Printer(canonical).graph(graph, header, "")) + "\n"


def print_node(node: Node) -> str:
    """One line for a node, for messages: values without a name are called by their operation, as numbers would not be the graph's."""
    printer = _Printer(canonical=False)
    for v in dict.fromkeys([*node.operands, *node.results]):
        base = v.hint or (v.producer.op.name if v.producer is not None else f"arg{v.index}")
        name, count = base, 1
        while name in printer.taken:
            count += 1
            name = f"{base}.{count}"
        printer.taken.add(name)
        printer.names[v] = f"%{name}"
    return printer.node(node, "")[0].split("  // ")[0]


def print_lines(graph: Graph) -> dict[Node, str]:
    """The first line of every node, with the names that printing the whole graph gives; for messages about several nodes."""
    printer = _Printer(canonical=False)
    for v in graph.inputs:
        printer.name(v, "arg")
    return {node: printer.node(node, "")[0] for node in graph.nodes()}


class _Printer:
    def __init__(self, canonical: bool) -> None:
        self.canonical = canonical
        self.names: dict[Value, str] = {}
        self.taken: set[str] = set()
        self.count = 0

    def name(self, value: Value, prefix: str = "") -> str:
        """The value's name; its hint if that is free, else a number."""
        if value not in self.names:
            text = "" if self.canonical or not IDENTIFIER.match(value.hint) else value.hint
            if not text or text in self.taken:
                text = f"{prefix}{value.index}" if prefix else str(self.count)
                while text in self.taken:
                    text += "_"
                self.count += not prefix
            self.taken.add(text)
            self.names[value] = "%" + text
        return self.names[value]

    def graph(self, g: Graph, header: str, indent: str) -> list[str]:
        inputs = ", ".join(f"{_weight(v)}{self.name(v, 'arg')}: {v.type}" for v in g.inputs)
        outputs = [TensorType(v.dtype, v.shape, s) for v, s in zip(g.outputs, g.output_strides, strict=True)]
        result = str(outputs[0]) if len(outputs) == 1 else "(" + ", ".join(map(str, outputs)) + ")"
        where = ", ".join(_format_range(s, r) for s, r in sorted(g.symbols.items()))
        lines = [f"{indent}{header}({inputs}) -> {result}" + ("" if where else " {")]
        if where:
            lines.append(f"{indent}where {where} {{")
        for node in g.nodes():
            lines += self.node(node, indent + "  ")
        lines.append(f"{indent}  return {', '.join(self.name(v) for v in g.outputs)}".rstrip())
        lines.append(indent + "}")
        return lines

    def node(self, node: Node, indent: str) -> list[str]:
        operands = ", ".join(self.names.get(v) or self.name(v) for v in node.operands)
        results = ", ".join(f"{self.name(r)}: {r.type}" for r in node.results)
        line = f"{indent}{results}{' = ' if results else ''}{node.op.name}({operands})"
        shown = {k: v for k, v in node.attrs.items() if k not in node.op.attrs or _differs(v, node.op.attrs[k])}
        if shown:
            line += " {" + ", ".join(f"{k} = {format_attr(v)}" for k, v in shown.items()) + "}"
        if node.loc is not None and not self.canonical:
            line += f"  // {node.loc}"
        if node.body is None:
            return [line]
        inner = _Printer(self.canonical).graph(node.body, "body ", indent)
        head, _, loc = line.partition("  // ")
        first = f"{head} {inner[0].strip()}" + (f"  // {loc}" if loc else "")
        return [first, *inner[1:]]


def _weight(v: Value) -> str:
    if not v.weight:
        return ""
    return "weight " if v.exact is None else f"weight({v.exact}) "


def _differs(value: Any, default: Any) -> bool:
    return type(value) is not type(default) or value != default


def _format_range(name: str, r: dims.Range) -> str:
    return f"{r.lo} <= {name}" + ("" if r.hi is None else f" <= {r.hi}")

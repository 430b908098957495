"""The text form: ``parse_graph(print_graph(g))`` is ``g`` again.

Grammar (``//`` starts a comment; one of the form ``// file:line`` at the end of a node is its source line)::

    graph   := "graph" "@" name signature body
    signature := "(" [input ("," input)*] ")" "->" types ["where" range ("," range)*]
    input   := ["weight" ["(" dtype ")"]] value ":" type
    types   := type | "(" [type ("," type)*] ")"
    range   := int "<=" symbol ["<=" int]
    body    := "{" node* "return" [value ("," value)*] "}"
    node    := [value ":" type ("," value ":" type)* "="] op "(" [values] ")" ["{" attrs "}"] ["body" signature body]
    attrs   := name "=" attr ("," name "=" attr)*
    attr    := none | true | false | number | inf | nan | string | dtype | size | "$" int | "@" name | "[" attrs* "]"
    type    := dtype "[" [size ("," size)*] [";" strides] "]"
    value   := "%" name
"""

from __future__ import annotations

import json
import re
from typing import Any

from graphopt.errors import GraphoptError, ParseError, counted, nearest
from graphopt.ir import dims
from graphopt.ir.dims import Dim, Range, Shape
from graphopt.ir.graph import Graph, Loc, Value
from graphopt.ir.ops import OPS, Ref, TorchConst
from graphopt.ir.printer import print_graph
from graphopt.ir.types import DType, TensorType

__all__ = ["parse_graph", "print_graph"]

_SPACE = re.compile(r"(?:\s+|//[^\n]*)*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_VALUE = re.compile(r"%[A-Za-z0-9_.]+")
_INT = re.compile(r"-?\d+")
_NUMBER = re.compile(r"-?(?:\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+|inf\b|nan\b)")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_LOC = re.compile(r"[ \t]*// (?:(?P<file>\S+):(?P<line>\d+)|(?P<module>[\w.]* ?\(\w+\)))[ \t]*(?=\n|$)")
_LITERALS = {"none": None, "true": True, "false": False}


def parse_graph(text: str, filename: str = "<text>") -> Graph:
    """Parse one graph. Raises ParseError with line, column and a caret; type errors are reported the same way."""
    return _Parser(text, filename).graph_file()


class _Parser:
    def __init__(self, text: str, filename: str) -> None:
        self.text, self.filename, self.at = text, filename, 0
        self.skip()

    # --- scanning -----------------------------------------------------------------------------------------------------

    def error(self, message: str, at: int | None = None) -> ParseError:
        at = self.at if at is None else at
        line = self.text.count("\n", 0, at) + 1
        return ParseError(message, line, at - (self.text.rfind("\n", 0, at) + 1) + 1, self.text, self.filename)

    def skip(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match
        self.at = match.end()

    def take(self, pattern: re.Pattern[str], skip: bool = True) -> str | None:
        match = pattern.match(self.text, self.at)
        if not match:
            return None
        self.at = match.end()
        if skip:
            self.skip()
        return match.group()

    def accept(self, literal: str) -> bool:
        """Take a literal if it is next; a word must end there."""
        end = self.at + len(literal)
        if not self.text.startswith(literal, self.at):
            return False
        if literal[-1].isalnum() and end < len(self.text) and (self.text[end].isalnum() or self.text[end] == "_"):
            return False
        self.at = end
        self.skip()
        return True

    def expect(self, literal: str) -> None:
        if not self.accept(literal):
            found = self.text[self.at : self.at + 12].split("\n")[0]
            raise self.error(f"expected {literal!r}, found {found!r}" if found else f"expected {literal!r}, found the end")

    def need(self, pattern: re.Pattern[str], what: str) -> str:
        found = self.take(pattern)
        if found is None:
            raise self.error(f"expected {what}")
        return found

    # --- sizes and types ----------------------------------------------------------------------------------------------

    def expression(self, stops: str) -> tuple[str, int]:
        """The text up to one of the stop characters outside of round brackets, and where it starts."""
        start, depth = self.at, 0
        while self.at < len(self.text):
            c = self.text[self.at]
            if depth == 0 and (c in stops or c == "\n"):
                break
            depth += (c == "(") - (c == ")")
            self.at += 1
        text = self.text[start : self.at].strip()
        self.skip()
        return text, start

    def size(self, stops: str) -> Dim:
        text, start = self.expression(stops)
        try:
            return dims.parse_dim(text)
        except ValueError:
            raise self.error(f"{text!r} is no size", start) from None

    def sizes(self, stops: str) -> Shape:
        out: list[Dim] = []
        while self.text[self.at : self.at + 1] not in stops:
            out.append(self.size("," + stops))
            if not self.accept(","):
                break
        return tuple(out)

    def dtype(self, what: str) -> DType:
        start, name = self.at, self.need(_NAME, what)
        try:
            return DType.named(name)
        except KeyError:
            raise self.error(f"{name!r} is no dtype{nearest(name, DType._registry)}", start) from None

    def type(self) -> TensorType:
        dtype = self.dtype("a type such as f32[2, 3]")
        self.expect("[")
        shape = self.sizes(";]")
        strides = self.sizes("]") if self.accept(";") else None
        if strides is not None and len(strides) != len(shape):
            raise self.error("one stride an axis is needed")
        self.expect("]")
        return TensorType(dtype, shape, strides)

    def types(self) -> list[TensorType]:
        if not self.accept("("):
            return [self.type()]
        out: list[TensorType] = []
        while not self.accept(")"):
            out.append(self.type())
            if not self.accept(","):
                self.expect(")")
                break
        return out

    # --- attributes ---------------------------------------------------------------------------------------------------

    def attr(self) -> Any:
        if self.accept("["):
            items = []
            while not self.accept("]"):
                items.append(self.attr())
                if not self.accept(","):
                    self.expect("]")
                    break
            return tuple(items)
        if (quoted := self.take(_STRING)) is not None:
            return json.loads(quoted)
        if self.accept("$"):
            return Ref(int(self.need(_INT, "an operand number")))
        if self.accept("@"):
            return TorchConst(self.need(_NAME, "a name"))
        if (number := self.take(_NUMBER)) is not None:
            return float(number)
        if self.accept("complex("):
            real = self.attr()
            self.expect(",")
            imag = self.attr()
            self.expect(")")
            return complex(real, imag)
        text, start = self.expression(",]})")
        if text in _LITERALS:
            return _LITERALS[text]
        if text in DType._registry:
            return DType.named(text)
        try:
            return dims.parse_dim(text)
        except ValueError:
            raise self.error(f"{text!r} is no attribute value", start) from None

    def attrs(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        while not self.accept("}"):
            start, name = self.at, self.need(_NAME, "an attribute name")
            if name in out:
                raise self.error(f"attribute {name!r} is given twice", start)
            self.expect("=")
            out[name] = self.attr()
            if not self.accept(","):
                self.expect("}")
                break
        return out

    # --- graphs -------------------------------------------------------------------------------------------------------

    def graph_file(self) -> Graph:
        self.expect("graph")
        self.expect("@")
        graph = self.graph(self.need(_NAME, "the graph's name"))
        if self.at < len(self.text):
            raise self.error("expected the end of the text")
        return graph

    def graph(self, name: str) -> Graph:
        graph = Graph(name)
        values: dict[str, Value] = {}
        self.expect("(")
        while not self.accept(")"):
            weight, exact = self.accept("weight"), None
            if weight and self.accept("("):
                exact = self.dtype("the dtype that holds the weight")
                self.expect(")")
            start, value = self.at, self.need(_VALUE, "an input such as %x: f32[4]")
            self.expect(":")
            self.bind(values, value, graph.add_input(self.type(), self.hint(value), weight, exact), start)
            if not self.accept(","):
                self.expect(")")
                break
        self.expect("->")
        outputs_at, outputs = self.at, self.types()
        if self.accept("where"):
            while True:
                name, r = self.range()
                graph.symbols[name] = r
                if not self.accept(","):
                    break
        self.expect("{")
        while not self.accept("return"):
            self.node(graph, values)
        results: list[Value] = []
        while not self.accept("}"):
            results.append(self.value(values))
            if not self.accept(","):
                self.expect("}")
                break
        if [t.logical for t in outputs] != [v.type.logical for v in results]:
            given = ", ".join(str(v.type.logical) for v in results)
            raise self.error(f"the graph returns ({given}), not what its signature says", outputs_at)
        graph.set_outputs(results, [t.strides for t in outputs])
        return graph

    def range(self) -> tuple[str, Range]:
        lo = int(self.need(_INT, "a range such as 1 <= B <= 64"))
        self.expect("<=")
        name = self.need(_NAME, "a symbol")
        hi = int(self.need(_INT, "a number")) if self.accept("<=") else None
        return name, Range(lo, hi)

    @staticmethod
    def hint(value: str) -> str:
        return "" if value[1].isdigit() else value[1:]

    def bind(self, values: dict[str, Value], name: str, value: Value, at: int) -> None:
        if name in values:
            raise self.error(f"{name} is defined twice", at)
        values[name] = value

    def value(self, values: dict[str, Value]) -> Value:
        start, name = self.at, self.need(_VALUE, "a value such as %0")
        if name not in values:
            raise self.error(f"{name} is not defined{nearest(name, values)}", start)
        return values[name]

    def node(self, graph: Graph, values: dict[str, Value]) -> None:
        start = self.at
        results: list[tuple[str, TensorType, int]] = []
        while self.text.startswith("%", self.at):
            at, name = self.at, self.need(_VALUE, "a value")
            self.expect(":")
            results.append((name, self.type(), at))
            if not self.accept(","):
                self.expect("=")
                break
        op_at, op_name = self.at, self.need(_NAME, "an operation")
        if op_name not in OPS or op_name == "return":
            raise self.error(f"there is no op {op_name!r}{nearest(op_name, OPS)}", op_at)
        self.expect("(")
        operands: list[Value] = []
        while not self.accept(")"):
            operands.append(self.value(values))
            if not self.accept(","):
                self.expect(")")
                break
        attrs = self.attrs() if self.accept("{") else {}
        end = self.at
        body = self.graph("body") if self.accept("body") else None
        types = [t for _, t, _ in results]
        try:
            node = graph.create(OPS[op_name], operands, attrs, types=types, body=body, loc=self.loc(start, end))
        except GraphoptError as error:
            raise error if isinstance(error, ParseError) else self.error(str(error), op_at) from error
        if len(node.results) != len(results):
            raise self.error(f"{op_name} has {counted(len(node.results), 'result')}, not {len(results)}", start)
        for (name, declared, at), result in zip(results, node.results, strict=True):
            if not (declared.dtype == result.dtype and dims.same_shape(declared.shape, result.shape, graph.symbols)):
                raise self.error(f"{name} is declared {declared} but {op_name} gives {result.type}", at)
            result.type, result.hint = declared, self.hint(name)
            self.bind(values, name, result, at)

    def loc(self, start: int, end: int) -> Loc | None:
        """The source line or module in the comment that ends the node's first line."""
        line_end = self.text.find("\n", start)
        line = self.text[start : line_end if line_end >= 0 else len(self.text)]
        at = line.rfind("  // ")
        match = _LOC.match(line, at) if at >= 0 else None
        if match is None:
            return None
        return Loc("", 0, match["module"]) if match["module"] else Loc(match["file"], int(match["line"]))

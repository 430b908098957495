"""Scans: running sums, products, extremes and their places, and logarithms of sums, along any axis.

    y[r, start + c] = carry[r] * (x[r, start] * ... * x[r, start + c]);   carry[r] = y[r, start + COLUMNS - 1]

with the scan's own operation for ``*``. A *column* is an element of the scanned axis, a *row* one of all others. A program has a few
rows, and goes through blocks of columns: lanes are joined by Triton's associative scan, blocks by what is carried. Sums and products of
f32 and narrower floats are carried in f64, so that the error does not grow with the number of blocks.
Blelloch, "Prefix sums and their applications" (1990).
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.backends.forms.support import SCANS
from graphopt.backends.triton.code import Code, Launch, ceildiv
from graphopt.backends.triton.expr import Expressions, Index
from graphopt.backends.triton.index import variable
from graphopt.backends.triton.pointwise import NAMES, cast, held, number
from graphopt.backends.triton.sums import computed
from graphopt.errors import BuildError
from graphopt.ir import dims, types
from graphopt.ir.graph import Graph, Node
from graphopt.ir.opset.scan import ARG_SCANS
from graphopt.ir.types import DType

TILE = "[ROWS, COLUMNS]"
_JOINS = {
    "cummax": "larger", "cummin": "smaller", "argcummax": "last_largest", "argcummin": "last_smallest", "logcumsumexp": "log_add",
}  # fmt: skip


def refusal(graph: Graph) -> str | None:
    """Why a region is no scan with pointwise work around it, or None."""
    nodes = [n for n in graph.nodes() if n.name in SCANS]
    if len(nodes) != 1:
        return "not exactly one scan"
    x = nodes[0].operands[0]
    if not x.type.rank or any(d == 0 for d in x.shape):
        return "a scan without an axis, or without elements"
    if any(not dims.same_shape(v.shape, x.shape) for v in graph.outputs):
        return "an output of another shape than the scan's"
    try:  # what is no pointwise work shows when it is written
        ScanKernel(graph, 1, 16).emit(1)
    except BuildError as error:
        return str(error)
    return None


def node_of(graph: Graph) -> Node:
    """The scan of a region that is not refused."""
    return next(n for n in graph.nodes() if n.name in SCANS)


class ScanKernel:
    """One region around a scan."""

    def __init__(self, graph: Graph, rows: int, columns: int) -> None:
        self.graph, self.node, self.rows, self.columns = graph, node_of(graph), rows, columns
        self.x = self.node.operands[0]
        self.axis = self.node.attrs["axis"] % self.x.type.rank
        self.others = tuple(d for k, d in enumerate(self.x.shape) if k != self.axis)
        self.kind, self.carried = self._types()
        self.code = Code(graph)
        self.e = Expressions(self.code)

    def _types(self) -> tuple[DType, DType]:
        """The types in which lanes are joined, and in which blocks are."""
        d, summed = self.x.dtype, self.node.name in ("cumsum", "cumprod")
        if d.is_float:
            kind = types.f64 if d == types.f64 else types.f32
            return kind, types.f64 if summed else kind
        kind = d if d.bits >= 32 else types.i32
        return kind, kind

    def emit(self, warps: int) -> tuple[Code, Launch]:
        code, count = self.code, dims.numel(self.others)
        row = code.block("row", f"{code.program(0)} * ROWS", "ROWS", self.rows, count, 0, 2)
        carries = [code.let("carry", f"tl.full([ROWS, 1], {start}, {kind})") for start, kind in self._starts()]
        start = code.fresh("start")
        with code.loop(f"for {start} in range(0, {code.size(self.x.shape[self.axis])}, COLUMNS):"):
            column = code.block("column", start, "COLUMNS", self.columns, self.x.shape[self.axis], 1, 2, 1)
            index = self.e.places.unflatten(variable(row), self.others)
            index.insert(self.axis, variable(column))
            joined = self._joined(carries, self._elements(index, column.name))
            for carry, text in zip(carries, joined, strict=True):
                last = f"tl.where(tl.arange(0, COLUMNS)[None, :] == COLUMNS - 1, {text}, 0)"
                code.line(f"{carry} = tl.sum({last}, axis=1, keep_dims=True)")
            self.e.sources[self.node.result] = computed(self._result(joined[-1]), self.node, index, depth=1)
            for k in range(len(self.graph.outputs)):
                self.e.store(k, index, [row, column], TILE)
        return code, Launch((ceildiv(count, self.rows),), {"ROWS": self.rows, "COLUMNS": self.columns}, warps, 2)

    def _starts(self) -> list[tuple[str, str]]:
        """What is carried to the first block: numbers, and their types."""
        name, d = self.node.name, self.kind
        kind = NAMES[self.carried]
        if name in ("cumsum", "cumprod"):
            return [("0" if name == "cumsum" else "1", kind)]
        largest = name not in ("cummin", "argcummin")
        if d.is_float:
            start = number(float("-inf") if largest else float("inf"), d)
        else:
            low = -(1 << (d.bits - 1)) if d.kind == "i" else 0
            start = str(low if largest else low + (1 << d.bits) - 1)
        return [(start, kind), *([("0", "tl.int32")] if name in ARG_SCANS else [])]

    def _elements(self, index: Index, column: str) -> list[str]:
        """A block's elements, all lanes of them; and their places, where those are asked for."""
        x = self.e.wide(self.x, index)
        text = f"tl.full((), {x.text}, {held(x.dtype)})" if x.literal else x.text
        text = text if held(x.dtype) == held(self.kind) else f"{text}.to({NAMES[self.kind]})"
        text = text if x.axes == {0, 1} else f"tl.broadcast_to({text}, {TILE})"
        out = [text if text == x.text else self.code.let("x", text)]
        return [*out, f"tl.broadcast_to({column}, {TILE})"] if self.node.name in ARG_SCANS else out

    def _joined(self, carries: Sequence[str], elements: Sequence[str]) -> list[str]:
        """Running totals of a block behind what is carried, in the type that is carried."""
        code, name = self.code, self.node.name
        if name in ("cumsum", "cumprod"):
            text = code.let("part", f"tl.{name}({elements[0]}, axis=1)")
            wide = text if self.kind == self.carried else f"{text}.to({NAMES[self.carried]})"
            return [code.let("total", f"{carries[0]} {'+' if name == 'cumsum' else '*'} {wide}")]
        join = code.helper(_JOINS[name])
        if name not in ARG_SCANS:
            part = code.let("part", f"tl.associative_scan({elements[0]}, 1, {join})")
            return [code.let("total", f"{join}({carries[0]}, {part})")]
        part, place = code.fresh("part"), code.fresh("place")
        code.line(f"{part}, {place} = tl.associative_scan(({', '.join(elements)}), 1, {join})")
        total, at = code.fresh("total"), code.fresh("at")
        code.line(f"{total}, {at} = {join}({', '.join(carries)}, {part}, {place})")
        return [total, at]

    def _result(self, total: str) -> str:
        """A total as the node's result is held."""
        if self.node.name in ARG_SCANS:
            return self.code.let("y", f"{total}.to(tl.int64)")
        text = cast(total, self.carried, self.x.dtype)
        return text if text == total else self.code.let("y", text)

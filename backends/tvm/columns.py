"""Regions over columns: a softmax over the channels of an image, with what is around it, for a strip of neighbouring columns at a time.

    x: [outer, columns' length, inner]  =>  strips of ``width`` of the inner axis, an element a lane

A pass goes down all columns of a strip, row by row, so that what is read lies side by side. What later passes need again is kept in
scratch rows of the strip's width: rows of an image lie a power of two apart, and would push each other out of the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.forms.shapes import column_axes
from graphopt.backends.forms.support import REDUCTIONS
from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.elementwise import weight_of
from graphopt.backends.tvm.expr import Arguments, Expressions, Source, always
from graphopt.backends.tvm.loops import SMALL, Tuning, linear_index, merge_axes, product
from graphopt.backends.tvm.monoid import Monoid
from graphopt.backends.tvm.reduce import ROWS
from graphopt.backends.tvm.rows import finish, nan_shows_anyway
from graphopt.errors import BuildError
from graphopt.ir import dims, types
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import Trait


class ColumnKernel:
    """Emits one region.

    Args:
        width: columns of a strip, a multiple of the lanes.
    """

    def __init__(self, graph: Graph, tuning: Tuning, width: int) -> None:
        found = column_axes(graph)
        if isinstance(found, str):
            raise BuildError(found)
        self.graph, self.tuning, self.width = graph, tuning, width
        self.full, self.reduced = found
        self.code = Code(graph.symbols)
        self.args = Arguments(self.code, graph)
        self.shape = [self.code.size(d) for d in self.full]
        self.kept: dict[Value, Any] = {}  # values of the full shape, a row of the strip's width for each place of a column
        self.made: dict[Value, Any] = {}  # values of one element a column

    def emit(self) -> Code:
        code = self.code
        lanes = self._merge()
        *outer, inner = [a for a in self.axes if a.members[0] not in self.reduced]
        self.outer, self.down = outer, [a for a in self.axes if a.members[0] in self.reduced]
        sizes = [a.size for a in outer]
        self.length = product(code, [a.size for a in self.down])
        weight = sum(weight_of(n.result) for n in self.graph.nodes() if n.name in REDUCTIONS) + 1
        total = product(code, self.shape)
        small = isinstance(total, int) and total * weight < SMALL
        kind = "serial" if small or not self.tuning.parallel else "parallel"
        width = self.width if lanes > 1 else 1
        if isinstance(inner.size, int):
            width = max(1, min(width, inner.size // lanes * lanes))
        tiles = code.ceildiv(inner.size, width)
        with code.loop(product(code, [*sizes, tiles]), kind, "strip") as strip:
            *at, tile = [code.bind_index(i, "o", n) for i, n in zip(code.unflatten(strip, [*sizes, tiles]), [*sizes, tiles], strict=True)]
            start: Index = code.simplify(tile * width)
            if width > 1 and not (isinstance(inner.size, int) and inner.size % width == 0):  # the last strip overlaps the one before
                start = code.bind_index(code.greatest(code.least(start, inner.size - width), 0), "start")
            if width == 1 or isinstance(inner.size, int):
                self._strip(at, start, width, min(lanes, width))
            else:
                with code.when(i64(inner.size) >= i64(width)):
                    self._strip(at, start, width, lanes)
                with code.when(i64(inner.size) < i64(width)), code.loop(code.least(inner.size, width), "serial", "j") as j:
                    self._strip(at, j, 1, 1)
        return code

    def _merge(self) -> int:
        """Find the loops; returns the lanes."""
        lanes = self.tuning.lanes
        reads = [n.operands[0] for n in self.graph.nodes() if n.name in REDUCTIONS]
        below = {n.result: always(self._nothing(n)) for n in self.graph.nodes() if n.name in REDUCTIONS}
        scalar_only = False

        def touched(index: Sequence[Index]) -> list[Any]:
            nonlocal scalar_only
            found: list[Any] = []
            for v in dict.fromkeys([*reads, *self.graph.outputs]):
                probe = Expressions(self.args, dict(below), probe=True)
                probe.at(v, self._of(v, index))
                scalar_only = scalar_only or probe.scalar_only
                found += [*(at for _, at in probe.reads), *probe.conditions]
            return [*found, *(self.args.place(k, self._of(v, index)) for k, v in enumerate(self.graph.outputs))]

        last = max(self.reduced)
        groups = [1 if k in self.reduced else 2 * int(k > last) for k in range(len(self.shape))]
        self.axes = merge_axes(self.code, self.shape, touched, groups)
        if not self.axes or self.axes[-1].members[0] <= last:
            raise BuildError("no columns side by side")
        return 1 if scalar_only else lanes

    def _nothing(self, node: Node) -> Any:
        """In a reduction's place, while nothing is computed."""
        return tirx.const(True, "bool") if node.result.dtype.is_bool else tirx.const(1, scalar.COMPUTE[node.result.dtype])

    def _of(self, v: Value, index: Sequence[Index]) -> list[Index]:
        """A value's index, of the full shape or of one element a column, from that of the full shape."""
        return [0 if isinstance(d, int) and d == 1 else i for i, d in zip(index, v.shape, strict=True)]

    # --- one strip ----------------------------------------------------------------------------------------------------------

    def _strip(self, outer: Sequence[Index], start: Index, width: int, lanes: int) -> None:
        code = self.code
        self.at, self.start, self.lanes, self.strip = list(outer), start, lanes, width
        self.kept, self.made = {}, {}
        again = self._needed_again()
        for node in self.graph.nodes():
            if node.name in REDUCTIONS:
                self._reduce(node, again)
            elif self._is_statistic(node):
                self._statistic(node.result)
        full = [(k, v) for k, v in enumerate(self.graph.outputs) if dims.same_shape(v.shape, self.full)]

        def write(c: Index | None, l: Index, which: Sequence[tuple[int, Value]]) -> None:
            for k, v in which:
                self.args.store(k, self._index(v, c, l), self._value(v, c, l))

        with code.loop(self.length, "serial", "c") as c:
            self._across(lambda l: write(c, l, full))
        self._across(lambda l: write(None, l, [(k, v) for k, v in enumerate(self.graph.outputs) if (k, v) not in full]))

    def _statistic(self, v: Value) -> None:
        """Compute a value of one element a column."""
        held = self._buffer(1, v, "made")
        self._across(lambda l: self.code.store(held, l, self._hold(v, self._value(v, None, l))))
        self.made[v] = held

    def _needed_again(self) -> list[Value]:
        """Operands of reductions that later passes read again: they are computed once, and kept."""
        reads = [n.operands[0] for n in self.graph.nodes() if n.name in REDUCTIONS]
        return [v for v in dict.fromkeys(reads) if len(v.users) > 1 or v.uses[0][0] is self.graph.ret]

    def _is_statistic(self, node: Node) -> bool:
        """Whether a node makes one element a column of others, to be read by whole columns."""
        one = node.op.has(Trait.POINTWISE) and not dims.same_shape(node.result.shape, self.full)
        return one and node.result.type.rank == len(self.full) and any(v in self.made for v in node.operands)

    def _buffer(self, rows: Index, v: Value, name: str) -> Any:
        return self.code.alloc(self.code.simplify(rows * self.strip), "uint8" if v.dtype.is_bool else scalar.COMPUTE[v.dtype], name)

    def _hold(self, v: Value, value: Any) -> Any:
        return value.astype("uint8") if v.dtype.is_bool else value

    def _across(self, body: Callable[[Index], None]) -> None:
        """``body(lane)`` for all columns of the strip."""
        with self.code.loop(self.strip // self.lanes, "serial", "w") as w:
            if self.lanes == 1:
                return body(w)
            with self.code.loop(self.lanes, "vectorized", "v") as v:
                return body(self.code.simplify(w * self.lanes + v))

    def _index(self, v: Value, c: Index | None, l: Index) -> list[Index]:
        """A value's index at place ``c`` of column ``l`` of the strip."""
        code = self.code
        down = code.unflatten(0 if c is None else c, [a.size for a in self.down])
        beside = [*self.at, code.simplify(self.start + l)]
        at = {id(a): i for a, i in zip((a for a in self.axes if a not in self.down), beside, strict=True)}
        at |= {id(a): i for a, i in zip(self.down, down, strict=True)}
        return self._of(v, linear_index(self.axes, [at[id(a)] for a in self.axes], len(self.shape)))

    def _value(self, v: Value, c: Index | None, l: Index) -> Any:
        return Expressions(self.args, dict(self._sources(c, l))).at(v, self._index(v, c, l))

    def _sources(self, c: Index | None, l: Index) -> Mapping[Value, Source]:
        code = self.code

        def held(buffer: Any, v: Value, at: Index) -> Source:
            return lambda _: scalar.load(code.load(buffer, at), types.b1) if v.dtype.is_bool else code.load(buffer, at)

        found = {v: held(buffer, v, l) for v, buffer in self.made.items()}
        if c is not None:
            found |= {v: held(buffer, v, code.simplify(c * self.strip + l)) for v, buffer in self.kept.items()}
        return found

    def _reduce(self, node: Node, again: Sequence[Value]) -> None:
        """One pass down the columns; the operand is kept, if a later pass reads it."""
        code, x = self.code, node.operands[0]
        m = Monoid.of(node.name, x.dtype, nan_matters=not nan_shows_anyway(node))
        keep = self._buffer(self.length, x, "kept") if x in again and x not in self.kept else None
        acc = code.alloc(self.strip, m.held, "acc")
        long = m.total != m.held and not (isinstance(self.length, int) and self.length <= ROWS)
        total = code.alloc(self.strip, m.total, "total") if long else acc

        def fill(buffer: Any, dtype: str) -> None:
            start = tirx.const(int(m.start) if "int" in dtype else float(m.start), dtype)
            self._across(lambda l: code.store(buffer, l, start))

        def one(c: Index, l: Index) -> None:
            value = self._value(x, c, l)
            if keep is not None:
                code.store(keep, code.simplify(c * self.strip + l), self._hold(x, value))
            if m.held == "uint8" and x.dtype != types.u8:
                value = scalar.cast(value, x.dtype, types.b1).astype("uint8")
            code.store(acc, l, m.join(code.load(acc, l), value))

        fill(acc, m.held)
        if not long:
            with code.loop(self.length, "serial", "c") as c:
                self._across(lambda l: one(c, l))
        else:
            fill(total, m.total)
            with code.loop(code.ceildiv(self.length, ROWS), "serial", "block") as block:
                first = code.simplify(block * ROWS)
                with code.loop(code.bind_index(code.least(self.length - first, ROWS)), "serial", "c") as k:
                    self._across(lambda l: one(code.simplify(first + k), l))
                self._across(lambda l: code.store(total, l, m.join(code.load(total, l), code.load(acc, l).astype(m.total))))
                fill(acc, m.held)
        result = self._buffer(1, node.result, "made")
        self._across(lambda l: code.store(result, l, self._hold(node.result, finish(code, node, code.load(total, l), self.length))))
        self.made[node.result] = result
        if keep is not None:
            self.kept[x] = keep

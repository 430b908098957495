"""Products of few rows with a factor that is contiguous along the summed axis: vectors run along that axis.

A matrix times a vector reads the matrix once, in the order in which it lies in memory: a weight ``[N, K]`` needs no packed copy, and
one that several matrices lie side by side in (``concat`` of their columns) is read where each of them lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from tvm import tirx

from graphopt.backends.forms.support import materialized
from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.bf16rows import rows_of_bf16
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.dotsform import parts, sums_of
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Arguments, Expressions
from graphopt.backends.tvm.imported import dot, import_dots
from graphopt.backends.tvm.loops import SMALL, product, vector_loop
from graphopt.backends.tvm.monoid import Monoid, combine
from graphopt.backends.tvm.panel import Factor
from graphopt.backends.tvm.product import operand_index
from graphopt.backends.tvm.tilestore import LINE, TileStore
from graphopt.ir.graph import Graph, Value

Lead = Sequence[Index]
_Body = Callable[[int, Index, Index, int, "bool | None"], None]  # part, its first column in the product, column of it, columns, inside


class DotsKernel:
    """Emits a region with one matmul of few rows, or several of one left factor, and a pointwise epilogue of the product's shape.

    Args:
        columns: of a task.
        side: columns whose sums run side by side. Where they leave registers free, a sum is several vectors, each of its own terms.
        pieces: of the depth, at most, where columns are too few for all cores; their sums are joined at the end.
        ahead: bytes of a column that are asked for before they are needed; 0 leaves it to the hardware.
        pairs: factors of bf16, multiplied by the instruction that adds the products of a pair to a sum.
    """

    def __init__(self, graph: Graph, lanes: int, columns: int, side: int, pieces: int, ahead: int, parallel: bool,
                 pairs: bool = False) -> None:  # fmt: skip
        self.lanes, self.columns, self.side, self.ahead, self.parallel = lanes, columns, side, ahead, parallel
        self.code = Code(graph.symbols)
        self.args = Arguments(self.code, graph)
        nodes = materialized(graph)
        self.left, self.dtype, self.held = nodes[0].operands[0], nodes[0].result.dtype, scalar.COMPUTE[nodes[0].result.dtype]
        *self.batch, _, self.n = [self.code.size(d) for d in nodes[0].result.shape]
        self.m, self.k = int(nodes[0].result.shape[-2]), int(self.left.shape[-1])
        self.factors = [[self._factor(v) for v in parts(n.operands[1])] for n in nodes]
        left = Probe(self.args, {}, self.left)
        left([0] * self.left.type.rank)
        if not pairs and (left.scalar_only or any(f.scalar_only for factors in self.factors for f in factors)):
            self.lanes = 1
        self.pairs = pairs
        self.terms = 2 * lanes if pairs else self.lanes  # that a vector of a sum takes at once
        self.ends = TileStore(self.code, self.args, graph, tuple(n.result for n in nodes), self.m, columns, min(lanes, columns))
        self.chunk = -(-self.k // (pieces * self.terms)) * self.terms
        self.pieces = -(-self.k // self.chunk)

    def _factor(self, v: Value) -> Factor:
        return Factor(self.args, v, self.columns, clamp=not isinstance(self.n, int))

    def emit(self) -> Code:
        code = self.code
        sizes = [code.size(f.value.shape[-1]) for f in self.factors[0]]
        tasks = [code.ceildiv(n, self.columns) for n in sizes]
        count = tasks[0] if len(tasks) == 1 else sum(n for n in tasks if isinstance(n, int))
        blocks = [*self.batch, count]
        if self.pairs:
            import_dots(code)
            self.rows = rows_of_bf16(self.args, self.left, self.k, self.m, self.parallel)
        if self.pieces > 1:
            return self._by_pieces(blocks, sizes, tasks)
        work, steps = product(code, [*self.batch, self.m, self.n, self.k]), product(code, blocks)
        serial = not self.parallel or (isinstance(work, int) and work < 4 * SMALL) or (isinstance(steps, int) and steps == 1)
        with code.loop(steps, "serial" if serial else "parallel", "task") as task:
            *lead, panel = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(task, blocks), blocks, strict=True)]

            def whole(part: int, start: Index, column: Index, width: int, inside: bool | None) -> None:
                sums = [self._sum(f[part], lead, column, width, 0, self.k) for f in self.factors]
                self.ends.write(lead, 0, code.simplify(column + start), sums, width, inside)

            self._each_panel(panel, sizes, tasks, whole)
        return code

    def _by_pieces(self, blocks: Sequence[Index], sizes: Sequence[Index], tasks: Sequence[Index]) -> Code:
        """A task sums a piece of the depth of a panel; then the pieces' sums are added."""
        code, room, last = self.code, self.m * self.columns, self.k - (self.pieces - 1) * self.chunk
        steps = product(code, blocks)
        pieces = [code.alloc(code.simplify(steps * (self.pieces * room)), self.held, "pieces") for _ in self.factors]
        with code.loop(code.simplify(steps * self.pieces), "parallel", "task") as task:
            within = [*blocks, self.pieces]
            *lead, panel, piece = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(task, within), within, strict=True)]

            def some(part: int, start: Index, column: Index, width: int, inside: bool | None) -> None:
                for f, sums in zip(self.factors, pieces, strict=True):
                    for length in dict.fromkeys((self.chunk, last)):
                        ends = i64(piece) == self.pieces - 1
                        with code.when(ends if length == last else tirx.Not(ends)) if last != self.chunk else nullcontext():
                            found = self._sum(f[part], lead, column, width, code.simplify(piece * self.chunk), length)

                            def keep(q: Index, found: Any = found, sums: Any = sums) -> None:
                                code.store(sums, code.simplify(task * room + q), code.load(found, q))

                            self._across(width, keep)

            self._each_panel(panel, sizes, tasks, some)
        joined = product(code, [steps, self.pieces * room])
        with code.loop(steps, "serial" if isinstance(joined, int) and joined < 4 * SMALL else "parallel", "panel") as step:
            *lead, panel = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(step, blocks), blocks, strict=True)]

            def join(part: int, start: Index, column: Index, width: int, inside: bool | None) -> None:
                totals = [code.alloc(room, self.held, "total") for _ in pieces]
                for total, sums in zip(totals, pieces, strict=True):
                    for p in range(self.pieces):
                        base = code.simplify((step * self.pieces + p) * room)

                        def add(q: Index, p: int = p, base: Index = base, total: Any = total, sums: Any = sums) -> None:
                            more = code.load(sums, code.simplify(base + q))
                            code.store(total, q, code.load(total, q) + more if p else more)

                        self._across(width, add)
                self.ends.write(lead, 0, code.simplify(column + start), totals, width, inside)

            self._each_panel(panel, sizes, tasks, join)
        return code

    def _across(self, width: int, body: Callable[[Index], None]) -> None:
        """``body(place)`` for all elements of a panel of so many columns, a vector at a time."""
        vector_loop(self.code, 0, self.m * width, self.lanes, body, overlap=False)

    def _each_panel(self, panel: Index, sizes: Sequence[Index], tasks: Sequence[Index], body: _Body) -> None:
        """``body`` of the part that a panel is of: of parts of so many columns, each divided into so many tasks."""
        code = self.code
        if len(sizes) == 1:
            return self._panel(panel, sizes[0], partial(body, 0, 0))
        first = start = 0
        for part, (size, here) in enumerate(zip(sizes, tasks, strict=True)):
            assert isinstance(size, int) and isinstance(here, int), "parts are of known size"
            with code.when(tirx.And(i64(panel) >= first, i64(panel) < first + here)):
                self._panel(code.simplify(panel - first), size, partial(body, part, start))
            first, start = first + here, start + size
        return None

    def _panel(self, panel: Index, size: Index, body: Callable[[Index, int, bool | None], None]) -> None:
        """``body(first column, columns, whether all of them are inside)`` for a panel of a part, whose last one may be narrower."""
        code, column = self.code, self.code.simplify(panel * self.columns)
        rest = size % self.columns if isinstance(size, int) else 0
        if rest == 0:
            return body(column, self.columns, True if isinstance(size, int) else None)
        if isinstance(size, int) and size < self.columns:
            return body(column, rest, False)
        full = i64(code.simplify(column + self.columns)) <= i64(size)
        with code.when(full):
            body(column, self.columns, True)
        with code.when(tirx.Not(full)):
            body(column, rest, False)
        return None

    def _sum(self, factor: Factor, lead: Lead, column: Index, width: int, begin: Index, length: int) -> Any:
        """So many terms of the dot products of all rows with columns of a factor; returns a buffer with the sums, ``[rows, width]``."""
        code = self.code
        tile = code.alloc(self.m * width, self.held, "tile")
        side = min(self.side, width)

        def some(first: Index, count: int) -> None:
            columns = [code.bind_index(code.simplify(column + (first + c)), "j") for c in range(count)]
            places = [code.simplify(first + i * width + c) for i in range(self.m) for c in range(count)]
            self._together(tile, places, factor, lead, columns, begin, length)

        if side == width:
            some(0, width)
            return tile
        with code.loop(width // side, "serial", "side") as s:
            some(code.simplify(s * side), side)
        if width % side:
            some(width - width % side, width % side)
        return tile

    def _together(self, tile: Any, places: Sequence[Index], factor: Factor, lead: Lead, columns: Sequence[Index], begin: Index,
                  length: int) -> None:  # fmt: skip
        """The sums of some columns side by side; their places in the tile are given row by row."""
        code, lanes, terms = self.code, self.lanes, self.terms
        whole = length // terms
        chains = max(1, min(sums_of(self.m, len(columns)), whole))
        cells = [(i, j) for i in range(self.m) for j in columns]
        sums = [code.alloc(chains * lanes, self.held, "acc") for _ in cells]
        for acc in sums:
            for q in range(chains):
                with code.loop(lanes, "vectorized", "v") as v:
                    code.store(acc, code.simplify(q * lanes + v), tirx.const(0, self.held))

        def left(i: int, k: Index) -> Any:
            if self.pairs:
                return scalar.load(self.rows.buffer[i64(self._left_place(lead, i, k))], self.left.dtype)
            return Expressions(self.args, {}).at(self.left, operand_index(lead, self.left, i, k))

        def add(step: Index, chain: int) -> None:
            """A vector of terms of each sum."""
            first = code.simplify(begin + step * terms)
            if self.ahead and chain * terms * factor.value.dtype.itemsize % LINE == 0:
                for j in columns:
                    self._ask(factor, lead, first, j)
            for (i, j), acc in zip(cells, sums, strict=True):
                if self.pairs:
                    self._add_pairs(acc, chain * lanes, lead, i, factor, j, first)
                    continue
                with code.loop(lanes, "vectorized", "v") as v:
                    k, place = code.simplify(first + v), code.simplify(chain * lanes + v)
                    code.store(acc, place, code.load(acc, place) + left(i, k) * factor.at(lead, k, j))

        with code.loop(whole // chains, "serial", "k") as k:
            for q in range(chains):
                add(code.simplify(k * chains + q), q)
        for q in range(whole % chains):
            add(whole - whole % chains + q, q)
        joining = Monoid.of("sum", self.dtype)
        for place, acc in zip(places, sums, strict=True):
            code.store(tile, place, combine(code, acc, chains * lanes, lanes, joining))
        if length % terms:
            with code.loop(length % terms, "serial", "k") as k:
                at = code.simplify(begin + (whole * terms + k))
                for (i, j), place in zip(cells, places, strict=True):
                    code.store(tile, place, code.load(tile, place) + left(i, at) * factor.at(lead, at, j))

    def _add_pairs(self, acc: Any, place: int, lead: Lead, i: int, factor: Factor, j: Index, k: Index) -> None:
        """Add the products of pairs from term k on to a vector of a sum."""
        code = self.code
        source, at = self._place(factor, lead, k, j)
        places = (self.rows.buffer, self._left_place(lead, i, k)), (self.args.inputs[source], at)
        x, w = (code.bind(buffer[tirx.Ramp(i64(place), i64(1), self.terms)], "w", hidden=False) for buffer, place in places)
        where = [tirx.Ramp(i64(place), i64(1), self.lanes)]
        code.emit(tirx.BufferStore(acc, dot(acc[where[0]], x, w), where))

    def _ask(self, factor: Factor, lead: Lead, k: Index, j: Index) -> None:
        """Ask for what lies so far behind an element of a factor."""
        source, at = self._place(factor, lead, k, j)
        self.code.prefetch(self.args.inputs[source], self.code.simplify(at + self.ahead // source.dtype.itemsize))

    def _left_place(self, lead: Lead, i: int, k: Index) -> Index:
        """Where element (i, k) of the left factor lies among its rows; it may have fewer leading axes than the product, or of size 1."""
        code, rows = self.code, self.rows
        *index, at = operand_index(lead, self.left, i, k)
        row = code.flatten(index, [code.size(d) for d in self.left.shape[:-1]])
        return code.simplify(rows.base + row * rows.step + at)

    def _place(self, factor: Factor, lead: Lead, k: Index, j: Index) -> tuple[Value, Index]:
        """The matrix that an element of a factor is made of, and the element's position there."""
        probe = Expressions(self.args, {}, probe=True)
        probe.at(factor.value, operand_index(lead, factor.value, k, self.code.least(j, factor.columns - 1) if factor.clamp else j))
        return next(read for read in probe.reads if read[0].type.numel != 1)

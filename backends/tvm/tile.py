"""Matrix products by register tiles: mr rows by nr columns are summed in registers over the whole depth.

Rows that do not fill a tile are a lower tile of their own where that saves enough; else they are computed on clamped indices and not
stored. Columns that do not fill one are a narrower tile, whose last vector reaches back over columns of the one before: it ends with the
last column, so all vectors are read and stored whole. The second factor may be packed (``[ceil(N / nr), K, nr]`` behind the views that
the packing pass writes): the expression layer reduces those views to one contiguous address, so packed and plain factors are read by
the same code. A long sum is taken in blocks, whose sums are added up in scratch memory; the last block's are added to them in registers,
and stored from there if the epilogue is light.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tvm import tirx

from graphopt.backends.forms.support import materialized
from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.expr import Arguments, Expressions
from graphopt.backends.tvm.loops import SMALL, product
from graphopt.backends.tvm.panel import Factor
from graphopt.backends.tvm.product import operand_index
from graphopt.backends.tvm.quantform import quantized
from graphopt.backends.tvm.tileform import BLOCK, tail_rows
from graphopt.backends.tvm.tilestore import LINE, TileStore
from graphopt.ir.graph import Graph, Node, Value

_Ask = Callable[[Index, int, int], None]  # before a vector of a panel is read: the first of some steps, which of them, its first column


@dataclass(frozen=True)
class Product:
    """One of the products of a region.

    Attributes:
        copied: whether its second factor's columns are copied into scratch.
    """

    result: Value
    factor: Factor
    copied: bool


class TileKernel:
    """Emits a region with one matmul, or two of one left factor, and a pointwise epilogue of the product's shape.

    Two products are summed one after the other, a tile of each; the left factor's rows are still near for the second.

    Args:
        rows, columns: the tile; columns are a multiple of lanes, or fewer than lanes.
        unroll: steps of the summed axis that are unrolled.
        group: row tiles that a parallel step takes, with one panel of the second factor (copied once for them, where it must be).
        prefetch: while a packed panel is used, bring the next one into the second-level cache, a part with every row tile; ``blocked``, the
            next block.
        ahead: bytes of a packed panel, and of the next one, that are asked for before they are needed; 0 leaves it to the hardware.
        block: terms that are summed before the sum is added to the total.
        blocked: sum a block of all row tiles of a step before the next block, so that a block of a panel stays in a near
            cache; otherwise a row tile is summed to its end.
        rows_first: threads divide the rows first, not the panels.
        copied: copy also panels of a factor whose columns lie side by side, but with other columns between its rows.
    """

    def __init__(self, graph: Graph, lanes: int, rows: int, columns: int, unroll: int, group: int, prefetch: bool,
                 parallel: bool, block: int = BLOCK, blocked: bool = False, rows_first: bool = False, ahead: int = 0,
                 copied: bool = False) -> None:  # fmt: skip
        self.graph, self.mr, self.nr, self.unroll, self.prefetch, self.parallel = graph, rows, columns, unroll, prefetch, parallel
        self.block, self.blocked, self.rows_first, self.ahead, self.copied = block, blocked, rows_first, ahead, copied
        self.lanes = min(lanes, columns)
        nodes = materialized(graph)
        self.code = Code(graph.symbols)
        self.args = Arguments(self.code, graph)
        self.result, self.left = nodes[0].result, nodes[0].operands[0]
        *batch, self.m, self.n = [self.code.size(d) for d in self.result.shape]
        self.batch = batch
        self.k = self.code.size(self.left.shape[-1])
        self.held = scalar.COMPUTE[self.result.dtype]
        self.products = [self._product(n) for n in nodes]
        self.group = group
        self.width = columns  # of a tile; panels are ``nr`` wide all the same
        self.ends = TileStore(self.code, self.args, graph, tuple(p.result for p in self.products), rows, columns, self.lanes)
        self.inside = True if isinstance(self.n, int) and self.n % columns == 0 else None  # whether all its columns are; None: not known
        self.tail = 0  # rows of a last tile of its own
        self.back = 0  # columns by which the last vector of a tile reaches back
        if self._reaches_back():
            for p in self.products:
                p.factor.clamp = False

    def _product(self, node: Node) -> Product:
        ragged = not (isinstance(self.n, int) and self.n % self.nr == 0)
        b = node.operands[1]
        factor = Factor(self.args, b, self.nr, clamp=ragged and not self._packed_width(b))
        return Product(node.result, factor, self.copied or factor.unit != "column" or factor.scalar_only)

    def emit(self) -> Code:
        code = self.code
        tiles = code.ceildiv(self.m, self.mr)
        self.tail = tail_rows(self.m, self.mr)
        if self.tail:
            self.ends = replace(self.ends, fits=True)
        sizes = [code.ceildiv(self.n, self.nr), code.ceildiv(tiles, self.group)]
        blocks = [*self.batch, *(sizes[::-1] if self.rows_first else sizes)]
        work = product(code, [*self.batch, self.m, self.n, self.k])
        steps = product(code, blocks)
        serial = not self.parallel or (isinstance(work, int) and work < 4 * SMALL) or (isinstance(steps, int) and steps == 1)
        with code.loop(steps, "serial" if serial else "parallel", "tile") as tile:
            *lead, jo, go = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(tile, blocks), blocks, strict=True)]
            if self.rows_first:
                jo, go = go, jo
            column = code.simplify(jo * self.nr)
            first = code.simplify(go * self.group)
            self._each_panel(column, lambda kernel: kernel._step(lead, column, first, tiles))
        return code

    def _each_panel(self, column: Index, body: Callable[[TileKernel], None]) -> None:
        """``body`` with the kernel of the panel from a column on: the last one may have one of its own."""
        code, last = self.code, self._last()
        if last is None:
            return body(self)
        if isinstance(self.n, int) and self.n < self.nr:
            return body(last)
        whole = copy.copy(self)
        whole.inside = True
        full = i64(code.simplify(column + self.nr)) <= i64(self.n)
        with code.when(full):
            body(whole)
        with code.when(tirx.Not(full)):
            body(last)
        return None

    def _last(self) -> TileKernel | None:
        """The kernel of the last panel, where that has vectors of no column at all: it leaves them out."""
        if self.inside or not isinstance(self.n, int):
            return None
        rest = self.n % self.nr
        last = copy.copy(self)
        last.width = -(-rest // self.lanes) * self.lanes
        if self._reaches_back():
            last.back, last.inside = last.width - rest, True
            return last
        if self.n < self.nr or last.width == self.nr or not all(self._padded()) or any(p.copied for p in self.products):
            return None
        last.inside = self.n % self.lanes == 0
        return last

    def _reaches_back(self) -> bool:
        """Whether the last panel's last vector ends with the last column: of factors without columns beyond it, which could be read."""
        enough = isinstance(self.n, int) and self.lanes <= self.n and self.n % self.nr != 0
        return enough and not any(self._padded())

    def _padded(self) -> list[bool]:
        """Of each product, whether its second factor has columns beyond the last."""
        return [self._packed_width(p.result.producer.operands[1]) > 0 for p in self.products if p.result.producer is not None]

    def _copied(self, p: Product, lead: Sequence[Index], column: Index, begin: Index = 0, depth: Index | None = None) -> Any:
        """A copy of a panel's columns, as many as a tile has; None where it is read in place."""
        if not p.copied:
            return None
        return p.factor.copy(lead, column, self.lanes, self.held, begin, depth, self.width, self.back)

    def _step(self, lead: Sequence[Index], column: Index, first: Index, tiles: Index) -> None:
        """Row tiles from ``first`` on with the panel of ``column``."""
        code = self.code
        if self.blocked:
            self._by_blocks(lead, column, first, tiles)
            return
        panels = [self._copied(p, lead, column) for p in self.products]
        totals = [code.alloc(self.mr * self.width, self.held, "total") for _ in self.products]

        def tile(kernel: TileKernel, io: Index) -> None:
            tile_row = code.simplify(first + io)
            row = code.simplify(tile_row * self.mr)
            acc = list[Any]()
            for p, panel, total in zip(self.products, panels, totals, strict=True):
                ahead = self._fetch(p.factor, lead, column, tile_row, tiles, 0, self.k)
                acc, span = kernel._tile_sum(p, lead, kernel._rows(row), column, panel, ahead)
                kernel._each_block(partial(kernel._add_block, acc, span, total, 0))
            kernel._end(lead, row, column, acc, totals)

        self._each_tile(first, tiles, tile)

    def _each_tile(self, first: Index, tiles: Index, body: Callable[[TileKernel, Index], None]) -> None:
        """``body(kernel of the tile, tile)`` for the row tiles of a step: whole ones, and the last one, which may have fewer rows."""
        code = self.code
        if not self.tail:
            with code.loop(self._here(first, tiles), "serial", "io") as io:
                body(self, io)
            return
        short = copy.copy(self)
        short.mr, short.ends = self.tail, replace(self.ends, rows=self.tail)
        whole = code.least(code.simplify(tiles - 1 - first), self.group)
        with code.loop(whole if isinstance(whole, int) else code.bind_index(whole, "whole"), "serial", "io") as io:
            body(self, io)
        with code.when(i64(code.simplify(first + self.group)) >= i64(tiles)):
            body(short, code.simplify(tiles - 1 - first))

    def _here(self, first: Index, tiles: Index) -> Index:
        """Row tiles of a step."""
        code, even = self.code, isinstance(tiles, int) and tiles % self.group == 0
        return self.group if even else code.bind_index(code.least(tiles - first, self.group))

    def _by_blocks(self, lead: Sequence[Index], column: Index, first: Index, tiles: Index) -> None:
        """All row tiles of a step, a block of the summed axis at a time; with the last one they are stored. Panels are copied by blocks."""
        code, size, here = self.code, self.mr * self.width, self._here(first, tiles)
        totals = [code.alloc(self.group * size, self.held, "total") for _ in self.products]

        def all_tiles(begin: Index, length: Index, is_first: Any, is_last: bool) -> None:
            panels = [self._copied(p, lead, column, begin, length) for p in self.products]

            def tile(kernel: TileKernel, io: Index) -> None:
                row, base = code.simplify((first + io) * self.mr), code.simplify(io * size)
                if is_last:
                    kernel.ends.ask(lead, row, column, self.width - self.back)
                for p, panel, total in zip(self.products, panels, totals, strict=True):
                    ahead = None if p.copied else self._fetch(p.factor, lead, column, io, here, begin, length)
                    acc, span = kernel._tile_sum(p, lead, kernel._rows(row), column, panel, ahead, begin)
                    kernel._add_block(acc, span, total, base, begin, length, is_first, is_last)
                if is_last:
                    kernel._end(lead, row, column, acc, totals, base)

            self._each_tile(first, tiles, tile)

        self._each_block(all_tiles)

    def _each_block(self, body: Callable[[Index, Index, Any, bool], None]) -> None:
        """``body(begin, length, is_first, is_last)`` for all blocks of the summed axis but the last, in a loop, and for the last.

        In blocks, the rounding error of a long sum stays that of a library's.
        """
        code = self.code
        before = code.simplify(code.ceildiv(self.k, self.block) - 1)
        if not isinstance(before, int):
            before = code.bind_index(code.greatest(before, 0), "before")
        elif before < 0:
            before = 0
        if before != 0:
            with code.loop(before, "serial", "block") as block:
                body(code.simplify(block * self.block), self.block, i64(block) == 0 if before != 1 else True, False)
        begin = code.simplify(before * self.block)
        rest = code.simplify(self.k - begin)
        body(begin, rest if isinstance(rest, int) else code.bind_index(rest, "rest"), before == 0 if isinstance(before, int) else
             i64(before) == 0, True)  # fmt: skip

    def _add_block(self, acc: Sequence[Any], span: Callable[[Index, Index], None], total: Any, base: Index, begin: Index, length: Index,
                   is_first: Any, is_last: bool) -> None:  # fmt: skip
        """Sum a block and add what was summed before: into ``total``, but with the last block into the accumulators, if they are stored."""
        code, stays = self.code, is_last and self.from_registers
        self._everywhere(acc, lambda sums, at, _: code.store(sums, at, tirx.const(0, self.held)))
        span(begin, length)

        def put(sums: Any, at: Index, q: Index) -> None:
            code.store(total, code.simplify(base + q), code.load(sums, at))

        def add(sums: Any, at: Index, q: Index) -> None:
            place = code.simplify(base + q)
            both = code.load(total, place) + code.load(sums, at)
            if stays:
                code.store(sums, at, both)
            else:
                code.store(total, place, both)

        if not isinstance(is_first, bool):
            with code.when(tirx.Not(is_first)):
                self._everywhere(acc, add)
            if not stays:
                with code.when(is_first):
                    self._everywhere(acc, put)
        elif not is_first:
            self._everywhere(acc, add)
        elif not stays:
            self._everywhere(acc, put)

    @property
    def from_registers(self) -> bool:
        """Whether a tile goes through the epilogue as it stands in the accumulators, without a way through memory."""
        return self.inside is True and self.ends.is_light

    def _end(self, lead: Sequence[Index], row: Index, column: Index, acc: Sequence[Any], totals: Sequence[Any], base: Index = 0) -> None:
        """Store a tile: its accumulators, or its totals."""
        if self.from_registers:
            self.ends.write_registers(lead, row, column, acc, self.width, self.back)
        else:
            self._store(lead, row, column, totals, base)

    def _store(self, lead: Sequence[Index], row: Index, column: Index, sums: Sequence[Any], base: Index = 0) -> None:
        self.ends.write(lead, row, column, sums, self.width, self.inside, base, self.back)

    def _clamped(self, i: Index, size: Index, tile: int) -> Index:
        """An index that is surely inside, unless tiles fit the size."""
        if isinstance(size, int) and size % tile == 0:
            return i
        return self.code.least(i, size - 1)

    def _fetch(self, factor: Factor, lead: Sequence[Index], column: Index, tile: Index, tiles: Index, begin: Index,
               length: Index) -> _Ask | None:  # fmt: skip
        """What to do before a vector is read to bring nearer what will be; None if nothing, or if panels are not contiguous.

        It is given the first of ``unroll`` steps of the summed axis, which of them it is, and the first column of the vector: what is asked
        for evenly comes sooner than what is asked for in bursts.

        The hardware follows a panel that it has seen begin, but too late: a panel is read from memory while its first row
        tile waits for it. Each row tile asks for an equal part of what follows the rows that are used (``prefetch``). Of panels that
        are used but once, it does not run far enough before the reader, and stops at each page: what lies ``ahead`` is asked for.
        """
        code = self.code
        here = factor.panel_start(lead, column) if self.prefetch or self.ahead else None
        if here is None:
            return None
        buffer, start = here
        size = factor.value.dtype.itemsize
        line = LINE // size
        if self.ahead:

            def near(k: Index, q: int, u: int) -> None:
                if (q * self.nr + u) % line < self.lanes:  # the first vector of a line, or the first that reaches into it
                    code.prefetch(buffer, code.simplify(start + (k + q) * self.nr + (u + self.ahead // size)))

            return near
        sharers = tiles if isinstance(tiles, int) else self.group if self.blocked else self.nr * self.unroll
        lines = -(-self.nr * self.unroll // (line * sharers))
        part = code.simplify(code.ceildiv(length, self.unroll) * (lines * line))
        first = code.bind_index(code.simplify(start + (begin + length) * self.nr + tile * part), "ahead")

        def later(k: Index, q: int, u: int) -> None:
            for i in range(lines if q == u == 0 else 0):
                code.prefetch(buffer, code.simplify(first + (code.div(k - begin, self.unroll) * lines + i) * line))

        return later

    def _rows(self, row: Index) -> list[Index]:
        """The rows of a tile, all of them inside."""
        code = self.code
        rows = [code.simplify(row + i) for i in range(self.mr)]
        return [code.bind_index(r if self.tail else self._clamped(r, self.m, self.mr), "r") for r in rows]

    def _everywhere(self, acc: Sequence[Any], body: Callable[[Any, Index, Index], None]) -> None:
        """``body(row's accumulators, place in them, place in the tile)`` for all vectors of the tile."""
        code = self.code
        for i, sums in enumerate(acc):
            for u in range(0, self.width, self.lanes):
                with code.loop(self.lanes, "vectorized", "v") as v:
                    body(sums, code.simplify(u + v), code.simplify(i * self.width + u + v))

    def _tile_sum(self, p: Product, lead: Sequence[Index], rows: Sequence[Index], column: Index, panel: Any,
                  ahead: _Ask | None, begin: Index = 0) -> tuple[list[Any], Callable[[Index, Index], None]]:  # fmt: skip
        """A tile's accumulators, and ``span(first, length)``, which adds so many terms to them; a copied panel starts at ``begin``."""
        code, a, width = self.code, self.left, self.width
        # a row of accumulators a buffer: small enough to become registers, whatever else the loop does with memory
        acc = [code.alloc(width, self.held, "acc") for _ in rows]
        line = code.alloc(width, self.held, "line")

        def step(base: Index, q: int, asks: bool) -> None:
            k = code.simplify(base + q)
            # the factor's vectors are read first; then a row's element is needed once, by neighbouring instructions, so that
            # accumulators, vectors and one broadcast element fit into the registers
            for u in range(0, width, self.lanes):
                if asks and ahead is not None:
                    ahead(base, q, u)
                with code.loop(self.lanes, "vectorized", "v") as v:
                    at = code.simplify(u + v)
                    if panel is not None:
                        element = code.load(panel, code.simplify((k - begin) * width + at))
                    else:
                        element = p.factor.at(lead, k, code.simplify(column + (u - (self.back if u + self.lanes == width else 0)) + v))
                    code.store(line, at, element)
            for sums, r in zip(acc, rows, strict=True):
                x = code.bind(Expressions(self.args, {}).at(a, operand_index(lead, a, r, k)), "a")
                for u in range(0, width, self.lanes):
                    with code.loop(self.lanes, "vectorized", "v") as v:
                        at = code.simplify(u + v)
                        code.store(sums, at, code.load(sums, at) + x * code.load(line, at))

        def span(first: Index, length: Index) -> None:
            whole = code.div(length, self.unroll)
            if not (isinstance(whole, int) and whole == 0):
                with code.loop(whole, "serial", "k") as k:
                    for q in range(self.unroll):
                        step(code.simplify(first + k * self.unroll), q, True)
            rest = code.mod(length, self.unroll)
            if not (isinstance(rest, int) and rest == 0):
                with code.loop(rest, "serial", "k") as k:
                    step(code.simplify(first + whole * self.unroll + k), 0, False)

        return acc, span

    def _packed_width(self, b: Value) -> int:
        """Whether columns beyond the last are there to be read: the second factor is a slice of padded packed columns."""
        if (form := quantized(b)) is not None:
            return form.width if form.width % self.nr == 0 else 0
        if b.producer is None or b.producer.name != "slice":
            return 0
        attrs, x = b.producer.attrs, b.producer.operands[0]
        if attrs["axis"] % x.type.rank != x.type.rank - 1 or attrs["start"] != 0 or attrs["step"] != 1:
            return 0
        width = x.shape[-1]
        return width if isinstance(width, int) and width % self.nr == 0 else 0

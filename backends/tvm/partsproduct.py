"""Products of f32 from parts, on AMX tiles: how rows, panels and blocks of the depth go, whatever a number's parts are.

A task takes a group of row tiles by a share of the panels of the weight, 32 columns each. It splits its rows of the first factor into
parts, as much of the depth as its cache holds: reading what another core has split would take longer. Sums of a block of the depth are
added to totals in memory, while the tiles multiply the next one. Where a sum is nan, as infinities have no parts, that row of
the panel is summed again by the vector units, and has what f32 gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from tvm import tirx

from graphopt.backends.forms.support import materialized
from graphopt.backends.tvm import amx
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.expr import Arguments, Expressions
from graphopt.backends.tvm.loops import SMALL, product
from graphopt.backends.tvm.product import operand_index
from graphopt.backends.tvm.rowstore import RowStore
from graphopt.backends.tvm.thirdform import COLUMNS, STEP, TILE
from graphopt.ir.graph import Graph

LANES = 16  # f32 of a vector; columns of a tile
WORDS = TILE * LANES  # of a tile, in words of 32 bits: a pair of numbers of 16 bits each
OUT_LINE = 16  # f32 of a cache line


def vector_at(code: Code, at: Index) -> Any:
    """The place of a vector in a buffer."""
    return tirx.Ramp(i64(code.simplify(at)), i64(1), LANES)


def is_nan(x: Any) -> Any:
    """Which lanes are nan, by their bits: TVM's simplifier takes ``x != x`` for false."""
    bits = tirx.bitwise_and(tirx.reinterpret(f"uint32x{LANES}", x), tirx.Broadcast(tirx.const(0x7FFFFFFF, "uint32"), LANES))
    return tirx.GT(bits, tirx.Broadcast(tirx.const(0x7F800000, "uint32"), LANES))


class PartsProduct(ABC):
    """Emits a region with one matmul of f32, or two of one first factor, and a pointwise epilogue of the product's shape.

    Tiles 0 to 3 hold sums, 4 and 5 parts of the first factor, 6 and 7 of the weight.

    Args:
        tiles: of rows that are multiplied at once, one or two; ``rows`` each.
        others: see the schedules of the templates.
    """

    parts: int  # of a number
    order: tuple[tuple[int, int], ...]  # (part of the first factor, of the weight) of each product, small products first
    multiply = staticmethod(amx.multiply)  # two tiles

    def __init__(self, graph: Graph, block: int, rows: int, tiles: int, group: int, chunk: int, panels: int, ahead: bool,
                 parallel: bool) -> None:  # fmt: skip
        self.graph, self.block, self.mr, self.tiles, self.ahead, self.parallel = graph, block, rows, tiles, ahead, parallel
        self.nodes = materialized(graph)
        self.left = self.nodes[0].operands[0]
        self.code = code = Code(graph.symbols)
        self.args = Arguments(code, graph)
        self.depth = int(self.left.shape[-1])
        self.lead = [code.size(d) for d in self.nodes[0].result.shape[:-1]]
        self.m = code.bind_index(product(code, self.lead), "rows")
        self.n = int(self.nodes[0].result.shape[-1])
        self.panels = -(-self.n // COLUMNS)
        self.side = tiles * rows  # rows that are multiplied at once
        self.places = code.ceildiv(self.m, self.side)
        self.group = min(group, self.places) if isinstance(self.places, int) else group
        self.chunk, self.chunks = chunk, self.depth // (chunk * block)  # blocks of a chunk, chunks of the depth
        self.steps = chunk * block // STEP  # of a chunk
        self.share = min(panels, self.panels)
        self.store = RowStore(code, self.args, graph, [n.result for n in self.nodes], COLUMNS, LANES)
        self.asks = self.ahead and self.store.plain

    def emit(self) -> Code:
        code = self.code
        groups, shares = code.ceildiv(self.places, self.group), -(-self.panels // self.share)
        work = product(code, [self.m, self.n, self.depth])
        steps = product(code, [groups, shares])
        serial = not self.parallel or (isinstance(work, int) and work < 8 * SMALL) or (isinstance(steps, int) and steps == 1)
        with code.loop(steps, "serial" if serial else "parallel", "task") as task:
            go, jo = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(task, [groups, shares]), [groups, shares], strict=True)]
            self._task(go, jo)
        return code

    # --- what differs -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _begin(self, rows: int, first: Index) -> None:
        """Scratch of a task, and what is done before its first chunk; ``first`` is its first panel."""

    @abstractmethod
    def _split_left(self, row: Index, count: Index, chunk: Index) -> None:
        """Split a chunk of the first factor's rows into ``self.split_rows``: ``[row tile, step, part, 16 rows, 16 pairs]``.

        A pair is two elements of a step that are 16 apart: so two vectors become pairs as they are. Rows behind the last hold anything.
        """

    @abstractmethod
    def _run(self, which: int, k: Index, here: Index, panel: Index, block: Index, turn: Index, coming: tuple[int, Index, Index],
             out: tuple[Index, Index] | None) -> None:  # fmt: skip
        """Multiply block ``k`` of a chunk, ``block`` of the depth, of product ``which`` for all row tiles of the task.

        Args:
            here: row tiles, by ``self.tiles``.
            turn: blocks that the task went through before.
            coming: product, panel and block that come next.
            out: row and column of the task's first element of the output, if its lines are to be asked for meanwhile.
        """

    @abstractmethod
    def _weight_tile(self, which: int, w: Index, part: int, c: int) -> tuple[Any, Index]:
        """Buffer and place of a part's tile of 16 columns, of a step whose tiles begin at ``w``."""

    @abstractmethod
    def _add(self, which: int, place: Index, q: Index) -> None:
        """Add a vector of written sums, those of row tiles ``place``, to the totals."""

    @abstractmethod
    def _weight_vector(self, which: int, panel: Index, k: Index, c: int) -> Any:
        """16 columns of row ``k`` of a panel of the weight, as f32."""

    # --- a task -------------------------------------------------------------------------------------------------------------

    def _task(self, go: Index, jo: Index) -> None:
        """A group of row tiles by a share of the panels."""
        code, group = self.code, self.group
        place = code.simplify(go * group)
        even = isinstance(self.places, int) and self.places % group == 0
        here = group if even else code.bind_index(code.least(self.places - place, group), "places")
        first = code.simplify(jo * self.share)
        count = self.share if self.panels % self.share == 0 else code.bind_index(code.least(self.panels - first, self.share), "panels")
        rows = self.side * group
        kept = self.share if self.chunks > 1 else 1  # panels whose totals are kept
        self.split_rows = code.alloc(self.tiles * group * self.steps * self.parts * WORDS, "uint32", "left")
        self.totals = [code.alloc(kept * rows * COLUMNS, "float32", "total") for _ in self.nodes]
        self.acc = code.alloc(self.side * COLUMNS, "float32", "acc")
        self._begin(rows, first)
        row = code.bind_index(code.simplify(place * self.side), "row")
        exact = isinstance(self.m, int) and self.m % rows == 0
        last = rows if exact else code.bind_index(code.least(self.m - row, rows), "count")
        with code.loop(self.chunks, "serial", "chunk") as chunk:
            self._split_left(row, last, chunk)
            with code.loop(count, "serial", "jo") as j:
                panel = code.simplify(first + j)
                self.base = code.simplify(j * (rows * COLUMNS)) if kept > 1 else 0  # of the totals
                for which in range(len(self.nodes)):
                    self._panel(which, chunk, j, count, panel, first, here, row)
                with code.when(tirx.EQ(i64(chunk), i64(self.chunks - 1))) if self.chunks > 1 else nullcontext():
                    for which in range(len(self.nodes)):
                        self._mend(which, row, last, panel)
                    self.store.write(self.totals, self.base, row, last, code.simplify(panel * COLUMNS))
        amx.release(code)

    def _configure(self) -> None:
        """Shapes of the tiles; sums are zero."""
        amx.configure(self.code, {t: self.mr if t < 6 else TILE for t in range(8)})
        for t in range(2 * self.tiles):
            amx.zero(self.code, t)

    def _panel(self, which: int, chunk: Index, j: Index, count: Index, panel: Index, first: Index, here: Index, row: Index) -> None:
        """A chunk of a panel of one of the products: its blocks, each told which one comes next."""
        code, blocks, total = self.code, self.chunk, self.totals[which]
        with code.when(tirx.EQ(i64(chunk), i64(0))) if self.chunks > 1 else nullcontext():
            words = code.simplify(here * (self.side * COLUMNS // LANES))
            with code.loop(words, "serial", "q") as q, code.loop(LANES, "vectorized", "v") as v:
                code.store(total, code.simplify(self.base + q * LANES + v), tirx.const(0.0, "float32"))
        start = code.simplify(chunk * blocks)
        following = (which + 1) % len(self.nodes)

        def run(k: Index, coming: tuple[int, Index, Index], last: bool = False) -> None:
            turn = code.simplify(((chunk * count + j) * len(self.nodes) + which) * blocks + k)
            out = (row, code.simplify(panel * COLUMNS)) if last and self.asks else None
            self._run(which, k, here, panel, code.simplify(start + k), turn, coming, out)

        if blocks > 1:
            with code.loop(blocks - 1, "serial", "k") as k:
                run(k, (which, panel, code.simplify(start + k + 1)))
        # behind a chunk's last block comes the next product, the next panel, or the next chunk; behind all of them nothing: then the
        # last block is taken for the next
        next_panel, next_block = panel, start
        if not following:
            ends = tirx.EQ(i64(j + 1), i64(count))
            again: Index = start
            if self.chunks > 1:
                again = tirx.Select(tirx.EQ(i64(chunk), i64(self.chunks - 1)), i64(start), i64(start + blocks))
            back = first if self.chunks > 1 else panel
            next_panel = code.bind(tirx.Select(ends, i64(back), i64(panel + 1)), "p", hidden=False)
            next_block = code.bind(tirx.Select(ends, i64(again), i64(start)), "b", hidden=False)
        run(blocks - 1, (following, next_panel, next_block), last=not following)
        for t in range(2 * self.tiles):
            self._put(t)
        with code.loop(self.side * COLUMNS // LANES, "serial", "q") as q:
            self._add(which, code.simplify(here - 1), q)

    def _step(self, which: int, x: Index, w: Index, begin: Callable[[int], None] | None, beside: Callable[[int], None]) -> None:
        """32 of the summed axis: the products of 2 x 2 tiles, or 1 x 2.

        ``begin`` is called with a tile before its first product, ``beside`` after each multiplication, with its number.
        """
        code, below = self.code, self.steps * self.parts * WORDS
        held: tuple[int, int] = (-1, -1)
        for n, (p, q) in enumerate(self.order):
            for i in range(self.tiles):
                if held[0] != p:
                    amx.load(code, 4 + i, self.split_rows, code.simplify(x + i * below + p * WORDS), LANES * 4, once=True)
            for c in range(2):
                if held[1] != q:
                    buffer, at = self._weight_tile(which, w, q, c)
                    amx.load(code, 6 + c, buffer, at, LANES * 4)
            held = (p, q)
            for i in range(self.tiles):
                for c in range(2):
                    if n == 0 and begin is not None:
                        begin(2 * i + c)
                    self.multiply(code, 2 * i + c, 4 + i, 6 + c)
                    beside((n * self.tiles + i) * 2 + c)

    def _put(self, tile: int) -> None:
        """Write a tile of sums, and begin it anew. While one is written the others still sum."""
        i, c = divmod(tile, 2)
        amx.store(self.code, tile, self.acc, i * self.mr * COLUMNS + c * LANES, COLUMNS * 4)
        amx.zero(self.code, tile)

    def _before(self, io: Index, here: Index) -> Index:
        """The row tiles whose sums the tiles hold when those of ``io`` begin: those before; the first of them all finds zeros."""
        if isinstance(io, int):
            return self.code.simplify(here - 1)
        return self.code.bind_index(tirx.Select(tirx.EQ(i64(io), i64(0)), i64(here - 1), i64(io - 1)), "before")

    def _ask(self, out: tuple[Index, Index], io: Index, line: Index) -> None:
        """Ask for a line of the output of row tiles ``io``."""
        code = self.code
        row, column = code.div(line, COLUMNS // OUT_LINE), code.mod(line, COLUMNS // OUT_LINE)
        self.store.ask(code.simplify(out[0] + io * self.side + row), code.simplify(out[1] + column * OUT_LINE))

    def _total_at(self, place: Index, q: Index) -> Any:
        """Where vector ``q`` of the totals of row tiles ``place`` lies."""
        return vector_at(self.code, self.base + place * (self.side * COLUMNS) + q * LANES)

    def _lead(self, row: Index) -> list[Index]:
        """The leading indices of a row of the first factor."""
        code = self.code
        return [code.bind_index(x, "i", n) for x, n in zip(code.unflatten(row, self.lead), self.lead, strict=True)]

    def _left_at(self, lead: list[Index], k: Index) -> Any:
        """An element of the first factor."""
        return Expressions(self.args, {}).at(self.left, operand_index(lead[:-1], self.left, lead[-1], k))

    def _mend(self, which: int, row: Index, count: Index, panel: Index) -> None:
        """Sum those rows of a panel again where a sum is nan: one element of the depth after the other, as f32."""
        code, total, nothing = self.code, self.totals[which], tirx.Broadcast(tirx.const(0, "int32"), LANES)
        with code.loop(count, "serial", "i") as i:
            at = code.bind_index(code.simplify(self.base + i * COLUMNS), "at")
            places = [vector_at(code, at + c * LANES) for c in range(2)]
            lanes = [tirx.Select(is_nan(total[p]), tirx.Broadcast(tirx.const(1, "int32"), LANES), nothing) for p in places]
            found = tirx.call_llvm_pure_intrin("int32", "llvm.vector.reduce.or", tirx.bitwise_or(*lanes))
            with code.when(tirx.NE(found, tirx.const(0, "int32"))):
                lead = self._lead(code.bind_index(code.simplify(row + i), "r"))
                for p in places:
                    code.emit(tirx.BufferStore(total, tirx.Broadcast(tirx.const(0.0, "float32"), LANES), [p]))
                with code.loop(self.depth, "serial", "k") as k:
                    x = tirx.Broadcast(code.bind(self._left_at(lead, k), "x"), LANES)
                    for c, p in enumerate(places):
                        code.emit(tirx.BufferStore(total, total[p] + x * self._weight_vector(which, panel, k, c), [p]))

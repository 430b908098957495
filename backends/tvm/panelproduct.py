"""Products with a packed weight: rows are brought into the form that instructions multiply, then tasks go through panels of it.

First all rows of the first factor are brought into scratch, rows shared among the cores: where their scale is made of the row (its
largest element), that is found in one pass over it, and the elements in a second one. Then tasks multiply: some row tiles by some panels
of the weight, 32 columns each. A panel is ``[depth / word, 32, word]`` behind the views that the packing pass writes: ``word`` neighbouring
elements of the summed axis fill 32 bits, and stand side by side, as instructions want them.

AMX tiles are 16 rows of 64 bytes; two by two are summed at once. Meanwhile the vector units write the panel before. What lies behind
the last row may be anything, as those rows are not written; the weight's padding is zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from tvm import tirx

from graphopt.backends.tvm import amx
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Arguments, Expressions, Source, always
from graphopt.backends.tvm.loops import SMALL, product
from graphopt.backends.tvm.monoid import Monoid, combine
from graphopt.backends.tvm.panelform import COLUMNS, LINE, TILE
from graphopt.backends.tvm.rowstore import RowStore
from graphopt.ir import types
from graphopt.ir.graph import Graph, Node, Value

Write = Callable[[Index, Index, int], None]

SUMS = 4  # vectors of the largest elements that are under way


class PanelProduct(ABC):
    """Emits a region with one product, or two of one first factor, and a pointwise epilogue of the product's shape.

    Args:
        nodes: the products.
        packed: the inputs that hold their second factors in panels.
        statistic: the reduction over the rows of the first factor that its scales are made of, if there is one.
        engine: ``amx``, or another one that :meth:`_dots` knows.
        lanes: 32-bit sums of a vector.
        rows: of a tile; ``group``: row tiles (``amx``: pairs of them) of a task; ``panels``: of a task.
        block: of the summed axis, after which sums are put aside (``amx``).
        apart: whether each task brings its own rows into scratch (``amx``, where no scale is made of them), so that no core reads what
            another one wrote, instead of all cores together.
        ahead: whether the next panel is asked for; ``beside``: whether a panel is written while the next one is multiplied (``amx``).

    Attributes:
        word: elements of 32 bits.
        held: dtype of the rows in scratch; ``total``: of sums.
        parts: numbers that an element of a row is the sum of, each with a tile of its own; sums take them in order.
    """

    word: ClassVar[int]
    held: str
    total: ClassVar[str]
    parts: int = 1

    def __init__(self, graph: Graph, nodes: Sequence[Node], packed: Sequence[Value], statistic: Node | None, engine: str, lanes: int,
                 rows: int, group: int, panels: int, block: int, ahead: bool, beside: bool, parallel: bool,
                 apart: bool = False) -> None:  # fmt: skip
        self.graph, self.engine, self.lanes, self.mr, self.ahead, self.parallel = graph, engine, lanes, rows, ahead, parallel
        self.beside, self.apart = beside and engine == "amx", apart and engine == "amx" and statistic is None
        self.nodes, self.left, self.statistic = nodes, nodes[0].operands[0], statistic
        self.code = code = Code(graph.symbols)
        self.args = Arguments(code, graph)
        self.weights = [self.args.inputs[p] for p in packed]
        self.depth, self.k = self.word * int(packed[0].shape[1]), int(self.left.shape[-1])
        self.lead = [code.size(d) for d in self.nodes[0].result.shape[:-1]]
        self.m = code.bind_index(product(code, self.lead), "rows")
        self.n = int(self.nodes[0].result.shape[-1])
        self.panels = -(-self.n // COLUMNS)
        self.side = 2 if engine == "amx" and not (isinstance(self.m, int) and self.m <= rows) else 1  # row tiles at once
        self.height = self.side * rows
        self.tiles = code.ceildiv(self.m, self.height)
        self.group = min(group, self.tiles) if isinstance(self.tiles, int) else group
        self.step = LINE // 4 * self.word  # elements of the summed axis that a row of a tile holds: a cache line of them
        self.whole = TILE * self.step  # elements of a tile
        self.row_tile = self.depth // self.step * self.parts * self.whole  # elements of the first factor for a tile of sums
        self.share, self.block = min(panels, self.panels), max(1, min(block, self.depth) // self.step)  # of the depth, in steps

    @abstractmethod
    def _put(self, left: Any, at: Index, value: Any) -> None:
        """Store an element of a row."""

    @abstractmethod
    def _multiply(self, total: int, a: int, b: int) -> None:
        """Multiply two tiles."""

    def _dots(self, left: Any, weight: Any, at: Index, total: Any, first: Index, here: Index) -> None:
        """A panel without tiles."""
        raise NotImplementedError

    def emit(self) -> Code:
        code = self.code
        left, known = (None, {}) if self.apart else self._rows()
        store = RowStore(code, self.args, self.graph, [n.result for n in self.nodes], COLUMNS, self.lanes, known)
        groups, shares = code.ceildiv(self.tiles, self.group), -(-self.panels // self.share)
        work = product(code, [self.m, self.n, self.depth])
        steps = product(code, [groups, shares])
        serial = not self.parallel or (isinstance(work, int) and work < 8 * self.word * SMALL) or (isinstance(steps, int) and steps == 1)
        with code.loop(steps, "serial" if serial else "parallel", "task") as task:
            # tasks side by side read the same panels
            jo, go = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(task, [shares, groups]), [shares, groups], strict=True)]
            self._task(left, store, go, jo)
        return code

    # --- the first factor ---------------------------------------------------------------------------------------------------

    def _rows(self) -> tuple[Any, dict[Value, Source]]:
        """The first factor in scratch, and how to read the statistic of its rows, if it has one."""
        code, height = self.code, self.height
        slots = code.simplify(self.tiles * self.side)
        size = code.simplify(slots * self.row_tile) if self.engine == "amx" else code.simplify(slots * (self.mr * self.depth))
        left = code.alloc(size, self.held, "left")
        most = code.alloc(code.simplify(self.tiles * height), "float32", "most") if self.statistic is not None else None
        work = product(code, [self.m, self.depth])
        small = isinstance(work, int) and work < SMALL
        chunk = 8  # rows of a parallel step
        pieces = code.ceildiv(self.m, chunk)
        serial = small or not self.parallel or (isinstance(pieces, int) and pieces == 1)
        with code.loop(pieces, "serial" if serial else "parallel", "piece") as piece:
            first = code.simplify(piece * chunk)
            exact = isinstance(self.m, int) and self.m % chunk == 0
            count = chunk if exact else code.bind_index(code.least(self.m - first, chunk), "count")
            with code.loop(count, "serial", "i") as i:
                r = code.bind_index(code.simplify(first + i), "r")
                self._row(left, most, r, r)
        if self.statistic is None or most is None:
            return left, {}
        shape = [*self.lead]

        def source(index: Sequence[Index]) -> Any:
            return code.load(most, code.flatten(index[:-1], shape))

        return left, {self.statistic.result: source}

    def _row(self, left: Any, most: Any, r: Index, place: Index) -> None:
        """Bring row ``r`` into scratch, as the one of a number ``place``."""
        code = self.code
        lead = [code.bind_index(x, "i", n) for x, n in zip(code.unflatten(r, self.lead), self.lead, strict=True)]
        sources: dict[Value, Source] = {}
        if self.statistic is not None:
            found = self._largest(self.statistic.operands[0], lead)
            code.store(most, r, found)
            sources[self.statistic.result] = always(found)
            self._hoist(sources, lead)
        if self.engine == "amx":
            start = code.simplify(code.div(place, self.mr) * self.row_tile + code.mod(place, self.mr) * self.step)
            step = self.parts * self.whole
        else:
            start, step = code.simplify(place * self.depth), self.step
        start = code.bind_index(start, "start")
        probe = Probe(self.args, sources, self.left)
        probe([0] * self.left.type.rank)
        lanes = 1 if probe.scalar_only else min(self.lanes, 16)

        def element(k: Index, at: Index) -> None:
            value = Expressions(self.args, sources).at(self.left, [*lead, code.simplify(k)])
            self._put(left, code.simplify(at), value)

        def piece(s: Index, u: Index, width: int) -> None:
            """``width`` elements, the ``u``-th so many of a step."""
            with code.loop(width, "vectorized", "v") as v:
                element(s * self.step + u * width + v, start + s * step + u * width + v)

        whole = self.k // self.step
        with code.loop(whole, "serial", "s") as s, code.loop(self.step // lanes, "serial", "u") as u:
            piece(s, u, lanes)
        rest = self.k - whole * self.step
        with code.loop(rest // lanes, "serial", "u") as u:
            piece(whole, u, lanes)
        with code.loop(rest % lanes, "serial", "u") as u:
            piece(whole, code.simplify(rest // lanes * lanes + u), 1)
        if rest and self.total == "float32":  # what scratch holds may be nan, and nan times the weight's zeros is
            with code.loop(self.step - rest, "serial", "u") as u:
                self._put(left, code.simplify(start + whole * step + rest + u), tirx.const(0, "float32"))

    def _hoist(self, sources: dict[Value, Source], lead: Sequence[Index]) -> None:
        """Compute what is one number a row, such as a scale, before the row's elements."""
        below = dict.fromkeys(sources)
        for node in self.graph.nodes():
            if any(v in below for v in node.operands) and node.result.type.rank == self.left.type.rank and node.result.shape[-1] == 1:
                value = Expressions(self.args, dict(sources)).at(node.result, [*lead, 0])
                sources[node.result] = always(value)
                below[node.result] = None

    def _largest(self, x: Value, lead: Sequence[Index]) -> Any:
        """The largest element of a row of magnitudes; nan if there is one.

        Their bits are compared, as integers: in that order nan comes last, and one instruction does it.
        """
        code, k = self.code, self.k
        probe = Probe(self.args, {}, x)
        probe([0] * x.type.rank)
        lanes = 1 if probe.scalar_only else self.lanes
        width, monoid = SUMS * lanes, Monoid.of("max", types.i32)
        acc = code.alloc(width, "int32", "acc")
        with code.loop(SUMS, "unrolled", "u") as u, code.loop(lanes, "vectorized", "v") as v:
            code.store(acc, code.simplify(u * lanes + v), tirx.const(0, "int32"))

        def join(at: Index, place: int, count: int) -> None:
            with code.loop(count, "vectorized", "v") as v:
                value = Expressions(self.args, {}).at(x, [*lead, code.simplify(at + v)])
                to = code.simplify(place + v)
                code.store(acc, to, tirx.max(code.load(acc, to), tirx.reinterpret("int32", value)))

        with code.loop(k // width, "serial", "c") as c:
            for u in range(SUMS):
                join(code.simplify(c * width + u * lanes), u * lanes, lanes)
        done = k // width * width
        with code.loop((k - done) // lanes, "serial", "c") as c:
            join(code.simplify(done + c * lanes), 0, lanes)
        done = k // lanes * lanes
        with code.loop(k - done, "serial", "c") as c:
            join(code.simplify(done + c), 0, 1)
        return code.bind(tirx.reinterpret("float32", combine(code, acc, width, lanes, monoid)), "most")

    # --- a task -------------------------------------------------------------------------------------------------------------

    def _task(self, left: Any, store: RowStore, go: Index, jo: Index) -> None:
        """Some row tiles by some panels."""
        code, height = self.code, self.height
        if self.engine == "amx":
            amx.configure(code, {t: self.mr if t < 6 else TILE for t in range(8)})
        first, panel = code.simplify(go * self.group), code.simplify(jo * self.share)
        even = isinstance(self.tiles, int) and self.tiles % self.group == 0
        here = self.group if even else code.bind_index(code.least(self.tiles - first, self.group), "tiles")
        count = self.share if self.panels % self.share == 0 else code.bind_index(code.least(self.panels - panel, self.share), "panels")
        row = code.bind_index(code.simplify(first * height), "row")
        rows = height * self.group
        exact = isinstance(self.m, int) and self.m % rows == 0
        last = rows if exact else code.bind_index(code.least(self.m - row, rows), "count")
        if self.apart:
            left = code.alloc(self.group * self.side * self.row_tile, self.held, "left")
            with code.loop(last, "serial", "i") as i:
                self._row(left, None, code.bind_index(code.simplify(row + i), "r"), i)
        start = 0 if self.apart else first  # of the task's row tiles in scratch
        totals = [code.alloc(rows * COLUMNS, self.total, "total") for _ in self.weights]
        with code.loop(count, "serial", "j") as j:
            at = code.bind_index(code.simplify((panel + j) * (self.depth * COLUMNS)), "w")

            def write(io: Index, s: Index, each: int, j: Index = j) -> None:
                """So many rows of a row tile, of the panel before: beside the tiles, which multiply without the vector units."""
                done = code.simplify(s * each)
                some = code.least(code.least(last - io * height, height) - done, each)
                n = code.bind_index(tirx.Select(tirx.GT(i64(j), i64(0)), i64(code.greatest(some, 0)), i64(0)), "n")
                start = code.simplify(io * height + done)
                store.write(totals, code.simplify(start * COLUMNS), code.simplify(row + start), n, code.simplify((panel + j - 1) * COLUMNS))

            for which, (weight, total) in enumerate(zip(self.weights, totals, strict=True)):
                if self.engine == "amx":
                    self._tiles(left, weight, at, total, start, here, write if self.beside and which == 0 else None)
                else:
                    self._dots(left, weight, at, total, first, here)
            if not self.beside:
                store.write(totals, 0, row, last, code.simplify((panel + j) * COLUMNS))
        if self.beside:
            store.write(totals, 0, row, last, code.simplify((panel + count - 1) * COLUMNS))
        if self.engine == "amx":
            amx.release(code)

    def _fetch(self, weight: Any, at: Index, place: Index) -> None:
        """Ask for a few lines of the next panel, at each step of a row tile: all of them by the last."""
        code, each = self.code, -(-self.step * COLUMNS // self.step // self.group)
        for q in range(each if self.ahead else 0):
            code.prefetch(weight, code.simplify(at + self.depth * COLUMNS + (place * each + q) * self.step))

    # --- tiles --------------------------------------------------------------------------------------------------------------

    def _tiles(self, left: Any, weight: Any, at: Index, total: Any, first: Index, here: Index, write: Write | None) -> None:
        """A panel by tiles 0 to 3, which hold sums, of 4 and 5, of the first factor, and 6 and 7, of the weight.

        ``write``: told (row tile, step, rows a step) at each step of the first block, before the sums of that row tile are stored.
        """
        code, steps = self.code, self.depth // self.step
        blocks, rest = divmod(steps, self.block)

        def block(b: Index, count: int, write: Write | None = None) -> None:
            with code.loop(here, "serial", "io") as io:
                self._pair(left, weight, at, total, first, io, b, count, write)

        block(0, self.block, write)
        if blocks > 1:
            with code.loop(blocks - 1, "serial", "b", start=1) as b:
                block(b, self.block)
        if rest:
            block(blocks, rest)

    def _pair(self, left: Any, weight: Any, at: Index, total: Any, first: Index, io: Index, b: Index, count: int,
              write: Write | None) -> None:  # fmt: skip
        """A block of the depth for one or two row tiles."""
        code, side = self.code, self.side
        sums = [(i, c) for i in range(side) for c in range(2)]
        place = code.bind_index(code.simplify(io * (self.height * COLUMNS)), "place")

        def spot(i: int, c: int) -> Index:
            return code.simplify(place + (i * self.mr * COLUMNS + c * TILE))

        for i, c in sums:
            if isinstance(b, int) and b == 0:
                amx.zero(code, 2 * i + c)
            else:
                amx.load(code, 2 * i + c, total, spot(i, c), COLUMNS * 4)
        tile = self.row_tile
        x = code.bind_index(code.simplify((first + io) * (side * tile) + b * (self.block * self.parts * self.whole)), "x")
        y = code.bind_index(code.simplify(at + b * (self.block * self.step * COLUMNS)), "y")
        fetched = code.simplify(io * count)
        with code.loop(count, "serial", "s") as s:
            for c in range(2):
                amx.load(code, 6 + c, weight, code.simplify(y + s * (self.step * COLUMNS) + c * self.step), COLUMNS * 4)
            for part in range(self.parts):
                for i in range(side):
                    amx.load(code, 4 + i, left, code.simplify(x + (s * self.parts + part) * self.whole + i * tile), LINE, once=True)
                for i, c in sums:
                    self._multiply(2 * i + c, 4 + i, 6 + c)
            self._fetch(weight, code.simplify(y), code.simplify(fetched + s))
            if write is not None:
                write(io, s, -(-self.height // count))
        for i, c in sums:
            amx.store(code, 2 * i + c, total, spot(i, c), COLUMNS * 4)

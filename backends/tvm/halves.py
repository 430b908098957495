"""Products of f32 on AMX tiles that multiply f16: each factor is a sum of two f16 times a power of two, and three of four products count.

    x = (h + l) * unit      h: x / unit rounded to f16, 11 bits of the significand; l: the rest, rounded to f16
    x * y = (h h' + h l' + l h') * unit * unit'   +   (l l', below 2**-22 of h h': left out)

Products of f16 are exact in f32, which is also what the tiles sum in. What is lost of each term, 2**-22 at most, in the mean far
less, is less than what a library's sum of K terms in f32 loses from K of some hundred on. The unit of a row of ``x`` (of a chunk of
the depth) brings its largest element to between 2**14 and 2**15: nothing overflows, and of smaller elements at most 2**-39 of the
largest is lost. The weight was split before (:mod:`graphopt.passes.layout.halves`) and lies in memory as tiles do.

Infinities have no halves: they make the sum nan. Where a sum is nan, that row of the panel is summed again by the vector units,
and has what f32 gives.

A task splits its rows of the first factor, as much of the depth as its cache holds. While the tiles multiply a block of the
weight, for all of its rows, the next block is asked for. Sums of a block of the depth are added to totals in memory, times the
units of row and column.

Reference: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
performance", IJHPCA 36(4), 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from tvm import tirx

from graphopt.backends.tvm import amx
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Arguments, Expressions
from graphopt.backends.tvm.halfform import COLUMNS, STEP, TILE, packed_halves
from graphopt.backends.tvm.loops import SMALL, product
from graphopt.backends.tvm.product import operand_index
from graphopt.backends.tvm.rowstore import RowStore
from graphopt.backends.tvm.thirdform import products_of
from graphopt.backends.tvm.thirds import is_nan, vector_at
from graphopt.errors import BuildError
from graphopt.ir.graph import Graph

LANES = 16  # f32 of a vector; columns of a tile
WORDS = TILE * LANES  # of a tile, in words of 32 bits: a pair of f16 each
PARTS = 2
HALVES = PARTS * WORDS  # of the two tiles that a tile of the first factor is split into
HIGH, LOW = range(PARTS)
ORDER = ((LOW, HIGH), (HIGH, HIGH), (HIGH, LOW))  # (half of the first factor, of the weight): one pair of tiles changes at a time
_ELEMENTS = 2 * WORDS  # f16 of a tile
_LINE = 32  # f16 of a cache line
_OUT_LINE = 16  # f32 of one
# f16 between what is multiplied and what is asked for, where a block is read once: 9 KiB. What is a multiple of 4 KiB away competes for the
# same places in the first-level cache (measured: a tenth slower)
_AHEAD = 9 * 512
_EXPONENT = 0x7F800000
_LEAST = 27 << 23  # the exponent of 2**-100: of what a unit is made of
_TOP = 14  # the exponent that the largest of a row has in units


def _part(count: int, n: int, slots: int) -> range:
    """Which of so many things are done in slot ``n``: in order, evenly."""
    return range(n * count // slots, (n + 1) * count // slots)


def halves(x: Any) -> tuple[Any, Any]:
    """``x`` in units, f32, as its two halves, f16."""
    high = x.astype("float16")
    return high, (x - high.astype("float32")).astype("float16")


def pairs_of_halves(x: Any, y: Any) -> list[Any]:
    """A half of ``x`` and the same of ``y`` side by side in a word, for each half."""

    def bits(h: Any) -> Any:
        return tirx.reinterpret("uint16", h).astype("uint32")

    shift = tirx.const(16, "uint32")
    return [tirx.bitwise_or(bits(a), tirx.shift_left(bits(b), shift)) for a, b in zip(halves(x), halves(y), strict=True)]


class HalvesKernel:
    """Emits a region with one matmul of f32, or two of one first factor, and a pointwise epilogue of the product's shape.

    Args: see :func:`graphopt.backends.tvm.halfform.space`.
    """

    def __init__(self, graph: Graph, block: int, rows: int, tiles: int, group: int, chunk: int, panels: int, ahead: bool,
                 parallel: bool) -> None:  # fmt: skip
        self.graph, self.block, self.mr, self.tiles, self.ahead, self.parallel = graph, block, rows, tiles, ahead, parallel
        nodes = products_of(graph)
        self.left = nodes[0].operands[0]
        self.code = code = Code(graph.symbols)
        self.args = Arguments(code, graph)
        packed = [packed_halves(n.operands[1]) for n in nodes]
        if any(p is None for p in packed):
            raise BuildError("the second factor is not split into halves")
        self.weights = [(self.args.inputs[p[0]], self.args.inputs[p[1]]) for p in packed if p is not None]  # tiles, units
        self.depth = int(self.left.shape[-1])
        self.lead = [code.size(d) for d in nodes[0].result.shape[:-1]]
        self.m = code.bind_index(product(code, self.lead), "rows")
        self.n = int(nodes[0].result.shape[-1])
        self.panels = -(-self.n // COLUMNS)
        self.side = tiles * rows  # rows that are multiplied at once
        self.places = code.ceildiv(self.m, self.side)
        self.group = min(group, self.places) if isinstance(self.places, int) else group
        self.chunk, self.chunks = chunk, self.depth // (chunk * block)  # blocks of a chunk, chunks of the depth
        self.share = min(panels, self.panels)
        self.store = RowStore(code, self.args, graph, [n.result for n in nodes], COLUMNS, LANES)
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
        left = code.alloc(self.tiles * group * (self.chunk * self.block // STEP) * HALVES, "uint32", "left")
        units = code.alloc(rows, "float32", "units")
        totals = [code.alloc(kept * rows * COLUMNS, "float32", "total") for _ in self.weights]
        acc = code.alloc(self.side * COLUMNS, "float32", "acc")
        amx.configure(code, {t: self.mr if t < 6 else TILE for t in range(8)})
        for t in range(2 * self.tiles):
            amx.zero(code, t)
        row = code.bind_index(code.simplify(place * self.side), "row")
        exact = isinstance(self.m, int) and self.m % rows == 0
        last = rows if exact else code.bind_index(code.least(self.m - row, rows), "count")
        if not exact:
            with code.loop(rows, "serial", "i") as i:
                code.store(units, i, tirx.const(0.0, "float32"))
        with code.loop(self.chunks, "serial", "chunk") as chunk:
            self._split_left(left, units, row, last, chunk)
            with code.loop(count, "serial", "jo") as j:
                panel = code.simplify(first + j)
                base = code.simplify(j * (rows * COLUMNS)) if kept > 1 else 0
                for which, total in enumerate(totals):
                    self._panel(left, units, acc, total, base, which, chunk, j, count, panel, first, here, row)
                with code.when(tirx.EQ(i64(chunk), i64(self.chunks - 1))) if self.chunks > 1 else nullcontext():
                    for which, total in enumerate(totals):
                        self._mend(which, total, base, row, last, panel)
                    self.store.write(totals, base, row, last, code.simplify(panel * COLUMNS))
        amx.release(code)

    def _weight_at(self, panel: Index, block: Index) -> Index:
        """Where a block of a panel begins, in f16."""
        return self.code.simplify((panel * self.depth + block * self.block) * (PARTS * COLUMNS))

    def _panel(self, left: Any, units: Any, acc: Any, total: Any, base: Index, which: int, chunk: Index, j: Index, count: Index,
               panel: Index, first: Index, here: Index, row: Index) -> None:  # fmt: skip
        """A chunk of a panel of one of the products: its blocks; in each the block that comes next is asked for."""
        code, blocks = self.code, self.chunk
        with code.when(tirx.EQ(i64(chunk), i64(0))) if self.chunks > 1 else nullcontext():
            words = code.simplify(here * (self.side * COLUMNS // LANES))
            with code.loop(words, "serial", "q") as q, code.loop(LANES, "vectorized", "v") as v:
                code.store(total, code.simplify(base + q * LANES + v), tirx.const(0.0, "float32"))
        start = code.simplify(chunk * blocks)
        following = (which + 1) % len(self.weights)
        scale = code.bind_index(code.simplify(panel * COLUMNS), "scale")

        def run(k: Index, coming: int, at: Index, last: bool = False) -> None:
            mine = code.bind_index(self._weight_at(panel, code.simplify(start + k)), "mine")
            self._block(left, units, acc, total, base, which, k, mine, here, coming, code.bind_index(at, "w"), scale,
                        (row, scale) if last and self.asks else None)  # fmt: skip

        if blocks > 1:
            with code.loop(blocks - 1, "serial", "k") as k:
                run(k, which, self._weight_at(panel, code.simplify(start + k + 1)))
        # behind a chunk's last block comes the next product, the next panel, or the next chunk
        next_panel, next_block = panel, start
        if not following:
            ends = tirx.EQ(i64(j + 1), i64(count))
            again = code.simplify(start + blocks) if self.chunks > 1 else start
            next_panel = code.bind(tirx.Select(ends, i64(first), i64(panel + 1)), "p", hidden=False)
            next_block = code.bind(tirx.Select(ends, i64(again), i64(start)), "b", hidden=False)
        run(blocks - 1, following, self._weight_at(next_panel, next_block), last=not following)
        self._finish(total, units, which, code.simplify(here - 1), base, acc, scale)

    def _block(self, left: Any, units: Any, acc: Any, total: Any, base: Index, which: int, block: Index, mine: Index, here: Index,
               coming: int, at: Index, scale: Index, out: tuple[Index, Index] | None) -> None:  # fmt: skip
        """Multiply a block for all row tiles of the task, and ask for the block at ``at`` of the weight that comes next meanwhile.

        ``out``: row and column of the task's first element of the output, if its lines are to be asked for meanwhile.
        """
        code, steps, side = self.code, self.block // STEP, self.side
        lines = self.block * COLUMNS * PARTS // _LINE  # of a block
        each = -(-lines // (self.group * steps))  # that a step asks for
        slots = len(ORDER) * 2 * self.tiles  # multiplications of a step
        vectors = side * COLUMNS // LANES
        sums = vectors // steps  # vectors of totals that a step adds to
        asked = -(-side * COLUMNS // (_OUT_LINE * steps)) if out is not None else 0  # lines of the output, that a step asks for
        with code.loop(here, "serial", "io") as io:
            # the tiles hold the sums of the row tiles before these; the first of them all finds zeros
            before = code.bind_index(tirx.Select(tirx.EQ(i64(io), i64(0)), i64(here - 1), i64(io - 1)), "before")

            def step(s: Index, begin: Callable[[int], None] | None, io: Index = io, before: Index = before) -> None:
                x = code.bind_index(code.simplify((io * (self.tiles * self.chunk * steps) + block * steps + s) * HALVES), "x")
                w = code.bind_index(code.simplify(mine + s * (2 * PARTS * _ELEMENTS)), "y")
                line = w + _AHEAD if self.group == 1 else at + (io * steps + s) * (each * _LINE)
                line = code.bind_index(code.simplify(line), "line")

                def beside(n: int) -> None:
                    for q in _part(each if self.ahead else 0, n, slots):
                        code.prefetch(self.weights[coming][0], code.simplify(line + q * _LINE))
                    free = 2 * self.tiles if begin is not None else 0  # slots in which sums are not yet all written
                    for q in _part(sums, n - free, slots - free) if n >= free else ():
                        self._add(total, units, which, before, base, acc, code.simplify(s * sums + q), scale)
                    for q in _part(asked, n, slots):
                        assert out is not None
                        at = code.simplify(s * asked + q)
                        r, column = code.div(at, COLUMNS // _OUT_LINE), code.mod(at, COLUMNS // _OUT_LINE)
                        self.store.ask(code.simplify(out[0] + io * side + r), code.simplify(out[1] + column * _OUT_LINE))

                self._step(left, x, self.weights[which][0], w, begin, beside)

            step(0, lambda t: self._put(t, acc))
            if steps > 1:
                with code.loop(steps - 1, "serial", "s") as s:
                    step(code.simplify(s + 1), None)
            for q in range(sums * steps, vectors):
                self._add(total, units, which, before, base, acc, q, scale)

    def _step(self, left: Any, x: Index, weight: Any, w: Index, begin: Callable[[int], None] | None, beside: Callable[[int], None]) -> None:
        """32 of the summed axis: three products of 2 x 2 tiles. Tiles 0 to 3 are sums, 4 and 5 of the first factor, 6 and 7 of the weight.

        ``begin`` is called with a tile before its first product, ``beside`` after each multiplication.
        """
        code, below = self.code, self.chunk * self.block // STEP * HALVES
        held: tuple[int, int] = (-1, -1)
        for n, (p, q) in enumerate(ORDER):
            for i in range(self.tiles):
                if held[0] != p:
                    amx.load(code, 4 + i, left, code.simplify(x + i * below + p * WORDS), LANES * 4, once=True)
            for c in range(2):
                if held[1] != q:
                    amx.load(code, 6 + c, weight, code.simplify(w + (q * 2 + c) * _ELEMENTS), LANES * 4)
            held = (p, q)
            for i in range(self.tiles):
                for c in range(2):
                    if n == 0 and begin is not None:
                        begin(2 * i + c)
                    amx.multiply_halves(code, 2 * i + c, 4 + i, 6 + c)
                    beside((n * self.tiles + i) * 2 + c)

    def _put(self, tile: int, acc: Any) -> None:
        """Write a tile of sums, and begin it anew. While one is written the others still sum."""
        i, c = divmod(tile, 2)
        amx.store(self.code, tile, acc, i * self.mr * COLUMNS + c * LANES, COLUMNS * 4)
        amx.zero(self.code, tile)

    def _add(self, total: Any, units: Any, which: int, place: Index, base: Index, acc: Any, q: Index, scale: Index) -> None:
        """Add a vector of written sums, those of row tiles ``place``, to the totals, times the units of its row and its columns."""
        code, per_row = self.code, COLUMNS // LANES
        at = vector_at(code, base + place * (self.side * COLUMNS) + q * LANES)
        row, c = code.div(q, per_row), code.mod(q, per_row)
        unit = tirx.Broadcast(code.load(units, code.simplify(place * self.side + row)), LANES)
        unit = unit * self.weights[which][1][vector_at(code, scale + c * LANES)]
        code.emit(tirx.BufferStore(total, total[at] + acc[vector_at(code, q * LANES)] * unit, [at]))

    def _finish(self, total: Any, units: Any, which: int, place: Index, base: Index, acc: Any, scale: Index) -> None:
        """Add what the tiles hold to the totals."""
        for t in range(2 * self.tiles):
            self._put(t, acc)
        with self.code.loop(self.side * COLUMNS // LANES, "serial", "q") as q:
            self._add(total, units, which, place, base, acc, q, scale)

    # --- the first factor ---------------------------------------------------------------------------------------------------

    def _split_left(self, left: Any, units: Any, row: Index, count: Index, chunk: Index) -> None:
        """A chunk of the first factor's rows, as tiles ``[row tile, step, half, 16 rows, 16 pairs]``; rows behind the last hold anything.

        A pair is two elements of a step that are 16 apart: so two vectors become pairs as they are. The rows of a tile are written
        side by side: of one row after the other, every store would go to the same few places of the first-level cache.
        """
        code, a, mr, steps = self.code, self.left, self.mr, self.chunk * self.block // STEP
        probe = Probe(self.args, {}, a)
        probe([0] * a.type.rank)
        kind = "serial" if probe.scalar_only else "vectorized"
        wide = steps * STEP + LANES  # of a row here: not a multiple of 4 KiB
        lines = code.alloc(mr * wide, "float32", "lines")
        ups = code.alloc(mr, "float32", "ups")
        with code.loop(code.ceildiv_plain(count, mr), "serial", "tile") as tile:
            start = code.bind_index(code.simplify(tile * mr), "start")
            here = mr if isinstance(count, int) and count % mr == 0 else code.bind_index(code.least(count - start, mr), "here")
            with code.loop(here, "serial", "i") as i:
                r = code.bind_index(code.simplify(row + start + i), "r")
                lead = [code.bind_index(x, "i", n) for x, n in zip(code.unflatten(r, self.lead), self.lead, strict=True)]
                line = code.bind_index(code.simplify(i * wide), "line")
                with code.loop(steps * STEP // LANES, "serial", "s") as s, code.loop(LANES, kind, "v") as v:
                    k = code.simplify(chunk * (steps * STEP) + s * LANES + v)
                    x = Expressions(self.args, {}).at(a, operand_index(lead[:-1], a, lead[-1], k))
                    code.store(lines, code.simplify(line + s * LANES + v), x)
                largest = self._largest(lines, line, steps * STEP // LANES)
                code.store(ups, i, tirx.reinterpret("float32", tirx.const((254 + _TOP) << 23, "uint32") - largest))
                code.store(units, code.simplify(start + i), tirx.reinterpret("float32", largest - tirx.const(_TOP << 23, "uint32")))
            with code.loop(steps, "serial", "s") as s:
                to = code.bind_index(code.simplify((tile * steps + s) * HALVES), "to")
                with code.loop(here, "serial", "i") as i:
                    up = code.bind(code.load(ups, i), "up")
                    with code.loop(LANES, "vectorized", "v") as v:
                        places = (code.simplify(i * wide + s * STEP + h * LANES + v) for h in range(2))
                        x, y = (code.bind(code.load(lines, at) * up, "x") for at in places)
                        for part, word in enumerate(pairs_of_halves(x, y)):
                            code.store(left, code.simplify(to + part * WORDS + i * LANES + v), word)

    def _largest(self, lines: Any, line: Index, vectors: int) -> Any:
        """The bits of the power of two below the largest magnitude of a row; of infinity, those of infinity."""
        code, count = self.code, 4
        magnitude = tirx.Broadcast(tirx.const(0x7FFFFFFF, "uint32"), LANES)
        while vectors % count:
            count //= 2
        held = code.alloc(count * LANES, "uint32", "largest", scope="local")
        for q in range(count):
            code.emit(tirx.BufferStore(held, tirx.Broadcast(tirx.const(0, "uint32"), LANES), [vector_at(code, q * LANES)]))
        with code.loop(vectors // count, "serial", "s") as s:
            for q in range(count):
                x = tirx.reinterpret(f"uint32x{LANES}", lines[vector_at(code, line + (s * count + q) * LANES)])
                at = vector_at(code, q * LANES)
                code.emit(tirx.BufferStore(held, tirx.max(held[at], tirx.bitwise_and(x, magnitude)), [at]))
        most = held[vector_at(code, 0)]
        for q in range(1, count):
            most = tirx.max(most, held[vector_at(code, q * LANES)])
        top = tirx.call_llvm_pure_intrin("uint32", "llvm.vector.reduce.umax", most)
        return code.bind(tirx.max(tirx.bitwise_and(top, tirx.const(_EXPONENT, "uint32")), tirx.const(_LEAST, "uint32")), "largest")

    # --- sums that are nan --------------------------------------------------------------------------------------------------

    def _mend(self, which: int, total: Any, base: Index, row: Index, count: Index, panel: Index) -> None:
        """Sum those rows of a panel again where a sum is nan: one element of the depth after the other, as f32."""
        code, nothing = self.code, tirx.Broadcast(tirx.const(0, "int32"), LANES)
        weight, unit = self.weights[which]
        start = code.bind_index(self._weight_at(panel, 0), "w")
        with code.loop(count, "serial", "i") as i:
            at = code.bind_index(code.simplify(base + i * COLUMNS), "at")
            sums = [total[vector_at(code, at + c * LANES)] for c in range(2)]
            lanes = [tirx.Select(is_nan(x), tirx.Broadcast(tirx.const(1, "int32"), LANES), nothing) for x in sums]
            found = tirx.call_llvm_pure_intrin("int32", "llvm.vector.reduce.or", tirx.bitwise_or(*lanes))
            with code.when(tirx.NE(found, tirx.const(0, "int32"))):
                r = code.bind_index(code.simplify(row + i), "r")
                lead = [code.bind_index(x, "i", n) for x, n in zip(code.unflatten(r, self.lead), self.lead, strict=True)]
                for c in range(2):
                    code.emit(tirx.BufferStore(total, tirx.Broadcast(tirx.const(0.0, "float32"), LANES), [vector_at(code, at + c * LANES)]))
                with code.loop(self.depth, "serial", "k") as k:
                    index = operand_index(lead[:-1], self.left, lead[-1], k)
                    x = code.bind(Expressions(self.args, {}).at(self.left, index), "x")
                    tile = code.simplify(start + code.div(k, STEP) * (2 * PARTS * _ELEMENTS) + code.mod(k, TILE) * (2 * LANES)
                                         + code.div(code.mod(k, STEP), TILE))  # fmt: skip
                    for c in range(2):
                        with code.loop(LANES, "vectorized", "v") as v:
                            at_half = [code.simplify(tile + (p * 2 + c) * _ELEMENTS + 2 * v) for p in range(PARTS)]
                            high, low = (code.load(weight, p).astype("float32") for p in at_half)
                            y = (high + low) * code.load(unit, code.simplify(panel * COLUMNS + c * LANES + v))
                            place = code.simplify(at + c * LANES + v)
                            code.store(total, place, code.load(total, place) + x * y)

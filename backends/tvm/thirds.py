"""Products of f32 on AMX tiles, which multiply bf16: each factor is the exact sum of three bf16, and six of the nine products count.

    x = h + m + l      h: the upper 8 bits of the significand, m: the next 8, l: the last 8; each is a bf16
    x * y = h h' + h m' + m h' + m m' + h l' + l h'   +   (m l' + l m' + l l', below 2**-21 of h h': left out)

Products of bf16 are exact in f32, which is also what the tiles sum in. So the error is that of a sum of f32, to which the products
left out add 2**-22 or so of each term; a library's sum of K terms has sqrt(K) times as much. With 16 times the multiplications of
the vector units, six products are still faster. Infinities have no thirds: they make the sum nan. Where a sum is nan, that row of the
panel is summed again by the vector units, and has what f32 gives. What is below 2**-126 counts as zero,
thirds, too: numbers below 2**-100 lose digits.

A task splits its rows of the first factor, as much of the depth as its cache holds: reading what another core has split would take
longer. The weight, packed in panels of 32 columns, is split block by block while the tiles multiply the block before: the vector
units have nothing else to do. Sums of a block of the depth are added to totals in memory.

Reference: Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations",
IEEE ARITH 2019.
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
from graphopt.backends.tvm.loops import SMALL, product
from graphopt.backends.tvm.product import operand_index
from graphopt.backends.tvm.rowstore import RowStore
from graphopt.backends.tvm.thirdform import COLUMNS, STEP, TILE, packed_panels, products_of
from graphopt.errors import BuildError
from graphopt.ir.graph import Graph

LANES = 16  # f32 of a vector; columns of a tile
WORDS = TILE * LANES  # of a tile, in words of 32 bits: a pair of bf16 each
PARTS = 3
THIRDS = PARTS * WORDS  # of the three tiles that a tile of the first factor is split into
HIGH, MIDDLE, LOW = range(PARTS)
# (third of the first factor, of the weight), small products first; from one to the next at most two pairs of tiles change
ORDER = ((LOW, HIGH), (MIDDLE, HIGH), (MIDDLE, MIDDLE), (HIGH, MIDDLE), (HIGH, LOW), (HIGH, HIGH))
_UPPER, _HALF = 0xFFFF0000, 0x8000
_LINE = 16  # f32 of a cache line
# f32 of a weight between what is split and what is asked for: 6 KiB. At 4 KiB both compete for the same places in the first-level cache:
# products of 49 rows take a fifth longer, of 128 a twentieth (measured)
_AHEAD = STEP * COLUMNS + STEP * COLUMNS // 2


def thirds(x: Any, lanes: int) -> tuple[Any, Any, Any]:
    """(value, its first, middle and last bf16) as words of 32 bits whose upper halves count; ``x`` is f32, of so many lanes.

    The middle one is rounded, so that the last one's sign is any. Were all of ``x``'s, the products that are left out would be of the
    sign of the sum where its terms are, and what each layer loses would add up: in ResNet-50 to twice eager's error.
    """
    word, real = ("uint32", "float32") if lanes == 1 else (f"uint32x{lanes}", f"float32x{lanes}")
    upper, half = (c if lanes == 1 else tirx.Broadcast(c, lanes) for c in (tirx.const(_UPPER, "uint32"), tirx.const(_HALF, "uint32")))
    high = tirx.bitwise_and(tirx.reinterpret(word, x), upper)
    rest = x - tirx.reinterpret(real, high)
    middle = tirx.bitwise_and(tirx.reinterpret(word, rest) + half, upper)
    return high, middle, tirx.reinterpret(word, rest - tirx.reinterpret(real, middle))


def pairs_of_thirds(x: Any, y: Any, lanes: int) -> list[Any]:
    """A third of ``x`` and the same of ``y`` side by side in a word, for each third."""
    upper, shift = tirx.const(_UPPER, "uint32"), tirx.const(16, "uint32")
    if lanes > 1:
        upper, shift = tirx.Broadcast(upper, lanes), tirx.Broadcast(shift, lanes)
    both = zip(thirds(x, lanes), thirds(y, lanes), strict=True)
    return [tirx.bitwise_or(tirx.shift_right(a, shift), tirx.bitwise_and(b, upper)) for a, b in both]


def split_pair(code: Code, weight: Any, start: Index, split: Any, to: Index, apart: int = 1) -> None:
    """Split two rows of a panel, 16 columns from element ``start`` on: a row of a tile for each third, pairs side by side.

    ``to``: where the row of the first third's tile lies in ``split``; the tiles of the other thirds follow. ``apart``: from one
    row to the other.
    """
    x, y = (code.bind(weight[vector_at(code, start + row * apart * COLUMNS)], "y", hidden=False) for row in range(2))
    for part, word in enumerate(pairs_of_thirds(x, y, LANES)):
        code.emit(tirx.BufferStore(split, word, [vector_at(code, to + part * WORDS)]))


def vector_at(code: Code, at: Index) -> Any:
    """The place of a vector in a buffer."""
    return tirx.Ramp(i64(code.simplify(at)), i64(1), LANES)


def is_nan(x: Any) -> Any:
    """Which lanes are nan, by their bits: TVM's simplifier takes ``x != x`` for false."""
    bits = tirx.bitwise_and(tirx.reinterpret(f"uint32x{LANES}", x), tirx.Broadcast(tirx.const(0x7FFFFFFF, "uint32"), LANES))
    return tirx.GT(bits, tirx.Broadcast(tirx.const(0x7F800000, "uint32"), LANES))


class ThirdsKernel:
    """Emits a region with one matmul of f32, or two of one first factor, and a pointwise epilogue of the product's shape.

    Args: see :func:`graphopt.backends.tvm.thirdform.params`.
    """

    def __init__(self, graph: Graph, block: int, rows: int, group: int, chunk: int, panels: int, ahead: bool, parallel: bool) -> None:
        self.graph, self.block, self.mr, self.ahead, self.parallel = graph, block, rows, ahead, parallel
        nodes = products_of(graph)
        self.left = nodes[0].operands[0]
        self.code = code = Code(graph.symbols)
        self.args = Arguments(code, graph)
        packed = [packed_panels(n.operands[1]) for n in nodes]
        if any(p is None for p in packed):
            raise BuildError("the second factor is not packed in panels")
        self.weights = [self.args.inputs[p] for p in packed if p is not None]
        self.depth = int(self.left.shape[-1])
        self.lead = [code.size(d) for d in nodes[0].result.shape[:-1]]
        self.m = code.bind_index(product(code, self.lead), "rows")
        self.n = int(nodes[0].result.shape[-1])
        self.panels = -(-self.n // COLUMNS)
        self.pairs = code.ceildiv(self.m, 2 * rows)
        self.group = min(group, self.pairs) if isinstance(self.pairs, int) else group
        self.chunk, self.chunks = chunk, self.depth // (chunk * block)  # blocks of a chunk, chunks of the depth
        self.share = min(panels, self.panels)
        self.store = RowStore(code, self.args, graph, [n.result for n in nodes], COLUMNS, LANES)
        self.asks = self.ahead and self.store.plain

    def emit(self) -> Code:
        code = self.code
        groups, shares = code.ceildiv(self.pairs, self.group), -(-self.panels // self.share)
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
        pair = code.simplify(go * group)
        even = isinstance(self.pairs, int) and self.pairs % group == 0
        here = group if even else code.bind_index(code.least(self.pairs - pair, group), "pairs")
        first = code.simplify(jo * self.share)
        count = self.share if self.panels % self.share == 0 else code.bind_index(code.least(self.panels - first, self.share), "panels")
        rows = 2 * self.mr * group
        kept = self.share if self.chunks > 1 else 1  # panels whose totals are kept
        left = code.alloc(2 * group * (self.chunk * self.block // STEP) * THIRDS, "uint32", "left")
        totals = [code.alloc(kept * rows * COLUMNS, "float32", "total") for _ in self.weights]
        split = code.alloc(2 * self._block_words(), "uint32", "split")
        acc = code.alloc(2 * self.mr * COLUMNS, "float32", "acc")
        amx.configure(code, {t: self.mr if t < 6 else TILE for t in range(8)})
        for t in range(4):
            amx.zero(code, t)
        with code.loop(self.block, "serial", "u") as unit:
            self._split_unit(self.weights[0], self._weight_at(first, 0), split, 0, unit)
        row = code.bind_index(code.simplify(pair * (2 * self.mr)), "row")
        exact = isinstance(self.m, int) and self.m % (2 * self.mr * group) == 0
        last = rows if exact else code.bind_index(code.least(self.m - row, rows), "count")
        with code.loop(self.chunks, "serial", "chunk") as chunk:
            self._split_left(left, row, last, chunk)
            with code.loop(count, "serial", "jo") as j:
                panel = code.simplify(first + j)
                base = code.simplify(j * (rows * COLUMNS)) if kept > 1 else 0
                for which, total in enumerate(totals):
                    self._panel(left, split, acc, total, base, which, chunk, j, count, panel, first, here, row)
                with code.when(tirx.EQ(i64(chunk), i64(self.chunks - 1))) if self.chunks > 1 else nullcontext():
                    for weight, total in zip(self.weights, totals, strict=True):
                        self._mend(weight, total, base, row, last, panel)
                    self.store.write(totals, base, row, last, code.simplify(panel * COLUMNS))
        amx.release(code)

    def _block_words(self) -> int:
        return self.block // STEP * 2 * PARTS * WORDS

    def _weight_at(self, panel: Index, block: Index) -> Index:
        return self.code.simplify(panel * (self.depth * COLUMNS) + block * (self.block * COLUMNS))

    def _panel(self, left: Any, split: Any, acc: Any, total: Any, base: Index, which: int, chunk: Index, j: Index, count: Index,
               panel: Index, first: Index, here: Index, row: Index) -> None:  # fmt: skip
        """A chunk of a panel of one of the products: its blocks, and in each the block that comes next is split."""
        code, blocks = self.code, self.chunk
        with code.when(tirx.EQ(i64(chunk), i64(0))) if self.chunks > 1 else nullcontext():
            words = code.simplify(here * (2 * self.mr * COLUMNS // LANES))
            with code.loop(words, "serial", "q") as q, code.loop(LANES, "vectorized", "v") as v:
                code.store(total, code.simplify(base + q * LANES + v), tirx.const(0.0, "float32"))
        start = code.simplify(chunk * blocks)
        following = (which + 1) % len(self.weights)

        def run(k: Index, weight: Any, at: Index, last: bool = False) -> None:
            # which half of the scratch a block is in: they take turns over all blocks that a task goes through
            turn = code.simplify(((chunk * count + j) * len(self.weights) + which) * blocks + k)
            half = code.bind_index(code.mod(turn, 2), "half", 2)
            mine = code.bind_index(code.simplify(half * self._block_words()), "mine")
            other = code.bind_index(code.simplify((1 - half) * self._block_words()), "other")
            self._block(left, split, acc, total, base, k, mine, here, weight, code.bind_index(at, "w"), other,
                        (row, code.simplify(panel * COLUMNS)) if last and self.asks else None)  # fmt: skip

        if blocks > 1:
            with code.loop(blocks - 1, "serial", "k") as k:
                run(k, self.weights[which], self._weight_at(panel, code.simplify(start + k + 1)))
        # behind a chunk's last block comes the next product, the next panel, or the next chunk; behind all of them nothing: then the
        # last block is split once more
        next_panel, next_block = panel, start
        if not following:
            ends = tirx.EQ(i64(j + 1), i64(count))
            again: Index = start
            if self.chunks > 1:
                again = tirx.Select(tirx.EQ(i64(chunk), i64(self.chunks - 1)), i64(start), i64(start + blocks))
            back = first if self.chunks > 1 else panel
            next_panel = code.bind(tirx.Select(ends, i64(back), i64(panel + 1)), "p", hidden=False)
            next_block = code.bind(tirx.Select(ends, i64(again), i64(start)), "b", hidden=False)
        run(blocks - 1, self.weights[following], self._weight_at(next_panel, next_block), last=not following)
        self._finish(total, code.simplify(base + (here - 1) * (2 * self.mr * COLUMNS)), acc)

    def _block(self, left: Any, split: Any, acc: Any, total: Any, base: Index, block: Index, mine: Index, here: Index,
               weight: Any, at: Index, other: Index, out: tuple[Index, Index] | None) -> None:  # fmt: skip
        """Multiply a block for all row tiles of the task, and split the block at ``at`` of ``weight`` meanwhile.

        ``out``: row and column of the task's first element of the output, if its lines are to be asked for meanwhile.
        """
        code, steps, side = self.code, self.block // STEP, 2 * self.mr
        slots = self.group * steps
        each = self.block // slots  # units that a step splits
        vectors = side * COLUMNS // LANES
        sums = vectors // steps  # vectors of totals that a step adds to
        lines = -(-side * COLUMNS // (_LINE * steps)) if out is not None else 0  # of the output, that a step asks for
        with code.loop(here, "serial", "io") as io:
            # the tiles hold the sums of the row tiles before these; the first of them all finds zeros
            before = tirx.Select(tirx.EQ(i64(io), i64(0)), i64(here), i64(io))
            place = code.bind_index(code.simplify(base + (before - 1) * (side * COLUMNS)), "place")

            def step(s: Index, begin: Callable[[int], None] | None, io: Index = io, place: Index = place) -> None:
                x = code.bind_index(code.simplify((io * (2 * self.chunk * steps) + block * steps + s) * THIRDS), "x")
                w = code.bind_index(code.simplify(mine + s * (2 * PARTS * WORDS)), "y")
                unit = code.simplify((io * steps + s) * each)

                def beside(n: int) -> None:
                    for q in range(n, each, len(ORDER)):
                        self._split_unit(weight, at, split, other, code.simplify(unit + q))
                    for q in range(n, sums, len(ORDER)):
                        self._add(total, place, acc, code.simplify(s * sums + q))
                    for q in range(n, lines, len(ORDER)):
                        assert out is not None
                        line = code.simplify(s * lines + q)
                        row, column = code.div(line, COLUMNS // _LINE), code.mod(line, COLUMNS // _LINE)
                        self.store.ask(code.simplify(out[0] + io * side + row), code.simplify(out[1] + column * _LINE))

                self._step(left, x, split, w, begin, beside)

            step(0, lambda t: self._put(t, acc))
            if steps > 1:
                with code.loop(steps - 1, "serial", "s") as s:
                    step(code.simplify(s + 1), None)
            for q in range(sums * steps, vectors):
                self._add(total, place, acc, q)
        done = code.simplify(here * (steps * each))
        with code.loop(code.simplify(self.block - done), "serial", "u") as u:
            self._split_unit(weight, at, split, other, code.simplify(done + u))

    def _step(self, left: Any, x: Index, split: Any, w: Index, begin: Callable[[int], None] | None, beside: Callable[[int], None]) -> None:
        """32 of the summed axis: six products of 2 x 2 tiles. Tiles 0 to 3 are sums, 4 and 5 of the first factor, 6 and 7 of the weight.

        ``begin`` is called with a tile before its first product, ``beside`` after each of the six.
        """
        code, below = self.code, self.chunk * self.block // STEP * THIRDS
        held: tuple[int, int] = (-1, -1)
        for n, (p, q) in enumerate(ORDER):
            for i in range(2):
                if held[0] != p:
                    amx.load(code, 4 + i, left, code.simplify(x + i * below + p * WORDS), LANES * 4, once=True)
            for c in range(2):
                if held[1] != q:
                    amx.load(code, 6 + c, split, code.simplify(w + (c * PARTS + q) * WORDS), LANES * 4)
            held = (p, q)
            for i in range(2):
                for c in range(2):
                    if n == 0 and begin is not None:
                        begin(2 * i + c)
                    amx.multiply(code, 2 * i + c, 4 + i, 6 + c)
            beside(n)

    def _put(self, tile: int, acc: Any) -> None:
        """Write a tile of sums, and begin it anew. While one is written the others still sum."""
        i, c = divmod(tile, 2)
        amx.store(self.code, tile, acc, i * self.mr * COLUMNS + c * LANES, COLUMNS * 4)
        amx.zero(self.code, tile)

    def _add(self, total: Any, place: Index, acc: Any, q: Index) -> None:
        """Add a vector of written sums to the totals."""
        at = self._vector(place + q * LANES)
        self.code.emit(tirx.BufferStore(total, total[at] + acc[self._vector(q * LANES)], [at]))

    def _finish(self, total: Any, place: Index, acc: Any) -> None:
        """Add what the tiles hold to the totals."""
        for t in range(4):
            self._put(t, acc)
        with self.code.loop(2 * self.mr * COLUMNS // LANES, "serial", "q") as q:
            self._add(total, place, acc, q)

    def _split_left(self, left: Any, row: Index, count: Index, chunk: Index) -> None:
        """A chunk of the first factor's rows, as tiles ``[row tile, step, third, 16 rows, 16 pairs]``; rows behind the last hold anything.

        A pair is two elements of a step that are 16 apart: so two vectors become pairs as they are. The rows of a tile are written
        side by side: of one row after the other, every store would go to the same few places of the first-level cache.
        """
        code, a, mr, steps = self.code, self.left, self.mr, self.chunk * self.block // STEP
        probe = Probe(self.args, {}, a)
        probe([0] * a.type.rank)
        kind = "serial" if probe.scalar_only else "vectorized"
        with code.loop(code.ceildiv_plain(count, mr), "serial", "tile") as tile:
            first = code.bind_index(code.simplify(tile * mr), "first")
            here = mr if isinstance(count, int) and count % mr == 0 else code.bind_index(code.least(count - first, mr), "here")
            with code.loop(steps, "serial", "s") as s, code.loop(here, "serial", "i") as i:
                r = code.bind_index(code.simplify(row + first + i), "r")
                lead = [code.bind_index(x, "i", n) for x, n in zip(code.unflatten(r, self.lead), self.lead, strict=True)]
                start = code.bind_index(code.simplify((tile * steps + s) * THIRDS + i * LANES), "start")
                with code.loop(LANES, kind, "v") as v:
                    values = []
                    for half in range(2):
                        k = code.simplify((chunk * steps + s) * STEP + half * LANES + v)
                        values.append(code.bind(Expressions(self.args, {}).at(a, operand_index(lead[:-1], a, lead[-1], k)), "x"))
                    for part, word in enumerate(pairs_of_thirds(values[0], values[1], 1)):
                        code.store(left, code.simplify(start + part * WORDS + v), word)

    def _mend(self, weight: Any, total: Any, base: Index, row: Index, count: Index, panel: Index) -> None:
        """Sum those rows of a panel again where a sum is nan: one element of the depth after the other, as f32."""
        code, nothing = self.code, tirx.Broadcast(tirx.const(0, "int32"), LANES)
        start = code.bind_index(self._weight_at(panel, 0), "w")
        with code.loop(count, "serial", "i") as i:
            at = code.bind_index(code.simplify(base + i * COLUMNS), "at")
            sums = [total[self._vector(at + c * LANES)] for c in range(2)]
            lanes = [tirx.Select(is_nan(x), tirx.Broadcast(tirx.const(1, "int32"), LANES), nothing) for x in sums]
            found = tirx.call_llvm_pure_intrin("int32", "llvm.vector.reduce.or", tirx.bitwise_or(*lanes))
            with code.when(tirx.NE(found, tirx.const(0, "int32"))):
                r = code.bind_index(code.simplify(row + i), "r")
                lead = [code.bind_index(x, "i", n) for x, n in zip(code.unflatten(r, self.lead), self.lead, strict=True)]
                for c in range(2):
                    code.emit(tirx.BufferStore(total, tirx.Broadcast(tirx.const(0.0, "float32"), LANES), [self._vector(at + c * LANES)]))
                with code.loop(self.depth, "serial", "k") as k:
                    index = operand_index(lead[:-1], self.left, lead[-1], k)
                    x = tirx.Broadcast(code.bind(Expressions(self.args, {}).at(self.left, index), "x"), LANES)
                    for c in range(2):
                        y = weight[self._vector(start + k * COLUMNS + c * LANES)]
                        place = self._vector(at + c * LANES)
                        code.emit(tirx.BufferStore(total, total[place] + x * y, [place]))

    def _vector(self, at: Index) -> Any:
        return vector_at(self.code, at)

    # --- the weight ---------------------------------------------------------------------------------------------------------

    def _split_unit(self, weight: Any, at: Index, split: Any, to: Index, unit: Index) -> None:
        """Two rows by 16 columns of a block, 16 rows apart as the first factor's pairs are: side by side, for each third."""
        code = self.code
        pair, c = code.div(unit, 2), code.mod(unit, 2)
        step, row = code.div(pair, TILE), code.mod(pair, TILE)
        start = code.bind_index(code.simplify(at + (step * STEP + row) * COLUMNS + c * LANES), "from")
        if self.ahead:
            for half in range(2):
                code.prefetch(weight, code.simplify(start + _AHEAD + half * TILE * COLUMNS))
        tile = code.simplify((step * 2 + c) * (PARTS * WORDS) + row * LANES)
        split_pair(code, weight, start, split, code.bind_index(code.simplify(to + tile), "to"), apart=TILE)

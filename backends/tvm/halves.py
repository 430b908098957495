"""Products of f32 on AMX tiles that multiply f16: each factor is a sum of two f16 times a power of two, and three of four products count.

    x * share = (h + l) * unit      h: x * share / unit rounded to f16, 11 bits of the significand; l: the rest, rounded to f16
    x * y     = (h h' + h l' + l h') * unit * unit'   +   (l l', below 2**-22 of h h': left out)

Products of f16 are exact in f32, which is also what the tiles sum in. What is lost of each term, 2**-22 at most, in the mean far
less, is less than what a library's sum of K terms in f32 loses from K of some hundred on. The weight was split before
(:mod:`graphopt.passes.layout.halves`) and lies in memory as tiles do; the share of an element of the depth is how large its row of the
weight is. The unit of a row of ``x`` (of a chunk of the depth) brings its largest element, times shares, to between 2**14 and 2**15:
nothing overflows, and of others at most 2**-39 of the largest is lost. A row most of whose elements are below 2**-17 of its largest
loses too much: it is made nan, and summed in f32 as rows with infinities are.

While the tiles multiply a block of the weight, for all rows of a task, the next block is asked for. Sums are added to totals times the
units of row and column.

Reference: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
performance", IJHPCA 36(4), 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from graphopt.backends.tvm import amx, keybytes
from graphopt.backends.tvm.code import Index, i64
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.halfform import packed_halves
from graphopt.backends.tvm.partsproduct import LANES, OUT_LINE, WORDS, PartsProduct, vector_at
from graphopt.backends.tvm.thirdform import COLUMNS, STEP, TILE
from graphopt.errors import BuildError
from graphopt.ir.graph import Graph

PARTS = 2
HALVES = PARTS * WORDS  # of the two tiles that a tile of the first factor is split into
HIGH, LOW = range(PARTS)
ORDER = ((LOW, HIGH), (HIGH, HIGH), (HIGH, LOW))  # (half of the first factor, of the weight): one pair of tiles changes at a time
_ELEMENTS = 2 * WORDS  # f16 of a tile
_LINE = 32  # f16 of a cache line
# f16 between what is multiplied and what is asked for, where a block is read once: 9 KiB. What is a multiple of 4 KiB away competes for the
# same places in the first-level cache (measured: a tenth slower)
_AHEAD = 9 * 512
_LEAST = 27 << 23  # the exponent of 2**-100: of what a unit is made of
_SMALL = 17  # halves of what is 2**-17 of the largest lose digits
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


class HalvesKernel(PartsProduct):
    """See the module, and :class:`~graphopt.backends.tvm.partsproduct.PartsProduct`.

    Args: see :func:`graphopt.backends.tvm.halfform.space`.
    """

    parts, order = PARTS, ORDER
    multiply = staticmethod(amx.multiply_halves)

    def __init__(self, graph: Graph, block: int, rows: int, tiles: int, group: int, chunk: int, panels: int, ahead: bool,
                 parallel: bool) -> None:  # fmt: skip
        super().__init__(graph, block, rows, tiles, group, chunk, panels, ahead, parallel)
        packed = [packed_halves(n.operands[1]) for n in self.nodes]
        if any(p is None for p in packed):
            raise BuildError("the second factor is not split into halves")
        self.weights = [(self.args.inputs[p[0]], self.args.inputs[p[1]]) for p in packed if p is not None]  # tiles, units
        self.shares = next(self.args.inputs[p[2]] for p in packed if p is not None)

    def _begin(self, rows: int, first: Index) -> None:
        code = self.code
        self.units = code.alloc(rows, "float32", "units")  # of the rows
        self._configure()
        if not (isinstance(self.m, int) and self.m % rows == 0):
            with code.loop(rows, "serial", "i") as i:
                code.store(self.units, i, tirx.const(0.0, "float32"))

    def _weight_at(self, panel: Index, block: Index) -> Index:
        """Where a block of a panel begins, in f16."""
        return self.code.simplify((panel * self.depth + block * self.block) * (PARTS * COLUMNS))

    def _run(self, which: int, k: Index, here: Index, panel: Index, block: Index, turn: Index, coming: tuple[int, Index, Index],
             out: tuple[Index, Index] | None) -> None:  # fmt: skip
        """The block that comes next is asked for meanwhile."""
        code, steps, self.panel = self.code, self.block // STEP, panel
        mine = code.bind_index(self._weight_at(panel, block), "mine")
        at = code.bind_index(self._weight_at(*coming[1:]), "w")
        each = -(-self.block * COLUMNS * PARTS // (_LINE * self.group * steps))  # lines that a step asks for
        slots = len(ORDER) * 2 * self.tiles  # multiplications of a step
        vectors = self.side * COLUMNS // LANES
        sums = vectors // steps  # vectors of totals that a step adds to
        lines = -(-self.side * COLUMNS // (OUT_LINE * steps)) if out is not None else 0  # of the output, that a step asks for
        with code.loop(here, "serial", "io") as io:
            before = self._before(io, here)

            def step(s: Index, begin: Callable[[int], None] | None, io: Index = io, before: Index = before) -> None:
                x = code.bind_index(code.simplify((io * (self.tiles * self.steps) + k * steps + s) * HALVES), "x")
                w = code.bind_index(code.simplify(mine + s * (2 * PARTS * _ELEMENTS)), "y")
                line = w + _AHEAD if self.group == 1 else at + (io * steps + s) * (each * _LINE)
                line = code.bind_index(code.simplify(line), "line")
                free = 2 * self.tiles if begin is not None else 0  # slots in which sums are not yet all written

                def beside(n: int) -> None:
                    for q in _part(each if self.ahead else 0, n, slots):
                        code.prefetch(self.weights[coming[0]][0], code.simplify(line + q * _LINE))
                    for q in _part(sums, n - free, slots - free) if n >= free else ():
                        self._add(which, before, code.simplify(s * sums + q))
                    for q in _part(lines, n, slots):
                        assert out is not None
                        self._ask(out, io, code.simplify(s * lines + q))

                self._step(which, x, w, begin, beside)

            step(0, self._put)
            if steps > 1:
                with code.loop(steps - 1, "serial", "s") as s:
                    step(code.simplify(s + 1), None)
            for q in range(sums * steps, vectors):
                self._add(which, before, q)

    def _weight_tile(self, which: int, w: Index, part: int, c: int) -> tuple[Any, Index]:
        return self.weights[which][0], self.code.simplify(w + (part * 2 + c) * _ELEMENTS)

    def _add(self, which: int, place: Index, q: Index) -> None:
        """Times the units of its row and its columns."""
        code, per_row, total = self.code, COLUMNS // LANES, self.totals[which]
        at = self._total_at(place, q)
        row, c = code.div(q, per_row), code.mod(q, per_row)
        x = tirx.Broadcast(code.load(self.units, code.simplify(place * self.side + row)), LANES)
        y = self.weights[which][1][vector_at(code, self.panel * COLUMNS + c * LANES)]
        # the smaller one first: nothing leaves the range that the result is in
        code.emit(tirx.BufferStore(total, total[at] + self.acc[vector_at(code, q * LANES)] * tirx.min(x, y) * tirx.max(x, y), [at]))

    # --- the first factor ---------------------------------------------------------------------------------------------------

    def _split_left(self, row: Index, count: Index, chunk: Index) -> None:
        """The rows of a tile are written side by side: of one row after the other, every store would go to the same few places of the
        first-level cache."""
        code, mr, steps = self.code, self.mr, self.steps
        probe = Probe(self.args, {}, self.left)
        probe([0] * self.left.type.rank)
        kind = "serial" if probe.scalar_only else "vectorized"
        wide = steps * STEP + LANES  # of a row here: not a multiple of 4 KiB
        lines = code.alloc(mr * wide, "float32", "lines")
        ups = code.alloc(mr, "float32", "ups")
        with code.loop(code.ceildiv_plain(count, mr), "serial", "tile") as tile:
            start = code.bind_index(code.simplify(tile * mr), "start")
            here = mr if isinstance(count, int) and count % mr == 0 else code.bind_index(code.least(count - start, mr), "here")
            with code.loop(here, "serial", "i") as i:
                lead = self._lead(code.bind_index(code.simplify(row + start + i), "r"))
                line = code.bind_index(code.simplify(i * wide), "line")
                with code.loop(steps * STEP // LANES, "serial", "s") as s, code.loop(LANES, kind, "v") as v:
                    k = code.simplify(chunk * (steps * STEP) + s * LANES + v)
                    code.store(lines, code.simplify(line + s * LANES + v), self._left_at(lead, k) * code.load(self.shares, k))
                largest = self._largest(lines, line, steps * STEP // LANES)
                up = tirx.reinterpret("float32", tirx.const((254 + _TOP) << 23, "uint32") - tirx.reinterpret("uint32", largest))
                uneven = self._uneven(lines, line, steps * STEP // LANES, largest)
                code.store(ups, i, tirx.Select(uneven, tirx.const(float("nan"), "float32"), up))
                unit = tirx.reinterpret("float32", largest - tirx.const(_TOP << 23, "int32"))
                code.store(self.units, code.simplify(start + i), unit)
            with code.loop(steps, "serial", "s") as s:
                to = code.bind_index(code.simplify((tile * steps + s) * HALVES), "to")
                with code.loop(here, "serial", "i") as i:
                    up = code.bind(code.load(ups, i), "up")
                    with code.loop(LANES, "vectorized", "v") as v:
                        places = (code.simplify(i * wide + s * STEP + h * LANES + v) for h in range(2))
                        x, y = (code.bind(code.load(lines, at) * up, "x") for at in places)
                        for part, word in enumerate(pairs_of_halves(x, y)):
                            code.store(self.split_rows, code.simplify(to + part * WORDS + i * LANES + v), word)

    def _largest(self, lines: Any, line: Index, vectors: int) -> Any:
        """The bits, as i32, of the power of two below the largest magnitude of a row; of infinity, those of infinity."""
        code, count = self.code, 4
        while vectors % count:
            count //= 2
        held = code.alloc(count * LANES, "int32", "largest", scope="local")
        for q in range(count):
            code.emit(tirx.BufferStore(held, tirx.Broadcast(tirx.const(0, "int32"), LANES), [vector_at(code, q * LANES)]))
        with code.loop(vectors // count, "serial", "s") as s:
            for q in range(count):
                bits = keybytes.magnitude(lines[vector_at(code, line + (s * count + q) * LANES)])
                at = vector_at(code, q * LANES)
                code.emit(tirx.BufferStore(held, tirx.max(held[at], bits), [at]))
        most = held[vector_at(code, 0)]
        for q in range(1, count):
            most = tirx.max(most, held[vector_at(code, q * LANES)])
        top = tirx.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", most)
        power = tirx.bitwise_and(top, tirx.const(keybytes.INFINITE, "int32"))
        return code.bind(tirx.max(power, tirx.const(_LEAST, "int32")), "largest")

    def _uneven(self, lines: Any, line: Index, vectors: int, largest: Any) -> Any:
        """Whether more than half of a row's elements that are not zero are below 2**-17 of its largest."""
        code, at = self.code, vector_at(self.code, 0)
        held = code.alloc(LANES, "int32", "even", scope="local")
        code.emit(tirx.BufferStore(held, tirx.Broadcast(tirx.const(0, "int32"), LANES), [at]))
        with code.loop(vectors, "serial", "s") as s:
            bits = keybytes.magnitude(lines[vector_at(code, line + s * LANES)])
            code.emit(tirx.BufferStore(held, held[at] + keybytes.outweighed(bits, largest, 1, _SMALL), [at]))
        return tirx.GT(tirx.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", held[at]), tirx.const(0, "int32"))

    def _weight_vector(self, which: int, panel: Index, k: Index, c: int) -> Any:
        code, (weight, unit) = self.code, self.weights[which]
        step, pair, row = code.div(k, STEP), code.div(code.mod(k, STEP), TILE), code.mod(k, TILE)
        at = self._weight_at(panel, 0) + step * (2 * PARTS * _ELEMENTS) + row * (2 * LANES) + pair
        places = (tirx.Ramp(i64(code.simplify(at + (p * 2 + c) * _ELEMENTS)), i64(2), LANES) for p in range(PARTS))
        high, low = (weight[p].astype(f"float32x{LANES}") for p in places)
        share = tirx.Broadcast(code.load(self.shares, k), LANES)
        return (high + low) * share * unit[vector_at(code, panel * COLUMNS + c * LANES)]

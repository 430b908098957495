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
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.code import Code, Index
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.partsproduct import LANES, OUT_LINE, WORDS, PartsProduct, vector_at
from graphopt.backends.tvm.thirdform import COLUMNS, STEP, TILE, packed_panels
from graphopt.errors import BuildError
from graphopt.ir.graph import Graph

PARTS = 3
THIRDS = PARTS * WORDS  # of the three tiles that a tile of the first factor is split into
HIGH, MIDDLE, LOW = range(PARTS)
# (third of the first factor, of the weight), small products first; from one to the next at most two pairs of tiles change
ORDER = ((LOW, HIGH), (MIDDLE, HIGH), (MIDDLE, MIDDLE), (HIGH, MIDDLE), (HIGH, LOW), (HIGH, HIGH))
_UPPER, _HALF = 0xFFFF0000, 0x8000
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


class ThirdsKernel(PartsProduct):
    """See the module, and :class:`~graphopt.backends.tvm.partsproduct.PartsProduct`.

    Args: see :func:`graphopt.backends.tvm.thirdform.params`.
    """

    parts, order = PARTS, ORDER

    def __init__(self, graph: Graph, block: int, rows: int, group: int, chunk: int, panels: int, ahead: bool, parallel: bool) -> None:
        super().__init__(graph, block, rows, 2, group, chunk, panels, ahead, parallel)
        packed = [packed_panels(n.operands[1]) for n in self.nodes]
        if any(p is None for p in packed):
            raise BuildError("the second factor is not packed in panels")
        self.weights = [self.args.inputs[p] for p in packed if p is not None]

    def _begin(self, rows: int, first: Index) -> None:
        code = self.code
        self.split = code.alloc(2 * self._block_words(), "uint32", "split")
        self._configure()
        with code.loop(self.block, "serial", "u") as unit:
            self._split_unit(self.weights[0], self._weight_at(first, 0), 0, unit)

    def _block_words(self) -> int:
        return self.block // STEP * 2 * PARTS * WORDS

    def _weight_at(self, panel: Index, block: Index) -> Index:
        return self.code.simplify(panel * (self.depth * COLUMNS) + block * (self.block * COLUMNS))

    def _run(self, which: int, k: Index, here: Index, panel: Index, block: Index, turn: Index, coming: tuple[int, Index, Index],
             out: tuple[Index, Index] | None) -> None:  # fmt: skip
        """The block that comes next is split meanwhile."""
        code = self.code
        # which half of the scratch a block is in: they take turns over all blocks that a task goes through
        half = code.bind_index(code.mod(turn, 2), "half", 2)
        mine = code.bind_index(code.simplify(half * self._block_words()), "mine")
        other = code.bind_index(code.simplify((1 - half) * self._block_words()), "other")
        weight, at = self.weights[coming[0]], code.bind_index(self._weight_at(*coming[1:]), "w")
        steps = self.block // STEP
        slots = self.group * steps
        each = self.block // slots  # units that a step splits
        vectors = self.side * COLUMNS // LANES
        sums = vectors // steps  # vectors of totals that a step adds to
        lines = -(-self.side * COLUMNS // (OUT_LINE * steps)) if out is not None else 0  # of the output, that a step asks for
        with code.loop(here, "serial", "io") as io:
            before = self._before(io, here)

            def step(s: Index, begin: Callable[[int], None] | None, io: Index = io, before: Index = before) -> None:
                x = code.bind_index(code.simplify((io * (2 * self.steps) + k * steps + s) * THIRDS), "x")
                w = code.bind_index(code.simplify(mine + s * (2 * PARTS * WORDS)), "y")
                unit = code.simplify((io * steps + s) * each)

                def beside(slot: int) -> None:
                    n, within = divmod(slot, 4)
                    if within < 3:  # all of it is done behind the four multiplications of a product
                        return
                    for q in range(n, each, len(ORDER)):
                        self._split_unit(weight, at, other, code.simplify(unit + q))
                    for q in range(n, sums, len(ORDER)):
                        self._add(which, before, code.simplify(s * sums + q))
                    for q in range(n, lines, len(ORDER)):
                        assert out is not None
                        self._ask(out, io, code.simplify(s * lines + q))

                self._step(which, x, w, begin, beside)

            step(0, self._put)
            if steps > 1:
                with code.loop(steps - 1, "serial", "s") as s:
                    step(code.simplify(s + 1), None)
            for q in range(sums * steps, vectors):
                self._add(which, before, q)
        done = code.simplify(here * (steps * each))
        with code.loop(code.simplify(self.block - done), "serial", "u") as u:
            self._split_unit(weight, at, other, code.simplify(done + u))

    def _weight_tile(self, which: int, w: Index, part: int, c: int) -> tuple[Any, Index]:
        return self.split, self.code.simplify(w + (c * PARTS + part) * WORDS)

    def _add(self, which: int, place: Index, q: Index) -> None:
        at = self._total_at(place, q)
        self.code.emit(tirx.BufferStore(self.totals[which], self.totals[which][at] + self.acc[vector_at(self.code, q * LANES)], [at]))

    def _split_left(self, row: Index, count: Index, chunk: Index) -> None:
        """The rows of a tile are written side by side: of one row after the other, every store would go to the same few places of the
        first-level cache."""
        code, mr, steps = self.code, self.mr, self.steps
        probe = Probe(self.args, {}, self.left)
        probe([0] * self.left.type.rank)
        kind = "serial" if probe.scalar_only else "vectorized"
        with code.loop(code.ceildiv_plain(count, mr), "serial", "tile") as tile:
            first = code.bind_index(code.simplify(tile * mr), "first")
            here = mr if isinstance(count, int) and count % mr == 0 else code.bind_index(code.least(count - first, mr), "here")
            with code.loop(steps, "serial", "s") as s, code.loop(here, "serial", "i") as i:
                lead = self._lead(code.bind_index(code.simplify(row + first + i), "r"))
                start = code.bind_index(code.simplify((tile * steps + s) * THIRDS + i * LANES), "start")
                with code.loop(LANES, kind, "v") as v:
                    places = (code.simplify((chunk * steps + s) * STEP + half * LANES + v) for half in range(2))
                    x, y = (code.bind(self._left_at(lead, k), "x") for k in places)
                    for part, word in enumerate(pairs_of_thirds(x, y, 1)):
                        code.store(self.split_rows, code.simplify(start + part * WORDS + v), word)

    def _weight_vector(self, which: int, panel: Index, k: Index, c: int) -> Any:
        return self.weights[which][vector_at(self.code, self._weight_at(panel, 0) + k * COLUMNS + c * LANES)]

    def _split_unit(self, weight: Any, at: Index, to: Index, unit: Index) -> None:
        """Two rows by 16 columns of a block, 16 rows apart as the first factor's pairs are: side by side, for each third."""
        code = self.code
        pair, c = code.div(unit, 2), code.mod(unit, 2)
        step, row = code.div(pair, TILE), code.mod(pair, TILE)
        start = code.bind_index(code.simplify(at + (step * STEP + row) * COLUMNS + c * LANES), "from")
        if self.ahead:
            for half in range(2):
                code.prefetch(weight, code.simplify(start + _AHEAD + half * TILE * COLUMNS))
        tile = code.simplify((step * 2 + c) * (PARTS * WORDS) + row * LANES)
        split_pair(code, weight, start, self.split, code.bind_index(code.simplify(to + tile), "to"), apart=TILE)

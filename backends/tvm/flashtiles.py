"""Attention on AMX tiles: the running softmax of :mod:`flash`, with both products summed from bf16.

    scores [keys, queries]   =  K [keys, depth]     *  Q^T [depth, queries]
    sums [columns, queries] +=  V^T [columns, keys] *  P [keys, queries]

The second factor of a tile product holds pairs of neighbouring rows side by side, which is how queries are kept, and how weights are
written where they come from their registers; so neither K nor P is transposed, only V is. In f32 all four are split into exact
thirds (:mod:`thirds`), of whose products six count. In bf16, K and V are what they are, weights are rounded, and queries, which hold
the scale, are two parts.

Keys and values are split once for all queries of a task, so a task takes many. A block's products are summed by themselves, and then
added to what was summed before: a sum over thousands of keys in a row would lose digits.

Infinities have no thirds. Where keys, values or queries of a task are not all finite, it is done again by the vector units.

Reference: as in :mod:`flash` and :mod:`thirds`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.forms.flashform import Form
from graphopt.backends.tvm import amx, vecmath
from graphopt.backends.tvm.attended import Extra, Matrix
from graphopt.backends.tvm.code import Index, i64
from graphopt.backends.tvm.flash import F32, FlashKernel
from graphopt.backends.tvm.squares import transpose_square
from graphopt.backends.tvm.thirds import ORDER, thirds
from graphopt.ir import types
from graphopt.ir.graph import Graph

LANES = 16  # f32 of a vector; rows of a tile, and columns of a tile of sums
STEP = 32  # of the summed axis, of one tile product
WORDS = 16 * LANES  # of a tile, in words of 32 bits: a pair of bf16 each
HALVES = 2 * WORDS  # of a tile, in bf16
_INFINITE = 0x7F800000
_ROUND = 0x8000


def bf16_parts(x: Any, count: int) -> list[Any]:
    """f32 as so many bf16, in the upper halves of words: exact thirds, the first two of them, or the nearest one."""
    if count > 1:
        return list(thirds(x, 1)[:count])
    return [tirx.reinterpret("uint32", x) + tirx.const(_ROUND, "uint32")]


class FlashTilesKernel(FlashKernel):
    """Emits a region with one attention of f32 or bf16, whose heads are multiples of 32.

    Args: see :class:`~graphopt.backends.tvm.flash.FlashKernel`.
    """

    def __init__(self, graph: Graph, form: Form, block: int, groups: int, parallel: bool) -> None:
        super().__init__(graph, form, LANES, 2, STEP, block, groups, 4, False, parallel)
        exact = form.out.dtype == types.f32
        # pairs of parts that are multiplied, (of K, of Q) and (of V, of P), small products first
        self.orders: tuple[Sequence[tuple[int, int]], ...] = (ORDER, ORDER) if exact else (((0, 1), (0, 0)), ((0, 0),))
        self.parts_of_k, self.parts_of_q, self.parts_of_v, self.parts_of_p = (
            1 + max(pair[side] for pair in order) for order in self.orders for side in range(2)
        )
        self.held = 1
        self.steps, self.columns = self.depth // STEP, self.width // LANES

    def _task(self, count: Index) -> None:
        code = self.code
        self._alloc()
        keys, values = self._matrices()
        steps = self.block // STEP
        self.queries = code.alloc(self.groups * self.steps * 2 * self.parts_of_q * WORDS, "uint32", "q")
        self.keys = code.alloc(steps * self.steps * 2 * self.parts_of_k * HALVES, "uint16", "k")
        self.values = code.alloc(steps * self.columns * self.parts_of_v * HALVES, "uint16", "v")
        self.weights = code.alloc(steps * 2 * self.parts_of_p * WORDS, "uint32", "p")
        self.acc = code.alloc(STEP * self.nr, F32, "acc")
        self.largest = code.alloc(LANES, "int32", "largest")
        with code.loop(LANES, "vectorized", "v") as v:
            code.store(self.largest, v, tirx.const(0, "int32"))
        staged = [None if m.plain and code.equal(m.columns, 1) else m.staged(self.block, LANES) for m in (keys, values)]

        def fill(base: Index, here: Index) -> tuple[Matrix, Matrix]:
            k, v = (copy.fill(m, base, here) if copy is not None else m.moved(base) for m, copy in zip((keys, values), staged))
            self._split_keys(k, here)
            self._split_values(v, here)
            return k, v

        amx.configure(code, dict.fromkeys(range(8), amx.ROWS))
        self._blocks(count, fill)
        amx.release(code)
        most = tirx.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", self.largest[tirx.Ramp(i64(0), i64(1), LANES)])
        with code.when(most >= tirx.const(_INFINITE, "int32")):
            self._by_vectors()._task(count)

    def _by_vectors(self) -> FlashKernel:
        """The kernel of the vector units, for the same task."""
        out = object.__new__(FlashKernel)
        out.__dict__.update(self.__dict__)
        out.__dict__.update(mr=8, held=self.groups, stage=False, extra=Extra(self.args, self.form, self.fill))
        return out

    # --- splitting ------------------------------------------------------------------------------------------------------------

    def _note(self, x: Any, v: Index) -> Any:
        """The element x of lane v, noted for :meth:`_task` to see whether all of them are finite."""
        code = self.code
        bits = tirx.bitwise_and(tirx.reinterpret("int32", x), tirx.const(0x7FFFFFFF, "int32"))
        code.store(self.largest, v, tirx.max(code.load(self.largest, v), bits))
        return x

    def _lane(self) -> Any:
        return self.code.loop(LANES, "vectorized", "v")

    def _store_pair(self, even: Any, odd: Any, to: Any, place: Index, parts: int) -> None:
        """An element of an even row and the one below it, side by side, for each part."""
        code, shift, upper = self.code, tirx.const(16, "uint32"), tirx.const(0xFFFF0000, "uint32")
        for part, (a, b) in enumerate(zip(bf16_parts(even, parts), bf16_parts(odd, parts), strict=True)):
            word = tirx.bitwise_or(tirx.shift_right(a, shift), tirx.bitwise_and(b, upper))
            code.store(to, code.simplify(place + part * WORDS), word)

    def _pair_place(self, pair: Index, tile: int, parts: int) -> Index:
        """Where a pair of rows of the queries or weights of a group lies, ``[step, tile, part, 16 pairs, 16]``."""
        code = self.code
        return code.simplify((code.div(pair, 16) * 2 + tile) * (parts * WORDS) + code.mod(pair, 16) * LANES)

    def _begin(self, g: Index) -> None:
        super()._begin(g)
        code, nr = self.code, self.nr
        group = code.simplify(g * (self.steps * 2 * self.parts_of_q * WORDS))
        with code.loop(self.depth // 2, "serial", "p") as p:
            for tile in range(2):
                place = code.bind_index(code.simplify(group + self._pair_place(p, tile, self.parts_of_q)), "to")
                with self._lane() as v:
                    at = code.simplify(p * (2 * nr) + tile * LANES + v)
                    even, odd = (self._note(code.bind(code.load(self.qt, code.simplify(at + i * nr))), v) for i in range(2))
                    self._store_pair(even, odd, self.queries, code.simplify(place + v), self.parts_of_q)

    def _store_parts(self, x: Any, to: Any, place: Index, parts: int) -> None:
        code = self.code
        for part, word in enumerate(bf16_parts(x, parts)):
            half = tirx.shift_right(word, tirx.const(16, "uint32")).astype("uint16")
            code.store(to, code.simplify(place + part * HALVES), half)

    def _split_keys(self, k: Matrix, here: Index) -> None:
        """A block of keys, as tiles ``[keys / 32, depth / 32, 2, part, 16, 32]``."""
        code, parts = self.code, self.parts_of_k
        with code.loop(here, "serial", "i") as i:
            start = k.row(i)
            tile = code.simplify(code.div(i, STEP) * (self.steps * 2) + code.div(code.mod(i, STEP), LANES))
            to = code.bind_index(code.simplify(tile * (parts * HALVES) + code.mod(i, LANES) * STEP), "to")
            for s in range(self.steps):
                for u in range(0, STEP, LANES):
                    with self._lane() as v:
                        x = self._note(code.bind(k.at(start, 0, code.simplify(s * STEP + u + v))), v)
                        self._store_parts(x, self.keys, code.simplify(to + s * (2 * parts * HALVES) + u + v), parts)

    def _split_values(self, m: Matrix, here: Index) -> None:
        """A block of values, transposed, as tiles ``[keys / 32, columns / 16, part, 16, 32]``; keys behind the last repeat it."""
        code, parts = self.code, self.parts_of_v
        squares = code.simplify(code.ceildiv_plain(here, STEP) * 2)
        with code.loop(squares, "serial", "sr") as r, code.loop(self.columns, "serial", "sc") as c:
            rows = []
            for i in range(LANES):
                row = code.simplify(r * LANES + i)
                start = m.row(row if isinstance(here, int) and here % STEP == 0 else code.least(row, here - 1))
                rows.append(code.bind(m.buffer[tirx.Ramp(i64(code.simplify(start + c * LANES)), i64(1), LANES)], "row"))
            tile = code.simplify(code.div(r, 2) * self.columns + c)
            to = code.bind_index(code.simplify(tile * (parts * HALVES) + code.mod(r, 2) * LANES), "to")
            square = code.alloc(LANES * LANES, F32, "square")
            for j, x in enumerate(transpose_square(code, rows, LANES)):
                code.emit(tirx.BufferStore(square, x, [tirx.Ramp(i64(j * LANES), i64(1), LANES)]))
            for j in range(LANES):
                with self._lane() as v:
                    x = self._note(code.bind(code.load(square, code.simplify(j * LANES + v))), v)
                    self._store_parts(x, self.values, code.simplify(to + j * STEP + v), parts)

    # --- products -------------------------------------------------------------------------------------------------------------

    def _step(self, order: Sequence[tuple[int, int]], a: Any, a_at: Callable[[int, int], Index], b: Any,
              b_at: Callable[[int, int], Index]) -> None:  # fmt: skip
        """32 of the summed axis, all products of parts of 2 x 2 tiles. Tiles 0 to 3 are sums, 4 and 5 of ``a``, 6 and 7 of ``b``."""
        code, held = self.code, (-1, -1)
        for p, q in order:
            for i in range(2):
                if held[0] != p:
                    amx.load(code, 4 + i, a, code.simplify(a_at(i, p)), STEP * 2)
            for c in range(2):
                if held[1] != q:
                    amx.load(code, 6 + c, b, code.simplify(b_at(c, q)), LANES * 4)
            held = (p, q)
            for i in range(2):
                for c in range(2):
                    amx.multiply(code, 2 * i + c, 4 + i, 6 + c)

    def _sum_tiles(self, to: Any, at: Index, body: Callable[[], None]) -> None:
        """What ``body`` multiplies, summed into 32 rows of ``to``."""
        for t in range(4):
            amx.zero(self.code, t)
        body()
        for i in range(2):
            for c in range(2):
                place = self.code.simplify(at + i * LANES * self.nr + c * LANES)
                amx.store(self.code, 2 * i + c, to, place, self.nr * 4)

    def _tiles(self, count: Index) -> Index:
        tiles = self.code.ceildiv_plain(count, STEP)
        return tiles if isinstance(tiles, int) else self.code.bind_index(tiles, "tiles")

    def _products(self, g: Index, low: Index, count: Index, k: Matrix) -> None:
        code, pk, pq = self.code, self.parts_of_k, self.parts_of_q
        group = code.bind_index(code.simplify(g * (self.steps * 2 * pq * WORDS)), "group")
        with code.loop(self._tiles(count), "serial", "t") as t:
            row = code.bind_index(code.simplify(low + t * STEP), "row")
            x = code.bind_index(code.simplify(code.div(row, STEP) * (self.steps * 2 * pk * HALVES)), "x")

            def body(x: Index = x) -> None:
                with code.loop(self.steps, "serial", "s") as s:
                    self._step(self.orders[0], self.keys, lambda i, p: x + ((s * 2 + i) * pk + p) * HALVES,
                               self.queries, lambda c, q: group + ((s * 2 + c) * pq + q) * WORDS)  # fmt: skip

            self._sum_tiles(self.scores, code.simplify(row * self.nr), body)

    def _exponentials(self, row: Index, low: Index, count: Index, top: Any, total: Any) -> None:
        """Also splits them into ``weights``: pairs of keys, zeros behind the last one."""
        code, nr = self.code, self.nr
        tiles = self._tiles(count)
        left = code.simplify(tiles * STEP - count)
        if not (isinstance(left, int) and left == 0):
            with code.loop(left, "serial", "n") as n:
                for at in self._lanes():
                    code.store(self.scores, code.simplify((low + count + n) * nr + at), tirx.const(float("-inf"), F32))
        with code.loop(code.simplify(tiles * (STEP // 2)), "serial", "p") as p:
            start = code.bind_index(code.simplify((low + p * 2) * nr), "start")
            columns = [self.dropped.column(code.simplify(low + p * 2 + i)) for i in range(2)]
            for tile in range(2):
                place = code.bind_index(self._pair_place(p, tile, self.parts_of_p), "to")
                with self._lane() as v:
                    at = code.simplify(tile * LANES + v)
                    differ = [code.load(self.scores, code.simplify(start + i * nr + at)) - code.load(top, at) for i in range(2)]
                    even, odd = (code.bind(vecmath.exp2_shifted(code.bind, code.bind(x))) for x in differ)
                    code.store(total, at, code.load(total, at) + (even + odd))
                    even, odd = (self.dropped.kept(code.simplify(row + at), c)(x) for c, x in zip(columns, (even, odd), strict=True))
                    self._store_pair(even, odd, self.weights, code.simplify(place + v), self.parts_of_p)

    def _sums(self, g: Index, low: Index, count: Index, again: Any, v: Matrix) -> None:
        code, nr, pv, pp = self.code, self.nr, self.parts_of_v, self.parts_of_p
        sums_of = code.bind_index(code.simplify(g * (self.wide * nr)), "sums")
        first, tiles = code.bind_index(code.div(low, STEP), "first"), self._tiles(count)
        with code.loop(self.columns // 2, "serial", "e") as e:

            def body() -> None:
                with code.loop(tiles, "serial", "s") as s:
                    x = code.bind_index(code.simplify(((first + s) * self.columns + e * 2) * (pv * HALVES)), "x")
                    y = code.bind_index(code.simplify(s * (2 * pp * WORDS)), "y")
                    self._step(self.orders[1], self.values, lambda i, p: x + (i * pv + p) * HALVES,
                               self.weights, lambda c, q: y + (c * pp + q) * WORDS)  # fmt: skip

            self._sum_tiles(self.acc, 0, body)
            with code.loop(STEP, "serial", "i") as i:
                for at in self._lanes():
                    place = code.simplify(sums_of + (e * STEP + i) * nr + at)
                    own = code.load(self.acc, code.simplify(i * nr + at))
                    code.store(self.ot, place, code.load(self.ot, place) * code.load(again, at) + own)

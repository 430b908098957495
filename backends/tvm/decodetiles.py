"""Attention of few queries over keys and values of small integers, multiplied as integers on AMX tiles.

    scores [keys, queries and parts]   =  K [keys, depth]             *  Q^T [depth, queries and parts]
    sums [queries and parts, columns] +=  P [queries and parts, keys] *  V [keys, columns]

Queries, and the weights of a block times the values' scales, become integers of 30 bits and a sign, counted from the power of two below
the largest of a row, and those are four bytes each: the products of bytes are exact in i32, and so is each sum as f32, of which four
are put together at the end. What that loses is 2**-30 of the largest number of a row, and nothing of those above 2**-6 of it: tokens
that are hidden, or whose weight is next to nothing, take no digits of the others, whatever their scales are; a query's outlier of more
than 2**10 times the other elements does, and so does such a token to those columns in which its value is zero; so do numbers below
2**-90. With as many multiplications as there are parts, tiles still take a fraction of the time of vectors of floats, of which each key
takes one multiply-add a query.

Keys are the rows of a tile as they lie in memory. Values are interleaved, four rows' bytes in a word, as the second factor of a tile
product has them; their columns are in another order then, to which the result's places are put right. Integers of 4 bits, rows of
pages, and what is left over behind the last 64 keys of a block are copied to scratch first.

A row with a query or a weight that is no number, or infinite, is nan: integers cannot tell what it is.

Reference: as in :mod:`decode` and :mod:`amx`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.forms.flashform import Form
from graphopt.backends.tvm import amx, keybytes, vecmath
from graphopt.backends.tvm.attended import F32, head_index
from graphopt.backends.tvm.code import Index, i64
from graphopt.backends.tvm.decode import MAX, SUM, DecodeKernel
from graphopt.backends.tvm.keybytes import BYTES, LANES, PARTS, ByteRows
from graphopt.backends.tvm.keyrows import Rows
from graphopt.backends.tvm.loops import vector_loop
from graphopt.backends.tvm.monoid import combine, combine_each
from graphopt.errors import BuildError
from graphopt.ir.graph import Graph

TILE = amx.ROWS * BYTES  # bytes of a tile
GROUP = amx.ROWS // PARTS  # queries of a tile
STEP = BYTES  # keys that are summed at once
TILES = STEP // amx.ROWS  # of keys, or of columns, side by side

# Memory is asked evenly, in the order in which it will be needed: of each step's values so many beside the scores, the rest beside the
# weights, and so many of the keys of the next block; the rest beside the values. Not at once: too many lines are under way then
_SOON, _LATER = 48, 32


class DecodeTilesKernel(DecodeKernel):
    """Emits a region with one attention of few queries over integers.

    Args: see :class:`~graphopt.backends.tvm.decode.DecodeKernel`.
        block: keys, a multiple of 64, of at most 512: sums of more products of bytes would not be exact as f32.
        ahead: whether memory is asked for what the next block needs.
    """

    def __init__(self, graph: Graph, form: Form, block: int, ahead: bool, splits: int, parallel: bool, abreast: bool = False) -> None:
        super().__init__(graph, form, LANES, 1, 1, block, ahead, splits, parallel, abreast)
        if len(self.keys_of) + len(self.values_of) > 2 or any(p[0][1].integers is None for p in (self.keys_of, self.values_of)):
            raise BuildError("keys or values that are not integers of one piece")
        self.key_bytes, self.value_bytes = (ByteRows(p[0][1]) for p in (self.keys_of, self.values_of))
        self.key_order = lambda u, v: self.key_bytes.element(u + v)
        self.value_order = self._value_order
        self.chunks, self.groups = self.depth // BYTES, -(-self.rows // GROUP)  # of a row of keys; of queries
        self.step = block + self.lanes  # of a row of scores

    def _value_order(self, place: int, lane: Index) -> Index:
        """The element of a row of values at a place of its sums: see :func:`~graphopt.backends.tvm.keybytes.interleave`."""
        start, four = place // BYTES * BYTES, i64(PARTS)
        column = tirx.floordiv(i64(lane), four) * LANES + (place - start) // LANES * PARTS + tirx.floormod(i64(lane), four)
        return self.value_bytes.element(start + column)

    def _part(self, lead: Sequence[Index], number: Index, first: Index, last: Index) -> None:
        code, heads = self.code, self.abreast
        self.query_bytes = code.alloc(heads * self.groups * self.chunks * TILE, "int8", "query_bytes")
        self.query_units = code.alloc(heads * self.rows, F32, "query_units")
        self.tops = code.alloc(heads * LANES, F32, "tops")  # the largest score of each row, in a lane
        self.totals = code.alloc(heads * self.rows * LANES, F32, "totals")  # sums of weights, of each row in all lanes
        self.of_rows = {name: code.alloc(LANES, F32, name) for name in ("again", "shift", "up", "unit")}
        self.copied = code.alloc(STEP * max(self.depth, self.width), "int8", "copied")
        self.scales = {name: code.alloc(self.block, F32, f"{name}_scales") for name in ("key", "value")}
        self.products = code.alloc(STEP * LANES, "int32", "products")
        self.weights = code.alloc(self.groups * self.block // STEP * TILE, "int8", "weights")
        self.mixed = code.alloc(TILES * TILE // 2, "int16", "mixed")
        for buffer, size, value in ((self.tops, heads, float("-inf")), (self.totals, heads * self.rows, 0.0)):
            for n in range(size):
                self._set(buffer, n * LANES, tirx.const(value, F32))
        amx.configure(code, dict.fromkeys(range(8), amx.ROWS))
        super()._part(lead, number, first, last)
        amx.release(code)
        with code.loop(heads, "serial", "g") as g:
            at = code.bind_index(code.simplify((number + g * self.splits) * (self.rows * self.record)), "part")
            for r in range(self.rows):
                own = code.alloc(LANES, F32, "total")
                self._write(own, 0, self.totals[self._vector((g * self.rows + r) * LANES)])
                place = code.simplify(at + r * self.record + self.width)
                code.store(self.parts, place, code.load(self.tops, code.simplify(g * LANES + r)))
                code.store(self.parts, place + 1, combine(code, own, LANES, LANES, SUM))

    def _block(self, lead: Sequence[Index], queries: Any, start: Index, scores: Any, at: Index, base: Index, here: Index) -> None:
        code = self.code
        head = code.bind_index(code.div(start, self.rows * self.depth), "own")
        of_keys, of_values = (head_index(code, self.form, x, self._lead(lead, 0)) for x in (self.form.parts.k, self.form.parts.v))
        steps, end = (code.bind_index(n, name) for n, name in (
            (code.ceildiv_plain(here, STEP), "steps"), (code.simplify(code.ceildiv_plain(here, STEP) * STEP), "end")))  # fmt: skip
        self._read_scales("key", self.keys_of[0][1], of_keys, base, here, end)
        self._read_scales("value", self.values_of[0][1], of_values, base, here, end)
        with code.loop(steps, "serial", "s") as s:
            self._key_step(scores, s, head, of_keys, of_values, base, here)
        self._change_all(lead, scores, base, here)
        with code.loop(code.simplify(end - here), "serial", "n") as n:
            for r in range(self.rows):
                code.store(scores, code.simplify(r * self.step + here + n), tirx.const(float("-inf"), F32))
        self._new_tops(scores, head, steps)
        largest = [code.alloc(LANES, "int32", "largest") for _ in range(self.rows)]
        for x in largest:
            self._write(x, 0, tirx.Broadcast(tirx.const(0, "int32"), LANES))
        with code.loop(steps, "serial", "s") as s:
            row = code.bind_index(code.simplify(base + s * STEP), "row")
            for r in range(self.rows):

                def ask(share: tuple[int, int], row: Index = row) -> None:
                    self._ask(_SOON, STEP, share, self.value_bytes, of_values, row)
                    self._ask(0, _LATER, share, self.key_bytes, of_keys, code.simplify(row + self.block))

                self._weigh(scores, r, s, head, largest[r], ask)
        self._new_units(largest)
        with code.loop(steps, "serial", "s") as s:
            for r in range(self.rows):
                self._weight_bytes(scores, r, s)
        for chunk in range(self.width // BYTES):
            self._sum(chunk, steps, of_keys, of_values, base, here, at)

    # --- rows as integers -----------------------------------------------------------------------------------------------------

    def _queries(self, lead: Sequence[Index], queries: Any, start: Index) -> None:
        """Also as bytes, ``[group, chunk, 16 fours of the depth, part, 4 queries, 4]``: those of unused queries hold anything."""
        super()._queries(lead, queries, start)
        code = self.code
        head = code.bind_index(code.div(start, self.rows * self.depth), "own")
        for r in range(self.rows):
            row, largest = code.simplify(start + r * self.depth), code.alloc(LANES, "int32", "largest")
            for u in range(0, self.depth, LANES):
                bits = keybytes.magnitude(queries[self._vector(row + u)])
                self._write(largest, 0, tirx.max(bits, largest[self._vector(0)]) if u else bits)
            most = tirx.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", largest[self._vector(0)])
            up, unit = keybytes.units(code.bind(keybytes.exponent(code.bind(most)), "power"))
            up = tirx.Broadcast(code.bind(up, "up"), LANES)
            code.store(self.query_units, code.simplify(head * self.rows + r), unit)
            group, query = divmod(r, GROUP)
            to = code.bind_index(code.simplify((head * self.groups + group) * (self.chunks * TILE) + query * 4), "to")
            for u in range(0, self.depth, LANES):
                parts = self._named(keybytes.parts(queries[self._vector(row + u)], up))
                for four in range(LANES // 4):
                    fours = code.simplify(to + u // BYTES * TILE + (u % BYTES // 4 + four) * BYTES)
                    for part in range(PARTS):
                        x = tirx.Shuffle([parts], [(four * 4 + i) * PARTS + part for i in range(4)])
                        code.emit(tirx.BufferStore(self.query_bytes, x, [self._ramp(code.simplify(fours + part * (4 * GROUP)), 4)]))

    def _read_scales(self, name: str, rows: Rows, lead: Sequence[Index], base: Index, here: Index, end: Index) -> None:
        """A block's scales, zeros behind them."""
        code, to = self.code, self.scales[name]
        vector_loop(code, 0, here, LANES, lambda n: code.store(to, n, rows.scale([*lead, code.simplify(base + n), 0])), overlap=False)
        with code.loop(code.simplify(end - here), "serial", "n") as n:
            code.store(to, code.simplify(here + n), tirx.const(0.0, F32))

    def _rows_of_step(self, rows: ByteRows, lead: Sequence[Index], base: Index, here: Index, s: Index,
                      use: Callable[[Any, Index, Index], None]) -> None:  # fmt: skip
        """Call ``use`` with where the rows of a step are (buffer, place, from one to the next): in memory, or copied.

        Behind the last row copies hold what was there before.
        """
        code = self.code
        row = code.bind_index(code.simplify(base + s * STEP), "row")
        count = code.bind_index(code.least(here - s * STEP, STEP), "count")

        def copy() -> None:
            with code.loop(count, "serial", "n") as n:
                rows.copy([*lead, code.bind_index(code.simplify(row + n), "row")], self.copied, code.simplify(n * rows.size))
            use(self.copied, 0, rows.size)

        place = rows.in_place(lead, row)
        if place is not None:
            whole = tirx.EQ(i64(count), i64(STEP))
            with code.when(whole):
                use(*place)
            with code.when(tirx.Not(whole)):
                copy()
        else:
            copy()

    def _ask(self, first: int, last: int, share: tuple[int, int], rows: ByteRows, lead: Sequence[Index], start: Index) -> None:
        """Ask for a share, (which of how many), of the rows ``first .. last - 1`` of a step that begins at ``start``."""
        n, count = share
        for i in range(first + (last - first) * n // count, first + (last - first) * (n + 1) // count) if self.ahead else ():
            if i % max(1, BYTES * rows.rows.per_word // rows.size) == 0:  # the first one of a line
                rows.rows.fetch(lambda k: [*lead, k], self.code.simplify(start + (i - 1)), 1, range(rows.size))

    # --- scores ---------------------------------------------------------------------------------------------------------------

    def _key_step(self, scores: Any, s: Index, head: Index, lead: Sequence[Index], of_values: Sequence[Index], base: Index,
                  here: Index) -> None:  # fmt: skip
        """Scores of 64 keys; in a group of queries, columns of a tile of sums are ``[part, query]``."""
        code = self.code
        row = code.bind_index(code.simplify(base + s * STEP), "row")
        for group in range(self.groups):

            def multiply(buffer: Any, place: Index, step: Index, group: int = group) -> None:
                for t in range(TILES):
                    amx.zero(code, t)
                for c in range(self.chunks):
                    at = code.simplify(((head * self.groups + group) * self.chunks + c) * TILE)
                    amx.load(code, 7, self.query_bytes, at, BYTES)
                    for t in range(TILES):
                        amx.load(code, 4 + t % 2, buffer, code.simplify(place + t * amx.ROWS * step + c * BYTES), step)
                        amx.multiply_bytes(code, t, 4 + t % 2, 7)

            if group == 0 or self.key_bytes.in_place(lead, row) is not None:
                self._rows_of_step(self.key_bytes, lead, base, here, s, multiply)
            else:
                multiply(self.copied, 0, self.depth)
            for t in range(TILES):
                amx.store(code, t, self.products, t * amx.ROWS * LANES, LANES * 4)
            of_group = self._queries_of(group)
            units = [tirx.Broadcast(code.bind(code.load(self.query_units, code.simplify(head * self.rows + r))), LANES) for r in of_group]
            for t in range(TILES):
                near = code.simplify(s * STEP + t * amx.ROWS)
                scale = self._named(self.scales["key"][self._vector(near)])
                mixed = []
                for i in range(4):
                    if group == 0:
                        self._ask(0, _SOON, (t * 4 + i, TILES * 4), self.value_bytes, of_values, row)
                    keys = [self._named(self.products[self._vector((t * amx.ROWS + i + 4 * n) * LANES)]) for n in range(4)]
                    mixed.append(self._named(keybytes.from_parts(keybytes.transpose_quarters(code, keys, LANES))))
                for r, unit, x in zip(of_group, units, keybytes.transpose_words(code, mixed)):  # of fewer queries the rest is nothing
                    self._write(scores, code.simplify(r * self.step + near), x * unit * scale)

    def _queries_of(self, group: int) -> range:
        return range(group * GROUP, min(self.rows, (group + 1) * GROUP))

    def _new_tops(self, scores: Any, head: Index, steps: Index) -> None:
        """What a block's largest scores change: sums are multiplied by ``again``; from scores, ``shift`` is taken off."""
        code, low, zero = self.code, self._splat(float("-inf")), self._splat(0.0)
        most = [code.alloc(LANES, F32, "most") for _ in range(self.rows)]
        for x in most:
            self._write(x, 0, low)
        with code.loop(code.simplify(steps * TILES), "serial", "n") as n:
            for r, x in enumerate(most):
                self._write(x, 0, tirx.max(scores[self._vector(r * self.step + n * LANES)], x[self._vector(0)]))
        (own,) = combine_each(code, [x[self._vector(0)] for x in most], LANES, MAX)
        place = self._vector(head * LANES)
        old = self._named(self.tops[place])
        new = code.bind(tirx.max(own, old))
        shift = code.bind(tirx.Select(tirx.EQ(new, low), zero, new))
        again = self._power(old - shift)
        code.emit(tirx.BufferStore(self.tops, new, [place]))
        for name, x in (("again", again), ("shift", shift)):
            self._write(self.of_rows[name], 0, x)

    def _new_units(self, largest: Sequence[Any]) -> None:
        """From the bits of a block's largest weights times scales: they are integers when multiplied by ``up``, whose highest part counts
        ``unit``. A bound that knows no weights, such as the largest scale, would let hidden tokens take the digits of the others."""
        code = self.code
        for r, x in enumerate(largest):
            most = code.bind(tirx.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", x[self._vector(0)]), "most")
            up, unit = keybytes.units(code.bind(keybytes.exponent(most), "power"))
            code.store(self.of_rows["up"], r, up)
            code.store(self.of_rows["unit"], r, unit)

    def _of_row(self, name: str, r: int) -> Any:
        return tirx.Broadcast(self.code.bind(self.code.load(self.of_rows[name], r), name), LANES)

    def _weigh(self, scores: Any, r: int, s: Index, head: Index, largest: Any, ask: Callable[[tuple[int, int]], None]) -> None:
        """A row's weights of 64 keys, times the values' scales, in the place of scores; the bits of the largest, in ``largest``."""
        code, shift, total = self.code, self._of_row("shift", r), None
        for u in range(0, STEP, LANES):
            near = code.simplify(s * STEP + u)
            ask((r * TILES + u // LANES, self.rows * TILES))
            e = self._power(scores[self._vector(r * self.step + near)] - shift)
            total = e if total is None else total + e
            share = self._named(e * self.scales["value"][self._vector(near)])
            self._write(scores, r * self.step + near, share)
            self._write(largest, 0, tirx.max(keybytes.magnitude(share), largest[self._vector(0)]))
        at = self._vector((head * self.rows + r) * LANES)
        again = tirx.Select(tirx.EQ(i64(s), i64(0)), code.load(self.of_rows["again"], r), tirx.const(1.0, F32))
        code.emit(tirx.BufferStore(self.totals, self.totals[at] * tirx.Broadcast(code.bind(again), LANES) + total, [at]))

    def _weight_bytes(self, scores: Any, r: int, s: Index) -> None:
        """What :meth:`_weigh` left of 64 keys, as bytes ``[group, step, 4 queries, part, 64 keys]``."""
        code, up, parts = self.code, self._of_row("up", r), []
        for u in range(0, STEP, LANES):
            whole = self._named(keybytes.parts(scores[self._vector(r * self.step + s * STEP + u)], up))
            parts.append(self._named(tirx.Shuffle([whole], [i * PARTS + p for p in range(PARTS) for i in range(LANES)])))
        group, query = divmod(r, GROUP)
        to = code.simplify((group * (self.block // STEP) + s) * TILE + query * (PARTS * BYTES))
        for p, x in enumerate(keybytes.transpose_quarters(code, parts, BYTES)):
            code.emit(tirx.BufferStore(self.weights, x, [self._ramp(code.simplify(to + p * BYTES), BYTES)]))

    # --- values ---------------------------------------------------------------------------------------------------------------

    def _sum(self, chunk: int, steps: Index, of_keys: Sequence[Index], lead: Sequence[Index], base: Index, here: Index,
             part: Index) -> None:  # fmt: skip
        """Add weights times 64 columns of a block of values to the sums."""
        code, each = self.code, (STEP - _LATER) // (STEP // 4)
        for group in range(self.groups):
            for t in range(TILES):
                amx.zero(code, t)
            with code.loop(steps, "serial", "s") as s:

                def mix(buffer: Any, place: Index, step: Index, s: Index = s, asks: bool = group == chunk == 0) -> None:
                    with code.loop(STEP // 4, "serial", "m") as m:
                        if asks:
                            row = code.simplify(base + self.block + s * STEP + _LATER + m * each)
                            self._ask(0, each, (0, 1), self.key_bytes, of_keys, row)
                        at = code.bind_index(code.simplify(place + m * (4 * step) + chunk * BYTES), "from")
                        rows = [self._named(buffer[self._ramp(code.simplify(at + i * step), BYTES)]) for i in range(4)]
                        for tile, x in enumerate(keybytes.interleave(code, rows)):
                            to = code.simplify(tile * (TILE // 2) + m * (BYTES // 2))
                            code.emit(tirx.BufferStore(self.mixed, x, [self._ramp(to, BYTES // 2)]))

                self._rows_of_step(self.value_bytes, lead, base, here, s, mix)
                amx.load(code, 4, self.weights, code.simplify((group * (self.block // STEP) + s) * TILE), BYTES)
                for t in range(TILES):
                    amx.load(code, 5 + t % 2, self.mixed, t * (TILE // 2), BYTES)
                    amx.multiply_bytes(code, t, 4, 5 + t % 2)
            for t in range(TILES):
                amx.store(code, t, self.products, t * amx.ROWS * LANES, LANES * 4)
            for i, r in enumerate(self._queries_of(group)):
                again, unit = self._of_row("again", r), self._of_row("unit", r)
                for u in range(TILES):
                    found = [self.products[self._vector((u * amx.ROWS + i * PARTS + p) * LANES)] for p in range(PARTS)]
                    at = code.simplify(part + r * self.record + chunk * BYTES + u * LANES)
                    self._write(self.parts, at, self.parts[self._vector(at)] * again + keybytes.from_parts(found) * unit)

    # --- vectors --------------------------------------------------------------------------------------------------------------

    def _power(self, x: Any) -> Any:
        """2**x of a vector."""
        code, held = self.code, self.code.alloc(LANES, F32, "power")
        self._write(held, 0, x)
        with code.loop(LANES, "vectorized", "v") as v:
            code.store(held, v, vecmath.exp2_shifted(code.bind, code.bind(code.load(held, v))))
        return self._named(held[self._vector(0)])

    def _named(self, x: Any) -> Any:
        return self.code.bind(x, "x", hidden=False)

    def _splat(self, x: float) -> Any:
        return tirx.Broadcast(tirx.const(x, F32), LANES)

    def _vector(self, at: Index) -> Any:
        return self._ramp(self.code.simplify(at), LANES)

    def _write(self, buffer: Any, at: Index, x: Any) -> None:
        self.code.emit(tirx.BufferStore(buffer, x, [self._vector(at)]))

    def _set(self, buffer: Any, at: Index, x: Any) -> None:
        self._write(buffer, at, tirx.Broadcast(x, LANES))

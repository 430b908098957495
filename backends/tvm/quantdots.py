"""Products of one row with a weight of small integers, by dot instructions of bytes (VPDPBUSD).

A row of floats is four bytes an element (:mod:`keybytes`), counted from the power of two below the largest of each span of rows that is
summed by itself: a group, or a block. Each product of bytes is exact, and so are sums of them; four of them, put together, are what
the sum of the products is, rounded once. For four rows by 16 columns that is one instruction a part, where floats take a shift, a
look-up and a multiply-add for each row.

Integers stand in words, every other row of 4 bits (every fourth of 2) in a word's bytes once the others are masked: elements of the
first factor are put into that order. Instructions multiply bytes without a sign by bytes with one: of integers with a sign the sign bit
is turned, and what that adds is taken off before the first product. A row is multiplied as floats if it is not finite, or
a span of it is below 2**-90 or has its most elements below 2**-10 of its largest (:func:`keybytes.outweighed`).

Of integers of 8 bits, which would be interleaved first, this was measured, and is slower than floats: 22 GB/s instead of 27, though
from the second-level cache it is twice as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.tvm import dots8, keybytes
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.keybytes import LANES, PARTS
from graphopt.backends.tvm.quantform import Quantized
from graphopt.backends.tvm.quantized import BLOCK, QuantizedKernel


class QuantizedDotsKernel(QuantizedKernel):
    """Emits a region with one matmul of one row, or two of one left factor; integers are of 4 or 2 bits.

    Args: see :class:`QuantizedKernel`.
    """

    def __init__(self, graph: Any, vectors: int, ahead: int, parallel: bool) -> None:
        super().__init__(graph, LANES, 1, vectors, 1, True, ahead, parallel)
        self.dots = True
        self.depth = -(-self.depth // LANES) * LANES  # of the first factor, zeros behind it

    def emit(self) -> Code:
        code = self.code
        x = self._left()
        sums = self._sums(x)
        floats = code.alloc(1, "int32", "floats")
        code.store(floats, 0, tirx.const(0, "int32"))
        self.most: dict[tuple[int, int], Any] = {}
        for form in self.forms:
            if (spans := (_span(form), form.depth)) not in self.most:
                self.most[spans] = self._largest(form, x, floats)
        countable = code.bind(tirx.EQ(code.load(floats, 0), tirx.const(0, "int32")), "countable")
        with code.when(countable):
            self.bytes_of = self._bytes_of_forms(x)
            self._all_panels(x, sums)
        with code.when(tirx.Not(countable)):
            self.dots = False
            self._all_panels(x, sums)
        return code

    # --- the first factor ---------------------------------------------------------------------------------------------------

    def _largest(self, form: Quantized, left: Any, floats: Any) -> Any:
        """The bits of the largest element of each span; ``floats`` becomes 1 if bytes would lose digits of one of them."""
        code = self.code
        most_of = code.alloc(-(-form.depth // _span(form)), "int32", "most")

        def block(b: Index, start: Index, count: int) -> None:
            held, here = code.alloc(LANES, "int32", "largest"), self._ramp(0)

            def reduce(change: Callable[[Any, Any], Any], name: str) -> Any:
                code.emit(tirx.BufferStore(held, self._splat(tirx.const(0, "int32")), here))
                with code.loop(count, "serial", "c") as c:
                    bits = self._named(keybytes.magnitude(left[self._ramp(code.simplify(start + c * LANES))[0]]))
                    code.emit(tirx.BufferStore(held, change(held[here[0]], bits), here))
                return code.bind(tirx.call_llvm_pure_intrin("int32", f"llvm.vector.reduce.{name}", held[here[0]]), name)

            most = reduce(tirx.max, "smax")
            code.store(most_of, b, most)
            few = reduce(lambda sums, bits: sums + keybytes.outweighed(bits, most, 1), "add")
            lost = tirx.Or(tirx.Not(keybytes.countable(most)), few > tirx.const(0, "int32"))
            with code.when(lost):
                code.store(floats, 0, tirx.const(1, "int32"))

        self._each_span(form, block)
        return most_of

    def _each_span(self, form: Quantized, block: Callable[[Index, Index, int], None]) -> None:
        """Call ``block`` with each span's number, where it starts, and its vectors."""
        span = _span(form)
        whole, rest = divmod(form.depth, span)
        with self.code.loop(whole, "serial", "block") as b:
            block(b, self.code.simplify(b * span), -(-span // LANES))
        if rest:
            block(whole, whole * span, -(-rest // LANES))

    def _bytes_of_forms(self, left: Any) -> list[tuple[Any, Any, Any]]:
        """The first factor as bytes, for each span of rows that a product sums by itself."""
        known: dict[tuple[int, int, int], tuple[Any, Any, Any]] = {}
        out = []
        for form in self.forms:
            key = (_span(form), form.per_word, _middle(form))
            if key not in known:
                known[key] = self._left_bytes(form, left)
            out.append(known[key])
        return out

    def _left_bytes(self, form: Quantized, left: Any) -> tuple[Any, Any, Any]:
        """(words ``[depth / 16, words of 16 rows, four of a word, part]``, what 2**24 units of each span are, what sums begin with)."""
        code, span = self.code, _span(form)
        blocks = -(-form.depth // span)
        words, units = code.alloc(self.depth, "int32", "words"), code.alloc(blocks, "float32", "units")
        begin = code.alloc(blocks * PARTS, "int32", "begin")
        rows, fours = form.per_word, form.per_word // 4
        order = [(w * rows + fours * b + s) * PARTS + p for w in range(LANES // rows) for s in range(fours)
                 for p in range(PARTS) for b in range(4)]  # fmt: skip
        zeros, ones = (tirx.Broadcast(tirx.const(n, "int32"), LANES) for n in (0, 0x01010101))

        def block(b: Index, start: Index, count: int) -> None:
            held, here = code.alloc(LANES, "int32", "sums"), self._ramp(0)
            most = code.bind(code.load(self.most[span, form.depth], b), "most")
            up, unit = keybytes.units(code.bind(keybytes.exponent(most), "power"))
            up = self._splat(code.bind(up, "up"))
            code.store(units, b, unit)
            code.emit(tirx.BufferStore(held, zeros, here))
            with code.loop(count, "serial", "c") as c:
                at = self._ramp(code.simplify(start + c * LANES))
                parts = self._named(keybytes.parts(left[at[0]], up))
                fours_of = self._named(tirx.reinterpret(f"int32x{LANES}", tirx.Shuffle([parts], order)))
                code.emit(tirx.BufferStore(words, fours_of, at))
                code.emit(tirx.BufferStore(held, dots8.dot("vnni", held[here[0]], ones, fours_of, LANES), here))
            total = self._named(held[here[0]])
            for lanes in (8, 4):
                low, high = (tirx.Shuffle([total], list(range(first, first + lanes))) for first in (0, lanes))
                total = self._named(low + high)
            taken = total * tirx.Broadcast(tirx.const(-_middle(form), "int32"), PARTS)
            code.emit(tirx.BufferStore(begin, taken, [tirx.Ramp(i64(code.simplify(b * PARTS)), i64(1), PARTS)]))

        self._each_span(form, block)
        return words, units, begin

    # --- sums ---------------------------------------------------------------------------------------------------------------

    def _sum_part(self, form: Quantized, x: Any, ones: Any, total: Any, j: Index, column: Index) -> None:
        """Sum some vectors of a panel's columns into ``total``."""
        if not self.dots:
            return super()._sum_part(form, x, ones, total, j, column)
        code = self.code
        words, units, begin = self.bytes_of[self.forms.index(form)]
        span = _span(form)
        places = [self._ramp(code.simplify(column + u * LANES)) for u in range(self.vectors)]
        for at in places:
            code.emit(tirx.BufferStore(total, self._splat(tirx.const(0, "float32")), at))

        def block(b: Index, length: int) -> None:
            acc = [code.alloc(PARTS * LANES, "int32", "acc") for _ in range(self.vectors)]
            for p in range(PARTS):
                first = self._splat(code.bind(code.load(begin, code.simplify(b * PARTS + p)), "first", hidden=False))
                for sums in acc:
                    code.emit(tirx.BufferStore(sums, first, self._ramp(p * LANES)))
            rows = code.simplify(b * span)
            whole, rest = divmod(length, LANES)
            with code.loop(whole, "serial", "k") as k:
                self._rows_16(form, words, acc, j, column, code.simplify(rows + k * LANES), LANES)
            if rest:
                self._rows_16(form, words, acc, j, column, code.simplify(rows + whole * LANES), rest)
            unit = self._splat(code.bind(code.load(units, b), "unit"))
            for u, at in enumerate(places):
                value = keybytes.from_parts([acc[u][self._ramp(p * LANES)[0]] for p in range(PARTS)]) * unit
                if form.groups > 1:
                    scale, zero = self._scale(form, j, b, column, u)
                    value = self._shifted(form, ones, 0, b, value, zero) * scale
                code.emit(tirx.BufferStore(total, total[at[0]] + value, at))

        whole, rest = divmod(form.groups * form.group, span)
        with code.loop(whole, "serial", "block") as b:
            block(b, span)
        if rest:
            block(whole, rest)
        if form.groups == 1:
            for u, at in enumerate(places):
                scale, zero = self._scale(form, j, 0, column, u)
                code.emit(tirx.BufferStore(total, self._shifted(form, ones, 0, 0, total[at[0]], zero) * scale, at))
        return None

    def _rows_16(self, form: Quantized, words: Any, acc: Sequence[Any], j: Index, column: Index, k: Index, number: int) -> None:
        """Add the products of 16 rows, from ``k`` on, or of the few of them that are left."""
        code, fours, source = self.code, form.per_word // 4, self.args.inputs[form.integers]
        for w in range(-(-number // form.per_word)):
            row = code.simplify(j * (form.depth // form.per_word) + code.div(k, form.per_word) + w)
            at = code.bind_index(code.simplify(row * form.width + column), "w")
            x = [[self._splat(code.bind(code.load(words, code.simplify(k + (w * fours + s) * PARTS + p)), "x", hidden=False))
                  for p in range(PARTS)] for s in range(fours)]  # fmt: skip
            for u in range(self.vectors):
                here = code.simplify(at + u * LANES)
                if self.ahead:  # a vector of words is a line
                    code.prefetch(source, code.simplify(here + self.ahead // form.integers.dtype.itemsize))
                word = self._load(form, here)
                for s in range(fours):
                    value = self._bytes(form, word, s)
                    for p in range(PARTS):
                        to = self._ramp(p * LANES)
                        code.emit(tirx.BufferStore(acc[u], dots8.dot("vnni", acc[u][to[0]], value, x[s][p], LANES), to))

    def _bytes(self, form: Quantized, word: Any, s: int) -> Any:
        """Four rows' integers, without signs."""
        low = tirx.shift_right(word, self._splat(tirx.const(form.bits * s, "int32"))) if s else word
        low = tirx.bitwise_and(low, self._splat(tirx.const(((1 << form.bits) - 1) * 0x01010101, "int32")))
        if form.signed:
            low = tirx.bitwise_xor(low, self._splat(tirx.const((1 << (form.bits - 1)) * 0x01010101, "int32")))
        return self._named(low)


def _span(form: Quantized) -> int:
    return form.group if form.groups > 1 else min(BLOCK, -(-form.depth // LANES) * LANES)


def _middle(form: Quantized) -> int:
    """What is taken off the bytes that are multiplied."""
    return 1 << (form.bits - 1) if form.signed or form.zeros is not None else 0

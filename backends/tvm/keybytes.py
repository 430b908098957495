"""Keys or values of small integers as vectors of bytes, in the order of memory; and numbers as sums of bytes times powers of 256."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx

from graphopt.backends.forms.support import constant_of
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.expr import Expressions
from graphopt.backends.tvm.keyrows import Rows, in_order

BYTES = 64  # of a vector
LANES = 16  # words of a vector
PARTS = 4  # bytes of a word
INFINITE, _MAGNITUDE = 0x7F800000, 0x7FFFFFFF
_BITS = 30  # of an integer, beside the sign: with the carry of the lower bytes they fit a word
_CARRY = 0x00808080
_REACH = 10  # powers of two below the largest number
_LEAST = (127 - 90) << 23  # of the exponents that numbers are counted from


class ByteRows:
    """Rows of integers that are read as bytes: 64 elements at once, in an order of their own.

    Attributes:
        plain: whether 64 elements lie in as few neighbouring bytes as hold them; if not, they are collected one by one, in order.
    """

    def __init__(self, rows: Rows) -> None:
        node = rows.integers
        assert node is not None
        self.rows, self.code, self.dtype = rows, rows.args.code, node.operands[0].dtype
        self.size = int(rows.value.shape[-1])
        self.zero = int(sum(float(constant_of(z) or 0) for z in node.operands[2:]))
        self.order = rows.order(LANES) if rows.per_word == 2 else in_order
        self.plain = self._is_plain()

    def _is_plain(self) -> bool:
        rows, starts = self.rows, range(0, self.size, BYTES)
        if rows.per_word == 1:
            return all(rows.straight(in_order, u, BYTES) for u in starts)
        if rows.per_word != 2 or self.order is in_order:
            return False
        place = [tirx.Var(self.code.fresh("i"), "int64") for _ in rows.value.shape[:-1]]
        found = [self._address([*place, self.order(u, 0)])[1] for u in range(0, self.size, 2 * LANES)]
        return all(self.code.equal(self.code.simplify(at - found[0]), k * LANES) for k, at in enumerate(found))

    def _address(self, index: Sequence[Index]) -> tuple[Any, Index]:
        probe = Expressions(self.rows.args, {}, probe=True)
        self.rows.at([self.code.simplify(i) for i in index], probe)
        return probe.reads[-1]

    def element(self, byte: Index) -> Index:
        """The element of a row that a byte of its copy holds."""
        if not self.plain or self.rows.per_word == 1:
            return byte
        first, one, other, more = (int(self.order(u, v)) for u, v in ((0, 0), (0, 1), (LANES, 0), (2 * LANES, 0)))
        byte, two, all_of = i64(byte), i64(2), i64(2 * LANES)  # of 16 bytes of memory, of which each gives two
        within = tirx.floordiv(tirx.floormod(byte, all_of), two) * (one - first) + tirx.floormod(byte, two) * (other - first)
        return self.code.simplify(first + tirx.floordiv(byte, all_of) * (more - first) + within)

    def in_place(self, lead: Sequence[Index], row: Index) -> tuple[Any, Index, Index] | None:
        """(buffer, place of a row, bytes from one row to the next) where rows are bytes with a sign as they lie in memory, or None."""
        if not self.plain or self.rows.per_word > 1 or self.zero or self.dtype.kind != "i" or self.rows.paged:
            return None
        var = tirx.Var(self.code.fresh("n"), "int64")
        source, at = self._address([*lead, var, 0])
        found = [] if isinstance(at, int) else list(tvm.sym.detect_linear_equation(at, [var]))
        if not found or any(v.same_as(var) for v in tirx.analysis.undefined_vars(i64(found[0]))):
            return None
        step = self.code.simplify(found[0])
        return self.rows.args.inputs[source], self.code.bind_index(self.code.simplify(found[1] + row * step), "rows"), step

    def copy(self, index: Sequence[Index], to: Any, at: Index) -> None:
        """Write a row as bytes, with the zero point taken off."""
        code = self.code
        if not self.plain:
            with code.loop(self.size, "serial", "c") as c:
                code.store(to, code.simplify(at + c), self.rows.at([*index, c]).astype("int8"))
            return
        for place in range(0, self.size, BYTES):
            source, address = self._address([*index, self.element(place)])
            buffer, start = self.rows.args.inputs[source], i64(code.bind_index(address, "bytes"))
            if self.rows.per_word == 1:
                x = buffer[tirx.Ramp(start, i64(1), BYTES)]
                x = x if self.dtype.kind == "i" else tirx.reinterpret(f"int8x{BYTES}", x)
            else:
                x = self._halves(buffer[tirx.Ramp(start, i64(1), BYTES // 2)])
            if self.zero:
                x = x - tirx.Broadcast(tirx.const((self.zero + 128) % 256 - 128, "int8"), BYTES)
            code.emit(tirx.BufferStore(to, x, [tirx.Ramp(i64(code.simplify(at + place)), i64(1), BYTES)]))

    def _halves(self, raw: Any) -> Any:
        """Bytes of two integers each, low ones before high ones."""
        half = BYTES // 2
        words = f"uint16x{half}"
        wide = self.code.bind(tirx.reinterpret(f"uint8x{half}", raw).astype(words), "wide", hidden=False)
        both = tirx.bitwise_or(wide, tirx.shift_left(wide, tirx.Broadcast(tirx.const(4, "uint16"), half)))
        apart = tirx.bitwise_and(both, tirx.Broadcast(tirx.const(0x0F0F, "uint16"), half))
        x = tirx.reinterpret(f"int8x{BYTES}", apart)
        if self.dtype.kind == "i":  # of 4 bits, the upper one is the sign
            sign = tirx.Broadcast(tirx.const(8, "int8"), BYTES)
            x = tirx.bitwise_xor(x, sign) - sign
        return x


# --- numbers as bytes ----------------------------------------------------------------------------------------------------


def exponent(largest: Any) -> Any:
    """The bits of the power of two below the largest of some numbers, whose bits are given as i32; of less than 2**-90, 2**-90."""
    return tirx.max(tirx.bitwise_and(largest, _like(largest, INFINITE)), _like(largest, _LEAST))


def countable(most: Any) -> Any:
    """Whether numbers, of which ``most`` has the largest's bits, are near enough to what they are counted from: all finite, and all zero
    or one of at least 2**-90."""
    least = tirx.Or(tirx.EQ(most, _like(most, 0)), tirx.GE(most, _like(most, _LEAST)))
    return tirx.And(tirx.LT(most, _like(most, INFINITE)), least)


def outweighed(bits: Any, most: Any, few: int, reach: int = _REACH) -> Any:
    """A vector of i32, from magnitudes: 1 for a number below ``2**-reach`` of the largest, ``-few`` for others, 0 for zero.

    A sum above zero over a row says that those few elements leave the others too few digits: a product in which the few meet zeros would
    have a greater error than a sum of f32 has.
    """
    nothing, low = tirx.Broadcast(tirx.const(0, "int32"), LANES), tirx.Broadcast(most - tirx.const(reach << 23, "int32"), LANES)
    one, less = (tirx.Broadcast(tirx.const(n, "int32"), LANES) for n in (1, -few))
    return tirx.Select(tirx.EQ(bits, nothing), nothing, tirx.Select(tirx.LT(bits, low), one, less))


def magnitude(x: Any) -> Any:
    """The bits of ``|x|``: as integers they are in the order of the numbers, nan behind them all."""
    bits = tirx.reinterpret(f"int32x{LANES}", x)
    return tirx.bitwise_and(bits, _like(bits, _MAGNITUDE))


def units(power: Any) -> tuple[Any, Any]:
    """(what numbers below twice a power of two are multiplied by for :func:`parts`, what the highest of their parts counts), both f32.

    If the power is infinite, so that some number is none, the second is nan: integers cannot tell.
    """
    word, real = (str(power.ty.dtype).replace("int32", name) for name in ("uint32", "float32"))
    up = tirx.reinterpret(real, _like(power, (2 * 127 + _BITS - 1) << 23, "uint32") - tirx.reinterpret(word, power))
    unit = tirx.reinterpret(real, power - _like(power, (_BITS - 1 - 8 * (PARTS - 1)) << 23))
    finite = tirx.LT(power, _like(power, INFINITE))
    return up, tirx.Select(finite, unit, _like(power, float("nan"), "float32"))


def _like(x: Any, value: float, dtype: str = "int32") -> Any:
    """A constant of as many lanes."""
    one = tirx.const(value, dtype)
    return tirx.Broadcast(one, LANES) if str(x.ty.dtype).endswith(f"x{LANES}") else one


def parts(x: Any, up: Any) -> Any:
    """A vector of numbers times ``up``, rounded, as four bytes with a sign each, the lowest first: an ``int8x64``."""
    whole = tirx.call_llvm_pure_intrin(f"int32x{LANES}", "llvm.lrint", x * up)
    carry = _like(whole, _CARRY)  # the three lower bytes count from -128: what they take, the next one has
    return tirx.reinterpret(f"int8x{BYTES}", tirx.bitwise_xor(whole + carry, carry))


def interleave(code: Code, rows: Sequence[Any]) -> list[Any]:
    """Four vectors of 64 bytes as four vectors of words, a byte of each row in a word: of the columns ``16 * (w // 4) + 4 * j + w % 4``
    in word w of the j-th one."""
    first = _take_turns(code, rows, BYTES, 1)
    pairs = [code.bind(tirx.reinterpret(f"int16x{BYTES // 2}", x), "mix", hidden=False) for x in first]
    return _take_turns(code, (pairs[0], pairs[2], pairs[1], pairs[3]), BYTES // 2, 1)


def transpose_words(code: Code, rows: Sequence[Any]) -> list[Any]:
    """Four vectors of 16 words: the i-th words of each four of all of them, in the i-th vector."""
    a = _take_turns(code, rows, LANES, 1)
    return _take_turns(code, (a[0], a[2], a[1], a[3]), LANES, 2)


def transpose_quarters(code: Code, rows: Sequence[Any], lanes: int) -> list[Any]:
    """Four vectors: the i-th quarters of all of them, in the i-th vector."""
    quarter = lanes // 4

    def take(a: Any, b: Any, quarters: Sequence[int]) -> Any:
        return code.bind(tirx.Shuffle([a, b], [q * quarter + i for q in quarters for i in range(quarter)]), "mix", hidden=False)

    (a, b, c, d), low, high = rows, (0, 1, 4, 5), (2, 3, 6, 7)
    halves = [(take(a, b, order), take(c, d, order)) for order in (low, high)]
    return [take(x, y, order) for x, y in halves for order in ((0, 2, 4, 6), (1, 3, 5, 7))]


def _take_turns(code: Code, rows: Sequence[Any], lanes: int, unit: int) -> list[Any]:
    """Of two pairs of vectors, within each quarter: units of so many lanes in turns, of the lower halves and of the upper ones."""
    quarter, out = lanes // 4, []
    for x, y in ((rows[0], rows[1]), (rows[2], rows[3])):
        for half in range(2):
            order = [start + i + side * lanes + u for start in range(half * quarter // 2, lanes, quarter)
                     for i in range(0, quarter // 2, unit) for side in range(2) for u in range(unit)]  # fmt: skip
            out.append(code.bind(tirx.Shuffle([x, y], order), "mix", hidden=False))
    return out


def from_parts(sums: Sequence[Any]) -> Any:
    """What sums of products with the parts make together, in units of the highest: vectors of i32, the lowest first; below 2**24 each is
    exact as f32."""
    step, total = tirx.Broadcast(tirx.const(2.0**-8, "float32"), LANES), None
    for part in sums:
        x = part.astype(f"float32x{LANES}")
        total = x if total is None else total * step + x
    return total

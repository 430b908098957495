"""Single elements: how each element type is held in expressions, loaded, stored, converted and combined.

f32 and f64 as they are; f16 and bf16 as f32 rounded to the narrow type after every op, as
eager rounds every result; b1 as ``bool``; integers as they are, with wrap-around done in unsigned arithmetic, because
LLVM may assume that signed arithmetic does not overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tvm import tirx

from graphopt.backends.tvm import vecmath
from graphopt.ir import types
from graphopt.ir.opset.quantize import saturates
from graphopt.ir.types import DType

COMPUTE = {
    types.f64: "float64", types.f32: "float32", types.f16: "float32", types.bf16: "float32", types.i64: "int64", types.i32: "int32",
    types.i16: "int16", types.i8: "int8", types.u8: "uint8", types.b1: "bool", types.f8e4m3: "uint8", types.f8e5m2: "uint8",
}  # fmt: skip
STORAGE = COMPUTE | {types.f16: "float16", types.bf16: "uint16", types.b1: "uint8"}


def constant(value: Any, dtype: DType) -> Any:
    """A constant as the dtype holds it."""
    name = COMPUTE[dtype]
    if dtype.is_bool:
        return tirx.const(bool(value), "bool")
    if not dtype.is_float:
        bits = dtype.bits
        wrapped = int(value) % (1 << bits)
        return tirx.const(wrapped - (1 << bits) if dtype.kind == "i" and wrapped >> (bits - 1) else wrapped, name)
    number = float(torch.tensor(float(value), dtype=torch.float64).to(dtype.torch))
    # zero and one are folded by TVM as if there were neither nan nor -0.0: hide them
    plain = tirx.const(number, name)
    return vecmath.fence(plain, name) if number in (0.0, 1.0, -1.0) or not math.isfinite(number) else plain


def load(raw: Any, dtype: DType) -> Any:
    """A stored element as it is held in expressions."""
    if dtype == types.b1:
        return tirx.NE(raw, tirx.const(0, "uint8"))
    if dtype == types.f16:
        return raw.astype("float32")
    if dtype == types.bf16:
        return tirx.reinterpret("float32", tirx.shift_left(raw.astype("uint32"), _u32(16)))
    return raw


def store(value: Any, dtype: DType) -> Any:
    """Inverse of :func:`load`; the value is already rounded to the dtype."""
    if dtype == types.b1:
        return value.astype("uint8")
    if dtype == types.f16:
        return value.astype("float16")
    if dtype == types.bf16:
        return tirx.shift_right(tirx.reinterpret("uint32", value), _u32(16)).astype("uint16")
    return value


def _u32(v: int) -> Any:
    return tirx.const(v, "uint32")


def rounded(value: Any, dtype: DType) -> Any:
    """Round an f32 expression to the precision of a narrow float (to nearest even).

    A nan must be a quiet one, as all that arithmetic gives are. There is no selection in it: TVM takes chains of them apart
    case by case, and every op on bf16 rounds.
    """
    if dtype == types.f16:
        return value.astype("float16").astype("float32")
    if dtype == types.bf16:
        u = tirx.reinterpret("uint32", value)
        odd = tirx.bitwise_and(tirx.shift_right(u, _u32(16)), _u32(1))
        up = tirx.bitwise_and(u, _u32(0x7FFFFFFF)) + _u32(0x7FFF) + odd
        inside = vecmath.intrinsic("llvm.umin", "uint32", up, _u32(0x7FFFFFFF))  # a nan of ones alone must not run over
        sign = tirx.bitwise_and(u, _u32(0x80000000))
        return tirx.reinterpret("float32", tirx.bitwise_or(tirx.bitwise_and(inside, _u32(0x7FFF0000)), sign))
    return value


def cast(x: Any, source: DType, to: DType, let: vecmath.Let = lambda v: v) -> Any:
    """Conversion as on x86: floats toward zero, wrap-around for integers."""
    name = COMPUTE[to]
    if source == to:
        return x
    if to in FACTOR:
        return to_f8(let(cast(x, source, types.f32, let)), to)
    if source in FACTOR:
        value = f8_part(x, source) * tirx.const(FACTOR[source], "float32")
        return value if to in (types.f32, types.bf16) else cast(let(value), types.f32, to, let)  # bf16 holds all of them
    if to.is_bool:
        return _nonzero(x, source)
    if source.is_bool:
        return tirx.Select(x, tirx.const(1, name), tirx.const(0, name))
    if source.is_float:
        if to.is_float:
            x = x if COMPUTE[source] == name else let(x.astype(name))
            return _kept_nan(x, rounded(x, to)) if to == types.bf16 else rounded(x, to)
        if to == types.i64:
            return x.astype("int64")
        if to == types.u8:
            return x.astype("int64").astype("uint8")
        wide = x.astype("int32")
        return wide if to == types.i32 else wide.astype(name)
    return rounded(let(x.astype(name)), to)


def _kept_nan(x: Any, low: Any) -> Any:
    """An f32 rounded to bf16, a nan where it was one: one from memory may be a signalling one, whose low bits alone tell it from infinity.

    Without a selection, for the reason that :func:`rounded` has none.
    """
    magnitude = tirx.bitwise_and(tirx.reinterpret("uint32", x), _u32(0x7FFFFFFF))
    beyond = vecmath.intrinsic("llvm.usub.sat", "uint32", magnitude, _u32(0x7F800000))
    quiet = tirx.shift_left(vecmath.intrinsic("llvm.umin", "uint32", beyond, _u32(1)), _u32(22))
    return tirx.reinterpret("float32", tirx.bitwise_or(tirx.reinterpret("uint32", low), quiet))


FACTOR = {types.f8e4m3: 256.0, types.f8e5m2: 1.0}  # of what f8_part gives


def f8_part(x: Any, source: DType, lanes: int = 1) -> Any:
    """The number of the bits of a float of 8 (or of a vector of them) as f32, over ``FACTOR``: an f16 has the same fields, wider ones.

    The exponent of e4m3 counts from 7, that of f16 from 15. e5m2 has infinities and nans where f16 has them; of e4m3, whose exponents are
    all numbers, the greatest number is nan.
    """
    vector = f"x{lanes}" if lanes > 1 else ""

    def number(n: float, dtype: str) -> Any:
        one = tirx.const(n, dtype)
        return tirx.Broadcast(one, lanes) if lanes > 1 else one

    if source == types.f8e5m2:
        bits = tirx.shift_left(x.astype(f"uint16{vector}"), number(8, "uint16"))
        return tirx.reinterpret(f"float16{vector}", bits).astype(f"float32{vector}")
    wide = tirx.reinterpret(f"int8{vector}", x).astype(f"int16{vector}")  # the sign twice, in the place of the first bit and of the second
    bits = tirx.bitwise_and(tirx.reinterpret(f"uint16{vector}", tirx.shift_left(wide, number(7, "int16"))), number(0xBFFF, "uint16"))
    value = tirx.reinterpret(f"float16{vector}", bits).astype(f"float32{vector}")
    last = tirx.EQ(tirx.bitwise_and(x, number(0x7F, "uint8")), number(0x7F, "uint8"))
    return tirx.Select(last, number(float("nan"), "float32"), value)


_FIELDS = {types.f8e4m3: (20, 120, 14), types.f8e5m2: (21, 112, 7)}  # bits cut off, difference of exponents' biases, see below


def to_f8(x: Any, dtype: DType) -> Any:
    """The bits of the float of 8 bits that is nearest to an f32, ties to even; beyond the largest as PyTorch casts; nan stays nan.

    Where it is a normal number the significand is rounded in place. Below, numbers are multiples of the least: added to the power of
    two whose last digit that is, the sum is rounded so.
    """
    cut, bias, power = _FIELDS[dtype]
    u = tirx.bitwise_and(tirx.reinterpret("uint32", x), _u32(0x7FFFFFFF))
    odd = tirx.bitwise_and(tirx.shift_right(u, _u32(cut)), _u32(1))
    exact = tirx.shift_right(u + _u32((1 << (cut - 1)) - 1) + odd, _u32(cut))
    most = 0x7C if dtype == types.f8e5m2 else 0x7E if saturates() else 0x7F
    large = tirx.min(tirx.reinterpret("int32", exact) - tirx.const(bias << (23 - cut), "int32"), tirx.const(most, "int32"))
    base = tirx.const(float(1 << power), "float32")
    shifted = tirx.reinterpret("int32", tirx.reinterpret("float32", u) + base)
    small = shifted - tirx.const((127 + power) << 23, "int32")
    code = tirx.Select(u < _u32((bias + 1) << 23), small, large)
    code = tirx.Select(u > _u32(0x7F800000), tirx.const(0x7F, "int32"), code)
    sign = tirx.bitwise_and(tirx.shift_right(tirx.reinterpret("uint32", x), _u32(24)), _u32(0x80))
    return tirx.bitwise_or(tirx.reinterpret("uint32", code), sign).astype("uint8")


def _nonzero(x: Any, dtype: DType) -> Any:
    """Whether x is not zero; nan is not. (TVM's NE on floats is false for nan.)"""
    return tirx.Not(tirx.EQ(x, tirx.const(0, COMPUTE[dtype])))


# --- integers ----------------------------------------------------------------------------------------------------------


def unsigned(fn: Callable[[Any, Any], Any], a: Any, b: Any, dtype: DType) -> Any:
    """``fn``, of sums, differences and products, with wrap-around.

    TVM marks 32 and 64 bit arithmetic as not overflowing, signed (nsw) and unsigned (nuw); LLVM relies on that. So i32 is
    computed in i64, and i64 such that no operation carries out.
    """
    if dtype.bits < 32:
        if dtype.kind == "u":
            return fn(a, b)
        return _as(fn(_as(a, f"u{COMPUTE[dtype]}"), _as(b, f"u{COMPUTE[dtype]}")), COMPUTE[dtype])
    if dtype.bits == 32:
        return _convert(fn(_convert(a, "int64"), _convert(b, "int64")), "int32")
    return _as(fn(_Wrapping(_as(a, "uint64")), _Wrapping(_as(b, "uint64"))).bits, "int64")


def _lanes(x: Any) -> str:
    lanes = str(x.ty.dtype).partition("x")[2]  # vectors come here from the joining of partial results
    return f"x{lanes}" if lanes else ""


def _as(x: Any, name: str) -> Any:
    """The same bits as another type."""
    if isinstance(x, tirx.IntImm) and name.startswith("u"):
        return tirx.const(int(x.value) % (1 << int(name[4:])), name)
    return tirx.reinterpret(name + _lanes(x), x)


def _convert(x: Any, name: str) -> Any:
    return x.astype(name + _lanes(x))


class _Wrapping:
    """64 bits that are added, subtracted and multiplied without an operation that overflows."""

    def __init__(self, bits: Any) -> None:
        self.bits = bits

    def __add__(self, other: _Wrapping) -> _Wrapping:
        low = tirx.bitwise_and(self.bits, _LOW) + tirx.bitwise_and(other.bits, _LOW)
        return _Wrapping(tirx.bitwise_xor(low, tirx.bitwise_and(tirx.bitwise_xor(self.bits, other.bits), _HIGH)))

    def __sub__(self, other: _Wrapping) -> _Wrapping:
        low = tirx.bitwise_or(self.bits, _HIGH) - tirx.bitwise_and(other.bits, _LOW)
        differ = tirx.bitwise_xor(self.bits, tirx.bitwise_not(other.bits))
        return _Wrapping(tirx.bitwise_xor(low, tirx.bitwise_and(differ, _HIGH)))

    def __mul__(self, other: _Wrapping) -> _Wrapping:
        al, ah, bl, bh = (f(x.bits) for x in (self, other) for f in (_low_half, _high_half))
        cross = _low_half(_low_half(al * bh) + _low_half(ah * bl))
        return _Wrapping(al * bl) + _Wrapping(tirx.shift_left(cross, _HALF))


_LOW, _HIGH, _HALF = tirx.const((1 << 63) - 1, "uint64"), tirx.const(1 << 63, "uint64"), tirx.const(32, "uint64")


def _low_half(x: Any) -> Any:
    return tirx.bitwise_and(x, tirx.const((1 << 32) - 1, "uint64"))


def _high_half(x: Any) -> Any:
    return tirx.shift_right(x, _HALF)


def extreme(a: Any, b: Any, d: DType, larger: bool) -> Any:
    """Maximum or minimum; nan if either is."""
    if d.is_bool:
        return tirx.Or(a, b) if larger else tirx.And(a, b)
    if d.is_float:
        return vecmath.intrinsic("llvm.maximum" if larger else "llvm.minimum", str(a.ty.dtype), a, b)
    return tirx.Select(a > b if larger else a < b, a, b)


def bounded(x: Any, bound: Any, larger: bool) -> Any:
    """Maximum or minimum of a float and a number that is not nan; nan if the float is. Of two zeros it is the float's.

    One instruction on x86, where :func:`extreme` beside a zero takes six: that looks at the signs of zeros.
    """
    return tirx.Select(bound > x if larger else bound < x, bound, x)


def wrapping(product: bool, a: Any, b: Any, dtype: DType) -> Any:
    """Sum or product of integers with wrap-around."""
    return unsigned((lambda x, y: x * y) if product else (lambda x, y: x + y), a, b, dtype)

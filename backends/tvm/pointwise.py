"""Pointwise ops on expressions, with PyTorch's semantics: each op of the IR is a method of :class:`Ops`.

Narrow floats are rounded after every op, as eager rounds every result. f32 functions come from :mod:`vecmath` and
:mod:`vecwide`, which vectorize; those of f64 are called from libm one lane at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tvm import tirx

from graphopt.backends.tvm import vecmath, vecwide
from graphopt.backends.tvm.scalar import COMPUTE, bounded, cast, constant, extreme, rounded, unsigned
from graphopt.errors import BuildError
from graphopt.ir import types
from graphopt.ir.types import DType

_EXACT = ("neg", "abs", "sign", "relu", "maximum", "minimum", "floor", "ceil", "trunc", "round", "where")


def _divisor(b: Any, dtype: DType) -> int:
    if not isinstance(b, tirx.IntImm):
        raise BuildError(f"division on {dtype} needs a constant divisor")
    return int(b.value)


def _int_division(name: str, a: Any, b: Any, dtype: DType) -> Any:
    d = _divisor(b, dtype)
    if d == -1:  # the least integer has no negative: x86 would trap
        return (
            unsigned(lambda x, zero: zero - x, a, constant(0, dtype), dtype) if name in ("floor_div", "trunc_div") else constant(0, dtype)
        )
    fn = {"floor_div": tirx.floordiv, "remainder": tirx.floormod, "trunc_div": tirx.truncdiv, "fmod": tirx.truncmod}[name]
    return fn(a, b)


def _power(x: Any, n: int, times: Callable[[Any, Any], Any], one: Any) -> Any:
    total = None
    while n:
        if n & 1:
            total = x if total is None else times(total, x)
        n >>= 1
        if n:
            x = times(x, x)
    return one if total is None else total


class Ops:
    """Pointwise ops at one dtype. ``scalar_only`` is set when an op was used that only libm has."""

    def __init__(self, let: vecmath.Let) -> None:
        self.let = let
        self.scalar_only = False

    def apply(self, name: str, args: list[Any], dtype: DType, result: DType, attrs: Mapping[str, Any], raw: list[Any]) -> Any:
        """The op's value.

        Args:
            dtype, result: element types of the (last) operand and of the result.
            raw: constant value of each operand, or None.
        """
        if name == "cast":
            return cast(args[0], dtype, result, self.let)
        if name == "where":
            return tirx.Select(args[0], args[1], args[2])
        fn = getattr(type(self), f"_{name}", None) or _TABLE.get(name)
        if fn is None:
            raise BuildError(f"{name} has no expression on {dtype}")
        value = fn(self, args, dtype, raw, **attrs)
        return rounded(self.let(value), result) if result in (types.f16, types.bf16) and name not in _EXACT else value

    def libm(self, name: str, *args: Any) -> Any:
        """A call of the C library's function of f64: right to an ulp, but one lane at a time."""
        self.scalar_only = True
        return tirx.call_pure_extern("float64", name, *args)

    # arithmetic
    def _add(self, a: list[Any], d: DType, raw: Any) -> Any:
        if d.is_bool:
            return tirx.Or(a[0], a[1])
        return a[0] + a[1] if d.is_float else unsigned(lambda x, y: x + y, a[0], a[1], d)

    def _sub(self, a: list[Any], d: DType, raw: Any) -> Any:
        return a[0] - a[1] if d.is_float else unsigned(lambda x, y: x - y, a[0], a[1], d)

    def _mul(self, a: list[Any], d: DType, raw: Any) -> Any:
        if d.is_bool:
            return tirx.And(a[0], a[1])
        return vecmath.fence(a[0] * a[1], COMPUTE[d]) if d.is_float else unsigned(lambda x, y: x * y, a[0], a[1], d)

    def _div(self, a: list[Any], d: DType, raw: Any) -> Any:
        return a[0] / a[1]

    def _neg(self, a: list[Any], d: DType, raw: Any) -> Any:
        if d.is_float:
            return a[0] * tirx.const(-1.0, COMPUTE[d])
        return unsigned(lambda x, zero: zero - x, a[0], constant(0, d), d)

    def _abs(self, a: list[Any], d: DType, raw: Any) -> Any:
        if d.kind in "ub":
            return a[0]
        return (
            vecmath.intrinsic("llvm.fabs", COMPUTE[d], a[0])
            if d.is_float
            else tirx.Select(a[0] < constant(0, d), self._neg(a, d, raw), a[0])
        )

    def _sign(self, a: list[Any], d: DType, raw: Any) -> Any:
        if d.is_bool:
            return a[0]
        x, one, zero = a[0], tirx.const(1, COMPUTE[d]), tirx.const(0, COMPUTE[d])
        positive = tirx.Select(x > zero, one, zero)
        return positive if d.kind == "u" else tirx.Select(x < zero, tirx.const(-1, COMPUTE[d]), positive)

    def _rounding(self, which: str, a: list[Any], d: DType) -> Any:
        return vecmath.intrinsic(f"llvm.{which}", COMPUTE[d], a[0]) if d.is_float else a[0]

    def _floor(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._rounding("floor", a, d)

    def _ceil(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._rounding("ceil", a, d)

    def _trunc(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._rounding("trunc", a, d)

    def _round(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._rounding("nearbyint", a, d)

    def _relu(self, a: list[Any], d: DType, raw: Any) -> Any:
        if d.kind in "ub":
            return a[0]
        zero = constant(0, d)
        return tirx.Select(a[0] < zero, zero, a[0])

    def _maximum(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._extreme(a, d, raw, larger=True)

    def _minimum(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._extreme(a, d, raw, larger=False)

    def _extreme(self, a: list[Any], d: DType, raw: Any, larger: bool) -> Any:
        for x, bound, number in ((a[0], a[1], raw[1]), (a[1], a[0], raw[0])):
            if d.is_float and number is not None and not math.isnan(number):
                return bounded(x, bound, larger)
        return extreme(a[0], a[1], d, larger)

    # division and powers
    def _floor_div(self, a: list[Any], d: DType, raw: Any) -> Any:
        if not d.is_float:
            return _int_division("floor_div", a[0], a[1], d)
        x, y, zero, one = a[0], a[1], constant(0, d), tirx.const(1.0, COMPUTE[d])
        rest = self.let(self._fmod(a, d, raw))
        quotient = (x - rest) / y
        opposite = tirx.And(tirx.Not(tirx.EQ(rest, zero)), _differ(y < zero, rest < zero))
        quotient = self.let(tirx.Select(opposite, quotient - one, quotient))
        whole = self.let(vecmath.intrinsic("llvm.floor", COMPUTE[d], quotient))
        whole = tirx.Select(quotient - whole > tirx.const(0.5, COMPUTE[d]), whole + one, whole)
        signed_zero = vecmath.intrinsic("llvm.copysign", COMPUTE[d], zero, x / y)
        return tirx.Select(tirx.EQ(y, zero), x / y, tirx.Select(tirx.EQ(quotient, zero), signed_zero, whole))

    def _trunc_div(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._trunc([a[0] / a[1]], d, raw) if d.is_float else _int_division("trunc_div", a[0], a[1], d)

    def _remainder(self, a: list[Any], d: DType, raw: Any) -> Any:
        if not d.is_float:
            return _int_division("remainder", a[0], a[1], d)
        zero, rest = constant(0, d), self.let(self._fmod(a, d, raw))
        opposite = tirx.And(tirx.Not(tirx.EQ(rest, zero)), _differ(a[1] < zero, rest < zero))
        return tirx.Select(opposite, rest + a[1], rest)

    def _fmod(self, a: list[Any], d: DType, raw: Any) -> Any:
        if not d.is_float:
            return _int_division("fmod", a[0], a[1], d)
        return self.libm("fmod", *a) if d == types.f64 else vecwide.fmod(self.let, a[0], a[1], raw[1])

    def _pow(self, a: list[Any], d: DType, raw: Any) -> Any:
        exponent = raw[1]
        if not d.is_float:
            return _power(a[0], int(exponent), lambda x, y: unsigned(lambda p, q: p * q, x, y, d), constant(1, d))
        x, one = a[0], tirx.const(1.0, COMPUTE[d])

        def times(p: Any, q: Any) -> Any:
            return vecmath.fence(p * q, COMPUTE[d])

        match exponent:
            case 2.0:
                return times(x, x)
            case 3.0:
                return times(times(x, x), x)
            case 0.5:
                return _root(x, d)
            case -0.5:
                return one / _root(x, d)
            case -1.0:
                return one / x
            case -2.0:
                return one / times(x, x)
        return self.libm("pow", *a) if d == types.f64 else vecwide.pow(self.let, *a)

    def _reciprocal(self, a: list[Any], d: DType, raw: Any) -> Any:
        return tirx.const(1.0, COMPUTE[d]) / a[0]

    def _sqrt(self, a: list[Any], d: DType, raw: Any) -> Any:
        return _root(a[0], d)

    def _rsqrt(self, a: list[Any], d: DType, raw: Any) -> Any:
        return tirx.const(1.0, COMPUTE[d]) / _root(a[0], d)

    # transcendental
    def _vector(self, name: str, fn: Callable[[vecmath.Let, Any], Any], a: list[Any], d: DType) -> Any:
        return self.libm(name, a[0]) if d == types.f64 else fn(self.let, a[0])

    def _exp(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._vector("exp", vecmath.exp, a, d)

    def _exp_shifted(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._vector("exp", vecmath.exp_shifted, a, d)

    def _expm1(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._vector("expm1", vecmath.expm1, a, d)

    def _exp2(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._vector("exp2", vecmath.exp2, a, d)

    def _log(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._vector("log", vecmath.log, a, d)

    def _log2(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._vector("log2", vecmath.log2, a, d)

    def _log10(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._vector("log10", vecmath.log10, a, d)

    def _log1p(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._vector("log1p", vecmath.log1p, a, d)

    def _tanh(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._vector("tanh", vecmath.tanh, a, d)

    def _erf(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self._vector("erf", vecmath.erf, a, d)

    def _sigmoid(self, a: list[Any], d: DType, raw: Any) -> Any:
        if d == types.f64:
            one = tirx.const(1.0, "float64")
            return one / (one + self.libm("exp", a[0] * tirx.const(-1.0, "float64")))
        return vecmath.sigmoid(self.let, a[0])

    def _atan2(self, a: list[Any], d: DType, raw: Any) -> Any:
        return self.libm("atan2", *a) if d == types.f64 else vecwide.atan2(self.let, a[0], a[1])

    # activations
    def _gelu(self, a: list[Any], d: DType, raw: Any, approximate: str) -> Any:
        x, c = a[0], _constants(d)
        if approximate == "tanh":
            inner = self.let(c(math.sqrt(2 / math.pi)) * (x + c(0.044715) * x * x * x))
            if d != types.f64:
                return x * vecmath.logistic(self.let, inner)
            return c(0.5) * x * (c(1.0) + self._tanh([inner], d, raw))
        if d != types.f64:
            return x * vecmath.normal_cdf(self.let, x)
        return c(0.5) * x * (c(1.0) + self._erf([self.let(x * c(math.sqrt(0.5)))], d, raw))

    def _silu(self, a: list[Any], d: DType, raw: Any) -> Any:
        x, one = a[0], tirx.const(1.0, COMPUTE[d])
        return x / (one + self._exp([self.let(x * tirx.const(-1.0, COMPUTE[d]))], d, raw))

    def _softplus(self, a: list[Any], d: DType, raw: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
        x, b = a[0], tirx.const(beta, COMPUTE[d])
        scaled = self.let(x * b)
        value = self._log1p([self.let(self._exp([scaled], d, raw))], d, raw) / b
        return tirx.Select(scaled > tirx.const(threshold, COMPUTE[d]), x, value)

    def _elu(self, a: list[Any], d: DType, raw: Any, alpha: float, scale: float, input_scale: float) -> Any:
        x, c = a[0], _constants(d)
        negative = self._expm1([self.let(x * c(input_scale))], d, raw) * c(alpha * scale)
        return tirx.Select(x > c(0.0), x * c(scale), negative)

    def _leaky_relu(self, a: list[Any], d: DType, raw: Any, negative_slope: float) -> Any:
        x = a[0]
        return tirx.Select(x > tirx.const(0.0, COMPUTE[d]), x, x * constant(negative_slope, d))

    def _hardsigmoid(self, a: list[Any], d: DType, raw: Any) -> Any:
        c = _constants(d)
        up = bounded(self.let(a[0] + c(3.0)), c(0.0), larger=True)
        return bounded(self.let(up), c(6.0), larger=False) / c(6.0)

    def _hardswish(self, a: list[Any], d: DType, raw: Any) -> Any:
        c = _constants(d)
        up = bounded(self.let(a[0] + c(3.0)), c(0.0), larger=True)
        return a[0] * bounded(self.let(up), c(6.0), larger=False) / c(6.0)

    def _mish(self, a: list[Any], d: DType, raw: Any) -> Any:
        return a[0] * self._tanh([self.let(self._softplus(a, d, raw))], d, raw)

    # predicates and bits
    def _isnan(self, a: list[Any], d: DType, raw: Any) -> Any:
        return vecmath.isnan(a[0], COMPUTE[d]) if d.is_float else tirx.const(False, "bool")

    def _isinf(self, a: list[Any], d: DType, raw: Any) -> Any:
        if not d.is_float:
            return tirx.const(False, "bool")
        return tirx.EQ(vecmath.intrinsic("llvm.fabs", COMPUTE[d], a[0]), tirx.const(float("inf"), COMPUTE[d]))

    def _logical_not(self, a: list[Any], d: DType, raw: Any) -> Any:
        return tirx.Not(cast(a[0], d, types.b1))

    def _bitwise_not(self, a: list[Any], d: DType, raw: Any) -> Any:
        return tirx.Not(a[0]) if d.is_bool else tirx.bitwise_not(a[0])


def _constants(d: DType) -> Callable[[float], Any]:
    return lambda v: tirx.const(v, COMPUTE[d])


def _root(x: Any, d: DType) -> Any:
    return vecmath.intrinsic("llvm.sqrt", COMPUTE[d], x)


def _comparison(fn: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def compare(self: Ops, a: list[Any], d: DType, raw: Any) -> Any:
        # TVM takes x == x for true, whatever x is
        if d.is_bool:
            return fn(*(tirx.Select(x, tirx.const(1, "int32"), tirx.const(0, "int32")) for x in a))
        return fn(vecmath.fence(a[0], COMPUTE[d]) if d.is_float else a[0], a[1])

    return compare


def _logical(fn: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def logical(self: Ops, a: list[Any], d: DType, raw: Any) -> Any:
        return fn(cast(a[0], d, types.b1), cast(a[1], d, types.b1))

    return logical


def _bits(boolean: Callable[[Any, Any], Any], integer: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def bitwise(self: Ops, a: list[Any], d: DType, raw: Any) -> Any:
        return boolean(a[0], a[1]) if d.is_bool else integer(a[0], a[1])

    return bitwise


def _in_vectors(name: str, fn: Callable[[vecmath.Let, Any], Any]) -> Callable[..., Any]:
    def call(self: Ops, a: list[Any], d: DType, raw: Any) -> Any:
        return self._vector(name, fn, a, d)

    return call


def _differ(a: Any, b: Any) -> Any:
    return tirx.Or(tirx.And(a, tirx.Not(b)), tirx.And(b, tirx.Not(a)))


_TABLE: dict[str, Callable[..., Any]] = {
    "eq": _comparison(tirx.EQ), "ne": _comparison(lambda x, y: tirx.Not(tirx.EQ(x, y))),
    "lt": _comparison(lambda x, y: x < y), "le": _comparison(lambda x, y: x <= y),
    "gt": _comparison(lambda x, y: x > y), "ge": _comparison(lambda x, y: x >= y),
    "logical_and": _logical(tirx.And), "logical_or": _logical(tirx.Or), "logical_xor": _logical(_differ),
    "bitwise_and": _bits(tirx.And, tirx.bitwise_and), "bitwise_or": _bits(tirx.Or, tirx.bitwise_or),
    "bitwise_xor": _bits(_differ, tirx.bitwise_xor),
}  # fmt: skip
_TABLE |= {
    fn.__name__: _in_vectors(fn.__name__, fn)
    for fn in (vecwide.sin, vecwide.cos, vecwide.tan, vecwide.asin, vecwide.acos, vecwide.atan, vecwide.sinh, vecwide.cosh,
               vecwide.asinh, vecwide.acosh, vecwide.atanh, vecwide.erfc)
}  # fmt: skip

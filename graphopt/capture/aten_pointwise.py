"""Pointwise operators: PyTorch's promotion is spelt out as casts."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from graphopt.capture.aten import Context, Number, common_dtype, entry, exact, is_number, lowers
from graphopt.ir import types
from graphopt.ir.graph import Value

Operand: TypeAlias = Value | Number

# one operand -----------------------------------------------------------------------------------------------------------


def _float_unary(op: str) -> Any:
    """An op on floats; integers are computed in the traced (default float) dtype."""
    return lambda c, x: c.b.create(op, [c.to(x, c.dtype)])


for _name in (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan", "asin",
    "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "sigmoid",
):  # fmt: skip
    entry(_name, _float_unary(_name), _name)
entry("special_expit", _float_unary("sigmoid"), "special_expit")


def _real_unary(op: str, *, integers: bool) -> Any:
    """An op on real numbers; ``integers``: false when it leaves them as they are."""

    def build(c: Context, x: Value) -> Value:
        c.require(not x.dtype.is_complex and not (x.dtype.is_bool and integers))
        return c.b.create(op, [x]) if integers or x.dtype.is_float else x

    return build


for _name in ("floor", "ceil", "trunc", "round"):
    entry(_name, _real_unary(_name, integers=False), _name)
for _name in ("abs", "sign", "relu"):
    entry(_name, _real_unary(_name, integers=True), _name)
entry("sgn", _real_unary("sign", integers=True), "sgn")


@lowers("neg")
def neg(c: Context, x: Value) -> Value:
    c.require(not x.dtype.is_bool)
    return c.b.neg(x)


@lowers("positive", "alias", "detach", "lift", "lift_fresh", "lift_fresh_copy", "alias_copy", "detach_copy", "prims.device_put")
def identity(c: Context, x: Value, *_: Any, **__: Any) -> Value:
    return x


@lowers("clone", "contiguous")
def clone(c: Context, x: Value, memory_format: Any = None) -> Value:
    return x


@lowers("_to_copy")
def to_copy(c: Context, x: Value, **_: Any) -> Value:
    return c.to(x, c.dtype)


@lowers("prims.convert_element_type")
def convert_element_type(c: Context, x: Value, dtype: Any) -> Value:
    return c.to(x, c.dtype)


@lowers("copy")
def copy(c: Context, x: Value, source: Value, non_blocking: bool = False) -> Value:
    """What an in-place copy leaves in x."""
    return c.b.broadcast_to(c.to(source, c.dtype), c.shape)


@lowers("logical_not")
def logical_not(c: Context, x: Value) -> Value:
    return c.b.logical_not(c.to(x, types.b1))


@lowers("bitwise_not")
def bitwise_not(c: Context, x: Value) -> Value:
    return c.b.logical_not(x) if x.dtype.is_bool else c.b.bitwise_not(x)


@lowers("isnan")
def isnan(c: Context, x: Value) -> Value:
    c.require(x.dtype.is_float)
    return c.b.isnan(x)


@lowers("isinf")
def isinf(c: Context, x: Value) -> Value:
    c.require(x.dtype.is_float)
    return c.b.isinf(x)


@lowers("isfinite")
def isfinite(c: Context, x: Value) -> Value:
    c.require(x.dtype.is_float)
    return c.b.lt(c.b.abs(x), math.inf)


@lowers("isposinf")
def isposinf(c: Context, x: Value) -> Value:
    c.require(x.dtype.is_float)
    return c.b.eq(x, math.inf)


@lowers("isneginf")
def isneginf(c: Context, x: Value) -> Value:
    c.require(x.dtype.is_float)
    return c.b.eq(x, -math.inf)


@lowers("frac")
def frac(c: Context, x: Value) -> Value:
    c.require(x.dtype.is_float)
    return c.b.sub(x, c.b.trunc(x))


@lowers("square")
def square(c: Context, x: Value) -> Value:
    c.require(not x.dtype.is_bool)
    return c.b.mul(x, x)


@lowers("nan_to_num")
def nan_to_num(c: Context, x: Value, nan: float | None = None, posinf: float | None = None, neginf: float | None = None) -> Value:
    c.require(x.dtype in (types.f32, types.f64))
    greatest = 1.7976931348623157e308 if x.dtype == types.f64 else 3.4028234663852886e38
    out = c.b.where(c.b.isnan(x), c.constant(nan or 0.0, x.dtype), x)
    out = c.b.where(c.b.eq(x, math.inf), c.constant(greatest if posinf is None else posinf, x.dtype), out)
    return c.b.where(c.b.eq(x, -math.inf), c.constant(-greatest if neginf is None else neginf, x.dtype), out)


# two operands ----------------------------------------------------------------------------------------------------------


def arithmetic(c: Context, op: str, x: Operand, y: Operand) -> Value:
    """x op y in the traced dtype. Half precision with a scalar that it does not hold is computed in f32, as eager does."""
    wide = c.math_dtype(c.dtype)
    if wide != c.dtype and (_rounds(c, x) or _rounds(c, y)):
        return c.to(c.b.create(op, [c.to(x, wide), c.to(y, wide)]), c.dtype)
    return c.b.create(op, [c.to(x, c.dtype), c.to(y, c.dtype)])


def _rounds(c: Context, x: Operand) -> bool:
    if isinstance(x, Value):
        return x.type.rank == 0 and x.dtype in (types.f32, types.f64)
    return not exact(x, c.dtype)


def _plus(c: Context, op: str, x: Operand, y: Operand, alpha: Number) -> Value:
    c.require(not (op == "sub" and c.dtype.is_bool))
    if alpha == 1:
        return arithmetic(c, op, x, y)
    c.require(not c.dtype.is_bool)
    wide = c.math_dtype(c.dtype)
    factor = c.constant(alpha, wide) if exact(alpha, c.dtype) or wide == c.dtype else c.to(c.constant(alpha, c.dtype), wide)
    return c.to(c.b.create(op, [c.to(x, wide), c.b.mul(c.to(y, wide), factor)]), c.dtype)


@lowers("add.Tensor", "add.Scalar")
def add(c: Context, x: Operand, y: Operand, alpha: Number = 1) -> Value:
    return _plus(c, "add", x, y, alpha)


@lowers("sub.Tensor", "sub.Scalar")
def sub(c: Context, x: Operand, y: Operand, alpha: Number = 1) -> Value:
    return _plus(c, "sub", x, y, alpha)


@lowers("rsub.Tensor", "rsub.Scalar")
def rsub(c: Context, x: Operand, y: Operand, alpha: Number = 1) -> Value:
    return _plus(c, "sub", y, x, alpha)


@lowers("mul.Tensor", "mul.Scalar")
def mul(c: Context, x: Operand, y: Operand) -> Value:
    return arithmetic(c, "mul", x, y)


@lowers("div.Tensor", "div.Scalar", "true_divide.Tensor")
def div(c: Context, x: Operand, y: Operand) -> Value:
    return arithmetic(c, "div", x, y)


def _divide_whole(c: Context, op: str, x: Operand, y: Operand) -> Value:
    """Integer division by zero raises in eager and traps in a kernel: only a positive constant may divide."""
    if not c.dtype.is_float:
        c.require(c.dtype.is_integer and is_number(y) and not isinstance(y, float | complex) and isinstance(y, int) and y > 0)
    return arithmetic(c, op, x, y)


@lowers("div.Tensor_mode", "div.Scalar_mode")
def div_mode(c: Context, x: Operand, y: Operand, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return arithmetic(c, "div", x, y)
    return _divide_whole(c, "floor_div" if rounding_mode == "floor" else "trunc_div", x, y)


@lowers("floor_divide", "floor_divide.Scalar")
def floor_divide(c: Context, x: Operand, y: Operand) -> Value:
    return _divide_whole(c, "floor_div", x, y)


@lowers("remainder.Tensor", "remainder.Scalar")
def remainder(c: Context, x: Operand, y: Operand) -> Value:
    return _divide_whole(c, "remainder", x, y)


@lowers("fmod.Tensor", "fmod.Scalar")
def fmod(c: Context, x: Operand, y: Operand) -> Value:
    return _divide_whole(c, "fmod", x, y)


@lowers("atan2")
def atan2(c: Context, x: Operand, y: Operand) -> Value:
    return c.b.atan2(c.to(x, c.dtype), c.to(y, c.dtype))


@lowers("maximum")
def maximum(c: Context, x: Operand, y: Operand) -> Value:
    return c.b.maximum(c.to(x, c.dtype), c.to(y, c.dtype))


@lowers("minimum")
def minimum(c: Context, x: Operand, y: Operand) -> Value:
    return c.b.minimum(c.to(x, c.dtype), c.to(y, c.dtype))


def _ignoring_nan(c: Context, op: str, x: Operand, y: Operand) -> Value:
    a, b = c.to(x, c.dtype), c.to(y, c.dtype)
    best = c.b.create(op, [a, b])
    if not c.dtype.is_float:
        return best
    return c.b.where(c.b.isnan(a), b, c.b.where(c.b.isnan(b), a, best))


@lowers("fmax")
def fmax(c: Context, x: Operand, y: Operand) -> Value:
    return _ignoring_nan(c, "maximum", x, y)


@lowers("fmin")
def fmin(c: Context, x: Operand, y: Operand) -> Value:
    return _ignoring_nan(c, "minimum", x, y)


@lowers("pow.Tensor_Scalar")
def pow_scalar(c: Context, x: Value, y: Number) -> Value:
    """Small powers are products, as in PyTorch's own kernel; an integer to a negative power is an error there."""
    c.require(c.dtype.is_float and not isinstance(y, complex) and isinstance(y, int | float))
    v = c.to(x, c.dtype)
    if y == 2:
        return c.b.mul(v, v)
    if y == 3:  # bf16 is rounded after each product, f16 once
        wide = v if c.dtype == types.bf16 else c.to(v, c.math_dtype(c.dtype))
        return c.to(c.b.mul(c.b.mul(wide, wide), wide), c.dtype)
    if y == 0.5:
        return c.b.sqrt(v)
    if y == -0.5:
        return c.b.rsqrt(v)
    if y == -1:
        return c.b.reciprocal(v)
    return c.b.pow(v, c.constant(y, c.dtype))


@lowers("pow.Tensor_Tensor", "pow.Scalar")
def pow_tensor(c: Context, x: Operand, y: Operand) -> Value:
    c.require(c.dtype.is_float)
    return c.b.pow(c.to(x, c.dtype), c.to(y, c.dtype))


def _comparison(op: str) -> Any:
    def build(c: Context, x: Operand, y: Operand) -> Value:
        dtype = common_dtype(x, y)
        c.require(op in ("eq", "ne") or not dtype.is_complex)
        return c.b.create(op, [c.to(x, dtype), c.to(y, dtype)])

    return build


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    entry(_name, _comparison(_name), f"{_name}.Tensor", f"{_name}.Scalar")


def _logical(op: str) -> Any:
    return lambda c, x, y: c.b.create(op, [c.to(x, types.b1), c.to(y, types.b1)])


for _name in ("logical_and", "logical_or", "logical_xor"):
    entry(_name, _logical(_name), _name)


def _bitwise(op: str) -> Any:
    return lambda c, x, y: c.b.create(op, [c.to(x, c.dtype), c.to(y, c.dtype)])


for _name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
    entry(_name, _bitwise(_name), f"{_name}.Tensor", f"{_name}.Scalar")


def _shift(op: str) -> Any:
    """By a number of places that leaves a power of two within the dtype: a division toward -inf, or a product that wraps around."""

    def build(c: Context, x: Operand, places: Operand) -> Value:
        c.require(c.dtype.is_integer and isinstance(places, int) and 0 <= places < c.dtype.bits - 1, "a shift by no constant within bounds")
        return c.b.create(op, [c.to(x, c.dtype), c.constant(1 << places, c.dtype)])  # type: ignore[operator]

    return build


for _name, _op in (("left", "mul"), ("right", "floor_div")):
    entry(f"bitwise_{_name}_shift", _shift(_op), f"__{_name[0]}shift__.Scalar", f"bitwise_{_name}_shift.Tensor_Scalar")


@lowers("xlogy.Tensor", "xlogy.Scalar_Other", "xlogy.Scalar_Self")
def xlogy(c: Context, x: Operand, y: Operand) -> Value:
    """nan where y is nan, else 0 where x is 0, else x log y."""
    c.require(c.dtype in (types.f32, types.f64))
    a, b = c.to(x, c.dtype), c.to(y, c.dtype)
    zero = c.b.where(c.b.eq(a, 0.0), c.constant(0.0, c.dtype), c.b.mul(a, c.b.log(b)))
    return c.b.where(c.b.isnan(b), c.constant(math.nan, c.dtype), zero)


# three operands --------------------------------------------------------------------------------------------------------


@lowers("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(c: Context, condition: Value, x: Operand, y: Operand) -> Value:
    c.require(condition.dtype.is_bool)
    return c.b.where(condition, c.to(x, c.dtype), c.to(y, c.dtype))


@lowers("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(c: Context, x: Value, mask: Value, value: Operand) -> Value:
    c.require(mask.dtype.is_bool)
    return c.b.where(mask, c.to(value, c.dtype), x)


@lowers("clamp", "clamp.Tensor", "clip", "clip.Tensor")
def clamp(c: Context, x: Value, min: Operand | None = None, max: Operand | None = None) -> Value:
    out = c.to(x, c.dtype)
    if min is not None:
        out = _bounded(c, out, min, "maximum")
    return out if max is None else _bounded(c, out, max, "minimum")


def _bounded(c: Context, x: Value, bound: Operand, op: str) -> Value:
    """x, or the bound where x lies beyond it. Between zeros eager keeps x, and with it the sign of a zero."""
    limit = c.to(bound, c.dtype)
    if c.dtype.is_float and not isinstance(bound, Value) and bound == 0:
        return c.b.where(c.b.lt(x, limit) if op == "maximum" else c.b.gt(x, limit), limit, x)
    return c.b.maximum(x, limit) if op == "maximum" else c.b.minimum(x, limit)


@lowers("clamp_min", "clamp_min.Tensor")
def clamp_min(c: Context, x: Value, min: Operand) -> Value:
    return _bounded(c, c.to(x, c.dtype), min, "maximum")


@lowers("clamp_max", "clamp_max.Tensor")
def clamp_max(c: Context, x: Value, max: Operand) -> Value:
    return _bounded(c, c.to(x, c.dtype), max, "minimum")


@lowers("addcmul")
def addcmul(c: Context, x: Value, a: Value, b: Value, value: Number = 1) -> Value:
    c.require(not c.dtype.is_bool)
    wide = c.math_dtype(c.dtype)
    scaled = c.to(a, wide) if value == 1 else c.b.mul(c.to(a, wide), c.constant(value, wide))
    return c.to(c.b.add(c.to(x, wide), c.b.mul(scaled, c.to(b, wide))), c.dtype)


@lowers("addcdiv")
def addcdiv(c: Context, x: Value, a: Value, b: Value, value: Number = 1) -> Value:
    c.require(c.dtype.is_float or c.dtype.is_complex)
    wide = c.math_dtype(c.dtype)
    scaled = c.to(a, wide) if value == 1 else c.b.mul(c.to(a, wide), c.constant(value, wide))
    return c.to(c.b.add(c.to(x, wide), c.b.div(scaled, c.to(b, wide))), c.dtype)


@lowers("lerp.Scalar")
def lerp_scalar(c: Context, x: Value, y: Value, weight: Number) -> Value:
    """From the nearer end, so that both ends are met exactly."""
    c.require(isinstance(weight, int | float) and c.dtype.is_float)
    wide = c.math_dtype(c.dtype)
    a, b = c.to(x, wide), c.to(y, wide)
    gap = c.b.sub(b, a)
    if abs(weight) < 0.5:
        return c.to(c.b.add(a, c.b.mul(gap, c.constant(weight, wide))), c.dtype)
    return c.to(c.b.sub(b, c.b.mul(gap, c.constant(1.0 - weight, wide))), c.dtype)


@lowers("lerp.Tensor")
def lerp_tensor(c: Context, x: Value, y: Value, weight: Value) -> Value:
    c.require(c.dtype.is_float)
    wide = c.math_dtype(c.dtype)
    a, b, w = c.to(x, wide), c.to(y, wide), c.to(weight, wide)
    gap = c.b.sub(b, a)
    near = c.b.add(a, c.b.mul(gap, w))
    far = c.b.sub(b, c.b.mul(gap, c.b.sub(c.constant(1.0, wide), w)))
    return c.to(c.b.where(c.b.lt(c.b.abs(w), 0.5), near, far), c.dtype)

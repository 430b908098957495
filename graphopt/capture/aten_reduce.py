"""Reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.capture.aten import Context, Number, axes_of, lowers
from graphopt.ir import types
from graphopt.ir.graph import Value
from graphopt.ir.types import DType


def reduce(c: Context, op: str, x: Value, dim: Any, keepdim: bool, dtype: DType | None = None, **attrs: Any) -> Value:
    """One reduction in ``dtype`` (default: the operand's); a 0-d operand is reduced alone."""
    v = c.to(x, dtype or x.dtype)
    axes = axes_of(dim, v.type.rank)
    return c.b.create(op, [v], {"axes": axes, "keepdims": keepdim, **attrs}) if axes else v


@lowers("sum", "sum.dim_IntList")
def sum_(c: Context, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return reduce(c, "sum", x, dim, keepdim, c.dtype)


@lowers("prod", "prod.dim_int")
def prod(c: Context, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return reduce(c, "prod", x, dim, keepdim, c.dtype)


@lowers("mean", "mean.dim")
def mean(c: Context, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return reduce(c, "mean", x, dim, keepdim, c.dtype)


@lowers("mse_loss")
def mse_loss(c: Context, x: Value, target: Value, reduction: int = 1) -> Value:
    """(x - target)^2: each (0), their mean (1) or their sum (2)."""
    c.require(x.dtype == target.dtype == c.dtype and c.dtype in (types.f32, types.f64))
    difference = c.b.sub(x, target)
    square = c.b.mul(difference, difference)
    return square if reduction == 0 else reduce(c, "mean" if reduction == 1 else "sum", square, None, False)


@lowers("amax")
def amax(c: Context, x: Value, dim: Sequence[int] = (), keepdim: bool = False) -> Value:
    return reduce(c, "max", x, dim, keepdim)


@lowers("amin")
def amin(c: Context, x: Value, dim: Sequence[int] = (), keepdim: bool = False) -> Value:
    return reduce(c, "min", x, dim, keepdim)


@lowers("max")
def max_(c: Context, x: Value) -> Value:
    return reduce(c, "max", x, None, False)


@lowers("min")
def min_(c: Context, x: Value) -> Value:
    return reduce(c, "min", x, None, False)


def _with_index(c: Context, op: str, x: Value, dim: int, keepdim: bool) -> list[Value | None]:
    """Values and the index of the first one."""
    c.require(x.type.rank > 0 and not x.dtype.is_bool)
    axis = dim % x.type.rank
    values = reduce(c, op, x, axis, keepdim) if c.used[0] else None
    indices = c.b.create(f"arg{op}", [x], {"axis": axis, "keepdims": keepdim}) if c.used[1] else None
    return [values, indices]


@lowers("max.dim")
def max_dim(c: Context, x: Value, dim: int, keepdim: bool = False) -> list[Value | None]:
    return _with_index(c, "max", x, dim, keepdim)


@lowers("min.dim")
def min_dim(c: Context, x: Value, dim: int, keepdim: bool = False) -> list[Value | None]:
    return _with_index(c, "min", x, dim, keepdim)


@lowers("aminmax")
def aminmax(c: Context, x: Value, dim: int | None = None, keepdim: bool = False) -> list[Value | None]:
    c.require(not keepdim or dim is not None)
    return [reduce(c, op, x, dim, keepdim) for op in ("min", "max")]


def _truth(c: Context, op: str, x: Value, dim: Any, keepdim: bool) -> Value:
    return c.to(reduce(c, op, c.to(x, types.b1), dim, keepdim), c.dtype)


@lowers("any", "any.dim", "any.dims")
def any_(c: Context, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    c.require(dim is None or isinstance(dim, int) or len(dim) > 0)
    return _truth(c, "any", x, dim, keepdim)


@lowers("all", "all.dim", "all.dims")
def all_(c: Context, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    c.require(dim is None or isinstance(dim, int) or len(dim) > 0)
    return _truth(c, "all", x, dim, keepdim)


def _variance(c: Context, x: Value, dim: Any, correction: float | None, keepdim: bool) -> Value:
    correction = 1 if correction is None else correction
    c.require(x.dtype.is_float and x.type.rank > 0 and correction == int(correction))
    return reduce(c, "var", x, dim, keepdim, correction=int(correction))


@lowers("var.correction")
def var(c: Context, x: Value, dim: Any = None, correction: float | None = None, keepdim: bool = False) -> Value:
    return _variance(c, x, dim, correction, keepdim)


@lowers("std.correction")
def std(c: Context, x: Value, dim: Any = None, correction: float | None = None, keepdim: bool = False) -> Value:
    wide = c.to(x, c.math_dtype(x.dtype))
    return c.to(c.b.sqrt(_variance(c, wide, dim, correction, keepdim)), c.dtype)


@lowers("var_mean.correction")
def var_mean(c: Context, x: Value, dim: Any = None, correction: float | None = None, keepdim: bool = False) -> list[Value | None]:
    return [var(c, x, dim, correction, keepdim), reduce(c, "mean", x, dim, keepdim)]


@lowers("std_mean.correction")
def std_mean(c: Context, x: Value, dim: Any = None, correction: float | None = None, keepdim: bool = False) -> list[Value | None]:
    return [std(c, x, dim, correction, keepdim), reduce(c, "mean", x, dim, keepdim)]


def _extreme_index(c: Context, op: str, x: Value, dim: int | None, keepdim: bool) -> Value:
    c.require(x.type.rank > 0 and not x.dtype.is_bool)
    if dim is None:
        flat = c.b.reshape(x, (x.type.numel,))
        return c.b.reshape(c.b.create(op, [flat], {"axis": 0}), c.shape)
    return c.b.create(op, [x], {"axis": dim % x.type.rank, "keepdims": keepdim})


@lowers("argmax")
def argmax(c: Context, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    return _extreme_index(c, "argmax", x, dim, keepdim)


@lowers("argmin")
def argmin(c: Context, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    return _extreme_index(c, "argmin", x, dim, keepdim)


@lowers("logsumexp")
def logsumexp(c: Context, x: Value, dim: Sequence[int], keepdim: bool = False) -> Value:
    """log(sum(exp(x - m))) + m with m the maximum, or 0 where that is infinite."""
    c.require(x.dtype in (types.f32, types.f64) and x.type.rank > 0)
    axes = axes_of(dim, x.type.rank)
    top = c.b.max(x, axes=axes, keepdims=True)
    m = c.b.where(c.b.isinf(top), c.constant(0.0, x.dtype), top)
    total = c.b.log(c.b.sum(c.b.exp(c.b.sub(x, m)), axes=axes, keepdims=True))
    return c.b.reshape(c.b.add(total, m), c.shape)


@lowers("linalg_vector_norm")
def vector_norm(c: Context, x: Value, ord: Number = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    c.require(x.dtype.is_float and c.dtype.is_float and x.type.rank > 0 and ord in (1, 2))
    wide = c.to(c.to(x, c.dtype), c.math_dtype(c.dtype))
    if ord == 1:
        return c.to(reduce(c, "sum", c.b.abs(wide), dim, keepdim), c.dtype)
    return c.to(c.b.sqrt(reduce(c, "sum", c.b.mul(wide, wide), dim, keepdim)), c.dtype)

"""Operators that make tensors from nothing."""

from __future__ import annotations

from typing import Any

from graphopt.capture.aten import Context, Number, lowers
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Value


def filled(c: Context, value: Number) -> Value:
    """The traced shape, filled."""
    return c.b.broadcast_to(c.constant(value, c.dtype), c.shape)


@lowers("full", "scalar_tensor", "prims.full")
def full(c: Context, *args: Any, **_: Any) -> Value:
    return filled(c, args[-1] if not isinstance(args[-1], list | tuple) else args[1])


@lowers("full_like", "fill.Scalar")
def full_like(c: Context, x: Value, value: Number, **_: Any) -> Value:
    return filled(c, value)


@lowers("new_full")
def new_full(c: Context, x: Value, size: Any, value: Number, **_: Any) -> Value:
    return filled(c, value)


@lowers(
    "zeros", "zeros_like", "new_zeros", "zero", "empty.memory_format", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
    "empty_permuted",
)  # fmt: skip
def zeros(c: Context, *_: Any, **__: Any) -> Value:
    """Zeros; also where PyTorch leaves memory uninitialized, so that results are the same every time."""
    return filled(c, 0)


@lowers("ones", "ones_like", "new_ones")
def ones(c: Context, *_: Any, **__: Any) -> Value:
    return filled(c, 1)


@lowers("fill.Tensor")
def fill(c: Context, x: Value, value: Value) -> Value:
    return c.b.broadcast_to(c.to(value, c.dtype), c.shape)


@lowers("arange")
def arange(c: Context, end: Dim, **_: Any) -> Value:
    return _arange(c, 0, 1, end)


@lowers("arange.start")
def arange_start(c: Context, start: Dim, end: Dim, **_: Any) -> Value:
    return _arange(c, start, 1, end)


@lowers("arange.start_step")
def arange_step(c: Context, start: Dim, end: Dim, step: Dim = 1, **_: Any) -> Value:
    return _arange(c, start, step, end)


@lowers("prims.iota")
def iota(c: Context, length: Dim, start: Dim, step: Dim, **_: Any) -> Value:
    return _arange(c, start, step, length)


def _arange(c: Context, start: Number, step: Number, end: Number) -> Value:
    """Integer counts only: floats are stepped in another order by PyTorch's vectorized kernel."""
    c.require(not any(isinstance(v, float | complex | bool) for v in (start, step, end)))
    return c.b.iota(size=c.shape[0], start=start, step=step, dtype=c.dtype)


@lowers("eye", "eye.m")
def eye(c: Context, *_: Any, **__: Any) -> Value:
    rows, columns = c.shape
    diagonal = c.b.eq(c.b.reshape(c.b.iota(size=rows), (rows, 1)), c.b.iota(size=columns))
    return c.to(diagonal, c.dtype)



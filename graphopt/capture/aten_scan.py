"""Cumulative operators."""

from __future__ import annotations

from typing import Any

from graphopt.capture.aten import Context, lowers
from graphopt.ir.graph import Value


def _scan(c: Context, op: str, x: Value, dim: int) -> Value:
    axis = dim % max(1, x.type.rank)
    if x.type.rank == 0:
        return c.b.reshape(c.b.create(op, [c.b.reshape(x, (1,))], {"axis": 0}), ())
    return c.b.create(op, [x], {"axis": axis})


@lowers("cumsum")
def cumsum(c: Context, x: Value, dim: int, dtype: Any = None) -> Value:
    c.require(not c.dtype.is_bool)
    return _scan(c, "cumsum", c.to(x, c.dtype), dim)


@lowers("cumprod")
def cumprod(c: Context, x: Value, dim: int, dtype: Any = None) -> Value:
    c.require(not c.dtype.is_bool)
    return _scan(c, "cumprod", c.to(x, c.dtype), dim)


@lowers("logcumsumexp")
def logcumsumexp(c: Context, x: Value, dim: int) -> Value:
    c.require(x.dtype.is_float)
    return _scan(c, "logcumsumexp", x, dim)


def _with_places(c: Context, op: str, x: Value, dim: int) -> list[Value | None]:
    c.require(not x.dtype.is_complex)
    return [_scan(c, name, x, dim) if used else None for name, used in zip((op, f"arg{op}"), c.used, strict=True)]


@lowers("cummax")
def cummax(c: Context, x: Value, dim: int) -> list[Value | None]:
    return _with_places(c, "cummax", x, dim)


@lowers("cummin")
def cummin(c: Context, x: Value, dim: int) -> list[Value | None]:
    return _with_places(c, "cummin", x, dim)

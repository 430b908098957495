"""Padding, triangles and diagonals."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.capture.aten import Context, Number, lowers
from graphopt.capture.aten_shape import cut
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Value

# padding ---------------------------------------------------------------------------------------------------------------


@lowers("constant_pad_nd")
def constant_pad(c: Context, x: Value, pad: Sequence[Dim], value: float = 0) -> Value:
    """Pads from the last axis; a negative width cuts."""
    rank, symbols = x.type.rank, c.b.graph.symbols
    low: list[Dim] = [0] * rank
    high: list[Dim] = [0] * rank
    for i in range(len(pad) // 2):
        axis = rank - 1 - i
        before, after = pad[2 * i], pad[2 * i + 1]
        signs = [dims.prove(p, ">=", 0, symbols) for p in (before, after)]
        c.require(None not in signs)
        start = 0 if signs[0] else -before
        stop = x.shape[axis] if signs[1] else dims.add(x.shape[axis], after)
        c.require(dims.prove(start, "<=", stop, symbols))
        x = cut(c, x, axis, start, stop)
        low[axis], high[axis] = (before if signs[0] else 0), (after if signs[1] else 0)
    if not any(p != 0 for p in (*low, *high)):
        return x
    c.require(not isinstance(value, complex))
    fill = bool(value) if x.dtype.is_bool else int(value) if x.dtype.is_integer else float(value)
    return c.b.pad(x, low=tuple(low), high=tuple(high), value=fill)


# triangles -------------------------------------------------------------------------------------------------------------


def _triangle(c: Context, x: Value, keep: str, diagonal: int) -> Value:
    rows, columns = x.shape[-2:]
    row = c.b.reshape(c.b.iota(size=rows), (rows, 1))
    inside = c.b.create(keep, [c.b.iota(size=columns), c.b.add(row, diagonal) if diagonal else row])
    return c.b.where(inside, x, c.constant(0, x.dtype))


@lowers("tril")
def tril(c: Context, x: Value, diagonal: int = 0) -> Value:
    return _triangle(c, x, "le", diagonal)


@lowers("triu")
def triu(c: Context, x: Value, diagonal: int = 0) -> Value:
    return _triangle(c, x, "ge", diagonal)


# diagonals ---------------------------------------------------------------------------------------------------------------


def _diagonal_stretch(rows: int, columns: int, offset: int) -> tuple[int, int]:
    """First element of a diagonal in the row-major matrix, and its length."""
    length = min(rows, columns - offset) if offset >= 0 else min(rows + offset, columns)
    return (offset if offset >= 0 else -offset * columns), max(0, length)


def _with_matrix_last(c: Context, x: Value, dim1: int, dim2: int) -> Value:
    rank = x.type.rank
    a, b = dim1 % rank, dim2 % rank
    return c.b.transpose(x, (*(k for k in range(rank) if k not in (a, b)), a, b))


@lowers("diagonal", "diagonal_copy")
def diagonal(c: Context, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    """Every (columns + 1)-th element of the row-major matrix: a view."""
    x = _with_matrix_last(c, x, dim1, dim2)
    *lead, rows, columns = x.shape
    c.require(isinstance(rows, int) and isinstance(columns, int))
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    start, length = _diagonal_stretch(rows, columns, offset)
    flat = c.b.reshape(x, (*lead, rows * columns))
    if length == 0:
        return cut(c, flat, len(lead), 0, 0)
    return cut(c, flat, len(lead), start, start + (length - 1) * (columns + 1) + 1, columns + 1)


@lowers("diag_embed")
def diag_embed(c: Context, x: Value, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Value:
    rank = x.type.rank + 1
    a, b = dim1 % rank, dim2 % rank
    *lead, length = x.shape
    size = dims.add(length, abs(offset))
    low, high = (max(0, -offset), max(0, offset))
    zeros = (0,) * len(lead)
    rows = c.b.pad(x, low=(*zeros, low), high=(*zeros, high), value=zero(x)) if offset else x  # by row
    row, column = c.b.reshape(c.b.iota(size=size), (size, 1)), c.b.iota(size=size)
    inside = c.b.eq(column, c.b.add(row, offset) if offset else row)
    square = c.b.where(inside, c.b.reshape(rows, (*lead, size, 1)), c.constant(0, x.dtype))
    place = iter(range(len(lead)))
    return c.b.transpose(square, tuple(rank - 2 if k == a else rank - 1 if k == b else next(place) for k in range(rank)))


def zero(x: Value) -> Number:
    """Zero as an attribute of x's dtype."""
    return False if x.dtype.is_bool else 0.0 if x.dtype.is_float else 0


@lowers("trace")
def trace(c: Context, x: Value) -> Value:
    return c.b.sum(c.to(diagonal(c, x), c.dtype), axes=(0,))


@lowers("diagonal_scatter")
def diagonal_scatter(c: Context, x: Value, source: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    rank = x.type.rank
    a, b = dim1 % rank, dim2 % rank
    moved = _with_matrix_last(c, x, a, b)
    *lead, rows, columns = moved.shape
    c.require(isinstance(rows, int) and isinstance(columns, int) and not x.dtype.is_complex)
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    start, length = _diagonal_stretch(rows, columns, offset)
    if length == 0:
        return x
    at = c.b.iota(size=length, start=start, step=columns + 1)
    flat = c.b.put(c.b.reshape(moved, (*lead, rows * columns)), at, c.to(source, x.dtype), axis=len(lead), update="set")
    order = (*(k for k in range(rank) if k not in (a, b)), a, b)
    return c.b.transpose(c.b.reshape(flat, moved.shape), tuple(order.index(k) for k in range(rank)))


# blocks ------------------------------------------------------------------------------------------------------------------


@lowers("rot90")
def rot90(c: Context, x: Value, k: int = 1, axes: Sequence[int] = (0, 1)) -> Value:
    a, b = (axis % x.type.rank for axis in axes)
    perm = list(range(x.type.rank))
    perm[a], perm[b] = b, a
    match k % 4:
        case 1:
            return c.b.transpose(c.b.flip(x, axes=(b,)), tuple(perm))
        case 2:
            return c.b.flip(x, axes=(a, b))
        case 3:
            return c.b.transpose(c.b.flip(x, axes=(a,)), tuple(perm))
    return x

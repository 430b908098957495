"""Operators that move elements: views, joins, splits, padding. All of them are logical here; layouts live at the edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.capture.aten import Context, lowers
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Value
from graphopt.ir.opset.shape import slice_length

# views -----------------------------------------------------------------------------------------------------------------


@lowers(
    "view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims", "flatten.using_ints",
    "unflatten.int", "view_copy", "unsqueeze_copy", "squeeze_copy", "squeeze_copy.dim", "squeeze_copy.dims",
)  # fmt: skip
def reshape(c: Context, x: Value, *_: Any) -> Value:
    return c.b.reshape(x, c.shape)


@lowers("permute", "permute_copy")
def permute(c: Context, x: Value, perm: Sequence[int]) -> Value:
    return c.b.transpose(x, tuple(p % x.type.rank for p in perm))


@lowers("transpose.int", "transpose_copy.int")
def transpose(c: Context, x: Value, dim0: int, dim1: int) -> Value:
    if x.type.rank == 0:
        return x
    perm = list(range(x.type.rank))
    perm[dim0], perm[dim1] = perm[dim1], perm[dim0]
    return c.b.transpose(x, perm)


@lowers("t", "t_copy")
def t(c: Context, x: Value) -> Value:
    return c.b.transpose(x, tuple(reversed(range(x.type.rank))))


@lowers("expand", "expand_copy")
def expand(c: Context, x: Value, size: Sequence[Dim], implicit: bool = False) -> Value:
    return c.b.broadcast_to(x, c.shape)


def cut(c: Context, x: Value, axis: int, start: Dim, stop: Dim, step: int = 1) -> Value:
    """A slice; nothing is created for the whole axis."""
    if start == 0 and stop == x.shape[axis] and step == 1:
        return x
    return c.b.slice(x, axis=axis, start=start, stop=stop, step=step)


def bounds(c: Context, size: Dim, start: Dim | None, stop: Dim | None) -> tuple[Dim, Dim]:
    """Python's slice bounds made explicit: 0 <= start <= stop <= size. Declines where that is not provable."""
    first = _clamped(c, size, 0 if start is None else start)
    last = size if stop is None else _clamped(c, size, stop)
    if dims.prove(first, "<=", last, c.b.graph.symbols) is not True:
        c.require(dims.prove(last, "<=", first, c.b.graph.symbols), "slice bounds of unknown order")
        last = first
    return first, last


def traced_bounds(c: Context, size: Dim, start: Dim | None, stop: Dim | None, length: Dim | None) -> tuple[Dim, Dim]:
    """As :func:`bounds`, but a traced length of stop - start also shows that neither was clamped: tracing guarded on it."""
    if length is None or stop is None or length == 0:
        return bounds(c, size, start, stop)
    first, last = _from_end(c, size, 0 if start is None else start), _from_end(c, size, stop)
    if first is not None and last is not None and dims.same(dims.sub(last, first), length):
        return first, last
    return bounds(c, size, start, stop)


def _from_end(c: Context, size: Dim, at: Dim) -> Dim | None:
    negative = dims.prove(at, "<", 0, c.b.graph.symbols)
    return None if negative is None else dims.add(size, at) if negative else at


def _clamped(c: Context, size: Dim, at: Dim) -> Dim:
    symbols = c.b.graph.symbols
    if isinstance(at, int) and at >= 2**62:
        return size
    negative = dims.prove(at, "<", 0, symbols)
    c.require(negative is not None, "a slice bound of unknown sign")
    if negative:
        at = dims.add(size, at)
        if dims.prove(at, "<", 0, symbols) is True:
            return 0
        c.require(dims.prove(at, ">=", 0, symbols), "a slice bound that may lie outside")
    if dims.prove(at, "<=", size, symbols) is True:
        return at
    c.require(dims.prove(at, ">=", size, symbols), "a slice bound that may lie outside")
    return size


@lowers("slice.Tensor", "slice_copy.Tensor")
def slice_(c: Context, x: Value, dim: int = 0, start: Dim | None = None, end: Dim | None = None, step: int = 1) -> Value:
    axis = dim % x.type.rank
    c.require(isinstance(step, int))
    first, last = traced_bounds(c, x.shape[axis], start, end, c.shape[axis] if step == 1 else None)
    return cut(c, x, axis, first, last, step)


@lowers("select.int", "select_copy.int")
def select(c: Context, x: Value, dim: int, index: Dim) -> Value:
    axis = dim % x.type.rank
    at = _index(c, x.shape[axis], index)
    return c.b.reshape(cut(c, x, axis, at, dims.add(at, 1)), c.shape)


def _index(c: Context, size: Dim, index: Dim) -> Dim:
    negative = dims.prove(index, "<", 0, c.b.graph.symbols)
    c.require(negative is not None, "an index of unknown sign")
    return dims.add(size, index) if negative else index


@lowers("flip")
def flip(c: Context, x: Value, axes: Sequence[int]) -> Value:
    return c.b.flip(x, axes=tuple(a % x.type.rank for a in axes)) if axes and x.type.rank else x


# splits ----------------------------------------------------------------------------------------------------------------


@lowers("split.Tensor", "split_with_sizes", "split.sizes", "chunk", "unsafe_split.Tensor", "unsafe_split_with_sizes", "unsafe_chunk",
        "split_copy.Tensor", "split_with_sizes_copy")  # fmt: skip
def split(c: Context, x: Value, sizes: Any, dim: int = 0) -> list[Value | None]:
    axis = dim % x.type.rank
    parts: list[Value | None] = []
    at: Dim = 0
    for out, used in zip(c.outs, c.used, strict=True):
        assert out is not None
        after = dims.add(at, out.shape[axis])
        parts.append(cut(c, x, axis, at, after) if used else None)
        at = after
    return parts


@lowers("unbind.int", "unbind_copy.int")
def unbind(c: Context, x: Value, dim: int = 0) -> list[Value | None]:
    axis = dim % x.type.rank
    rest = (*x.shape[:axis], *x.shape[axis + 1 :])
    return [c.b.reshape(cut(c, x, axis, i, i + 1), rest) if used else None for i, used in enumerate(c.used)]


# joins -----------------------------------------------------------------------------------------------------------------


@lowers("cat", "concat", "concatenate")
def cat(c: Context, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Joins; a 1-D tensor without elements fits anything, for history's sake."""
    rank = c.out.rank
    parts = [c.to(v, c.dtype) for v in tensors if v.type.rank == rank and not (rank > 1 and v.shape == (0,))]
    c.require(bool(parts))
    if not all(isinstance(d, int) for v in parts for d in v.shape):  # sizes that a guard made equal take one form
        axis = dim % rank
        parts = [c.b.reshape(v, (*c.shape[:axis], v.shape[axis], *c.shape[axis + 1 :])) for v in parts]
    return c.b.concat(*parts, axis=dim % rank) if len(parts) > 1 else parts[0]


@lowers("stack")
def stack(c: Context, tensors: Sequence[Value], dim: int = 0) -> Value:
    axis = dim % c.out.rank
    one = (*c.shape[:axis], 1, *c.shape[axis + 1 :])
    parts = [c.b.reshape(c.to(v, c.dtype), one) for v in tensors]
    return c.b.concat(*parts, axis=axis) if len(parts) > 1 else parts[0]


@lowers("slice_scatter")
def slice_scatter(c: Context, x: Value, src: Value, dim: int = 0, start: Dim | None = None, end: Dim | None = None,
                  step: int = 1) -> Value:  # fmt: skip
    axis, size = dim % x.type.rank, x.shape[dim]
    first, last = bounds(c, size, start, end)
    if step != 1:
        count = slice_length(first, last, step)
        source = c.b.broadcast_to(c.to(src, c.dtype), (*x.shape[:axis], count, *x.shape[axis + 1 :]))
        c.require(not x.dtype.is_complex)
        return c.b.put(x, c.b.iota(size=count, start=first, step=step), source, axis=axis, update="set")
    middle = c.b.broadcast_to(c.to(src, c.dtype), (*x.shape[:axis], dims.sub(last, first), *x.shape[axis + 1 :]))
    if _is_state(x):
        return c.b.put(x, c.b.iota(size=dims.sub(last, first), start=first), middle, axis=axis, update="set")
    return _around(c, x, middle, axis, first, last)


@lowers("select_scatter")
def select_scatter(c: Context, x: Value, src: Value, dim: int, index: Dim) -> Value:
    axis = dim % x.type.rank
    at = _index(c, x.shape[axis], index)
    one = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    if _is_state(x):
        return c.b.put(x, c.b.iota(size=1, start=at), c.b.reshape(c.to(src, c.dtype), one), axis=axis, update="set")
    return _around(c, x, c.b.reshape(c.to(src, c.dtype), one), axis, at, dims.add(at, 1))


def _is_state(x: Value) -> bool:
    """Whether x is the caller's own tensor, which an update may be written into: a key-value cache. Others are joined from pieces."""
    return x.is_input and not x.weight and x.type.strides is None and not x.dtype.is_complex


def _around(c: Context, x: Value, middle: Value, axis: int, first: Dim, last: Dim) -> Value:
    """x with one stretch of an axis replaced."""
    size = x.shape[axis]
    parts = [cut(c, x, axis, 0, first)] if first != 0 else []
    parts.append(middle)
    if last != size:
        parts.append(cut(c, x, axis, last, size))
    return c.b.concat(*parts, axis=axis) if len(parts) > 1 else middle


@lowers("narrow_copy")
def narrow_copy(c: Context, x: Value, dim: int, start: Dim, length: Dim) -> Value:
    axis = dim % x.type.rank
    first = _index(c, x.shape[axis], start)
    return cut(c, x, axis, first, dims.add(first, length))


@lowers("roll")
def roll(c: Context, x: Value, shifts: Sequence[int], axes: Sequence[int] = ()) -> Value:
    if not axes:
        flat = c.b.reshape(x, (x.type.numel,))
        return c.b.reshape(_rolled(c, flat, shifts[0], 0), c.shape)
    for shift, axis in zip(shifts, axes, strict=True):
        x = _rolled(c, x, shift, axis % x.type.rank)
    return x


def _rolled(c: Context, x: Value, shift: int, axis: int) -> Value:
    size = x.shape[axis]
    c.require(isinstance(size, int) and isinstance(shift, int))
    if size == 0 or shift % size == 0:
        return x
    at = size - shift % size
    return c.b.concat(cut(c, x, axis, at, size), cut(c, x, axis, 0, at), axis=axis)


@lowers("repeat")
def repeat(c: Context, x: Value, repeats: Sequence[Dim]) -> Value:
    """Each axis d repeated r times: [1, d] broadcast to [r, d], merged."""
    extra = len(repeats) - x.type.rank
    shape = (*[1] * extra, *x.shape)
    narrow = [n for d in shape for n in (1, d)]
    wide = [n for r, d in zip(repeats, shape, strict=True) for n in (r, d)]
    return c.b.reshape(c.b.broadcast_to(c.b.reshape(x, tuple(narrow)), tuple(wide)), c.shape)

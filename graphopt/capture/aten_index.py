"""Taking by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.capture.aten import Context, lowers
from graphopt.capture.aten_shape import cut
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Value


@lowers("embedding")
def embedding(c: Context, weight: Value, index: Value, *_: Any) -> Value:
    return c.b.take(weight, index, axis=0)


@lowers("index_select")
def index_select(c: Context, x: Value, dim: int, index: Value) -> Value:
    c.require(x.type.rank > 0)
    flat = index if index.type.rank == 1 else c.b.reshape(index, (1,))
    return c.b.take(x, flat, axis=dim % x.type.rank)


@lowers("gather")
def gather(c: Context, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    """The index may be smaller than x in other axes: those are cut first."""
    c.require(x.type.rank == index.type.rank > 0 and not sparse_grad)
    axis = dim % x.type.rank
    for a, (n, m) in enumerate(zip(x.shape, index.shape, strict=True)):
        if a != axis and n != m:
            c.require(dims.prove(m, "<=", n, c.b.graph.symbols))
            x = cut(c, x, a, 0, m)
    return c.b.gather(x, index, axis=axis)


@lowers("index.Tensor")
def index(c: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    given = [(axis, v) for axis, v in enumerate(indices) if v is not None]
    c.require(all(v.dtype.is_integer and v.dtype.name != "u8" for _, v in given))
    if len(given) == 1:
        axis, v = given[0]
        return c.b.take(x, _wrapped(c, v, x.shape[axis]), axis=axis)
    if _is_separable(given) and any(_counts(v) is None for _, v in given):
        return _take_each(c, x, [(axis, _wrapped(c, v, x.shape[axis])) for axis, v in given], clip=False)
    return _index_grid(c, x, given)


@lowers("_unsafe_index.Tensor")
def unsafe_index(c: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    """Indices that are known to be valid: what interpolation is made of."""
    given = [(axis, v) for axis, v in enumerate(indices) if v is not None]
    c.require(all(v.dtype.is_integer and v.dtype.name != "u8" for _, v in given))
    c.require(len(given) == 1 or _is_separable(given))
    return _take_each(c, x, given, clip=True)


def _is_separable(given: Sequence[tuple[int, Value]]) -> bool:
    """Whether the indices of neighbouring axes are an open mesh, x[i[:, None], j[None, :]]."""
    axes, count = [axis for axis, _ in given], len(given)
    return axes == list(range(axes[0], axes[0] + count)) and all(
        v.type.rank <= count and all(d == 1 or a == place for a, d in enumerate(v.shape, count - v.type.rank))
        for place, (_, v) in enumerate(given)
    )


def _take_each(c: Context, x: Value, given: Sequence[tuple[int, Value]], clip: bool) -> Value:
    for axis, v in given:
        x = c.b.take(x, v if len(given) == 1 else c.b.reshape(v, (v.type.numel,)), axis=axis, clip=clip)
    return x


def _wrapped(c: Context, index: Value, size: Dim) -> Value:
    """Negative indices count from the end."""
    if _counts(index) is not None:
        return index
    return c.b.where(c.b.lt(index, 0), c.b.add(index, c.constant(size, index.dtype)), index)


def _counts(index: Value) -> int | None:
    """The axis along which an index is 0, 1, 2, ... and its other sizes 1, else None."""
    wide = [a for a, n in enumerate(index.shape) if n != 1]
    while node := index.defined_by("reshape", "cast", "add"):
        if node.op.name == "add" and not _is_zero(node.operands[1]):
            return None
        index = node.operands[0]
    node = index.defined_by("iota")
    if node is None or node.attrs["start"] != 0 or node.attrs["step"] != 1 or len(wide) > 1:
        return None
    return wide[0] if wide else -1


def _is_zero(v: Value) -> bool:
    node = v.defined_by("constant")
    return node is not None and node.attrs["value"] == 0


def _index_grid(c: Context, x: Value, given: Sequence[tuple[int, Value]]) -> Value:
    """x[i[:, None], j[None, :]] with i, j = 0, 1, 2, ... is a corner of x: the way attention masks are built."""
    axes = [axis for axis, _ in given]
    c.require(axes == list(range(x.type.rank)))
    places = [_counts(v) for _, v in given]
    c.require(all(p is not None for p in places))
    rank = c.out.rank
    landing = [p if p is not None and p < 0 else (p or 0) + rank - v.type.rank for p, (_, v) in zip(places, given, strict=True)]
    order = [p for p in landing if p >= 0]
    c.require(order == sorted(set(order)))
    for axis, v in given:
        count = v.type.numel
        c.require(dims.prove(count, "<=", x.shape[axis], c.b.graph.symbols))
        x = cut(c, x, axis, 0, count)
    return c.b.reshape(x, c.shape)

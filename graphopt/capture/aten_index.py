"""Taking by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.capture.aten import Context, lowers
from graphopt.capture.aten_shape import cut
from graphopt.ir import dims, types
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Value


@lowers("embedding")
def embedding(c: Context, weight: Value, index: Value, *_: Any) -> Value:
    return c.b.take(weight, index, axis=0)


@lowers("index_select")
def index_select(c: Context, x: Value, dim: int, index: Value) -> Value:
    flat = index if index.type.rank == 1 else c.b.reshape(index, (1,))
    if not x.type.rank:
        return c.b.reshape(c.b.take(c.b.reshape(x, (1,)), flat, axis=0), c.shape)
    return c.b.take(x, flat, axis=dim % x.type.rank)


@lowers("gather")
def gather(c: Context, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    """The index may be smaller than x in other axes: those are cut first."""
    c.require(not sparse_grad)
    if any(d == 0 for d in index.shape):
        return c.b.broadcast_to(c.constant(0, x.dtype), c.shape)
    x, index = (v if v.type.rank else c.b.reshape(v, (1,)) for v in (x, index))
    c.require(x.type.rank == index.type.rank)
    axis = dim % x.type.rank
    for a, (n, m) in enumerate(zip(x.shape, index.shape, strict=True)):
        if a != axis and n != m:
            c.require(dims.prove(m, "<=", n, c.b.graph.symbols))
            x = cut(c, x, a, 0, m)
    return c.b.reshape(c.b.gather(x, index, axis=axis), c.shape)


@lowers("take")
def take(c: Context, x: Value, index: Value) -> Value:
    """By position in row-major order; negative positions count from the end."""
    size = x.type.numel
    return c.b.take(c.b.reshape(x, (size,)), wrapped(c, as_index(c, index), size), axis=0)


@lowers("index.Tensor")
def index(c: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    given = [(axis, v) for axis, v in enumerate(indices) if v is not None]
    if len(given) > 1 and (grid := _index_grid(c, x, given)) is not None:
        return grid
    if len(given) > 1 and _is_separable(given):
        return _take_each(c, x, [(axis, wrapped(c, as_index(c, v), x.shape[axis])) for axis, v in given], clip=False)
    order, axis, flat = flat_index(c, x, given)
    moved, count = c.b.transpose(x, order), len(given)
    merged = c.b.reshape(moved, (*moved.shape[:axis], dims.numel(moved.shape[axis : axis + count]), *moved.shape[axis + count :]))
    return c.b.take(merged, flat, axis=axis)


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
    return c.b.reshape(x, c.shape)  # indices of one element each may make fewer axes than they take


def is_mask(index: Value) -> bool:
    """Whether a tensor of indices selects by truth."""
    return index.dtype.is_bool or index.dtype.name == "u8"


def as_index(c: Context, index: Value) -> Value:
    c.require(index.dtype.is_integer and not is_mask(index))
    return index


def flat_index(c: Context, x: Value, given: Sequence[tuple[int, Value]]) -> tuple[tuple[int, ...], int, Value]:
    """Several indices, broadcast together, as one.

    Args:
        given: (axis, index) by axis.

    Returns:
        (perm, axis, index): in transpose(x, perm) the indexed axes are neighbours, the first of them ``axis``; index counts
        in row-major order over all of them. They stay in place if they are neighbours already, else they go first.
    """
    axes = [axis for axis, _ in given]
    together = axes == list(range(axes[0], axes[0] + len(axes)))
    rest = [k for k in range(x.type.rank) if k not in axes]
    order = tuple(range(x.type.rank)) if together else (*axes, *rest)
    total: Value | None = None
    for axis, v in given:
        at = wrapped(c, as_index(c, v), x.shape[axis])
        if len(given) > 1:
            at = c.b.cast(at, types.i64)
        total = at if total is None else c.b.add(c.b.mul(total, c.constant(x.shape[axis], types.i64)), at)
    assert total is not None
    return order, axes[0] if together else 0, total


def wrapped(c: Context, index: Value, size: Dim) -> Value:
    """Negative indices count from the end."""
    if _counts(index) is not None:
        return index
    if index.dtype.bits < 64 and not (isinstance(size, int) and 2 * size < 1 << (index.dtype.bits - 1)):
        index = c.b.cast(index, types.i64)  # index + size must not wrap around
    return c.b.wrap_index(index, size=size)


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


def _index_grid(c: Context, x: Value, given: Sequence[tuple[int, Value]]) -> Value | None:
    """x[i[:, None], j[None, :]] with i, j = 0, 1, 2, ... is a corner of x: the way attention masks are built."""
    axes = [axis for axis, _ in given]
    places = [_counts(v) for _, v in given]
    if axes != list(range(x.type.rank)) or any(p is None for p in places):
        return None
    rank = c.out.rank
    landing = [p if p is not None and p < 0 else (p or 0) + rank - v.type.rank for p, (_, v) in zip(places, given, strict=True)]
    order = [p for p in landing if p >= 0]
    fits = [dims.prove(v.type.numel, "<=", x.shape[axis], c.b.graph.symbols) for axis, v in given]
    if order != sorted(set(order)) or not all(fits):
        return None
    for axis, v in given:
        x = cut(c, x, axis, 0, v.type.numel)
    return c.b.reshape(x, c.shape)

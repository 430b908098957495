"""Writing by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.capture.aten import Context, Number, is_number, lowers
from graphopt.capture.aten_index import as_index, flat_index, is_mask, wrapped
from graphopt.capture.aten_shape import cut
from graphopt.ir import dims, types
from graphopt.ir.dims import Shape
from graphopt.ir.graph import Value

_UPDATES = {"sum": "add", "add": "add", "prod": "mul", "multiply": "mul", "amax": "max", "amin": "min"}
_NEUTRAL = {"add": 0, "mul": 1}


def _at_least_1d(c: Context, x: Value) -> Value:
    return x if x.type.rank else c.b.reshape(x, (1,))


def _put(c: Context, x: Value, index: Value, source: Value, axis: int, update: str = "set") -> Value:
    """``put`` of a 1-D index; 0-d operands are 1-d ones of one element."""
    whole, index = _at_least_1d(c, x), _at_least_1d(c, index)
    source = c.b.reshape(source, (*whole.shape[:axis], *index.shape, *whole.shape[axis + 1 :]))
    return c.b.reshape(c.b.put(whole, index, source, axis=axis, update=update), x.shape)


# along one axis --------------------------------------------------------------------------------------------------------


@lowers("index_copy")
def index_copy(c: Context, x: Value, dim: int, index: Value, source: Value) -> Value:
    return _put(c, x, index, source, dim % max(1, x.type.rank))


@lowers("index_add")
def index_add(c: Context, x: Value, dim: int, index: Value, source: Value, alpha: Number = 1) -> Value:
    c.require(not x.dtype.is_complex)
    if alpha != 1:
        c.require(not x.dtype.is_bool)
        source = c.b.mul(source, c.constant(alpha, x.dtype))
    return _put(c, x, index, source, dim % max(1, x.type.rank), "add")


@lowers("index_fill.int_Scalar", "index_fill.int_Tensor")
def index_fill(c: Context, x: Value, dim: int, index: Value, value: Value | Number) -> Value:
    axis = dim % max(1, x.type.rank)
    whole, index = _at_least_1d(c, x), _at_least_1d(c, index)
    index = wrapped(c, as_index(c, index), whole.shape[axis])
    source = c.b.broadcast_to(c.to(value, x.dtype), (*whole.shape[:axis], *index.shape, *whole.shape[axis + 1 :]))
    return _put(c, x, index, source, axis)


@lowers("index_reduce")
def index_reduce(c: Context, x: Value, dim: int, index: Value, source: Value, reduce: str, include_self: bool = True) -> Value:
    c.require(reduce in _UPDATES)
    axis, update = dim % max(1, x.type.rank), _UPDATES[reduce]
    if not include_self:
        x = _put(c, x, index, c.b.broadcast_to(_neutral(c, update, source), source.shape), axis)
    return _put(c, x, index, source, axis, update)


def _neutral(c: Context, update: str, source: Value) -> Value:
    """The number that an update leaves out."""
    dtype = source.dtype
    if update in _NEUTRAL:
        return c.constant(_NEUTRAL[update], dtype)
    c.require(dtype.is_float or dtype.is_integer)
    if dtype.is_float:
        return c.constant(float("-inf") if update == "max" else float("inf"), dtype)
    low = -(1 << (dtype.bits - 1)) if dtype.kind == "i" else 0
    return c.constant(low if update == "max" else low + (1 << dtype.bits) - 1, dtype)


# by tensors of indices ---------------------------------------------------------------------------------------------------


@lowers("index_put", "_unsafe_index_put")
def index_put(c: Context, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False, *_: Any) -> Value:
    given = [(axis, v) for axis, v in enumerate(indices) if v is not None]
    c.require(bool(given) and not x.dtype.is_complex)
    values = c.to(values, x.dtype)
    if len(given) == 1 and is_mask(given[0][1]):
        return _fill_mask(c, x, given[0][0], given[0][1], values, accumulate)
    order, axis, index = flat_index(c, x, given)
    moved = c.b.transpose(x, order)
    count = len(given)
    flat = c.b.reshape(moved, (*moved.shape[:axis], dims.numel(moved.shape[axis : axis + count]), *moved.shape[axis + count :]))
    shape = (*flat.shape[:axis], *index.shape, *flat.shape[axis + 1 :])
    out = c.b.put(flat, index, _spread(c, values, shape), axis=axis, update="add" if accumulate else "set")
    back = [order.index(k) for k in range(len(order))]
    return c.b.transpose(c.b.reshape(out, moved.shape), back)


def _spread(c: Context, values: Value, shape: Shape) -> Value:
    """Values broadcast to a shape; leading axes of size 1 too many are dropped, as PyTorch does."""
    extra = values.type.rank - len(shape)
    if extra > 0:
        c.require(all(d == 1 for d in values.shape[:extra]))
        values = c.b.reshape(values, values.shape[extra:])
    return c.b.broadcast_to(values, shape)


def _fill_mask(c: Context, x: Value, axis: int, mask: Value, values: Value, accumulate: bool) -> Value:
    """x[mask] = v for one number, or values that do not depend on which elements the mask selects."""
    c.require(mask.dtype.is_bool and axis + mask.type.rank <= x.type.rank)
    tail = len(x.shape) - axis - mask.type.rank
    c.require(values.type.rank <= tail or all(d == 1 for d in values.shape[: values.type.rank - tail]))
    shape = (*[1] * axis, *mask.shape, *[1] * tail)
    flat = c.b.reshape(values, values.shape[max(0, values.type.rank - tail) :])
    c.require(axis == 0 or flat.type.rank == tail or dims.numel(flat.shape) == 1)
    wanted = c.b.add(x, flat) if accumulate else flat
    return c.b.broadcast_to(c.b.where(c.b.reshape(mask, shape), wanted, x), x.shape)


@lowers("put")
def put(c: Context, x: Value, index: Value, source: Value, accumulate: bool = False) -> Value:
    c.require(not x.dtype.is_complex)
    count, size = index.type.numel, x.type.numel
    at = wrapped(c, c.b.reshape(as_index(c, index), (count,)), size)
    flat = c.b.put(c.b.reshape(x, (size,)), at, c.b.reshape(source, (count,)), axis=0, update="add" if accumulate else "set")
    return c.b.reshape(flat, x.shape)


@lowers("embedding_dense_backward")
def embedding_dense_backward(c: Context, grad: Value, index: Value, rows: Any, padding_idx: int, scale: bool) -> Value:
    c.require(not scale)
    if padding_idx >= 0:
        pad = c.b.eq(index, c.constant(padding_idx, index.dtype))
        grad = c.b.where(c.b.reshape(pad, (*index.shape, 1)), c.constant(0, grad.dtype), grad)
    zero = c.b.broadcast_to(c.constant(0, c.dtype), c.shape)
    return c.b.put(zero, index, grad, axis=0, update="add")


# scatter -----------------------------------------------------------------------------------------------------------------


def _scatter(c: Context, x: Value, dim: int, index: Value, source: Value, update: str) -> Value:
    """The index may be shorter than the source in any axis: the source is cut first."""
    c.require(not x.dtype.is_complex)
    whole, index, source = _at_least_1d(c, x), _at_least_1d(c, index), _at_least_1d(c, source)
    if any(d == 0 for d in index.shape):
        return x
    axis = dim % whole.type.rank
    c.require(index.type.rank == whole.type.rank == source.type.rank)
    for a, (n, m) in enumerate(zip(source.shape, index.shape, strict=True)):
        if n != m:
            c.require(dims.prove(m, "<=", n, c.b.graph.symbols))
            source = cut(c, source, a, 0, m)
    c.require(all(a == axis or dims.prove(m, "<=", n, c.b.graph.symbols) for a, (n, m) in enumerate(zip(whole.shape, index.shape))))
    return c.b.reshape(c.b.scatter(whole, index, source, axis=axis, update=update), x.shape)


@lowers("scatter.src")
def scatter(c: Context, x: Value, dim: int, index: Value, source: Value) -> Value:
    return _scatter(c, x, dim, index, c.to(source, x.dtype), "set")


@lowers("scatter.value")
def scatter_value(c: Context, x: Value, dim: int, index: Value, value: Number) -> Value:
    return _scatter(c, x, dim, index, c.b.broadcast_to(c.constant(value, x.dtype), index.shape), "set")


@lowers("scatter.reduce", "scatter.value_reduce")
def scatter_with(c: Context, x: Value, dim: int, index: Value, source: Value | Number, reduce: str) -> Value:
    c.require(reduce in _UPDATES)
    if is_number(source):
        source = c.b.broadcast_to(c.constant(source, x.dtype), index.shape)
    assert isinstance(source, Value)
    return _scatter(c, x, dim, index, source, _UPDATES[reduce])


@lowers("scatter_add")
def scatter_add(c: Context, x: Value, dim: int, index: Value, source: Value) -> Value:
    return _scatter(c, x, dim, index, source, "add")


@lowers("scatter_reduce.two")
def scatter_reduce(c: Context, x: Value, dim: int, index: Value, source: Value, reduce: str, include_self: bool = True) -> Value:
    update = _UPDATES.get("sum" if reduce == "mean" else reduce)
    c.require(update is not None and not (reduce == "mean" and not x.dtype.is_float))
    assert update is not None
    if not include_self:
        x = _scatter(c, x, dim, index, c.b.broadcast_to(_neutral(c, update, source), index.shape), "set")
    total = _scatter(c, x, dim, index, source, update)
    if reduce != "mean":
        return total
    # half precision counts nothing above its largest whole number
    c.require(x.dtype in (types.f32, types.f64))
    one = c.constant(1.0, x.dtype)
    start = c.b.broadcast_to(one, x.shape)
    if not include_self:
        start = _scatter(c, start, dim, index, c.b.broadcast_to(c.constant(0.0, x.dtype), index.shape), "set")
    count = _scatter(c, start, dim, index, c.b.broadcast_to(one, index.shape), "add")
    return c.b.div(total, c.b.maximum(count, one))


# masks -------------------------------------------------------------------------------------------------------------------


@lowers("masked_scatter")
def masked_scatter(c: Context, x: Value, mask: Value, source: Value) -> Value:
    """Element i of the mask's true ones takes element i of the source: running counts say which. The source must be long enough."""
    shape = c.shape
    count, size = dims.numel(shape), source.type.numel
    c.require(dims.prove(count, "<=", size, c.b.graph.symbols), "the source may be too short")
    c.require(dims.prove(size, ">", 0, c.b.graph.symbols))
    flat = c.b.reshape(c.b.broadcast_to(mask, shape), (count,))
    at = c.b.sub(c.b.cumsum(c.b.cast(flat, types.i64), axis=0), c.constant(1, types.i64))
    at = c.b.minimum(c.b.maximum(at, c.constant(0, types.i64)), c.constant(dims.sub(size, 1), types.i64))
    taken = c.b.take(c.b.reshape(source, (size,)), at, axis=0)
    return c.b.where(c.b.reshape(flat, shape), c.b.reshape(taken, shape), c.b.broadcast_to(x, shape))

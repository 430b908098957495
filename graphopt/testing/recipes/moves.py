"""Recipes of what moves elements: views, concat, pad, and what reads or writes by index."""

from __future__ import annotations

from functools import partial

from graphopt.ir import TensorType, Value, dims, types
from graphopt.testing.pool import DTYPES, Pool
from graphopt.testing.recipes.registry import random_axis, recipe


@recipe("reshape")
def _reshape(pool: Pool, name: str) -> Value:
    x = pool.operand(DTYPES)
    shape = list(x.shape)
    kind = pool.chooser.integer(0, 3)
    if kind == 0 or not shape:
        shape.insert(pool.chooser.integer(0, len(shape)), 1)
    elif kind == 1:
        shape = [dims.numel(shape)]
    elif kind == 2 and len(shape) >= 2:  # merge two neighbours
        i = pool.chooser.integer(0, len(shape) - 2)
        shape[i : i + 2] = [dims.mul(shape[i], shape[i + 1])]
    else:  # split an even axis, or drop a 1
        i = pool.chooser.integer(0, len(shape) - 1)
        half = dims.floordiv(shape[i], 2)
        if shape[i] == 1:
            del shape[i]
        elif dims.mul(half, 2) == shape[i]:
            shape[i : i + 1] = [2, half] if pool.flag() else [half, 2]
    return pool.add(name, [x], shape=tuple(shape[:5]) if len(shape) <= 5 else x.shape)


@recipe("transpose")
def _transpose(pool: Pool, name: str) -> Value:
    x = pool.operand(DTYPES, least=1)
    rest, perm = list(range(x.type.rank)), []
    while rest:
        perm.append(rest.pop(-1 - pool.chooser.integer(0, len(rest) - 1)))
    return pool.add(name, [x], perm=tuple(perm))


@recipe("broadcast_to")
def _broadcast_to(pool: Pool, name: str) -> Value:
    x = pool.operand(DTYPES, most=3)
    shape = tuple(pool.size() if d == 1 and pool.flag() else d for d in x.shape)
    return pool.add(name, [x], shape=(pool.size(), *shape) if pool.flag() else shape)


@recipe("slice")
def _slice(pool: Pool, name: str) -> Value:
    x = pool.operand(DTYPES, least=1)
    axis = random_axis(pool, x)
    size = x.shape[axis]
    if isinstance(size, int):
        start = pool.chooser.integer(0, size - 1) if size else 0
        return pool.add(name, [x], axis=axis, start=start, stop=pool.chooser.integer(min(start + 1, size), size), step=pool.pick([1, 2]))
    stop = pool.pick([size, 1])  # sizes are at least 1
    return pool.add(name, [x], axis=axis, start=0, stop=stop, step=1 if stop == 1 else pool.pick([1, 2]))


@recipe("flip")
def _flip(pool: Pool, name: str) -> Value:
    x = pool.operand(DTYPES, least=1)
    return pool.add(name, [x], axes=tuple(i for i in range(x.type.rank) if pool.flag()) or (0,))


@recipe("concat")
def _concat(pool: Pool, name: str) -> Value:
    x = pool.operand(DTYPES, least=1)
    axis = random_axis(pool, x)
    parts = [x]
    for _ in range(pool.chooser.integer(0, 2)):
        other = TensorType(x.dtype, (*x.shape[:axis], pool.size(), *x.shape[axis + 1 :]))
        parts.append(pool.value(lambda v: v.type.logical == x.type.logical, partial(TensorType, other.dtype, other.shape)))
    return pool.add(name, parts, axis=axis)


@recipe("pad")
def _pad(pool: Pool, name: str) -> Value:
    x = pool.operand([d for d in DTYPES if not d.is_complex], least=1, most=3)
    low, high = (tuple(pool.pick([0, 1, 2]) for _ in x.shape) for _ in range(2))
    return pool.add(name, [x], low=low, high=high, value=pool.pick([0.0, 1.0]))


@recipe("take")
def _take(pool: Pool, name: str) -> Value:
    x = pool.operand(DTYPES, least=1, most=3)
    index = pool.input(pool.pick([types.i64, types.i32]), pool.shape(0, 2), keep=False)
    return pool.add(name, [x, index], axis=random_axis(pool, x), clip=pool.flag(3))


@recipe("gather")
def _gather(pool: Pool, name: str) -> Value:
    x = pool.operand(DTYPES, least=1, most=3)
    axis = random_axis(pool, x)
    shape = (*x.shape[:axis], pool.size(), *x.shape[axis + 1 :])
    return pool.add(name, [x, pool.input(types.i64, shape, keep=False)], axis=axis)


@recipe("put")
def _put(pool: Pool, name: str) -> Value:
    """Positions repeat: there are few of them."""
    x = pool.operand([d for d in DTYPES if not d.is_complex], least=1, most=3)
    axis, shape = random_axis(pool, x), pool.shape(0, 2)
    index = pool.input(pool.pick([types.i64, types.i32]), shape, keep=False)
    source = pool.input(x.dtype, (*x.shape[:axis], *shape, *x.shape[axis + 1 :]))
    return pool.add(name, [x, index, source], axis=axis, update=_update(pool, x))


@recipe("scatter")
def _scatter(pool: Pool, name: str) -> Value:
    x = pool.operand([d for d in DTYPES if not d.is_complex], least=1, most=3)
    axis = random_axis(pool, x)
    shape = (*x.shape[:axis], pool.size(), *x.shape[axis + 1 :])
    index, source = pool.input(types.i64, shape, keep=False), pool.input(x.dtype, shape)
    return pool.add(name, [x, index, source], axis=axis, update=_update(pool, x))


def _update(pool: Pool, x: Value) -> str:
    return pool.pick(["set", "add"] if x.dtype.is_bool else ["set", "add", "mul", "max", "min"])

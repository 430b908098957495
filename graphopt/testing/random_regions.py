"""Random fusion regions: chains of views and pointwise ops around one anchor, for tests of kernels."""

from __future__ import annotations

import random

from graphopt.ir import types
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph, Value
from graphopt.ir.types import TensorType
from graphopt.ir.verify import verify

_SIZES = (1, 2, 3, 5, 8, 17, 24, 35)


def _view(b: Builder, r: random.Random, x: Value) -> Value:
    """A random view, or a move of elements."""
    shape, rank = x.shape, x.type.rank
    axis = r.randrange(rank)
    match r.choice(("transpose", "reshape", "slice", "flip", "broadcast", "concat", "pad", "take")):
        case "transpose":
            return b.transpose(x, perm=tuple(r.sample(range(rank), rank)))
        case "reshape":
            if rank > 1 and r.random() < 0.5:
                k = r.randrange(rank - 1)
                return b.reshape(x, (*shape[:k], shape[k] * shape[k + 1], *shape[k + 2 :]))
            divisor = next((d for d in (2, 3, 5) if shape[axis] % d == 0), 1)
            return b.reshape(x, (*shape[:axis], divisor, shape[axis] // divisor, *shape[axis + 1 :]))
        case "slice":
            start = r.randrange(shape[axis])
            return b.slice(x, axis=axis, start=start, stop=r.randint(start + 1, shape[axis]), step=r.choice((1, 1, 2)))
        case "flip":
            return b.flip(x, axes=(axis,))
        case "broadcast":
            return b.broadcast_to(x, shape=(r.choice((1, 3)), *shape))
        case "concat":
            return b.concat(x, r.choice((x, b.neg(x))), axis=axis)
        case "pad":
            low, high = [0] * rank, [0] * rank
            low[axis], high[axis] = r.randrange(3), r.randrange(3)
            return b.pad(x, low=tuple(low), high=tuple(high), value=r.choice((0.0, 1.5)))
    index = b.graph.add_input(TensorType(types.i64, (r.choice((1, 4)),)), f"index{len(b.graph.inputs)}")
    return b.take(x, index, axis=axis)


def _pointwise(b: Builder, r: random.Random, x: Value) -> Value:
    match r.randrange(5):
        case 0:
            return b.relu(x)
        case 1:
            return b.add(x, b.constant(0.5, x.dtype))
        case 2:
            return b.tanh(x)
        case 3:
            return b.mul(x, x)
    other = b.graph.add_input(TensorType(x.dtype, x.shape[-1:]), f"other{len(b.graph.inputs)}")
    return b.sub(x, other)


def _chain(b: Builder, r: random.Random, x: Value, views: bool = True) -> Value:
    for _ in range(r.randint(0, 4)):
        y = _view(b, r, x) if views and r.random() < 0.7 else _pointwise(b, r, x)
        if y.type.rank <= 5 and y.type.numel <= 60000:
            x = y
    return x


def random_region(r: random.Random) -> tuple[Graph, str]:
    """A region of static sizes, and its kind: ``pointwise``, ``reduction``, ``rowwise`` or ``matmul``."""
    g = Graph("g")
    b = Builder(g)
    kind = r.choice(("pointwise", "reduction", "rowwise", "matmul"))
    dtype = types.f32 if r.random() < 0.8 else types.f64
    x = g.add_input(TensorType(dtype, tuple(r.choice(_SIZES) for _ in range(r.randint(2, 3)))), "x")
    v = _chain(b, r, x)
    if kind == "reduction":
        axes = tuple(sorted(r.sample(range(v.type.rank), r.randint(1, v.type.rank))))
        v = b.create(r.choice(("sum", "mean", "max", "min")), [v], {"axes": axes, "keepdims": r.random() < 0.5})
        v = b.mul(v, b.constant(2.0, dtype))
    elif kind == "rowwise":
        v = _pointwise(b, r, b.softmax(v, axis=v.type.rank - 1))
    elif kind == "matmul":
        while v.type.rank < 2:
            v = b.reshape(v, (1, *v.shape))
        depth, columns = v.shape[-1], r.choice(_SIZES)
        shape = (*v.shape[:-2], depth, columns) if r.random() < 0.5 else (depth, columns)
        swap = r.random() < 0.5
        y = g.add_input(TensorType(dtype, (*shape[:-2], columns, depth) if swap else shape), "y")
        other = b.transpose(y, perm=(*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)) if swap else y
        v = _chain(b, r, b.matmul(v, other), views=False)
    else:
        v = b.add(v, b.constant(1.0, dtype))
    g.set_outputs([v])
    for node in reversed(list(g.nodes())):
        if not node.result.uses:
            g.erase(node)
    for unused in [u for u in g.inputs if not u.uses]:
        g.remove_input(unused)
    verify(g)
    return g, kind

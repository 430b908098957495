"""How to make a random, well-typed node of each op: one recipe a family.

Recipes keep to what has a value: they divide integers by what is not zero, index within bounds, and cast floats to integers
only where the range is known. Every op of the table that has inference must have a recipe; a test checks it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from graphopt.ir import OPS, Builder, Graph, TensorType, Value, dims, types
from graphopt.ir.graph import copy_nodes
from graphopt.ir.ops import Trait
from graphopt.ir.ops import op as op_named
from graphopt.ir.opset.window import ADAPTIVE, SLIDING, spatial
from graphopt.testing.pool import DTYPES, FLOATS, INTEGERS, Pool, supported_dtypes

Recipe = Callable[[Pool, str], Value]
RECIPES: dict[str, Recipe] = {}

_ATTRS: dict[str, dict[str, list[float | str]]] = {
    "gelu": {"approximate": ["none", "tanh"]},
    "softplus": {"beta": [1.0, 2.0], "threshold": [20.0, 1.0]},
    "elu": {"alpha": [1.0, 1.5], "scale": [1.0, 1.05], "input_scale": [1.0, 0.5]},
    "leaky_relu": {"negative_slope": [0.01, 0.3]},
}


def recipe(*names: str) -> Callable[[Recipe], Recipe]:
    """Register a recipe for some ops."""

    def register(fn: Recipe) -> Recipe:
        RECIPES.update(dict.fromkeys(names, fn))
        return fn

    return register


# --- pointwise ---------------------------------------------------------------------------------------------------------

_DIVISIONS = ("floor_div", "trunc_div", "remainder", "fmod", "pow")


def _pointwise(pool: Pool, name: str) -> Value:
    x = pool.operand(supported_dtypes(name))
    if op_named(name).arity[0] == 1:
        return pool.add(name, [x], **{k: pool.pick(choices) for k, choices in _ATTRS.get(name, {}).items()})
    if name in _DIVISIONS and x.dtype.is_integer:  # a divisor of zero has no value, nor has a negative exponent
        return pool.add(name, [x, pool.builder.constant(pool.pick([1, 2, 3]), x.dtype)])
    y = pool.partner(x)
    return pool.add(name, [y, x] if pool.flag(4) and name not in _DIVISIONS else [x, y])


for _name, _op in OPS.items():
    if _op.has(Trait.POINTWISE) and _name not in ("where", "cast"):
        RECIPES[_name] = _pointwise


@recipe("where")
def _where(pool: Pool, name: str) -> Value:
    x = pool.operand(DTYPES)
    y = pool.partner(x)
    condition = pool.value(
        lambda v: v.dtype.is_bool and v.shape == x.shape,
        lambda: TensorType(types.b1, x.shape),
    )
    return pool.add(name, [condition, x, y])


@recipe("cast")
def _cast(pool: Pool, name: str) -> Value:
    x = pool.operand([d for d in DTYPES if not d.is_complex])
    narrow = x.dtype.is_float and x.producer is not None  # a float of unknown size has no integer value
    return pool.add(name, [x], dtype=pool.pick(FLOATS if narrow else [*FLOATS, *INTEGERS[:3], types.b1]))


@recipe("wrap_index")
def _wrap_index(pool: Pool, name: str) -> Value:
    return pool.add(name, [pool.operand([types.i64, types.i32])], size=pool.pick([3, 9]))


# --- creation ----------------------------------------------------------------------------------------------------------


@recipe("constant")
def _constant(pool: Pool, name: str) -> Value:
    dtype = pool.pick([types.f32, types.i64, types.f64])
    if pool.symbolic and dtype == types.i64 and pool.flag(3):
        size = pool.pick([dims.symbol("B"), dims.symbol("B") * 2 + 1])
        return pool.add(name, [], value=size, dtype=dtype)
    value = pool.scalar(dtype)
    pool.values.append(value)
    return value


@recipe("iota")
def _iota(pool: Pool, name: str) -> Value:
    return pool.add(name, [], size=pool.size(), start=pool.pick([0, 1]), step=pool.pick([1, 2]), dtype=pool.pick([types.i64, types.f32]))


# --- reductions --------------------------------------------------------------------------------------------------------


@recipe("sum", "prod", "max", "min", "any", "all", "mean", "var")
def _reduction(pool: Pool, name: str) -> Value:
    x = pool.operand(supported_dtypes(name))
    axes = tuple(i for i in range(x.type.rank) if not pool.flag(2))
    attrs = {"correction": pool.pick([1, 0])} if name == "var" else {}
    return pool.add(name, [x], axes=axes, keepdims=pool.flag(), **attrs)


@recipe("argmax", "argmin")
def _along_axis(pool: Pool, name: str) -> Value:
    x = pool.operand(supported_dtypes(name), least=1)
    return pool.add(name, [x], axis=_axis(pool, x), keepdims=pool.flag())


@recipe("cumsum", "cumprod", "cummax", "cummin", "argcummax", "argcummin", "logcumsumexp")
def _scan(pool: Pool, name: str) -> Value:
    x = pool.operand(supported_dtypes(name), least=1)
    return pool.add(name, [x], axis=_axis(pool, x))


def _axis(pool: Pool, x: Value) -> int:
    return pool.chooser.integer(0, x.type.rank - 1)


# --- contractions ------------------------------------------------------------------------------------------------------


@recipe("matmul")
def _matmul(pool: Pool, name: str) -> Value:
    x = pool.operand(FLOATS, least=2)
    batch = x.shape[:-2] if pool.flag(3) else ()
    return pool.add(name, [x, pool.input(x.dtype, (*batch, x.shape[-1], pool.size()))])


@recipe("conv")
def _conv(pool: Pool, name: str) -> Value:
    return _convolution(pool, pool.flag(3))


def _convolution(pool: Pool, last: bool) -> Value:
    x = pool.value(
        lambda v: v.dtype.is_float and v.type.rank in (3, 4) and isinstance(v.shape[1], int),
        lambda: TensorType(types.f32, (pool.size(), pool.pick([2, 4]), *pool.shape(1, 2))),
    )
    n, channels = x.type.rank - 2, x.shape[1]
    assert isinstance(channels, int)
    groups = 2 if channels % 2 == 0 and pool.flag(3) else 1
    kernel = pool.pick([1, 3])
    filters, attrs = 2 * pool.pick([1, 2]), {"padding": (kernel // 2,) * n, "dilation": (1,) * n, "groups": groups}
    if last:
        x = pool.add("transpose", [x], perm=(0, *range(2, n + 2), 1))
        w = pool.input(x.dtype, (*[kernel] * n, channels // groups, filters))
        return pool.add("conv", [x, w], stride=(pool.pick([1, 2]),) * n, channels_last=True, **attrs)
    w = pool.input(x.dtype, (filters, channels // groups, *[kernel] * n))
    return pool.add("conv", [x, w], stride=(pool.pick([1, 2]),) * n, **attrs)


@recipe("conv_transpose")
def _conv_transpose(pool: Pool, name: str) -> Value:
    x = pool.value(
        lambda v: v.dtype.is_float and v.type.rank in (3, 4) and isinstance(v.shape[1], int),
        lambda: TensorType(types.f32, (pool.size(), pool.pick([2, 4]), *pool.shape(1, 2))),
    )
    n, channels, stride, kernel = x.type.rank - 2, x.shape[1], pool.pick([2, 1, 3]), pool.pick([2, 3, 4])
    groups = 2 if isinstance(channels, int) and channels % 2 == 0 and pool.flag(3) else 1
    w = pool.input(x.dtype, (channels, pool.pick([1, 3]), *[kernel] * n), keep=False)
    more, padding = (stride - 1 if pool.flag() else 0), pool.pick([0, (kernel - 1) // 2])
    attrs = {"stride": (stride,) * n, "padding": (padding,) * n, "output_padding": (more,) * n, "dilation": (pool.pick([1, 2]),) * n}
    return pool.add(name, [x, w], groups=groups, **attrs)


def _image(pool: Pool) -> Value:
    return pool.value(
        lambda v: v.dtype.is_float and v.type.rank in (3, 4),
        lambda: TensorType(types.f32, (pool.size(), pool.pick([2, 4]), *pool.shape(1, 2))),
    )


@recipe(*SLIDING)
def _sliding_pool(pool: Pool, name: str) -> Value:
    x, last = _image(pool), pool.flag(3)
    n, kernel, stride = x.type.rank - 2, pool.pick([1, 2]), pool.pick([1, 2])
    attrs: dict[str, Any] = {"kernel": (kernel,) * n, "padding": (kernel // 2,) * n, "stride": (stride,) * n}
    attrs |= {"count_include_pad": pool.flag()} if name == "avg_pool" else {"dilation": (1,) * n}
    if pool.flag(3):  # as many windows as begin within the image
        attrs["size"] = tuple(dims.add(dims.floordiv(dims.add(d, kernel // 2 - 1), stride), 1) for d in spatial(x.shape, last))
    return pool.add(name, [x], channels_last=last, **attrs)


@recipe(*ADAPTIVE)
def _adaptive_pool(pool: Pool, name: str) -> Value:
    x = _image(pool)
    return pool.add(name, [x], size=tuple(pool.pick([1, 2, 3]) for _ in range(x.type.rank - 2)), channels_last=pool.flag(3))


# --- rows --------------------------------------------------------------------------------------------------------------


@recipe("softmax", "log_softmax")
def _softmax(pool: Pool, name: str) -> Value:
    x = pool.operand(FLOATS, least=1)
    return pool.add(name, [x], axis=_axis(pool, x))


@recipe("layer_norm", "rms_norm")
def _row_norm(pool: Pool, name: str) -> Value:
    x = pool.operand(FLOATS, least=1)
    axes = 1 if x.type.rank == 1 else pool.pick([1, 2])
    affine = [pool.input(x.dtype, x.shape[-axes:]) for _ in range(pool.chooser.integer(0, 2 if name == "layer_norm" else 1))]
    return pool.add(name, [x, *affine], axes=axes, eps=pool.pick([1e-5, 1e-3]))


@recipe("batch_norm", "group_norm")
def _channel_norm(pool: Pool, name: str) -> Value:
    x = pool.value(
        lambda v: v.dtype.is_float and v.type.rank >= 2 and isinstance(v.shape[1], int),
        lambda: TensorType(types.f32, (pool.size(), pool.pick([2, 4]), *pool.shape(0, 2))),
    )
    channels = x.shape[1]
    assert isinstance(channels, int)
    count = pool.chooser.integer(0, 2) + (2 if name == "batch_norm" else 0)
    attrs = {} if name == "batch_norm" else {"groups": 2 if channels % 2 == 0 and pool.flag() else 1}
    return pool.add(name, [x, *(pool.input(x.dtype, (channels,), keep=i >= 2) for i in range(count))], **attrs)


@recipe("attention")
def _attention(pool: Pool, name: str) -> Value:
    q = pool.operand(FLOATS[:2], least=2)
    *batch, rows, width = q.shape
    keys = rows if pool.flag() else pool.size()
    k, v = pool.input(q.dtype, (*batch, keys, width)), pool.input(q.dtype, (*batch, keys, pool.size()))
    bias = [pool.input(q.dtype, (rows, keys))] if pool.flag(3) else []
    return pool.add(name, [q, k, v, *bias], scale=pool.pick([1.0, 0.125]), causal=pool.flag(3))


@recipe("rope")
def _rope(pool: Pool, name: str) -> Value:
    x = pool.value(
        lambda v: v.dtype.is_float and v.type.rank >= 1 and isinstance(v.shape[-1], int) and v.shape[-1] % 2 == 0,
        lambda: TensorType(types.f32, (*pool.shape(0, 2), pool.pick([2, 4]))),
    )
    angles = x.shape[-2:] if pool.flag() else x.shape[-1:]
    return pool.add(name, [x, pool.input(x.dtype, angles), pool.input(x.dtype, angles)])


# --- moving elements ---------------------------------------------------------------------------------------------------


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
    axis = _axis(pool, x)
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
    axis = _axis(pool, x)
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
    return pool.add(name, [x, index], axis=_axis(pool, x), clip=pool.flag(3))


@recipe("gather")
def _gather(pool: Pool, name: str) -> Value:
    x = pool.operand(DTYPES, least=1, most=3)
    axis = _axis(pool, x)
    shape = (*x.shape[:axis], pool.size(), *x.shape[axis + 1 :])
    return pool.add(name, [x, pool.input(types.i64, shape, keep=False)], axis=axis)


@recipe("put")
def _put(pool: Pool, name: str) -> Value:
    """Positions repeat: there are few of them."""
    x = pool.operand([d for d in DTYPES if not d.is_complex], least=1, most=3)
    axis, shape = _axis(pool, x), pool.shape(0, 2)
    index = pool.input(pool.pick([types.i64, types.i32]), shape, keep=False)
    source = pool.input(x.dtype, (*x.shape[:axis], *shape, *x.shape[axis + 1 :]))
    return pool.add(name, [x, index, source], axis=axis, update=_update(pool, x))


@recipe("scatter")
def _scatter(pool: Pool, name: str) -> Value:
    x = pool.operand([d for d in DTYPES if not d.is_complex], least=1, most=3)
    axis = _axis(pool, x)
    shape = (*x.shape[:axis], pool.size(), *x.shape[axis + 1 :])
    index, source = pool.input(types.i64, shape, keep=False), pool.input(x.dtype, shape)
    return pool.add(name, [x, index, source], axis=axis, update=_update(pool, x))


def _update(pool: Pool, x: Value) -> str:
    return pool.pick(["set", "add"] if x.dtype.is_bool else ["set", "add", "mul", "max", "min"])


# --- idioms: what passes look for, and what random choice alone would seldom make ----------------------------------------


def _spelled_out(pool: Pool) -> None:
    """A composite by its definition, as a model may spell it."""
    name = pool.pick(["softmax", "layer_norm", "rms_norm", "gelu", "silu", "rope", "log_softmax", "attention", "mean"])
    value = RECIPES[name](pool, name)
    node = value.producer
    assert node is not None
    pool.values[-1] = Builder(pool.graph, before=node).expand(node)
    pool.graph.erase(node)


def _conv_and_norm(pool: Pool) -> None:
    x = _convolution(pool, False)
    channels = x.shape[1]
    mean, var = pool.input(x.dtype, (channels,), keep=False), pool.input(x.dtype, (channels,), keep=False)
    for v in (*x.producer.operands[1:], mean, var) if x.producer is not None else ():
        v.weight = True
    pool.add("batch_norm", [x, mean, var])


def _linear(pool: Pool) -> None:
    """A linear layer as capture sees it: leading axes flattened, a weight, a bias, an activation."""
    x = pool.operand(FLOATS, least=2, most=3)
    lead, width = x.shape[:-1], pool.pick([pool.static_size(), 48, 70])
    if isinstance(x.shape[-1], int):
        w = pool.input(x.dtype, (width, x.shape[-1]), keep=False)
        w.type, w.weight = w.type.logical, True
        w = pool.builder.transpose(w, (1, 0))
    else:
        w = pool.input(x.dtype, (x.shape[-1], width), keep=False)
    y = pool.add("matmul", [pool.builder.reshape(x, (dims.numel(lead), x.shape[-1])), w])
    y = pool.add("add", [y, pool.input(x.dtype, (width,))])
    if pool.flag():
        y = pool.add("reshape", [y], shape=(*lead, width))
    pool.add(pool.pick(["relu", "gelu", "tanh"]), [y])


def _tied(pool: Pool) -> None:
    """An embedding and the output layer that is tied to it: one weight, looked up and multiplied."""
    w = pool.input(types.f32, (pool.pick([48, 70]), 4), keep=False)
    w.type, w.weight = w.type.logical, True
    x = pool.add("take", [w, pool.input(types.i64, (3,), keep=False)], axis=0)
    x = pool.add(pool.pick(["relu", "tanh"]), [x])
    pool.add("matmul", [x, pool.builder.transpose(w, (1, 0))])


def _there_and_back(pool: Pool) -> None:
    x = pool.operand(FLOATS, least=2)
    perm = (*range(x.type.rank - 2), x.type.rank - 1, x.type.rank - 2)
    match pool.chooser.integer(0, 4):
        case 0:
            pool.add("transpose", [pool.add("transpose", [x], perm=perm)], perm=perm)
        case 1:
            pool.add("reshape", [pool.add("reshape", [x], shape=(dims.numel(x.shape),))], shape=x.shape)
        case 2:
            pool.add("cast", [pool.add("cast", [x], dtype=types.f64)], dtype=x.dtype)
        case 3:
            pool.add("neg", [pool.add("neg", [x])])
        case 4:
            pool.add("mul", [pool.add("mul", [x, pool.builder.constant(2.0, x.dtype)]), pool.builder.constant(0.5, x.dtype)])


IDIOMS: tuple[Callable[[Pool], None], ...] = (_there_and_back, _linear, _tied, _spelled_out, _conv_and_norm)


# --- fusion ------------------------------------------------------------------------------------------------------------


def fuse_chain(pool: Pool) -> None:
    """Put one pointwise node, and the pointwise nodes that only it uses, into a ``fusion`` node."""
    g = pool.graph
    roots = [n for n in g.nodes() if n.op.has(Trait.POINTWISE) and n.result.uses]
    if not roots:
        return
    root = pool.pick(roots)
    chain = [root]
    for node in chain:  # grows while it is walked
        for v in dict.fromkeys(node.operands):
            p = v.producer
            if p is not None and p not in chain and p.op.has(Trait.POINTWISE) and all(u in chain for u in v.users):
                chain.append(p)
    inner = [n for n in g.nodes() if n in chain]
    outer = list(dict.fromkeys(v for n in inner for v in n.operands if v.producer not in chain))
    body = Graph("body", g.symbols)
    mapping = {v: body.add_input(v.type.logical, v.hint) for v in outer}
    copy_nodes(inner, mapping, body)
    body.set_outputs([mapping[root.result]])
    fused = g.create(op_named("fusion"), outer, {"kind": "pointwise"}, before=root, body=body)
    g.replace(root.result, fused.result)
    for node in reversed(inner):
        g.erase(node)

"""Recipes of what the layers of networks are made of: products, convolutions, pooling, norms and attention."""

from __future__ import annotations

from typing import Any

from graphopt.ir import TensorType, Value, dims, types
from graphopt.ir.opset.window import ADAPTIVE, SLIDING, spatial
from graphopt.testing.pool import FLOATS, Pool
from graphopt.testing.recipes.registry import random_axis, recipe

# --- contractions ------------------------------------------------------------------------------------------------------


@recipe("matmul")
def _matmul(pool: Pool, name: str) -> Value:
    whole = pool.flag(6)  # of 8-bit integers, summed in 32 bits
    x = pool.operand([types.i8, types.u8] if whole else FLOATS, least=2)
    batch = x.shape[:-2] if pool.flag(3) else ()
    return pool.add(name, [x, pool.input(x.dtype, (*batch, x.shape[-1], pool.size()))], **({"acc": types.i32} if whole else {}))


@recipe("conv")
def _conv(pool: Pool, name: str) -> Value:
    return convolution(pool, pool.flag(3))


def convolution(pool: Pool, last: bool) -> Value:
    """A convolution of an image, with its channels last or not."""
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
        attrs |= _sums(pool, x)
        return pool.add("conv", [x, w], stride=(pool.pick([1, 2]),) * n, channels_last=True, **attrs)
    w = pool.input(x.dtype, (filters, channels // groups, *[kernel] * n))
    return pool.add("conv", [x, w], stride=(pool.pick([1, 2]),) * n, **attrs, **_sums(pool, x))


def _sums(pool: Pool, x: Value) -> dict[str, Any]:
    """The attribute for sums of half precision that stay in f32, sometimes."""
    return {"acc": types.f32} if x.dtype in (types.f16, types.bf16) and pool.flag() else {}


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
    return pool.add(name, [x, w], groups=groups, **attrs, **_sums(pool, x))


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
    return pool.add(name, [x], axis=random_axis(pool, x))


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
    shared = batch
    if batch and isinstance(batch[-1], int) and batch[-1] % 2 == 0 and pool.flag():
        shared = [*batch[:-1], batch[-1] // 2]  # heads that share keys
    operands = [q, pool.input(q.dtype, (*shared, keys, width)), pool.input(q.dtype, (*shared, keys, pool.size()))]
    attrs = {name: bool(batch) and pool.flag(4) for name in ("alibi", "sinks")}
    if pool.flag(3):
        operands.append(pool.input(q.dtype, (rows, keys)))
    if pool.flag(3):
        operands.append(pool.input(types.b1, (rows, keys)))
    operands += [pool.input(q.dtype, (batch[-1],)) for given in attrs.values() if given]
    window = pool.pick([None, None, 1, 3])
    softcap = pool.pick([None, None, 2.0])
    return pool.add(name, operands, scale=pool.pick([1.0, 0.125]), causal=pool.flag(3), offset=pool.pick([0, 0, 1]), window=window,
                    softcap=softcap, empty=pool.pick(["zero", "mean"]), **attrs)  # fmt: skip


@recipe("attention_forward", "attention_backward")
def _attention_training(pool: Pool, name: str) -> Value:
    q = pool.value(lambda v: False, lambda: TensorType(types.f32, (*pool.shape(0, 2), pool.size(), pool.size())))
    *batch, rows, width = q.shape
    few = [*batch[:-1], 1] if batch and isinstance(batch[-1], int) and pool.flag() else batch  # one head of keys for all
    keys, columns = pool.size(), pool.size()
    operands = [q, pool.input(q.dtype, (*few, keys, width)), pool.input(q.dtype, (*few, keys, columns))]
    given = {name: bool(batch) and pool.flag(4) for name in ("alibi", "sinks")}
    bias = pool.flag(3)
    if bias:
        operands.append(pool.input(q.dtype, (rows, keys)))
    if pool.flag(3):
        operands.append(pool.input(types.b1, (rows, keys)))
    operands += [pool.input(q.dtype, (batch[-1],)) for wanted in given.values() if wanted]
    rate = pool.pick([0.0, 0.0, 0.3])
    operands += [_seed(pool)] if rate else []
    if name == "attention_backward":
        given["bias_gradient"] = bias and pool.flag()
        result = (*batch, rows, columns)
        operands = [*(pool.input(q.dtype, shape) for shape in (result, result, result[:-1])), *operands]
    return pool.add(name, operands, scale=pool.pick([1.0, 0.125]), causal=pool.flag(3), offset=pool.pick([0, 0, 1]),
                    window=pool.pick([None, None, 1, 3]), softcap=pool.pick([None, None, 2.0]), empty=pool.pick(["zero", "nan"]),
                    dropout=rate, **given)  # fmt: skip


@recipe("dropout")
def _dropout(pool: Pool, name: str) -> Value:
    return pool.add(name, [pool.operand(FLOATS, least=1), _seed(pool)], rate=pool.pick([0.0, 0.1, 0.5]))


def _seed(pool: Pool) -> Value:
    return pool.input(types.i64, (), keep=False)


@recipe("rope")
def _rope(pool: Pool, name: str) -> Value:
    x = pool.value(
        lambda v: v.dtype.is_float and v.type.rank >= 1 and isinstance(v.shape[-1], int) and v.shape[-1] % 2 == 0,
        lambda: TensorType(types.f32, (*pool.shape(0, 2), pool.pick([2, 4]))),
    )
    angles = x.shape[-2:] if pool.flag() else x.shape[-1:]
    return pool.add(name, [x, pool.input(x.dtype, angles), pool.input(x.dtype, angles)])

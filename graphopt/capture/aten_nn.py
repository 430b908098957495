"""Contractions, normalizations, softmax and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from graphopt.capture.aten import Context, Number, each, lowers
from graphopt.ir import dims, types
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Value

# matrix products -------------------------------------------------------------------------------------------------------


def _product(c: Context, a: Value, b: Value) -> Value:
    """A matrix product of operands that eager accepts: one dtype, no bool."""
    c.require(a.dtype == b.dtype and not a.dtype.is_bool)
    return c.b.matmul(a, b)


@lowers("mm", "bmm")
def mm(c: Context, a: Value, b: Value) -> Value:
    return _product(c, a, b)


@lowers("matmul")
def matmul(c: Context, a: Value, b: Value) -> Value:
    """A vector counts as a row on the left, as a column on the right."""
    left = a if a.type.rank > 1 else c.b.reshape(a, (1, *a.shape))
    right = b if b.type.rank > 1 else c.b.reshape(b, (*b.shape, 1))
    return c.b.reshape(_product(c, left, right), c.shape)


@lowers("mv", "dot")
def mv(c: Context, a: Value, b: Value) -> Value:
    return matmul(c, a, b)


@lowers("linear")
def linear(c: Context, x: Value, w: Value, bias: Value | None = None) -> Value:
    y = matmul(c, x, c.b.transpose(w, tuple(reversed(range(w.type.rank)))))
    return y if bias is None else c.b.add(y, bias)


def _added(c: Context, bias: Value, a: Value, b: Value, beta: Number, alpha: Number) -> Value:
    """beta * bias + alpha * a @ b; a beta of zero does not read the bias, not even its nan. Half precision is rounded once, at the end."""
    dtype = c.math_dtype(c.dtype)
    c.require(a.dtype == b.dtype == bias.dtype == c.dtype and not c.dtype.is_bool and (c.dtype.is_float or (alpha == 1 and beta == 1)))
    product: Value = c.b.create("matmul", [a, b], {"acc": dtype} if dtype != c.dtype else {})
    if alpha != 1:
        product = c.b.mul(product, c.constant(alpha, dtype))
    if beta != 0:
        bias = c.to(bias, dtype)
        product = c.b.add(product, bias if beta == 1 else c.b.mul(bias, c.constant(beta, dtype)))
    return c.to(product, c.dtype)


@lowers("addmm", "baddbmm")
def addmm(c: Context, bias: Value, a: Value, b: Value, beta: Number = 1, alpha: Number = 1) -> Value:
    return _added(c, bias, a, b, beta, alpha)


@lowers("addmv")
def addmv(c: Context, bias: Value, a: Value, b: Value, beta: Number = 1, alpha: Number = 1) -> Value:
    column, shift = c.b.reshape(b, (*b.shape, 1)), c.b.reshape(bias, (*bias.shape, 1)) if bias.type.rank else bias
    return c.b.reshape(_added(c, shift, a, column, beta, alpha), c.shape)


# convolution -----------------------------------------------------------------------------------------------------------


@lowers("convolution")
def convolution(c: Context, x: Value, w: Value, bias: Value | None, stride: Sequence[int], padding: Sequence[Dim],
                dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int) -> Value:  # fmt: skip
    n = x.type.rank - 2
    c.require(x.dtype.is_float and x.dtype == w.dtype and 1 <= n <= 3)
    c.require(all(isinstance(v, int) for v in (*stride, *padding, *dilation, *output_padding, groups)))
    c.require(transposed or not any(output_padding))
    stride, padding, dilation, output_padding = (each(v, n) for v in (stride, padding, dilation, output_padding))  # "valid" is one 0
    attrs = {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation), "groups": groups}
    if transposed:
        attrs["output_padding"] = tuple(output_padding)
    wide = c.math_dtype(c.dtype)
    c.require(bias is None or x.dtype != types.bf16, "with a bias PyTorch's kernel rounds once, and has units for bf16")
    if bias is not None and wide != c.dtype:  # half precision is rounded once, after the sum
        attrs["acc"] = wide
    y = c.b.create("conv_transpose" if transposed else "conv", [x, w], attrs)
    if bias is None:
        return y
    return c.to(c.b.add(y, c.b.reshape(c.to(bias, wide), (bias.shape[0], *[1] * n))), c.dtype)


# normalizations --------------------------------------------------------------------------------------------------------


def _affine(c: Context, x: Value, weight: Value | None, bias: Value | None) -> list[Value]:
    c.require(x.dtype.is_float and all(v is None or v.dtype == x.dtype for v in (weight, bias)), "mixed dtypes")
    c.require(weight is not None or bias is None, "a shift without a scale")
    return [v for v in (weight, bias) if v is not None]


def _widened(c: Context, operands: Sequence[Value]) -> list[Value]:
    """Operands in f32 for half precision: these ops are taken apart by passes, and only the result may be rounded."""
    return [c.to(v, c.math_dtype(v.dtype)) for v in operands]


@lowers("native_layer_norm")
def layer_norm(c: Context, x: Value, shape: Sequence[Dim], weight: Value | None, bias: Value | None, eps: float) -> list[Value | None]:
    c.only_first()
    return [c.b.layer_norm(x, *_affine(c, x, weight, bias), axes=len(shape), eps=eps), None, None]


@lowers("_fused_rms_norm")
def rms_norm(c: Context, x: Value, shape: Sequence[Dim], weight: Value | None, eps: float | None) -> list[Value | None]:
    c.only_first()
    c.require(eps is not None)
    return [c.b.rms_norm(x, *_affine(c, x, weight, None), axes=len(shape), eps=eps), None]


@lowers("native_group_norm")
def group_norm(c: Context, x: Value, weight: Value | None, bias: Value | None, n: Dim, channels: Dim, space: Dim, groups: int,
               eps: float) -> list[Value | None]:  # fmt: skip
    c.only_first()
    c.require(x.type.rank >= 2 and x.shape[0] == n and x.shape[1] == channels)
    operands = _widened(c, [x, *_affine(c, x, weight, bias)])
    return [c.to(c.b.group_norm(*operands, groups=groups, eps=eps), c.dtype), None, None]


@lowers("_native_batch_norm_legit.no_stats")
def instance_norm(c: Context, x: Value, weight: Value | None, bias: Value | None, training: bool, momentum: float,
                  eps: float) -> list[Value | None]:  # fmt: skip
    """With the statistics of a batch of one, all channels of all images side by side: each channel is a group of its own."""
    c.only_first()
    c.require(training and x.type.rank > 2 and x.shape[0] == 1)
    v, *affine = _widened(c, [x, *_affine(c, x, weight, bias)])
    if isinstance(x.shape[1], int):
        return [c.to(c.b.group_norm(v, *affine, groups=x.shape[1], eps=eps), c.dtype), None, None]
    flat = c.b.reshape(v, (x.shape[1], dims.numel(x.shape[2:])))
    y = c.b.layer_norm(flat, axes=1, eps=eps)
    for op, w in zip(("mul", "add"), affine):
        y = c.b.create(op, [y, c.b.reshape(w, (x.shape[1], 1))])
    return [c.to(c.b.reshape(y, x.shape), c.dtype), None, None]


@lowers("_native_batch_norm_legit_no_training")
def batch_norm(c: Context, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value, momentum: float,
               eps: float) -> list[Value | None]:  # fmt: skip
    c.only_first()
    c.require(mean.dtype == var.dtype == x.dtype)
    operands = _widened(c, [x, mean, var, *_affine(c, x, weight, bias)])
    return [c.to(c.b.batch_norm(*operands, eps=eps), c.dtype), None, None]


# softmax, attention ----------------------------------------------------------------------------------------------------


def _rows(c: Context, op: str, x: Value, dim: int) -> Value:
    c.require(x.dtype.is_float and x.type.rank > 0)
    return c.b.create(op, [x], {"axis": dim % x.type.rank})


@lowers("_softmax")
def softmax(c: Context, x: Value, dim: int, half_to_float: bool = False) -> Value:
    return _rows(c, "softmax", c.to(x, c.dtype), dim)


@lowers("_log_softmax")
def log_softmax(c: Context, x: Value, dim: int, half_to_float: bool = False) -> Value:
    return _rows(c, "log_softmax", c.to(x, c.dtype), dim)


@lowers("_safe_softmax")
def safe_softmax(c: Context, x: Value, dim: int, dtype: Any = None) -> Value:
    """Softmax, and zeros in a row of nothing but -inf."""
    v = c.to(x, c.dtype)
    rows = _rows(c, "softmax", v, dim)
    masked = c.b.all(c.b.eq(v, -math.inf), axes=(dim % v.type.rank,), keepdims=True)
    return c.b.where(masked, c.constant(0.0, c.dtype), rows)


@lowers("_scaled_dot_product_flash_attention_for_cpu")
def attention(c: Context, q: Value, k: Value, v: Value, dropout_p: float = 0.0, is_causal: bool = False, attn_mask: Value | None = None,
              scale: float | None = None) -> list[Value | None]:  # fmt: skip
    """Grouped queries: each head of k and v serves several heads of q."""
    c.only_first()
    c.require(dropout_p == 0 and q.type.rank == k.type.rank == v.type.rank == 4 and not (is_causal and attn_mask is not None))
    c.require(attn_mask is None or attn_mask.dtype == q.dtype)
    if scale is None:
        c.require(isinstance(q.shape[-1], int))
        scale = 1.0 / math.sqrt(q.shape[-1])  # type: ignore[arg-type]
    c.require(all(_shares(q.shape[1], x.shape[1]) for x in (k, v)))
    operands = [q, k, v] + ([attn_mask] if attn_mask is not None else [])
    return [c.b.attention(*operands, scale=float(scale), causal=is_causal), None]


@lowers("_scaled_dot_product_flash_attention")
def flash_attention(c: Context, q: Value, k: Value, v: Value, dropout_p: float = 0.0, is_causal: bool = False,
                    return_debug_mask: bool = False, scale: float | None = None) -> list[Value | None]:  # fmt: skip
    """PyTorch's choice on a GPU for half precision; the other results are for its own backward."""
    return _first(c, attention(c, q, k, v, dropout_p, is_causal, None, scale))


@lowers("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
def efficient_attention(c: Context, q: Value, k: Value, v: Value, attn_bias: Value | None, compute_log_sumexp: bool,
                        dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False,
                        scale: float | None = None) -> list[Value | None]:  # fmt: skip
    """PyTorch's choice on a GPU for f32 and for masks."""
    return _first(c, attention(c, q, k, v, dropout_p, is_causal, attn_bias, scale))


def _first(c: Context, results: list[Value | None]) -> list[Value | None]:
    """The first result, for an operator that has more."""
    return [*results[:1], *[None] * (len(c.outs) - 1)]


def _shares(many: Dim, few: Dim) -> bool:
    """Whether so many heads of queries can share so many heads of keys."""
    return many == few or (isinstance(many, int) and isinstance(few, int) and few > 0 and many % few == 0)

"""Activations, and the simple pointwise gradients of training graphs."""

from __future__ import annotations

import math
from typing import Any

from graphopt.capture.aten import Context, entry, lowers
from graphopt.capture.aten_shape import cut
from graphopt.ir import types
from graphopt.ir.graph import Value


def _activation(op: str) -> Any:
    def build(c: Context, x: Value, **attrs: Any) -> Value:
        c.require(x.dtype.is_float)
        return c.b.create(op, [x], attrs)

    return build


for _name in ("silu", "mish", "hardswish", "hardsigmoid"):
    entry(_name, _activation(_name), _name)


@lowers("gelu")
def gelu(c: Context, x: Value, approximate: str = "none") -> Value:
    c.require(x.dtype.is_float)
    return c.b.gelu(x, approximate=approximate)


@lowers("softplus")
def softplus(c: Context, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    c.require(x.dtype.is_float)
    return c.b.softplus(x, beta=float(beta), threshold=float(threshold))


@lowers("elu")
def elu(c: Context, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    c.require(x.dtype.is_float)
    return c.b.elu(x, alpha=float(alpha), scale=float(scale), input_scale=float(input_scale))


@lowers("celu")
def celu(c: Context, x: Value, alpha: float = 1) -> Value:
    return elu(c, x, alpha, 1.0, 1.0 / float(alpha))


@lowers("selu")
def selu(c: Context, x: Value) -> Value:
    return elu(c, x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@lowers("glu")
def glu(c: Context, x: Value, dim: int = -1) -> Value:
    """The first half of x along ``dim``, times the sigmoid of the second; half precision is rounded once."""
    c.require(x.dtype.is_float and x.type.rank > 0)
    axis = dim % x.type.rank
    half, size = c.shape[axis], x.shape[axis]
    wide = c.math_dtype(x.dtype)
    value, gate = (c.to(cut(c, x, axis, start, stop), wide) for start, stop in ((0, half), (half, size)))
    return c.to(c.b.mul(value, c.b.sigmoid(gate)), x.dtype)


@lowers("leaky_relu")
def leaky_relu(c: Context, x: Value, negative_slope: float = 0.01) -> Value:
    c.require(x.dtype.is_float)
    return c.b.leaky_relu(x, negative_slope=float(negative_slope))


@lowers("_prelu_kernel")
def prelu(c: Context, x: Value, weight: Value) -> Value:
    c.require(x.dtype == weight.dtype)
    return c.b.where(c.b.gt(x, 0.0), x, c.b.mul(weight, x))


@lowers("hardtanh")
def hardtanh(c: Context, x: Value, min_val: float = -1, max_val: float = 1) -> Value:
    return c.b.minimum(c.b.maximum(x, c.constant(min_val, x.dtype)), c.constant(max_val, x.dtype))


@lowers("relu6")
def relu6(c: Context, x: Value) -> Value:
    return hardtanh(c, x, 0, 6)


@lowers("threshold")
def threshold(c: Context, x: Value, threshold: float, value: float) -> Value:
    c.require(not x.dtype.is_complex)
    return c.b.where(c.b.le(x, c.constant(threshold, x.dtype)), c.constant(value, x.dtype), x)


@lowers("hardshrink")
def hardshrink(c: Context, x: Value, lambd: float = 0.5) -> Value:
    c.require(x.dtype.is_float)
    inside = c.b.logical_and(c.b.ge(x, -float(lambd)), c.b.le(x, float(lambd)))
    return c.b.where(inside, c.constant(0.0, x.dtype), x)


@lowers("log_sigmoid_forward")
def log_sigmoid(c: Context, x: Value) -> list[Value | None]:
    """min(x, 0) - log1p(exp(-|x|)); the second result is a buffer for the backward pass."""
    c.only_first()
    wide = c.to(x, c.math_dtype(x.dtype))
    tail = c.b.log1p(c.b.exp(c.b.neg(c.b.abs(wide))))
    return [c.to(c.b.sub(c.b.minimum(wide, 0.0), tail), x.dtype), None]


@lowers("logit")
def logit(c: Context, x: Value, eps: float | None = None) -> Value:
    c.require(c.dtype in (types.f32, types.f64))
    v = c.to(x, c.dtype)
    if eps is not None:
        v = c.b.minimum(c.b.maximum(v, float(eps)), 1.0 - float(eps))
    return c.b.log(c.b.div(v, c.b.sub(c.constant(1.0, c.dtype), v)))


@lowers("sinc")
def sinc(c: Context, x: Value) -> Value:
    c.require(c.dtype.is_float)
    wide = c.math_dtype(c.dtype)
    v = c.to(x, wide)
    scaled = c.b.mul(v, math.pi)
    value = c.b.where(c.b.eq(v, 0.0), c.constant(1.0, wide), c.b.div(c.b.sin(scaled), scaled))
    return c.to(value, c.dtype)


# gradients -------------------------------------------------------------------------------------------------------------


@lowers("threshold_backward")
def threshold_backward(c: Context, grad: Value, x: Value, threshold: float) -> Value:
    c.require(grad.dtype == x.dtype)
    return c.b.where(c.b.le(x, c.constant(threshold, x.dtype)), c.constant(0, grad.dtype), grad)


@lowers("tanh_backward")
def tanh_backward(c: Context, grad: Value, y: Value) -> Value:
    c.require(c.dtype.is_float and grad.dtype == y.dtype)
    wide = c.math_dtype(c.dtype)
    g, v = c.to(grad, wide), c.to(y, wide)
    return c.to(c.b.mul(g, c.b.sub(c.constant(1.0, wide), c.b.mul(v, v))), c.dtype)


@lowers("sigmoid_backward")
def sigmoid_backward(c: Context, grad: Value, y: Value) -> Value:
    c.require(c.dtype.is_float and grad.dtype == y.dtype)
    wide = c.math_dtype(c.dtype)
    g, v = c.to(grad, wide), c.to(y, wide)
    return c.to(c.b.mul(c.b.mul(g, c.b.sub(c.constant(1.0, wide), v)), v), c.dtype)


@lowers("native_dropout_backward")
def native_dropout_backward(c: Context, grad: Value, mask: Value, scale: float) -> Value:
    c.require(mask.dtype.is_bool)
    wide = c.math_dtype(grad.dtype)
    kept = c.b.mul(c.to(grad, wide), c.b.cast(mask, wide))
    return c.to(c.b.mul(kept, c.constant(float(scale), wide)), grad.dtype)

"""Pointwise composites: activations with a name of their own. The expansion is the definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from graphopt.errors import TypeInferenceError
from graphopt.ir.ops import Attrs, EvalContext, Trait, define
from graphopt.ir.types import TensorType

if TYPE_CHECKING:
    from graphopt.ir.builder import Builder
    from graphopt.ir.graph import Node, Value


def _infer(name: str) -> Callable[[Sequence[TensorType], Attrs], list[TensorType]]:
    def infer(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
        if not ts[0].dtype.is_float:
            raise TypeInferenceError(f"{name}: needs a float operand, got {ts[0].dtype}")
        return [ts[0].logical]

    return infer


def _activation(name: str, fn: Callable[..., torch.Tensor], expand: Callable[..., Value], attrs: Mapping[str, Any] | None = None,
                doc: str = "") -> None:  # fmt: skip
    def evaluate(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
        return fn(xs[0], **attrs)

    def expand_node(b: Builder, node: Node) -> Value:
        return expand(b, node.operands[0], **node.attrs)

    define(name, 1, traits=(Trait.POINTWISE, Trait.FLOAT_ONLY), attrs=attrs, infer=_infer(name), evaluate=evaluate,
           expand=expand_node, doc=doc)  # fmt: skip


def _gelu(b: Builder, x: Value, approximate: str) -> Value:
    if approximate == "tanh":
        cubic = b.add(x, b.mul(b.mul(b.mul(x, x), x), 0.044715))
        gate = b.tanh(b.mul(cubic, math.sqrt(2 / math.pi)))
    else:
        gate = b.erf(b.mul(x, math.sqrt(0.5)))
    return b.mul(b.mul(x, 0.5), b.add(gate, 1.0))


def _softplus(b: Builder, x: Value, beta: float, threshold: float) -> Value:
    scaled = b.mul(x, beta)
    return b.where(b.gt(scaled, threshold), x, b.div(b.log1p(b.exp(scaled)), beta))


def _elu(b: Builder, x: Value, alpha: float, scale: float, input_scale: float) -> Value:
    negative = b.mul(b.expm1(b.mul(x, input_scale)), alpha * scale)
    return b.where(b.gt(x, 0.0), b.mul(x, scale), negative)


def _relu6(b: Builder, x: Value) -> Value:
    """clamp(x + 3, 0, 6) / 6, the gate of the hard sigmoid."""
    return b.div(b.minimum(b.maximum(b.add(x, 3.0), 0.0), 6.0), 6.0)


_activation("gelu", F.gelu, _gelu, {"approximate": "none"},
            doc="x * Phi(x); Hendrycks and Gimpel, arXiv:1606.08415")  # fmt: skip
_activation("silu", F.silu, lambda b, x: b.mul(x, b.sigmoid(x)), doc="x * sigmoid(x)")
_activation("softplus", F.softplus, _softplus, {"beta": 1.0, "threshold": 20.0}, doc="log(1 + exp(beta x)) / beta; x above threshold")
_activation(
    "elu", torch.ops.aten.elu, _elu,
    {"alpha": 1.0, "scale": 1.0, "input_scale": 1.0}, doc="scale * (x if x > 0 else alpha * (exp(input_scale x) - 1))",
)  # fmt: skip
_activation(
    "leaky_relu", F.leaky_relu, lambda b, x, negative_slope: b.where(b.gt(x, 0.0), x, b.mul(x, negative_slope)),
    {"negative_slope": 0.01}, doc="x if x > 0 else negative_slope * x",
)  # fmt: skip
_activation("hardsigmoid", F.hardsigmoid, _relu6, doc="clamp(x + 3, 0, 6) / 6")
_activation("hardswish", F.hardswish, lambda b, x: b.mul(x, _relu6(b, x)), doc="x * clamp(x + 3, 0, 6) / 6")
_activation("mish", F.mish, lambda b, x: b.mul(x, b.tanh(b.softplus(x))), doc="x * tanh(softplus(x))")

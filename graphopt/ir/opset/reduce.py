"""Reductions over axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from graphopt.errors import TypeInferenceError
from graphopt.ir import dims, types
from graphopt.ir.ops import REQUIRED, Attrs, EvalContext, Trait, define, normalize_axis
from graphopt.ir.types import DType, TensorType

if TYPE_CHECKING:
    from graphopt.ir.builder import Builder
    from graphopt.ir.graph import Node, Value


def reduced_shape(shape: dims.Shape, axes: Sequence[int], keepdims: bool) -> dims.Shape:
    """Shape after reducing axes."""
    gone = {a % len(shape) for a in axes} if shape else set()
    return tuple(1 if i in gone else d for i, d in enumerate(shape) if keepdims or i not in gone)


def _infer(name: str, dtype: DType | None = None, float_only: bool = False):  # type: ignore[no-untyped-def]
    def infer(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
        (t,) = ts
        axes = [normalize_axis(a, t.rank, name) for a in attrs["axes"]]
        if len(set(axes)) != len(axes):
            raise TypeInferenceError(f"{name}: an axis is named twice in {attrs['axes']}")
        if float_only and not (t.dtype.is_float or t.dtype.is_complex):
            raise TypeInferenceError(f"{name}: needs a float operand, got {t.dtype}")
        if name == "var" and t.dtype.is_complex:
            raise TypeInferenceError("var: needs real numbers")
        return [TensorType(dtype or t.dtype, reduced_shape(t.shape, axes, attrs["keepdims"]))]

    return infer


def _reduction(name: str, fn: Callable[..., torch.Tensor], *, dtype: DType | None = None,
               expand: Callable[[Builder, Node], Value] | None = None, attrs: Attrs | None = None,
               float_only: bool = False, doc: str = "") -> None:  # fmt: skip
    def evaluate(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
        x, axes = xs[0], [a % max(xs[0].dim(), 1) for a in attrs["axes"]]
        if not axes:  # torch takes "no axes" for "all axes"
            return _no_axes(name, x, attrs)
        return fn(x, axes, attrs["keepdims"], **{k: v for k, v in attrs.items() if k not in ("axes", "keepdims")})

    define(
        name, 1, traits=(Trait.REDUCTION,), attrs={"axes": REQUIRED, "keepdims": False, **(attrs or {})},
        infer=_infer(name, dtype, float_only), evaluate=evaluate, expand=expand, doc=doc,
    )  # fmt: skip


def _no_axes(name: str, x: torch.Tensor, attrs: Attrs) -> torch.Tensor:
    """A reduction over no axes: every element is reduced alone."""
    if name in ("any", "all"):
        return x.to(torch.bool)
    if name == "var":
        return torch.full_like(x, float("nan")) if attrs["correction"] >= 1 else x - x
    return x.clone()


def _prod(x: torch.Tensor, axes: list[int], keepdims: bool) -> torch.Tensor:
    for a in sorted(axes, reverse=True):
        x = x.prod(a, keepdim=keepdims, dtype=x.dtype)
    return x


_reduction("sum", lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype), doc="sum over axes, in the operand's dtype")
_reduction("prod", _prod, doc="product over axes, in the operand's dtype")
_reduction("max", lambda x, axes, keep: x.amax(axes, keepdim=keep), doc="largest; nan if any is")
_reduction("min", lambda x, axes, keep: x.amin(axes, keepdim=keep), doc="smallest; nan if any is")
_reduction("any", lambda x, axes, keep: x.to(torch.bool).any(axes, keepdim=keep), dtype=types.b1, doc="whether any is nonzero")
_reduction("all", lambda x, axes, keep: x.to(torch.bool).all(axes, keepdim=keep), dtype=types.b1, doc="whether all are nonzero")


def _count(b: Builder, node: Node) -> Value:
    """Number of elements that a reduction sums, as a scalar of the operand's dtype."""
    t = node.operands[0].type
    n = dims.numel([t.shape[a] for a in node.attrs["axes"]])
    return b.constant(float(n) if isinstance(n, int) else n, t.dtype)


def _expand_mean(b: Builder, node: Node) -> Value:
    total = b.sum(node.operands[0], axes=node.attrs["axes"], keepdims=node.attrs["keepdims"])
    return b.div(total, _count(b, node))


def _expand_var(b: Builder, node: Node) -> Value:
    x, axes = node.operands[0], node.attrs["axes"]
    centred = b.sub(x, b.mean(x, axes=axes, keepdims=True))
    total = b.sum(b.mul(centred, centred), axes=axes, keepdims=node.attrs["keepdims"])
    n = b.sub(_count(b, node), float(node.attrs["correction"]))
    zero = b.constant(0.0, x.dtype)
    return b.div(total, b.maximum(n, zero))


_reduction("mean", lambda x, axes, keep: x.mean(axes, keepdim=keep), expand=_expand_mean, float_only=True, doc="sum / count")
_reduction(
    "var", lambda x, axes, keep, correction: x.var(axes, keepdim=keep, correction=correction), expand=_expand_var,
    attrs={"correction": 1}, float_only=True, doc="sum((x - mean)^2) / max(count - correction, 0)",
)  # fmt: skip


def _infer_arg(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    (t,) = ts
    axis = normalize_axis(attrs["axis"], t.rank, "argmax")
    return [TensorType(types.i64, reduced_shape(t.shape, [axis], attrs["keepdims"]))]


def _define_arg(name: str, fn: Callable[..., torch.Tensor]) -> None:
    define(
        name, 1, attrs={"axis": REQUIRED, "keepdims": False}, infer=_infer_arg,
        evaluate=lambda xs, attrs, ctx: fn(xs[0], attrs["axis"], keepdim=attrs["keepdims"]),
        doc="index of the first extreme element along an axis (the first nan, if any)",
    )  # fmt: skip


_define_arg("argmax", torch.argmax)
_define_arg("argmin", torch.argmin)

"""Composites over whole rows: softmax, the normalizations, rotary embedding. The expansion is the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from graphopt.errors import TypeInferenceError
from graphopt.ir import dims
from graphopt.ir.ops import REQUIRED, Attrs, EvalContext, Infer, broadcast_shapes, define, normalize_axis, same_dtype
from graphopt.ir.types import TensorType

if TYPE_CHECKING:
    from graphopt.ir.builder import Builder
    from graphopt.ir.graph import Node, Value


def _float(name: str, then: Callable[[Sequence[TensorType], Attrs], None] | None = None) -> Infer:
    """Inference of an op whose result has the type of its first operand, a float."""

    def infer(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
        if not same_dtype(ts, name).is_float:
            raise TypeInferenceError(f"{name}: needs float operands, got {ts[0].dtype}")
        if then:
            then(ts, attrs)
        return [ts[0].logical]

    return infer


# softmax ---------------------------------------------------------------------------------------------------------------


def _check_axis(ts: Sequence[TensorType], attrs: Attrs) -> None:
    normalize_axis(attrs["axis"], ts[0].rank, "softmax")


def _shifted(b: Builder, node: Node) -> Value:
    x, axis = node.operands[0], node.attrs["axis"]
    return b.sub(x, b.max(x, axes=(axis,), keepdims=True))


def _expand_softmax(b: Builder, node: Node) -> Value:
    e = b.exp(_shifted(b, node))
    return b.div(e, b.sum(e, axes=(node.attrs["axis"],), keepdims=True))


def _expand_log_softmax(b: Builder, node: Node) -> Value:
    shifted = _shifted(b, node)
    return b.sub(shifted, b.log(b.sum(b.exp(shifted), axes=(node.attrs["axis"],), keepdims=True)))


define(
    "softmax", 1, attrs={"axis": REQUIRED}, infer=_float("softmax", _check_axis), expand=_expand_softmax,
    evaluate=lambda xs, attrs, ctx: torch.softmax(xs[0], attrs["axis"]), doc="exp(x - max x) / sum exp(x - max x)",
)  # fmt: skip
define(
    "log_softmax", 1, attrs={"axis": REQUIRED}, infer=_float("log_softmax", _check_axis), expand=_expand_log_softmax,
    evaluate=lambda xs, attrs, ctx: torch.log_softmax(xs[0], attrs["axis"]), doc="log(softmax(x))",
)  # fmt: skip


# layer norm, rms norm --------------------------------------------------------------------------------------------------


def _check_affine(ts: Sequence[TensorType], attrs: Attrs) -> None:
    x, n = ts[0], attrs["axes"]
    if not 1 <= n <= x.rank:
        raise TypeInferenceError(f"normalization over the last {n} axes of {x}")
    for t in ts[1:]:
        if not dims.same_shape(t.shape, x.shape[-n:]):
            raise TypeInferenceError(f"normalization: scale and shift must have shape {x.shape[-n:]}, got {t}")


def _last(node: Node) -> tuple[int, ...]:
    rank = node.operands[0].type.rank
    return tuple(range(rank - node.attrs["axes"], rank))


def _expand_layer_norm(b: Builder, node: Node) -> Value:
    x, *affine = node.operands
    centred = b.sub(x, b.mean(x, axes=_last(node), keepdims=True))
    variance = b.mean(b.mul(centred, centred), axes=_last(node), keepdims=True)
    out = b.mul(centred, b.rsqrt(b.add(variance, node.attrs["eps"])))
    return _affine(b, out, affine)


def _expand_rms_norm(b: Builder, node: Node) -> Value:
    x, *affine = node.operands
    square = b.mean(b.mul(x, x), axes=_last(node), keepdims=True)
    return _affine(b, b.mul(x, b.rsqrt(b.add(square, node.attrs["eps"]))), affine)


def _affine(b: Builder, x: Value, affine: Sequence[Value]) -> Value:
    if affine:
        x = b.mul(x, affine[0])
    return b.add(x, affine[1]) if len(affine) > 1 else x


def _evaluate_layer_norm(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x, (w, b) = xs[0], (*xs[1:], None, None)[:2]
    return F.layer_norm(x, x.shape[-attrs["axes"] :], w, b, attrs["eps"])


def _evaluate_rms_norm(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x, w = xs[0], xs[1] if len(xs) > 1 else None
    return F.rms_norm(x, x.shape[-attrs["axes"] :], w, attrs["eps"])


define(
    "layer_norm", (1, 3), attrs={"axes": 1, "eps": 1e-5}, infer=_float("layer_norm", _check_affine), expand=_expand_layer_norm,
    evaluate=_evaluate_layer_norm, doc="(x - mean) / sqrt(var + eps) * w + b over the last `axes` axes; operands x[, w[, b]]",
)  # fmt: skip
define(
    "rms_norm", (1, 2), attrs={"axes": 1, "eps": 1e-6}, infer=_float("rms_norm", _check_affine), expand=_expand_rms_norm,
    evaluate=_evaluate_rms_norm, doc="x / sqrt(mean(x^2) + eps) * w over the last `axes` axes; operands x[, w]",
)  # fmt: skip


# batch norm (inference), group norm ------------------------------------------------------------------------------------


def channel_shape(x: TensorType) -> dims.Shape:
    """``[C, 1, ...]``: the shape in which a vector over axis 1 broadcasts against x."""
    return (x.shape[1], *[1] * (x.rank - 2))


def _check_channels(ts: Sequence[TensorType], attrs: Attrs) -> None:
    x = ts[0]
    for t in ts[1:]:
        if x.rank < 2 or not dims.same_shape(t.shape, (x.shape[1],)):
            raise TypeInferenceError(f"per-channel operand {t} does not fit axis 1 of {x}")


def _expand_batch_norm(b: Builder, node: Node) -> Value:
    x = node.operands[0]
    mean, var, *affine = (b.reshape(v, shape=channel_shape(x.type)) for v in node.operands[1:])
    out = b.mul(b.sub(x, mean), b.rsqrt(b.add(var, node.attrs["eps"])))
    return _affine(b, out, affine)


def _evaluate_batch_norm(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x, mean, var, w, b = (*xs, None, None)[:5]
    assert x is not None
    return F.batch_norm(x, mean, var, w, b, training=False, eps=attrs["eps"])


define(
    "batch_norm", (3, 5), attrs={"eps": 1e-5}, infer=_float("batch_norm", _check_channels), expand=_expand_batch_norm,
    evaluate=_evaluate_batch_norm, doc="(x - mean) / sqrt(var + eps) * w + b along axis 1; operands x, mean, var[, w[, b]]",
)  # fmt: skip


def _check_groups(ts: Sequence[TensorType], attrs: Attrs) -> None:
    _check_channels(ts, attrs)
    channels = ts[0].shape[1]
    if isinstance(channels, int) and channels % attrs["groups"]:
        raise TypeInferenceError(f"group_norm: {channels} channels do not divide into {attrs['groups']} groups")


def _expand_group_norm(b: Builder, node: Node) -> Value:
    """Each group's channels on an axis of their own: scale and shift have one shape with the rows that are normalized."""
    x, *affine = node.operands
    n, c, *space = x.shape
    groups = node.attrs["groups"]
    channels = dims.floordiv(c, groups)
    grouped = b.reshape(x, shape=(n, groups, channels, *space))
    normal = b.layer_norm(grouped, axes=1 + len(space), eps=node.attrs["eps"])
    of_group = [b.reshape(v, shape=(groups, channels, *[1] * len(space))) for v in affine]
    return b.reshape(_affine(b, normal, of_group), shape=x.shape)  # type: ignore[no-any-return]


def _evaluate_group_norm(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x, (w, b) = xs[0], (*xs[1:], None, None)[:2]
    return torch.group_norm(x, attrs["groups"], w, b, attrs["eps"])  # F.group_norm refuses groups of one element


define(
    "group_norm", (1, 3), attrs={"groups": REQUIRED, "eps": 1e-5}, infer=_float("group_norm", _check_groups), expand=_expand_group_norm,
    evaluate=_evaluate_group_norm, doc="layer norm over each group of channels and all space, then * w + b; operands x[, w[, b]]",
)  # fmt: skip


# rotary embedding -------------------------------------------------------------------------------------------------------


def _check_rope(ts: Sequence[TensorType], attrs: Attrs) -> None:
    x, cos, sin = ts
    if not dims.same_shape(broadcast_shapes([t.shape for t in ts]), x.shape) or not dims.same_shape(cos.shape, sin.shape):
        raise TypeInferenceError(f"rope: {cos} and {sin} do not broadcast to {x}")
    if isinstance(x.shape[-1], int) and x.shape[-1] % 2:
        raise TypeInferenceError(f"rope: the last axis of {x} is odd")


def _expand_rope(b: Builder, node: Node) -> Value:
    x, cos, sin = node.operands
    axis, size = x.type.rank - 1, x.shape[-1]
    half = dims.floordiv(size, 2)
    low, high = b.slice(x, axis=axis, start=0, stop=half), b.slice(x, axis=axis, start=half, stop=size)
    rotated = b.concat(b.neg(high), low, axis=axis)
    return b.add(b.mul(x, cos), b.mul(rotated, sin))


def _evaluate_rope(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x, cos, sin = xs
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


define(
    "rope", 3, infer=_float("rope", _check_rope), expand=_expand_rope, evaluate=_evaluate_rope,
    doc="x cos + rotate_half(x) sin; Su et al., RoFormer, arXiv:2104.09864, halves layout; operands x, cos, sin",
)  # fmt: skip

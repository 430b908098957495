"""Ops that move elements: views, concatenation, padding, and taking by index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from graphopt.errors import TypeInferenceError
from graphopt.ir import dims
from graphopt.ir.ops import REQUIRED, Attrs, EvalContext, Trait, broadcast_shapes, define, normalize_axis, same_dtype
from graphopt.ir.types import TensorType

VIEW = (Trait.VIEW,)


def _infer_reshape(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    (t,), shape = ts, attrs["shape"]
    if dims.prove(t.numel, "==", dims.numel(shape)) is False:
        raise TypeInferenceError(f"reshape: {t} does not have the elements of shape {shape}")
    return [t.with_shape(shape)]


define(
    "reshape", 1, traits=VIEW, attrs={"shape": REQUIRED}, infer=_infer_reshape,
    evaluate=lambda xs, attrs, ctx: xs[0].reshape(ctx.shape(attrs["shape"])), doc="same elements in row-major order",
)  # fmt: skip


def _infer_transpose(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    (t,), perm = ts, attrs["perm"]
    if sorted(perm) != list(range(t.rank)):
        raise TypeInferenceError(f"transpose: {perm} is no permutation of the axes of {t}")
    return [t.with_shape(tuple(t.shape[p] for p in perm))]


define(
    "transpose", 1, traits=VIEW, attrs={"perm": REQUIRED}, infer=_infer_transpose,
    evaluate=lambda xs, attrs, ctx: xs[0].permute(attrs["perm"]), doc="result axis i is operand axis perm[i]",
)  # fmt: skip


def _infer_broadcast(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    (t,), shape = ts, attrs["shape"]
    if not dims.same_shape(broadcast_shapes([t.shape, shape]), shape):
        raise TypeInferenceError(f"broadcast_to: {t} does not broadcast to {tuple(map(dims.format_dim, shape))}")
    return [t.with_shape(shape)]


define(
    "broadcast_to", 1, traits=VIEW, attrs={"shape": REQUIRED}, infer=_infer_broadcast,
    evaluate=lambda xs, attrs, ctx: xs[0].expand(ctx.shape(attrs["shape"])), doc="NumPy broadcasting to a shape",
)  # fmt: skip


def slice_length(start: dims.Dim, stop: dims.Dim, step: int) -> dims.Dim:
    """Length of ``start:stop:step`` for a positive step and ``start <= stop``."""
    return dims.floordiv(dims.add(dims.sub(stop, start), step - 1), step)


def _infer_slice(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    (t,) = ts
    axis, start, stop, step = attrs["axis"], attrs["start"], attrs["stop"], attrs["step"]
    axis = normalize_axis(axis, t.rank, "slice")
    if step < 1:
        raise TypeInferenceError(f"slice: step must be positive, got {step}")
    order = ((0, start), (start, stop), (stop, t.shape[axis]))
    if any(dims.prove(a, "<=", b) is False for a, b in order):
        bounds = f"{dims.format_dim(start)}:{dims.format_dim(stop)}"
        raise TypeInferenceError(f"slice: {bounds} is not within axis {axis} of {t}")
    return [t.with_shape((*t.shape[:axis], slice_length(start, stop, step), *t.shape[axis + 1 :]))]


def _evaluate_slice(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x, axis = xs[0], attrs["axis"]
    index = (slice(None),) * (axis % x.dim()) + (slice(ctx.dim(attrs["start"]), ctx.dim(attrs["stop"]), attrs["step"]),)
    return x[index]


define(
    "slice", 1, traits=VIEW, attrs={"axis": REQUIRED, "start": 0, "stop": REQUIRED, "step": 1}, infer=_infer_slice,
    evaluate=_evaluate_slice, doc="elements start, start + step, ... below stop of one axis; 0 <= start <= stop <= size",
)  # fmt: skip


define(
    "flip", 1, traits=VIEW, attrs={"axes": REQUIRED}, infer=lambda ts, attrs: [ts[0].logical],
    evaluate=lambda xs, attrs, ctx: xs[0].flip(attrs["axes"]), doc="reverse the order along axes",
)  # fmt: skip


def _infer_concat(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    dtype, axis = same_dtype(ts, "concat"), normalize_axis(attrs["axis"], ts[0].rank, "concat")
    total: dims.Dim = 0
    for t in ts:
        mine, first = (shape[:axis] + shape[axis + 1 :] for shape in (t.shape, ts[0].shape))
        if t.rank != ts[0].rank or not dims.same_shape(mine, first):
            raise TypeInferenceError(f"concat: {t} and {ts[0]} differ beside axis {axis}")
        total = dims.add(total, t.shape[axis])
    return [TensorType(dtype, (*ts[0].shape[:axis], total, *ts[0].shape[axis + 1 :]))]


define(
    "concat", (1, None), attrs={"axis": 0}, infer=_infer_concat,
    evaluate=lambda xs, attrs, ctx: torch.cat(list(xs), attrs["axis"]), doc="join along an axis",
)  # fmt: skip


def _infer_pad(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    (t,), low, high = ts, attrs["low"], attrs["high"]
    if len(low) != t.rank or len(high) != t.rank:
        raise TypeInferenceError(f"pad: low and high need one entry an axis of {t}")
    if any(dims.prove(0, "<=", p) is not True for p in (*low, *high)):
        raise TypeInferenceError("pad: low and high must be nonnegative")
    return [t.with_shape(tuple(dims.add(dims.add(lo, d), hi) for lo, d, hi in zip(low, t.shape, high, strict=True)))]


def _evaluate_pad(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x, widths = xs[0], list[int]()
    order = sorted(range(x.dim()), key=x.stride, reverse=True)  # of memory, and so of the result's: turning it is another's work
    for axis in reversed(order):
        widths += [ctx.dim(attrs["low"][axis]), ctx.dim(attrs["high"][axis])]
    x = x.permute(order)
    if x.dtype == torch.bool:
        y = F.pad(x.to(torch.uint8), widths, value=int(attrs["value"])).to(torch.bool)
    else:
        y = F.pad(x, widths, value=attrs["value"])
    return y.permute([order.index(axis) for axis in range(x.dim())])


define(
    "pad", 1, attrs={"low": REQUIRED, "high": REQUIRED, "value": 0.0}, infer=_infer_pad, evaluate=_evaluate_pad,
    doc="put value around the tensor: low and high elements on each axis",
)  # fmt: skip


def _infer_take(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    x, index = ts
    axis = normalize_axis(attrs["axis"], x.rank, "take")
    if not index.dtype.is_integer:
        raise TypeInferenceError(f"take: the index must be an integer tensor, got {index.dtype}")
    return [x.with_shape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))]


def _evaluate_take(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x, index = xs
    axis = attrs["axis"] % x.dim()
    flat = index.reshape(-1).to(torch.int64)
    if attrs["clip"]:
        flat = flat.clamp(0, x.shape[axis] - 1)
    flat = torch.index_select(x, axis, flat)
    return flat.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


define(
    "take", 2, attrs={"axis": 0, "clip": False}, infer=_infer_take, evaluate=_evaluate_take,
    doc="x indexed along an axis by an integer tensor (embedding, index_select); 0 <= index < size, else IndexError; clip: the nearest "
    "index within bounds instead",
)  # fmt: skip


def _infer_gather(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    x, index = ts
    normalize_axis(attrs["axis"], x.rank, "gather")
    if not index.dtype.is_integer or x.rank != index.rank:
        raise TypeInferenceError(f"gather: index {index} does not fit {x}")
    return [x.with_shape(index.shape)]


define(
    "gather", 2, attrs={"axis": 0}, infer=_infer_gather,
    evaluate=lambda xs, attrs, ctx: torch.gather(xs[0], attrs["axis"], xs[1].to(torch.int64)),
    doc="out[i, j] = x[index[i, j], j] for axis 0, and so on",
)  # fmt: skip


def _infer_wrap_index(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    (t,) = ts
    if not t.dtype.is_integer:
        raise TypeInferenceError(f"wrap_index: needs an integer operand, got {t.dtype}")
    return [t.logical]


def _evaluate_wrap_index(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    return torch.where(xs[0] < 0, xs[0] + ctx.dim(attrs["size"]), xs[0])


define(
    "wrap_index", 1, traits=(Trait.POINTWISE,), attrs={"size": REQUIRED}, infer=_infer_wrap_index, evaluate=_evaluate_wrap_index,
    doc="x, or x + size where x is negative: an index that may count from the end",
)  # fmt: skip

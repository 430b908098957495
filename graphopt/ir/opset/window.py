"""Pooling: reductions over sliding and over adaptive windows of the spatial axes.

All of these take [N, C, *S] or, ``channels_last``, [N, *S, C], with 1 to 3 spatial axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.errors import TypeInferenceError
from graphopt.ir import dims, types
from graphopt.ir.ops import REQUIRED, Attrs, EvalContext, define
from graphopt.ir.types import DType, TensorType

SLIDING = ("max_pool", "argmax_pool", "avg_pool")
ADAPTIVE = ("adaptive_max_pool", "adaptive_argmax_pool", "adaptive_avg_pool")
WINDOWS = (*SLIDING, *ADAPTIVE)


def spatial(shape: dims.Shape, channels_last: bool) -> dims.Shape:
    """The spatial sizes of an image."""
    return shape[1:-1] if channels_last else shape[2:]


def _image(x: TensorType, attrs: Attrs, name: str, floats: bool) -> int:
    """The number of spatial axes of an operand that pooling takes."""
    if not 1 <= x.rank - 2 <= 3:
        raise TypeInferenceError(f"{name}: {x} has not 1 to 3 spatial axes behind batch and channels")
    if not x.dtype.is_float and (floats or x.dtype.is_complex or x.dtype.is_bool):
        raise TypeInferenceError(f"{name}: {x} is not of {'a float' if floats else 'an ordered'} dtype")
    return x.rank - 2


def _result(x: TensorType, out: Sequence[dims.Dim], attrs: Attrs, dtype: DType | None) -> list[TensorType]:
    shape = (x.shape[0], *out, x.shape[-1]) if attrs["channels_last"] else (*x.shape[:2], *out)
    return [TensorType(dtype or x.dtype, shape)]


def _infer_sliding(name: str, dtype: DType | None = None):  # type: ignore[no-untyped-def]
    names = ("kernel", "stride", "padding") if name == "avg_pool" else ("kernel", "stride", "padding", "dilation")

    def infer(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
        (x,), n = ts, _image(ts[0], attrs, name, floats=name == "avg_pool")
        if any(len(attrs[k]) != n for k in names) or (attrs["size"] is not None and len(attrs["size"]) != n):
            raise TypeInferenceError(f"{name}: {x} and {', '.join((*names, 'size'))} do not agree in rank")
        spans = [(k - 1) * d + 1 for k, d in zip(attrs["kernel"], attrs.get("dilation", (1,) * n), strict=True)]
        if any(2 * p > span for p, span in zip(attrs["padding"], spans, strict=True)):
            raise TypeInferenceError(f"{name}: padding {attrs['padding']} is more than half of a window of {tuple(spans)}")
        if attrs["size"] is not None:
            return _result(x, attrs["size"], attrs, dtype)
        out: list[dims.Dim] = []
        for size, span, stride, padding in zip(
            spatial(x.shape, attrs["channels_last"]), spans, attrs["stride"], attrs["padding"], strict=True
        ):
            out.append(dims.add(dims.floordiv(dims.sub(dims.add(size, 2 * padding), span), stride), 1))
        return _result(x, out, attrs, dtype)

    return infer


def _infer_adaptive(name: str, dtype: DType | None = None):  # type: ignore[no-untyped-def]
    def infer(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
        n = _image(ts[0], attrs, name, floats=name == "adaptive_avg_pool")
        if len(attrs["size"]) != n:
            raise TypeInferenceError(f"{name}: {ts[0]} and size {attrs['size']} do not agree in rank")
        return _result(ts[0], attrs["size"], attrs, dtype)

    return infer


# --- reference ---------------------------------------------------------------------------------------------------------


def _channels_first(fn: Callable[[torch.Tensor, Attrs, EvalContext], torch.Tensor]):  # type: ignore[no-untyped-def]
    """Evaluate an op on images whose channels come first, in f32 at least."""

    def evaluate(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
        x = xs[0].movedim(-1, 1) if attrs["channels_last"] else xs[0]
        y = fn(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, attrs, ctx)
        y = y if y.dtype == torch.int64 else y.to(x.dtype)
        return y.movedim(1, -1) if attrs["channels_last"] else y

    return evaluate


def _starts(x: torch.Tensor, attrs: Attrs, ctx: EvalContext) -> list[list[int]]:
    """First elements of the windows along each spatial axis; negative ones lie in the padding."""
    n = x.dim() - 2
    sizes, dilation = attrs["size"] or [None] * n, attrs.get("dilation", (1,) * n)
    windows = zip(x.shape[2:], attrs["kernel"], attrs["stride"], attrs["padding"], dilation, sizes, strict=True)
    return [
        [i * s - p for i in range((length + 2 * p - (k - 1) * d - 1) // s + 1 if size is None else ctx.dim(size))]
        for length, k, s, p, d, size in windows
    ]


def _unfolded(x: torch.Tensor, attrs: Attrs, ctx: EvalContext, fill: float) -> torch.Tensor:
    """All windows of the padded image, [N, C, *S', *K]."""
    n = x.dim() - 2
    starts, dilation = _starts(x, attrs, ctx), attrs.get("dilation", (1,) * n)
    spans = [(k - 1) * d + 1 for k, d in zip(attrs["kernel"], dilation, strict=True)]
    widths: list[int] = []
    for at, length, span, p, s in reversed(list(zip(starts, x.shape[2:], spans, attrs["padding"], attrs["stride"], strict=True))):
        widths += [p, max(0, (len(at) - 1) * s - p + span - length)]
    y = F.pad(x, widths, value=fill)
    for i, (span, s, d, at) in enumerate(zip(spans, attrs["stride"], dilation, starts, strict=True)):
        y = y.unfold(2 + i, span, s).narrow(2 + i, 0, len(at))[..., ::d]
    return y


def _max_pool(x: torch.Tensor, attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    low = -float("inf") if x.dtype.is_floating_point else torch.iinfo(x.dtype).min
    return _unfolded(x, attrs, ctx, low).amax(tuple(range(x.dim(), 2 * x.dim() - 2)))


def _avg_pool(x: torch.Tensor, attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    total = _unfolded(x, attrs, ctx, 0.0).sum(tuple(range(x.dim(), 2 * x.dim() - 2)))
    if attrs["divisor"] is not None:
        return total / attrs["divisor"]
    for i, (starts, length, k, p) in enumerate(zip(_starts(x, attrs, ctx), x.shape[2:], attrs["kernel"], attrs["padding"], strict=True)):
        low, high = (-p, length + p) if attrs["count_include_pad"] else (0, length)
        counts = [min(a + k, high) - max(a, low) for a in starts]
        total = total / total.new_tensor(counts).clamp(min=1).reshape(-1, *[1] * (x.dim() - 3 - i))
    return total


def _sliding(x: torch.Tensor, attrs: Attrs, ctx: EvalContext) -> list[list[range]]:
    """For each spatial axis and output: the elements of x that its window holds."""
    windows = zip(_starts(x, attrs, ctx), x.shape[2:], attrs["kernel"], attrs["dilation"], strict=True)
    return [[range(a + -(-max(0, -a) // d) * d, min(length, a + (k - 1) * d + 1), d) for a in starts] for starts, length, k, d in windows]


def _adaptive(x: torch.Tensor, attrs: Attrs, ctx: EvalContext) -> list[list[range]]:
    sizes = [ctx.dim(d) for d in attrs["size"]]
    return [[range(i * n // m, -((i + 1) * n // -m)) for i in range(m)] for n, m in zip(x.shape[2:], sizes, strict=True)]


Ranges = Callable[[torch.Tensor, Attrs, EvalContext], list[list[range]]]


def _each_window(ranges: Ranges, reduce: Callable[[torch.Tensor, list[range]], torch.Tensor]):  # type: ignore[no-untyped-def]
    """Reduce window by window."""

    def evaluate(x: torch.Tensor, attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
        axes = ranges(x, attrs, ctx)
        out = x.new_empty((*x.shape[:2], *map(len, axes)), dtype=torch.int64 if reduce is _position else x.dtype)
        for at in product(*(range(len(a)) for a in axes)):
            here: Any = (..., *at)
            out[here] = reduce(x, [a[i] for a, i in zip(axes, at, strict=True)])
        return out

    return evaluate


def _crop(x: torch.Tensor, window: list[range]) -> torch.Tensor:
    """The elements of a window, [N, C, K]."""
    inside: Any = (..., *(slice(r.start, r.stop, r.step) for r in window))
    return x[inside].flatten(2)


def _position(x: torch.Tensor, window: list[range]) -> torch.Tensor:
    """Position among the spatial elements: of the first greatest one, or of the last nan."""
    numbers = torch.arange(prod(x.shape[2:]), device=x.device).reshape(1, 1, *x.shape[2:])
    held, places = _crop(x, window), _crop(numbers, window)[0, 0]
    if not x.dtype.is_floating_point:
        return places[held.argmax(-1)]
    nan = held.isnan()
    last = held.shape[-1] - 1 - nan.flip(-1).to(torch.uint8).argmax(-1)
    return places[torch.where(nan.any(-1), last, held.argmax(-1))]


_LAST = {"channels_last": False}
_SLIDING_ATTRS: Attrs = {"kernel": REQUIRED, "stride": REQUIRED, "padding": REQUIRED, "dilation": REQUIRED, "size": None, **_LAST}
_SHAPES = "[N, C, *S] -> [N, C, *S'] or, channels_last, [N, *S, C] -> [N, *S', C]"
_SIZE = "size: outputs along each axis, if not as many as have room"

define(
    "max_pool", 1, infer=_infer_sliding("max_pool"), evaluate=_channels_first(_max_pool), attrs=_SLIDING_ATTRS,
    doc=f"greatest element of each window over the spatial axes, {_SHAPES}; padding counts as -inf; nan if the window holds one; {_SIZE}",
)  # fmt: skip
define(
    "argmax_pool", 1, infer=_infer_sliding("argmax_pool", types.i64), evaluate=_channels_first(_each_window(_sliding, _position)),
    attrs=_SLIDING_ATTRS,
    doc="where the first greatest element of each window lies, or the last nan, among the spatial elements in row-major order; as max_pool",
)  # fmt: skip
define(
    "avg_pool", 1, infer=_infer_sliding("avg_pool"), evaluate=_channels_first(_avg_pool),
    attrs={"kernel": REQUIRED, "stride": REQUIRED, "padding": REQUIRED, "size": None, "count_include_pad": True, "divisor": None, **_LAST},
    doc=f"mean of each window over the spatial axes, {_SHAPES}; padding counts as zeros or, without count_include_pad, not at all; "
    f"divisor: what the sum is divided by instead of the count; {_SIZE}",
)  # fmt: skip
define(
    "adaptive_max_pool", 1, infer=_infer_adaptive("adaptive_max_pool"),
    evaluate=_channels_first(_each_window(_adaptive, lambda x, window: _crop(x, window).amax(-1))),
    attrs={"size": REQUIRED, **_LAST},
    doc="greatest of elements floor(i n / m) .. ceil((i + 1) n / m) - 1 along each spatial axis, for n elements to m = size, "
    + _SHAPES,
)  # fmt: skip
define(
    "adaptive_argmax_pool", 1, infer=_infer_adaptive("adaptive_argmax_pool", types.i64),
    evaluate=_channels_first(_each_window(_adaptive, _position)),
    attrs={"size": REQUIRED, **_LAST}, doc="where the first greatest element of each window of adaptive_max_pool lies, or the last nan",
)  # fmt: skip
define(
    "adaptive_avg_pool", 1, infer=_infer_adaptive("adaptive_avg_pool"),
    evaluate=_channels_first(_each_window(_adaptive, lambda x, window: _crop(x, window).mean(-1))),
    attrs={"size": REQUIRED, **_LAST}, doc="mean of each window of adaptive_max_pool",
)  # fmt: skip

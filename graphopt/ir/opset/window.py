"""Reductions over sliding windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from graphopt.errors import TypeInferenceError
from graphopt.ir import dims
from graphopt.ir.ops import REQUIRED, Attrs, EvalContext, define
from graphopt.ir.types import TensorType

_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _infer_max_pool(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    (x,), names = ts, ("kernel", "stride", "padding", "dilation")
    n = x.rank - 2
    if not 1 <= n <= 3 or any(len(attrs[k]) != n for k in names):
        raise TypeInferenceError(f"max_pool: {x} and kernel, stride, padding, dilation do not agree in rank")
    if any(2 * p > k for p, k in zip(attrs["padding"], attrs["kernel"], strict=True)):
        raise TypeInferenceError(f"max_pool: padding {attrs['padding']} is more than half of the window {attrs['kernel']}")
    if not x.dtype.is_float:
        raise TypeInferenceError(f"max_pool: {x} is not of a float dtype")
    space = x.shape[1:-1] if attrs["channels_last"] else x.shape[2:]
    out: list[dims.Dim] = []
    for size, *window in zip(space, *(attrs[k] for k in names), strict=True):
        kernel, stride, padding, dilation = window
        room = dims.sub(dims.add(size, 2 * padding), (kernel - 1) * dilation + 1)
        out.append(dims.add(dims.floordiv(room, stride), 1))
    return [x.with_shape((x.shape[0], *out, x.shape[-1]) if attrs["channels_last"] else (*x.shape[:2], *out))]


def _evaluate_max_pool(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x = xs[0].movedim(-1, 1) if attrs["channels_last"] else xs[0]
    window = [attrs[k] for k in ("kernel", "stride", "padding", "dilation")]
    if x.shape[0] == 0 or x.shape[1] == 0:  # PyTorch wants channels, and some batch
        names = zip(x.shape[2:], *window, strict=True)
        y = x.new_empty((*x.shape[:2], *((n + 2 * p - (k - 1) * d - 1) // s + 1 for n, k, s, p, d in names)))
    else:
        y = _POOLS[x.dim() - 2](x, *window)
    return y.movedim(1, -1) if attrs["channels_last"] else y


define(
    "max_pool", 1, infer=_infer_max_pool, evaluate=_evaluate_max_pool,
    attrs={"kernel": REQUIRED, "stride": REQUIRED, "padding": REQUIRED, "dilation": REQUIRED, "channels_last": False},
    doc="greatest element of each window over the spatial axes, [N, C, *S] -> [N, C, *S'] or, channels_last, [N, *S, C] -> [N, *S', C]; "
    "padding counts as -inf; nan if the window holds one",
)  # fmt: skip

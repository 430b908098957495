"""Sums of products: matrix multiplication and convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.errors import TypeInferenceError
from graphopt.ir import dims, types
from graphopt.ir.ops import REQUIRED, Attrs, EvalContext, Trait, broadcast_shapes, define, same_dtype
from graphopt.ir.types import DType, TensorType

EXACT_IN_F32 = (types.f32, types.bf16, types.f16, types.f8e4m3, types.f8e5m2)  # factors of products with acc = f32


def _summed(name: str, ts: Sequence[TensorType], attrs: Attrs) -> DType:
    """The dtype of the result."""
    dtype, acc = same_dtype(ts, name), attrs["acc"]
    if acc == types.f32 and dtype in EXACT_IN_F32:
        return types.f32
    if acc is not None and (acc != types.i32 or dtype not in (types.i8, types.u8)):
        raise TypeInferenceError(f"{name}: {ts[0]} and {ts[1]} summed in {acc}; only products of i8 or u8 are in i32, and of floats in f32")
    return acc or dtype


def _infer_matmul(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    (a, b), acc = ts, attrs["acc"]
    dtype = acc if acc == types.f32 and all(t.dtype in EXACT_IN_F32 for t in ts) else _summed("matmul", ts, attrs)
    if a.rank < 2 or b.rank < 2:
        raise TypeInferenceError(f"matmul: operands need two axes at least, got {a} and {b}")
    if dims.prove(a.shape[-1], "==", b.shape[-2]) is False:
        raise TypeInferenceError(f"matmul: {a} and {b} do not agree in the summed size")
    batch = broadcast_shapes([a.shape[:-2], b.shape[:-2]])
    return [TensorType(dtype, (*batch, a.shape[-2], b.shape[-1]))]


def _matmul(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    a, b = xs
    if attrs["acc"] is None:
        return torch.matmul(a, b)
    if attrs["acc"] == types.f32:
        wide = ctx.dtype(types.f32)
        return torch.matmul(a.to(wide), b.to(wide))
    return _wrapped(torch.matmul(a.double(), b.double()))


def _wrapped(sums: torch.Tensor) -> torch.Tensor:
    """Sums of integer products in i32: f64 holds them exactly, and is multiplied by a library. An i32 that runs over wraps around."""
    return sums.to(torch.int64).to(torch.int32)


define(
    "matmul", 2, traits=(Trait.CONTRACTION,), attrs={"acc": None}, infer=_infer_matmul, evaluate=_matmul,
    doc="[..., M, K] x [..., K, N] -> [..., M, N]; leading axes broadcast; f16 and bf16 accumulate in f32; with acc = i32, i8 and u8 "
    "are summed in i32, which is the result; with acc = f32, floats of at most 32 bits, of one dtype or two, in f32, which is the result",
)  # fmt: skip


def _infer_conv(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    x, w = ts
    dtype, n = _summed("conv", ts, attrs), x.rank - 2
    if n < 1 or w.rank != x.rank or any(len(attrs[k]) != n for k in ("stride", "padding", "dilation")):
        raise TypeInferenceError(f"conv: {x}, {w} and stride, padding, dilation do not agree in rank")
    last = attrs["channels_last"]
    channels, space = (x.shape[-1], x.shape[1:-1]) if last else (x.shape[1], x.shape[2:])
    filters, inner, kernel = (w.shape[-1], w.shape[-2], w.shape[:-2]) if last else (w.shape[0], w.shape[1], w.shape[2:])
    if dims.prove(dims.mul(inner, attrs["groups"]), "==", channels) is False:
        raise TypeInferenceError(f"conv: {x} has not the channels of {w} in {attrs['groups']} groups")
    out: list[dims.Dim] = []
    for i in range(n):
        span = dims.add(dims.mul(dims.sub(kernel[i], 1), attrs["dilation"][i]), 1)
        room = dims.sub(dims.add(space[i], 2 * attrs["padding"][i]), span)
        out.append(dims.add(dims.floordiv(room, attrs["stride"][i]), 1))
    return [TensorType(dtype, (x.shape[0], *out, filters) if last else (x.shape[0], filters, *out))]


def _factors(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> list[torch.Tensor]:
    """Image and weight in the dtype that their products are summed in; in f64 for integers."""
    if attrs["acc"] is None:
        return list(xs)
    return [x.double() if attrs["acc"] == types.i32 else x.to(ctx.dtype(types.f32)) for x in xs]


def _evaluate_conv(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    (x, w), n, whole = _factors(xs, attrs, ctx), xs[0].dim() - 2, attrs["acc"] == types.i32
    if attrs["channels_last"]:
        x, w = x.movedim(-1, 1), w.permute(n + 1, n, *range(n))
    y = torch.convolution(
        x, w, None, list(attrs["stride"]), list(attrs["padding"]), list(attrs["dilation"]), False, [0] * n, attrs["groups"]
    )
    y = _wrapped(y) if whole else y
    return y.movedim(1, -1) if attrs["channels_last"] else y


define(
    "conv", 2, traits=(Trait.CONTRACTION,), infer=_infer_conv, evaluate=_evaluate_conv,
    attrs={"stride": REQUIRED, "padding": REQUIRED, "dilation": REQUIRED, "groups": 1, "channels_last": False, "acc": None},
    doc="cross-correlation, x [N, C, *S] with w [O, C/groups, *K] -> [N, O, *S']; 1 to 3 spatial axes; channels_last: "
    "x [N, *S, C] with w [*K, C/groups, O] -> [N, *S', O]; i8 and u8 are summed in i32, which is the result, if acc is i32; "
    "floats of at most 32 bits in f32, which is the result, if acc is f32",
)  # fmt: skip


def _infer_conv_transpose(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    x, w = ts
    dtype, n, names = _summed("conv_transpose", ts, attrs), x.rank - 2, ("stride", "padding", "output_padding", "dilation")
    if n < 1 or w.rank != x.rank or any(len(attrs[k]) != n for k in names):
        raise TypeInferenceError(f"conv_transpose: {x}, {w} and {', '.join(names)} do not agree in rank")
    if dims.prove(w.shape[0], "==", x.shape[1]) is False:
        raise TypeInferenceError(f"conv_transpose: {x} has not the channels of {w}")
    out: list[dims.Dim] = []
    for size, taps, stride, padding, more, dilation in zip(x.shape[2:], w.shape[2:], *(attrs[k] for k in names), strict=True):
        span = dims.add(dims.mul(dims.sub(taps, 1), dilation), 1)
        out.append(dims.add(dims.mul(dims.sub(size, 1), stride), dims.add(span, more - 2 * padding)))
    return [TensorType(dtype, (x.shape[0], dims.mul(w.shape[1], attrs["groups"]), *out))]


def _evaluate_conv_transpose(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x, w = _factors(xs, attrs, ctx)
    stride, padding, dilation, more = (list(attrs[k]) for k in ("stride", "padding", "dilation", "output_padding"))
    y = torch.convolution(x, w, None, stride, padding, dilation, True, more, attrs["groups"])
    return _wrapped(y) if attrs["acc"] == types.i32 else y


define(
    "conv_transpose", 2, traits=(Trait.CONTRACTION,), infer=_infer_conv_transpose, evaluate=_evaluate_conv_transpose,
    attrs={"stride": REQUIRED, "padding": REQUIRED, "output_padding": REQUIRED, "dilation": REQUIRED, "groups": 1, "acc": None},
    doc="transposed convolution, x [N, C, *S] with w [C, O/groups, *K] -> [N, O, *S']: each element puts its multiple of w into the "
    "result, stride apart; 1 to 3 spatial axes; acc as for conv",
)  # fmt: skip

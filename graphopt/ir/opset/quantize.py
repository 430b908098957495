"""Quantization: small integers, or floats of 8 bits, that stand for floats, and the packing of integers into words.

A scale stands for as many elements as broadcasting gives it: one number for a tensor, ``[1, N]`` for the columns of a matrix.
Groups along an axis are an axis of their own, by a reshape: ``[K / g, g, N]`` with scales ``[K / g, 1, N]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from graphopt.errors import TypeInferenceError
from graphopt.ir import dims, types
from graphopt.ir.ops import REQUIRED, Attrs, EvalContext, Trait, broadcast_shapes, define, normalize_axis
from graphopt.ir.types import DType, TensorType

if TYPE_CHECKING:
    from graphopt.ir.builder import Builder
    from graphopt.ir.graph import Node, Value

SMALL_INTEGERS = (types.i8, types.u8)
LARGEST = {types.f8e4m3: 448.0, types.f8e5m2: 57344.0}  # finite numbers of floats of 8 bits


@cache
def saturates() -> bool:
    """Whether this PyTorch casts what lies beyond the largest number of f8e4m3 to that number; others cast it to nan."""
    return bool(torch.tensor(2 * LARGEST[types.f8e4m3]).to(types.f8e4m3.torch).float().isfinite())


def integer_range(dtype: DType, bits: int) -> tuple[int, int]:
    """The least and the greatest integer of so many bits, signed as the dtype is."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if dtype.kind == "i" else (0, (1 << bits) - 1)


def _check_bits(name: str, dtype: DType, bits: int) -> None:
    if dtype not in SMALL_INTEGERS or not 1 <= bits <= 8:
        raise TypeInferenceError(f"{name}: {bits} bits of {dtype}; it must be 1 to 8 bits of i8 or u8")


def _infer_quantize(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    x, scale = ts[:2]
    if attrs["dtype"] in LARGEST:
        if attrs["bits"] != 8 or len(ts) == 3:
            raise TypeInferenceError(f"quantize: {attrs['dtype']} has 8 bits and no zero points")
    else:
        _check_bits("quantize", attrs["dtype"], attrs["bits"])
    if not x.dtype.is_float or scale.dtype != x.dtype:
        raise TypeInferenceError(f"quantize: {x} by a scale of {scale.dtype}; both must be floats of one dtype")
    return [TensorType(attrs["dtype"], broadcast_shapes([t.shape for t in ts]))]


def _quantize(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    if (most := LARGEST.get(attrs["dtype"])) is not None:
        return (xs[0] * xs[1].reciprocal()).clamp(-most, most).to(attrs["dtype"].torch)
    low, high = integer_range(attrs["dtype"], attrs["bits"])
    y = torch.round(xs[0] * xs[1].reciprocal())
    y = y + xs[2].to(y.dtype) if len(xs) == 3 else y
    return y.clamp(low, high).to(attrs["dtype"].torch)


def _expand_quantize(b: Builder, node: Node) -> Value:
    x, scale = node.operands[:2]
    y = b.mul(x, b.reciprocal(scale))
    if (most := LARGEST.get(node.attrs["dtype"])) is not None:
        return b.cast(b.minimum(b.maximum(y, -most), most), node.attrs["dtype"])
    low, high = integer_range(node.attrs["dtype"], node.attrs["bits"])
    y = b.round(y)
    y = b.add(y, b.cast(node.operands[2], x.dtype)) if len(node.operands) == 3 else y
    return b.cast(b.minimum(b.maximum(y, float(low)), float(high)), node.attrs["dtype"])


define(
    "quantize", (2, 3), traits=(Trait.POINTWISE,), attrs={"dtype": types.i8, "bits": 8}, infer=_infer_quantize, evaluate=_quantize,
    expand=_expand_quantize,
    doc="round(x * (1 / scale)) + zero, kept within so many bits of i8 or u8; operands x, scale[, zero]; dtype f8e4m3 or f8e5m2: "
    "the nearest of those floats, kept finite",
)  # fmt: skip


def _infer_dequantize(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    q, scale = ts[:2]
    floats = q.dtype in (*LARGEST, types.f32) and len(ts) == 2  # f32: sums of products of f8
    if not (q.dtype.is_integer or floats) or not scale.dtype.is_float:
        raise TypeInferenceError(f"dequantize: {q} with a scale of {scale.dtype}; it takes integers, or f8 or f32 alone, and a float scale")
    return [TensorType(scale.dtype, broadcast_shapes([t.shape for t in ts]))]


def _dequantize(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    scale = xs[1]
    q = xs[0].to(scale.dtype)
    return (q - xs[2].to(scale.dtype) if len(xs) == 3 else q) * scale


def _expand_dequantize(b: Builder, node: Node) -> Value:
    q, scale = node.operands[:2]
    y = b.cast(q, scale.dtype)
    return b.mul(b.sub(y, b.cast(node.operands[2], scale.dtype)) if len(node.operands) == 3 else y, scale)


define(
    "dequantize", (2, 3), traits=(Trait.POINTWISE,), infer=_infer_dequantize, evaluate=_dequantize, expand=_expand_dequantize,
    doc="(q - zero) * scale, in the scale's dtype; operands q, scale[, zero]. Of a frozen matrix it is never computed ahead: "
    "kernels read the integers",
)  # fmt: skip


# --- several integers in a word ------------------------------------------------------------------------------------------


def _per_word(name: str, word: DType, bits: int) -> int:
    if word not in (types.i32, *SMALL_INTEGERS) or bits not in (1, 2, 4, 8) or bits > word.bits:
        raise TypeInferenceError(f"{name}: {bits} bits in {word}; words are i32, u8 or i8, bits 1, 2, 4 or 8")
    return word.bits // bits


def _infer_pack(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    (x,), count = ts, _per_word("pack_bits", attrs["dtype"], attrs["bits"])
    axis = normalize_axis(attrs["axis"], x.rank, "pack_bits")
    whole = x.rank and dims.same(dims.mul(dims.floordiv(x.shape[axis], count), count), x.shape[axis])
    if x.dtype not in SMALL_INTEGERS or not whole:
        raise TypeInferenceError(f"pack_bits: {x} by {count} along axis {axis}; it takes i8 or u8, and a size that {count} divides")
    return [TensorType(attrs["dtype"], (*x.shape[:axis], dims.floordiv(x.shape[axis], count), *x.shape[axis + 1 :]))]


def _pack(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x, bits, axis = xs[0], attrs["bits"], attrs["axis"] % xs[0].dim()
    count = attrs["dtype"].bits // bits
    split = x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :])
    word = torch.zeros(split.select(axis + 1, 0).shape, dtype=torch.int32, device=x.device)
    for i in range(count):
        word |= (split.select(axis + 1, i).to(torch.int32) & ((1 << bits) - 1)) << (i * bits)
    return word.to(attrs["dtype"].torch)


define(
    "pack_bits", 1, attrs={"bits": REQUIRED, "axis": 0, "dtype": types.i32}, infer=_infer_pack, evaluate=_pack,
    doc="neighbours along an axis in one word of i32, u8 or i8, the first in the lowest bits",
)  # fmt: skip


def _infer_unpack(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    (x,), count = ts, _per_word("unpack_bits", ts[0].dtype, attrs["bits"])
    _check_bits("unpack_bits", attrs["dtype"], attrs["bits"])
    axis = normalize_axis(attrs["axis"], x.rank, "unpack_bits")
    return [TensorType(attrs["dtype"], (*x.shape[:axis], dims.mul(x.shape[axis], count), *x.shape[axis + 1 :]))]


def _unpack(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x, bits, dtype = xs[0].to(torch.int32), attrs["bits"], attrs["dtype"]
    axis = attrs["axis"] % x.dim()
    parts = [(x >> (i * bits)) & ((1 << bits) - 1) for i in range(xs[0].element_size() * 8 // bits)]
    y = torch.stack(parts, axis + 1).flatten(axis, axis + 1)
    if dtype.kind == "i":
        y = torch.where(y >= 1 << (bits - 1), y - (1 << bits), y)
    return y.to(dtype.torch)


define(
    "unpack_bits", 1, attrs={"bits": REQUIRED, "axis": 0, "dtype": types.i8}, infer=_infer_unpack, evaluate=_unpack,
    doc="the inverse of pack_bits: the integers in the bits of each word, signed if dtype is i8",
)  # fmt: skip

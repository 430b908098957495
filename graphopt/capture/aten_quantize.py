"""Quantized layers: graphopt's own operators, and those of torch.ao's decomposed form (PT2E)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from graphopt import quantized_conv, quantized_linear  # noqa: F401  (they define operators)
from graphopt.capture.aten import Context, lowers
from graphopt.ir import types
from graphopt.ir.graph import Value
from graphopt.ir.types import DType
from graphopt.passes.quantization.quantize_convolutions import integer_convolution, rounded_image
from graphopt.passes.quantization.quantize_products import MOST_TERMS, integer_product, largest_of_rows, rounded_rows


@lowers("graphopt.dequantize_groups")
def dequantize_groups(c: Context, integers: Value, scales: Value, zeros: Value | None, bits: int, columns: int) -> Value:
    q = integers
    if bits < 8:
        q = c.b.unpack_bits(integers, bits=bits, axis=1, dtype=types.i8 if zeros is None else types.u8)
    (n, depth), groups = q.shape, scales.shape[1]
    several = groups != 1
    if several:
        q = c.b.reshape(q, shape=(n, groups, depth // groups))
        scales = c.b.reshape(scales, shape=(n, groups, 1))
        zeros = c.b.reshape(zeros, shape=(n, groups, 1)) if zeros is not None else None
    w: Value = c.b.dequantize(q, scales, *([zeros] if zeros is not None else []))
    w = c.b.reshape(w, shape=(n, depth)) if several else w
    return c.b.create("slice", [w], {"axis": 1, "stop": columns}) if depth != columns else w  # type: ignore[no-any-return]


@lowers("graphopt.integer_linear")
def integer_linear(c: Context, x: Value, integers: Value, scales: Value, step: Value | None) -> Value:
    dtype = integers.dtype
    c.require(x.dtype == types.f32 and x.type.rank >= 2 and (dtype.is_float or int(integers.shape[1]) <= MOST_TERMS))
    if step is None:
        q, s = rounded_rows(c.b, x, dtype)
    else:
        s = c.b.add(c.b.mul(largest_of_rows(c.b, x), 0.0), c.b.reshape(step, shape=()))  # a row that is no number stays none
        q = c.b.create("quantize", [x, s], {"dtype": dtype, "bits": 8})
    return integer_product(c.b, q, s, c.b.transpose(integers, perm=(1, 0)), c.b.reshape(scales, shape=(1, scales.shape[0])))


@lowers("graphopt.integer_conv")
def integer_conv(c: Context, x: Value, integers: Value, scales: Value, step: Value | None, stride: Sequence[int], padding: Sequence[int],
                 dilation: Sequence[int]) -> Value:  # fmt: skip
    filters, *terms = integers.shape
    c.require(x.dtype == types.f32 and prod(int(d) for d in terms) <= MOST_TERMS)
    if step is None:
        q, s = rounded_image(c.b, x)
    else:
        s = c.b.reshape(step, shape=())
        q = c.b.create("quantize", [x, s], {"dtype": types.i8, "bits": 8})
    attrs = {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation)}
    return integer_convolution(c.b, q, s, integers, c.b.reshape(scales, shape=(1, filters, *[1] * (x.type.rank - 2))), attrs)


@lowers("quantized_decomposed.dequantize_per_channel")
def dequantize_per_channel(c: Context, x: Value, scales: Value, zeros: Value | None, axis: int, quant_min: int, quant_max: int,
                           dtype: Any, *, out_dtype: Any = None) -> Value:  # fmt: skip
    c.require(x.dtype in (types.i8, types.u8, types.i16, types.i32) and c.dtype == types.f32)
    shape = tuple(d if k == axis % x.type.rank else 1 for k, d in enumerate(x.shape))
    points = [] if zeros is None else [c.b.reshape(zeros, shape=shape)]
    return c.b.dequantize(x, c.b.cast(c.b.reshape(scales, shape=shape), types.f32), *points)  # type: ignore[no-any-return]


@lowers("quantized_decomposed.dequantize_per_tensor")
def dequantize_per_tensor(c: Context, x: Value, scale: float, zero: int, quant_min: int, quant_max: int, dtype: Any, *,
                          out_dtype: Any = None) -> Value:  # fmt: skip
    c.require(x.dtype in (types.i8, types.u8, types.i16, types.i32) and c.dtype == types.f32)
    points = [c.b.constant(zero, types.i32)] if zero else []
    return c.b.dequantize(x, c.b.constant(scale, types.f32), *points)  # type: ignore[no-any-return]


@lowers("quantized_decomposed.quantize_per_tensor")
def quantize_per_tensor(c: Context, x: Value, scale: float, zero: int, quant_min: int, quant_max: int, dtype: Any) -> Value:
    full = {types.i8: (-128, 127), types.u8: (0, 255)}.get(DType.of(dtype))
    c.require(x.dtype == types.f32 and full is not None and full[0] <= quant_min <= quant_max <= full[1])
    y = c.b.round(c.b.mul(x, c.b.constant(1.0 / scale, types.f32)))
    y = c.b.add(y, float(zero)) if zero else y
    return c.b.cast(c.b.minimum(c.b.maximum(y, float(quant_min)), float(quant_max)), DType.of(dtype))

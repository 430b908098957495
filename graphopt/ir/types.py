"""Element types and tensor types.

A :class:`TensorType` is a dtype, a shape, and, only where the memory layout is part of a contract (graph inputs and
outputs, library calls), the strides. A value without strides is a logical tensor: lowering decides where it lives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import dtype as TorchDType

from graphopt.ir import dims
from graphopt.ir.dims import Dim, Shape


@dataclass(frozen=True)
class DType:
    """An element type. ``kind`` is f(loat), i(nt), u(nsigned), b(ool) or c(omplex); ``bits`` is the storage size."""

    name: str
    kind: str
    bits: int

    _registry: ClassVar[dict[str, DType]] = {}

    def __post_init__(self) -> None:
        DType._registry[self.name] = self

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return DType.named, (self.name,)

    @staticmethod
    def named(name: str) -> DType:
        """The dtype of that name; raises KeyError."""
        return DType._registry[name]

    @property
    def is_float(self) -> bool:
        return self.kind == "f"

    @property
    def is_complex(self) -> bool:
        return self.kind == "c"

    @property
    def is_integer(self) -> bool:
        """Signed or unsigned integer; bool is not one."""
        return self.kind in "iu"

    @property
    def is_bool(self) -> bool:
        return self.kind == "b"

    @property
    def itemsize(self) -> int:
        """Bytes an element, at least 1 (sub-byte types are packed explicitly)."""
        return max(1, self.bits // 8)

    @property
    def torch(self) -> TorchDType:
        """The torch dtype; raises KeyError for a type that torch cannot hold (packed sub-byte types, tf32)."""
        return _TO_TORCH[self]

    @staticmethod
    def of(dtype: TorchDType) -> DType:
        """The DType of a torch dtype; raises KeyError for one that the IR does not know (e.g. quantized types)."""
        return _FROM_TORCH[dtype]


f64, f32, f16 = DType("f64", "f", 64), DType("f32", "f", 32), DType("f16", "f", 16)
bf16, tf32 = DType("bf16", "f", 16), DType("tf32", "f", 32)
f8e4m3, f8e5m2 = DType("f8e4m3", "f", 8), DType("f8e5m2", "f", 8)
i64, i32, i16, i8 = DType("i64", "i", 64), DType("i32", "i", 32), DType("i16", "i", 16), DType("i8", "i", 8)
i4, i2 = DType("i4", "i", 4), DType("i2", "i", 2)
u64, u32, u16 = DType("u64", "u", 64), DType("u32", "u", 32), DType("u16", "u", 16)
u8, u4, u2 = DType("u8", "u", 8), DType("u4", "u", 4), DType("u2", "u", 2)
b1 = DType("b1", "b", 8)
c32, c64, c128 = DType("c32", "c", 32), DType("c64", "c", 64), DType("c128", "c", 128)

_TO_TORCH = {
    f64: torch.float64, f32: torch.float32, f16: torch.float16, bf16: torch.bfloat16,
    f8e4m3: torch.float8_e4m3fn, f8e5m2: torch.float8_e5m2,
    i64: torch.int64, i32: torch.int32, i16: torch.int16, i8: torch.int8,
    u64: torch.uint64, u32: torch.uint32, u16: torch.uint16, u8: torch.uint8,
    b1: torch.bool, c32: torch.complex32, c64: torch.complex64, c128: torch.complex128,
}  # fmt: skip
_FROM_TORCH = {t: d for d, t in _TO_TORCH.items()}


@dataclass(frozen=True)
class TensorType:
    """A tensor's dtype, shape (ints or symbolic sizes), and strides in elements where they are a contract.

    Text: ``f32[B, 4]``, with strides ``f32[B, 4; 1, B]``.
    """

    dtype: DType
    shape: Shape
    strides: Shape | None = None

    def __post_init__(self) -> None:
        if not self.shape:
            object.__setattr__(self, "strides", None)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> Dim:
        return dims.numel(self.shape)

    @property
    def is_static(self) -> bool:
        return dims.is_static(self.shape)

    @property
    def logical(self) -> TensorType:
        """The same type without a layout."""
        return self if self.strides is None else TensorType(self.dtype, self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Row-major without gaps (sizes of 1 may have any stride); no strides counts as contiguous."""
        if self.strides is None or (self.is_static and 0 in self.shape):
            return True
        expected = dims.contiguous_strides(self.shape)
        return all(d == 1 or s == e for d, s, e in zip(self.shape, self.strides, expected, strict=True))

    def nbytes(self) -> Dim:
        """Bytes of a dense copy."""
        return dims.mul(self.numel, self.dtype.itemsize)

    def with_shape(self, shape: Shape) -> TensorType:
        return TensorType(self.dtype, shape)

    def with_dtype(self, dtype: DType) -> TensorType:
        return TensorType(dtype, self.shape)

    def __str__(self) -> str:
        text = ", ".join(dims.format_dim(d) for d in self.shape)
        if self.strides is not None:
            text += "; " + ", ".join(dims.format_dim(s) for s in self.strides)
        return f"{self.dtype}[{text}]"

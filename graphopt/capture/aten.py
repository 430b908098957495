"""The table aten overload -> IR, and what its entries may ask.

An entry is a function ``(c, *args, **kwargs)`` with the operator's own arguments (defaults are filled in from its
schema; tensors are Values, symbolic sizes are Dims) that builds nodes and returns a Value, or a list with an entry a
result (None where no user reads it). It raises :class:`Decline` when PyTorch's meaning of these very arguments is not
exactly that of the IR ops; the operator then becomes an opaque ``aten`` node. What an entry returns is checked
against the traced dtype and shape.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import sympy
import torch

from graphopt.ir import types
from graphopt.ir.builder import Builder
from graphopt.ir.dims import Dim, Shape
from graphopt.ir.graph import Value
from graphopt.ir.types import DType, TensorType

Number: TypeAlias = bool | int | float | complex | sympy.Expr
Entry: TypeAlias = Callable[..., Any]

TABLE: dict[str, Entry] = {}
NAMESPACES = ("prims.", "graphopt.", "quantized_decomposed.")  # of operators that are no aten ones


class Decline(Exception):
    """The IR has no exact counterpart for these arguments."""


def lowers(*targets: str) -> Callable[[Entry], Entry]:
    """Register an entry for overloads such as ``add.Tensor``; a bare ``relu`` is ``relu.default``; ``prims.x`` keeps its namespace."""

    def register(entry: Entry) -> Entry:
        for t in targets:
            name = t if t.startswith(NAMESPACES) else f"aten.{t}"
            if name.count(".") == 1:
                name += ".default"
            if name in TABLE:
                raise ValueError(f"{name} has two entries")
            TABLE[name] = entry
        return entry

    return register


def entry(name: str, build: Entry, *targets: str) -> None:
    """Register a small entry built from data; ``name`` is its function name in tracebacks."""
    build.__name__ = name
    lowers(*targets)(build)


class Context:
    """What an entry may ask.

    Attributes:
        b: the builder, at the end of the graph, with the operator's source line.
        outs: traced type of each tensor result (None for a result that is none).
        used: whether each result has a reader.
        layout: traced strides and storage offset of a tensor value, for the few entries whose meaning depends on it.
    """

    def __init__(self, b: Builder, outs: Sequence[TensorType | None], used: Sequence[bool],
                 layout: Callable[[Value], tuple[Shape, Dim]]) -> None:  # fmt: skip
        self.b, self.outs, self.used, self.layout = b, outs, used, layout

    @property
    def out(self) -> TensorType:
        """Traced type of the first result."""
        first = self.outs[0]
        assert first is not None
        return first

    @property
    def dtype(self) -> DType:
        return self.out.dtype

    @property
    def shape(self) -> Shape:
        return self.out.shape

    def require(self, condition: bool | None, why: str = "") -> None:
        """Decline unless the condition is known to hold."""
        if not condition:
            raise Decline(why)

    def only_first(self) -> None:
        """Decline if any result but the first is read."""
        self.require(not any(self.used[1:]), "another result than the first is used")

    def constant(self, value: Number, dtype: DType) -> Value:
        """A scalar of that dtype; declines when the dtype does not hold the value's kind."""
        if dtype.is_complex:
            return self.b.constant(complex(value) if not isinstance(value, sympy.Expr) else value, dtype)
        self.require(not isinstance(value, complex))
        if isinstance(value, float) and not dtype.is_float:
            self.require(math.isfinite(value))
            return self.b.constant(value != 0 if dtype.is_bool else int(value), dtype)
        return self.b.constant(value, dtype)

    def to(self, x: Value | Number, dtype: DType) -> Value:
        """A tensor or number, converted to a dtype the way ``Tensor.to`` does."""
        if not isinstance(x, Value):
            return self.constant(x, dtype)
        if x.dtype == dtype:
            return x
        if dtype.is_bool:  # a cast to bool is a test for nonzero; spelt out, so that no kernel can truncate
            return self.b.ne(x, self.b.constant(0, x.dtype))
        self.require(dtype.is_complex or not x.dtype.is_complex, "a complex number to a real one")
        return self.b.cast(x, dtype)

    def math_dtype(self, dtype: DType) -> DType:
        """PyTorch computes half precision scalars and compositions in f32 and rounds once, at the end."""
        return types.f32 if dtype in (types.f16, types.bf16) else dtype


def is_number(x: Any) -> bool:
    return isinstance(x, bool | int | float | complex | sympy.Expr)


def exact(value: Any, dtype: DType) -> bool:
    """Whether a half precision dtype holds a number without rounding."""
    if not isinstance(value, bool | int | float):
        return False
    if not math.isfinite(value):
        return True
    try:
        single = struct.unpack("<f", struct.pack("<f", value))[0]
        if dtype == types.f16:
            return bool(struct.unpack("<e", struct.pack("<e", value))[0] == value)
    except OverflowError:
        return False
    return single == value and struct.unpack("<I", struct.pack("<f", value))[0] & 0xFFFF == 0


def common_dtype(x: Value | Number, y: Value | Number) -> DType:
    """PyTorch's result type: dimensioned tensors before 0-d tensors before numbers; a lower rank only raises the category."""
    levels: list[torch.dtype | None] = [None, None, None]  # dimensioned, 0-d, number
    for v in (x, y):
        level = 2 if not isinstance(v, Value) else 0 if v.type.rank else 1
        dtype = _number_dtype(v) if not isinstance(v, Value) else v.dtype.torch
        held = levels[level]
        levels[level] = dtype if held is None else torch.promote_types(held, dtype)
    result = _combine(levels[0], _combine(levels[1], levels[2]))
    assert result is not None
    return DType.of(result)


def _number_dtype(x: Number) -> torch.dtype:
    if isinstance(x, bool):
        return torch.bool
    if isinstance(x, float):
        return torch.get_default_dtype()
    if isinstance(x, complex):
        return torch.complex128 if torch.get_default_dtype() == torch.float64 else torch.complex64
    return torch.int64


def _combine(higher: torch.dtype | None, lower: torch.dtype | None) -> torch.dtype | None:
    if higher is None or lower is None:
        return lower if higher is None else higher
    if higher.is_complex:
        return higher
    if higher.is_floating_point:
        return higher.to_complex() if lower.is_complex else higher
    if higher == torch.bool or lower.is_floating_point or lower.is_complex:
        return torch.promote_types(higher, lower)
    return higher


def axes_of(dim: Any, rank: int) -> tuple[int, ...]:
    """Reduced axes, nonnegative and sorted: None and an empty list mean all of them."""
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return tuple(range(rank))
    several = dim if isinstance(dim, list | tuple) else (dim,)
    return tuple(sorted({int(a) % rank for a in several})) if rank else ()


def each(values: Sequence[int], n: int) -> tuple[int, ...]:
    """One number an axis, where one may stand for all."""
    return tuple(values) * n if len(values) == 1 else tuple(values)

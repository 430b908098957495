"""Dropout whose choice is a function of a seed and of places, so that whoever has both can make it again.

    y[r, j] = x[r, j] / (1 - rate)  if  chance(seed, r, j) >= rate * 2**32,  else 0

r counts the rows of all leading axes, j is the column. The chance is a number of 32 bits. A row has two words and a column has one,
each a hash of its number and the seed; an element mixes the three by two rounds of multiplying and shifting, in which all is modulo
2**32:

    x = (first[r] ^ column[j]) * A;   chance = (x ^ (x >> 15) ^ second[r]) * B

The second word keeps two rows whose first ones differ in a few bits apart. What computes it, tensors here, nodes of the IR in the
expansion, vectors in a kernel, is a :class:`Words`; so there is one definition.

Counter-based random numbers: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", doi:10.1145/2063384.2063405. The hash of two
multiplications, with its constants: Wellons, "Prospecting for hash functions" (2018), least bias of its form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

from graphopt.errors import TypeInferenceError
from graphopt.ir import dims
from graphopt.ir.ops import REQUIRED, Attrs, EvalContext, define
from graphopt.ir.types import TensorType, i64

if TYPE_CHECKING:
    from graphopt.ir.builder import Builder
    from graphopt.ir.graph import Node, Value

ALL = 0xFFFFFFFF
A, B = 0x21F0AAAD, 0xD35A2D97
_OTHER = 0x9E3779B9  # tells the uses of one hash apart

T = TypeVar("T")


class Words(Protocol[T]):
    """Arithmetic on unsigned words of 32 bits."""

    def xor(self, x: T, y: T | int) -> T: ...

    def right(self, x: T, bits: int) -> T: ...

    def times(self, x: T, c: int) -> T:
        """The lower 32 bits of ``x * c``."""


def signed(c: int) -> int:
    """c modulo 2**32, from -2**31 on: a word times that stays within 64 bits."""
    return c - (1 << 32) if c >> 31 else c


def _mix(w: Words[T], x: T) -> T:
    """A one-to-one hash of a word."""
    for bits, factor in ((16, A), (15, B)):
        x = w.times(w.xor(x, w.right(x, bits)), factor)
    return w.xor(x, w.right(x, 15))


class Chances(Generic[T]):
    """The chances under one seed.

    Args:
        low, high: halves of the seed.
    """

    def __init__(self, words: Words[T], low: T, high: T) -> None:
        self.words = w = words
        self.low = _mix(w, w.xor(low, _mix(w, high)))
        self.high = _mix(w, w.xor(high, self.low))

    def of_row(self, r: T) -> tuple[T, T]:
        w = self.words
        first = _mix(w, w.xor(_mix(w, w.xor(r, self.low)), self.high))
        return first, _mix(w, w.xor(first, _OTHER))

    def of_column(self, j: T) -> T:
        w = self.words
        return _mix(w, w.xor(_mix(w, w.xor(j, self.high)), _OTHER))

    @staticmethod
    def of_element(w: Words[T], first: T, second: T, column: T) -> T:
        x = w.times(w.xor(first, column), A)
        return w.times(w.xor(w.xor(x, w.right(x, 15)), second), B)


def least_kept(rate: float) -> int:
    """The least chance that is kept; 2**32 keeps nothing."""
    return round(rate * (1 << 32))


def check_rate(name: str, rate: Any) -> None:
    """Raises TypeInferenceError where that is no rate of dropout."""
    if not 0 <= rate < 1:
        raise TypeInferenceError(f"{name}: a rate of {rate}, which is not from 0 to less than 1")


def check_seed(name: str, seed: TensorType) -> None:
    if seed.dtype != i64 or not dims.same_shape(seed.shape, ()):
        raise TypeInferenceError(f"{name}: a seed of type {seed}, which is not i64[]")


# reference -------------------------------------------------------------------------------------------------------------


class _Tensors:
    """Words as tensors of i64."""

    def xor(self, x: torch.Tensor, y: torch.Tensor | int) -> torch.Tensor:
        return x ^ y

    def right(self, x: torch.Tensor, bits: int) -> torch.Tensor:
        return x >> bits

    def times(self, x: torch.Tensor, c: int) -> torch.Tensor:
        return (x * signed(c)) & ALL


def kept(seed: torch.Tensor, shape: Sequence[int], rate: float) -> torch.Tensor:
    """Truth values of a shape: which elements dropout keeps."""
    w = _Tensors()
    chances = Chances[torch.Tensor](w, seed & ALL, (seed >> 32) & ALL)
    rows = torch.arange(torch.Size(shape[:-1]).numel(), device=seed.device) & ALL
    first, second = (x[:, None] for x in chances.of_row(rows))
    column = chances.of_column(torch.arange(shape[-1], device=seed.device) & ALL)
    return (chances.of_element(w, first, second, column) >= least_kept(rate)).reshape(list(shape))


def dropped(x: torch.Tensor, seed: torch.Tensor | None, rate: float) -> torch.Tensor:
    """Dropout; what it was without a seed."""
    if seed is None:
        return x
    return torch.where(kept(seed, x.shape, rate), x / (1 - rate), 0.0)


# expansion -------------------------------------------------------------------------------------------------------------


class _Nodes:
    """Words as values of i64."""

    def __init__(self, b: Builder) -> None:
        self.b = b

    def xor(self, x: Value, y: Value | int) -> Value:
        return self.b.bitwise_xor(x, y)  # type: ignore[no-any-return]

    def right(self, x: Value, bits: int) -> Value:
        return self.b.floor_div(x, 1 << bits)  # type: ignore[no-any-return]

    def times(self, x: Value, c: int) -> Value:
        return self.b.bitwise_and(self.b.mul(x, signed(c)), ALL)  # type: ignore[no-any-return]


def _expand(b: Builder, node: Node) -> Value:
    x, seed = node.operands
    w, (*lead, columns) = _Nodes(b), x.shape
    high = b.bitwise_and(b.floor_div(seed, 1 << 32), ALL)
    chances = Chances["Value"](w, b.bitwise_and(seed, ALL), high)
    rows = b.reshape(b.bitwise_and(b.iota(size=dims.numel(tuple(lead))), ALL), shape=(*lead, 1))
    first, second = chances.of_row(rows)
    chance = chances.of_element(w, first, second, chances.of_column(b.bitwise_and(b.iota(size=columns), ALL)))
    rate = node.attrs["rate"]
    scaled = b.mul(x, 1 / (1 - rate))
    return b.where(b.ge(chance, least_kept(rate)), scaled, b.constant(0.0, x.dtype))  # type: ignore[no-any-return]


def _infer(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    x, seed = ts
    if not x.dtype.is_float or x.rank < 1:
        raise TypeInferenceError(f"dropout: needs a float operand with an axis, got {x}")
    check_rate("dropout", attrs["rate"])
    check_seed("dropout", seed)
    return [x.logical]


def _evaluate(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x, seed = xs
    return dropped(x, seed, attrs["rate"])


define(
    "dropout", 2, attrs={"rate": REQUIRED}, infer=_infer, evaluate=_evaluate, expand=_expand,
    doc="x / (1 - rate), or 0 with the probability rate, as a hash of the seed, i64[], the row and the column says",
)  # fmt: skip

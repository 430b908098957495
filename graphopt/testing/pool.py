"""A random graph that grows: who decides, and the values to choose operands from."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol, TypeVar

import torch

from graphopt.errors import TypeInferenceError
from graphopt.ir import OPS, Builder, DType, Graph, Loc, TensorType, Value, dims, types
from graphopt.ir.dims import Dim, Range, Shape
from graphopt.ir.ops import EvalContext

T = TypeVar("T")

FLOATS = (types.f32, types.f64, types.f16, types.bf16)
INTEGERS = (types.i64, types.i32, types.i8, types.u8)
DTYPES = (*FLOATS, *INTEGERS, types.b1, types.c64)


class Chooser(Protocol):
    """Where decisions come from. Small numbers should stand for simple choices, so that shrinking finds simple graphs."""

    def integer(self, lo: int, hi: int) -> int:
        """A number from lo to hi, both included."""


class Seeded:
    """Decisions by a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def integer(self, lo: int, hi: int) -> int:
        return self.rng.randint(lo, hi)


class Drawn:
    """Decisions by hypothesis."""

    def __init__(self, draw: Callable[[Any], Any], integers: Callable[[int, int], Any]) -> None:
        self.draw, self.integers = draw, integers

    def integer(self, lo: int, hi: int) -> int:
        return int(self.draw(self.integers(lo, hi)))


class Pool:
    """A graph that grows: its builder, the values that may be used as operands, and decisions."""

    def __init__(self, chooser: Chooser, symbolic: bool) -> None:
        self.chooser, self.symbolic = chooser, symbolic
        self.graph = Graph("random", {"B": Range(1, 64), "S": Range(1)} if symbolic else {})
        self.builder = Builder(self.graph)
        self.values: list[Value] = []

    # decisions

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.chooser.integer(0, len(choices) - 1)]

    def flag(self, one_in: int = 2) -> bool:
        """True once in so many times; false is the simple choice."""
        return self.chooser.integer(0, one_in - 1) == one_in - 1

    def size(self) -> Dim:
        """A size: mostly a small number or a symbol."""
        plain: list[Dim] = [2, 3, 1, 4, 5]
        if not self.symbolic:
            return self.pick(plain)
        b, s = dims.symbol("B"), dims.symbol("S")
        return self.pick([2, 3, b, 1, 4, s, b, 2 * b, b + s])

    def static_size(self) -> int:
        return self.pick([2, 3, 1, 4, 6])

    def shape(self, least: int = 0, most: int = 3) -> Shape:
        return tuple(self.size() for _ in range(self.chooser.integer(least, most)))

    # values

    def input(self, dtype: DType, shape: Shape, keep: bool = True) -> Value:
        """A new input; some are weights, some are transposed in memory. ``keep``: later nodes may use it too."""
        strides = None
        if len(shape) >= 2 and self.flag(6):
            strides = (*dims.contiguous_strides(shape[:-2]), 1, shape[-2])
            strides = tuple(dims.mul(s, dims.mul(shape[-1], shape[-2])) for s in strides[:-2]) + strides[-2:]
        weight = dims.is_static(shape) and bool(shape) and self.flag(4)
        hint = self.pick(["", "x", "w", "x.y"])
        value = self.graph.add_input(TensorType(dtype, shape, strides), hint, weight)
        if keep:
            self.values.append(value)
        return value

    def value(self, fits: Callable[[Value], bool], otherwise: Callable[[], TensorType]) -> Value:
        """An existing value that fits, or a new input of the type given."""
        found = [v for v in reversed(self.values) if fits(v)][:8]
        if found and not self.flag(5):
            return self.pick(found)
        new = otherwise()
        return self.input(new.dtype, new.shape)

    def operand(self, dtypes: Sequence[DType], least: int = 0, most: int = 4) -> Value:
        """A value of one of some dtypes, of a rank between two."""
        return self.value(
            lambda v: v.dtype in dtypes and least <= v.type.rank <= most,
            lambda: TensorType(self.pick(dtypes), self.shape(least, min(most, max(least, 3)))),
        )

    def partner(self, x: Value) -> Value:
        """A value that broadcasts with another one: the same shape, a row, a scalar, an existing value."""
        kind = self.chooser.integer(0, 4)
        if kind == 0:
            return self.scalar(x.dtype)
        if kind == 1:
            return self.input(x.dtype, x.shape)
        if kind == 2:
            shape = tuple(1 if self.flag(3) else d for d in x.shape[self.chooser.integer(0, x.type.rank) :])
            return self.input(x.dtype, shape)
        return self.value(lambda v: v.dtype == x.dtype and broadcasts(v.shape, x.shape), lambda: TensorType(x.dtype, x.shape))

    def scalar(self, dtype: DType) -> Value:
        """A constant of rank 0, often one that simplifications look for."""
        numbers: list[float] = [0, 1, 2, -1, 3]
        if dtype.is_float:
            numbers += [0.5, -0.25]
        if dtype.kind == "u":
            numbers = [0, 1, 2, 3]
        return self.builder.constant(self.pick(numbers), dtype)

    def add(self, name: str, operands: Sequence[Value], **attrs: Any) -> Value:
        """A node; some carry a source line or a name. All of its results may be read later; the first one is returned."""
        self.builder.loc = Loc("model.py", self.chooser.integer(1, 9)) if self.flag(4) else None
        created = self.builder.create(name, operands, attrs)
        results: tuple[Value, ...] = created if isinstance(created, tuple) else (created,)
        if self.flag(8):
            results[0].hint = "t"
        self.values += results
        return results[0]


def broadcasts(a: Shape, b: Shape) -> bool:
    """Whether two shapes are known to broadcast, into a rank of 4 at most."""
    for i in range(1, min(len(a), len(b)) + 1):
        x, y = a[-i], b[-i]
        if x != y and x != 1 and y != 1:
            return False
    return max(len(a), len(b)) <= 4


@cache
def supported(name: str, dtype: DType) -> bool:
    """Whether PyTorch computes a pointwise op or a reduction for a dtype, and inference admits it."""
    definition = OPS[name]
    arity = definition.arity[0]
    full = dict(definition.attrs) | ({"axes": (0,)} if "axes" in definition.attrs else {})
    full |= {"axis": 0} if "axis" in definition.attrs else {}
    ones = [torch.ones(2, dtype=torch.uint8).to(dtype.torch) for _ in range(arity)]
    try:
        assert definition.infer is not None
        definition.infer([TensorType(dtype, (2,))] * arity, full)
        assert definition.evaluate is not None
        definition.evaluate(ones, full, EvalContext({}))
    except (TypeInferenceError, RuntimeError, NotImplementedError, TypeError):
        return False
    return True


def supported_dtypes(name: str) -> list[DType]:
    """The dtypes for which a pointwise op or a reduction can be made; f32 first."""
    return [d for d in DTYPES if supported(name, d)]

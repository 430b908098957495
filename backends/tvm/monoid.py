"""What a reduction does to accumulators, and how partial results of a vector are joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, i64
from graphopt.ir import types
from graphopt.ir.types import DType


@dataclass(frozen=True)
class Monoid:
    """What a reduction does to accumulators.

    Attributes:
        held: element type of an accumulator; ``total``: of the sum of blocks.
        start: the neutral element.
        join: combine two accumulators of one type.
    """

    held: str
    total: str
    start: Any
    join: Callable[[Any, Any], Any]

    @staticmethod
    def of(op: str, dtype: DType, nan_matters: bool = True) -> Monoid:
        if dtype.is_bool or op in ("any", "all"):
            some = op in ("any", "sum", "max", "mean")
            return Monoid("uint8", "uint8", 0 if some else 1, tirx.max if some else tirx.min)
        name = scalar.COMPUTE[dtype]
        if op in ("sum", "mean", "prod"):
            start: float = 1 if op == "prod" else 0
            if not dtype.is_float:
                return Monoid(name, name, start, lambda a, b: scalar.wrapping(op == "prod", a, b, dtype))
            return Monoid(name, "float64", start, (lambda a, b: a * b) if op == "prod" else (lambda a, b: a + b))
        larger = op == "max"
        if dtype.is_float:
            start = float("-inf") if larger else float("inf")
        else:
            low = -(1 << (dtype.bits - 1)) if dtype.kind == "i" else 0
            start = low if larger else low + (1 << dtype.bits) - 1
        if not nan_matters:
            return Monoid(name, name, start, tirx.max if larger else tirx.min)
        kind = types.f64 if name == "float64" else types.f32 if dtype.is_float else dtype
        return Monoid(name, name, start, lambda a, b: scalar.extreme(a, b, kind, larger))


def combine(code: Code, acc: Any, width: int, lanes: int, m: Monoid) -> Any:
    """All accumulators of a buffer joined into one value, in registers: vectors first, then halves of a vector."""
    if lanes == 1:
        parts = [code.load(acc, k) for k in range(width)]
    else:
        parts = [acc[tirx.Ramp(i64(k), i64(1), lanes)] for k in range(0, width, lanes)]
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        parts = [code.bind(m.join(parts[k], parts[k + half])) if k + half < len(parts) else parts[k] for k in range(half)]
    value = code.bind(parts[0])
    while lanes > 1:
        lanes //= 2
        name = m.held if lanes == 1 else f"{m.held}x{lanes}"
        low, high = (tirx.Shuffle([value], list(range(k, k + lanes))) for k in (0, lanes)) if lanes > 1 else (
            tirx.Shuffle([value], [0]), tirx.Shuffle([value], [1]))  # fmt: skip
        assert str(low.ty.dtype) == name
        value = code.bind(m.join(code.bind(low), code.bind(high)))
    return value


def combine_each(code: Code, vectors: Sequence[Any], lanes: int, m: Monoid) -> list[Any]:
    """What the lanes of each vector join to: one lane a vector, ``lanes`` of them in each vector that is returned.

    Two vectors' even lanes are joined with their odd ones, again and again: two shuffles and one operation for each vector, where
    :func:`combine` takes as many for each halving.
    """
    out = []
    even, odd = range(0, 2 * lanes, 2), range(1, 2 * lanes, 2)
    start = tirx.Broadcast(tirx.const(m.start, m.held), lanes)
    for first in range(0, len(vectors), lanes):
        parts = [*vectors[first : first + lanes], *[start] * (first + lanes - len(vectors))]
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [code.bind(m.join(*(code.bind(tirx.Shuffle([a, b], list(order)), "mix") for order in (even, odd)))) for a, b in pairs]
        out += parts
    return out

"""What several passes need: keeping a result's shape, and numbers as a dtype holds them."""

from __future__ import annotations

import math

import torch

from graphopt.ir import OPS, DType, Trait, Value, dims
from graphopt.ir.graph import Node, is_view
from graphopt.rewrite import Match, Reject, Rewriter, scalar_of

NOT_THIS = Reject("")  # the match is not what the rule is about: nothing to tell

POINTWISE = tuple(name for name, op in OPS.items() if op.has(Trait.POINTWISE))
UNARY = tuple(name for name in POINTWISE if OPS[name].arity == (1, 1))


def shaped(rw: Rewriter, v: Value, m: Match) -> Value:
    """The value, broadcast to the shape of the match's root; the same value if it has that shape."""
    shape = m.root.results[0].shape
    return v if dims.same_shape(v.shape, shape, m.root.graph.symbols) else rw.broadcast_to(v, shape=shape)  # type: ignore[no-any-return]


def same_shape(a: Value, b: Value, m: Match) -> bool:
    """Whether two values are proven to have one shape."""
    return dims.same_shape(a.shape, b.shape, m.root.graph.symbols)


def is_scalar(v: Value) -> bool:
    """Whether a value is a numeric scalar constant (also one that is broadcast)."""
    return scalar_of(v) is not None


def rounded(number: float, dtype: DType) -> float:
    """A number as the dtype holds it; integers wrap around."""
    if dtype.is_integer:
        low = 0 if dtype.kind == "u" else -(1 << (dtype.bits - 1))
        return (int(number) - low) % (1 << dtype.bits) + low
    return torch.tensor(number, dtype=dtype.torch).item()


def is_power_of_two(number: float, dtype: DType) -> bool:
    """Whether multiplying by the number's reciprocal is the same, bit by bit, as dividing by the number."""
    if not dtype.is_float or number == 0 or not math.isfinite(number):
        return False
    limits = torch.finfo(dtype.torch)
    return abs(math.frexp(number)[0]) == 0.5 and limits.tiny <= abs(number) <= 1 / limits.tiny and abs(number) <= limits.max


def is_negative_zero(number: float | complex) -> bool:
    return isinstance(number, float) and number == 0 and math.copysign(1.0, number) < 0


def input_behind_views(v: Value) -> Value | None:
    """The input of a region's body that a value is a view of, or None."""
    while v.producer is not None:
        if not is_view(v.producer):
            return None
        v = v.producer.operands[0]
    return v


def matmuls(fusion: Node) -> list[Node]:
    """The products of a region, in order: one, or two that meet."""
    assert fusion.body is not None
    return [n for n in fusion.body.nodes() if n.op.name == "matmul"]

"""Dropout of weights: a draw for each, times the reciprocal of the share that is kept."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir import Node, Value
from graphopt.ir.types import TensorType, i64
from graphopt.passes.recompose.spelling import number
from graphopt.rewrite import Rewriter

_DRAW, _SEED = "aten.bernoulli.p", "aten.randint.default"
_SEEDS = 2**63 - 1


@dataclass(frozen=True)
class Drop:
    """``source``, of which a share ``rate`` is dropped; ``through``: values on the way, the draw among them."""

    source: Value
    rate: float
    through: tuple[Value, ...]


def read_dropout(v: Value) -> Drop | None:
    """Read v as x * draw / kept, in any order, where the draw is 1 with the probability ``kept`` and else 0; None if it is not that."""
    scale, factors, through = _factors(v)
    draws = [x for x in factors if _kept(x) is not None]
    if len(factors) != 2 or len(draws) != 1 or draws[0].shape != v.shape:
        return None
    (source,) = (x for x in factors if x is not draws[0])
    kept = _kept(draws[0])
    if source.shape != v.shape or not kept or abs(scale * kept - 1) > 1e-6:
        return None
    return Drop(source, round(1 - kept, 12), (*through, draws[0], source))


def _factors(v: Value, depth: int = 0) -> tuple[float, list[Value], list[Value]]:
    """(number, tensors) whose product a value is, and the products on the way."""
    node = v.defined_by("mul", "div", "cast")
    if node is None or depth > 4:
        return 1.0, [v], []
    if node.name == "cast":  # of a draw that halves are multiplied by: PyTorch divides it as f32
        scale, found, through = _factors(node.operands[0], depth + 1)
        drawn = len(found) == 1 and _kept(found[0]) is not None and v.dtype.is_float and node.operands[0].dtype.is_float
        return (scale, found, [v, *through]) if drawn else (1.0, [v], [])
    x, y = node.operands
    if node.name == "div":
        c = number(y)
        if not c:
            return 1.0, [v], []
        scale, found, through = _factors(x, depth + 1)
        return scale / c, found, [v, *through]
    if (c := number(y)) is not None or (c := number(x)) is not None:
        scale, found, through = _factors(x if number(y) is not None else y, depth + 1)
        return scale * c, found, [v, *through]
    left, right = _factors(x, depth + 1), _factors(y, depth + 1)
    return left[0] * right[0], left[1] + right[1], [v, *left[2], *right[2]]


def _kept(v: Value) -> float | None:
    """The probability with which each element of a draw is 1, and not 0; None if a value is no draw."""
    node = v.defined_by("aten")
    if node is None or node.attrs["target"] != _DRAW or len(node.attrs["args"]) != 2 or node.attrs["kwargs"]:
        return None
    kept = node.attrs["args"][1]
    return float(kept) if isinstance(kept, int | float) else None


def drawn_seed(rw: Rewriter) -> Value:
    """A seed, drawn from PyTorch's generator."""
    (seed,) = rw.aten(_SEED, [], [TensorType(i64, ())], (_SEEDS, ()), (), "random")
    return seed


def draws_seed(node: Node) -> bool:
    """Whether a node is :func:`drawn_seed`."""
    return node.name == "aten" and node.attrs["target"] == _SEED and node.attrs["args"] == (_SEEDS, ())

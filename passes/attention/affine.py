"""Values that are known for every size: numbers of the form c + sum_a k_a i_a over the indices i_a, and comparisons of such numbers.

Masks are built of positions: ``arange(n)[None, :] <= arange(m)[:, None]`` is ``0 <= i - j``. Read so, a mask is proven to be causal
or a window without being computed, at any size, also a symbolic one.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from graphopt.ir import Node, Value, dims
from graphopt.ir.dims import Dim
from graphopt.rewrite import scalar_of

_DEEPEST = 40


@dataclass(frozen=True)
class Affine:
    """``base + sum(steps[a] * index_a)``, one step an axis; 0 along an axis of size 1."""

    base: Dim
    steps: tuple[Dim, ...]

    @property
    def is_constant(self) -> bool:
        return all(s == 0 for s in self.steps)

    def scaled(self, c: Dim) -> Affine:
        return Affine(dims.mul(self.base, c), tuple(dims.mul(s, c) for s in self.steps))

    def shifted(self, c: Dim) -> Affine:
        return Affine(dims.add(self.base, c), self.steps)


def _sum(a: Affine, b: Affine) -> Affine:
    rank = max(len(a.steps), len(b.steps))
    x, y = ((0,) * (rank - len(t.steps)) + t.steps for t in (a, b))
    return Affine(dims.add(a.base, b.base), tuple(dims.add(p, q) for p, q in zip(x, y, strict=True)))


def difference(a: Affine, b: Affine) -> Affine:
    return _sum(a, b.scaled(-1))


def affine(v: Value, depth: int = 0) -> Affine | None:
    """What is known of an integer value, a truth value (0 or 1), or a float that is whole; else None."""
    node = v.producer
    if node is None or depth > _DEEPEST or v.dtype.is_complex:
        return None
    number = scalar_of(v)
    if number is not None:
        return Affine(int(number), (0,) * v.type.rank) if isinstance(number, int | float) and number == int(_finite(number)) else None
    reader = _READERS.get(node.name)
    return reader(node, depth + 1) if reader is not None else None


def _finite(x: float) -> float:
    return x if abs(x) < 2**53 else 0.5


def _constant(node: Node, depth: int) -> Affine | None:
    value = node.attrs["value"]
    return Affine(value, ()) if isinstance(value, sympy.Expr) else None


def _iota(node: Node, depth: int) -> Affine | None:
    size, start, step = (node.attrs[n] for n in ("size", "start", "step"))
    return Affine(start, (0 if size == 1 else step,))


def _cast(node: Node, depth: int) -> Affine | None:
    x = node.operands[0]
    if node.result.dtype.is_bool and not x.dtype.is_bool:
        found = affine(x, depth)
        nonzero = found is not None and found.is_constant and found.base != 0 and isinstance(found.base, int)
        return Affine(1, found.steps) if found is not None and nonzero else None
    # positions are whole numbers below 2^24, which f32 holds; halves hold too few of them
    return affine(x, depth) if node.result.dtype.bits >= 32 or x.dtype.is_bool or not node.result.dtype.is_float else None


def _linear(node: Node, depth: int) -> Affine | None:
    a, b = (affine(x, depth) for x in node.operands)
    if a is None or b is None or node.result.dtype.is_bool:
        return None
    if node.name == "add":
        return _sum(a, b)
    if node.name == "sub":
        return difference(a, b)
    rank = node.result.type.rank
    for x, c in ((a, b), (b, a)):
        if c.is_constant:
            return Affine(0, (0,) * rank) if c.base == 0 else _sum(x.scaled(c.base), Affine(0, (0,) * rank))
    return None


def _negated(node: Node, depth: int) -> Affine | None:
    a = affine(node.operands[0], depth)
    return None if a is None else a.scaled(-1)


def _reshape(node: Node, depth: int) -> Affine | None:
    """Axes of size 1 come and go; along all others the order stays."""
    x, out = affine(node.operands[0], depth), node.result.shape
    if x is None:
        return None
    if x.is_constant:
        return Affine(x.base, (0,) * len(out))
    old = [(d, s) for d, s in zip(node.operands[0].shape, x.steps, strict=True) if d != 1]
    if not dims.same_shape([d for d, _ in old], [d for d in out if d != 1]):
        return None
    steps = iter(s for _, s in old)
    return Affine(x.base, tuple(0 if d == 1 else next(steps) for d in out))


def _transpose(node: Node, depth: int) -> Affine | None:
    x = affine(node.operands[0], depth)
    return None if x is None else Affine(x.base, tuple(x.steps[p] for p in node.attrs["perm"]))


def _broadcast(node: Node, depth: int) -> Affine | None:
    x, rank = affine(node.operands[0], depth), node.result.type.rank
    return None if x is None else Affine(x.base, (0,) * (rank - len(x.steps)) + x.steps)


def _slice(node: Node, depth: int) -> Affine | None:
    x = affine(node.operands[0], depth)
    if x is None:
        return None
    axis = node.attrs["axis"] % len(x.steps)
    step = x.steps[axis]
    base = dims.add(x.base, dims.mul(step, node.attrs["start"]))
    after = 0 if node.result.shape[axis] == 1 else dims.mul(step, node.attrs["step"])
    return Affine(base, (*x.steps[:axis], after, *x.steps[axis + 1 :]))


def _concat(node: Node, depth: int) -> Affine | None:
    """Pieces that go on where the one before them ended."""
    pieces = [affine(x, depth) for x in node.operands]
    axis = node.attrs["axis"] % node.result.type.rank
    sizes = [x.shape[axis] for x in node.operands]
    long = next((p for p, n in zip(pieces, sizes, strict=True) if p is not None and n != 1), None)
    if long is None or any(p is None for p in pieces):
        return None
    step, at, whole = long.steps[axis], 0, None
    for p, n in zip(pieces, sizes, strict=True):
        assert p is not None
        start = Affine(dims.sub(p.base, dims.mul(step, at)), (*p.steps[:axis], step, *p.steps[axis + 1 :]))
        if (n != 1 and p.steps[axis] != step) or (whole is not None and start != whole):
            return None
        whole, at = start, dims.add(at, n)
    return whole


def _cumsum(node: Node, depth: int) -> Affine | None:
    x, axis = affine(node.operands[0], depth), node.attrs["axis"]
    if x is None or not x.is_constant:
        return None
    steps = [0] * len(x.steps)
    if node.result.shape[axis] != 1:
        steps[axis] = x.base
    return Affine(x.base, tuple(steps))


def _compare(node: Node, depth: int) -> Affine | None:
    """Truth that does not depend on the index."""
    a, b = (affine(x, depth) for x in node.operands)
    if a is None or b is None:
        return None
    gap = difference(a, b)
    known = dims.prove(gap.base, _RELATIONS[node.name], 0, node.graph.symbols) if gap.is_constant else None
    return None if known is None else Affine(int(known), gap.steps)


def _logic(node: Node, depth: int) -> Affine | None:
    found = [affine(x, depth) for x in node.operands]
    steps = (0,) * node.result.type.rank
    if not node.result.dtype.is_bool:
        return None
    values = [bool(x.base) if x is not None and x.is_constant and isinstance(x.base, int) else None for x in found]
    ends = node.name.endswith("_or")  # or: a true one decides; and: a false one
    if ends in values:
        return Affine(int(ends), steps)
    return Affine(int(not ends), steps) if None not in values else None


def _not(node: Node, depth: int) -> Affine | None:
    x = affine(node.operands[0], depth)
    return Affine(1 - int(x.base), x.steps) if x is not None and x.is_constant and x.base in (0, 1) and node.result.dtype.is_bool else None


_RELATIONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_READERS = {
    "constant": _constant, "iota": _iota, "cast": _cast, "add": _linear, "sub": _linear, "mul": _linear, "neg": _negated,
    "reshape": _reshape, "transpose": _transpose, "broadcast_to": _broadcast, "slice": _slice, "concat": _concat, "cumsum": _cumsum,
    **dict.fromkeys(_RELATIONS, _compare), **dict.fromkeys(("logical_and", "logical_or", "bitwise_and", "bitwise_or"), _logic),
    "logical_not": _not, "bitwise_not": _not,
}  # fmt: skip


def at_least_zero(v: Value, negated: bool = False) -> list[Affine] | None:
    """Affine numbers that are all >= 0 exactly where a truth value holds (or, negated, does not); None if it is no such comparison.

    The numbers are whole, so a < b is b - a - 1 >= 0. |x| <= c is two of them.
    """
    node = v.defined_by(*_RELATIONS)
    if node is None or not all(x.dtype.is_integer or affine(x) is not None for x in node.operands):
        return None
    name = node.name if not negated else {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}.get(node.name, "")
    x, y = node.operands
    if name in ("gt", "ge"):
        x, y, name = y, x, {"gt": "lt", "ge": "le"}[name]
    if name not in ("lt", "le"):
        return None
    far, near = affine(y), affine(x)
    less = -1 if name == "lt" else 0
    size = x.defined_by("abs")
    if near is None and size is not None and far is not None and (inner := affine(size.operands[0])) is not None:
        return [difference(far, inner).shifted(less), _sum(far, inner).shifted(less)]
    return None if near is None or far is None else [difference(far, near).shifted(less)]

"""Reading scores: from what softmax is taken of, up to the product of queries and keys, through everything in between.

    scores = mask(cap(scale * q k^T) + bias), in any order and association that means this

What is read is only looked at; nothing is changed. A value that cannot be read is refused with the reason, and the node.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from graphopt.ir import Node, Value
from graphopt.passes.attention.affine import affine
from graphopt.passes.attention.axes import Atom, Axes, Group, Placed, aligned, apart, flat, up, within
from graphopt.passes.recompose.spelling import axes_of, number, reduction
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Reject

_DEEPEST = 40


@dataclass(frozen=True)
class Term:
    """``factor * value``, added to the scores; of ``others`` it is a multiple, too."""

    at: Placed
    factor: float = 1.0
    others: tuple[Placed, ...] = ()


@dataclass(frozen=True)
class Fill:
    """Scores are ``number`` where ``mask`` does not hold (``negated``: where it holds)."""

    mask: Placed
    negated: bool
    number: float


@dataclass(frozen=True)
class Scores:
    """scale * q k^T, capped, with terms added and keys hidden.

    Attributes:
        q, k: operands of the product; the last group of ``q`` and the group before the last of ``k`` (or the other way round) are
            summed over: ``inner``.
        rows_by, keys_by: factors that are constant along the keys, and along the rows; True where it is a divisor.
        hidden: outermost first.
        least: a lower bound that the scores were clamped to.
    """

    q: Placed
    k: Placed
    inner: Group
    product: Node
    scale: float = 1.0
    cap: float | None = None
    rows_by: tuple[tuple[Placed, bool], ...] = ()
    keys_by: tuple[tuple[Placed, bool], ...] = ()
    terms: tuple[Term, ...] = ()
    hidden: tuple[Fill, ...] = ()
    least: float | None = None
    through: tuple[Value, ...] = field(default=())  # values on the way, which must have no other use

    def times(self, c: float) -> Scores:
        """All of it, multiplied by a positive number."""
        terms = tuple(replace(t, factor=t.factor * c) for t in self.terms)
        hidden = tuple(replace(h, number=h.number * c) for h in self.hidden)
        scale, cap = (self.scale * c, None) if self.cap is None else (self.scale * c, self.cap * c)
        return replace(self, scale=scale, cap=cap, terms=terms, hidden=hidden)


Found = Scores | Reject


def read(v: Value, axes: Axes, keys: Group, depth: int = 0) -> Found:
    """The scores that a value is.

    Args:
        v: a value; ``axes``: its axes, in which ``keys`` is one group.
    """
    found = _read(v, axes, keys, depth)
    return found if isinstance(found, Reject) else replace(found, through=(*found.through, v))


def _read(v: Value, axes: Axes, keys: Group, depth: int) -> Found:
    node = v.producer
    if node is None or depth > _DEEPEST:
        return NOT_THIS
    if node.name in ("reshape", "transpose"):
        step = up(v, axes)
        if step is None:
            return Reject("a reshape mixes the axes of the scores", node)
        return read(*step, keys, depth + 1)
    if node.name == "cast":
        x = node.operands[0]
        return read(x, axes, keys, depth + 1) if x.dtype.is_float else NOT_THIS
    reader = _READERS.get(node.name)
    return reader(node, axes, keys, depth + 1) if reader is not None else NOT_THIS


def _full(x: Value, node: Node) -> bool:
    """Whether an operand has the result's own shape, so that the scores can lie in it."""
    return x.shape == node.result.shape


def _product(node: Node, axes: Axes, keys: Group, depth: int) -> Found:
    a, b = node.operands
    if a.type.rank < 2 or b.type.rank < 2:
        return NOT_THIS
    inner: Group = () if a.shape[-1] == 1 else (Atom(a.shape[-1]),)
    batch, rows, columns = axes[:-2], axes[-2], axes[-1]
    left = Placed(a, (*aligned(a.shape[:-2], batch), rows, inner))
    right = Placed(b, (*aligned(b.shape[:-2], batch), inner, columns))
    if within(keys, columns) and apart(keys, rows) and flat(columns) == flat(keys):
        return Scores(left, right, inner, node)
    if within(keys, rows) and apart(keys, columns) and flat(rows) == flat(keys):
        return Scores(right, left, inner, node)
    return Reject("softmax is not taken over the keys of this product", node)


def _beside(node: Node, axes: Axes, keys: Group, depth: int) -> tuple[Scores, Value, Value] | Reject:
    """(scores, the operand that they are, the other one) of ``x op y``: the first operand that is a product of queries and keys."""
    x, y = node.operands
    refused = NOT_THIS
    for v, other in ((x, y), (y, x)) if node.name in ("mul", "add") else ((x, y),):
        if not _full(v, node):
            continue
        found = read(v, axes, keys, depth)
        if not isinstance(found, Reject):
            return found, v, other
        refused = found if found.reason else refused
    return refused


def _scaled(node: Node, axes: Axes, keys: Group, depth: int) -> Found:
    """x * y or x / y: a number, or something that is constant along the keys or along the rows."""
    beside = _beside(node, axes, keys, depth)
    if isinstance(beside, Reject):
        return beside
    found, _, factor = beside
    c = number(factor)
    if c is not None:
        return _by_number(found, c if node.name == "mul" else 1 / c if c else 0.0, node)
    return _by_tensor(found, Placed(factor, aligned(factor.shape, axes)), keys, node)


def _by_number(found: Scores, c: float, node: Node) -> Found:
    if c > 0:
        return found.times(c)
    if c < 0 and found.cap is None and not found.hidden:
        return found.times(c)
    return Reject(f"the scores are multiplied by {c:g}", node)


def _by_tensor(found: Scores, factor: Placed, keys: Group, node: Node) -> Found:
    divide = node.name == "div"
    along_keys, along_rows = not apart(factor.atoms, keys), not apart(factor.atoms, _rows(found))
    if along_keys and along_rows:
        return Reject("the scores are multiplied by a matrix of the scores' own shape, which no scale or mask is", node)
    if found.cap is not None or found.hidden or found.least is not None:
        return Reject("a tensor scales the scores after they were capped or masked", node)
    if divide and found.terms:
        return Reject("a tensor divides the scores after a bias was added", node)
    terms = tuple(replace(t, others=(*t.others, factor)) for t in found.terms)
    if along_keys:
        return replace(found, keys_by=(*found.keys_by, (factor, divide)), terms=terms)
    return replace(found, rows_by=(*found.rows_by, (factor, divide)), terms=terms)


def _rows(found: Scores) -> Group:
    """The atoms that only the queries have."""
    k = found.k.atoms
    return tuple(a for a in found.q.atoms if a not in k and a not in flat(found.inner))


def _negated(node: Node, axes: Axes, keys: Group, depth: int) -> Found:
    found = read(node.operands[0], axes, keys, depth)
    return found if isinstance(found, Reject) else _by_number(found, -1.0, node)


def _added(node: Node, axes: Axes, keys: Group, depth: int) -> Found:
    """x + y: the scores are the first operand that is a product of queries and keys; the other is added."""
    beside = _beside(node, axes, keys, depth)
    if isinstance(beside, Reject):
        return beside
    found, v, other = beside
    if node.name == "sub" and (most := reduction(other, "max")) is not None and most.operands[0] is v:
        same_axis = axes_of(most) == tuple(i for i, g in enumerate(axes) if g and within(g, keys))
        if same_axis:  # softmax takes the maximum off by itself
            return replace(found, through=(*found.through, most.results[0]))
    if affine_zero(other):
        return found
    if found.hidden and any(h.number != float("-inf") for h in found.hidden):
        return Reject("something is added to scores that were set to a number already", node)
    term = Term(Placed(other, aligned(other.shape, axes)), -1.0 if node.name == "sub" else 1.0)
    return replace(found, terms=(*found.terms, term))


def affine_zero(v: Value) -> bool:
    """Whether a value is known to be 0 everywhere."""
    known = affine(v)
    return known is not None and known.is_constant and known.base == 0


def _capped(node: Node, axes: Axes, keys: Group, depth: int) -> Found:
    found = read(node.operands[0], axes, keys, depth)
    if isinstance(found, Reject):
        return found
    if found.cap is not None or found.terms or found.hidden or found.least is not None:
        return Reject("tanh is taken of scores that were masked, biased or capped already", node)
    return replace(found, cap=1.0)


def _filled(node: Node, axes: Axes, keys: Group, depth: int) -> Found:
    """where(mask, scores, number), or where(mask, number, scores)."""
    condition, x, y = node.operands
    for v, other, negated in ((x, y, False), (y, x, True)):
        fill = number(other)
        if not _full(v, node):
            continue
        found = read(v, axes, keys, depth)
        if isinstance(found, Reject):
            if found.reason:
                return found
            continue
        if fill is None:
            return Reject("masked scores are taken from another tensor, not set to one number", node)
        hidden = Fill(Placed(condition, aligned(condition.shape, axes)), negated, fill)
        return replace(found, hidden=(hidden, *found.hidden))
    return NOT_THIS


def _clamped(node: Node, axes: Axes, keys: Group, depth: int) -> Found:
    least = number(node.operands[1])
    found = read(node.operands[0], axes, keys, depth)
    if isinstance(found, Reject):
        return found
    if least is None or found.least is not None:
        return Reject("the scores are clamped from below by a tensor", node)
    return replace(found, least=least)


_READERS = {
    "matmul": _product, "mul": _scaled, "div": _scaled, "neg": _negated, "add": _added, "sub": _added, "tanh": _capped, "where": _filled,
    "maximum": _clamped,
}  # fmt: skip

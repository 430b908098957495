"""Reading an attention: weights times values, the weights a softmax over keys of scores; and the space in which all of it lies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

from graphopt.ir import Node, Value
from graphopt.passes.attention.axes import Axes, Group, Placed, aligned, apart, flat, fresh, same, up, within
from graphopt.passes.attention.dropout import read_dropout
from graphopt.passes.attention.scores import Scores, read
from graphopt.passes.recompose.spelling import number, reduction
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Reject


@dataclass(frozen=True)
class Reading:
    """An attention as it was found.

    Attributes:
        scores: what softmax is taken of, read; its ``q`` and ``k``, and ``values``, below no views.
        lead: batch and head axes, the heads last; rows, keys, out: the other axes of the space. ``result``: axes of the root.
        sinks: one score more for each row, whose value is zero.
        empty: what a row gives whose scores are all -inf, where the spelling says it.
        dropout: the rate at which weights are dropped.
    """

    scores: Scores
    values: Placed
    lead: tuple[Group, ...]
    rows: Group
    keys: Group
    out: Group
    result: Axes
    sinks: Placed | None
    empty: str | None
    dropout: float = 0.0


@dataclass(frozen=True)
class _Weights:
    """Softmax, and what came between it and the product with the values."""

    softmax: Node
    axes: Axes  # of softmax's result; where there are sinks, the keys do not count theirs
    sinks: bool
    empty: str | None
    dropout: float
    through: tuple[Value, ...]


def attention_of(root: Node, dropout: bool = False) -> Reading | Reject:
    """Read a matmul as an attention; a Reject without reason if it is no product with a softmax.

    Args:
        dropout: read that of weights, too.
    """
    refused = NOT_THIS
    for side in (0, 1):
        if _leads_to_softmax(root.operands[side]):
            found = _read_side(root, side, dropout)
            if isinstance(found, Reading) or found.reason:
                return found
            refused = found
    return refused


def _leads_to_softmax(v: Value, depth: int = 0) -> bool:
    """Whether a softmax is not far above, by ops that weights may go through, or are wrongly put through."""
    node = v.producer
    if node is None or depth > 8:
        return False
    if node.name == "softmax":
        return True
    if node.name not in ("reshape", "transpose", "broadcast_to", "cast", "slice", "where", "mul", "add", "div", "sub"):
        return False
    return any(_leads_to_softmax(x, depth + 1) for x in node.operands)


def _read_side(root: Node, side: int, dropout: bool) -> Reading | Reject:
    w, other = root.operands[side], root.operands[1 - side]
    if w.type.rank < 2 or other.type.rank < 2 or any(d == 0 for d in (*w.shape, *other.shape)):
        return NOT_THIS
    result = fresh(root.result.shape)
    batch, first, second = result[:-2], result[-2], result[-1]
    (inner,) = fresh((w.shape[-1] if side == 0 else w.shape[-2],))
    lines = ((first, inner), (inner, second))
    places = [Placed(x, (*aligned(x.shape[:-2], batch), *ends)) for x, ends in zip(root.operands, lines, strict=True)]
    weights = _weights(places[side], inner, dropout)
    if isinstance(weights, Reject):
        return weights
    out = second if side == 0 else first
    return _put_together(root, weights, places[1 - side].above(), inner, out, result)


# --- the weights -------------------------------------------------------------------------------------------------------


def _weights(p: Placed, keys: Group, dropout: bool) -> _Weights | Reject:
    """Walk up from the product with the values to the softmax."""
    v, axes, through = p.value, p.axes, [p.value]
    sinks, empty, rate = False, None, 0.0
    while (node := v.producer) is not None and node.name != "softmax":
        if (step := up(v, axes)) is not None:
            v, axes = step
        elif node.name == "cast" and node.operands[0].dtype.is_float:
            v = node.operands[0]
        elif node.name == "where" and (inner := _nan_to_zero(node)) is not None:
            v, empty = inner[0], "zero"
            through += inner[1:]
        elif node.name == "slice" and not sinks and _drops_one(node, axes, keys):
            v, sinks = node.operands[0], True
        elif dropout and not rate and (drop := read_dropout(v)) is not None:
            v, rate = drop.source, drop.rate
            through += drop.through
        else:
            return _after_softmax(node)
        through.append(v)
    if node is None:
        return NOT_THIS
    axis = node.attrs["axis"] % len(axes)
    if not same(axes[axis], keys) or (not flat(keys) and v.shape[axis] != 1):
        return Reject("softmax is not over the axis that the product with the values sums", node)
    return _Weights(node, axes, sinks, empty, rate, tuple(through))


def _after_softmax(node: Node) -> Reject:
    """Why weights that went through another op are not an attention's."""
    if node.name in ("mul", "div") and any(number(x) is not None for x in node.operands):
        return Reject("the weights are scaled after softmax: that belongs to the values, not to the scores", node)
    if node.name in ("mul", "div", "add", "sub", "where"):
        return Reject("the weights are changed after softmax (a mask or dropout there is another function)", node)
    return Reject(f"{node.name} stands between softmax and the product with the values", node)


def _nan_to_zero(node: Node) -> tuple[Value, ...] | None:
    """(weights, the values of the test) of where(isnan(w), 0, w), or where(all(s == -inf), 0, softmax(s))."""
    condition, x, w = node.operands
    if number(x) != 0:
        return None
    test = condition.producer
    if test is not None and test.name == "isnan" and test.operands[0] is w:
        return w, condition
    rows = reduction(condition, "all")
    equal = rows.operands[0].defined_by("eq") if rows is not None else None
    softmax = w.defined_by("softmax")
    if rows is None or equal is None or softmax is None or number(equal.operands[1]) != float("-inf"):
        return None
    fits = equal.operands[0] is softmax.operands[0] and tuple(rows.attrs["axes"]) == (softmax.attrs["axis"],)
    return (w, condition, rows.results[0], equal.results[0]) if fits else None


def _drops_one(node: Node, axes: Axes, keys: Group) -> bool:
    """Whether a slice leaves the last column out, that of the sinks."""
    x, axis = node.operands[0], node.attrs["axis"] % len(axes)
    whole = x.shape[axis]
    return same(axes[axis], keys) and node.attrs["start"] == 0 and node.attrs["step"] == 1 and node.attrs["stop"] == whole - 1


# --- all of it ---------------------------------------------------------------------------------------------------------


def _put_together(root: Node, weights: _Weights, values: Placed, keys: Group, out: Group, result: Axes) -> Reading | Reject:
    s, axes, through, sinks = weights.softmax.operands[0], weights.axes, list(weights.through), None
    through.append(weights.softmax.results[0])
    if weights.sinks:
        found = _with_sinks(s, axes, keys)
        if isinstance(found, Reject):
            return found
        s, sinks, passed = found
        through += passed
    scores = read(s, axes, keys)
    if isinstance(scores, Reject):
        made = s.producer.name if s.producer is not None else "an input"
        return scores if scores.reason else Reject(f"softmax is taken of {made}, in which no product of queries and keys is found", s)
    outside = _used_elsewhere([*through, *scores.through], root)
    if outside is not None:
        return outside
    scores = replace(scores, q=scores.q.above(), k=scores.k.above())
    return _in_space(Reading(scores, values, (), (), keys, out, result, sinks, weights.empty, weights.dropout), axes, weights.softmax)


def _in_space(r: Reading, axes: Axes, softmax: Node) -> Reading | Reject:
    """Find the rows among softmax's axes; the others are batch and heads."""
    s = r.scores
    others = [g for i, g in enumerate(axes) if i != softmax.attrs["axis"] % len(axes)]
    only_queries = [g for g in others if apart(g, s.k.atoms) and apart(g, r.values.atoms)]
    of_product = [g for g in only_queries if g and any(same(g, x) for x in s.q.axes)]
    rows = (of_product or only_queries or [()])[-1]
    lead = tuple(g for g in others if g is not rows)
    batch = tuple(chain.from_iterable(lead))
    for name, p, own in (
        ("queries", s.q, (*rows, *s.inner)), ("keys", s.k, (*r.keys, *s.inner)), ("values", r.values, (*r.keys, *r.out))
    ):  # fmt: skip
        if not within(p.atoms, (*batch, *own)):
            return Reject(f"the {name} have an axis that is none of an attention's", p.value)
    if not within(r.keys, r.values.atoms) or not within(r.keys, s.k.atoms):
        return Reject("keys or values are the same at all positions", r.values.value)
    if not apart(r.out, flat(batch)) or not within(tuple(chain.from_iterable(r.result)), (*batch, *rows, *r.out)):
        return Reject("the values have an axis that the scores have not", r.values.value)
    return replace(r, lead=lead, rows=rows)


def _with_sinks(s: Value, axes: Axes, keys: Group) -> tuple[Value, Placed, list[Value]] | Reject:
    """(scores, sinks, values on the way) of concat(scores, sinks) along the keys."""
    passed = [s]
    while (node := s.producer) is not None and node.name in ("cast", "sub"):
        if node.name == "sub":
            most = reduction(node.operands[1], "max")
            if most is None or most.operands[0] is not node.operands[0]:
                break
            passed.append(most.results[0])
        s = node.operands[0]
        passed.append(s)
    axis = next(i for i, g in enumerate(axes) if same(g, keys))
    if node is None or node.name != "concat" or len(node.operands) != 2 or node.attrs["axis"] % len(axes) != axis:
        return Reject("the last column of the weights is dropped, and it is no sink put beside the scores", node or s)
    scores, column = node.operands
    if column.shape[axis] != 1:
        return Reject("more than one column stands beside the scores", node)
    return scores, Placed(column, aligned(column.shape, axes)).above(), passed


def _used_elsewhere(through: list[Value], root: Node) -> Reject | None:
    """Scores and weights that are read by others, too, are needed as they are."""
    inside = {v.producer for v in through} | {root}  # membership only
    for v in through:
        for user in v.users:
            if user not in inside and not _is_test(user, inside):
                return Reject("scores or weights are read elsewhere, too, and must be kept", user if user is not user.graph.ret else v)
    return None


def _is_test(user: Node, inside: set[Node | None]) -> bool:
    """A view or conversion of which only the attention itself makes use."""
    if user.name not in ("reshape", "broadcast_to") or not user.results:
        return False
    return all(u in inside for u in user.results[0].users)

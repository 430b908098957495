"""Putting an attention in the place of what was read: operands laid out ``[batch, heads, length, size]``, and the result as it was."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir import DType, Value
from graphopt.ir.types import b1
from graphopt.passes.attention.axes import Axes, Group, Placed, arrange, flat, size
from graphopt.passes.attention.dropout import drawn_seed
from graphopt.passes.attention.masks import Sorted
from graphopt.passes.attention.reading import Reading
from graphopt.passes.attention.scores import Term
from graphopt.rewrite import Rewriter


@dataclass(frozen=True)
class _Layout:
    """The axes of batch and heads, heads last."""

    lead: tuple[Group, ...]
    reading: Reading

    def of(self, *last: Group) -> Axes:
        return (*self.lead, *last)

    def shared(self, p: Placed, *last: Group) -> Axes:
        """The axes of keys or values, with the heads that they have."""
        return (*self.lead[:-1], tuple(a for a in flat(self.lead[-1]) if a in p.atoms), *last)


def leading(lead: tuple[Group, ...], members: tuple[Placed, ...], shared: tuple[Placed, ...]) -> tuple[Group, ...]:
    """Two axes, batch and heads, of all leading atoms; more where an operand has some of a group only.

    Args:
        members: all operands.
        shared: keys and values, which may have the outer atoms of the heads alone: several heads of queries share one then.
    """

    def uniform(group: Group) -> bool:
        return all(set(flat(group)) <= set(p.atoms) or not set(flat(group)) & set(p.atoms) for p in members)

    def grouped(group: Group) -> bool:
        others = [p for p in members if p not in shared]
        whole = all(set(flat(group)) <= set(p.atoms) or not set(flat(group)) & set(p.atoms) for p in others)
        return whole and all(isinstance(a.size, int) for a in flat(group)) and all(_outer(flat(group), p) for p in shared)

    groups: list[Group] = []
    for i, g in enumerate(lead):
        fits = uniform(g) or (i == len(lead) - 1 and grouped(g))
        groups += [g] if fits else [(a,) for a in flat(g)]
    while len(groups) > 2:
        last = (*groups[-2], *groups[-1])
        if not uniform(last) and grouped(last):
            groups[-2:] = [last]
        elif uniform((*groups[0], *groups[1])):
            groups[:2] = [(*groups[0], *groups[1])]
        else:
            break
    return (*[()] * (2 - len(groups)), *groups)


def _outer(group: Group, p: Placed) -> bool:
    """Whether a value has the outer atoms of a group, or all, or none."""
    has = [a in p.atoms for a in group]
    return has == sorted(has, reverse=True)


def build(rw: Rewriter, r: Reading, s: Sorted, attrs: dict[str, object], dtype: DType) -> Value:
    """The attention, in the axes and dtype of the root's result.

    Args:
        attrs: of the op, but for what is told by the operands.
        dtype: to compute in: the widest of the operands.
    """
    q, k, v = r.scores.q, r.scores.k, r.values
    sides = [t.at for t in s.biases] + [o for t in s.biases for o in t.others] + [m for m, _ in s.masks]
    sides += [f for f, _ in (*r.scores.rows_by, *r.scores.keys_by)]
    lead = leading(r.lead, (q, k, v, *sides), (k, v))
    at = _Layout(lead, r)
    queries = _factors(rw, _cast(rw, arrange(rw, q, at.of(r.rows, r.scores.inner)), dtype), r.scores.rows_by, at.of(r.rows, ()), dtype)
    heads = lead[-1]
    of_keys = at.shared(k, r.keys, r.scores.inner)
    if any(not set(p.atoms) <= {*k.atoms, *flat(r.keys)} for p, _ in r.scores.keys_by):  # each head has keys of its own then
        of_keys = at.of(r.keys, r.scores.inner)
        k = Placed(_spread(rw, k, of_keys), of_keys)
    keys = _factors(rw, _cast(rw, arrange(rw, k, of_keys), dtype), r.scores.keys_by, (*of_keys[:-1], ()), dtype)
    values = _cast(rw, arrange(rw, v, at.shared(v, r.keys, r.out)), dtype)
    queries = _as_wide(rw, queries, keys, values, at)
    operands = [queries, keys, values]
    scores = at.of(r.rows, r.keys)
    if s.biases:
        operands.append(_bias(rw, s.biases, scores, dtype))
    if s.masks:
        operands.append(_mask(rw, s.masks, scores))
    if s.slopes is not None:
        slopes = _by_head(rw, s.slopes.at, heads, dtype)
        operands.append(slopes if s.slopes.factor == 1 else rw.mul(slopes, s.slopes.factor))
    if r.sinks is not None:
        operands.append(_by_head(rw, r.sinks, heads, dtype))
    if r.dropout:
        operands.append(drawn_seed(rw))
    result = rw.attention(*operands, **attrs, dropout=r.dropout, alibi=s.slopes is not None, sinks=r.sinks is not None, empty=s.empty)
    return arrange(rw, Placed(result, at.of(r.rows, r.out)), r.result)


def _cast(rw: Rewriter, v: Value, dtype: DType) -> Value:
    return rw.cast(v, dtype)


def _factors(rw: Rewriter, v: Value, factors: tuple[tuple[Placed, bool], ...], axes: Axes, dtype: DType) -> Value:
    for f, divide in factors:
        factor = rw.cast(arrange(rw, f, axes), dtype)
        v = rw.div(v, factor) if divide else rw.mul(v, factor)
    return v


def _spread(rw: Rewriter, k: Placed, axes: Axes) -> Value:
    return rw.broadcast_to(arrange(rw, k, axes), shape=tuple(size(g) for g in axes))  # type: ignore[no-any-return]


def _as_wide(rw: Rewriter, q: Value, k: Value, v: Value, at: _Layout) -> Value:
    """Queries with the batch and head axes that only masks or biases have."""
    wide = list(q.shape)
    for i, group in enumerate(at.lead):
        if all(x.shape[i] == 1 for x in (q, k, v)):
            wide[i] = size(group)
    return rw.broadcast_to(q, shape=tuple(wide))  # type: ignore[no-any-return]


def _bias(rw: Rewriter, terms: list[Term], scores: Axes, dtype: DType) -> Value:
    """The sum of the terms, the smaller ones first."""
    values = []
    for t in terms:
        v = rw.cast(arrange(rw, t.at, scores), dtype)
        for other in t.others:
            v = rw.mul(v, rw.cast(arrange(rw, other, scores), dtype))
        values.append(v if t.factor == 1 else rw.mul(v, t.factor))
    values.sort(key=lambda v: sum(d != 1 for d in v.shape))
    total = values[0]
    for v in values[1:]:
        total = rw.add(total, v)
    return total


def _mask(rw: Rewriter, masks: list[tuple[Placed, bool]], scores: Axes) -> Value:
    """Truth values, true where all of the masks let a key be seen."""
    values = []
    for p, negated in masks:
        v = arrange(rw, p, scores)
        if v.dtype != b1:
            v = rw.eq(v, 0) if negated else rw.ne(v, 0)
        elif negated:
            v = rw.logical_not(v)
        values.append(v)
    values.sort(key=lambda v: sum(d != 1 for d in v.shape))
    total = values[0]
    for v in values[1:]:
        total = rw.logical_and(total, v)
    return total


def _by_head(rw: Rewriter, p: Placed, heads: Group, dtype: DType) -> Value:
    """One number a head: ``[H]``."""
    v = rw.cast(arrange(rw, p, (heads,)), dtype)
    return rw.broadcast_to(v, shape=(size(heads),))  # type: ignore[no-any-return]

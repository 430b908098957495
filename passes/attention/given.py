"""attention(q, k, v, bias)  =>  attention(q, k, v) {causal, window, ...}, and keys and values as they were before they were repeated

Why: models that call scaled_dot_product_attention give masks as tensors, and often repeat keys for the heads that share them; so does
what was found by its spelling, when its mask only shows once other passes ran.
When: as in :mod:`graphopt.passes.attention.recognise`; declined with the reason for which a mask stays a bias.
Numerics: the same sums.
Reference: Ainslie et al., GQA, arXiv:2305.13245.
"""

from __future__ import annotations

from graphopt.ir import Node, Value
from graphopt.ir.opset.attention import DEFAULTS, groups, parts
from graphopt.passes.attention.axes import Placed, aligned, flat, fresh, size, up
from graphopt.passes.attention.build import build
from graphopt.passes.attention.masks import Sorted, sort
from graphopt.passes.attention.predicates import Band
from graphopt.passes.attention.reading import Reading
from graphopt.passes.attention.scores import Scores, Term, affine_zero
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, op_in


class GivenAttention(Rule):
    """attention(q, repeat(k), repeat(v), mask) => attention(q, k, v) {causal, window}"""

    pattern = op_in(("attention",))
    numerics = Numerics.REASSOCIATES

    @staticmethod
    def find(m: Match) -> tuple[Reading, Sorted] | Reject:
        node, symbols = m.root, m.root.graph.symbols
        p, attrs = parts(node.operands, node.attrs), node.attrs
        others = (p.mask, p.slopes, p.sinks, p.seed)
        if any(x is not None for x in others) or any(x.type.rank < 3 for x in (p.q, p.k, p.v)):
            return NOT_THIS
        if groups(p.q.shape, p.k.shape) > 1 or groups(p.q.shape, p.v.shape) > 1 or any(d == 0 for x in node.operands for d in x.shape):
            return NOT_THIS
        reading = _reading(node, p.q, p.k, p.v, p.bias)
        if attrs["causal"] or attrs["window"] is not None:
            found: Sorted | Reject = Sorted(Band(), [], list(reading.scores.terms), None, attrs["empty"])
        else:
            found = sort(reading, symbols)
        if isinstance(found, Reject):
            return found
        better = not found.band.is_all or found.masks or found.slopes is not None or len(found.biases) < _summands(p.bias)
        if better or _repeated(reading, p.k, p.v):
            return reading, found
        return found.notes[0] if found.notes else NOT_THIS

    def check(self, m: Match) -> Reject | None:
        found = self.find(m)
        return found if isinstance(found, Reject) else None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        found = self.find(m)
        assert not isinstance(found, Reject)
        reading, masks = found
        attrs = {n: m.root.attrs[n] for n in ("scale", "softcap")}
        kept = {n: m.root.attrs[n] for n in ("causal", "offset", "window") if m.root.attrs[n] != DEFAULTS[n]}
        attrs |= kept or masks.band.attrs(size(reading.keys), m.root.graph.symbols) or {}
        return build(rw, reading, masks, attrs, m.root.result.dtype)


def _reading(node: Node, q: Value, k: Value, v: Value, bias: Value | None) -> Reading:
    """The node's operands in the space of its result."""
    result, (keys, inner) = fresh(node.result.shape), fresh((k.shape[-2], k.shape[-1]))
    lead, rows, out = result[:-2], result[-2], result[-1]
    placed = [Placed(x, (*aligned(x.shape[:-2], lead), *last)).above() for x, last in (
        (q, (rows, inner)), (k, (keys, inner)), (v, (keys, out)),
    )]  # fmt: skip
    terms = _terms(Placed(bias, aligned(bias.shape, (*lead, rows, keys)))) if bias is not None else []
    scores = Scores(placed[0], placed[1], inner, node, float(node.attrs["scale"]), node.attrs["softcap"], terms=tuple(terms))
    return Reading(scores, placed[2], lead, rows, keys, out, result, None, node.attrs["empty"])


def _terms(p: Placed) -> list[Term]:
    """The summands of a bias."""
    v, axes = p.value, p.axes
    while (step := up(v, axes)) is not None:
        v, axes = step
    node = v.defined_by("add")
    if affine_zero(v):
        return []
    if node is None:
        return [Term(p)]
    return [t for x in node.operands for t in _terms(Placed(x, aligned(x.shape, axes)))]


def _summands(bias: Value | None) -> int:
    """How many summands a bias has, zeros counted."""
    if bias is None:
        return 0
    node = bias.defined_by("add")
    return sum(map(_summands, node.operands)) if node is not None else 1


def _repeated(r: Reading, k: Value, v: Value) -> bool:
    """Whether keys and values were made of fewer heads than they have."""
    heads = flat(r.lead[-1])
    return any(x.shape[-3] != 1 and not set(heads) <= set(p.atoms) for x, p in ((k, r.scores.k), (v, r.values)))

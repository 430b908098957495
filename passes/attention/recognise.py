"""softmax over keys of (scale * q k^T, capped, biased, masked) times v  =>  attention(q, k, v, ...)

Why: one kernel that never holds the M x N scores, in the place of two products, a softmax and whatever masks are made of. Keys that are
repeated for the heads that share them are read once, and a causal mask or a window is never materialised.
When: softmax is over the axis that the product with v sums, and what it is taken of is, through scales, casts and views in any order,
a product of q and k that is used for nothing else. A mask that hides keys is read as a predicate: comparisons of positions, or a
constant that is computed at compile time, are proven to be a band of j - i; other masks of truth values stay masks. A number hides a
key from -1e9 on (in f16, -6e4): less is a bias like any other. What a row gives that sees no key is kept (NaN, zero, or the mean);
where that cannot be, the mask stays a bias. A constant along a row falls out of a softmax: so ALiBi's slopes are found.
Dropout of weights is read in front of autograd alone, where it is by a number drawn for each weight, scaled by what is kept.
Numerics: the same function; sums in another order, and in halves fewer roundings.
Reference: Dao et al., FlashAttention, arXiv:2205.14135; Press et al., ALiBi, arXiv:2108.12409; Ainslie et al., GQA, arXiv:2305.13245.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir import DType, Value
from graphopt.pass_manager import RewritePass
from graphopt.passes.attention.axes import flat, size
from graphopt.passes.attention.build import build, leading
from graphopt.passes.attention.cached import CachedIntegers
from graphopt.passes.attention.given import GivenAttention
from graphopt.passes.attention.masks import Sorted, sort
from graphopt.passes.attention.packed import PackedCache
from graphopt.passes.attention.reading import Reading, attention_of
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, pat, value

w, v = value("w"), value("v")


class Attention(Rule):
    """softmax(scale * q k^T + bias) v => attention(q, k, v, ...)"""

    pattern = pat.matmul(w, v)
    numerics = Numerics.REASSOCIATES

    def __init__(self, dropout: bool = False) -> None:
        self.dropout = dropout

    def find(self, m: Match) -> tuple[Reading, Sorted] | Reject:
        found = attention_of(m.root, self.dropout)
        if isinstance(found, Reject):
            return found
        dtype = _dtype(found)
        if isinstance(dtype, Reject):
            return dtype
        masks = sort(found, m.root.graph.symbols)
        if isinstance(masks, Reject):
            return masks
        return _check_heads(found, masks) or (found, masks)

    def check(self, m: Match) -> Reject | None:
        found = self.find(m)
        return found if isinstance(found, Reject) else None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        found = self.find(m)
        assert not isinstance(found, Reject)
        reading, masks = found
        band = masks.band.attrs(size(reading.keys), m.root.graph.symbols) or {}
        s, dtype = reading.scores, _dtype(reading)
        assert isinstance(dtype, DType)
        attrs = {"scale": float(s.scale), "softcap": None if s.cap is None else float(s.cap), **band}
        return rw.cast(build(rw, reading, masks, attrs, dtype), m.root.result.dtype)


def _dtype(r: Reading) -> DType | Reject:
    """What to compute in: the widest of the products' operands and the biases, lest one is rounded that was not."""
    kinds = [p.value.dtype for p in (r.scores.q, r.scores.k, r.values)]
    kinds += [t.at.value.dtype for t in r.scores.terms if t.at.value.dtype.is_float]
    wide = max(kinds, key=lambda d: d.bits)
    if {d.name for d in kinds} >= {"f16", "bf16"} or not all(d.is_float and d.bits >= 16 for d in kinds):
        return Reject(f"operands of dtypes {', '.join(d.name for d in kinds)}", r.values.value)
    return wide


def _check_heads(r: Reading, masks: Sorted) -> Reject | None:
    """Slopes and sinks are one number a head."""
    sides = (r.scores.q, r.scores.k, r.values)
    heads = leading(r.lead, sides, sides[1:])[-1]
    for name, p in (("sinks", r.sinks), ("slopes", masks.slopes.at if masks.slopes is not None else None)):
        if p is not None and not set(p.atoms) <= set(flat(heads)):
            return Reject(f"the {name} differ by more than the head", p.value)
    return None


class RecogniseAttention(RewritePass):
    """Find attention in its primitive spellings. See the module's header.

    Args:
        dropout: that of weights, too, in the place of which other numbers are drawn: where gradients are wanted.
    """

    name = "recognise-attention"
    dropout: bool = False

    def rules(self) -> Sequence[Rule]:
        return [Attention(self.dropout), GivenAttention(), PackedCache(), CachedIntegers()]

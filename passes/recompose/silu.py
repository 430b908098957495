"""x * sigmoid(x)  =>  silu(x), with sigmoid also written 1 / (1 + exp(-x))

Why: a name that the fusion's epilogues and the backends know, and one vectorised sigmoid instead of four operations.
When: the gate is the sigmoid of x itself and has no other use. x * sigmoid(1.702 x) is another function: it stays.
Numerics: the same formula; exp(-x) may overflow to inf in the long spelling, which gives the same 0.
Reference: Elfwing, Uchibe, Doya, Sigmoid-Weighted Linear Units, arXiv:1702.03118.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir import Value
from graphopt.pass_manager import RewritePass
from graphopt.passes.recompose.spelling import powers_of
from graphopt.passes.shared import NOT_THIS, shaped
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, pat, value

x, y = value("x"), value("y")
ONE_PLUS_EXP = pat.add(pat.exp(pat.neg(y)), 1.0)


class SigmoidOfExp(Rule):
    """1 / (1 + exp(-x)) => sigmoid(x)"""

    pattern = pat.reciprocal(ONE_PLUS_EXP)
    numerics = Numerics.APPROXIMATE
    near = 3

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return shaped(rw, rw.sigmoid(m[y]), m)


class QuotientOfExp(Rule):
    """1 / (1 + exp(-x)) => sigmoid(x); x / (1 + exp(-y)) => x * sigmoid(y)"""

    pattern = pat.div(x, ONE_PLUS_EXP)
    numerics = Numerics.APPROXIMATE
    near = 3

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return shaped(rw, rw.mul(m[x], rw.sigmoid(m[y])), m)


class Silu(Rule):
    """x * sigmoid(x) => silu(x)"""

    pattern = pat.mul(x, pat.sigmoid(y).once())
    numerics = Numerics.APPROXIMATE

    def check(self, m: Match) -> Reject | None:
        if not m[x].dtype.is_float:
            return NOT_THIS
        if m[x] is m[y]:
            return None
        linear = powers_of(m[y], m[x])
        if linear is not None and linear[1] == 1:
            return Reject(f"the gate is the sigmoid of {linear[0]:.6g} x, not of x", m[y])
        return NOT_THIS  # a gate of another tensor: nothing to find here

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.silu(m[x])  # type: ignore[no-any-return]


class RecomposeSilu(RewritePass):
    """Find SiLU and the sigmoid in their primitive spellings."""

    name = "recompose-silu"

    def rules(self) -> Sequence[Rule]:
        return [SigmoidOfExp(), QuotientOfExp(), Silu()]

"""x / sqrt(mean x^2 + eps) * w  =>  rms_norm(x, w)

Why: one kernel that reads x once, instead of a reduction and four passes over memory.
When: the mean is over trailing axes and of the squares of the very x that is scaled; eps is added to the mean, not to its
root. A weight is taken in where it is a vector over the normalized axes. Casts stay: Llama's f16 models normalize in f32,
convert back and only then multiply by the weight, and so they do afterwards.
Numerics: the same sums, perhaps in another order.
Reference: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir import Value
from graphopt.pass_manager import RewritePass
from graphopt.passes.recompose.layer_norm import Norm, centred, complete, eps_outside, split_root
from graphopt.passes.recompose.spelling import as_row, check_row, mean_of, number, plus_constant, product, square_of
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, op_in, pat, value


class RmsNorm(Rule):
    """x / sqrt(mean x^2 + eps) [* w] => rms_norm(x[, w])"""

    pattern = op_in(("mul", "div"), value("a"), value("b"))
    numerics = Numerics.APPROXIMATE

    @staticmethod
    def find(m: Match) -> Norm | Reject:
        read = product(m.root.results[0])
        if eps_outside(read):
            return Reject("eps is added to the root of the mean square, not to the mean square", m.root)
        split = split_root(read)
        if split is None:
            return NOT_THIS
        under, rest = split
        square, eps = plus_constant(under) or (under, 0.0)
        mean = mean_of(square)
        x = square_of(mean[0]) if mean is not None else None
        if mean is None or x is None:
            return NOT_THIS
        if not any(f is x for f in rest):
            return Reject("the mean square is of another tensor than the one that is scaled", mean[0])
        if centred(x) is not None:
            return Reject("x - mean(x) is normalized: this is a layer norm", x)
        rest.remove(x)
        return complete(m, x, mean[1], eps, rest)

    def check(self, m: Match) -> Reject | None:
        found = self.find(m)
        return found if isinstance(found, Reject) else None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        found = self.find(m)
        assert isinstance(found, Norm)
        scale = [as_row(rw, found.scale, found.axes)] if found.scale is not None else []
        return rw.rms_norm(found.x, *scale, axes=found.axes, eps=found.eps)  # type: ignore[no-any-return]


class RmsNormScale(Rule):
    """rms_norm(x) * w => rms_norm(x, w)"""

    pattern = pat.mul(pat.rms_norm(value("x")).once().named("norm"), value("w"))
    numerics = Numerics.REASSOCIATES

    def check(self, m: Match) -> Reject | None:
        return NOT_THIS if number(m["w"]) is not None else check_row(m["w"], m["norm"], m["norm"].producer.attrs["axes"])

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        attrs = m["norm"].producer.attrs
        return rw.rms_norm(m["x"], as_row(rw, m["w"], attrs["axes"]), **attrs)  # type: ignore[no-any-return]


class RecomposeRmsNorm(RewritePass):
    """Find RMS norms in their primitive spellings."""

    name = "recompose-rms-norm"

    def rules(self) -> Sequence[Rule]:
        return [RmsNorm(), RmsNormScale()]

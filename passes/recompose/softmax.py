"""exp(x - max x) / sum exp(x - max x)  =>  softmax(x), and  (x - max x) - log sum exp(x - max x)  =>  log_softmax(x)

Why: one kernel that reads x once, instead of two reductions and three passes over memory; and attention is found by it.
When: maximum and sum are over the same single axis and the exponential is of x less its own maximum. Without the maximum
taken off it is another function where exp overflows: declined, with a remark.
Numerics: the same sums, perhaps in another order; log(softmax(x)) becomes log_softmax(x), which is the more exact.
Reference: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir import Value
from graphopt.pass_manager import RewritePass
from graphopt.passes.recompose.spelling import axes_of, reduction
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, attr, op_in, pat, value

e, s, x = value("e"), value("s"), value("x")

Found = tuple[Value, int] | Reject  # the operand and the axis, or why not


def shifted(v: Value, axis: int) -> Value | Reject:
    """x if the value is x - max(x) along the axis."""
    node = v.defined_by("sub")
    most = reduction(node.operands[1], "max") if node is not None else None
    if node is None or most is None or most.operands[0] is not node.operands[0]:
        return Reject("exp overflows where softmax does not: the maximum of x itself is not taken off first", v)
    if axes_of(most) != (axis,):
        return Reject(f"the maximum is over the axes {axes_of(most)}, the sum over {(axis,)}", most)
    return node.operands[0]


def summed(total: Value, terms: Value) -> int | Reject:
    """The axis if the first value is the sum of the second along one axis."""
    node = reduction(total, "sum")
    if node is None:
        return NOT_THIS
    if node.operands[0] is not terms:
        return Reject("numerator and sum are not of the same exponentials", node)
    axes = axes_of(node)
    return axes[0] if len(axes) == 1 else Reject(f"the sum is over {len(axes)} axes; softmax has one", node)


def both(total: Value, terms: Value, exponent: Value) -> Found:
    axis = summed(total, terms)
    if isinstance(axis, Reject):
        return axis
    found = shifted(exponent, axis)
    return found if isinstance(found, Reject) else (found, axis)


class Softmax(Rule):
    """exp(x - max x) / sum exp(x - max x) => softmax(x)"""

    pattern = op_in(("div", "mul"), e, s)
    numerics = Numerics.REASSOCIATES

    @staticmethod
    def find(m: Match) -> Found:
        exp, total = m[e].defined_by("exp"), m[s]
        if exp is None:
            return NOT_THIS
        if m.root.name == "mul":
            inverse = total.defined_by("reciprocal")
            if inverse is None:
                return NOT_THIS
            total = inverse.operands[0]
        return both(total, m[e], exp.operands[0])

    def check(self, m: Match) -> Reject | None:
        found = self.find(m)
        return found if isinstance(found, Reject) else None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        found = self.find(m)
        assert not isinstance(found, Reject)
        return rw.softmax(found[0], axis=found[1])  # type: ignore[no-any-return]


class LogSoftmax(Rule):
    """(x - max x) - log sum exp(x - max x) => log_softmax(x); also x - (log sum exp(x - max x) + max x)"""

    pattern = pat.sub(x, value("log"))
    numerics = Numerics.REASSOCIATES

    @staticmethod
    def find(m: Match) -> Found:
        log, whole = m["log"].defined_by("log"), False
        if log is None and (plus := m["log"].defined_by("add")) is not None:
            log = plus.operands[0].defined_by("log") or plus.operands[1].defined_by("log")
            whole = True
        node = reduction(log.operands[0], "sum") if log is not None else None
        exp = node.operands[0].defined_by("exp") if node is not None else None
        if log is None or node is None or exp is None:
            return NOT_THIS
        found = both(log.operands[0], exp.results[0], exp.operands[0])
        if isinstance(found, Reject):
            return found
        if not whole:
            return found if exp.operands[0] is m[x] else Reject("the sum is of other exponentials", exp)
        maximum = exp.operands[0].producer.operands[1]  # type: ignore[union-attr]
        fits = found[0] is m[x] and maximum in m["log"].producer.operands
        return found if fits else Reject("not the maximum that was taken off is put back", m["log"])

    def check(self, m: Match) -> Reject | None:
        found = self.find(m)
        return found if isinstance(found, Reject) else None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        found = self.find(m)
        assert not isinstance(found, Reject)
        return rw.log_softmax(found[0], axis=found[1])  # type: ignore[no-any-return]


class LogOfSoftmax(Rule):
    """log(softmax(x)) => log_softmax(x)"""

    pattern = pat.log(pat.softmax(x, axis=attr("axis")).once())
    numerics = Numerics.APPROXIMATE

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.log_softmax(m[x], axis=m["axis"])  # type: ignore[no-any-return]


class RecomposeSoftmax(RewritePass):
    """Find softmax and log_softmax in their primitive spellings."""

    name = "recompose-softmax"

    def rules(self) -> Sequence[Rule]:
        return [Softmax(), LogSoftmax(), LogOfSoftmax()]

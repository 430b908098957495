"""x * 1 => x, max(x, x) => x, (x + c) + d => x + (c + d): identities of arithmetic and logic

Why: an operation less in a kernel, and often a whole launch.
When: exactly. For floats x * 0 is not 0 (nan, inf, -0.0), x - x is not 0 (nan, inf), and x + 0.0 is not x for x = -0.0,
while x + (-0.0) is; each such rule says for which dtypes it holds, or declines. Constants are collected, and factors put
outside the brackets, only when the inner results have no other use.
Numerics: bitwise, but for the last three rules, which round differently.
Reference: IEEE 754-2019, section 6.3 (the sign of zero); Goldberg, What Every Computer Scientist Should Know About
Floating-Point Arithmetic, 1991.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graphopt.ir import OPS, Trait, Value
from graphopt.pass_manager import RewritePass
from graphopt.passes.shared import NOT_THIS, is_negative_zero, is_scalar, rounded, same_shape, shaped
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, const, op_in, pat, scalar_of, value

x, y, c, d = value("x"), value("y"), const("c"), const("d")
NEVER_MINUS_ZERO = ("abs", "exp", "exp2", "sigmoid", "softmax", "cosh", "iota")


class AddZero(Rule):
    """x + 0 => x"""

    pattern = pat.add(x, c)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        if m[c] != 0 or m[x].dtype.is_complex:
            return NOT_THIS
        if not m[x].dtype.is_float or is_negative_zero(m[c]) or m[x].defined_by(*NEVER_MINUS_ZERO):
            return None
        return Reject("x + 0.0 is 0.0 for x = -0.0, and x may be that", m[x])

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return shaped(rw, m[x], m)


class TimesOne(Rule):
    """x * 1 => x; x / 1 => x"""

    pattern = op_in(("mul", "div"), x, 1)
    numerics = Numerics.BITWISE

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return shaped(rw, m[x], m)


class TimesZero(Rule):
    """x * 0 => 0, of integers and truth values"""

    pattern = op_in(("mul", "bitwise_and"), x, 0)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        if m[x].dtype.is_float or m[x].dtype.is_complex:
            return Reject("x * 0 is nan for an infinite x, and -0.0 for a negative one", m.root)
        return None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return shaped(rw, rw.constant(0, m[x].dtype), m)


class SelfDifference(Rule):
    """x - x => 0; x xor x => 0; of integers and truth values"""

    pattern = op_in(("sub", "bitwise_xor"), x, x)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        if m[x].dtype.is_float or m[x].dtype.is_complex:
            return Reject("x - x is nan for an infinite x or a nan", m.root)
        return None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return shaped(rw, rw.constant(0, m[x].dtype), m)


class SameTwice(Rule):
    """max(x, x) => x; likewise min, and, or"""

    pattern = op_in(("maximum", "minimum", "bitwise_and", "bitwise_or", "logical_and", "logical_or"), x, x)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        return None if m[x].dtype == m.root.results[0].dtype else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return m[x]  # type: ignore[no-any-return]


class LogicalConstant(Rule):
    """x and true => x; x and false => false; x or false => x; x or true => true; x xor false => x"""

    pattern = op_in(("logical_and", "logical_or", "logical_xor", "bitwise_or", "bitwise_xor"), x, c)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        if m.root.name.startswith("bitwise"):
            return None if m[c] == 0 else NOT_THIS
        if m.root.name == "logical_xor" and m[c]:
            return NOT_THIS
        return None if m[x].dtype.is_bool else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        keeps = bool(m[c]) == (m.root.name == "logical_and")
        return shaped(rw, m[x] if keeps else rw.constant(bool(m[c]), m[x].dtype), m)


class AppliedTwice(Rule):
    """f(f(x)) => f(x) for abs, floor, relu ...; f(f(x)) => x for neg, not"""

    pattern = op_in(
        tuple(n for n, op in OPS.items() if op.has(Trait.IDEMPOTENT, Trait.INVOLUTION)) + ("logical_not",), value("inner")
    )
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        inner = m["inner"].defined_by(m.root.name)
        return None if inner is not None and inner.operands[0].dtype == m.root.results[0].dtype else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        inner = m["inner"]
        return inner if m.root.op.has(Trait.IDEMPOTENT) else inner.producer.operands[0]  # type: ignore[no-any-return]


class WhereSame(Rule):
    """where(c, x, x) => x; where(true, x, y) => x; where(c, true, false) => c"""

    pattern = pat.where(value("condition"), x, y)
    numerics = Numerics.BITWISE

    @staticmethod
    def choice(m: Match) -> Value | None:
        """The value that is always taken, or None."""
        condition = m["condition"]
        if m[x] is m[y]:
            return m[x]  # type: ignore[no-any-return]
        if is_scalar(condition):
            return m[x] if _scalar(condition) else m[y]
        if m[x].dtype.is_bool and is_scalar(m[x]) and is_scalar(m[y]) and _scalar(m[x]) and not _scalar(m[y]):
            return condition  # type: ignore[no-any-return]
        return None

    def check(self, m: Match) -> Reject | None:
        return NOT_THIS if self.choice(m) is None else None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        choice = self.choice(m)
        assert choice is not None
        return shaped(rw, choice, m)


def _scalar(v: Value) -> float:
    number = scalar_of(v)
    assert isinstance(number, int | float)
    return number


class MergeClamps(Rule):
    """max(max(x, c), d) => max(x, max(c, d)); likewise min"""

    pattern = op_in(("maximum", "minimum"), op_in(("maximum", "minimum"), x, c).once(), d)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        fits = m.root.name == m.nodes[1].name and not is_scalar(m[x]) and not math.isnan(m[c]) and not math.isnan(m[d])
        return None if fits else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        pick = max if m.root.name == "maximum" else min
        return shaped(rw, rw.create(m.root.name, [m[x], pick(m[c], m[d])]), m)


# --- rounding differently ----------------------------------------------------------------------------------------------


class CollectTerms(Rule):
    """(x + c) + d => x + (c + d)"""

    pattern = pat.add(d, pat.add(x, c).once())
    numerics = Numerics.REASSOCIATES

    def check(self, m: Match) -> Reject | None:
        if m[x].dtype.is_float and m[c] * m[d] < 0:
            return Reject("terms of opposite signs cancel: (x + c) - c rounds x, and programs rely on that", m.root)
        return _fits(m, m[c] + m[d])

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return shaped(rw, rw.add(m[x], _own(m[c] + m[d], m)), m)


class CollectFactors(Rule):
    """(x * c) * d => x * (c * d)"""

    pattern = pat.mul(d, pat.mul(x, c).once())
    numerics = Numerics.REASSOCIATES

    def check(self, m: Match) -> Reject | None:
        return _fits(m, m[c] * m[d])

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return shaped(rw, rw.mul(m[x], _own(m[c] * m[d], m)), m)


class CommonFactor(Rule):
    """x * z + y * z => (x + y) * z"""

    z = value("z")
    pattern = pat.add(pat.mul(x, z).once(), pat.mul(y, z).once())
    numerics = Numerics.REASSOCIATES
    near = 4  # two products without a common factor are no near miss

    def check(self, m: Match) -> Reject | None:
        if m[x].dtype.is_complex or m[x].dtype.is_bool:
            return NOT_THIS
        if not same_shape(m[x], m[y], m) or not same_shape(m[x], m.root.results[0], m):
            return Reject("the terms differ in shape, so that the sum of the factors would cost more", m.root)
        return None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.mul(rw.add(m[x], m[y]), m[self.z])  # type: ignore[no-any-return]


def _fits(m: Match, number: float) -> Reject | None:
    """Whether the collected constant is one that the dtype holds without overflow or underflow."""
    dtype = m[x].dtype
    if is_scalar(m[x]) or dtype.is_bool or dtype.is_complex or isinstance(number, complex):
        return NOT_THIS
    if not dtype.is_float:
        return None
    limits = torch.finfo(dtype.torch)
    if number != 0 and not limits.tiny <= abs(number) <= limits.max:
        return Reject(f"the collected constant {number} is out of the range of {dtype}", m.root)
    if number == 0 and m.root.name == "mul":
        return NOT_THIS
    return None


def _own(number: float, m: Match) -> float:
    return rounded(number, m[x].dtype) if m[x].dtype.is_integer else number


class Algebra(RewritePass):
    """Identities of arithmetic and logic."""

    name = "algebra"

    def rules(self) -> Sequence[Rule]:
        return [
            AddZero(), TimesOne(), TimesZero(), SelfDifference(), SameTwice(), LogicalConstant(), AppliedTwice(), WhereSame(),
            MergeClamps(), CollectTerms(), CollectFactors(), CommonFactor(),
        ]  # fmt: skip

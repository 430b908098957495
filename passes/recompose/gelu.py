"""x / 2 * (1 + erf(x / sqrt 2))  =>  gelu(x), and  x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))  =>  gelu(x, "tanh")

Why: a name that the fusion's epilogues and the backends know; a vectorised erf or tanh once, instead of eight operations.
When: the constants are right to within their rounding, whatever the order and the brackets of the products. x * sigmoid(1.702 x)
is a coarser approximation of the same curve, not the same function: it stays.
Numerics: the same formula, with the constants multiplied in another order.
Reference: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv:1606.08415.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from graphopt.ir import Value
from graphopt.pass_manager import RewritePass
from graphopt.passes.recompose.spelling import close, plus_constant, powers_of, product
from graphopt.passes.shared import NOT_THIS, shaped
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, op_in, value

CUBIC, WIDTH = 0.044715, math.sqrt(2 / math.pi)


def gate_of(v: Value) -> tuple[float, Value] | None:
    """(c, g) if the value is c * (1 + g), with g an erf or tanh; also written c + c * g."""
    plus = plus_constant(v)
    if plus is None:
        return None
    read = product(plus[0], inner=True)
    if len(read.factors) != 1 or read.divisors or read.factors[0].defined_by("erf", "tanh") is None:
        return None
    return (plus[1], read.factors[0]) if close(read.coefficient, plus[1], v.dtype) else None


class Gelu(Rule):
    """x / 2 * (1 + erf(x / sqrt 2)) => gelu(x); x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) => gelu(x, "tanh")"""

    pattern = op_in(("mul", "div"), value("a"), value("b"))
    numerics = Numerics.APPROXIMATE

    @staticmethod
    def find(m: Match) -> tuple[Value, str] | Reject:
        read = product(m.root.results[0])
        gates = [(f, found) for f in read.factors if (found := gate_of(f)) is not None]
        if len(gates) != 1 or len(read.factors) != 2 or read.divisors or not m.root.results[0].dtype.is_float:
            return NOT_THIS
        gate, (c, curve) = gates[0]
        (x,) = (f for f in read.factors if f is not gate)
        if not close(read.coefficient * c, 0.5, x.dtype):
            return Reject(f"the factor is {read.coefficient * c}, not 0.5", m.root)
        node = curve.producer
        assert node is not None
        argument = node.operands[0]
        if node.name == "erf":
            linear = powers_of(argument, x)
            if linear is None or linear[1] != 1:
                return Reject("erf is of something else than a multiple of x", node)
            if not close(linear[0], math.sqrt(0.5), x.dtype):
                return Reject(f"erf is of {linear[0]:.9g} x, not of x / sqrt(2)", node)
            return x, "none"
        terms = polynomial(argument, x)
        if terms is None or not close(terms.get(1), WIDTH, x.dtype) or not close(terms.get(3), WIDTH * CUBIC, x.dtype) or len(terms) != 2:
            return Reject("tanh is not of sqrt(2 / pi) (x + 0.044715 x^3)", node)
        return x, "tanh"

    def check(self, m: Match) -> Reject | None:
        found = self.find(m)
        return found if isinstance(found, Reject) else None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        found = self.find(m)
        assert not isinstance(found, Reject)
        return shaped(rw, rw.gelu(found[0], approximate=found[1]), m)


def polynomial(v: Value, x: Value, depth: int = 0) -> dict[int, float] | None:
    """The value as {power of x: coefficient}, up to cubic; None if it is no such polynomial, or has more brackets than gelu."""
    monomial = powers_of(v, x)
    if monomial is not None:
        return {monomial[1]: monomial[0]}
    if depth > 4:
        return None
    node = v.defined_by("add")
    if node is not None:
        a, b = (polynomial(u, x, depth + 1) for u in node.operands)
        return None if a is None or b is None else {n: a.get(n, 0.0) + b.get(n, 0.0) for n in sorted({**a, **b})}
    read = product(v)
    out: dict[int, float] = {0: read.coefficient}
    if read.divisors or read.factors == [v]:
        return None
    for f in read.factors:
        other = polynomial(f, x, depth + 1)
        if other is None or max(out) + max(other) > 3:
            return None
        terms: dict[int, float] = {}
        for i, p in out.items():
            for j, q in other.items():
                terms[i + j] = terms.get(i + j, 0.0) + p * q
        out = terms
    return out


class RecomposeGelu(RewritePass):
    """Find GELU in its primitive spellings."""

    name = "recompose-gelu"

    def rules(self) -> Sequence[Rule]:
        return [Gelu()]

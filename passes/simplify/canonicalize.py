"""One spelling for what can be spelt in several ways: x - c => x + (-c), pow(x, 2) => x * x, axis -1 => axis n - 1, ...

Why: every later pattern then needs one form only; and some forms are cheaper (a multiplication instead of a power or a
division).
When: always, where the new form gives the same bits. A division by a constant becomes a multiplication only when the
constant is a power of two; so recognisers must accept both.
Numerics: bitwise, up to the sign and payload of a nan, except for pow => sqrt, rsqrt (PyTorch itself takes that way for a
Python exponent) and 1 / sqrt(x) => rsqrt(x), which may round differently in the last place.
Reference: MLIR, "Operation Canonicalization", https://mlir.llvm.org/docs/Canonicalization/ ; IEEE 754-2019, section 6.3, on
the signs of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.errors import TypeInferenceError
from graphopt.ir import OPS, Trait, Value, dims
from graphopt.ir.ops import broadcast_shapes
from graphopt.pass_manager import RewritePass
from graphopt.passes.shared import NOT_THIS, POINTWISE, is_power_of_two, is_scalar, shaped
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, const, op_in, pat, value

x, y, c = value("x"), value("y"), const("c")
COMMUTATIVE = tuple(name for name, op in OPS.items() if op.has(Trait.COMMUTATIVE))
MIRROR = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}


# --- constants ---------------------------------------------------------------------------------------------------------


class ConstantSecond(Rule):
    """c + x => x + c, for every commutative op; c < x => x > c"""

    pattern = op_in((*COMMUTATIVE, *MIRROR), x, y)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        first, second = m.root.operands
        return None if is_scalar(first) and not is_scalar(second) else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        first, second = m.root.operands
        return rw.create(MIRROR.get(m.root.name, m.root.name), [second, first])  # type: ignore[no-any-return]


class SubtractConstant(Rule):
    """x - c => x + (-c)"""

    pattern = pat.sub(x, c)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        dtype = m[x].dtype
        if dtype.is_float or dtype.is_complex:
            return None
        lowest = -(1 << (dtype.bits - 1))
        return None if dtype.kind == "i" and m[c] != lowest else NOT_THIS  # -c would not fit

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return shaped(rw, rw.add(m[x], -m[c]), m)


class DivideByPowerOfTwo(Rule):
    """x / 2^k => x * 2^-k"""

    pattern = pat.div(x, c)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        return None if is_power_of_two(m[c], m[x].dtype) else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return shaped(rw, rw.mul(m[x], 1 / m[c]), m)


class DivideOne(Rule):
    """1 / x => reciprocal(x)"""

    pattern = pat.div(1.0, x)
    numerics = Numerics.BITWISE

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return shaped(rw, rw.reciprocal(m[x]), m)


class ReciprocalOfRoot(Rule):
    """reciprocal(sqrt(x)) => rsqrt(x)"""

    pattern = pat.reciprocal(pat.sqrt(x))
    numerics = Numerics.APPROXIMATE

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.rsqrt(m[x])  # type: ignore[no-any-return]


class Power(Rule):
    """pow(x, 2) => x * x; likewise for the exponents 1, 3, and, of floats, 0.5, -0.5, -1"""

    pattern = pat.pow(x, c)
    numerics = Numerics.REASSOCIATES

    def check(self, m: Match) -> Reject | None:
        small = (1, 2, 3) if not m[x].dtype.is_float else (1, 2, 3, 0.5, -0.5, -1)
        return None if m[c] in small and not m[x].dtype.is_bool else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        v, exponent = m[x], m[c]
        if exponent in (0.5, -0.5, -1):
            out = rw.create({0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}[exponent], [v])
        else:
            out = v
            for _ in range(int(exponent) - 1):
                out = rw.mul(out, v)
        return shaped(rw, out, m)


# --- signs -------------------------------------------------------------------------------------------------------------


class TimesMinusOne(Rule):
    """x * -1 => -x"""

    pattern = pat.mul(x, -1)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        return None if m[x].dtype.is_float or m[x].dtype.kind == "i" else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return shaped(rw, rw.neg(m[x]), m)


class AddNegated(Rule):
    """x + (-y) => x - y"""

    pattern = pat.add(x, pat.neg(y))
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        return NOT_THIS if is_scalar(m[x]) else None  # c - y would be no better than c + (-y)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.sub(m[x], m[y])  # type: ignore[no-any-return]


class SubtractNegated(Rule):
    """x - (-y) => x + y"""

    pattern = pat.sub(x, pat.neg(y))
    numerics = Numerics.BITWISE

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.add(m[x], m[y])  # type: ignore[no-any-return]


class ScaleNegated(Rule):
    """(-x) * c => x * (-c)"""

    pattern = pat.mul(pat.neg(x), c)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        return None if m[x].dtype.is_float else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return shaped(rw, rw.mul(m[x], -m[c]), m)


# --- truth values ------------------------------------------------------------------------------------------------------


class NotComparison(Rule):
    """not (x == y) => x != y; and, of integers, not (x < y) => x >= y"""

    pattern = pat.logical_not(op_in(("eq", "ne", "lt", "le", "gt", "ge"), x, y))
    numerics = Numerics.BITWISE
    inverse = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}

    def check(self, m: Match) -> Reject | None:
        if m.nodes[1].name in ("eq", "ne") or not m[x].dtype.is_float:
            return None
        return Reject("of a nan, neither x < y nor x >= y holds", m.nodes[1])

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.create(self.inverse[m.nodes[1].name], m.nodes[1].operands)  # type: ignore[no-any-return]


class WhereNot(Rule):
    """where(not c, x, y) => where(c, y, x)"""

    condition = value("condition", where=lambda v: v.dtype.is_bool)
    pattern = pat.where(pat.logical_not(condition), x, y)
    numerics = Numerics.BITWISE

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.where(m[self.condition], m[y], m[x])  # type: ignore[no-any-return]


# --- axes and broadcasting ---------------------------------------------------------------------------------------------

AXIS_OPS = tuple(name for name, op in OPS.items() if "axis" in op.attrs or ("axes" in op.attrs and op.has(Trait.REDUCTION))) + ("flip",)


class PlainAxes(Rule):
    """sum(x, axes = [-1, 0]) => sum(x, axes = [0, n - 1]); likewise for every attribute that names axes"""

    pattern = op_in(AXIS_OPS)
    numerics = Numerics.BITWISE

    @staticmethod
    def plain(m: Match) -> dict[str, Any]:
        rank, attrs = max(m.root.operands[0].type.rank, 1), dict(m.root.attrs)
        if "axis" in attrs:
            attrs["axis"] %= rank
        else:
            attrs["axes"] = tuple(sorted(a % rank for a in attrs["axes"]))
        return attrs

    def check(self, m: Match) -> Reject | None:
        return NOT_THIS if self.plain(m) == m.root.attrs else None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.create(m.root.name, m.root.operands, self.plain(m))  # type: ignore[no-any-return]


class ImplicitBroadcast(Rule):
    """op(x, broadcast_to(y)) => op(x, y), where the op broadcasts y by itself; likewise for reshapes that prepend axes of 1"""

    pattern = op_in(tuple(n for n in POINTWISE if OPS[n].arity != (1, 1)))
    numerics = Numerics.BITWISE

    @staticmethod
    def operands(m: Match) -> list[Value]:
        """The operands, each without the broadcast if the result's shape stays."""
        out = list(m.root.operands)
        for i, v in enumerate(out):
            while (node := v.defined_by("broadcast_to", "reshape")) is not None:
                if node.name == "reshape" and not _prepends(node.operands[0], v, m.root.results[0]):
                    break
                v = node.operands[0]
                shapes = [v.shape if j == i else w.shape for j, w in enumerate(out)]
                try:
                    fits = dims.same_shape(broadcast_shapes(shapes), m.root.results[0].shape, m.root.graph.symbols)
                except TypeInferenceError:
                    fits = False
                if not fits:
                    break
                out[i] = v
        return out

    def check(self, m: Match) -> Reject | None:
        return NOT_THIS if tuple(self.operands(m)) == m.root.operands else None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.create(m.root.name, self.operands(m), dict(m.root.attrs))  # type: ignore[no-any-return]


def _prepends(before: Value, after: Value, result: Value) -> bool:
    """Whether the second shape is the first with axes of size 1 put before, and the result repeats it.

    A reshape of a value that is not repeated stays: its other users read the reshaped value too, and patterns must see
    that it is one value.
    """
    extra = after.type.rank - before.type.rank
    return extra > 0 and after.shape == (*[1] * extra, *before.shape) and not dims.same(before.type.numel, result.type.numel)


class Canonicalize(RewritePass):
    """Normal forms that the other passes rely on."""

    name = "canonicalize"

    def rules(self) -> Sequence[Rule]:
        return [
            ConstantSecond(), SubtractConstant(), DivideByPowerOfTwo(), DivideOne(), ReciprocalOfRoot(), Power(),
            TimesMinusOne(), AddNegated(), SubtractNegated(), ScaleNegated(), NotComparison(), WhereNot(), PlainAxes(),
            ImplicitBroadcast(),
        ]  # fmt: skip

"""cast(cast(x, m), d)  =>  cast(x, d)

Why: a pass over memory, or a conversion in registers.
When: the dtype m in between holds every value of x's dtype, so nothing was rounded on the way.
Numerics: bitwise.
Reference: IEEE 754-2019, section 5.4.2 (conversions); LLVM, InstCombine, "isEliminableCastPair".
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir import DType, Value
from graphopt.pass_manager import RewritePass
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, attr, pat, value

x = value("x")
SIGNIFICANT = {"f64": 53, "f32": 24, "tf32": 11, "f16": 11, "bf16": 8, "f8e4m3": 4, "f8e5m2": 3}
EXPONENT = {"f64": 11, "f32": 8, "tf32": 8, "f16": 5, "bf16": 8, "f8e4m3": 4, "f8e5m2": 5}


def holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of the second dtype is one of the first."""
    if wide == narrow or narrow.is_bool:
        return True
    if wide.is_bool or wide.is_complex or narrow.is_complex:
        return False
    if wide.is_float and narrow.is_float:
        return SIGNIFICANT[wide.name] >= SIGNIFICANT[narrow.name] and EXPONENT[wide.name] >= EXPONENT[narrow.name]
    if wide.is_float:
        magnitude = narrow.bits - (narrow.kind == "i")
        return SIGNIFICANT[wide.name] >= magnitude and (1 << (EXPONENT[wide.name] - 1)) > magnitude
    if narrow.is_float:
        return False
    return (wide.bits > narrow.bits and (wide.kind == "i" or narrow.kind == "u")) or (wide.kind == narrow.kind and wide.bits >= narrow.bits)


class IdentityCast(Rule):
    """cast(x, dtype of x) => x"""

    pattern = pat.cast(x, dtype=attr("d"))
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        return None if m["d"] == m[x].dtype else Reject("")

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return m[x]  # type: ignore[no-any-return]


class MergeCasts(Rule):
    """cast(cast(x, m), d) => cast(x, d)"""

    pattern = pat.cast(pat.cast(x, dtype=attr("m")), dtype=attr("d"))
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        if holds(m["m"], m[x].dtype):
            return None
        return Reject(f"{m['m']} does not hold every value of {m[x].dtype}: the inner cast rounds or wraps", m.nodes[1])

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.cast(m[x], m["d"])


class Casts(RewritePass):
    """Chains of conversions become one, or none."""

    name = "casts"

    def rules(self) -> Sequence[Rule]:
        return [IdentityCast(), MergeCasts()]

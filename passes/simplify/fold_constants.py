"""op(c1, c2) => c, a pointwise op of scalar constants; and size arithmetic: n + 1 of a symbolic size becomes one size

Why: nothing is computed at run time that is known at compile time; later passes see one number.
When: every operand is a scalar constant, or one that is broadcast. Sizes are folded by their integer arithmetic (add, sub,
mul, floor_div, neg) and by conversions.
Numerics: integers and truth values are exact. Floats are computed in f64 by the op's reference evaluation and rounded once,
where eager rounds at each op.
Reference: Aho, Lam, Sethi, Ullman, Compilers, section 8.5.4 (constant folding).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from graphopt.ir import Node, Value, dims
from graphopt.ir.ops import EvalContext
from graphopt.pass_manager import RewritePass
from graphopt.passes.shared import NOT_THIS, POINTWISE, is_scalar, shaped
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, op_in, scalar_of

SIZE_OPS: dict[str, Callable[..., Any]] = {
    "add": dims.add, "sub": dims.sub, "mul": dims.mul, "floor_div": dims.floordiv, "neg": operator.neg, "cast": lambda d: d,
}  # fmt: skip


class FoldScalars(Rule):
    """op(c1, c2) => c"""

    pattern = op_in(POINTWISE)
    numerics = Numerics.REASSOCIATES

    def check(self, m: Match) -> Reject | None:
        dtype = m.root.results[0].dtype
        if not all(is_scalar(v) for v in m.root.operands) or dtype.is_complex or any(v.dtype.is_complex for v in m.root.operands):
            return NOT_THIS
        if m.root.op.evaluate is None or _evaluate(m.root) is None:
            return Reject("the op is not defined for these constants")
        return None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        number = _evaluate(m.root)
        assert number is not None
        return shaped(rw, rw.constant(number, m.root.results[0].dtype), m)


def _evaluate(node: Node) -> float | None:
    """The op's value: in f64 if it is a float, else in the operands' own dtypes.

    None where the op raises (1 // 0), or torch lacks the dtype.
    """
    wide = node.results[0].dtype.is_float
    ctx = EvalContext({}, wide=wide)
    assert node.op.evaluate is not None
    try:
        operands = [torch.tensor(scalar_of(v), dtype=ctx.dtype(v.dtype)) for v in node.operands]
        return node.op.evaluate(operands, node.attrs, ctx).item()  # type: ignore[no-any-return]
    except (RuntimeError, ZeroDivisionError, KeyError):
        return None


class FoldSizes(Rule):
    """n + 1 => (n + 1), of symbolic sizes"""

    pattern = op_in(tuple(SIZE_OPS))
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        sizes = [_size(v) for v in m.root.operands]
        known = [s for s in sizes if s is not None]
        if len(known) < len(sizes) or all(isinstance(s, int) for s in known):
            return NOT_THIS
        if m.root.name == "cast":
            return None if m.root.results[0].dtype.bits >= 32 and not m.root.results[0].dtype.is_bool else NOT_THIS
        if m.root.name == "floor_div" and dims.prove(known[1], ">", 0, m.root.graph.symbols) is not True:
            return Reject("the divisor is not known to be positive", m.root.operands[1])
        return None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        size = dims.simplify(SIZE_OPS[m.root.name](*[_size(v) for v in m.root.operands]))
        return rw.constant(size, m.root.results[0].dtype)


def _size(v: Value) -> dims.Dim | None:
    """The integer, or size, of a rank-0 i64 constant."""
    node = v.defined_by("constant")
    if node is None or v.dtype.name != "i64":
        return None
    number = node.attrs["value"]
    return number if isinstance(number, int | sympy.Expr) else None


class FoldConstants(RewritePass):
    """Compute at compile time what depends on constants only."""

    name = "fold-constants"

    def rules(self) -> Sequence[Rule]:
        return [FoldScalars(), FoldSizes()]

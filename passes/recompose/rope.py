"""x cos + concat(-x[half:], x[:half]) sin  =>  rope(x, cos, sin)

Why: one pass over x instead of two slices, a negation, a concatenation, two products and a sum.
When: the two halves of the last axis of the same x are exchanged, the upper one negated; cos and sin have one shape that
broadcasts to x. The interleaved layout (even and odd elements) and a rotation the other way round are other functions.
Numerics: bitwise but for fused multiply-add.
Reference: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.errors import TypeInferenceError
from graphopt.ir import Value, dims
from graphopt.ir.ops import broadcast_shapes
from graphopt.pass_manager import RewritePass
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, op_in, pat, value

x, cos, sin = value("x"), value("cos"), value("sin")


def extent(v: Value) -> tuple[Value, dims.Dim, dims.Dim]:
    """(tensor, start, stop): the range of the last axis that a value is a slice of; a tensor is all of itself."""
    start: dims.Dim = 0
    stop = v.shape[-1]
    while (node := v.defined_by("slice")) is not None and node.attrs["axis"] % v.type.rank == v.type.rank - 1 and node.attrs["step"] == 1:
        start, stop = dims.add(start, node.attrs["start"]), dims.add(stop, node.attrs["start"])
        v = node.operands[0]
    return v, start, stop


class Rope(Rule):
    """x cos + concat(-x[half:], x[:half]) sin => rope(x, cos, sin)"""

    pattern = pat.add(pat.mul(x, cos), pat.mul(op_in(("concat",)).named("rotated"), sin))
    numerics = Numerics.REASSOCIATES
    near = 4  # below, only a sum of products with a concat somewhere

    def check(self, m: Match) -> Reject | None:
        joined, v, symbols = m["rotated"].producer, m[x], m.root.graph.symbols
        last, parts = v.type.rank - 1, joined.operands
        if not v.dtype.is_float or v.type.rank == 0 or m["rotated"].type.rank != v.type.rank or len(parts) != 2:
            return NOT_THIS
        negated = parts[0].defined_by("neg")
        other = parts[1].defined_by("neg")
        tensor, start, stop = extent(v)
        halves = [extent(p.operands[0] if p is not None else q) for p, q in zip((negated, other), parts, strict=True)]
        if any(t is not tensor for t, _, _ in halves):
            return NOT_THIS  # halves of something else; with cos and sin exchanged this is tried again
        if joined.attrs["axis"] % v.type.rank != last:
            return Reject(f"the halves are joined along axis {joined.attrs['axis']}, not the last one", joined)
        if negated is None or other is not None:
            return Reject("the upper half, which comes first, must be the negated one: this turns the other way", joined)
        middle = dims.add(start, dims.floordiv(dims.sub(stop, start), 2))
        bounds = [n for _, first, end in halves for n in (first, end)]
        if not all(dims.same(a, b, symbols) for a, b in zip(bounds, (middle, stop, start, middle), strict=True)):
            return Reject("the slices are not the upper and the lower half of x", joined)
        return self._check_angles(m)

    @staticmethod
    def _check_angles(m: Match) -> Reject | None:
        symbols = m.root.graph.symbols
        if not dims.same_shape(m[cos].shape, m[sin].shape, symbols):
            return Reject(f"cos and sin differ in shape: {m[cos].type}, {m[sin].type}", m[sin])
        try:
            shape = broadcast_shapes([m[x].shape, m[cos].shape])
        except TypeInferenceError:
            return Reject("cos does not broadcast to x", m[cos])
        return None if dims.same_shape(shape, m[x].shape, symbols) else Reject("cos is larger than x", m[cos])

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.rope(m[x], m[cos], m[sin])  # type: ignore[no-any-return]


class RecomposeRope(RewritePass):
    """Find rotary embeddings in their primitive spelling."""

    name = "recompose-rope"

    def rules(self) -> Sequence[Rule]:
        return [Rope()]

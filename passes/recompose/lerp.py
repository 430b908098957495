"""a + (b - a) * t  =>  a * (1 - t) + b * t, where a and b are neighbours in an image that is resized

Why: PyTorch spells linear resizing by differences, but computes it by weights. Beside an infinite element a difference is
infinite, and inf - inf is NaN, where the weighted mean is still the right one.
When: a and b are read from one tensor by clipped indices, as that spelling does and no user's own code can.
Numerics: the same sum with t multiplied out. Along an axis that keeps its size PyTorch weighs an element with 1 and once more
with 0, where the spelling has its neighbour: NaN then stands elsewhere around an infinite element.
Reference: PyTorch, aten/src/ATen/native/cpu/UpSampleKernel.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir import Value
from graphopt.pass_manager import RewritePass
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, pat, value

a, b, t = value("a"), value("b"), value("t")
DEPTH = 12  # three axes of casts, lerps and takes


class ByWeights(Rule):
    """a + (b - a) * t => a * (1 - t) + b * t"""

    pattern = pat.add(a, pat.mul(pat.sub(b, a), t))
    numerics = Numerics.REASSOCIATES

    def check(self, m: Match) -> Reject | None:
        image = read_from(m[a])
        return None if image is not None and image is read_from(m[b]) else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.add(rw.mul(m[a], rw.sub(1.0, m[t])), rw.mul(m[b], m[t]))  # type: ignore[no-any-return]


def read_from(v: Value, depth: int = DEPTH) -> Value | None:
    """The tensor that a value is interpolated from: below casts, sums and products, what is taken by clipped indices."""
    node = v.defined_by("take", "cast", "add", "mul")
    if node is None or depth == 0:
        return None
    if node.name != "take":
        return next((x for u in node.operands if (x := read_from(u, depth - 1)) is not None), None)
    image = node.operands[0]
    return (read_from(image, depth - 1) or image) if node.attrs["clip"] else None


class RecomposeLerp(RewritePass):
    """Linear interpolation by weights, as eager computes it."""

    name = "recompose-lerp"

    def rules(self) -> Sequence[Rule]:
        return [ByWeights()]

"""take(x, [1, 0, 1, 2, 1])  =>  concat(flip(x[0 : 2]), x[1 : 3], x[1 : 2])

Why: a kernel that looks up where each element lies reads one element at a time; slices are read by vectors. Padding by reflection or
by the border's elements is such an index, and only the margins are not as they were: 224 x 224 of 24 images with 3 elements
around, 205 -> 70 us, on two cores.

When: for a CPU, behind ``conv-layout``, which carries a take along as it stands; the index is one vector of known numbers, within bounds
or clipped, that falls into few stretches, each of which rises by one step, falls by one, or stays where it is. Declined, with a
remark: a clipped index of rows, which are read by vectors as they are; in parts, of each of three axes, they were 27 boxes in two kernels.

Numerics: bitwise.   Reference: none; an index vector as a list of ranges.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from graphopt.ir import Graph, Value, dims
from graphopt.ir.interpreter import evaluate_node
from graphopt.ir.ops import EvalContext
from graphopt.pass_manager import RewritePass
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Match, Numerics, PassContext, Reject, Rewriter, Rule, pat, value

FEW = 4  # stretches, each a loop of its own
MOST = 1 << 16  # positions that are looked at
ROW = 64  # elements that are read by vectors as they are, wherever they lie
_PLAIN = ("iota", "constant", "add", "sub", "mul", "neg", "abs", "maximum", "minimum", "cast")

x, index = value("x"), value("index")


class TakeByStretches(Rule):
    """take(x, [1, 0, 1, 2, 1])  =>  concat(flip(x[0 : 2]), x[1 : 3], x[1 : 2])"""

    pattern = pat.take(x, index)
    numerics = Numerics.BITWISE

    @staticmethod
    def stretches(m: Match) -> list[list[int]] | None:
        """The positions, cut where they go another way; None where they are not known, or not as the axis has them."""
        size = m[x].shape[m.root.attrs["axis"]]
        if m[index].type.rank != 1 or not isinstance(size, int) or size == 0 or (numbers := _known(m[index])) is None:
            return None
        if m.root.attrs["clip"]:
            numbers = numbers.clamp(0, size - 1)
        return None if numbers.min() < 0 or numbers.max() >= size else cut(numbers.tolist())

    def check(self, m: Match) -> Reject | None:
        found = self.stretches(m)
        if found is None:
            return NOT_THIS
        if len(found) > FEW:
            return Reject(f"its index goes {len(found)} ways, one after the other", m[index])
        inner = dims.numel(m[x].shape[m.root.attrs["axis"] % m[x].type.rank + 1 :])
        if len(found) > 1 and m.root.attrs["clip"] and isinstance(inner, int) and inner >= ROW:
            return Reject("it moves whole rows, one index each", m[index])
        return None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        axis, found = m.root.attrs["axis"] % m[x].type.rank, self.stretches(m)
        assert found is not None
        parts = [_part(rw, m[x], axis, positions) for positions in found]
        return parts[0] if len(parts) == 1 else rw.concat(*parts, axis=axis)  # type: ignore[no-any-return]


class KnownIndices(RewritePass):
    """Read what known indices select as slices. See the module's header."""

    name = "known-indices"

    def rules(self) -> Sequence[Rule]:
        return [TakeByStretches()]

    def run(self, g: Graph, ctx: PassContext) -> bool:
        return (ctx.target is None or ctx.target.kind == "cpu") and super().run(g, ctx)


def cut(positions: Sequence[int]) -> list[list[int]]:
    """The positions in stretches of one step each: 1, -1 or 0."""
    out = [[positions[0]]]
    for p in positions[1:]:
        run = out[-1]
        step = p - run[-1]
        if abs(step) <= 1 and (len(run) == 1 or step == run[-1] - run[-2]):
            run.append(p)
        else:
            out.append([p])
    return out


def _part(rw: Rewriter, v: Value, axis: int, positions: Sequence[int]) -> Value:
    low, high = min(positions), max(positions)
    part = rw.slice(v, axis=axis, start=low, stop=high + 1)
    if low == high and len(positions) > 1:
        return rw.broadcast_to(part, shape=(*v.shape[:axis], len(positions), *v.shape[axis + 1 :]))  # type: ignore[no-any-return]
    return rw.flip(part, axes=(axis,)) if positions[0] > positions[-1] else part  # type: ignore[no-any-return]


def _known(v: Value) -> torch.Tensor | None:
    """The elements of an integer value that no input and no symbol decides: made of a range and of constants, element by element."""
    node = v.producer
    if node is None or node.op.name not in _PLAIN or not v.dtype.is_integer:
        return None
    if not isinstance(v.type.numel, int) or not 0 < v.type.numel <= MOST or any(isinstance(a, sympy.Basic) for a in node.attrs.values()):
        return None
    operands = [_known(u) for u in node.operands]
    known = [t for t in operands if t is not None]
    return evaluate_node(node, known, EvalContext({}))[0] if len(known) == len(operands) else None

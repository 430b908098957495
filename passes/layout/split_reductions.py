"""sum(x[R, C])  =>  sum(sum(reshape(x, [R, S, C / S])))  with parts enough for all of a GPU's processors

Why: a program on a GPU reduces whole rows. With fewer rows than processors (a loss over everything, a vector's norm)
most of them are idle, and a few read all of memory. Split into ``S`` parts a row, every processor has one; what is left
to do is a reduction of ``S`` numbers.

When: the target is a GPU; sum, mean, max, min, prod, any or all, of static sizes; rows are fewer than processors; a reduced axis can
be divided so that at least ``least`` elements are left for a part. Halves are summed in f32 and rounded once, as they are by one
kernel. Declined with a remark: an axis of no fitting divisor (a prime length).

Numerics: sums in another order; bitwise for max, min, any and all.
Reference: Harris, "Optimizing Parallel Reduction in CUDA", 2007; the split reductions of Inductor.
"""

from __future__ import annotations

from math import prod

from graphopt.ir import types
from graphopt.ir.graph import Graph, Node, Value
from graphopt.pass_manager import Pass
from graphopt.rewrite import Numerics, PassContext, Rewriter, erase_dead

REDUCTIONS = ("sum", "mean", "max", "min", "prod", "any", "all")
NARROW = (types.f16, types.bf16)


class SplitReductions(Pass):
    """Give all processors of a GPU a part of a long reduction. See the module's header.

    Args:
        least: elements of a part.
    """

    name = "split-reductions"
    numerics = Numerics.REASSOCIATES
    least: int = 4096

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if ctx.target is None or not ctx.target.is_gpu:
            return False
        changed = False
        for node in g.nodes():
            if node.op.name not in REDUCTIONS or _was_split(node) or (wanted := self._parts(node, ctx.target.cores)) < 2:
                continue
            axis, parts = _division(node, wanted)
            if parts < 2:
                reason = f"no axis of {node.operands[0].type} falls into 2 to {wanted} parts"
                ctx.missed(self.name, f"the reduction is not split: {reason}", node)
                continue
            if (number := ctx.fuel.take()) is None:
                continue
            ctx.passed(self.name, f"axis {axis} of {node.operands[0].type} is reduced in {parts} parts", node, number)
            g.replace(node.result, _split(Rewriter(g, node), node, axis, parts))
            erase_dead(g, node)
            changed = True
        return changed

    def _parts(self, node: Node, processors: int) -> int:
        """How many parts a row should have; 0 or 1 for none."""
        shape = [d for d in node.operands[0].shape if isinstance(d, int)]
        if len(shape) != node.operands[0].type.rank or 0 in shape:
            return 0
        columns = prod(shape[a] for a in _axes(node))
        rows = prod(shape) // columns
        return min(-(-processors // rows), columns // self.least) if rows < processors else 0


def _axes(node: Node) -> list[int]:
    rank = node.operands[0].type.rank
    return sorted(a % rank for a in node.attrs["axes"]) if rank else []


def _was_split(node: Node) -> bool:
    """Whether an axis was divided in front of it: there is a second reduction behind it, and a third would not pay."""
    view = node.operands[0].defined_by("reshape")
    again = any(user.op.name == node.op.name for user in node.result.users)
    return again and view is not None and view.result.type.rank == view.operands[0].type.rank + 1


def _division(node: Node, wanted: int) -> tuple[int, int]:
    """The reduced axis that falls into most parts, up to so many, the first of equals; and that number."""
    shape = node.operands[0].shape
    found = {a: max(n for n in range(1, wanted + 1) if int(shape[a]) % n == 0) for a in _axes(node)}
    axis = max(found, key=lambda a: (found[a], -a))
    return axis, found[axis]


def _split(rw: Rewriter, node: Node, axis: int, parts: int) -> Value:
    x, name, dtype = node.operands[0], node.op.name, node.result.dtype
    if x.dtype in NARROW:
        x = rw.cast(x, types.f32)
    shape = x.shape
    divided = rw.reshape(x, (*shape[:axis], parts, int(shape[axis]) // parts, *shape[axis + 1 :]))
    axes = _axes(node)
    first = rw.create(name, [divided], {**node.attrs, "axes": tuple(a + (a >= axis) for a in axes), "keepdims": False})
    at = axis - sum(a < axis for a in axes)
    last = rw.create(name, [first], {**node.attrs, "axes": (at,), "keepdims": False})
    whole = last if last.dtype == dtype else rw.cast(last, dtype)
    return rw.reshape(whole, node.result.shape) if node.attrs["keepdims"] else whole

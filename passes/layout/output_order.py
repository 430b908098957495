"""return transpose(x)  =>  return copy(x), where copy is a region that does nothing but transpose

Why: a caller expects a result in the layout that PyTorch gives it, row-major mostly; a convolution's result, computed with its
channels last, is transposed on the way out. A program hands a view's elements to PyTorch to copy; a kernel of our own reads and
writes whole vectors, transposes in registers, and runs among the others: 10 instead of 90 us for MobileNetV2's 1280 x 7 x 7.

When: after ``fuse``: a result of the graph in row-major order that is a transpose, of known size, of what a region computes, and
is used for nothing else. Where the transpose moves only axes of size 1, nothing has to be copied.

Numerics: bitwise.   Reference: none; it is a copy.
"""

from __future__ import annotations

from graphopt.ir import dims
from graphopt.ir.graph import Graph, Node, Value
from graphopt.pass_manager import Pass
from graphopt.passes.fusion.outline import outline
from graphopt.rewrite import PassContext, erase_dead


class OutputOrder(Pass):
    """Copy transposed results by kernels. See the module's header."""

    name = "output-order"

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if ctx.target is not None and ctx.target.kind != "cpu":
            return False
        changed = False
        for v, strides in zip(g.outputs, g.output_strides, strict=True):
            node = v.producer
            if node is None or not _moves_memory(node, v) or strides not in (None, dims.contiguous_strides(v.shape)):
                continue
            if (number := ctx.fuel.take()) is None:
                continue
            ctx.passed(self.name, "a transposed result is copied by a kernel", node, number)
            outline(g, [node], "pointwise")
            erase_dead(g, node)
            changed = True
        return changed


def _moves_memory(node: Node, v: Value) -> bool:
    """Whether a result is a transpose in which a region's result gets another order."""
    if node.op.name != "transpose" or not v.has_one_use or not dims.is_static(v.shape) or not v.dtype.is_float:
        return False
    source = node.operands[0].producer
    if source is None or source.op.name != "fusion" or v.type.numel == 0:
        return False
    order = [p for p in node.attrs["perm"] if node.operands[0].shape[p] != 1]
    return order != sorted(order)

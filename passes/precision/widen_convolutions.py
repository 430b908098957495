"""conv(x, w)  =>  conv(cast(x, f32), cast(w, f32)),  x and w in f16 or bf16, on a CPU

Why: kernels for convolutions multiply in f32 whatever they read. Weights in f32 are cast when they are packed, once, and the image is
when it is copied, with zeros around it, where a kernel for half precision would cast every element at every tap. Weights take twice the
memory.

When: a convolution, transposed or not, of f16 or bf16, on a CPU; on a GPU units multiply halves as they are. With acc = f32, as where a
bias follows, the sums are the result; otherwise they are rounded to the result's dtype.

Numerics: bitwise in the IR but for the order of the sum, which stays in f32.
Reference: PyTorch, aten/src/ATen/native/mkldnn/Conv.cpp, which sums in f32, too.
"""

from __future__ import annotations

from graphopt.ir import types
from graphopt.ir.graph import Graph, Value
from graphopt.pass_manager import Pass
from graphopt.rewrite import Numerics, PassContext, Rewriter, erase_dead


class WidenConvolutions(Pass):
    """Multiply in f32 what kernels multiply in f32 anyway. See the module's header."""

    name = "widen-convolutions"
    numerics = Numerics.REASSOCIATES

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if ctx.target is not None and ctx.target.is_gpu:
            return False
        made, changed = dict[Value, Value](), False
        for node in g.nodes():
            if node.name not in ("conv", "conv_transpose") or node.operands[0].dtype not in (types.f16, types.bf16):
                continue
            if (number := ctx.fuel.take()) is None:
                continue
            rw = Rewriter(g, node)
            for v in node.operands:
                if v not in made:
                    made[v] = rw.cast(v, types.f32)
            sums = rw.create(node.name, [made[v] for v in node.operands], {**node.attrs, "acc": None})
            ctx.passed(self.name, f"{node.name} of {node.operands[0].dtype} is computed in f32", node, number)
            g.replace(node.result, rw.cast(sums, node.result.dtype))
            erase_dead(g, node)
            changed = True
        return changed

"""matmul(x, w)  =>  matmul(x, cast(w, bf16)) {acc = f32},  w an f32 weight that holds nothing but bf16

Why: many checkpoints are bf16 that is stored as f32. Kept as bf16, half of the bytes are read, which is what a product of few rows waits
for; and an f32 times a bf16 is three products of bf16 on AMX tiles where an f32 times an f32 is six.

When: the weight is known to be exact in bf16: each of its elements was looked at when the model was compiled, and is again when the weight
changes (a model whose weights are not exact any more is compiled anew). Where the target has AMX tiles, or the product has so few rows that
its kernel makes floats in registers. Not where weights go low or are quantized anyway. Declined with a remark: several weights side
by side, of which some are exact and others not, and more rows on a target without tiles, which would make floats of a panel first.

Numerics: bitwise in the IR: the same factors. A kernel sums in another order.
Reference: none.
"""

from __future__ import annotations

from graphopt.ir import dims, types
from graphopt.ir.graph import Graph, Node, Value, is_view
from graphopt.ir.stage import Staged, staged_values
from graphopt.pass_manager import Pass
from graphopt.passes.layout import pairs
from graphopt.rewrite import Numerics, PassContext, Reject, Rewriter, erase_dead
from graphopt.target import Target

FEW = 8  # rows for which kernels make floats in registers


class NarrowWeights(Pass):
    """Keep weights as bf16 that lose nothing by it. See the module's header."""

    name = "narrow-weights"
    numerics = Numerics.BITWISE

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if ctx.target is not None and ctx.target.is_gpu:
            return False
        staged, made, changed = staged_values(g), dict[Value, Value](), False
        for node in g.nodes():
            if node.op.name != "matmul" or node.attrs["acc"] is not None or node.result.dtype != types.f32:
                continue
            x, w = node.operands
            if reject := _reject(node, w, staged, ctx.target):
                if reject.reason:
                    ctx.missed(self.name, f"the weight stays in f32: {reject.reason}", node)
                continue
            number = ctx.fuel.take()
            if number is None:
                continue
            rw = Rewriter(g, node)
            if w not in made:
                made[w] = rw.cast(w, types.bf16)
            saved = int(w.type.nbytes()) // 2
            ctx.passed(self.name, f"weight {w!r} is exact in bf16, and kept so: saves {saved / 1e6:.2f} MB", node, number)
            g.replace(node.result, rw.create("matmul", [x, made[w]], {"acc": types.f32}))
            erase_dead(g, node)
            changed = True
        return changed


def _reject(node: Node, w: Value, staged: Staged, t: Target | None) -> Reject | None:
    if w not in staged or w.type.rank != 2 or not dims.is_static(w.shape):
        return Reject("")
    known = _exact(w)
    if not any(known):
        return Reject("")
    if not all(known):
        return Reject("only some of the weights that it is joined of are exact in bf16", w)
    k, n = (int(d) for d in w.shape)
    if k < pairs.DEPTH or n < pairs.COLUMNS // 2:
        return Reject(f"{k} rows by {n} columns do not fill a panel", w)
    rows = dims.numel(node.result.shape[:-1])
    if t is not None and t.bf16_products != "amx" and not (isinstance(rows, int) and rows <= FEW and t.bf16_products):
        return Reject("it is exact in bf16, but more rows would make floats of it again and again on a target without AMX tiles", w)
    return None


def _exact(v: Value) -> list[bool]:
    """Of each input that a value is a view of, or is joined of: whether it is exact."""
    node = v.producer
    if node is None:
        return [v.exact == types.bf16]
    if not is_view(node) and node.op.name != "concat":
        return [False]
    return [known for x in node.operands for known in _exact(x)]

"""matmul(x, w)  =>  matmul(x, (h + l) * unit),  h and l of f16, packed in tiles

Why: tiles of AMX-FP16 multiply f16, and sum in f32. With both factors as sums of two f16 three products of halves make one of f32, where
three bf16 each take six (``pack-weights``); and the weight is split once, not in each call. The packing depends on the weight alone: it is
computed once, at the first call, and again when the weight changes.

When: after ``fuse``, before ``pack-weights``, where the target has AMX-FP16 (``Target.f32_halves``), for each product of a region of kind
``matmul`` whose second operand is a staged (weight-only) f32 matrix, plain or transposed, if K is a multiple of 32 and N at
least 32. A product that has one row at every call is left to ``pack-weights``: it waits for memory, and f32 is as short.

Numerics: ``h + l`` is within 2**-22 of ``w``, and within 2**-39 of the largest of its column.

Reference: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
performance", IJHPCA 36(4), 2022. The form is :mod:`~graphopt.passes.layout.halves`.
"""

from __future__ import annotations

from functools import partial

from graphopt.ir import Graph, dims, types
from graphopt.ir.graph import Node, Value
from graphopt.ir.stage import staged_values
from graphopt.pass_manager import Pass
from graphopt.passes.layout import halves
from graphopt.passes.layout.pack_weights import rebuilt, site_of
from graphopt.passes.shared import matmuls
from graphopt.rewrite import Numerics, PassContext, Reject, Rewriter


class HalveWeights(Pass):
    """Split the weights of matmul regions into halves for AMX-FP16. See the module's header.

    Args:
        tiles: whether the target has tiles that multiply f16; None asks it.
    """

    name = "halve-weights"
    numerics = Numerics.APPROXIMATE
    tiles: bool | None = None

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if not (ctx.target is not None and ctx.target.f32_halves if self.tiles is None else self.tiles):
            return False
        staged, made, changed = staged_values(g), dict[tuple[Value, bool], tuple[Value, Value]](), False
        for region in [n for n in g.nodes() if n.op.name == "fusion" and n.attrs["kind"] == "matmul"]:
            reject = next((r for r in map(_reject, matmuls(region)) if r is not None), None)
            if reject is not None:
                if reject.reason:
                    ctx.missed(self.name, f"the weight is not split into halves: {reject.reason}", region)
                continue
            for place in range(len(matmuls(region))):
                site = site_of(region, place, staged)
                number = ctx.fuel.take() if not isinstance(site, Reject) else None
                if isinstance(site, Reject) or number is None:
                    continue
                w = region.operands[site.input]
                key = (w, site.transposed)
                if key not in made:
                    made[key] = halves.pack(Rewriter(g, region), w, site.transposed)
                ctx.passed(self.name, f"weight {w!r} split into halves: {made[key][0].type}", region, number)
                region = rebuilt(g, site, made[key], partial(halves.unpack, n=int(site.matmul.operands[1].shape[1])))
                changed = True
        return changed


def _reject(node: Node) -> Reject | None:
    """Why the second factor of a product is not split into halves, or None."""
    w = node.operands[1]
    if w.dtype != types.f32 or w.type.rank != 2 or not dims.is_static(w.shape):
        return Reject("")
    k, n = (int(d) for d in w.shape)
    if dims.numel(node.result.shape[:-1]) == 1 or not k:
        return Reject("")
    if k % halves.DEPTH or n < halves.COLUMNS:
        return Reject(f"{k} rows by {n} columns do not fill tiles of {halves.DEPTH} by {halves.COLUMNS}", w)
    return None

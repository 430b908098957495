"""matmul(x, w)  =>  matmul(x, (h + l) * share * unit),  h and l of f16, packed in tiles

Why: tiles of AMX-FP16 multiply f16, and sum in f32. With both factors as sums of two f16 three products of halves make one of f32, where
three bf16 each take six (``pack-weights``); and the weight is split once, not in each call. The packing depends on the weight alone: it is
computed once, at the first call, and again when the weight changes.

When: after ``fuse``, before ``pack-weights``, where the target has AMX-FP16 (``Target.f32_halves``), for regions of kind ``matmul``, if
each product's second operand is a staged (weight-only) f32 matrix, plain or transposed, K is a multiple of 32 and N at least 32.
A product that has one row at every call is left to ``pack-weights``, and one of few rows that reads its weight in place to
``weights-in-place``: they wait for memory, and f32 is as short. So is a weight that the compiled model owns and something else
reads by rows (a tied embedding): ``share-packed`` reads it in that form.

Numerics: ``(h + l) * share * unit`` is within 2**-22 of ``w``, and within 2**-39 of the largest of its row in units of the columns.

Reference: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
performance", IJHPCA 36(4), 2022. The form is :mod:`~graphopt.passes.layout.halves`.
"""

from __future__ import annotations

from functools import partial

from graphopt.ir import Graph, dims, types
from graphopt.ir.graph import Node, Value
from graphopt.ir.stage import Staged, staged_values
from graphopt.pass_manager import Pass
from graphopt.passes.layout import halves, weights_in_place
from graphopt.passes.layout.pack_weights import Site, site_of
from graphopt.passes.shared import matmuls, reread
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
        staged, made, changed = staged_values(g), dict[tuple[tuple[Value, bool], ...], list[list[Value]]](), False
        for region in [n for n in g.nodes() if n.op.name == "fusion" and n.attrs["kind"] == "matmul"]:
            found = [_site(region, place, staged, ctx) for place in range(len(matmuls(region)))]
            sites = [site for site in found if isinstance(site, Site)]
            if len(sites) < len(found):
                reason = next((r.reason for r in found if isinstance(r, Reject) and r.reason), "")
                if reason or sites:
                    ctx.missed(self.name, f"the weight is not split into halves: {reason or 'another factor is no weight'}", region)
                continue
            number = ctx.fuel.take()
            if number is None:
                continue
            key = tuple((region.operands[site.input], site.transposed) for site in sites)
            if key not in made:
                share, packed = halves.pack(Rewriter(g, region), key)
                made[key] = [[*p, share] for p in packed]
            for place, forms in enumerate(made[key]):
                site = site_of(region, place, staged)
                assert isinstance(site, Site)
                ctx.passed(self.name, f"weight {key[place][0]!r} split into halves: {forms[0].type}", region, number)
                weight = site.matmul.operands[1]
                region = reread(g, region, weight, forms, partial(halves.unpack, n=int(weight.shape[1])), by=site.matmul)
            changed = True
        return changed


def _site(region: Node, place: int, staged: Staged, ctx: PassContext) -> Site | Reject:
    """A product of a region, if its second factor can be split into halves."""
    if weights_in_place.suits(matmuls(region)[place], ctx):
        return Reject("")
    if reject := _reject(matmuls(region)[place]):
        return reject
    site = site_of(region, place, staged)
    if isinstance(site, Site) and ctx.owns_weights:
        w = region.operands[site.input]
        if any(user not in staged and user.op.name == "fusion" and user.attrs["kind"] != "matmul" for user in w.users):
            return Reject("something else reads it, and it would stay in memory twice", w)
    return site


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

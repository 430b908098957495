"""matmul(x[few rows, K], transpose([a b ...]))  =>  a region that reads a[N, K], b[M, K] ... where they lie

Why: with one row, or two, a product takes as long as reading its weight, and rows of ``[N, K]`` are a straight stream as they are (dot
products of rows with rows). Measured on two Zen 5 cores, K 1024 and N 3264, in place and packed (medians of one run): one row 313 and
312 us, two 316 and 320, three 259 and 232; K and N 512, in cache: 5.5 and 7.5. A packed copy would be as much memory again, and the time
to make it; so would be the weights of siblings (:mod:`~graphopt.passes.fusion.sibling_matmuls`), joined.

When: after ``fuse``, before ``pack-weights``, which leaves such products alone (:func:`suits`): ``ROWS`` rows or fewer, all axes together,
a frozen f32 weight that is read transposed (or bf16, where instructions multiply it), and a depth of ``DEPTH`` or more, so that sums
across a vector's lanes are little beside the rest. Declined, as the weight would be kept twice, where the compiled model owns its
weights (``own_weights=True``) and has programs for several sizes, which share packed ones. A weight that is a join of others is read
part by part; declined is one of other parts than frozen matrices ``[N, K]``.

Numerics: bitwise in the IR.   Reference: Blackford et al., "An updated set of basic linear algebra subprograms (BLAS)", ACM TOMS
28(2), 2002 (GEMV, of a transposed matrix).
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir import Builder, Graph, dims, types
from graphopt.ir.graph import Node, Value
from graphopt.pass_manager import Pass
from graphopt.passes.shared import matmuls, reread
from graphopt.rewrite import PassContext, erase_dead

ROWS = 2  # of the left operand, at most
DEPTH = 256  # terms of a sum, at least


class WeightsInPlace(Pass):
    """Products of few rows read joined weights where their parts lie. See the module's header.

    Args:
        rows: of the left operand at most.
        depth: terms of a sum at least.
    """

    name = "weights-in-place"
    rows: int = ROWS
    depth: int = DEPTH

    def run(self, g: Graph, ctx: PassContext) -> bool:
        changed = False
        for region in [n for n in g.nodes() if n.op.name == "fusion" and n.attrs["kind"] == "matmul"]:
            products = matmuls(region)
            if len(products) != 1 or not suits(products[0], ctx, self.rows, self.depth):
                continue
            weight = products[0].operands[1].producer
            assert weight is not None
            source = weight.operands[0]
            join = region.operands[source.index].defined_by("concat") if source.is_input else None
            if join is None:
                continue
            if join.attrs["axis"] % 2 != 0 or not all(v.is_input and v.weight and v.type.is_contiguous for v in join.operands):
                ctx.missed(self.name, "the joined weight is a copy: its parts are no frozen matrices that lie by rows", region)
                continue
            if len(join.results[0].uses) > 1:
                ctx.missed(self.name, "the joined weight is a copy that something else reads, too", region)
                continue
            if (number := ctx.fuel.take()) is None:
                continue
            size = dims.format_dim(join.result.type.nbytes())
            text = f"{len(join.operands)} weights are read where they lie, without a joined copy of {size} bytes"
            ctx.passed(self.name, text, region, number)
            reread(g, region, products[0].operands[1], join.operands, _joined, by=products[0])
            erase_dead(g, join)
            changed = True
        return changed


def suits(matmul: Node, ctx: PassContext, most: int = ROWS, least: int = DEPTH) -> bool:
    """Whether a product of a region reads its weight, an operand of the region, as fast where it lies as packed."""
    if (ctx.target is not None and ctx.target.kind != "cpu") or (ctx.owns_weights and ctx.variants):
        return False
    left, right = matmul.operands
    rows, depth, view = dims.numel(left.shape[:-1]), left.shape[-1], right.defined_by("transpose")
    few = isinstance(rows, int) and 1 <= rows <= most and isinstance(depth, int) and depth >= least
    pairs = ctx.target is not None and ctx.target.has("avx512_bf16") and left.dtype == right.dtype == types.bf16
    kind = right.dtype == types.f32 or pairs
    turned = view is not None and view.attrs["perm"] == (1, 0) and view.operands[0].type.is_contiguous
    return few and kind and turned


def _joined(b: Builder, parts: Sequence[Value]) -> Value:
    """Matrices ``[N, K]`` as one factor ``[K, N + M + ...]``."""
    return b.concat(*(b.transpose(v, perm=(1, 0)) for v in parts), axis=1)  # type: ignore[no-any-return]

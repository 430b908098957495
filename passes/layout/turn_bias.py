"""attention(q, k, v, bias)  =>  attention(q, k, v, transpose(turned)),  turned[..., n, m] = bias[..., m, n]

Why: the tiled kernel of attention keeps queries along the lanes, so that the softmax is plain vector operations; a bias that lies
query by query is transposed in registers at each call: 20 of the 115 us that a layer of T5 took.

When: after ``fuse``, on CPUs, for each region whose attention reads a bias that is made of weights alone (T5's and Swin's biases of
relative positions) and nothing else beside it, with a row for each of as many queries as a vector has lanes, or more. One that is computed
from an argument is left with a remark. The transpose stands outside of the region, with the queries padded to whole vectors; the
region's body transposes back, so that its meaning stays in the IR, and the kernel finds neighbouring queries side by side in memory.

Numerics: bitwise.   Reference: none; it is the order of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from graphopt.ir import Builder, Graph
from graphopt.ir.dims import Shape
from graphopt.ir.graph import Node, Value
from graphopt.ir.opset.attention import parts
from graphopt.ir.stage import staged_values
from graphopt.pass_manager import Pass
from graphopt.passes.shared import reread
from graphopt.rewrite import Numerics, PassContext, Rewriter


class TurnBias(Pass):
    """Keep the biases of attention with their queries side by side. See the module's header.

    Args:
        lanes: f32 elements of a vector register; None asks the target.
    """

    name = "turn-bias"
    numerics = Numerics.BITWISE
    lanes: int | None = None

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if self.lanes is None and (ctx.target is None or ctx.target.is_gpu):
            return False
        lanes = self.lanes or int(ctx.target.lanes(4))  # type: ignore[union-attr]
        staged, turned, changed = staged_values(g), dict[Value, Value](), False
        for region in [n for n in g.nodes() if n.op.name == "fusion" and n.attrs["kind"] in ("attention", "attention_forward")]:
            inside = _bias(region, lanes)
            if inside is None:
                continue
            bias = region.operands[inside.index]
            if bias not in staged:
                ctx.missed(self.name, "the bias is not made of weights alone: it is transposed at each call", region)
                continue
            if (number := ctx.fuel.take()) is None:
                continue
            if bias not in turned:
                turned[bias] = _turned(Rewriter(g, region), bias, lanes)
            ctx.passed(self.name, f"bias {bias!r} with its queries side by side: {turned[bias].type}", region, number)
            reread(g, region, inside, [turned[bias]], partial(_back, shape=inside.shape))
            changed = True
        return changed


def _bias(region: Node, lanes: int) -> Value | None:
    """The bias of a region's attention, an input of its body, if the kernel would transpose it."""
    assert region.body is not None
    node = next(n for n in region.body.nodes() if n.name == region.attrs["kind"])
    p = parts(node.operands, node.attrs)
    bias = p.bias
    if bias is None or p.mask is not None or not bias.is_input or len(bias.uses) > 1:
        return None
    if bias.type.rank < 2 or not bias.type.is_static or bias.shape[-1] == 1:
        return None
    rows = bias.shape[-2]
    return bias if isinstance(rows, int) and rows >= lanes else None


def _turned(b: Builder, bias: Value, lanes: int) -> Value:
    """``[..., M, N]`` as ``[..., N, M']``, M' a multiple of lanes."""
    rank, missing = bias.type.rank, -int(bias.shape[-2]) % lanes
    if missing:
        bias = b.pad(bias, low=(0,) * rank, high=(*(0,) * (rank - 2), missing, 0), value=0.0)
    return b.transpose(bias, perm=_swapped(rank))  # type: ignore[no-any-return]


def _swapped(rank: int) -> tuple[int, ...]:
    return (*range(rank - 2), rank - 1, rank - 2)


def _back(b: Builder, given: Sequence[Value], shape: Shape) -> Value:
    """The bias, of this shape, from the turned one."""
    back = b.transpose(given[0], perm=_swapped(len(shape)))
    return b.create("slice", [back], {"axis": len(shape) - 2, "stop": shape[-2]}) if back.shape != shape else back  # type: ignore[no-any-return]

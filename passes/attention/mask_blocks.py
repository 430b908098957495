"""attention(q, k, v, mask)  =>  attention(q, k, v, mask, table), the table saying which blocks the mask hides or leaves whole

Why: a kernel looks through a mask, a byte a pair and head, to leave out the blocks that it hides: of a sparse mask that takes a quarter of
the time. A table of blocks is a 512th of that, and is made once.
When: the mask is made of weights alone (a buffer of the model), so that the table is computed at the first call and again when the
buffer changes; it has a row for each query, more than a few, and sizes are known; the kernel would look through it. Not for GPUs.
Numerics: bitwise.
Reference: Zaheer et al., Big Bird, arXiv:2007.14062 (masks of blocks).
"""

from __future__ import annotations

from graphopt.ir import Value, dims, types
from graphopt.ir.graph import Graph, Node
from graphopt.ir.opset.attention import BLOCK, parts, table_shape
from graphopt.ir.stage import staged_values
from graphopt.pass_manager import Pass
from graphopt.passes.fusion.attention import FEW
from graphopt.rewrite import Numerics, PassContext, Rewriter


class MaskBlocks(Pass):
    """Make tables of the masks that a model has of its own. See the module's header.

    Args:
        least: pairs of a query and a key from which on a table is made.
    """

    name = "mask-blocks"
    numerics = Numerics.BITWISE
    least: int = 1 << 16

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if ctx.target is not None and ctx.target.is_gpu:
            return False
        staged, tables, changed = staged_values(g), dict[Value, Value](), False
        for node in g.nodes():
            mask = self._mask(node)
            if mask is None:
                continue
            if mask not in staged:
                why = "the mask is not made of weights alone, or would be too large to keep"
                ctx.missed(self.name, f"{why}: it is looked through at each call", node)
                continue
            if (number := ctx.fuel.take()) is None:
                continue
            ctx.passed(self.name, f"a table of the blocks of {mask.type}", node, number)
            rw = Rewriter(g, node)
            if mask not in tables:
                tables[mask] = table_of(rw, mask)
            at = node.operands.index(mask) + 1
            g.replace(node.result, rw.create("attention", [*node.operands[:at], tables[mask], *node.operands[at:]], dict(node.attrs)))
            g.erase(node)
            changed = True
        return changed

    def _mask(self, node: Node) -> Value | None:
        """The mask that a kernel would look through, block by block."""
        if node.op.name != "attention" or (node.attrs["empty"] == "mean" and not node.attrs["sinks"]):
            return None
        p = parts(node.operands, node.attrs)
        if p.mask is None or p.table is not None or p.mask.type.rank < 2 or not p.mask.type.is_static:
            return None
        rows, keys = (int(d) for d in p.mask.shape[-2:])
        return p.mask if rows > FEW and rows * keys >= self.least else None


def table_of(rw: Rewriter, mask: Value) -> Value:
    """See :func:`graphopt.ir.opset.attention.table_shape`."""
    shape, blocks = mask.shape, table_shape(mask.shape)
    lead, rank = shape[:-2], len(shape)
    missing = tuple(dims.sub(dims.mul(n, b), d) for n, b, d in zip(blocks[-2:], BLOCK, shape[-2:], strict=True))
    split = (*lead, blocks[-2], BLOCK[0], blocks[-1], BLOCK[1])

    def over(name: str, beyond: bool) -> Value:
        padded = rw.pad(mask, low=(0,) * rank, high=(*(0,) * len(lead), *missing), value=float(beyond)) if any(missing) else mask
        return rw.create(name, [rw.reshape(padded, shape=split)], {"axes": (rank - 1, rank + 1)})  # type: ignore[no-any-return]

    some, every = rw.cast(over("any", False), types.u8), over("all", True)
    return rw.where(every, rw.constant(3, types.u8), some)  # type: ignore[no-any-return]

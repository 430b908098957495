"""reshape(f(matmul(x[R, K], w) ...), [B, S, N])  =>  f(matmul(reshape(x, [B, S, K]), w) ...)

Why: PyTorch computes a linear layer on tokens flattened to a matrix and gives the result its axes back afterwards. That reshape
stands between the matmul and what follows (the residual, a norm), and fusion does not reach across it: one launch, one write
and two reads more. In front of the matmul it is an index map, and mostly cancels with the flattening.

When: the reshape keeps the last axis and divides the rows of a matrix; below it stand pointwise ops ``f`` (bias, activation), each
the only use of the one before, and a matmul with a matrix on the right. Other operands of ``f`` may be scalars, vectors
along the last axis (they broadcast as before), or of the full shape (they are reshaped). Declined, with a remark: a value in
between with other uses.

Numerics: bitwise.
Reference: the inverse of the flattening in ``torch.matmul`` (aten/src/ATen/native/LinearAlgebra.cpp, "folding").
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir import Trait, dims
from graphopt.ir.dims import Shape
from graphopt.ir.graph import Graph, Node, Value
from graphopt.pass_manager import Pass
from graphopt.rewrite import PassContext, Rewriter, erase_dead

_LONGEST = 16  # pointwise ops between the matmul and the reshape


@dataclass(frozen=True)
class _Chain:
    """A matmul, the pointwise ops after it in order, and at which operand each reads the one before."""

    matmul: Node
    after: tuple[tuple[Node, int], ...]


class Unflatten(Pass):
    """Move the reshape after a linear layer in front of it. See the module's header."""

    name = "unflatten"

    def run(self, g: Graph, ctx: PassContext) -> bool:
        changed = False
        for node in g.nodes():
            if not _splits_rows(node):
                continue
            found = _chain(node)
            if isinstance(found, str):
                ctx.missed(self.name, f"the reshape after a matmul stays: {found}", node)
                continue
            if found is None or (number := ctx.fuel.take()) is None:
                continue
            ctx.passed(self.name, "the reshape after the matmul moves to its operand", node, number)
            _rewrite(g, node, found)
            changed = True
        return changed


def _splits_rows(node: Node) -> bool:
    """[R, N] to [..., N] of a higher rank."""
    if node.op.name != "reshape":
        return False
    before, after = node.operands[0].shape, node.results[0].shape
    return len(before) == 2 and len(after) > 2 and dims.same(before[-1], after[-1], node.graph.symbols)


def _chain(reshape: Node) -> _Chain | str | None:
    """What the reshape can move across; in words what is in the way, if a matmul stands there; None if none does."""
    found = _search(reshape.operands[0], _LONGEST)
    if found is None:
        return None
    for n in (found.matmul, *(n for n, _ in found.after)):
        if not n.results[0].has_one_use:
            return f"the result of {n.op.name} has other uses"
    return found


def _search(value: Value, steps: int) -> _Chain | None:
    node = value.producer
    if node is None or steps == 0:
        return None
    if node.op.name == "matmul":
        return _Chain(node, ()) if node.operands[0].type.rank == node.operands[1].type.rank == 2 else None
    if not node.op.has(Trait.POINTWISE) or not all(_movable(v, value.shape) for v in node.operands):
        return None
    for i, v in enumerate(node.operands):
        if dims.same_shape(v.shape, value.shape) and (found := _search(v, steps - 1)):
            return _Chain(found.matmul, (*found.after, (node, i)))
    return None


def _movable(v: Value, shape: Shape) -> bool:
    """Whether a pointwise operand reads the same after the rows were divided: no rows of its own, or all of them."""
    return v.type.rank < 2 or v.shape[0] == 1 or dims.same_shape(v.shape, shape)


def _rewrite(g: Graph, reshape: Node, chain: _Chain) -> None:
    rows = reshape.results[0].shape[:-1]
    x, w = chain.matmul.operands
    rw = Rewriter(g, chain.matmul)
    value: Value = rw.create("matmul", [_divided(rw, x, rows), w], dict(chain.matmul.attrs))
    for node, at in chain.after:
        rw = Rewriter(g, node)
        operands = [
            value if i == at else _divided(rw, v, rows) if v.type.rank == 2 and v.shape[0] != 1 else v for i, v in enumerate(node.operands)
        ]
        value = rw.create(node.op.name, operands, dict(node.attrs))
    g.replace(reshape.results[0], value)
    erase_dead(g, reshape)


def _divided(rw: Rewriter, v: Value, rows: Shape) -> Value:
    """[R, C] to [*rows, C]; what was flattened from that shape is taken as it was."""
    shape = (*rows, v.shape[-1])
    flat = v.defined_by("reshape")
    return flat.operands[0] if flat is not None and dims.same_shape(flat.operands[0].shape, shape) else rw.reshape(v, shape)

"""composite(x)  =>  its expansion, where no kernel takes the composite whole

Why: rope, group_norm and the like have no kernel of their own; their parts have, and fuse with what is around them.

When: the op has an expansion and is not in ``keep``. A kept op over rows (softmax, layer_norm, mean, var ...) is expanded all
the same if its rows are not the trailing axes, where no kernel has a row at hand; but for a softmax on a CPU whose rows lie side by side:
strips of them are one kernel, unless they are few and long. Composites within an expansion are
treated alike. An attention stays whole where its tiled kernel is estimated to be the faster one
(:mod:`~graphopt.passes.fusion.attention`). Complex and 8-bit float composites are left to the library. In f16 and bf16, what
sums is expanded in f32 and rounded once at the end, as PyTorch does it.

Numerics: the expansion is the op's definition; sums may be taken in another order (REASSOCIATES).
Reference: Vasilache et al., "Composable and Modular Code Generation in MLIR", arXiv:2202.03293, on progressive lowering.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.errors import UsageError, nearest
from graphopt.ir import OPS, Listener, Trait
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.types import bf16, f16, f32
from graphopt.pass_manager import Pass
from graphopt.passes.fusion.attention import choose, untrainable
from graphopt.passes.fusion.cost import CostModel
from graphopt.passes.fusion.roles import ROW_OPS, ROW_REDUCTIONS, TRAINING, fusable_dtype, rows_of
from graphopt.rewrite import PassContext, Rewriter, erase_dead

_STATISTICS = (*ROW_OPS, "mean", "var", "batch_norm", "group_norm")  # composites that sum, and so need the range and digits of f32
_BY_ROWS = (*ROW_OPS, *ROW_REDUCTIONS)
_ACTIVATIONS = tuple(name for name, op in OPS.items() if op.has(Trait.COMPOSITE) and op.has(Trait.POINTWISE))


class Expand(Pass):
    """Expand composites that no kernel takes whole. See the module's header.

    Args:
        keep: names of the composites that stay.
    """

    name = "expand"
    keep: tuple[str, ...] = (*ROW_OPS, "mean", "var", "attention", *TRAINING, *_ACTIVATIONS)

    def requires(self, g: Graph) -> None:
        for name in self.keep:
            if name not in OPS:
                raise UsageError(f"expand: keep names {name!r}, which is no op{nearest(name, OPS)}")

    def run(self, g: Graph, ctx: PassContext) -> bool:
        changed = False
        for node in g.nodes():
            waiting = [node]
            while waiting:
                current = waiting.pop()
                if current.erased or (why := self._why(current, ctx)) is None:
                    continue
                number = ctx.fuel.take()
                if number is None:
                    continue
                ctx.passed(self.name, f"{current.op.name} is expanded: {why}", current, number)
                waiting += _expand(g, current)
                changed = True
        return changed

    def _why(self, node: Node, ctx: PassContext) -> str | None:
        """The reason to expand a node, or None to leave it."""
        if node.op.expand is None or not all(fusable_dtype(v.dtype) for v in (*node.operands, *node.results)):
            return None
        if node.op.name not in self.keep:
            return "no kernel takes it whole"
        rows = rows_of(node) if node.op.name in _BY_ROWS else None
        on_gpu = ctx.target is not None and ctx.target.is_gpu
        if node.op.name in _BY_ROWS and (rows is None or (rows.behind and on_gpu)):
            return "its rows are not the trailing axes"
        if node.op.name in TRAINING:
            return untrainable(node, ctx.target)
        if node.op.name == "attention":
            choice = choose(node, CostModel(ctx.target, node.graph.symbols))
            if not choice.whole:
                return choice.why
            ctx.analysis(self.name, f"attention stays whole: {choice.why}", node)
        return None


def _through_f32(rw: Rewriter, node: Node) -> Value:
    """The expansion of a half-precision composite, in f32 and rounded once at the end, as PyTorch's kernels compute it."""
    wide = rw.create(node.op.name, [rw.cast(v, f32) for v in node.operands], dict(node.attrs)).producer
    out = rw.cast(rw.expand(wide), node.results[0].dtype)
    rw.graph.erase(wide)
    return out


def expansion(rw: Rewriter, node: Node) -> Sequence[Value]:
    """What computes a composite's results by other ops; the node stays."""
    through_f32 = node.op.name in _STATISTICS and node.results[0].dtype in (f16, bf16)
    return (_through_f32(rw, node),) if through_f32 else rw.expand_all(node)


class _Created(Listener):
    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def created(self, node: Node) -> None:
        self.nodes.append(node)


def _expand(g: Graph, node: Node) -> list[Node]:
    """Put a node's expansion in its place; returns the new nodes."""
    created = _Created()
    g.listeners.append(created)
    try:
        new = expansion(Rewriter(g, node), node)
    finally:
        g.listeners.remove(created)
    for old, value in zip(node.results, new, strict=True):
        g.replace(old, value)
    erase_dead(g, node)
    return created.nodes

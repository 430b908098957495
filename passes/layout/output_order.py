"""return transpose(x)  =>  return copy(x);  reshape(transpose(x))  =>  copy(x);  return f(x), with strides  =>  return transpose(f'(x))

where copy is a region that does nothing but move elements, and f' is f that writes its result in the order of those strides.

Why: a caller expects a result in the layout that PyTorch gives it: row-major, or as the operands lie (channels last, heads in front).
What is computed in another layout is transposed on the way out; so are views that cannot be views (windows of an image, shuffled
channels). A program hands the elements to PyTorch to copy; a kernel of our own reads and writes whole vectors, transposes in registers,
and runs among the others: 10 instead of 90 us for MobileNetV2's 1280 x 7 x 7. A pointwise region that writes in the
wanted order has nothing left to copy: ReLU of a channels-last image was transposed twice.

When: after ``fuse``, for sizes that are known: a result of the graph that is not in its order, whose order is one of its axes without
gaps, and that is used for nothing else; and a reshape that must move elements, unless it is of weights. What a pointwise region
computes for that alone, the region computes in that order itself.

Numerics: bitwise.   Reference: none; it is a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir import dims, types
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph, Node, Value, copy_nodes, is_view
from graphopt.ir.ops import op
from graphopt.ir.stage import staged_values
from graphopt.ir.strides import same_places, strides_of, view_strides
from graphopt.pass_manager import Pass
from graphopt.passes.fusion.outline import outline
from graphopt.rewrite import PassContext, erase_dead

_DTYPES = (types.f64, types.f32, types.f16, types.bf16, types.i64, types.i32, types.i16, types.i8, types.u8, types.b1)
_MAX_RANK = 8


class OutputOrder(Pass):
    """Move elements by kernels. See the module's header."""

    name = "output-order"

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if ctx.target is not None and ctx.target.kind != "cpu":
            return False
        changed, staged = False, staged_values(g)
        for node in g.nodes():
            if node.erased or node.op.name != "reshape" or not _movable(node.result) or staged.node(node):
                continue
            given = strides_of(node.operands[0])
            if given is None or view_strides(node, given) is not None:
                continue
            if (number := ctx.fuel.take()) is None:
                continue
            ctx.passed(self.name, "a reshape that moves elements is a kernel", node, number)
            _in_a_region(g, node)
            changed = True
        for k, (v, strides) in enumerate(zip(g.outputs, g.output_strides, strict=True)):
            perm = _wanted(v, strides)
            if perm is None or v in staged or (number := ctx.fuel.take()) is None:
                continue
            at = v.producer if v.producer is not None else g.ret
            ctx.passed(self.name, "a result is written in its order by a kernel", at, number)
            _reorder(g, k, v, perm)
            changed = True
        return changed


def _movable(v: Value) -> bool:
    """Whether kernels move such elements, and there are any."""
    return v.type.is_static and 0 not in v.shape and v.dtype in _DTYPES and v.type.rank <= _MAX_RANK


def _wanted(v: Value, strides: dims.Shape | None) -> list[int] | None:
    """The axes of a result from the outermost to the innermost as it is wanted in memory; None if it lies so, or is not to be copied."""
    if not v.has_one_use or not _movable(v) or (strides is not None and not dims.is_static(strides)):
        return None
    shape = [int(d) for d in v.shape]
    wanted = [int(s) for s in (strides or dims.contiguous_strides(v.shape))]
    have = strides_of(v)
    if have is None or same_places(shape, have, wanted):
        return None
    perm = sorted(range(len(shape)), key=lambda a: (-wanted[a], shape[a] != 1, a))
    ordered = [shape[a] for a in perm]
    dense = same_places(ordered, [wanted[a] for a in perm], [int(s) for s in dims.contiguous_strides(ordered)])
    return perm if dense else None


def _reorder(g: Graph, k: int, v: Value, perm: Sequence[int]) -> None:
    """Make output k a view of a region's result in which its axes stand in the order of ``perm``."""
    b = Builder(g, before=g.ret)
    shape = [int(d) for d in v.shape]
    moved = [a for a in perm if shape[a] != 1] != [a for a in range(len(shape)) if shape[a] != 1]
    turned = b.create("transpose", [v], {"perm": tuple(perm)}) if moved or v.producer is None or not is_view(v.producer) else v
    root = turned.producer
    assert root is not None
    if turned is not v:
        back = b.transpose(turned, perm=tuple(perm.index(a) for a in range(len(perm))))
        g.set_outputs([back if i == k else x for i, x in enumerate(g.outputs)], g.output_strides)
    _in_a_region(g, root)


def _in_a_region(g: Graph, root: Node) -> None:
    """Put a view, and those that it alone is of, into a region: into a pointwise one that computes what they show."""
    views = [root]
    while (before := views[0].operands[0].producer) is not None and is_view(before) and _alone(before) and _movable(before.result):
        views.insert(0, before)
    source = before
    if source is not None and _writes(source):
        assert source.body is not None
        body = source.body.clone()
        mapping = {source.result: body.outputs[0]}
        copy_nodes(views, mapping, body)
        body.set_outputs([mapping[root.result]])
        fusion = g.create(op("fusion"), source.operands, dict(source.attrs), before=root, loc=source.loc, body=body)
        g.replace(root.result, fusion.result)
    else:
        outline(g, views, "pointwise")
    erase_dead(g, root)


def _alone(node: Node) -> bool:
    """Whether a node's only result has one reader."""
    return len(node.results) == 1 and node.result.has_one_use


def _writes(node: Node) -> bool:
    """Whether a region computes elements for one reader alone, each by itself."""
    if node.op.name != "fusion" or node.attrs["kind"] != "pointwise" or not _alone(node):
        return False
    return node.body is not None and node.body.output_strides == [None]

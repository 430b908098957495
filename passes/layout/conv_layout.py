"""conv(x, w)  =>  to_first(conv(to_last(x), to_last(w), channels_last)),  f(to_first(y), ...)  =>  to_first(f(y, to_last(...)))

Why: with the channels innermost, every tap of a kernel is a product of contiguous rows, a 1x1 convolution is a matrix
product as it stands, and all vectors of a pixel are full whatever the image's size. ``to_last`` and ``to_first`` are
transposes; where a channels-last value is read by the next convolution they cancel, so that a whole network runs in that
layout and only its ends are transposed.

A transposed convolution becomes ordinary ones, one for each phase of its strides (:mod:`~graphopt.passes.layout.phases`); where
all have the same window, as with a kernel of the strides' size, they are one. Their results are interleaved.

When: a convolution with 1 to 3 spatial axes, and a weight and a number of channels of known size, for a CPU or a GPU. What follows is
carried along as far as it goes: pointwise ops (other operands broadcast along the same axes), sums, means and extremes,
pooling, pad, slice, take by a vector, and concat if half of its bytes are in the layout (the lesser part is transposed). Pooling
and take also begin with an input that lies in memory so. Everything else reads the value through the transpose. Declined, with a
remark: unknown sizes, and integers that are not summed in 32 bits. A pad that only one of them reads, or a rounding by
one scale an image, is done behind the transpose.

Numerics: bitwise in the IR; a kernel may sum in another order.
Reference: Liu et al., "Optimizing CNN Model Inference on CPUs", USENIX ATC 2019, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphopt.ir import Trait, dims
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.opset.window import WINDOWS
from graphopt.pass_manager import Pass
from graphopt.passes.expand import expansion
from graphopt.passes.fusion.cost import CostModel
from graphopt.passes.fusion.roles import rows_of
from graphopt.passes.layout import phases
from graphopt.rewrite import PassContext, Rewriter, erase_dead

_REDUCTIONS = ("sum", "prod", "mean", "max", "min", "any", "all", "var")


def last_perm(rank: int) -> tuple[int, ...]:
    """From [N, C, *S] to [N, *S, C]."""
    return (0, *range(2, rank), 1)


def first_perm(rank: int) -> tuple[int, ...]:
    """From [N, *S, C] to [N, C, *S]."""
    return (0, rank - 1, *range(1, rank - 1))


class ConvLayout(Pass):
    """Compute convolutions, and what follows them, with the channels last. See the module's header."""

    name = "conv-layout"

    def parts(self) -> Sequence[type]:
        return [type(self), CostModel]

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if ctx.target is not None and ctx.target.kind != "cpu" and not ctx.target.is_gpu:
            return False
        walk = _Walk(g, CostModel(ctx.target, g.symbols))
        changed = False
        for node in g.nodes():
            if node.erased:
                continue
            if node.op.name in ("conv", "conv_transpose") and (reason := _declined(node)):
                ctx.missed(self.name, f"the convolution keeps its layout: {reason}", node)
                continue
            make = walk.maker(node)
            if make is None or (number := ctx.fuel.take()) is None:
                continue
            ctx.passed(self.name, f"{node.op.name} is computed with its channels last", node, number)
            walk.replace(node, make)
            changed = True
        return changed


def _declined(conv: Node) -> str | None:
    x, w = conv.operands
    if not dims.is_static(w.shape) or not isinstance(x.shape[1], int):
        return "its weight or its channels are of unknown size"
    return None if x.dtype.is_float or conv.attrs.get("acc") is not None else f"its dtype is {x.dtype}"


def _channels_innermost(v: Value) -> bool:
    """Whether an input lies in memory with its channels last."""
    if not v.is_input or v.type.strides is None or not 3 <= v.type.rank <= 5:
        return False
    perm = last_perm(v.type.rank)
    return tuple(v.type.strides[p] for p in perm) == dims.contiguous_strides([v.shape[p] for p in perm])


Make = Callable[[Rewriter], Value]


class _Walk:
    """The values that are views of channels-last ones, and how to go on from them."""

    def __init__(self, g: Graph, costs: CostModel) -> None:
        self.graph, self.costs = g, costs
        self.twins: dict[Value, Value] = {}  # [N, C, *S] -> the same as [N, *S, C]

    def maker(self, node: Node) -> Make | None:
        """How to compute a node with the channels last, if it is one for that."""
        name = node.op.name
        if name == "conv":
            return None if node.attrs["channels_last"] else lambda rw: self._conv(rw, node)
        if name == "conv_transpose":
            return lambda rw: phases.build(rw, node, self.last(rw, node.operands[0]))
        begins = name in (*WINDOWS, "take") and _channels_innermost(node.operands[0])
        if len(node.results) != 1 or not (begins or any(v in self.twins for v in node.operands)):
            return None
        if name in WINDOWS and node.attrs["channels_last"]:  # it takes axis 1 for space already
            return None
        if node.op.has(Trait.POINTWISE):
            return (lambda rw: self._pointwise(rw, node)) if self._lined_up(node) else None
        if name in _REDUCTIONS:
            return (lambda rw: self._reduction(rw, node)) if self._keeps_order(node) else None
        if name == "concat":
            ready, other = ([v for v in node.operands if (v in self.twins) is there] for there in (True, False))
            return (lambda rw: self._concat(rw, node)) if not self.costs.is_less(ready, other) else None
        if name in WINDOWS:
            return lambda rw: self._pool(rw, node)
        if name == "take" and (not (begins or node.operands[0] in self.twins) or node.operands[1].type.rank != 1):
            return None
        makers: dict[str, Make] = {
            "pad": lambda rw: self._pad(rw, node), "slice": lambda rw: self._slice(rw, node), "take": lambda rw: self._take(rw, node),
        }  # fmt: skip
        return makers.get(name)

    def replace(self, node: Node, make: Make) -> None:
        """Put the channels-last computation in the node's place."""
        rw, old = Rewriter(self.graph, node), node.results[0]
        new = make(rw)
        if node.op.name in _REDUCTIONS and not node.attrs["keepdims"]:  # what is left of the axes stands as before
            view = new
        else:
            view = rw.transpose(new, perm=first_perm(new.type.rank))
            self.twins[view] = new
        self.graph.replace(old, view)
        erase_dead(self.graph, node)

    def last(self, rw: Rewriter, v: Value) -> Value:
        """The channels-last form of a value of full rank."""
        if v not in self.twins:
            before = v.defined_by("pad", "quantize") if v.has_one_use else None
            # zeros and integers behind the transpose are the convolution's to read; in front of it they would be a copy of the image
            if before is not None and before.op.name == "pad":
                self.twins[v] = self._pad(rw, before)
            elif before is not None and all(d == 1 for s in before.operands[1:] for d in s.shape[1:]):
                scales = [self._operand(rw, s, v.type.rank) for s in before.operands[1:]]
                image = self.last(rw, before.operands[0])  # itself, even where it has the shape of a vector
                self.twins[v] = rw.create("quantize", [image, *scales], dict(before.attrs))
            else:
                self.twins[v] = rw.transpose(v, perm=last_perm(v.type.rank))
        return self.twins[v]

    # --- nodes ----------------------------------------------------------------------------------------------------------

    def _conv(self, rw: Rewriter, node: Node) -> Value:
        x, w = node.operands
        n = x.type.rank - 2
        weight = rw.transpose(w, perm=(*range(2, n + 2), 1, 0))
        return rw.create("conv", [self.last(rw, x), weight], {**node.attrs, "channels_last": True})  # type: ignore[no-any-return]

    def _lined_up(self, node: Node) -> bool:
        """Whether all operands have the rank of the result, or broadcast along the axes below it."""
        rank = node.results[0].type.rank
        return any(v in self.twins and v.type.rank == rank for v in node.operands) and all(v.type.rank <= rank for v in node.operands)

    def _pointwise(self, rw: Rewriter, node: Node) -> Value:
        rank = node.results[0].type.rank
        return rw.create(node.op.name, [self._operand(rw, v, rank) for v in node.operands], dict(node.attrs))  # type: ignore[no-any-return]

    def _operand(self, rw: Rewriter, v: Value, rank: int) -> Value:
        shape = (*[1] * (rank - v.type.rank), *v.shape)
        if v.type.rank == 0:
            return v
        if v in self.twins and v.type.rank == rank:  # it gives the result its rank, even where it has the shape of a vector
            return self.twins[v]
        if all(d == 1 for d in (shape[0], *shape[2:])):  # a vector over the channels
            return rw.reshape(v, shape=(shape[1],))
        if v.type.rank == rank:
            return self.last(rw, v)
        return rw.transpose(rw.reshape(v, shape=shape), perm=last_perm(rank))

    def _keeps_order(self, node: Node) -> bool:
        """Whether what is left of the axes stands in the same order in both layouts."""
        if node.attrs["keepdims"]:
            return True
        rank = node.operands[0].type.rank
        gone = [a % rank for a in node.attrs["axes"]]
        return 1 in gone or all(a in gone for a in range(2, rank))

    def _reduction(self, rw: Rewriter, node: Node) -> Value:
        x = node.operands[0]
        place = last_perm(x.type.rank)
        axes = tuple(sorted(place.index(a % x.type.rank) for a in node.attrs["axes"]))
        out = rw.create(node.op.name, [self.last(rw, x)], {**node.attrs, "axes": axes})
        if node.op.name != "var" or rows_of(out.producer) is not None:
            return out  # type: ignore[no-any-return]
        (parts,) = expansion(rw, out.producer)  # only a variance of rows has a kernel; ``expand`` has seen it as one
        rw.graph.erase(out.producer)
        return parts

    def _concat(self, rw: Rewriter, node: Node) -> Value:
        rank = node.results[0].type.rank
        axis = last_perm(rank).index(node.attrs["axis"] % rank)
        return rw.create("concat", [self.last(rw, v) for v in node.operands], {"axis": axis})  # type: ignore[no-any-return]

    def _pad(self, rw: Rewriter, node: Node) -> Value:
        perm = last_perm(node.results[0].type.rank)
        sides = {side: tuple(node.attrs[side][p] for p in perm) for side in ("low", "high")}
        return rw.create("pad", [self.last(rw, node.operands[0])], {**node.attrs, **sides})  # type: ignore[no-any-return]

    def _slice(self, rw: Rewriter, node: Node) -> Value:
        rank = node.results[0].type.rank
        axis = last_perm(rank).index(node.attrs["axis"] % rank)
        return rw.create("slice", [self.last(rw, node.operands[0])], {**node.attrs, "axis": axis})  # type: ignore[no-any-return]

    def _take(self, rw: Rewriter, node: Node) -> Value:
        x, index = node.operands
        axis = last_perm(x.type.rank).index(node.attrs["axis"] % x.type.rank)
        return rw.create("take", [self.last(rw, x), index], {**node.attrs, "axis": axis})  # type: ignore[no-any-return]

    def _pool(self, rw: Rewriter, node: Node) -> Value:
        return rw.create(node.op.name, [self.last(rw, node.operands[0])], {**node.attrs, "channels_last": True})  # type: ignore[no-any-return]

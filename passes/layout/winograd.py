"""conv(x, w[3, 3, C, O])  =>  conv(x, restore(transform(w))),  transform(w)[j, 4 p + q, c, i] = (G w G')[p, q, c, j * nr + i]

Why: Winograd's F(2x2, 3x3) computes a square of four results of a 3x3 convolution from sixteen products a channel instead of
thirty-six; the rest is additions. The sixteen products of all squares and channels are sixteen matrix products, whose second
factors depend on the weight alone: they are computed once, at the first call, and again when the weight changes.

When: after ``fuse`` and before ``pack-filters``, for a region of kind ``conv`` whose weight is a staged (weight-only) f32 value
behind views: 3x3, without strides, dilation or groups, on an image of known size, with channels that fill the vector
registers. The transformed weight is 16 / 9 of the plain one, and the results are transformed, too: declined with a remark
are fewer than 32 squares, fewer than 32 channels, and more than 1024, whose sums would be long.

The transform stands outside of the region; the region's body takes it back, so that its meaning stays in the IR, and the kernel
reads the transformed weight wherever it knows it. ``G`` is [[1, 0, 0], [1/2, 1/2, 1/2], [1/2, -1/2, 1/2], [0, 0, 1]]; so of its rows
the first and the last are those of w, and the difference of the others is the middle one.

Numerics: the weight is transformed in f64 and rounded once. The kernel adds and subtracts parts of the image before it
multiplies: the error stays near a direct sum's (the same budget holds), but an infinity or a nan spreads within its square,
and numbers above a quarter of f32's largest overflow.
Reference: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
"""

from __future__ import annotations

from typing import cast

from graphopt.ir import Builder, Graph, dims, types
from graphopt.ir.graph import Node, Value, copy_nodes
from graphopt.ir.stage import staged_values
from graphopt.pass_manager import Pass
from graphopt.passes.layout.pack_filters import in_thirds, origin, weight_of
from graphopt.passes.shared import reread
from graphopt.rewrite import PassContext, Reject, Rewriter
from graphopt.target import Target

VECTORS = 2  # of channels, a panel
SQUARES = 32  # of results: with fewer, reading the larger weight costs what is saved
CHANNELS = range(32, 1025)


class WinogradFilters(Pass):
    """Transform the weights of 3x3 convolutions. See the module's header.

    Args:
        width: output channels of a panel; None asks the target.
        squares: of results that an image must have.
    """

    name = "winograd-filters"
    width: int | None = None
    squares: int = SQUARES

    def run(self, g: Graph, ctx: PassContext) -> bool:
        target = ctx.target
        if self.width is None and (target is None or target.kind != "cpu"):
            return False
        sites = [n for n in g.nodes() if n.op.name == "fusion" and n.attrs["kind"] == "conv"]
        staged, changed = staged_values(g), False
        transformed: dict[tuple[object, ...], Value] = {}
        for fusion in sites:
            found = weight_of(fusion, staged)
            if isinstance(found, Reject):
                continue
            conv, chain = found
            nr = self.width or VECTORS * cast(Target, target).lanes(types.f32.itemsize)
            refused = self._declined(conv, nr)
            if refused is None and self.width is None and in_thirds(conv, cast(Target, target)):
                refused = Reject("the target's AMX tiles multiply as fast without it, and err less")
            if refused is not None:
                if refused.reason:
                    ctx.missed(self.name, f"not by Winograd's transform: {refused.reason}", fusion)
                continue
            if (number := ctx.fuel.take()) is None:
                continue
            w = conv.operands[1]
            source = fusion.operands[origin(w).index]
            key = (source, *((n.op.name, *n.attrs.values()) for n in chain))
            if key not in transformed:
                mapping = {origin(w): source}
                copy_nodes(chain, mapping, g, fusion)
                transformed[key] = transform(Rewriter(g, fusion), mapping[w], nr)
            ctx.passed(self.name, f"weight {source!r} becomes {transformed[key].type}", fusion, number)
            reread(g, fusion, w, [transformed[key]], lambda b, given: restore(b, given[0]), by=conv)
            changed = True
        return changed

    def _declined(self, conv: Node, nr: int) -> Reject | None:
        x, w = conv.operands
        a = conv.attrs
        if w.shape[:-2] != (3, 3) or a["groups"] != 1 or set(a["stride"]) | set(a["dilation"]) != {1} or w.dtype != types.f32:
            return Reject("")
        result = conv.results[0].shape
        if not dims.is_static(x.shape) or not dims.is_static(result):
            return Reject("the image is of unknown size", x)
        channels, filters = (int(d) for d in w.shape[-2:])
        if filters % nr or channels % max(1, nr // VECTORS):
            return Reject(f"{channels} and {filters} channels do not fill the vectors", w)
        if self.width is None and not (channels in CHANNELS and filters in CHANNELS):
            return Reject(f"{channels} and {filters} channels", w)
        n, height, width, _ = (int(d) for d in result)
        squares = n * -(-height // 2) * -(-width // 2)
        return Reject(f"{squares} squares of results for a weight that grows", x) if squares < self.squares else None


def transform(b: Builder, w: Value, nr: int) -> Value:
    """``[3, 3, C, O]`` to ``[O / nr, 16, C, nr]``."""
    v = b.cast(w, types.f64)
    for axis in (0, 1):
        first, middle, last = (b.slice(v, axis=axis, start=i, stop=i + 1) for i in range(3))
        half, ends = b.constant(0.5, types.f64), b.add(first, last)
        both = [b.mul(b.add(ends, middle), half), b.mul(b.sub(ends, middle), half)]
        v = b.concat(first, *both, last, axis=axis)
    channels, filters = (int(d) for d in w.shape[-2:])
    v = b.reshape(b.cast(v, w.dtype), shape=(16, channels, filters // nr, nr))
    return b.transpose(v, perm=(2, 0, 1, 3))


def restore(b: Builder, u: Value) -> Value:
    """The inverse of :func:`transform`, up to rounding; always the same nodes."""
    panels, _, channels, nr = (int(d) for d in u.shape)
    v = b.create("transpose", [u], {"perm": (1, 2, 0, 3)})
    v = b.create("reshape", [v], {"shape": (4, 4, channels, panels * nr)})
    for axis in (0, 1):
        rows = [b.create("slice", [v], {"axis": axis, "start": i, "stop": i + 1}) for i in range(4)]
        v = b.create("concat", [rows[0], b.create("sub", rows[1:3], {}), rows[3]], {"axis": axis})
    return v

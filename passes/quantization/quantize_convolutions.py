"""conv(x, w)  =>  dequantize(conv(quantize(x, s), quantize(w, t)) {acc = i32}, s * t),  s = max |x| / 127 an image, t an output channel

Why: the same as of matrix products (:mod:`~graphopt.passes.quantization.quantize_products`): instructions multiply 8-bit integers
several times as fast as f32, and weight and image are a quarter of the bytes. Every tap reads the image again, so its rounding, once
an element, costs less than that of a matrix. Zeros around an image are zeros as integers: padding stays exact.

When: only where a scheme is asked for (``options={"quantize": "int8-dynamic"}``), after batch norms have been folded, for each
convolution of f32 in one group whose weight is staged (weight-only). Convolutions of one image share its rounding. Zeros that are padded
around the image are put around the integers. Declined with a remark: groups, other dtypes, images of unknown size, weights of fewer than
``least`` elements or 16 filters, and sums of more than 2^17 terms, which an i32 may not hold.

Numerics: lossy. An element of either factor moves by half a step of its scale at most.
Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877; scales an output channel as in Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference",
arXiv:1806.08342.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from graphopt.ir import dims, types
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.stage import Staged, staged_values
from graphopt.pass_manager import Pass
from graphopt.passes.layout import fours
from graphopt.passes.quantization.quantize_products import MOST_TERMS
from graphopt.passes.quantization.quantize_weights import scales
from graphopt.rewrite import Numerics, PassContext, Reject, Rewriter, erase_dead


class QuantizeConvolutions(Pass):
    """Sum products of 8-bit integers in the place of floats. See the module's header.

    Args:
        least: elements of the smallest weight that is quantized.
    """

    name = "quantize-convolutions"
    numerics = Numerics.LOSSY
    least: int = 1 << 12

    def run(self, g: Graph, ctx: PassContext) -> bool:
        staged, changed = staged_values(g), False
        images, weights = dict[Value, tuple[Value, Value]](), dict[Value, tuple[Value, Value]]()
        for node in g.nodes():
            if node.op.name != "conv" or node.attrs["acc"] is not None:
                continue
            x, w = node.operands
            if reject := self._reject(node, staged):
                if reject.reason:
                    ctx.missed(self.name, f"the convolution stays in floats: {reject.reason}", node)
                continue
            number = ctx.fuel.take()
            if number is None:
                continue
            rw = Rewriter(g, node)
            if x not in images:
                images[x] = rounded_image(rw, x)
            if w not in weights:
                weights[w] = _rounded_weight(rw, w, node.attrs["channels_last"])
            (q, s), (p, t) = images[x], weights[w]
            ctx.passed(self.name, f"the image {x.type} and weight {w!r} are multiplied as integers", node, number)
            g.replace(node.result, integer_convolution(rw, q, s, p, t, node.attrs))
            erase_dead(g, node)
            changed = True
        return changed

    def _reject(self, node: Node, staged: Staged) -> Reject | None:
        x, w = node.operands
        if w not in staged or not dims.is_static(w.shape) or x in staged:
            return Reject("")
        if w.dtype != types.f32:
            return Reject(f"it is of {w.dtype}, only f32 is quantized", w)
        if node.attrs["groups"] != 1:
            return Reject(f"it has {node.attrs['groups']} groups", w)
        if not dims.is_static(x.shape[1:]):
            return Reject("its image is of unknown size", x)
        filters = int(w.shape[-1 if node.attrs["channels_last"] else 0])
        terms = prod(int(d) for d in w.shape) // max(filters, 1)
        if filters * terms < self.least or filters < fours.LEAST:
            return Reject(f"its weight has {filters} filters of {terms} elements, too few", w)
        return Reject(f"sums of {terms} terms may exceed 32 bits", w) if terms > MOST_TERMS else None


def rounded_image(b: Builder, x: Value) -> tuple[Value, Value]:
    """Images ``[N, ...]`` of f32 as i8, and their scales ``[N, 1, ...]``: the largest magnitude of each becomes 127."""
    pad = x.defined_by("pad")
    if pad is not None and pad.attrs["value"] == 0.0:
        q, s = rounded_image(b, pad.operands[0])
        return b.create("pad", [q], {**pad.attrs, "value": 0}), s
    return _rounded(b, x, tuple(range(1, x.type.rank)))


def _rounded(b: Builder, x: Value, axes: tuple[int, ...]) -> tuple[Value, Value]:
    """f32 as i8, and the scales: one for all elements along some axes."""
    s, _ = scales(b, x, axes, 8, False)
    return b.create("quantize", [x, s], {"dtype": types.i8, "bits": 8}), s


def _rounded_weight(b: Builder, w: Value, channels_last: bool) -> tuple[Value, Value]:
    """A weight as i8, and scales of its output channels that broadcast to the convolution's result."""
    rank = w.type.rank
    if channels_last:
        return _rounded(b, w, tuple(range(rank - 1)))
    q, t = _rounded(b, w, tuple(range(1, rank)))
    return q, b.reshape(t, shape=(1, w.shape[0], *[1] * (rank - 2)))


def integer_convolution(b: Builder, q: Value, s: Value, p: Value, t: Value, attrs: Mapping[str, Any]) -> Value:
    """The convolution of integers in f32, given the scales of images, ``[N, 1, ...]`` or one, and of output channels."""
    scale = b.mul(s, t)  # of another shape than the sums: it stands before them, and so outside of their kernel
    return b.dequantize(b.create("conv", [q, p], {**attrs, "acc": types.i32}), scale)  # type: ignore[no-any-return]

"""Convolutions as products: a row is a pixel of the result, a column a filter, the summed axis taps and channels.

    acc[pixel, filter] += dot(x[pixel * stride + tap - padding, channels], w[tap, channels, filter])

Nothing is unfolded in memory: a tile of the image is read where the tap finds it, zeros outside. Where a tap has channels enough for a step
of the summed axis, taps are an outer loop, and the place of a pixel is worked out once a tap; else taps and channels are one axis.
"""

from __future__ import annotations

from collections.abc import Callable

from graphopt.backends.forms.convform import ConvForm, conv_of
from graphopt.backends.triton.code import Code, Launch, ceildiv
from graphopt.backends.triton.expr import Expressions, Tile
from graphopt.backends.triton.index import Sum, Var, add, scale, variable
from graphopt.backends.triton.matmul import LEAST, UNSIGNED, multiplied, precision, tile_numbers
from graphopt.backends.triton.sums import computed, total_of
from graphopt.backends.triton.window import Slide
from graphopt.ir import dims, types
from graphopt.ir.graph import Graph
from graphopt.target import Target


def form_of(graph: Graph) -> ConvForm | str:
    """The convolution of a region, of floats or of 8-bit integers that are summed in 32 bits, or why there is none for this family."""
    form = conv_of(graph, integers=any(n.name == "conv" and n.attrs["acc"] == types.i32 for n in graph.nodes()))
    if isinstance(form, ConvForm) and form.node.operands[0].dtype == types.u8:
        return UNSIGNED
    return form


class ConvKernel:
    """One region around a channels-last convolution."""

    def __init__(self, graph: Graph, form: ConvForm, t: Target, tile: tuple[int, int, int], group: int) -> None:
        self.graph, self.form, self.target, self.group = graph, form, t, group
        self.m, self.n, self.k = tile
        node = form.node
        self.slide = Slide.of(node, form.kernel, node.operands[0].shape[1:-1])
        self.code = Code(graph)
        self.e = Expressions(self.code)

    def emit(self, warps: int, stages: int) -> tuple[Code, Launch]:
        code, form, node = self.code, self.form, self.form.node
        tiles = ceildiv(form.pixels, self.m), ceildiv(form.filters, self.n)
        first, second = tile_numbers(code, code.program(0), *tiles)
        group = variable(Var(code.program(1, "part"), form.groups)) if form.groups > 1 else Sum()
        row = code.block("row", f"{first} * BLOCK_M", "BLOCK_M", self.m, form.pixels, 0, 2)
        column = code.block("column", f"{second} * BLOCK_N", "BLOCK_N", self.n, form.filters, 1, 2)
        self.pixel = self.e.places.unflatten(variable(row), node.result.shape[:-1])
        self.channels, self.filter = scale(group, form.inner), add(scale(group, form.filters), variable(column))
        self.acc = code.let("acc", f"tl.zeros([BLOCK_M, BLOCK_N], {total_of(node.operands[0].dtype)})")
        self._sum()
        index = [*self.pixel, self.filter]
        self.e.sources[node.result] = computed(self.acc, node, index)
        for k in range(len(self.graph.outputs)):
            self.e.store(k, index, [row, column], "[BLOCK_M, BLOCK_N]")
        blocks = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "GROUP": self.group}
        return code, Launch((dims.mul(*tiles), *([form.groups] if form.groups > 1 else [])), blocks, warps, stages)

    def _sum(self) -> None:
        code, form, taps = self.code, self.form, self.slide.taps
        if taps > 1 and form.inner >= LEAST:
            tap = Var(code.fresh("tap"), taps, depth=1)
            with code.loop(f"for {tap.name} in range({taps}):"):
                at = self.e.places.unflatten(variable(tap), form.kernel)
                self._steps(form.inner, lambda k: (at, variable(k)))
            return
        shape = (*form.kernel, form.inner)

        def split(k: Var) -> tuple[list[Sum], Sum]:
            *at, channel = self.e.places.unflatten(variable(k), shape)
            return at, channel

        self._steps(taps * form.inner, split)

    def _steps(self, depth: int, where: Callable[[Var], tuple[list[Sum], Sum]]) -> None:
        """The innermost loop, over ``depth`` products; ``where`` tells a product's tap and channel."""
        code, e, (x, w) = self.code, self.e, self.form.node.operands
        start = code.fresh("k")
        with code.loop(f"for {start} in range(0, {depth}, BLOCK_K):"):
            along = code.block("ka", start, "BLOCK_K", self.k, depth, 1, 2, code.depth)
            down = code.block("kb", start, "BLOCK_K", self.k, depth, 0, 2, code.depth)
            at, channel = where(along)
            places, guards = self.slide.places(e, self.pixel[1:], at)
            index = [self.pixel[0], *places, add(self.channels, channel)]
            index = [Sum() if d == 1 else i for i, d in zip(index, x.shape, strict=True)]
            image = e.within(x, index, guards, Tile("0.0" if x.dtype.is_float else "0", x.dtype, literal=True))
            a = multiplied(code, image, along, "[BLOCK_M, BLOCK_K]")
            at, channel = where(down)
            filters = e.at(w, [Sum() if d == 1 else i for i, d in zip([*at, channel, self.filter], w.shape, strict=True)])
            b = multiplied(code, filters, down, "[BLOCK_K, BLOCK_N]")
            total, rounding = total_of(x.dtype), precision(x.dtype, self.target)
            code.line(f'{self.acc} = tl.dot({a}, {b}, {self.acc}, input_precision="{rounding}", out_dtype={total})')

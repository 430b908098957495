"""Convolution in groups of few channels: one vector holds the output channels of several groups, of several pixels of a line at once.

An output channel reads all input channels of its group. The input channels of the groups of a vector lie side by side, so that
one vector of the image, its lanes spread, meets the weight of one input channel of every group: lane ``l`` gets element
``l // filters * inner + c``. Everything else is that of a depthwise convolution.

Reference: Zhang et al., "High Performance Depthwise and Pointwise Convolutions on Mobile Devices", AAAI 2020, for the tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.code import Index
from graphopt.backends.tvm.depthwise import DepthwiseKernel
from graphopt.backends.tvm.expr import Expressions
from graphopt.backends.tvm.lanes import Lanes


class ConvGroupsKernel(Lanes, DepthwiseKernel):
    """Emits a region with one channels-last convolution of narrow groups (:meth:`Target.conv_by_groups`) and a pointwise epilogue.

    Args: see :class:`DepthwiseKernel`; ``lanes`` is a multiple of a group's output channels.
    """

    def _unrolled(self, acc: Any, at: list[Index], start: Index, pixels: int, taps: list[Index], channel: Index) -> None:
        """One row of taps for all pixels of a tile: each spread vector of the image is used for all taps that it meets."""
        form, lanes = self.form, self.lanes
        stride, dilation, width = form.stride[-1], form.dilation[-1], form.kernel[-1]
        shifts = sorted({i * stride + k * dilation for i in range(pixels) for k in range(width)})
        shifts = [shift for shift in shifts if self._inside(start, shift)]

        def products(c: Index) -> None:
            ws = [self._weights([*taps, k], c, channel) for k in range(width)]
            for shift in shifts:
                x = self._spread([*at, self.code.simplify(start + shift)], c, channel)
                for i in range(pixels):
                    k, rest = divmod(shift - i * stride, dilation)
                    if rest == 0 and 0 <= k < width:
                        self._put(acc, i * lanes, self._vector(acc, i * lanes) + x * ws[k])

        self._each_channel(products)

    def _cut(self, acc: Any, at: list[Index], start: Index, pixels: int, taps: list[Index], channel: Index, first: Index,
             count: Index) -> None:  # fmt: skip
        code, form, lanes = self.code, self.form, self.lanes
        with code.loop(count, "serial", "k") as q:
            k = code.simplify(first + q)

            def products(c: Index) -> None:
                w = self._weights([*taps, k], c, channel)
                for i in range(pixels):
                    x = self._spread([*at, code.simplify(start + i * form.stride[-1] + k * form.dilation[-1])], c, channel)
                    self._put(acc, i * lanes, self._vector(acc, i * lanes) + x * w)

            self._each_channel(products)

    @property
    def _few(self) -> bool:
        """Whether a vector holds so few groups that their elements are read one by one, which takes no lane from its place."""
        return self.lanes <= 2 * self.form.filters

    def _each_channel(self, body: Callable[[Index], None]) -> None:
        """``body`` for each input channel of a group: a shuffle's lanes must be known, a place in memory need not be."""
        if self._few:
            with self.code.loop(self.form.inner, "serial", "c") as c:
                body(c)
        else:
            for c in range(self.form.inner):
                body(c)

    def _weights(self, taps: list[Index], c: Index, channel: Index) -> Any:
        """What a vector of output channels has for a tap and the ``c``-th input channel of each group."""
        code = self.code
        buffer = code.alloc(self.lanes, self.held, "w")
        with code.loop(self.lanes, "vectorized", "v") as v:
            code.store(buffer, v, Expressions(self.args, {}).at(self.form.w, [*taps, c, code.simplify(channel + v)]))
        return code.bind(self._vector(buffer, 0), "w")

    def _spread(self, at: list[Index], c: Index, channel: Index) -> Any:
        """The ``c``-th input channel of each group of a vector of output channels, in all lanes of the group."""
        code, (inner, filters) = self.code, (self.form.inner, self.form.filters)
        first = code.simplify(code.div(channel, filters) * inner)
        if self._few:
            e, groups = Expressions(self.args, {}), self.lanes // filters
            places = [code.simplify(first + g * inner + c) for g in range(groups)]
            parts = [tirx.Broadcast(code.bind(e.at(self.form.x, [*at, place]), "x"), filters) for place in places]
            return code.bind(tirx.Shuffle(parts, list(range(self.lanes))), "x") if groups > 1 else parts[0]
        assert isinstance(c, int)
        wide = self.lanes // filters * inner
        buffer = code.alloc(wide, self.held, "x")
        with code.loop(wide, "vectorized", "v") as v:
            code.store(buffer, v, Expressions(self.args, {}).at(self.form.x, [*at, code.simplify(first + v)]))
        whole = buffer[tirx.Ramp(tirx.const(0, "int64"), tirx.const(1, "int64"), wide)]
        return code.bind(tirx.Shuffle([whole] * (filters // inner), [lane // filters * inner + c for lane in range(self.lanes)]), "x")

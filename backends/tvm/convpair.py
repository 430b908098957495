"""A convolution and the depthwise one that reads its result, line by line: what lies between stays in the nearest cache.

A task takes some lines of the result and some panels of channels. For one panel after the other, and one strip of the lines after
the other, it computes a line of the first convolution, in register tiles of ``rows`` pixels by a panel of channels, with what follows
it, and puts it into a ring of as many lines as the depthwise window is high; whenever the ring holds what a line of the result needs,
that is computed. Strips are so narrow that the ring stays in the first-level cache: stores that miss it take as long as the products.
What two tasks or two strips both need is computed by both.

An image that is read with zeros around it, or whose channels are not side by side, is copied to scratch line by line: then the
pixels of a line follow each other, channel by channel.

Reference: Alwani et al., "Fused-layer CNN accelerators", MICRO 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import prod
from typing import Any

from tvm import tirx

from graphopt.backends.forms.convpair import ConvPair
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Arguments, Expressions, at_place, broadcast_index, store_computed
from graphopt.backends.tvm.lanes import Lanes
from graphopt.backends.tvm.loops import SMALL, vector_loop
from graphopt.ir.graph import Graph, Value


class ConvPairKernel(Lanes):
    """Emits a region with a convolution, a depthwise one, and pointwise work behind each.

    Args:
        lanes: elements of a vector.
        rows: pixels of a tile of the first convolution.
        pixels: of a tile of the depthwise one.
        share: (lines of the result, panels of channels) of a task.
        strip: pixels of a line of the result that are computed before the others.
        unroll: steps of the summed axis that are unrolled, where it is long.
    """

    def __init__(self, graph: Graph, pair: ConvPair, lanes: int, rows: int, pixels: int, share: tuple[int, int], strip: int,
                 unroll: int, parallel: bool) -> None:  # fmt: skip
        self.graph, self.pair, self.lanes, self.tile, self.unroll = graph, pair, lanes, pixels, unroll
        self.mr = min(rows, pair.least_columns(strip))
        self.first, self.second = pair.first, pair.second
        assert self.first.packed is not None
        self.lines, self.share = share
        self.strip = strip
        self.width = pair.columns_of(strip)  # of the ring
        self.parallel = parallel
        self.code = code = Code(graph.symbols)
        self.args = Arguments(code, graph)
        self.weight = self.args.inputs[self.first.packed]
        self.nr = int(self.first.packed.shape[-1])
        self.images, self.height, self.across, self.channels = (int(d) for d in self.second.node.result.shape)
        self.between = [int(d) for d in self.first.node.result.shape[1:3]]
        self.space = [int(d) for d in self.first.x.shape[1:3]]
        self.copied = not self.first.plain
        self.lanes_in = self._lanes(self.second.x, self.first.node.result)
        self.lanes_out = min((self._lanes(v, self.second.node.result) for v in graph.outputs), default=lanes)

    def _lanes(self, v: Value, known: Value) -> int:
        """Channels at a time in which a value behind a convolution is computed."""
        probe = Probe(self.args, {known: lambda index: tirx.const(0, "float32")}, v)
        probe([0] * v.type.rank)
        return 1 if probe.scalar_only else self.lanes

    def emit(self) -> Code:
        code, pair = self.code, self.pair
        bands, panels = -(-self.height // self.lines), -(-self.channels // self.nr)
        chunks = -(-panels // self.share)
        sizes = [self.images, bands, chunks]
        work = self.images * prod(self.between) * self.channels * self.first.depth
        serial = not self.parallel or prod(sizes) == 1 or work < 4 * SMALL
        with code.loop(prod(sizes), "serial" if serial else "parallel", "task") as task:
            n, band, chunk = [code.bind_index(i, "t", m) for i, m in zip(code.unflatten(task, sizes), sizes, strict=True)]
            start = code.bind_index(code.simplify(band * self.lines), "start")
            lines = self.lines if self.height % self.lines == 0 else code.bind_index(code.least(self.height - start, self.lines), "lines")
            self.ring = code.alloc((pair.reach + 1) * self.width * self.nr, "float32", "ring")
            self.source = code.alloc(self.first.kernel[0] * self._line_size, "float32", "source") if self.copied else None
            count = self.share if panels % self.share == 0 else code.bind_index(code.least(panels - chunk * self.share, self.share))
            with code.loop(count, "serial", "p") as p:
                panel = code.bind_index(code.simplify(chunk * self.share + p), "panel", panels)
                with code.loop(-(-self.across // self.strip), "serial", "strip") as strip:
                    left = code.simplify(strip * self.strip)
                    if self.across % self.strip:  # the last strip overlaps the one before
                        left = code.bind_index(code.least(left, self.across - self.strip), "left")
                    self._strip(n, start, lines, left, panel)
        return code

    def _strip(self, n: Index, start: Index, lines: Index, left: Index, panel: Index) -> None:
        """A strip of the lines of a task from the pixel ``left`` on, of one panel of channels."""
        code, pair, stride = self.code, self.pair, self.second.stride[0]
        reach = pair.reach
        # the columns between that are inside; those of the ring beside them stay zero
        self.edge = code.bind_index(code.simplify(left * self.second.stride[1] - self.second.low[1]), "edge")
        inner = code.bind_index(code.greatest(self.edge, 0), "inner")
        columns = code.bind_index(code.simplify(code.least(self.edge + self.width, self.between[1]) - inner), "columns")
        self._clear(0, (reach + 1) * self.width)
        with code.loop(code.simplify((lines - 1) * stride + (reach + 1)), "serial", "m") as m:
            y = code.bind_index(code.simplify(start * stride + m - self.second.low[0]), "y")
            slot = code.bind_index(code.simplify(code.mod(m, reach + 1) * (self.width * self.nr)), "slot")
            inside = tirx.And(i64(y) >= i64(0), i64(y) < i64(self.between[0]))
            always = not (self.second.low[0] or self.second.high[0])
            with nullcontext() if always else code.when(inside):
                self._line(n, y, (inner, columns), slot, panel)
            if not always:
                with code.when(tirx.Not(inside)):
                    self._clear(slot, self.width)
            ready = i64(m) >= i64(reach)
            if stride > 1:
                ready = tirx.And(ready, tirx.EQ(i64(code.mod(code.simplify(m + (stride - reach % stride)), stride)), i64(0)))
            with code.when(ready):
                oldest = code.bind_index(code.simplify(m - reach), "oldest")
                self._result(n, code.bind_index(code.simplify(start + code.div(oldest, stride)), "o"), left, oldest, panel)

    # --- the first convolution ------------------------------------------------------------------------------------------

    def _line(self, n: Index, y: Index, columns: tuple[Index, Index], slot: Index, panel: Index) -> None:
        """Pixels of a line of the first convolution (the first of them, and how many), and what follows it, into the ring."""
        code, (first, count) = self.code, columns
        if self.copied:
            self._copy(n, y)
        with code.loop(code.ceildiv_plain(count, self.mr), "serial", "tile") as tile:
            # the last tile overlaps the one before
            x = code.bind_index(code.simplify(first + code.least(tile * self.mr, count - self.mr)), "x")
            self._tile(n, y, x, slot, panel)

    def _tile(self, n: Index, y: Index, x: Index, slot: Index, panel: Index) -> None:
        code, form, lanes = self.code, self.first, self.lanes
        (rows, taps), channels = form.kernel, form.inner
        acc = [code.alloc(self.nr, "float32", "acc") for _ in range(self.mr)]
        for sums in acc:
            for u in range(0, self.nr, lanes):
                self._put(sums, u, self._wide(tirx.const(0.0, "float32")))
        starts = [code.bind_index(self._start(n, y, code.simplify(x + i)), "from") for i in range(self.mr)]
        buffer = self.source if self.source is not None else self.args.inputs[form.x]
        run = taps * channels
        with code.loop(rows, "serial", "tap") as t:
            line = code.bind_index(code.simplify(t * self._step), "line")
            base = code.bind_index(code.simplify((panel * form.depth + t * run) * self.nr), "w")

            def step(k: Index, at: Index) -> None:
                ws = [code.bind(self._vector(self.weight, code.simplify(base + k * self.nr + u)), "w") for u in range(0, self.nr, lanes)]
                for sums, start in zip(acc, starts, strict=True):
                    a = self._wide(code.bind(code.load(buffer, code.simplify(start + line + at)), "a"))
                    for u, w in enumerate(ws):
                        self._put(sums, u * lanes, self._vector(sums, u * lanes) + a * w)

            if self.copied:
                for tap in range(taps):
                    for c in range(channels):
                        step(tap * channels + c, self._place(tap, c))
            else:
                with code.loop(taps, "serial", "kx") as tap, code.loop(channels // self.unroll, "serial", "k") as k:
                    for q in range(self.unroll):
                        c = code.simplify(k * self.unroll + q)
                        step(code.simplify(tap * channels + c), self._place(tap, c))
                if rest := channels % self.unroll:
                    with code.loop(taps, "serial", "kx") as tap:
                        for q in range(rest):
                            step(code.simplify(tap * channels + (channels - rest + q)), self._place(tap, channels - rest + q))
        self._each_vector(panel, self.lanes_in, lambda u, c: self._keep(acc, u, [n, y, x], c, slot))

    def _keep(self, acc: Sequence[Any], u: Index, pixel: Sequence[Index], channel: Index, slot: Index) -> None:
        """Put some channels of a tile, with what follows the convolution, into the ring."""
        code = self.code
        n, y, x = pixel
        for i, sums in enumerate(acc):
            index = broadcast_index(self.first.node.result, [n, y, code.simplify(x + i), channel])
            sources = {self.first.node.result: at_place(self.args, index, code.bind(code.load(sums, u)))}
            value = Expressions(self.args, sources).at(self.second.x, index)
            code.store(self.ring, code.simplify(slot + (x - self.edge + i) * self.nr + u), value)

    def _start(self, n: Index, y: Index, x: Index) -> Index:
        """Where the first product of a pixel lies in what the first convolution reads."""
        form = self.first
        if self.copied:
            return self.code.simplify(x * form.stride[1])
        row = (n * self.space[0] + y * form.stride[0]) * self.space[1] + x * form.stride[1]
        return self.code.simplify(row * form.inner)

    @property
    def _step(self) -> int:
        """Elements from a line of taps to the next."""
        return self._line_size if self.copied else self.first.dilation[0] * self.space[1] * self.first.inner

    def _place(self, tap: Index, channel: Index) -> Index:
        """Where a channel of a tap lies beside a pixel's first product."""
        code, form = self.code, self.first
        if self.copied:
            return code.simplify(channel * self._plane + tap * form.dilation[1])
        return code.simplify(tap * (form.dilation[1] * form.inner) + channel)

    # --- the image, where it is copied ------------------------------------------------------------------------------------

    @property
    def _plane(self) -> int:
        """Pixels of a line of the image with the zeros around it."""
        return self.space[1] + self.first.low[1] + self.first.high[1]

    @property
    def _line_size(self) -> int:
        return self._plane * self.first.inner

    def _copy(self, n: Index, y: Index) -> None:
        """The lines of the image that a line of the first convolution reads, as ``[line, channel, pixel]``."""
        code, form = self.code, self.first
        probe = Probe(self.args, {}, form.x)
        probe([0] * form.x.type.rank)
        lanes = 1 if probe.scalar_only else self.lanes
        zero = tirx.const(0.0, "float32")
        with code.loop(form.kernel[0], "serial", "t") as t, code.loop(form.inner, "serial", "c") as c:
            line = code.bind_index(code.simplify(y * form.stride[0] + t * form.dilation[0] - form.low[0]), "line")
            to = code.bind_index(code.simplify((t * form.inner + c) * self._plane), "to")
            inside = tirx.And(i64(line) >= i64(0), i64(line) < i64(self.space[0]))

            def fill(first: int, count: int, to: Index = to) -> None:
                vector_loop(code, code.simplify(to + first), count, self.lanes, lambda i: code.store(self.source, i, zero))

            def pixel(x: Index, to: Index = to, line: Index = line, c: Index = c) -> None:
                value = Expressions(self.args, {}).at(form.x, broadcast_index(form.x, [n, line, x, c]))
                code.store(self.source, code.simplify(to + form.low[1] + x), value)

            always = not (form.low[0] or form.high[0])
            with nullcontext() if always else code.when(inside):
                fill(0, form.low[1])
                vector_loop(code, 0, self.space[1], lanes, pixel)
                fill(form.low[1] + self.space[1], form.high[1])
            if not always:
                with code.when(tirx.Not(inside)):
                    fill(0, self._plane)

    # --- the depthwise convolution ----------------------------------------------------------------------------------------

    def _result(self, n: Index, o: Index, left: Index, oldest: Index, panel: Index) -> None:
        """A strip of a line of the result; the first line that it reads is the ``oldest`` of the ring."""
        code = self.code
        tile = min(self.tile, self.strip)

        def vectors(u: Index, channel: Index) -> None:
            with code.loop(-(-self.strip // tile), "serial", "tile") as q:
                x = code.simplify(q * tile)
                if self.strip % tile:
                    x = code.bind_index(code.least(x, self.strip - tile), "x")
                self._pixels([n, o, left], x, tile, oldest, u, channel)

        self._each_vector(panel, self.lanes, vectors, scalar=True)

    def _pixels(self, place: Sequence[Index], x: Index, tile: int, oldest: Index, u: Index, channel: Index) -> None:
        """One vector of channels of some pixels of the result, from the ``x``-th of a strip on, which begins at ``place``."""
        code, form, lanes, pair = self.code, self.second, self.lanes, self.pair
        n, o, left = place
        acc = [code.alloc(lanes, "float32", "acc") for _ in range(tile)]
        for sums in acc:
            self._put(sums, 0, self._wide(tirx.const(0.0, "float32")))
        with code.loop(form.kernel[0], "serial", "tap") as t:
            slot = code.mod(code.simplify(oldest + t * form.dilation[0]), pair.reach + 1)
            base = code.bind_index(code.simplify((slot * self.width + x * form.stride[1]) * self.nr + u), "line")
            ws = [self._filter(t, k, channel) for k in range(form.kernel[1])]
            loaded: dict[int, Any] = {}
            for i, sums in enumerate(acc):
                for k, w in enumerate(ws):
                    shift = i * form.stride[1] + k * form.dilation[1]
                    if shift not in loaded:
                        loaded[shift] = code.bind(self._vector(self.ring, code.simplify(base + shift * self.nr)), "x")
                    self._put(sums, 0, self._vector(sums, 0) + loaded[shift] * w)
        for i, sums in enumerate(acc):
            with code.loop(self.lanes_out, "vectorized", "v") if self.lanes_out > 1 else code.loop(lanes, "serial", "v") as v:
                index = broadcast_index(form.node.result, [n, o, code.simplify(left + x + i), code.simplify(channel + v)])
                store_computed(self.args, index, {form.node.result: code.bind(code.load(sums, v))})

    def _filter(self, line: Index, tap: int, channel: Index) -> Any:
        """A vector of the depthwise weight."""
        code = self.code
        held = code.alloc(self.lanes, "float32", "filter")
        with code.loop(self.lanes, "vectorized" if self.lanes > 1 else "serial", "v") as v:
            code.store(held, v, Expressions(self.args, {}).at(self.second.w, [line, tap, 0, code.simplify(channel + v)]))
        return code.bind(self._vector(held, 0), "w")

    # --- vectors --------------------------------------------------------------------------------------------------------

    def _each_vector(self, panel: Index, lanes: int, body: Callable[[Index, Index], None], scalar: bool = False) -> None:
        """``body(place in the panel, channel)`` for the channels of a panel, ``lanes`` at a time; ``scalar``: for the first of each."""
        code = self.code
        for u in range(0, self.nr, lanes):
            channel = code.simplify(panel * self.nr + u)
            if scalar or lanes == 1:
                body(u, channel)
                continue
            with code.loop(lanes, "vectorized", "v") as v:
                body(code.simplify(u + v), code.simplify(channel + v))

    def _clear(self, start: Index, pixels: int) -> None:
        code, zero = self.code, tirx.const(0.0, "float32")
        vector_loop(code, start, pixels * self.nr, self.lanes, lambda i: code.store(self.ring, i, zero))

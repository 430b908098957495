"""Convolution of few filters: vectors lie along the channels of the image, and their lanes are added up at the end.

Vectors along the filters, as :mod:`~graphopt.backends.tvm.conv` has them, would be mostly empty: of 3 filters they use 3 lanes of 16. Here
a register tile is ``rows`` pixels of a line by all filters, with a vector of sums for each pixel and filter. A step takes ``lanes``
channels of one tap: a vector of the weight for each filter and one of the image for each pixel, ``rows + filters`` reads for
``rows * filters`` multiply-adds. Then the lanes of all sums are added side by side, two shuffles and one addition a vector.

The channels of an image in memory, and with them the taps of the last axis, follow each other, so it is read where it lies. Zeros around
it are neither copied nor multiplied: outside of the image a tap is left out. Which taps of the outer axes are inside is the same for
a line; on the last axis, the pixels at the edges are taken one by one with the taps that they have. What is not in memory as it is
multiplied is copied, with the zeros around it.

The epilogue of a line, or of a piece of it, follows its sums, with vectors along the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import tirx

from graphopt.backends.forms.convform import ConvForm
from graphopt.backends.forms.support import behind_views
from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.convimage import ConvImage
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Expressions, store_computed
from graphopt.backends.tvm.loops import SMALL, product, vector_loop
from graphopt.backends.tvm.monoid import Monoid, combine, combine_each
from graphopt.ir.graph import Graph

_CHAINS = 8  # sums side by side that hide the latency of a multiply-add: two units, four cycles


@dataclass(frozen=True)
class _Taps:
    """Which taps of an axis are inside of the image: ``count`` of them from ``first`` on."""

    first: Index
    count: Index


class ConvChannelsKernel(ConvImage):
    """Emits a region with one channels-last convolution of few filters and a pointwise epilogue of its shape.

    Args:
        lanes: elements of a vector, a power of two and more than one.
        rows: pixels of a tile.
        unroll: vectors of the summed axis that are unrolled.
        pixels: of a line, at most, that a task computes.
    """

    def __init__(self, graph: Graph, form: ConvForm, lanes: int, rows: int, unroll: int, pixels: int, parallel: bool) -> None:
        super().__init__(graph, form, lanes, parallel)
        self.mr, self.unroll, self.most = rows, unroll, pixels
        self.inside = not self._in_place()  # whether every tap of every pixel is: of a copy with the zeros around it
        self.joined = form.dilation[-1] == 1
        self.low = (0,) * len(form.kernel) if self.inside else form.low

    def emit(self) -> Code:
        code, filters = self.code, self.form.filters
        self.weight, self.image = self._weight(), self._image() if self.inside else None
        width = self.out[-1]
        pieces = 1 if isinstance(width, int) and width <= self.most else code.bind_index(code.ceildiv(width, self.most), "pieces")
        size = code.ceildiv(width, pieces) if isinstance(width, int) and isinstance(pieces, int) else self.most
        lines = product(code, self.out[:-1])
        steps = product(code, [lines, pieces])
        with code.loop(steps, self._kind(steps), "task") as task:
            *lead, piece = self._place(task, [*self.out[:-1], pieces])
            first = code.simplify(piece * size)
            count = size if isinstance(width, int) and width % size == 0 else code.bind_index(code.least(width - first, size), "count")
            self.sums = code.alloc(filters * size, self.held, "sums")
            self.size = size
            self._line(lead, first, count)
            self._store(lead, first, count)
        return code

    # --- operands -------------------------------------------------------------------------------------------------------

    def _in_place(self) -> bool:
        """Whether the image is read where it lies: an input whose channels, and pixels of a line, follow each other."""
        source = behind_views(self.form.x)
        plain = source.is_input and source.dtype.is_float and source.dtype.bits >= 32 and scalar.COMPUTE[source.dtype] == self.held
        return plain and self._whole_lines()

    def _weight(self) -> Any:
        """A buffer with the weight filter by filter, [O, *K, C]."""
        form, code = self.form, self.code
        if form.by_filter is not None:
            return self.args.inputs[form.by_filter]
        buffer = code.alloc(form.filters * form.depth, self.held, "weights")
        large = form.filters * form.depth > SMALL and self.parallel
        with code.loop(prod(form.kernel), "parallel" if large else "serial", "tap") as tap:
            at = [code.bind_index(i, "i", n) for i, n in zip(code.unflatten(tap, form.kernel), form.kernel, strict=True)]
            with code.loop(form.filters, "serial", "o") as o, code.loop(form.inner, "serial", "c") as c:
                value = Expressions(self.args, {}).at(form.w, [*at, c, o])
                code.store(buffer, code.simplify(o * form.depth + tap * form.inner + c), value)
        return buffer

    # --- a line ---------------------------------------------------------------------------------------------------------

    def _line(self, lead: Sequence[Index], first: Index, count: Index) -> None:
        """The sums of ``count`` pixels of a line from ``first`` on: whole tiles where all taps are inside, the others one by one."""
        code, form = self.code, self.form
        taps = [self._taps_inside(axis, y) for axis, y in enumerate(lead[1:])]
        begin, end = first, code.simplify(first + count)
        if not self.inside:
            stride, low, reach = form.stride[-1], form.low[-1], (form.kernel[-1] - 1) * form.dilation[-1]
            begin = code.greatest(begin, -(-low // stride))
            fit = code.greatest(code.simplify(self.space[-1] + (low - reach - 1 + stride)), 0)  # never negative, as divisions want it
            end = code.least(end, code.div(fit, stride))
        here = code.bind_index(code.simplify(end - begin), "here")
        if isinstance(here, int):
            if here < self.mr:
                begin, here = first, 0
        else:
            enough = i64(here) >= i64(self.mr)
            begin = code.bind_index(tirx.Select(enough, i64(begin), i64(first)), "begin")
            here = code.bind_index(tirx.Select(enough, i64(here), i64(0)), "here")
        with code.loop(code.ceildiv_plain(here, self.mr), "serial", "tile") as tile:
            # the last tile overlaps the one before
            x = code.bind_index(code.simplify(begin + code.least(tile * self.mr, here - self.mr)), "x")
            self._tile(lead, x, taps, self.mr, first)
        rest = code.simplify(count - here)
        if isinstance(rest, int) and rest == 0:
            return
        with code.loop(rest, "serial", "edge") as edge:
            before = i64(edge) < i64(code.simplify(begin - first))
            x = code.bind_index(tirx.Select(before, i64(code.simplify(first + edge)), i64(code.simplify(first + here + edge))), "x")
            inside = self._taps_inside(len(form.kernel) - 1, x)
            self._tile(lead, x, [*taps, inside], 1, first)

    def _taps_inside(self, axis: int, at: Index) -> _Taps:
        """The taps of an axis that lie inside of the image for the result at a place of it."""
        code, form = self.code, self.form
        kernel, step = form.kernel[axis], form.dilation[axis]
        if self.inside or not (form.low[axis] or form.high[axis]):
            return _Taps(0, kernel)
        start = code.simplify(at * form.stride[axis] - form.low[axis])
        first = code.div(code.greatest(code.simplify(0 - start), 0) + (step - 1), step)
        behind = code.div(code.greatest(code.simplify(self.space[axis] - start), 0) + (step - 1), step)
        first = code.bind_index(code.least(first, kernel), "first")
        return _Taps(first, code.bind_index(code.greatest(code.simplify(code.least(behind, kernel) - first), 0), "taps"))

    def _tile(self, lead: Sequence[Index], x: Index, taps: Sequence[_Taps], rows: int, first: Index) -> None:
        """The sums of ``rows`` neighbours from the pixel ``x`` on, into those of the line, whose first one is ``first``.

        ``taps``: of the outer axes; and of the last one, where it has not all of them.
        """
        code, form, lanes = self.code, self.form, self.lanes
        joined = self.joined and len(taps) < len(form.kernel)
        run = form.inner * (form.kernel[-1] if joined else 1)
        whole, filters = run // lanes, form.filters
        chains = max(1, min(_CHAINS // (rows * filters), whole))
        step = form.stride[-1] * form.inner  # from pixel to pixel
        monoid = Monoid.of("sum", form.node.result.dtype)
        acc = [[code.alloc(chains * lanes, self.held, "acc") for _ in range(filters)] for _ in range(rows)]
        for sums in (s for pixel in acc for s in pixel):
            for q in range(chains):
                self._put(sums, q * lanes, self._zero())

        def vectors(image: Any, at: Index, base: Index) -> None:
            def add(k: Index, chain: int) -> None:
                moved = code.simplify(k * lanes)
                ws = [code.bind(self._vector(self.weight, code.simplify(base + moved + f * form.depth)), "w") for f in range(filters)]
                for i, pixel in enumerate(acc):
                    a = code.bind(self._vector(image, code.simplify(at + moved + i * step)), "a")
                    for sums, w in zip(pixel, ws, strict=True):
                        self._put(sums, chain * lanes, self._vector(sums, chain * lanes) + a * w)

            unroll = chains * max(1, self.unroll // chains)
            with code.loop(whole // unroll, "serial", "k") as k:
                for q in range(unroll):
                    add(code.simplify(k * unroll + q), q % chains)
            for q in range(whole - whole % unroll, whole):
                add(q, q % chains)

        self._each_run(lead, x, taps, joined, vectors)
        if rows == 1:
            found = [combine(code, sums, chains * lanes, lanes, monoid) for sums in acc[0]]
            for f, value in enumerate(found):
                code.store(self.sums, code.simplify(f * self.size + x - first), value)
        else:
            self._keep([acc[i][f] for f in range(filters) for i in range(rows)], chains, monoid, rows, code.simplify(x - first))
        if run % lanes:
            self._rest(lead, x, taps, joined, rows, first)

    def _keep(self, acc: Sequence[Any], chains: int, monoid: Monoid, rows: int, place: Index) -> None:
        """Add up the lanes of a tile's sums, filter by filter, and put them to the others of the line."""
        code, lanes = self.code, self.lanes
        vectors = []
        for sums in acc:
            value = self._vector(sums, 0)
            for q in range(1, chains):
                value = value + self._vector(sums, q * lanes)
            vectors.append(code.bind(value))
        totals = combine_each(code, vectors, lanes, monoid)
        for f in range(len(acc) // rows):
            low, high = f * rows, (f + 1) * rows
            at = code.simplify(f * self.size + place)
            for v in range(low // lanes, (high - 1) // lanes + 1):  # of which vectors the filter's sums are
                start, stop = max(low, v * lanes), min(high, (v + 1) * lanes)
                width = stop - start
                part = totals[v] if width == lanes else tirx.Shuffle([totals[v]], [e - v * lanes for e in range(start, stop)])
                to = code.simplify(at + (start - low))
                code.emit(tirx.BufferStore(self.sums, part, [tirx.Ramp(i64(to), i64(1), width) if width > 1 else i64(to)]))

    def _rest(self, lead: Sequence[Index], x: Index, taps: Sequence[_Taps], joined: bool, rows: int, first: Index) -> None:
        """Add the terms of a tile that fill no vector, pixel by pixel."""
        code, form = self.code, self.form
        run = form.inner * (form.kernel[-1] if joined else 1)
        whole = run - run % self.lanes
        with code.loop(rows, "serial", "i") as i:
            acc = [code.alloc(1, self.held, "acc") for _ in range(form.filters)]
            for sums in acc:
                code.store(sums, 0, tirx.const(0, self.held))

            def terms(image: Any, at: Index, base: Index) -> None:
                with code.loop(run - whole, "serial", "k") as k:
                    a = code.bind(code.load(image, code.simplify(at + (whole + k))), "a")
                    for f, sums in enumerate(acc):
                        w = code.load(self.weight, code.simplify(base + (whole + k) + f * form.depth))
                        code.store(sums, 0, code.load(sums, 0) + a * w)

            pixel = code.bind_index(code.simplify(x + i), "x")
            self._each_run(lead, pixel, taps, joined, terms)
            for f, sums in enumerate(acc):
                at = code.simplify(f * self.size + pixel - first)
                code.store(self.sums, at, code.load(self.sums, at) + code.load(sums, 0))

    def _each_run(self, lead: Sequence[Index], x: Index, taps: Sequence[_Taps], joined: bool,
                  body: Callable[[Any, Index, Index], None]) -> None:  # fmt: skip
        """``body(image, a pixel's first product in it, the first weight's place)`` for all runs of contiguous products."""
        code, form = self.code, self.form
        axes = list(taps)
        if len(taps) < len(form.kernel) and not joined:
            axes.append(_Taps(0, form.kernel[-1]))
        with ExitStack() as stack:
            at = []
            for t in axes:
                i = stack.enter_context(code.loop(t.count, "serial", "tap"))
                at.append(code.simplify(t.first + i))
            if joined:
                at.append(0)
            moved = [code.simplify(i * d) for i, d in zip(at, form.dilation, strict=True)]
            line = [code.simplify(y * s + m - p) for y, s, m, p in zip(lead[1:], form.stride, moved, self.low, strict=False)]
            # only sums: a pixel may lie before its line, but none of the taps does
            across = code.simplify((x * form.stride[-1] + moved[-1] - self.low[-1]) * form.inner)
            if self.image is not None:
                image = self.image
                start = code.simplify(code.flatten([lead[0], *line, 0], [self.out[0], *self.padded]) * form.inner)
            else:
                probe = Expressions(self.args, {}, probe=True)
                probe.at(form.x, [lead[0], *(code.bind_index(i, "y") for i in line), 0, 0])
                value, start = probe.reads[0]
                image = self.args.inputs[value]
            base = code.bind_index(code.simplify(code.flatten(at, form.kernel) * form.inner), "dw")
            body(image, code.bind_index(code.simplify(start + across), "dx"), base)

    # --- the epilogue ---------------------------------------------------------------------------------------------------

    def _store(self, lead: Sequence[Index], first: Index, count: Index) -> None:
        """Write the pixels of a line, filter by filter."""
        code, result = self.code, self.form.node.result
        lanes = self.lanes
        for v in self.graph.outputs:
            probe = Probe(self.args, {result: lambda index: tirx.const(0, self.held)}, v)
            probe([0] * v.type.rank)
            lanes = 1 if probe.scalar_only else lanes
        with code.loop(self.form.filters, "serial", "f") as f:

            def pixel(i: Index) -> None:
                value = code.bind(code.load(self.sums, code.simplify(f * self.size + i)))
                store_computed(self.args, [*lead, code.simplify(first + i), f], {result: scalar.rounded(value, result.dtype)})

            vector_loop(code, 0, count, lanes, pixel)

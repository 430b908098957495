"""Depthwise convolution: each channel by itself, neighbouring channels side by side, several pixels of a line at once.

A tile of pixels along the last spatial axis keeps its sums in registers; within a row of taps, each element of the image
is loaded once and used for all taps that it meets. Padding is never read: the taps of a pixel are cut to those that lie
inside. The tiles at the ends of a line of known size have code of their own, without the taps outside; where the size is not known,
pixels whose taps along the last axis are cut are computed one by one.

Reference: Zhang et al., "High Performance Depthwise and Pointwise Convolutions on Mobile Devices", AAAI 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm import tirx

from graphopt.backends.forms.convform import ConvForm, even_tile
from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index
from graphopt.backends.tvm.expr import Arguments, Expressions, store_computed
from graphopt.backends.tvm.loops import SMALL, product
from graphopt.ir.graph import Graph

LINES, TASKS = 8, 32  # where a schedule does not say
_TAPS = 16  # along the last axis that are written one by one
_ENDS = 4  # tiles of a line that have code of their own


class DepthwiseKernel:
    """Emits a region with one depthwise channels-last convolution and a pointwise epilogue of its shape.

    Args:
        lanes: channels a vector, a power of two; at most as many as there are.
        pixels: of a tile.
        lines: of a task, at most: their taps overlap, and stay in the cache.
        tasks: of an image, at least where it has the channels for it.
    """

    def __init__(self, graph: Graph, form: ConvForm, lanes: int, pixels: int, parallel: bool, lines: int = LINES,
                 tasks: int = TASKS) -> None:  # fmt: skip
        self.lines, self.tasks = lines, tasks
        self.graph, self.form, self.lanes, self.tile, self.parallel = graph, form, lanes, pixels, parallel
        self.code = code = Code(graph.symbols)
        self.args = Arguments(code, graph)
        self.held = scalar.COMPUTE[form.node.result.dtype]
        self.out = [code.bind_index(code.size(d), "size") for d in form.node.result.shape[:-1]]  # N, *S'
        self.space = [code.size(d) for d in form.x.shape[1:-1]]
        self.channels = form.groups * form.filters
        self.first: Index = 0  # of the vectors of channels of a task
        self.blocks: Index = 1

    def emit(self) -> Code:
        """Tasks are pieces of the image, and where those are few, chunks of the channels, too.

        Within a task, all channels of a tile of pixels come before the next tile: memory is read in its order.
        """
        code = self.code
        *lead, width = self.out
        blocks = -(-self.channels // self.lanes)
        lines = lead[-1] if len(lead) > 1 else 1
        each = -(-lines // -(-lines // self.lines)) if isinstance(lines, int) else self.lines  # even pieces
        pieces = code.bind_index(code.ceildiv(lines, each), "pieces")
        chunks = min(blocks, -(-self.tasks // pieces)) if isinstance(pieces, int) else min(blocks, 4)
        per_chunk = -(-blocks // chunks)
        chunks = -(-blocks // per_chunk)
        sizes = [*(lead[:-1] if len(lead) > 1 else lead), pieces, chunks]
        steps = product(code, sizes)
        work = product(code, [*self.out, self.channels, prod(self.form.kernel)])
        serial = not self.parallel or (isinstance(work, int) and work < SMALL) or (isinstance(steps, int) and steps == 1)
        with code.loop(steps, "serial" if serial else "parallel", "task") as task:
            *outer, piece, chunk = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(task, sizes), sizes, strict=True)]
            self.first = code.simplify(chunk * per_chunk)
            even = blocks % per_chunk == 0
            self.blocks = per_chunk if even else code.bind_index(code.least(blocks - self.first, per_chunk), "blocks")
            if len(lead) == 1:
                self._line(outer, width)
                return code
            start = code.simplify(piece * each)
            whole = isinstance(lines, int) and lines % each == 0
            with code.loop(each if whole else code.bind_index(code.least(lines - start, each)), "serial", "line") as line:
                self._line([*outer, code.simplify(start + line)], width)
        return code

    def _line(self, lead: list[Index], width: Index) -> None:
        """All pixels of a line."""
        ranges = [self._range(k, i) for k, i in enumerate(lead[1:])]
        a, b = self._interior(width)
        if isinstance(width, int) and isinstance(self.space[-1], int) and self._written_out:
            tile = even_tile(width, self.tile)
            starts = [min(first, width - tile) for first in range(0, width, tile)]
            ends = [first for first in starts if first < a or first + tile > b]
            if len(ends) <= _ENDS:
                self._tiles(lead, starts, ends, tile, ranges)
                return
        self._between(lead, width, a, b, ranges)

    def _tiles(self, lead: list[Index], starts: list[int], ends: list[int], tile: int, ranges: Sequence[tuple[Index, Index]]) -> None:
        """Tiles that begin at ``starts``: those at the ``ends`` one after the other, the others in a loop."""
        code, inner = self.code, [first for first in starts if first not in ends]
        for first in ends:
            self._tile(lead, first, tile, ranges, known=True)
        if inner:
            with code.loop(len(inner), "serial", "tile") as q:
                o = code.simplify(inner[0] + q * tile)
                if inner[-1] != inner[0] + (len(inner) - 1) * tile:  # the last one overlaps the one before
                    o = code.bind_index(code.least(o, inner[-1]), "o")
                self._tile(lead, o, tile, ranges, known=True)

    def _between(self, lead: list[Index], width: Index, a: Index, b: Index, ranges: Sequence[tuple[Index, Index]]) -> None:
        """A line one by one where the edge cuts the taps of pixels, tiles from ``a`` to ``b``."""
        code = self.code

        def single(first: Index, count: Index) -> None:
            with code.loop(count, "serial", "o") as o:
                self._tile(lead, code.simplify(first + o), 1, ranges)

        single(0, a)
        inner = code.simplify(b - a)
        tile = min(self.tile, inner) if isinstance(inner, int) else self.tile
        if isinstance(inner, int) and tile <= 1:
            single(a, inner)
        elif isinstance(inner, int):
            with code.loop(-(-inner // tile), "serial", "tile") as q:
                first = code.simplify(a + q * tile)
                if inner % tile:
                    first = code.bind_index(code.least(first, b - tile), "o")
                self._tile(lead, first, tile, ranges, known=True)
        else:
            whole = code.bind_index(code.div(inner, tile))
            with code.loop(whole, "serial", "tile") as q:
                self._tile(lead, code.simplify(a + q * tile), tile, ranges, known=True)
            single(code.simplify(a + whole * tile), code.simplify(inner - whole * tile))
        single(b, code.simplify(width - b))

    def _interior(self, width: Index) -> tuple[Index, Index]:
        """The pixels a .. b - 1 of a line all of whose taps along it lie inside."""
        code = self.code
        stride, padding, dilation = (a[-1] for a in (self.form.stride, self.form.low, self.form.dilation))
        reach = (self.form.kernel[-1] - 1) * dilation
        a = code.least(-(-padding // stride), width)
        room = code.simplify(self.space[-1] - 1 + padding - reach)
        if isinstance(room, int):
            last = room // stride + 1 if room >= 0 else 0
        else:
            last = code.simplify(code.div(code.greatest(room + stride, 0), stride))
        b = code.greatest(code.least(last, width), a)
        return code.bind_index(a), code.bind_index(b)

    def _range(self, axis: int, o: Index) -> tuple[Index, Index]:
        """The taps first .. first + count - 1 of an axis that lie inside for an output index."""
        code, kernel = self.code, self.form.kernel[axis]
        stride, padding, dilation = (a[axis] for a in (self.form.stride, self.form.low, self.form.dilation))
        if padding == self.form.high[axis] == 0:
            return 0, kernel
        start = code.simplify(o * stride - padding)
        first = code.greatest(code.div(code.simplify(-start + (dilation - 1)), dilation), 0)
        stop = code.least(code.div(code.simplify(self.space[axis] - start + (dilation - 1)), dilation), kernel)
        first = code.bind_index(first, "k")
        return first, code.bind_index(code.greatest(code.simplify(stop - first), 0), "n")

    def _tile(self, lead: list[Index], o: Index, pixels: int, ranges: Sequence[tuple[Index, Index]], known: bool = False) -> None:
        """Sum and store some pixels of a line, all channels of the task; ``known``: no tap along it is cut, or it is known which."""
        code = self.code
        with code.loop(self.blocks, "serial", "block") as block:
            channel = code.simplify((self.first + block) * self.lanes)
            if self.channels % self.lanes:  # the last block overlaps the one before
                channel = code.bind_index(code.least(channel, self.channels - self.lanes), "c", self.channels - self.lanes + 1)
            self._vectors(lead, o, pixels, ranges, channel, known)

    def _vectors(self, lead: list[Index], o: Index, pixels: int, ranges: Sequence[tuple[Index, Index]], channel: Index,
                 known: bool) -> None:  # fmt: skip
        """Sum and store one vector of channels of some pixels of a line."""
        code, lanes, form = self.code, self.lanes, self.form
        stride, padding, dilation = form.stride, form.low, form.dilation
        width = form.kernel[-1]
        acc = code.alloc(pixels * lanes, self.held, "acc")
        for i in range(pixels):
            with code.loop(lanes, "vectorized", "v") as v:
                code.store(acc, i * lanes + v, tirx.const(0, self.held))
        start = code.simplify(o * stride[-1] - padding[-1])
        first, count = (0, width) if known else self._range(len(ranges), o)

        def row(taps: list[Index]) -> None:
            at = [code.simplify(i * s - p + t * d) for i, s, p, d, t in zip(lead[1:], stride, padding, dilation, taps, strict=False)]
            if known and self._written_out:
                self._unrolled(acc, [lead[0], *at], start, pixels, taps, channel)
                return
            self._cut(acc, [lead[0], *at], start, pixels, taps, channel, first, count)

        def level(axis: int, taps: list[Index]) -> None:
            if axis == len(ranges):
                row(taps)
                return
            begin, n = ranges[axis]
            with code.loop(n, "serial", "k") as q:
                level(axis + 1, [*taps, code.simplify(begin + q)])

        level(0, [])
        with code.loop(pixels, "serial", "i") as i, code.loop(lanes, "vectorized", "v") as v:
            value = scalar.rounded(code.bind(code.load(acc, code.simplify(i * lanes + v))), form.node.result.dtype)
            self._store([*lead, code.simplify(o + i), code.simplify(channel + v)], value)

    def _cut(self, acc: Any, at: list[Index], start: Index, pixels: int, taps: list[Index], channel: Index, first: Index,
             count: Index) -> None:  # fmt: skip
        """``count`` taps of a row, from the ``first`` on, for all pixels of a tile."""
        code, form, lanes = self.code, self.form, self.lanes
        with code.loop(count, "serial", "k") as q, code.loop(lanes, "vectorized", "v") as v:
            e, c, k = Expressions(self.args, {}), code.simplify(channel + v), code.simplify(first + q)
            w = e.at(form.w, [*taps, k, 0, c])
            for i in range(pixels):
                x = e.at(form.x, [*at, code.simplify(start + i * form.stride[-1] + k * form.dilation[-1]), c])
                p = code.simplify(i * lanes + v)
                code.store(acc, p, code.load(acc, p) + x * w)

    def _unrolled(self, acc: Any, at: list[Index], start: Index, pixels: int, taps: list[Index], channel: Index) -> None:
        """One row of taps for all pixels of a tile: every element of the image is loaded once, and none outside of it."""
        code, form, lanes = self.code, self.form, self.lanes
        stride, dilation = form.stride, form.dilation
        with code.loop(lanes, "vectorized", "v") as v:
            e, c = Expressions(self.args, {}), code.simplify(channel + v)
            loaded: dict[int, Any] = {}
            ws = [e.at(form.w, [*taps, k, 0, c]) for k in range(form.kernel[-1])]
            for i in range(pixels):
                p = code.simplify(i * lanes + v)
                for k, w in enumerate(ws):
                    shift = i * stride[-1] + k * dilation[-1]
                    if not self._inside(start, shift):
                        continue
                    if shift not in loaded:
                        loaded[shift] = e.at(form.x, [*at, code.simplify(start + shift), c])
                    code.store(acc, p, code.load(acc, p) + loaded[shift] * w)

    @property
    def _written_out(self) -> bool:
        """Whether the taps along a line are written one after the other: alone then those outside can be left out."""
        return self.form.kernel[-1] <= _TAPS

    def _inside(self, start: Index, shift: int) -> bool:
        """Whether a place of a line is one of the image; of a tile that has no code of its own all are."""
        size = self.space[-1]
        return not (isinstance(start, int) and isinstance(size, int)) or 0 <= start + shift < size

    def _store(self, index: list[Index], value: Any) -> None:
        store_computed(self.args, index, {self.form.node.result: value})

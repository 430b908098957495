"""What kernels of convolutions share: the padded image in scratch memory, and where its pixels are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import tvm
from tvm import tirx
from tvm.ir.expr import TensorLoad

from graphopt.backends.forms.convform import ConvForm
from graphopt.backends.forms.support import behind_views
from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Arguments, Expressions
from graphopt.backends.tvm.lanes import Lanes
from graphopt.backends.tvm.loops import SMALL, product, vector_loop, vector_steps
from graphopt.ir.graph import Graph


class ConvImage(Lanes):
    """A region with one channels-last convolution, its sizes, and its image as a kernel reads it.

    Args:
        lanes: elements of a vector.
        parallel: whether loops may be launched in parallel.
    """

    def __init__(self, graph: Graph, form: ConvForm, lanes: int, parallel: bool) -> None:
        self.graph, self.form, self.lanes, self.parallel = graph, form, lanes, parallel
        self.code = code = Code(graph.symbols)
        self.args = Arguments(code, graph)
        self.channels = form.groups * form.inner
        self.held = scalar.COMPUTE[form.node.result.dtype]
        self.out = [code.bind_index(code.size(d), "size") for d in form.node.result.shape[:-1]]  # N, *S'
        self.pixels = code.bind_index(product(code, self.out), "pixels")
        self.space = [code.size(d) for d in form.x.shape[1:-1]]
        self.padded = [code.bind_index(code.simplify(n + p + q), "padded") for n, p, q in zip(self.space, form.low, form.high, strict=True)]

    def _kind(self, steps: Index) -> str:
        work = product(self.code, [self.pixels, self.form.filters * self.form.groups, self.form.depth])
        small = isinstance(work, int) and work < 4 * SMALL
        return "serial" if not self.parallel or small or (isinstance(steps, int) and steps == 1) else "parallel"

    def _zero(self) -> Any:
        return self._wide(tirx.const(0, self.held))

    def _place(self, row: Index, sizes: Sequence[Index]) -> list[Index]:
        """The index of the ``row``-th place among so many of each axis; the first size may be unknown, and so may be the others."""
        code = self.code
        if all(isinstance(n, int) for n in sizes[1:]):
            return [code.bind_index(i, "p", n) for i, n in zip(code.unflatten(row, sizes), sizes, strict=True)]
        at, left = [], code.bind_index(row, "r")
        for n in reversed(sizes[1:]):  # nothing is negative, which a floor division by an unknown size would allow for
            if isinstance(n, int) and n == 1:  # read at 0 by what broadcasts
                at.append(0)
                continue
            whole = code.bind_index(tirx.truncdiv(i64(left), i64(n)), "q")
            at.append(code.bind_index(left - whole * n, "p"))
            left = whole
        first: Index = 0 if sizes[0] == 1 else left  # an axis of size 1 is read at 0 by what broadcasts
        return [first, *reversed(at)]

    def _image(self) -> Any:
        """A buffer with the padded images, [N, *padded, C]."""
        form, code = self.form, self.code
        if form.plain:
            return self.args.inputs[form.x]
        channels = self.channels
        lines = [self.out[0], *self.padded[:-1]]
        buffer = code.alloc(product(code, [*lines, self.padded[-1], channels]), self.held, "image")
        probe = Probe(self.args, {}, form.x)
        probe([0] * form.x.type.rank)
        lanes, whole = 1 if probe.scalar_only else min(self.lanes, channels), self._whole_lines()
        turned = self._turned()
        count, zero = product(code, lines), tirx.const(0, self.held)
        size = product(code, [count, self.padded[-1], channels])
        small = isinstance(size, int) and size < SMALL
        count = code.bind_index(count, "lines")
        with code.loop(count, "serial" if small or not self.parallel else "parallel", "line") as line:
            n, *at = [code.bind_index(i, "i", m) for i, m in zip(code.unflatten(line, lines), lines, strict=True)]
            source = [code.bind_index(code.simplify(i - p), "s") for i, p in zip(at, form.low, strict=False)]
            edges = zip(source, self.space, form.low, form.high, strict=False)
            tests = [c for i, s, *pads in edges if any(pads) for c in (i64(i) >= i64(0), i64(i) < i64(s))]
            inside = tests[0] if tests else None
            for c in tests[1:]:
                inside = tirx.And(inside, c)
            start = code.simplify(line * self.padded[-1] * channels)

            def fill(first: Index, length: Index, start: Index = start) -> None:
                vector_loop(code, code.simplify(start + first), length, self.lanes, lambda i: code.store(buffer, i, zero))

            def copy(n: Index = n, source: Sequence[Index] = source, start: Index = start) -> None:
                pad = form.low[-1] * channels
                fill(0, pad)
                if turned:
                    self._turn_line(buffer, code.simplify(start + pad), [n, *source])
                elif whole:
                    self._copy_line(buffer, code.simplify(start + pad), [n, *source], code.simplify(self.space[-1] * channels))
                else:
                    with code.loop(self.space[-1], "serial", "w") as w:
                        base = code.simplify(start + pad + w * channels)

                        def element(c: Index) -> None:
                            code.store(buffer, base + c, Expressions(self.args, {}).at(form.x, [n, *source, w, c]))

                        vector_loop(code, 0, channels, lanes, element)
                fill(code.simplify(pad + self.space[-1] * channels), form.high[-1] * channels)

            if inside is None:
                copy()
            else:
                with code.when(inside):
                    copy()
                with code.when(tirx.Not(inside)):
                    fill(0, code.simplify(self.padded[-1] * channels))
        return buffer

    def _whole_lines(self) -> bool:
        """Whether a line of the image lies in memory as it is wanted: pixel after pixel, and nothing is converted."""
        steps = self._steps
        if steps is None or not self.code.equal(steps[0], self.channels):
            return False
        return self.channels == 1 or self.code.equal(steps[1], 1)

    def _turned(self) -> bool:
        """Whether a line of the image lies in memory channel by channel, pixels side by side."""
        source = behind_views(self.form.x)
        whole_vectors = self.lanes > 1 and self.lanes & (self.lanes - 1) == 0
        if not source.is_input or scalar.STORAGE[source.dtype] != self.held or not whole_vectors or self.channels == 1:
            return False
        return self._steps is not None and self.code.equal(self._steps[0], 1)

    @cached_property
    def _steps(self) -> tuple[Index, Index] | None:
        """How far apart in memory neighbouring pixels of a line are, and neighbouring channels; None if that is not the same everywhere."""
        code, x = self.code, self.form.x
        sizes = [*(code.size(d) for d in x.shape[:-1]), self.channels]
        index = [tirx.Var(code.fresh("i"), "int64") for _ in sizes]
        for var, size in zip(index, sizes, strict=True):
            code.analyzer.bind(var, tvm.ir.Range.from_min_extent(i64(0), i64(size)))
        probe = Expressions(self.args, {}, probe=True)
        element = probe.at(x, index)  # anywhere: a line may go on elsewhere in its midst, or lie outside
        if not isinstance(element, TensorLoad) or len(probe.addresses) != 1 or isinstance(probe.addresses[0], int):
            return None
        along = tvm.sym.detect_linear_equation(probe.addresses[0], index[-2:])
        steps = list(along)[:2]
        lead = {v.name for v in index[:-2]}
        if len(steps) < 2 or any(v.name in lead for s in steps for v in tirx.analysis.undefined_vars(s)):
            return None
        return steps[0], steps[1]

    def _copy_line(self, buffer: Any, start: Index, line: Sequence[Index], length: Index) -> None:
        """Copy ``length`` elements of a line of the image that lie side by side."""
        code = self.code
        probe = Expressions(self.args, {}, probe=True)
        probe.at(self.form.x, [*line, 0, 0])
        value, first = probe.reads[0]
        source, first = self.args.inputs[value], code.bind_index(first, "line")

        def element(i: Index) -> None:
            code.store(buffer, code.simplify(start + i), code.load(source, code.simplify(first + i)))

        vector_loop(code, 0, length, self.lanes, element)

    def _turn_line(self, buffer: Any, start: Index, line: Sequence[Index]) -> None:
        """Copy a line of an image whose channels are apart: ``lanes`` pixels by as many channels are turned in registers."""
        code, x, lanes, channels = self.code, self.form.x, self.lanes, self.channels

        def pixels(w: Index, width: int) -> None:
            if width == 1:
                to = code.simplify(start + w * channels)

                def element(c: Index) -> None:
                    code.store(buffer, code.simplify(to + c), Expressions(self.args, {}).at(x, [*line, w, c]))

                vector_loop(code, 0, channels, lanes, element)
                return
            if channels < lanes:
                self._interleave(buffer, start, line, w)
                return
            with code.loop(channels // lanes, "serial", "c") as c:
                self._turn(buffer, start, line, w, code.simplify(c * lanes))
            if channels % lanes:  # the last square overlaps the one before
                self._turn(buffer, start, line, w, channels - lanes)

        vector_steps(code, 0, self.space[-1], lanes, pixels)

    def _turn(self, buffer: Any, start: Index, line: Sequence[Index], w: Index, c: Index) -> None:
        """Copy a square from pixel ``w`` and channel ``c`` on. Each step interleaves the vectors of one half with those of the other."""
        code, lanes = self.code, self.lanes
        parts = self._channels(line, w, c, lanes)
        half = lanes // 2
        orders = [[k // 2 + k % 2 * lanes + side for k in range(lanes)] for side in (0, half)]
        for _ in range(half.bit_length()):
            parts = [code.bind(tirx.Shuffle([parts[i], parts[i + half]], order), "mix") for i in range(half) for order in orders]
        to = code.bind_index(code.simplify(start + w * self.channels + c), "to")
        for i, part in enumerate(parts):
            self._put(buffer, code.simplify(to + i * self.channels), part)

    def _interleave(self, buffer: Any, start: Index, line: Sequence[Index], w: Index) -> None:
        """Copy ``lanes`` pixels of few channels, from pixel ``w`` on: each vector that is written takes elements of all channels."""
        code, lanes, channels = self.code, self.lanes, self.channels
        parts = self._channels(line, w, 0, channels)
        to = code.bind_index(code.simplify(start + w * channels), "to")
        for q in range(channels):
            wanted = [divmod(q * lanes + lane, channels) for lane in range(lanes)]  # (pixel, channel)
            mixed = parts[0]
            for c in range(1, channels):  # lanes of channels behind c hold anything until these are there
                kept = [pixel if c == 1 else lane for lane, (pixel, _) in enumerate(wanted)]
                order = [lanes + pixel if channel == c else k for k, (pixel, channel) in zip(kept, wanted, strict=True)]
                mixed = code.bind(tirx.Shuffle([mixed, parts[c]], order), "mix")
            self._put(buffer, code.simplify(to + q * lanes), mixed)

    def _channels(self, line: Sequence[Index], w: Index, c: Index, count: int) -> list[Any]:
        """``lanes`` pixels of ``count`` channels, a vector each, from pixel ``w`` and channel ``c`` on; the channels lie apart."""
        code = self.code
        assert self._steps is not None
        probe = Expressions(self.args, {}, probe=True)
        probe.at(self.form.x, [*line, w, c])
        value, first = probe.reads[0]
        source, first = self.args.inputs[value], code.bind_index(first, "from")
        return [code.bind(self._vector(source, code.simplify(first + i * self._steps[1])), "a") for i in range(count)]

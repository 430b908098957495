"""Convolutions of 8-bit integers, summed exactly in 32 bits: an implicit matrix product, with what makes integers of the image before it
and floats, or integers again, of the sums behind it.

First the images are brought into scratch as integers with zeros around them (:class:`~graphopt.backends.tvm.convint8form.Planes`), lines
shared among the cores: there the pixels under a tap are rows of a tile, 64 bytes each, and one behind the other. An image of integers
that is read by one tap, its channels filling whole steps, lies so already. Then tasks multiply: some row tiles by some panels of the
weight, by the engines of :mod:`~graphopt.backends.tvm.int8`. While the tiles of a pair are multiplied, the vector units turn the sums of
the pair before into results.

References: Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures", SC 2018; Intel 64 and IA-32
Architectures Optimization Reference Manual, chapter 20 (AMX).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import prod
from typing import Any

from tvm import tirx

from graphopt.backends.forms.convform import ConvForm
from graphopt.backends.tvm import amx, dots8
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.convint8form import fours_of, in_place, planes_of
from graphopt.backends.tvm.dots8 import WORD
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Arguments, Expressions, Source, always, store_computed
from graphopt.backends.tvm.int8form import STEP
from graphopt.backends.tvm.loops import SMALL, product, vector_loop
from graphopt.backends.tvm.panelform import COLUMNS, TILE
from graphopt.errors import BuildError
from graphopt.ir.graph import Graph, Value

LINE = 64  # bytes of a cache line
LANES = 16  # channels that the epilogue takes at a time
PANEL = STEP * COLUMNS  # bytes of a step of a panel


class ConvInt8Kernel:
    """Emits a region with one channels-last convolution of integers and a pointwise epilogue of its shape.

    Args: see :func:`graphopt.backends.tvm.convint8form.params`.
    """

    def __init__(self, graph: Graph, form: ConvForm, engine: str, lanes: int, rows: int, group: int, panels: int, block: int,
                 ahead: bool, parallel: bool) -> None:  # fmt: skip
        self.graph, self.form, self.engine, self.lanes, self.mr = graph, form, engine, lanes, rows
        self.ahead, self.parallel = ahead, parallel
        self.code = code = Code(graph.symbols)
        self.args = Arguments(code, graph)
        packed = fours_of(form)
        if packed is None:
            raise BuildError("the weight is not packed in fours")
        self.weight = self.args.inputs[packed]
        self.planes = planes_of(form)
        self.steps = len(self.planes.moves) * self.planes.chunks
        self.block = min(block, self.steps) if engine == "amx" else self.steps
        self.panels = -(-form.filters // COLUMNS)
        self.share = min(panels, self.panels)
        self.side = (2 if engine == "amx" else 1) * rows  # places of a unit of work: a pair of tiles, or a tile
        self.tiles = -(-self.planes.flats // self.side)
        self.group = min(group, self.tiles)
        self.images = code.size(form.x.shape[0])
        self.unsigned = engine == "vnni"
        self.given = in_place(form, self.planes, self.side) and not self.unsigned
        self.long = self.tiles * self.side + self.planes.reach  # places of a plane
        row, chunks = self.planes.row, self.planes.chunks
        self.plane = self.long * row * chunks if self.planes.blocked else -(-((self.long + 1) * row + chunks * STEP) // LINE) * LINE
        self.sources = self._numbers()
        self.out_lanes = self._out_lanes()

    def _numbers(self) -> dict[Value, Source]:
        """How to read what is one number for all: it is read, and computed, once."""
        sources: dict[Value, Source] = {}
        summed = {self.form.node.result: None}
        for n in self.graph.nodes():
            if any(v in summed for v in n.operands):
                summed[n.result] = None
        for v in [*self.graph.inputs, *(n.result for n in self.graph.nodes() if n.name != "constant")]:
            if all(d == 1 for d in v.shape) and v not in summed and v.dtype.is_float:
                sources[v] = always(self.code.bind(Expressions(self.args, dict(sources)).at(v, [0] * v.type.rank), "number"))
        return sources

    def _out_lanes(self) -> int:
        for v in self.graph.outputs:
            probe = Probe(self.args, {**self.sources, self.form.node.result: lambda index: tirx.const(0, "int32")}, v)
            probe([0] * v.type.rank)
            if probe.scalar_only:
                return 1
        return LANES

    def emit(self) -> Code:
        code = self.code
        image = self.args.inputs[self.form.x] if self.given else self._image()
        groups, shares = -(-self.tiles // self.group), -(-self.panels // self.share)
        steps = product(code, [self.images, groups, shares])
        small = isinstance(self.images, int) and self.images * self.planes.flats * self.form.filters * self.form.depth < 32 * SMALL
        serial = not self.parallel or small or (isinstance(steps, int) and steps == 1)
        with code.loop(steps, "serial" if serial else "parallel", "task") as task:
            sizes = [self.images, groups, shares]
            n, go, jo = [code.bind_index(i, "t", m) for i, m in zip(code.unflatten(task, sizes), sizes, strict=True)]
            self._task(image, n, go, jo)
        return code

    # --- the image ----------------------------------------------------------------------------------------------------------

    def _image(self) -> Any:
        """The images in scratch, ``[image, phase]`` planes each."""
        code, planes = self.code, self.planes
        phases, pitch = len(planes.phases), planes.pitch[-1]
        lines = -(-self.long // pitch)
        size = code.simplify(self.images * (phases * self.plane))
        image = code.alloc(size, "uint8" if self.unsigned else "int8", "image")
        total = product(code, [self.images, phases, lines])
        small = isinstance(self.images, int) and self.images * prod(planes.size) * self.form.inner < SMALL
        serial = small or not self.parallel or (isinstance(total, int) and total == 1)
        with code.loop(total, "serial" if serial else "parallel", "line") as line:
            sizes = [self.images, phases, lines]
            n, k, i = [code.bind_index(v, "l", m) for v, m in zip(code.unflatten(line, sizes), sizes, strict=True)]
            for number in range(phases):
                with code.when(tirx.EQ(i64(k), i64(number))) if phases > 1 else nullcontext():
                    to = code.bind_index(code.simplify((n * phases + number) * self.plane), "plane")
                    self._line(image, n, planes.phases[number], to, i)
        return image

    def _line(self, image: Any, n: Index, phase: tuple[int, ...], to: Index, line: Index) -> None:
        """Fill the ``line``-th ``pitch`` places of a plane that begins at ``to``."""
        code, planes = self.code, self.planes
        pitch, stride, low, width = planes.pitch[-1], planes.stride[-1], planes.low[-1], planes.size[-1]
        start = code.bind_index(code.simplify(line * pitch), "start")
        count = pitch if self.long % pitch == 0 else code.bind_index(code.least(self.long - start, pitch), "count")
        place, tests = [], []
        lead = code.unflatten(line, list(planes.pitch[:-1])) if len(planes.pitch) > 1 else []
        for i, s, p, before, size in zip(lead, planes.stride, phase, planes.low, planes.size, strict=False):
            place.append(code.bind_index(code.simplify(i * s + (p - before)), "s"))
            tests += [i64(place[-1]) >= i64(0), i64(place[-1]) < i64(size)]
        if not lead:  # places beyond the line are asked for, too
            tests.append(tirx.EQ(i64(line), i64(0)))
        if planes.blocked:
            first, last = (-(-(edge - phase[-1]) // stride) for edge in (low, width + low))
        else:  # a line of pixels
            first, last, count = low, width + low, code.simplify(count * stride)
            start = code.simplify(start * stride)
        whole = pitch * (1 if planes.blocked else stride)
        first, last = max(first, 0), max(0, min(last, whole))
        first = min(first, last)
        inside = tests[0]
        for test in tests[1:]:
            inside = tirx.And(inside, test)
        inside = code.bind(inside, "inside")
        with code.when(inside):
            end = code.bind_index(code.least(count, last), "end") if not isinstance(count, int) or count < last else last
            begin = code.bind_index(code.least(count, first), "begin") if not isinstance(count, int) or count < first else first
            self._zeros(image, to, start, 0, begin)
            self._pixels(image, [n, *place], phase, to, start, begin, end)
            self._zeros(image, to, start, end, count)
        with code.when(tirx.Not(inside)):
            self._zeros(image, to, start, 0, count)

    def _zeros(self, image: Any, to: Index, start: Index, begin: Index, end: Index) -> None:
        """Zeros in a line that begins at ``start``, places (or pixels) from ``begin`` to ``end``."""
        code, planes = self.code, self.planes
        zero = tirx.const(128, "uint8") if self.unsigned else tirx.const(0, "int8")
        each = STEP if planes.blocked else self.form.inner
        count = code.simplify((end - begin) * each)
        if isinstance(count, int) and count <= 0:
            return
        with code.loop(planes.chunks if planes.blocked else 1, "serial", "c") as c:
            first = code.bind_index(code.simplify(to + c * (self.long * STEP) + (start + begin) * each), "first")
            vector_loop(code, first, count, STEP if planes.blocked else 16, lambda i: code.store(image, i, zero))

    def _pixels(self, image: Any, place: list[Index], phase: tuple[int, ...], to: Index, start: Index, begin: Index, end: Index) -> None:
        code, planes, channels = self.code, self.planes, self.form.inner
        probe = Probe(self.args, self.sources, self.form.x)
        probe([0] * self.form.x.type.rank)
        given = self.form.x.is_input
        lanes = 1 if probe.scalar_only else STEP if given else LANES
        first = planes.low[-1] - (phase[-1] if planes.blocked else 0)
        step = planes.stride[-1] if planes.blocked else 1

        def element(index: list[Index], at: Index) -> None:
            value = Expressions(self.args, dict(self.sources)).at(self.form.x, index)
            if self.unsigned:
                value = tirx.bitwise_xor(tirx.reinterpret("uint8", value), tirx.const(128, "uint8"))
            code.store(image, at, value)

        with code.loop(code.simplify(end - begin), "serial", "p") as p:
            i = code.simplify(begin + p)
            column = code.bind_index(code.simplify(i * step - first), "column")
            if planes.blocked:
                with code.loop(planes.chunks, "serial", "c") as c:
                    at = code.bind_index(code.simplify(to + (c * self.long + start + i) * STEP), "at")

                    def one(v: Index, c: Index = c, at: Index = at, column: Index = column) -> None:
                        element([*place, column, code.simplify(c * STEP + v)], code.simplify(at + v))

                    vector_loop(code, 0, STEP, lanes, one)
            else:
                at = code.bind_index(code.simplify(to + (start + i) * channels), "at")
                vector_loop(code, 0, channels, min(lanes, channels), lambda v: element([*place, column, v], code.simplify(at + v)))

    # --- a task -------------------------------------------------------------------------------------------------------------

    def _task(self, image: Any, n: Index, go: Index, jo: Index) -> None:
        """A group of row tiles (or pairs of them) by a share of the panels."""
        code = self.code
        tile = code.simplify(go * self.group)
        here = self.group if self.tiles % self.group == 0 else code.bind_index(code.least(self.tiles - tile, self.group), "tiles")
        start = code.bind_index(code.simplify(tile * self.side), "start")  # the task's first place
        first = code.bind_index(code.simplify(jo * self.share), "first")
        count = self.share if self.panels % self.share == 0 else code.bind_index(code.least(self.panels - first, self.share), "panels")
        self._moves(n, start)
        self.acc = code.alloc(2 * self.side * COLUMNS, "int32", "acc")
        self.total = code.alloc(self.group * self.side * COLUMNS, "int32", "total") if self.block < self.steps else None
        if self.engine == "amx":
            amx.configure(code, {t: self.mr if t < 6 else TILE for t in range(8)})
        with code.loop(count, "serial", "j") as j:
            panel = code.bind_index(code.simplify(first + j), "panel", self.panels)
            if self.engine == "amx":
                self._blocks(image, n, start, here, panel)
            else:
                self._dots(image, n, start, here, panel)
        if self.engine == "amx":
            amx.release(code)

    def _moves(self, n: Index, start: Index) -> None:
        """Where a task's places under each line of the weight begin, for :meth:`_place`."""
        code, planes = self.code, self.planes
        phases = len(planes.phases)
        base = n * prod(planes.size) * self.form.inner if self.given else n * (phases * self.plane)
        base = code.bind_index(code.simplify(base + start * self._row), "base")
        places = [k * self.plane + distance * planes.row + beyond for k, distance, beyond in planes.moves]
        self.base: Any = base
        self.moves: Any = None
        if len(places) > 1:
            self.moves = code.alloc(len(places), "int64", "moves")
            for t, at in enumerate(places):
                code.store(self.moves, t, i64(code.simplify(base + at)))

    @property
    def _row(self) -> int:
        """Bytes from place to place."""
        return self.form.inner if self.given else self.planes.row

    def _place(self, step: Index) -> Index:
        """Where the task's first place under a step lies."""
        code, chunks = self.code, self.planes.chunks
        line, chunk = code.div(step, chunks), code.mod(step, chunks)
        at = self.base if self.moves is None else code.bind_index(code.load(self.moves, line), "move")
        return code.simplify(at + chunk * (self.long * STEP if self.planes.blocked and not self.given else STEP))

    # --- tiles --------------------------------------------------------------------------------------------------------------

    def _blocks(self, image: Any, n: Index, start: Index, here: Index, panel: Index) -> None:
        """A panel by tiles 0 to 3, which hold sums, of 4 and 5, of the image, and 6 and 7, of the weight."""
        code, block = self.code, self.block
        blocks = -(-self.steps // block)
        last = (blocks - 1) * block
        if blocks > 1:
            with code.loop(blocks - 1, "serial", "b") as b, code.loop(here, "serial", "io") as io:
                self._pair(image, n, start, io, panel, code.simplify(b * block), block, b, False)
        with code.loop(here, "serial", "io") as io:
            self._pair(image, n, start, io, panel, last, self.steps - last, blocks - 1, True)
        with code.loop(self.side, "serial", "r") as row:
            self._finish(n, start, code.bind_index(code.simplify(here - 1), "before"), row, panel)

    def _pair(self, image: Any, n: Index, start: Index, io: Index, panel: Index, step: Index, count: int, block: Index, last: bool) -> None:
        """``count`` steps from ``step`` on for a pair of row tiles; in the ``last`` block the pair before is finished meanwhile."""
        code = self.code
        sums = [(i, c) for i in range(2) for c in range(2)]
        at = code.bind_index(code.simplify(io * (self.side * COLUMNS)), "total")

        def spot(base: Index, i: int, c: int) -> Index:
            return code.simplify(base + (i * self.mr * COLUMNS + c * TILE))

        def load_totals() -> None:
            for i, c in sums:
                amx.load(code, 2 * i + c, self.total, spot(at, i, c), COLUMNS * 4)

        def begin() -> None:
            for i, c in sums:
                amx.zero(code, 2 * i + c)

        if isinstance(block, int):
            (load_totals if block else begin)()
        else:
            with code.when(tirx.EQ(i64(block), i64(0))):
                begin()
            with code.when(i64(block) > i64(0)):
                load_totals()
        moved = code.bind_index(code.simplify(io * (self.side * self._row)), "moved")
        w = code.bind_index(code.simplify(panel * (self.steps * PANEL) + step * PANEL), "w")
        rows = -(-self.side // count)  # rows that a step finishes
        lines = -(-PANEL // LINE // self.group)
        before = code.bind_index(code.simplify(io - 1), "before")
        with code.loop(count, "serial", "s") as s:
            x = code.bind_index(code.simplify(self._place(code.simplify(step + s)) + moved), "x")
            y = code.bind_index(code.simplify(w + s * PANEL), "y")
            for c in range(2):
                amx.load(code, 6 + c, self.weight, code.simplify(y + c * TILE * WORD), COLUMNS * WORD)
            for i in range(2):
                amx.load(code, 4 + i, image, code.simplify(x + i * self.mr * self._row), self._row)
            for i, c in sums:
                amx.multiply_bytes(code, 2 * i + c, 4 + i, 6 + c)
            if self.ahead:
                fetched = code.simplify((io * count + s) * lines)
                for q in range(lines):
                    code.prefetch(self.weight, code.simplify(w + count * PANEL + (fetched + q) * LINE))
            if last:
                with code.when(i64(io) > i64(0)):
                    first = code.simplify(s * rows)
                    left = rows if self.side % count == 0 else code.greatest(code.least(self.side - first, rows), 0)
                    with code.loop(left if isinstance(left, int) else code.bind_index(left, "left"), "serial", "r") as r:
                        self._finish(n, start, before, code.simplify(first + r), panel)
        to = code.bind_index(code.simplify(code.mod(io, 2) * (self.side * COLUMNS)), "to") if last else at
        for i, c in sums:
            amx.store(code, 2 * i + c, self.acc if last else self.total, spot(to, i, c), COLUMNS * 4)

    # --- dot instructions ---------------------------------------------------------------------------------------------------

    def _dots(self, image: Any, n: Index, start: Index, here: Index, panel: Index) -> None:
        """A panel by rows: four elements of a pixel are broadcast, and multiplied with four of each filter."""
        code, lanes = self.code, self.lanes
        vectors = 2 if lanes * 2 <= COLUMNS else 1
        width = vectors * lanes
        base = code.bind_index(code.simplify(panel * (self.steps * PANEL)), "w")
        taken = []
        if self.unsigned:
            taken = dots8.excess(code, self.engine, self.weight, base, COLUMNS * WORD, self.steps * STEP // WORD, COLUMNS // lanes, lanes)
        with code.loop(here, "serial", "io") as io:
            moved = code.bind_index(code.simplify(io * (self.side * self._row)), "moved")
            for column in range(0, COLUMNS, width):
                sums = dots8.zeros(code, self.mr * vectors, lanes)
                with code.loop(self.steps, "serial", "s") as s:
                    x = code.bind_index(code.simplify(self._place(s) + moved), "x")
                    with code.loop(STEP // WORD, "serial", "k") as k:
                        y = code.simplify(base + s * PANEL + (k * COLUMNS + column) * WORD)
                        ws = [dots8.words(code, self.weight, code.simplify(y + v * lanes * WORD), lanes) for v in range(vectors)]
                        for i in range(self.mr):
                            four = dots8.four(code, image, code.simplify(x + i * self._row + k * WORD), lanes)
                            for v, w in enumerate(ws):
                                dots8.add(code, self.engine, sums[i * vectors + v], four, w, lanes)
                for i in range(self.mr):
                    for v in range(vectors):
                        to = code.simplify(i * COLUMNS + column + v * lanes)
                        value = dots8.vector(sums[i * vectors + v], lanes)
                        value = value - taken[column // lanes + v] if taken else value
                        code.emit(tirx.BufferStore(self.acc, value, [dots8.ramp(to, lanes)]))
            with code.loop(self.side, "serial", "r") as row:
                self._finish(n, start, io, row, panel, 0)

    # --- results ------------------------------------------------------------------------------------------------------------

    def _finish(self, n: Index, start: Index, io: Index, row: Index, panel: Index, half: Index | None = None) -> None:
        """Store what becomes of the sums of a row, if it has a result. They lie in one half of the scratch, as halves take turns."""
        code, planes = self.code, self.planes
        half = code.mod(io, 2) if half is None else half
        at = code.bind_index(code.simplify((half * self.side + row) * COLUMNS), "at")
        place = code.bind_index(code.simplify(start + io * self.side + row), "place")
        index = code.unflatten(place, list(planes.pitch))
        if not planes.whole:
            index = [code.bind_index(i, "i", m) for i, m in zip(index, planes.pitch, strict=True)]
        tests = [i64(i) < i64(o) for i, o, pitch in zip(index, planes.out, planes.pitch, strict=True) if pitch > o]
        if planes.flats % self.side:
            tests.append(i64(place) < i64(planes.flats))
        test = tests[0] if tests else None
        for more in tests[1:]:
            test = tirx.And(test, more)
        first: Index = 0 if isinstance(self.images, int) and self.images == 1 else n
        index = [0 if o == 1 else i for i, o in zip(index, planes.out, strict=True)]  # as operands that broadcast are read
        with code.when(test) if test is not None else nullcontext():
            self._store(at, [first, *index], panel)

    def _store(self, at: Index, index: Sequence[Index], panel: Index) -> None:
        code, filters, lanes = self.code, self.form.filters, self.out_lanes

        def element(c: Index) -> None:
            total = code.bind(code.load(self.acc, code.simplify(at + c)))
            channel: Index = 0 if filters == 1 else code.simplify(panel * COLUMNS + c)
            store_computed(self.args, [*index, channel], {self.form.node.result: total}, self.sources)

        for c in range(0, COLUMNS, LANES):
            left = code.simplify(filters - panel * COLUMNS - c)
            if filters % LANES == 0:
                with nullcontext() if filters % COLUMNS == 0 or c == 0 else code.when(i64(left) > i64(0)):
                    vector_loop(code, c, LANES, lanes, element)
                continue
            left = code.bind_index(code.least(left, LANES), "left")
            with code.when(tirx.EQ(i64(left), i64(LANES))):
                vector_loop(code, c, LANES, lanes, element)
            with code.when(i64(left) < i64(LANES)), code.loop(code.greatest(left, 0), "serial", "v") as v:
                element(code.simplify(c + v))

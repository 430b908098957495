"""Convolution of f32 on AMX tiles: an implicit matrix product whose factors are split into thirds (see :mod:`thirds`).

A task splits its pixels first, all channels, once for all taps: the pixels under a tap are rows of a tile, 64 bytes each and one
behind the other (:class:`~graphopt.backends.tvm.convthirdform.Planes`). The weight is split block by block while the tiles multiply
the block before, and so the epilogue of a tile is computed during the next one: the vector units have nothing else to do.

References: Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures", SC 2018; Henry, Tang and
Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", IEEE ARITH 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import prod
from typing import Any

from tvm import tirx

from graphopt.backends.forms.convform import ConvForm
from graphopt.backends.tvm import amx
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.convthirdform import chunks_of, planes_of
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Arguments, Expressions, Source, store_computed
from graphopt.backends.tvm.loops import SMALL
from graphopt.backends.tvm.partsproduct import LANES, WORDS, is_nan
from graphopt.backends.tvm.thirdform import COLUMNS, STEP, TILE
from graphopt.backends.tvm.thirds import ORDER, PARTS, split_pair, thirds
from graphopt.errors import BuildError
from graphopt.ir.graph import Graph, Value

_INFINITE = 0x7F800000


class ConvThirdsKernel:
    """Emits a region with one channels-last convolution and a pointwise epilogue of its shape.

    Args: see :func:`graphopt.backends.tvm.convthirdform.params`.
    """

    def __init__(self, graph: Graph, form: ConvForm, block: int, rows: int, group: int, panels: int, fetch: bool, ahead: bool,
                 parallel: bool) -> None:  # fmt: skip
        self.graph, self.form, self.block, self.mr = graph, form, block, rows
        self.fetch, self.ahead, self.parallel = fetch, ahead, parallel
        self.code = code = Code(graph.symbols)
        self.args = Arguments(code, graph)
        if form.packed is None:
            raise BuildError("the weight is not packed")
        self.weight = self.args.inputs[form.packed]
        self.planes, self.chunks = planes_of(form), chunks_of(form)
        self.taps = prod(form.kernel)
        self.blocks = self.taps * self.chunks // block
        self.panels = -(-form.filters // COLUMNS)
        self.share = min(panels, self.panels)
        self.pairs = -(-self.planes.flats // (2 * rows))
        self.group = min(group, self.pairs)
        self.side = 2 * rows  # places of a pair of tiles
        self.long = self.group * self.side + self.planes.reach  # places of a plane of a task
        self.lanes = self._lanes()
        pads = any((*form.low, *form.high))
        # the places of the image are those of the results: an index is best left for the address to take it together again
        self.whole = not pads and self.planes.pitch == self.planes.out == self.planes.size
        self.kind = "vectorized" if self._vectorized else "serial"

    @property
    def _vectorized(self) -> bool:
        """Whether the image can be read by vectors of channels."""
        probe = Probe(self.args, {}, self.form.x)
        probe([0] * self.form.x.type.rank)
        return not probe.scalar_only

    def _lanes(self) -> int:
        """Channels that the epilogue takes at a time."""
        for v in self.graph.outputs:
            probe = Probe(self.args, {self.form.node.result: lambda index: tirx.const(0, "float32")}, v)
            probe([0] * v.type.rank)
            if probe.scalar_only:
                return 1
        return LANES if self.form.filters % LANES == 0 else 8

    def emit(self) -> Code:
        code = self.code
        groups, shares = -(-self.pairs // self.group), -(-self.panels // self.share)
        steps = groups * shares
        small = self.planes.flats * self.form.filters * self.form.depth < 8 * SMALL
        with code.loop(steps, "serial" if not self.parallel or small or steps == 1 else "parallel", "task") as task:
            go, jo = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(task, [groups, shares]), [groups, shares], strict=True)]
            self._task(go, jo)
        return code

    # --- a task -------------------------------------------------------------------------------------------------------------

    def _task(self, go: Index, jo: Index) -> None:
        """A group of pairs of row tiles by a share of the panels."""
        code = self.code
        pair = code.simplify(go * self.group)
        here = self.group if self.pairs % self.group == 0 else code.bind_index(code.least(self.pairs - pair, self.group), "pairs")
        self.start = code.bind_index(code.simplify(pair * self.side), "start")  # the task's first place
        first = code.bind_index(code.simplify(jo * self.share), "first")
        count = self.share if self.panels % self.share == 0 else code.bind_index(code.least(self.panels - first, self.share), "panels")
        self.left = code.alloc(len(self.planes.phases) * self.chunks * PARTS * self.long * STEP, "uint16", "left")
        self.split = code.alloc(2 * self._block_words(), "uint32", "split")
        self.acc = code.alloc(2 * self.side * COLUMNS, "float32", "acc")
        self.total = code.alloc(self.group * self.side * COLUMNS, "float32", "total") if self.blocks > 1 else None
        self.largest = code.alloc(LANES, "int32", "largest")
        amx.configure(code, {t: self.mr if t < 6 else TILE for t in range(8)})
        with code.loop(self.block * STEP, "serial", "u") as unit:
            self._split_unit(first, 0, 0, unit)
        self._split_image(code.simplify(here * self.side + self.planes.reach))
        with code.loop(count, "serial", "jo") as j:
            panel = code.bind_index(code.simplify(first + j), "panel", self.panels)
            turn = code.simplify(j * self.blocks)
            if self.blocks > 1:
                with code.loop(self.blocks - 1, "serial", "b") as b:
                    self._block(here, panel, b, code.simplify(turn + b), panel, code.simplify(b + 1), last=False)
                self._finish_pair(code.simplify(here - 1), panel, self.blocks - 2, last=False)
            # behind a panel's last block comes the next panel; behind all of them nothing: then the last one is split once more
            following = code.bind_index(code.least(panel + 1, self.panels - 1), "next")
            self._block(here, panel, self.blocks - 1, code.simplify(turn + (self.blocks - 1)), following, 0, last=True)
            self._finish_pair(code.simplify(here - 1), panel, self.blocks - 1, last=True)
        amx.release(code)

    def _block_words(self) -> int:
        return self.block * 2 * PARTS * WORDS

    def _block(self, here: Index, panel: Index, block: Index, turn: Index, next_panel: Index, next_block: Index, last: bool) -> None:
        """Multiply a block for all pairs of row tiles; split the next one, and finish the pair before, meanwhile.

        Before the first pair is the last one of the block before, if there was one and it was finished in the same way.
        """
        code, steps = self.code, self.block
        half = code.bind_index(code.mod(turn, 2), "half", 2)  # of the scratch for split blocks, which take turns
        mine = code.bind_index(code.simplify(half * self._block_words()), "mine")
        other = code.bind_index(code.simplify((1 - half) * self._block_words()), "other")
        units = steps * STEP
        each = -(-units // (self.group * steps))  # units that a step splits
        rows = -(-self.side // steps)  # rows that a step finishes
        with code.loop(here, "serial", "io") as io:
            for t in range(4):
                amx.zero(code, t)
            begins = tirx.EQ(i64(io), i64(0))
            before, added = code.bind_index(code.simplify(io - 1), "before"), block
            if not last:
                before = code.bind(tirx.Select(begins, i64(here), i64(io)) - i64(1), "before", hidden=False)
                added = code.bind(tirx.Select(begins, i64(block - 1), i64(block)), "added", hidden=False)
            wanted = i64(io) > i64(0) if last else i64(added) >= i64(0)
            if last:
                self._forget()
            with code.loop(steps, "serial", "s") as s:
                unit = code.bind_index(code.simplify((io * steps + s) * each), "unit")

                def split_one(q: int, unit: Index = unit) -> None:
                    u = code.simplify(unit + q)
                    with code.when(i64(u) < i64(units)) if each * steps * self.group > units else nullcontext():
                        self._split_unit(next_panel, next_block, other, u)

                def finish_one(q: int, s: Index = s) -> None:
                    row = code.simplify(s * rows + q)
                    test = tirx.And(wanted, i64(row) < i64(self.side)) if self.side % steps else wanted
                    with code.when(test):
                        self._finish(before, row, panel, added, last)
                    if last and self.fetch:
                        self._fetch(io, row, panel)

                jobs = [*((split_one, q) for q in range(each)), *((finish_one, q) for q in range(rows))]
                self._step(io, code.simplify(block * steps + s), code.simplify(mine + s * (2 * PARTS * WORDS)), jobs)
            at = code.bind_index(code.simplify(code.mod(io, 2) * (self.side * COLUMNS)), "at")
            for i in range(2):
                for c in range(2):
                    amx.store(code, 2 * i + c, self.acc, code.simplify(at + i * self.mr * COLUMNS + c * LANES), COLUMNS * 4)
            if last:
                with code.when(wanted):
                    self._mend(before, panel)
        done = code.simplify(here * (steps * each))
        if not isinstance(done, int) or done < units:
            with code.loop(code.greatest(code.simplify(units - done), 0), "serial", "u") as u:
                self._split_unit(next_panel, next_block, other, code.simplify(done + u))

    def _finish_pair(self, io: Index, panel: Index, block: int, last: bool) -> None:
        """What is left when no tiles multiply meanwhile."""
        code = self.code
        io = code.bind_index(io, "before")
        if last:
            self._forget()
        with code.loop(self.side, "serial", "r") as r:
            self._finish(io, r, panel, block, last)
        if last:
            self._mend(io, panel)

    def _step(self, io: Index, step: Index, w: Index, jobs: Sequence[tuple[Callable[[int], None], int]]) -> None:
        """32 of the summed axis: six products of 2 x 2 tiles. Tiles 0 to 3 are sums, 4 and 5 of the image, 6 and 7 of the weight."""
        code = self.code
        tap, chunk = code.div(step, self.chunks), code.mod(step, self.chunks)
        plane, distance = self._move(tap)
        plane = code.bind_index(code.simplify((plane * self.chunks + chunk) * (PARTS * self.long)), "plane")
        x = code.bind_index(code.simplify((plane + io * self.side + distance) * STEP), "x")
        w = code.bind_index(w, "y")
        held: tuple[int, int] = (-1, -1)
        for n, (p, q) in enumerate(ORDER):
            for i in range(2):
                if held[0] != p:
                    amx.load(code, 4 + i, self.left, code.simplify(x + (p * self.long + i * self.mr) * STEP), STEP * 2)
            for c in range(2):
                if held[1] != q:
                    amx.load(code, 6 + c, self.split, code.simplify(w + (c * PARTS + q) * WORDS), LANES * 4)
            held = (p, q)
            for i in range(2):
                for c in range(2):
                    amx.multiply(code, 2 * i + c, 4 + i, 6 + c)
            for job, k in jobs[n :: len(ORDER)]:
                job(k)

    def _move(self, tap: Index) -> tuple[Index, Index]:
        """The plane that a tap reads, and the distance from a result's place."""
        code, moves = self.code, self.planes.moves
        if isinstance(tap, int):
            return moves[tap]
        plane: Index = moves[-1][0]
        distance: Index = moves[-1][1]
        for t, (p, d) in reversed(list(enumerate(moves[:-1]))):
            here = tirx.EQ(i64(tap), i64(t))
            if plane is not p:
                plane = tirx.Select(here, i64(p), i64(plane))
            distance = tirx.Select(here, i64(d), i64(distance))
        return (code.bind(plane, "plane") if not isinstance(plane, int) else plane), code.bind(distance, "distance")

    # --- the image ----------------------------------------------------------------------------------------------------------

    def _split_image(self, count: Index) -> None:
        """The places from the task's first on, as ``[phase, chunk, third, place, 32]``."""
        code, planes = self.code, self.planes
        with code.loop(count, "serial", "p") as p:
            place = code.bind_index(code.simplify(self.start + p), "place")
            index = self._index(place)
            for k, phase in enumerate(planes.phases):
                source = [code.bind_index(code.simplify(i * s + (r - low)), "s")
                          for i, s, r, low in zip(index[1:], planes.stride, phase, planes.low, strict=True)]  # fmt: skip
                tests = [i64(place) < i64(planes.images * prod(planes.pitch))]
                for i, n in zip(source, planes.size, strict=True):
                    tests += [i64(i) >= i64(0), i64(i) < i64(n)]
                inside = code.bind(_all(tests), "inside")
                with code.loop(self.chunks, "serial", "c") as c:
                    to = code.bind_index(code.simplify(((k * self.chunks + c) * (PARTS * self.long) + p) * STEP), "to")
                    with code.when(inside):
                        self._split_pixel([index[0], *source], c, to, self.kind)
                    with code.when(tirx.Not(inside)):
                        for part in range(PARTS):
                            self._put(self.left, code.simplify(to + part * (self.long * STEP)), tirx.const(0, "uint16"), STEP)

    def _split_pixel(self, place: list[Index], chunk: Index, to: Index, kind: str) -> None:
        """32 channels of a pixel."""
        code, channels = self.code, self.form.inner
        values = code.alloc(STEP, "float32", "values")
        each = LANES if channels % LANES == 0 else 8

        def read(u: int) -> None:
            with code.loop(each, kind, "v") as v:
                code.store(values, u + v, Expressions(self.args, {}).at(self.form.x, [*place, code.simplify(chunk * STEP + u + v)]))

        for u in range(0, STEP, each):
            always = channels % STEP == 0 or (isinstance(chunk, int) and chunk * STEP + u < channels)
            there = i64(code.simplify(chunk * STEP + u)) < i64(channels)
            with nullcontext() if always else code.when(there):
                read(u)
            if not always:
                with code.when(tirx.Not(there)):
                    self._put(values, u, tirx.const(0.0, "float32"), each)
        parts = [thirds(code.bind(values[_ramp(u, LANES)], "x"), LANES) for u in range(0, STEP, LANES)]
        upper = [tirx.const(i, "int32") for i in range(1, 2 * STEP, 2)]  # the upper halves of the words
        for part in range(PARTS):
            halves = [tirx.reinterpret(f"uint16x{2 * LANES}", three[part]) for three in parts]
            packed = tirx.Shuffle(halves, upper)
            code.emit(tirx.BufferStore(self.left, packed, [_ramp(code.simplify(to + part * (self.long * STEP)), STEP)]))

    def _put(self, buffer: Any, at: Index, value: Any, lanes: int) -> None:
        self.code.emit(tirx.BufferStore(buffer, tirx.Broadcast(value, lanes), [_ramp(at, lanes)]))

    def _index(self, place: Index) -> list[Index]:
        """The index [n, *o] of a place."""
        code, sizes = self.code, [self.planes.images, *self.planes.pitch]
        n, *at = code.unflatten(place, sizes)
        if self.whole:
            return [0 if self.planes.images == 1 else n, *at]
        return [code.bind_index(n, "n"), *(code.bind_index(i, "i", m) for i, m in zip(at, self.planes.pitch, strict=True))]

    # --- the weight ---------------------------------------------------------------------------------------------------------

    def _split_unit(self, panel: Index, block: Index, to: Index, unit: Index) -> None:
        """Two rows by 16 columns of a block: pairs of neighbouring rows, side by side, for each third."""
        code, channels = self.code, self.form.inner
        step, pair, c = code.div(unit, STEP), code.div(code.mod(unit, STEP), 2), code.mod(unit, 2)
        at = code.simplify(block * self.block + step)
        row = code.simplify(at * STEP + pair * 2)
        if channels % STEP:  # rows behind a tap's last channel meet zeros
            row = code.simplify(code.div(at, self.chunks) * channels + code.mod(at, self.chunks) * STEP + pair * 2)
            row = code.least(row, self.form.depth - 2)
        start = code.bind_index(code.simplify(panel * (self.form.depth * COLUMNS) + row * COLUMNS + c * LANES), "from")
        if self.ahead:
            for line in range(2):
                code.prefetch(self.weight, code.simplify(start + (self.block * STEP + line) * COLUMNS))
        tile = code.simplify((step * 2 + c) * (PARTS * WORDS) + pair * LANES)
        split_pair(code, self.weight, start, self.split, code.bind_index(code.simplify(to + tile), "to"))

    # --- sums and results ---------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._put(self.largest, 0, tirx.const(0, "int32"), LANES)

    def _finish(self, io: Index, row: Index, panel: Index, block: Index, last: bool) -> None:
        """Add a row's sums to its totals, or, behind the last block, store what becomes of them."""
        code = self.code
        at = code.bind_index(code.simplify((code.mod(io, 2) * self.side + row) * COLUMNS), "at")
        total = code.bind_index(code.simplify((io * self.side + row) * COLUMNS), "total") if self.total is not None else 0
        if not last:
            assert self.total is not None
            # nothing stands in the totals before the first block
            begun = tirx.Broadcast(tirx.Select(tirx.EQ(i64(block), i64(0)), tirx.const(0, "int32"), tirx.const(-1, "int32")), LANES)
            for c in range(0, COLUMNS, LANES):
                to = _ramp(code.simplify(total + c), LANES)
                old = tirx.reinterpret(f"float32x{LANES}", tirx.bitwise_and(tirx.reinterpret(f"int32x{LANES}", self.total[to]), begun))
                code.emit(tirx.BufferStore(self.total, old + self.acc[_ramp(code.simplify(at + c), LANES)], [to]))
            return

        def store(index: list[Index]) -> None:
            bits = []
            for c in range(0, COLUMNS, LANES):
                place = _ramp(code.simplify(at + c), LANES)
                value = self.acc[place]
                if self.total is not None:
                    value = code.bind(value + self.total[_ramp(code.simplify(total + c), LANES)], "sum")
                    code.emit(tirx.BufferStore(self.acc, value, [place]))
                mask = tirx.Broadcast(tirx.const(0x7FFFFFFF, "int32"), LANES)
                bits.append(tirx.bitwise_and(tirx.reinterpret(f"int32x{LANES}", value), mask))
            seen = tirx.Max(tirx.Max(*bits), self.largest[_ramp(0, LANES)])
            code.emit(tirx.BufferStore(self.largest, seen, [_ramp(0, LANES)]))
            self._store(at, index, panel)

        self._at_result(io, row, store)

    def _at_result(self, io: Index, row: Index, body: Callable[[list[Index]], None]) -> None:
        """``body(the index of a row's result)``, if the row has one."""
        code, planes = self.code, self.planes
        place = code.bind_index(code.simplify(self.start + io * self.side + row), "place")
        index = self._index(place)
        tests = [i64(i) < i64(n) for i, n, pitch in zip(index[1:], planes.out, planes.pitch, strict=True) if pitch > n]
        if planes.flats % self.side:
            tests.append(i64(place) < i64(planes.flats))
        with code.when(_all(tests)) if tests else nullcontext():
            body(index)

    def _store(self, at: Index, index: list[Index], panel: Index) -> None:
        """Store the results of a row, whose sums begin at ``at``."""
        code, lanes, filters = self.code, self.lanes, self.form.filters
        for c in range(0, COLUMNS, lanes):
            channel = code.simplify(panel * COLUMNS + c)
            there = code.when(i64(channel) < i64(filters)) if filters % COLUMNS else nullcontext()
            with there, code.loop(lanes, "vectorized" if lanes > 1 else "serial", "v") as v:
                self._element(code.simplify(at + c + v), [*index, code.simplify(channel + v)])

    def _element(self, at: Index, index: list[Index]) -> None:
        store_computed(self.args, index, {self.form.node.result: self.code.bind(self.code.load(self.acc, at))})

    def _fetch(self, io: Index, row: Index, panel: Index) -> None:
        """Ask for the memory that the epilogue of a row reads and writes."""
        code = self.code
        index = self._index(code.simplify(self.start + io * self.side + row))
        sources: dict[Value, Source] = {self.form.node.result: lambda index: tirx.const(0, "float32")}
        for c in range(0, COLUMNS, LANES):
            at = [*index, code.simplify(panel * COLUMNS + c)]
            for k, v in enumerate(self.graph.outputs):
                code.prefetch(self.args.outputs[k], self.args.place(k, at), level=1)
                expressions = Expressions(self.args, sources, probe=True)
                expressions.at(v, at)
                for read, where in expressions.reads:
                    if read.type.rank > 1:
                        code.prefetch(self.args.inputs[read], where, level=1)

    def _mend(self, io: Index, panel: Index) -> None:
        """If a sum of a pair is nan, sum such rows again, one product after the other, as f32."""
        code, form = self.code, self.form
        seen = tirx.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", self.largest[_ramp(0, LANES)])
        with code.when(seen > tirx.const(_INFINITE, "int32")), code.loop(self.side, "serial", "r") as row:
            at = code.bind_index(code.simplify((code.mod(io, 2) * self.side + row) * COLUMNS), "at")

            def again(index: list[Index]) -> None:
                bad = [tirx.Select(is_nan(self.acc[_ramp(code.simplify(at + c), LANES)]), tirx.Broadcast(tirx.const(1, "int32"), LANES),
                                   tirx.Broadcast(tirx.const(0, "int32"), LANES)) for c in range(0, COLUMNS, LANES)]  # fmt: skip
                found = tirx.call_llvm_pure_intrin("int32", "llvm.vector.reduce.or", tirx.bitwise_or(*bad))
                with code.when(tirx.NE(found, tirx.const(0, "int32"))):
                    resum(index)

            def resum(index: list[Index]) -> None:
                for c in range(0, COLUMNS, LANES):
                    self._put(self.acc, code.simplify(at + c), tirx.const(0.0, "float32"), LANES)
                with code.loop(self.taps, "serial", "tap") as tap:
                    taps = [code.bind_index(i, "k", n) for i, n in zip(code.unflatten(tap, form.kernel), form.kernel, strict=True)]
                    source = [code.bind_index(code.simplify(i * s + t * d - low), "s") for i, s, t, d, low in
                              zip(index[1:], form.stride, taps, form.dilation, form.low, strict=True)]  # fmt: skip
                    tests = [t for i, n in zip(source, self.planes.size, strict=True) for t in (i64(i) >= i64(0), i64(i) < i64(n))]
                    with code.when(_all(tests)), code.loop(form.inner, "serial", "k") as k:
                        x = code.bind(Expressions(self.args, {}).at(form.x, [index[0], *source, k]), "x")
                        w = code.bind_index(code.simplify((panel * form.depth + tap * form.inner + k) * COLUMNS), "w")
                        for c in range(0, COLUMNS, LANES):
                            place = _ramp(code.simplify(at + c), LANES)
                            y = self.weight[_ramp(code.simplify(w + c), LANES)]
                            code.emit(tirx.BufferStore(self.acc, self.acc[place] + tirx.Broadcast(x, LANES) * y, [place]))
                self._store(at, index, panel)

            self._at_result(io, row, again)


def _ramp(at: Index, lanes: int) -> Any:
    return tirx.Ramp(i64(at), i64(1), lanes)


def _all(tests: Sequence[Any]) -> Any:
    out = tests[0]
    for t in tests[1:]:
        out = tirx.And(out, t)
    return out

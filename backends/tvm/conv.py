"""Convolution by register tiles: ``rows`` pixels by ``columns`` channels are summed in registers (an implicit matrix product).

Where lines are of known length, and tiles divide them nearly evenly, a tile is a piece of a line, whose pixels lie at known steps; the
last one of a line overlaps the one before, and what both write is the same.

Images are channels-last. One tap of the kernel along the last spatial axis and the channels below it are one contiguous
run of products for every pixel, so the loop over them is that of a matrix product whose rows start anywhere. Padding is
not tested for: a padded image is copied to scratch memory first, in a form that every tile reads without a condition; an
image without padding is read in place. The weight is read in panels of ``columns`` channels; if the region does not hold
it packed, it is packed first.

Long sums are taken in blocks, and within a block all tiles of a task are computed before the next one: the block of the
weight stays in the cache, and the rounding error that of a library's.

Reference: Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures", SC 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from tvm import tirx

from graphopt.backends.forms.convform import ConvForm, tiles_a_task
from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.convimage import ConvImage
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Expressions, Source, store_computed
from graphopt.backends.tvm.loops import SMALL, product
from graphopt.ir.graph import Graph, Value

LINE = 64  # bytes of a cache line
Place = Index  # of a tile: the index of its first pixel, a list [n, *s], or that pixel's number


class ConvKernel(ConvImage):
    """Emits a region with one channels-last convolution and a pointwise epilogue of its shape.

    Args:
        lanes: elements of a vector.
        rows, columns: the tile; columns are a multiple of lanes.
        unroll: steps of the summed axis that are unrolled, at most.
        tiles: tiles of a task.
        block: products summed before the sum is added to the total, about.
        fetch: whether what the epilogue reads and writes is fetched before the sum.
        split: what threads divide first, ``pixels`` or ``panels``.
        ahead: whether the weight of the next block is brought into the second-level cache during this one.
        tasks: at least wanted, where there are so many tiles.
    """

    def __init__(self, graph: Graph, form: ConvForm, lanes: int, rows: int, columns: int, unroll: int, tiles: int, block: int,
                 fetch: bool, split: str, ahead: bool, tasks: int, parallel: bool) -> None:  # fmt: skip
        super().__init__(graph, form, lanes, parallel)
        self.mr, self.nr, self.tiles = rows, columns, tiles
        self.block, self.fetch, self.split, self.ahead, self.tasks = block, fetch, split, ahead, tasks
        self.panels = -(-form.filters // columns)  # of a group
        self.across = form.tiles_across(rows, columns // lanes)  # 0: a tile may go on in the next line
        # a run of contiguous products: the channels, and with them the taps of the last axis
        joined = form.dilation[-1] == 1 and form.groups == 1
        self.taps = form.kernel[:-1] if joined else form.kernel
        self.run = form.depth // prod(self.taps)
        self.unroll = self._unrolled(unroll)

    def _unrolled(self, wanted: int) -> int:
        """Steps that are written one after the other: of a short run as many as divide it, up to twice as many as wanted.

        Of a tile along a line, no two pixels may read the same element within them: LLVM would keep those in registers that it lacks.
        """
        apart = self.form.step if self.across and not self.form.neighbours_share else 2 * wanted
        if self.run >= 64:
            return min(wanted, apart)
        most = min(2 * wanted, apart)
        return max((u for u in range(2, most + 1) if self.run % u == 0), default=min(wanted, most))

    def emit(self) -> Code:
        code = self.code
        weight, image = self._weight(), self._image()
        tiles = product(code, [*self.out[:-1], self.across]) if self.across else code.ceildiv(self.pixels, self.mr)
        count = code.bind_index(tiles, "tiles")
        chunks, length, blocks = self._blocks()
        per_task = self._tiles_a_task(count)
        pieces = code.bind_index(code.ceildiv(count, per_task), "pieces")
        panels = self.form.groups * self.panels
        steps = product(code, [panels, pieces])
        with code.loop(steps, self._kind(steps), "task") as task:
            j, piece = self._task(task, panels, pieces)
            first = code.simplify(piece * per_task)
            here = code.bind_index(code.least(count - first, per_task), "tiles")
            if blocks == 1:
                total = code.alloc(self.mr * self.nr, self.held, "total")
                with code.loop(here, "serial", "tile") as tile:
                    place = self._tile(code.simplify(first + tile))
                    if self.fetch:
                        self._fetch_ends(j, place)
                    acc = self._sum(weight, image, j, place, 0, prod(self.taps), 0, self.run, (tile, per_task))
                    self._each(acc, 0, lambda sums, at, q: self._put(total, q, self._vector(sums, at)))
                    self._store(total, 0, j, place)
                return code
            total = code.alloc(per_task * self.mr * self.nr, self.held, "total")
            with code.loop(per_task * self.mr * self.nr // self.lanes, "serial", "q") as q:
                self._put(total, code.simplify(q * self.lanes), self._zero())
            with code.loop(blocks, "serial", "block") as block, code.loop(here, "serial", "tile") as tile:
                place = self._tile(code.simplify(first + tile))
                if chunks > 1:
                    tap, start = code.div(block, chunks), code.simplify(code.mod(block, chunks) * length)
                    size = length if self.run % length == 0 else code.bind_index(code.least(self.run - start, length))
                    acc = self._sum(weight, image, j, place, tap, 1, start, size, (tile, per_task))
                else:
                    tap, all_taps = code.simplify(block * length), prod(self.taps)
                    taps = length if all_taps % length == 0 else code.bind_index(code.least(all_taps - tap, length))
                    acc = self._sum(weight, image, j, place, tap, taps, 0, self.run, (tile, per_task))
                base = code.simplify(tile * (self.mr * self.nr))
                self._each(acc, base, lambda sums, at, q: self._put(total, q, self._vector(total, q) + self._vector(sums, at)))
            with code.loop(here, "serial", "tile") as tile:
                self._store(total, code.simplify(tile * (self.mr * self.nr)), j, self._tile(code.simplify(first + tile)))
        return code

    def _task(self, task: Index, panels: Index, pieces: Index) -> tuple[Index, Index]:
        """Which panel and which piece of the pixels a task is."""
        code, sizes = self.code, [pieces, panels] if self.split == "pixels" else [panels, pieces]
        at = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(task, sizes), sizes, strict=True)]
        return (at[1], at[0]) if self.split == "pixels" else (at[0], at[1])

    def _blocks(self) -> tuple[int, int, int]:
        """(chunks of a run, their length, blocks in all); or with one chunk: (1, taps of a block, blocks)."""
        taps = prod(self.taps)
        if self.run * taps <= self.block * 3 // 2:
            return 1, taps, 1
        if self.run > self.block * 3 // 2:
            chunks = -(-self.run // self.block)
            length = -(-self.run // chunks)
            length = -(-length // self.unroll) * self.unroll
            return -(-self.run // length), length, taps * -(-self.run // length)
        group = max(1, self.block * 3 // 2 // self.run)
        group = next((g for g in range(group, 0, -1) if taps % g == 0 and 2 * g > group), group)
        return 1, group, -(-taps // group)

    def _tiles_a_task(self, count: Index) -> int:
        """As many tiles as wanted, but tasks enough for many threads."""
        return tiles_a_task(count, self.form.groups * self.panels, self.tiles, self.tasks) if isinstance(count, int) else self.tiles

    # --- vectors --------------------------------------------------------------------------------------------------------

    def _each(self, acc: Sequence[Any], base: Index, body: Callable[[Any, int, Index], None]) -> None:
        """``body(a pixel's sums, a vector's place in them, its place in a buffer of tiles)`` for all vectors of a tile."""
        for i, sums in enumerate(acc):
            for u in range(0, self.nr, self.lanes):
                body(sums, u, self.code.simplify(base + (i * self.nr + u)))

    # --- operands -------------------------------------------------------------------------------------------------------

    def _weight(self) -> Any:
        """A buffer with the weight in panels [groups * panels, depth, columns]."""
        form, code = self.form, self.code
        if form.packed is not None and form.packed.shape[-1] == self.nr and form.packed.dtype == form.node.result.dtype:
            return self.args.inputs[form.packed]
        panels, depth = form.groups * self.panels, form.depth
        buffer = code.alloc(panels * depth * self.nr, self.held, "weights")
        with code.loop(panels * depth, "parallel" if panels * depth * self.nr > SMALL and self.parallel else "serial", "k") as step:
            j, k = code.unflatten(step, [panels, depth])
            sizes = [*form.kernel, form.inner]
            at = [code.bind_index(i, "i", n) for i, n in zip(code.unflatten(k, sizes), sizes, strict=True)]
            group, column = code.div(j, self.panels), code.simplify(code.mod(j, self.panels) * self.nr)
            with code.loop(self.nr, "serial", "v") as v:
                o = code.simplify(column + v)
                inside = code.simplify(group * form.filters + code.least(o, form.filters - 1))
                value = Expressions(self.args, {}).at(form.w, [*at, inside])
                code.store(buffer, step * self.nr + v, tirx.Select(i64(o) < i64(form.filters), value, tirx.const(0, self.held)))
        return buffer

    # --- the tile -------------------------------------------------------------------------------------------------------

    def _tile(self, number: Index) -> Place:
        """Where a tile begins: the index of its first pixel where all are of one line, else that pixel's number."""
        code = self.code
        if not self.across:
            return code.simplify(number * self.mr)
        width = self.out[-1]
        *lead, piece = self._place(number, [*self.out[:-1], self.across])
        x = code.simplify(piece * self.mr)
        if width % self.mr:  # the last tile overlaps the one before
            x = code.bind_index(code.least(x, width - self.mr), "x", width - self.mr + 1)
        return [*lead, x]

    def _pixel(self, place: Place, i: Index, clipped: bool = False) -> list[Index]:
        """The index [n, *s] of the ``i``-th pixel of a tile; ``clipped``: or that of the last one that there is."""
        code = self.code
        if isinstance(place, list):
            return [*place[:-1], code.simplify(place[-1] + i)]
        row = code.simplify(place + i)
        return self._place(code.bind_index(code.least(row, self.pixels - 1), "r") if clipped and not self._exact else row, self.out)

    @property
    def _exact(self) -> bool:
        """Whether all tiles are whole."""
        return self.across > 0 or (isinstance(self.pixels, int) and self.pixels % self.mr == 0)

    def _starts(self, place: Place, group: Index) -> list[Index]:
        """Where the first product of each pixel of a tile lies in the image."""
        code, form = self.code, self.form
        channels, first = self.channels, code.simplify(group * form.inner)

        def start(pixel: Sequence[Index]) -> Index:
            n, *at = (i if k == 0 else code.simplify(i * form.stride[k - 1]) for k, i in enumerate(pixel))
            return code.bind_index(code.simplify(code.flatten([n, *at], [self.out[0], *self.padded]) * channels + first), "x")

        if isinstance(place, list):
            begin = start(place)
            return [code.simplify(begin + i * form.step) for i in range(self.mr)]
        if not form.pointwise:
            return [start(self._pixel(place, i, clipped=True)) for i in range(self.mr)]
        rows = [code.simplify(place + i) for i in range(self.mr)]
        rows = rows if self._exact else [code.bind_index(code.least(r, self.pixels - 1), "r") for r in rows]
        return [code.bind_index(code.simplify(r * channels + first), "x") for r in rows]

    def _sum(self, weight: Any, image: Any, j: Index, place: Place, tap: Index, taps: Index, start: Index, length: Index,
             part: tuple[Index, int]) -> list[Any]:  # fmt: skip
        """Sum ``length`` products, from ``start`` of the run, of each of ``taps`` taps, for all pixels and channels of a tile.

        ``part``: the tile's number in its task, and how many there are. Returns the sums, a buffer a pixel.
        """
        code, form, lanes = self.code, self.form, self.lanes
        vectors = self.nr // lanes
        group = code.div(j, self.panels) if form.groups > 1 else 0
        rows = self._starts(place, group)
        # a pixel's accumulators a buffer: small enough to become registers, whatever else the loop does with memory
        acc = [code.alloc(self.nr, self.held, "acc") for _ in rows]
        self._each(acc, 0, lambda sums, at, _: self._put(sums, at, self._zero()))
        channels = form.groups * form.inner
        dilation = form.dilation
        with code.loop(taps, "serial", "tap") as t:
            which = code.simplify(tap + t)
            at = code.unflatten(which, self.taps) if self.taps else []
            steps = [code.simplify(i * d) for i, d in zip(at, dilation, strict=False)]
            steps += [0] * (len(form.kernel) - len(steps))
            offset = code.bind_index(code.simplify(code.flatten(steps, self.padded) * channels + start), "dx")
            base = code.bind_index(code.simplify((j * form.depth + which * self.run + start) * self.nr), "dw")

            def step(k: Index) -> None:
                ws = [code.bind(self._vector(weight, code.simplify(base + k * self.nr + u * lanes)), "w") for u in range(vectors)]
                for sums, r in zip(acc, rows, strict=True):
                    x = self._wide(code.bind(code.load(image, code.simplify(r + offset + k)), "a"))
                    for u, w in enumerate(ws):
                        self._put(sums, u * lanes, self._vector(sums, u * lanes) + x * w)

            whole, rest = code.div(length, self.unroll), code.mod(length, self.unroll)
            ahead = self._next_block(weight, code.simplify(base - t * length * self.nr), taps, length, t, part) if self.ahead else None
            with code.loop(whole, "serial", "k") as k:
                if ahead is not None:
                    ahead(k)
                for q in range(self.unroll):
                    step(code.simplify(k * self.unroll + q))
            if not (isinstance(rest, int) and rest == 0):
                with code.loop(rest, "serial", "k") as k:
                    step(code.simplify(whole * self.unroll + k))
        return acc

    def _next_block(self, weight: Any, start: Index, taps: Index, length: Index, tap: Index,
                    part: tuple[Index, int]) -> Callable[[Index], None]:  # fmt: skip
        """What to do at an unrolled step of a tap's products to bring a part of the next block of the weight nearer.

        Blocks lie one after the other, and so do panels; each tile of a task asks for an equal part of the block that begins
        behind the one at ``start``, of ``length`` products for each of ``taps`` taps.
        """
        code, (tile, tiles) = self.code, part
        line = LINE // (8 if self.held == "float64" else 4)  # elements of a cache line
        lines = -(-self.nr * self.unroll // (line * tiles))
        steps = code.div(length, self.unroll)
        done = code.simplify((tile * taps + tap) * steps * (lines * line))
        first = code.bind_index(code.simplify(start + taps * length * self.nr + done), "ahead")

        def step(k: Index) -> None:
            for q in range(lines):
                code.prefetch(weight, code.simplify(first + (k * lines + q) * line))

        return step

    # --- the epilogue -----------------------------------------------------------------------------------------------------

    def _fetch_ends(self, j: Index, place: Place) -> None:
        """Ask for the memory that the epilogue of a tile reads pixel by pixel, and for the memory that it writes."""
        code, form = self.code, self.form
        column = code.simplify(code.mod(j, self.panels) * self.nr)
        shift = code.simplify(code.div(j, self.panels) * form.filters) if form.groups > 1 else 0
        sources: dict[Value, Source] = {form.node.result: lambda index: tirx.const(0, self.held)}
        with code.loop(self.mr, "serial", "i") as i:
            pixel = self._pixel(place, i, clipped=True)
            for c in range(0, self.nr, LINE // form.node.result.dtype.itemsize):
                index = [*pixel, code.simplify(shift + column + c)]
                for k, v in enumerate(self.graph.outputs):
                    code.prefetch(self.args.outputs[k], self.args.place(k, index), level=1)
                    expressions = Expressions(self.args, sources, probe=True)
                    expressions.at(v, index)
                    for read, at in expressions.reads:
                        if read.type.rank > 1:
                            code.prefetch(self.args.inputs[read], at, level=1)

    def _store(self, acc: Any, base: Index, j: Index, place: Place) -> None:
        """Write the tile, pixel by pixel: whole vectors of channels, and single ones where they end."""
        code, filters, lanes = self.code, self.form.filters, self._store_lanes()
        count = self.mr if self._exact else code.bind_index(code.least(self.pixels - place, self.mr), "rows")
        column = code.simplify(code.mod(j, self.panels) * self.nr)
        shift = code.simplify(code.div(j, self.panels) * filters) if self.form.groups > 1 else 0
        with code.loop(count, "serial", "i") as i:
            pixel = self._pixel(place, i)
            line = code.simplify(base + i * self.nr)

            def one(c: Index) -> None:
                self._element(acc, code.simplify(line + c), [*pixel, code.simplify(shift + column + c)])

            def vector(u: Index) -> None:
                with code.loop(lanes, "vectorized", "v") as v:
                    one(code.simplify(u * lanes + v))

            if filters % self.nr == 0:
                with code.loop(self.nr // lanes, "serial", "u") as u:
                    vector(u)
                return
            left = code.bind_index(code.least(filters - column, self.nr), "left")
            whole = code.div(left, lanes)
            with code.loop(whole, "serial", "u") as u:
                vector(u)
            with code.loop(code.simplify(left - whole * lanes), "serial", "c") as c:
                one(code.simplify(whole * lanes + c))

    def _store_lanes(self) -> int:
        for v in self.graph.outputs:
            probe = Probe(self.args, {self.form.node.result: lambda index: tirx.const(0, self.held)}, v)
            probe([0] * v.type.rank)
            if probe.scalar_only:
                return 1
        return self.lanes

    def _element(self, acc: Any, at: Index, index: list[Index]) -> None:
        result = self.form.node.result
        store_computed(self.args, index, {result: scalar.rounded(self.code.bind(self.code.load(acc, at)), result.dtype)})

"""Attention in tiles, with a running softmax: scores never leave the cache, so memory grows with the length, not its square.

A task takes some queries of one head and goes through the keys in blocks. Queries lie along the lanes: scores are kept as
``[keys, queries]`` and sums as ``[value columns, queries]``, so that the maximum, the sum and the rescaling of the softmax are
plain vector operations, and an element of K or V is a number that is broadcast from wherever it lies. Neither is transposed or
copied, whatever their strides; queries are transposed once, the result back once. Base-2 logarithms of the weights are kept:
log2(e) is part of the scale.

Keys that no query of a group sees are left out: before a block, whole tiles at its ends, and whole blocks. What a query does not
see within a tile is set to -inf by position. A mask is looked through, a block at a time, before anything else is done for the block:
blocks that it hides cost that look, and where it hides nothing it is not added.

Reference: Dao, "FlashAttention-2", arXiv:2307.08691; Milakov and Gimelshein, "Online normalizer calculation for softmax",
arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from tvm import tirx

from graphopt.backends.forms.flashform import Form, seen_span
from graphopt.backends.tvm import scalar, vecmath
from graphopt.backends.tvm.attended import LOG2E, NONE, SOME, Extra, Matrix, head_index, place_of
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.dropped import Dropped
from graphopt.backends.tvm.expr import Arguments
from graphopt.backends.tvm.loops import SMALL, product, vector_loop
from graphopt.backends.tvm.prologue import write_row
from graphopt.backends.tvm.squares import transpose_square
from graphopt.ir.graph import Graph
from graphopt.ir.opset.attention_training import EMPTY

F32 = "float32"


class FlashKernel:
    """Emits a region with one attention.

    Args:
        lanes: elements of a vector.
        vectors: of queries side by side in a register tile: a *group* of queries.
        rows: keys, or columns of values, of a register tile.
        block: keys of a block, a multiple of ``rows``.
        groups: groups of queries that a task takes.
        unroll: steps of a summed axis that are written out.
        stage: copy a block of keys and of values to scratch before it is used.
    """

    def __init__(self, graph: Graph, form: Form, lanes: int, vectors: int, rows: int, block: int, groups: int, unroll: int,
                 stage: bool, parallel: bool) -> None:  # fmt: skip
        self.graph, self.form, self.lanes, self.nr, self.mr, self.block = graph, form, lanes, lanes * vectors, rows, block
        self.groups, self.unroll, self.stage, self.parallel = groups, unroll, stage, parallel
        self.code = code = Code(graph.symbols)
        self.args = Arguments(code, graph)
        self.attrs = form.node.attrs
        self.m, self.n = code.size(form.queries), code.size(form.keys)
        self.depth, self.width = form.depth, form.width
        self.batch = [code.size(d) for d in form.batch]
        self.offset = code.size(self.attrs["offset"])
        self.window = None if self.attrs["window"] is None else code.size(self.attrs["window"])
        self.cap = self.attrs["softcap"]
        self.whole, self.fill = form.reads_all, form.fill
        self.extra = Extra(self.args, form, self.fill)
        self.dropped = Dropped(self.args, form)
        self.held = groups  # groups whose transposed queries are kept

    def emit(self) -> Code:
        code, span = self.code, self.groups * self.nr
        pieces = code.ceildiv(self.m, span)
        steps = product(code, [*self.batch, pieces])
        work = product(code, [*self.batch, self.m, self.n, self.depth + self.width])
        serial = not self.parallel or (isinstance(work, int) and work < 4 * SMALL) or (isinstance(steps, int) and steps == 1)
        with code.loop(steps, "serial" if serial else "parallel", "task") as task:
            at = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(task, [*self.batch, pieces]), [*self.batch, pieces])]
            self.lead, piece = at[:-1], self._balanced(at[-1], pieces)
            self.start = code.bind_index(code.simplify(piece * span), "start")
            self._task(code.bind_index(code.least(code.ceildiv(self.m, self.nr) - piece * self.groups, self.groups), "count"))
        return code

    def _balanced(self, t: Index, pieces: Index) -> Index:
        """From both ends in turn, where later queries see more: any run of tasks then has about the same work."""
        code = self.code
        if not self.attrs["causal"] or self.window is not None or (isinstance(pieces, int) and pieces == 1):
            return t
        half, odd = code.div(t, 2), code.mod(t, 2)
        return code.bind_index(code.simplify(half + odd * (pieces - 1 - 2 * half)), "piece", pieces)

    # --- one task -----------------------------------------------------------------------------------------------------------

    def _task(self, count: Index) -> None:
        self._alloc()
        keys, values = self._matrices()
        staged = [m.staged(self.block, self.lanes) if self.stage or not m.plain else None for m in (keys, values)]

        def fill(base: Index, here: Index) -> tuple[Matrix, Matrix]:
            k, v = (copy.fill(m, base, here) if copy is not None else m.moved(base) for m, copy in zip((keys, values), staged))
            return k, v

        self._blocks(count, fill)

    def _alloc(self) -> None:
        """Scratch of a task."""
        code, nr = self.code, self.nr
        deep, wide = (-(-n // self.lanes) * self.lanes for n in (self.depth, self.width))
        self.deep, self.wide = deep, wide
        self.qt, self.ot = (code.alloc(n * nr, F32, name) for n, name in ((self.held * deep, "queries"), (self.groups * wide, "sums")))
        self.rows_of = code.alloc(nr * max(deep, wide), F32, "line")  # queries, or results, as rows
        self.top, self.total = (code.alloc(self.groups * nr, F32, name) for name in ("top", "total"))
        self.scores = code.alloc(self.block * nr, F32, "scores")
        self.extra.alloc(self.block, nr, self.lanes)
        self.dropped.alloc(self.block, self.groups * nr, self.lanes)
        if self.extra.scans:
            self.states = code.alloc(self.groups, "int32", "states")

    def _matrices(self) -> tuple[Matrix, Matrix]:
        k, v = (Matrix(self.args, v, head_index(self.code, self.form, v, self.lead)) for v in (self.form.parts.k, self.form.parts.v))
        return k, v

    def _blocks(self, count: Index, fill: Callable[[Index, Index], tuple[Matrix, Matrix]]) -> None:
        """All blocks of keys for all groups of a task; ``fill`` gives a block of keys and values, its first key and their number."""
        code, nr, block = self.code, self.nr, self.block
        with code.loop(count, "serial", "g") as g:
            self._begin(g)
        first, last = seen_span(code, self.form, self.start, code.simplify(self.start + count * nr - 1))
        begin = code.bind_index(code.div(first, block), "begin")
        end = code.bind_index(code.simplify(code.ceildiv_plain(last, block)), "end")
        with code.loop(code.simplify(code.greatest(end - begin, 0)), "serial", "b") as b:
            base = code.bind_index(code.simplify((begin + b) * block), "base")
            here = block if isinstance(self.n, int) and self.n % block == 0 else code.bind_index(code.least(self.n - base, block), "here")

            def visit(base: Index = base, here: Index = here) -> None:
                k, v = fill(base, here)
                self.extra.keys_of(self.lead, base, here)
                self.dropped.keys_of(base, here)
                with code.loop(count, "serial", "g") as g:
                    self._block(g, base, here, k, v)

            if self.extra.scans:
                with code.when(tirx.NE(self._scan(count, base, here), tirx.const(NONE, "int32"))):
                    visit()
            else:
                visit()
        with code.loop(count, "serial", "g") as g:
            self._end(g)

    def _scan(self, count: Index, base: Index, here: Index) -> Any:
        """What the mask leaves of a block for each group, into ``states``; whether it leaves anything."""
        code, zero = self.code, tirx.const(0, "int32")
        found = code.alloc(1, "int32", "found")
        code.store(found, 0, zero)
        with code.loop(count, "serial", "g") as g:
            state = self.extra.scan(self.lead, code.bind_index(code.simplify(self.start + g * self.nr), "first"), base, here)
            code.store(self.states, g, state)
            code.store(found, 0, tirx.bitwise_or(code.load(found, 0), state))
        return code.load(found, 0)

    def _begin(self, g: Index) -> None:
        """A group's queries, scaled and transposed; no sums yet."""
        code, nr = self.code, self.nr
        q = self.form.parts.q
        lead = head_index(code, self.form, q, self.lead)
        first = code.bind_index(code.simplify(self.start + g * nr), "first")
        factor = tirx.const(self.attrs["scale"] * (LOG2E if self.cap is None else 1.0 / self.cap), F32)
        with code.loop(nr, "serial", "i") as i:
            row = code.bind_index(self._clamped(code.simplify(first + i), self.m, nr), "row")

            def element(d: Index, x: Any) -> None:
                code.store(self.rows_of, code.simplify(i * self.deep + d), x * factor)

            write_row(self.args, q, lambda d: [*lead, row, d], self.lanes, element)
        place = code.simplify(g * (self.deep * nr)) if self.held > 1 else 0
        self._transposed(self.rows_of, self.deep, 0, self.qt, nr, place, nr, self.deep)
        self.dropped.rows_of(self.lead, first, code.simplify(g * nr), nr)
        top, total = self.extra.sink(self.lead)
        for at in self._lanes(code.simplify(g * nr)):
            code.store(self.top, at, top)
            code.store(self.total, at, total)
        with code.loop(code.simplify(self.wide * (nr // self.lanes)), "serial", "z") as z, code.loop(self.lanes, "vectorized", "v") as v:
            code.store(self.ot, code.simplify(g * (self.wide * nr) + z * self.lanes + v), tirx.const(0.0, F32))

    def _lanes(self, base: Index = 0, width: int | None = None) -> Iterator[Index]:
        """Each lane of a group (or of ``width``), as the loop over a vector's lanes that it stands in: its place behind ``base``."""
        for u in range(0, width or self.nr, self.lanes):
            with self.code.loop(self.lanes, "vectorized", "v") as v:
                yield self.code.simplify(base + u + v)

    def _transposed(self, source: Any, step: int, start: Index, to: Any, to_step: int, to_start: Index, rows: Index, columns: int,
                    scale: Callable[[Index], Any] | None = None) -> None:  # fmt: skip
        """``to[column, row] = source[row, column]``, squares of lanes at a time; both sizes are multiples of lanes."""
        code, lanes = self.code, self.lanes
        with code.loop(code.div(rows, lanes), "serial", "sr") as r, code.loop(columns // lanes, "serial", "sc") as c:
            vectors = []
            for i in range(lanes):
                at = code.simplify(start + (r * lanes + i) * step + c * lanes)
                x = self._load(source, at)
                vectors.append(code.bind(x if scale is None else x * scale(code.simplify(c * lanes)), "row"))
            out = transpose_square(code, vectors, lanes) if lanes > 1 else vectors
            for j, x in enumerate(out):
                at = code.simplify(to_start + (c * lanes + j) * to_step + r * lanes)
                code.emit(tirx.BufferStore(to, x, [self._ramp(at)]))

    def _ramp(self, at: Index) -> Any:
        return tirx.Ramp(i64(at), i64(1), self.lanes) if self.lanes > 1 else i64(at)

    def _load(self, buffer: Any, at: Index) -> Any:
        return tirx.BufferLoad(buffer, [self._ramp(at)])

    def _clamped(self, i: Index, size: Index, step: int) -> Index:
        return i if isinstance(size, int) and size % step == 0 else self.code.least(i, size - 1)

    # --- a block of keys for a group of queries -------------------------------------------------------------------------------

    def _block(self, g: Index, base: Index, here: Index, k: Matrix, v: Matrix) -> None:
        code, nr = self.code, self.nr
        first = code.bind_index(code.simplify(self.start + g * nr), "first")
        self.first, self.base = first, base
        low: Index = 0
        high = here
        if self.form.is_local and not self.whole:
            seen = seen_span(code, self.form, first, code.simplify(first + nr - 1))
            high = code.bind_index(code.greatest(code.least(here, seen[1] - base), 0), "high")
            if self.window is not None:
                low = code.bind_index(code.simplify(code.div(code.greatest(seen[0] - base, 0), self.mr) * self.mr), "low")
        conditions = [i64(low) < i64(high)] if self.form.is_local and not self.whole else []
        if self.extra.scans:
            conditions.append(tirx.NE(code.load(self.states, g), tirx.const(NONE, "int32")))
        with ExitStack() as stack:
            for condition in conditions:
                stack.enter_context(code.when(condition))
            self._span(g, low, high, k, v)

    def _span(self, g: Index, low: Index, high: Index, k: Matrix, v: Matrix) -> None:
        code = self.code
        count = high if isinstance(low, int) and low == 0 else code.bind_index(code.simplify(high - low), "count")
        self._products(g, low, count, k)
        top = code.alloc(self.nr, F32, "highest")
        if not self.extra.scans or self.form.parts.bias is not None:
            self.extra.block_of(self.lead, self.first, self.base, high)
            self._changes(g, low, high, count, top, True)
        else:
            state, some = code.load(self.states, g), tirx.const(SOME, "int32")
            with code.when(tirx.EQ(state, some)):
                self.extra.block_of(self.lead, self.first, self.base, high)
                self._changes(g, low, high, count, top, True)
            with code.when(tirx.NE(state, some)):
                self._changes(g, low, high, count, top, False)
        again = code.alloc(self.nr, F32, "again")
        self._weights(g, low, count, top, again)
        self._sums(g, low, count, again, v)

    def _changes(self, g: Index, low: Index, high: Index, count: Index, top: Any, tables: bool) -> None:
        """The maximum of what scores become: where each query sees all keys by position, and where not."""
        code, with_masks = self.code, self._partial(low, high)
        if with_masks is None:
            return self._maximum(g, low, count, top, False, tables)
        with code.when(with_masks):
            self._maximum(g, low, count, top, True, tables)
        with code.when(tirx.Not(with_masks)):
            self._maximum(g, low, count, top, False, tables)
        return None

    def _partial(self, low: Index, high: Index) -> Any:
        """Whether a query of the group does not see a key of the span; None if each surely sees all."""
        if not self.form.is_local:
            return None
        start, last = self.first + self.offset, self.first + (self.nr - 1 + self.offset)
        conditions = [i64(self.base + high - 1) > i64(start)] if self.attrs["causal"] else []
        if self.window is not None:
            conditions.append(i64(self.base + low) <= i64(last - self.window))
            if not self.attrs["causal"]:
                conditions.append(i64(self.base + high - 1) >= i64(start + self.window))
        some = conditions[0]
        for c in conditions[1:]:
            some = tirx.Or(some, c)
        return some

    def _products(self, g: Index, low: Index, count: Index, k: Matrix) -> None:
        """Scores of the span: keys times queries."""
        queries = self.code.bind_index(self.code.simplify(g * (self.deep * self.nr)), "queries")
        self._rows_times(k, low, count, self.qt, queries, self.depth, self.scores)

    def _rows_times(self, k: Matrix, low: Index, count: Index, lines: Any, first: Index, depth: int, to: Any) -> None:
        """Rows of a block times ``lines``, ``[depth, queries]`` from ``first`` on; whole tiles are written."""
        code, nr = self.code, self.nr
        tiles = code.ceildiv_plain(count, self.mr)
        with code.loop(tiles if isinstance(tiles, int) else code.bind_index(tiles, "tiles"), "serial", "t") as t:
            row = code.bind_index(code.simplify(low + t * self.mr), "row")

            def tile(rows: Sequence[Callable[[Index], Any]]) -> None:
                acc = self._accumulators(len(rows))
                self._multiply(acc, depth, lambda d, at: code.load(lines, code.simplify(first + d * nr + at)), rows)
                for i, sums in enumerate(acc):
                    for at in self._lanes():
                        code.store(to, code.simplify((row + i) * nr + at), code.load(sums, at))

            def straight() -> None:
                start = k.row(row)
                tile([partial(k.at, start, i) for i in range(self.mr)])

            if k.padded or (isinstance(self.n, int) and self.n % self.mr == 0):
                straight()
                return
            inside = i64(self.base + row + self.mr) <= i64(self.n)
            with code.when(inside):
                straight()
            with code.when(tirx.Not(inside)):
                starts = [k.row(code.least(row + i, self.n - self.base - 1)) for i in range(self.mr)]
                tile([partial(k.at, start, 0) for start in starts])

    def _accumulators(self, rows: int, width: int | None = None) -> list[Any]:
        code = self.code
        acc = [code.alloc(width or self.nr, F32, "acc") for _ in range(rows)]
        for sums in acc:
            for at in self._lanes(0, width):
                code.store(sums, at, tirx.const(0.0, F32))
        return acc

    def _multiply(self, acc: Sequence[Any], length: Index, line_at: Callable[[Index, Index], Any],
                  rows: Sequence[Callable[[Index], Any]], width: int | None = None) -> None:  # fmt: skip
        """``acc[i] += rows[i](s) * line(s)`` for all steps s; a line is ``width`` long, or a group."""
        code = self.code
        line = code.alloc(width or self.nr, F32, "side")

        def step(s: Index) -> None:
            for at in self._lanes(0, width):
                code.store(line, at, line_at(s, at))
            for sums, element in zip(acc, rows, strict=True):
                x = code.bind(element(s), "x")
                for at in self._lanes(0, width):
                    code.store(sums, at, code.load(sums, at) + x * code.load(line, at))

        whole = code.div(length, self.unroll)
        if not (isinstance(whole, int) and whole == 0):
            with code.loop(whole, "serial", "s") as s:
                for q in range(self.unroll):
                    step(code.simplify(s * self.unroll + q))
        rest = code.simplify(length - whole * self.unroll)
        if not (isinstance(rest, int) and rest == 0):
            with code.loop(rest, "serial", "s") as s:
                step(code.simplify(whole * self.unroll + s))

    def _maximum(self, g: Index, low: Index, count: Index, top: Any, masked: bool, tables: bool) -> None:
        """What is added to scores or taken from them, and their new maximum, into ``top``; ``tables``: bias and mask, too."""
        code, nr = self.code, self.nr
        changes = masked or (self.extra.given and (tables or self.extra.slopes is not None)) or self.cap is not None
        here = code.bind_index(code.simplify(g * nr), "here")
        for at in self._lanes():
            code.store(top, at, code.load(self.top, code.simplify(here + at)))
        with code.loop(count, "serial", "n") as n:
            key = code.bind_index(code.simplify(low + n), "key")
            relative = self._relative(key) if masked else None
            row = self.extra.row(self.lead, key, self.base, self.first, tables)
            for at in self._lanes():
                place = code.simplify(key * nr + at)
                s = code.load(self.scores, place)
                if changes:
                    s = self._changed(code.bind(s), row, at, relative)
                    code.store(self.scores, place, s)
                code.store(top, at, tirx.max(s, code.load(top, at)))

    def _changed(self, s: Any, row: Callable[[Any, Index], Any], at: Index, relative: Any) -> Any:
        code = self.code
        if self.cap is not None:
            s = code.bind(vecmath.tanh(code.bind, s) * tirx.const(self.cap * LOG2E, F32))
        s = row(s, at)
        if self.whole:
            fill = tirx.const(self.fill, F32)
            s = code.bind(tirx.Select(s < fill, fill, s))
        return s if relative is None else self._if_seen(s, at, relative)

    def _relative(self, key: Index) -> Any:
        """How far a key is behind the group's first query's own."""
        return self.code.bind((i64(self.base) + i64(key) - i64(self.first) - i64(self.offset)).astype("int32"), "relative")

    def _if_seen(self, s: Any, at: Index, relative: Any) -> Any:
        code = self.code
        lane = i64(at).astype("int32")
        seen = lane >= relative if self.attrs["causal"] else None
        if self.window is not None:
            window = i64(self.window).astype("int32")
            near = lane < relative + window
            other = seen if seen is not None else lane > relative - window
            seen = tirx.And(other, near)
        return code.bind(tirx.Select(seen, s, tirx.const(self.fill, F32)))

    def _weights(self, g: Index, low: Index, count: Index, top: Any, again: Any) -> None:
        """Exponentials in the place of scores; how sums are rescaled goes into ``again``."""
        code, nr = self.code, self.nr
        here = code.bind_index(code.simplify(g * nr), "here")
        total = code.alloc(nr, F32, "parts")
        for at in self._lanes():
            place = code.simplify(here + at)
            new, old = code.bind(code.load(top, at)), code.bind(code.load(self.top, place))
            code.store(self.top, place, new)
            # a query that has seen nothing yet: no number less itself may be -inf - -inf
            shift = code.bind(tirx.Select(tirx.EQ(new, tirx.const(float("-inf"), F32)), tirx.const(0.0, F32), new))
            code.store(top, at, shift)
            code.store(again, at, vecmath.exp2_shifted(code.bind, code.bind(old - shift)))
            code.store(total, at, tirx.const(0.0, F32))
        self._exponentials(here, low, count, top, total)
        for at in self._lanes():
            place = code.simplify(here + at)
            code.store(self.total, place, code.load(self.total, place) * code.load(again, at) + code.load(total, at))

    def _exponentials(self, row: Index, low: Index, count: Index, top: Any, total: Any) -> None:
        """Exponentials of scores less ``top``, in their place, but those that dropout drops; all are added to ``total``."""
        code, nr = self.code, self.nr
        with code.loop(count, "serial", "n") as n:
            start = code.bind_index(code.simplify((low + n) * nr), "start")
            column = self.dropped.column(code.simplify(low + n))
            for at in self._lanes():
                place = code.simplify(start + at)
                x = code.bind(code.load(self.scores, place) - code.load(top, at))
                e = code.bind(vecmath.exp2_shifted(code.bind, x))
                code.store(total, at, code.load(total, at) + e)
                code.store(self.scores, place, self.dropped.kept(code.simplify(row + at), column)(e))

    def _sums(self, g: Index, low: Index, count: Index, again: Any, v: Matrix) -> None:
        """Weights times values, added to what was summed before."""
        code, nr = self.code, self.nr
        sums_of = code.bind_index(code.simplify(g * (self.wide * nr)), "sums")
        whole = self.width // self.mr

        def tile(column: Index, rows: int) -> None:
            acc = self._accumulators(rows)
            first = v.row(low)

            def line(n: Index, at: Index) -> Any:
                return code.load(self.scores, code.simplify((low + n) * nr + at))

            columns = [code.simplify(column + i) for i in range(rows)]
            self._multiply(acc, count, line, [partial(v.transposed_at, first, c) for c in columns])
            for i, sums in enumerate(acc):
                for at in self._lanes():
                    place = code.simplify(sums_of + (column + i) * nr + at)
                    code.store(self.ot, place, code.load(self.ot, place) * code.load(again, at) + code.load(sums, at))

        if whole:
            with code.loop(whole, "serial", "e") as e:
                tile(code.simplify(e * self.mr), self.mr)
        if self.width % self.mr:
            tile(whole * self.mr, self.width % self.mr)

    # --- the end of a group ---------------------------------------------------------------------------------------------------

    def _end(self, g: Index) -> None:
        """Sums over the weights' total, as rows, to where they belong."""
        code, nr, result = self.code, self.nr, self.form.out
        first = code.bind_index(code.simplify(self.start + g * nr), "first")
        inverse = code.alloc(nr, F32, "inverse")
        for at in self._lanes():
            total = code.bind(code.load(self.total, code.simplify(g * nr + at)))
            one_over = code.bind(tirx.const(self.dropped.scale, F32) / total)
            if self.attrs["empty"] == "zero" or self.attrs["sinks"]:
                nothing = tirx.const(0.0, F32)
                one_over = code.bind(tirx.Select(tirx.EQ(total, nothing), nothing, one_over))
            code.store(inverse, at, one_over)
        if self.form.keeps_lse:
            self._logarithms(g)
        self._transposed(self.ot, nr, code.simplify(g * (self.wide * nr)), self.rows_of, self.wide, 0, self.wide, nr,
                         lambda at: self._load(inverse, at))  # fmt: skip
        whole = isinstance(self.m, int) and self.m % nr == 0
        count = nr if whole else code.bind_index(code.least(self.m - first, nr), "left")
        with code.loop(count, "serial", "i") as i:
            row = code.bind_index(code.simplify(first + i), "row")

            def element(e: Index) -> None:
                value = code.bind(code.load(self.rows_of, code.simplify(i * self.wide + e)))
                at = place_of(self.args, self.form, [*self.lead, row, e])
                code.store(self.args.outputs[0], at, scalar.store(scalar.rounded(value, result.dtype), result.dtype))

            vector_loop(code, 0, self.width, self.lanes, element)
            if self.form.keeps_lse:
                self.args.store(1, [*self.lead, row], code.load(self.top, code.simplify(g * nr + i)))

    def _logarithms(self, g: Index) -> None:
        """Of a group's sums of exponentials, to base e, in the place of maxima."""
        code, nothing, none = self.code, tirx.const(0.0, F32), tirx.const(EMPTY[self.attrs["empty"]], F32)
        for at in self._lanes(code.simplify(g * self.nr)):
            total = code.bind(code.load(self.total, at))
            lse = code.bind(code.load(self.top, at) * tirx.const(1.0 / LOG2E, F32) + vecmath.log(code.bind, total))
            code.store(self.top, at, code.bind(tirx.Select(tirx.EQ(total, nothing), none, lse)))

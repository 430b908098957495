"""Attention of few queries, as in decoding: keys and values are read once, at the speed of memory.

Vectors run along the size of a head, as keys and values lie in memory. All query rows that share a head of keys (those of several
heads, and the last tokens) are computed together. Where there are fewer heads than cores want tasks, the keys are split; each
part gives a maximum, a total and sums, which are joined at the end.

Reference: Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023; Shazeer, "Fast Transformer Decoding",
arXiv:1911.02150, on heads that share keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx

from graphopt.backends.forms.flashform import Form, seen_span
from graphopt.backends.tvm import scalar, vecmath
from graphopt.backends.tvm.attended import F32, LOG2E, Extra, head_index, place_of
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.expr import Arguments
from graphopt.backends.tvm.keyrows import Order, Rows, in_order, parts_of
from graphopt.backends.tvm.loops import SMALL, product, vector_loop
from graphopt.backends.tvm.monoid import Monoid, combine, combine_each
from graphopt.backends.tvm.prologue import write_row
from graphopt.ir import types
from graphopt.ir.graph import Graph

SUM, MAX = Monoid.of("sum", types.f32), Monoid.of("max", types.f32, nan_matters=False)


class DecodeKernel:
    """Emits a region with one attention of few queries.

    Args:
        lanes: elements of a vector; the sizes of heads are multiples.
        sums: vectors of sums that stay in registers.
        keys: keys whose scores are summed together: their sums over lanes are shuffled into one vector.
        block: keys whose scores are computed before their values are read.
        ahead: bytes of keys, and of values, that are asked for before they are needed; 0 leaves it to the hardware, which stops at
            the end of each page and each block.
        splits: parts of the keys that are read in parallel.
        abreast: whether a task goes through the keys of all heads side by side, a block after the other, as they lie in memory where
            positions stand before heads; else head after head, each of which would touch all of memory's pages.
        table: whether floats of 4-bit integers come from a table in a register, where 16 of them are taken from neighbouring words.
    """

    def __init__(self, graph: Graph, form: Form, lanes: int, sums: int, keys: int, block: int, ahead: int, splits: int,
                 parallel: bool, abreast: bool = False, table: bool = False) -> None:  # fmt: skip
        self.graph, self.form, self.lanes, self.sums, self.block = graph, form, lanes, sums, block
        self.keys, self.ahead, self.splits, self.parallel = keys, ahead, splits, parallel
        self.code = code = Code(graph.symbols)
        self.args, self.attrs = Arguments(code, graph), form.node.attrs
        self.m, self.share, self.n = int(form.queries), form.share, code.size(form.keys)  # type: ignore[call-overload]
        self.rows, self.depth, self.width = self.m * self.share, form.depth, form.width
        batch = [code.size(d) for d in form.batch]
        self.heads = [*batch[:-1], code.div(batch[-1], self.share)] if batch else []
        self.extra = Extra(self.args, form, form.fill)
        self.keys_of, self.values_of = (parts_of(self.args, x) for x in (form.parts.k, form.parts.v))
        self.key_order, self.value_order = (x[0][1].order(lanes) for x in (self.keys_of, self.values_of))
        self.table = table and lanes == 16
        self.abreast = int(self.heads[-1]) if abreast and self.heads else 1  # heads of a task

    def emit(self) -> Code:
        code, record = self.code, self.width + self.lanes  # of a row: its sums, then maximum and total
        low, high = seen_span(code, self.form, 0, self.m - 1)
        part = code.ceildiv(code.ceildiv_plain(code.simplify(high - low), self.splits), self.lanes)
        heads = product(code, self.heads)
        steps = code.div(code.simplify(heads * self.splits), self.abreast)
        work = product(code, [heads, self.rows, self.n, self.depth + self.width])
        serial = not self.parallel or (isinstance(work, int) and work < 4 * SMALL) or (isinstance(steps, int) and steps == 1)
        self.parts = code.alloc(code.simplify(heads * (self.splits * self.rows * record)), F32, "parts")
        self.record = record
        with code.loop(steps, "serial" if serial else "parallel", "task") as task:
            sizes = [*(self.heads if self.abreast == 1 else self.heads[:-1]), self.splits]
            *lead, s = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(task, sizes), sizes, strict=True)]
            first = code.bind_index(code.simplify(low + s * part * self.lanes), "first")
            last = code.bind_index(code.least(first + part * self.lanes, high), "last")
            before = code.bind_index(code.simplify(code.div(task, self.splits) * self.abreast), "before")  # heads
            self._part(lead, code.simplify(before * self.splits + s), first, last)
            if self.splits == 1:
                for own, g in self._each_head(lead):
                    self._join(own, code.simplify(before + g))
        if self.splits > 1:
            with code.loop(heads, "serial", "head") as head:
                lead = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(head, self.heads), self.heads, strict=True)]
                self._join(lead, code.simplify(head * self.splits))
        return code

    def _each_head(self, lead: Sequence[Index]) -> Iterator[tuple[list[Index], Index]]:
        """The heads of a task, a loop around what is done for each: its batch index, and its number."""
        with self.code.loop(self.abreast, "serial", "g") as g:
            yield ([*lead, g] if self.abreast > 1 else list(lead)), g

    def _lead(self, lead: Sequence[Index], r: int) -> list[Index]:
        """The batch index, with the head, of a query row."""
        return [*lead[:-1], self.code.simplify(lead[-1] * self.share + r // self.m)] if lead else []

    # --- a part of the keys ---------------------------------------------------------------------------------------------------

    def _part(self, lead: Sequence[Index], number: Index, first: Index, last: Index) -> None:
        """The part ``number`` of the first head of a task; those of the others lie ``splits`` behind each other."""
        code, lanes, block = self.code, self.lanes, self.block
        queries = code.alloc(self.abreast * self.rows * self.depth, F32, "queries")
        scores = code.alloc(self.rows * (block + lanes), F32, "scores")

        def part(g: Index) -> Index:
            return code.bind_index(code.simplify((number + g * self.splits) * (self.rows * self.record)), "part")

        for own, g in self._each_head(lead):
            at = part(g)
            self._queries(own, queries, code.simplify(g * (self.rows * self.depth)))
            with code.loop(self.rows * self.record // lanes, "serial", "z") as z, code.loop(lanes, "vectorized", "v") as v:
                code.store(self.parts, code.simplify(at + z * lanes + v), tirx.const(0.0, F32))
            for r in range(self.rows):
                code.store(self.parts, code.simplify(at + r * self.record + self.width), tirx.const(float("-inf"), F32))
        blocks = code.ceildiv_plain(code.greatest(last - first, 0), block)
        with code.loop(code.bind_index(code.simplify(blocks), "blocks"), "serial", "b") as b:
            base = code.bind_index(code.simplify(first + b * block), "base")
            here = code.bind_index(code.least(last - base, block), "here")
            for own, g in self._each_head(lead):
                self._block(own, queries, code.simplify(g * (self.rows * self.depth)), scores, part(g), base, here)

    def _block(self, lead: Sequence[Index], queries: Any, start: Index, scores: Any, at: Index, base: Index, here: Index) -> None:
        """Add ``here`` keys and values, from ``base`` on, to the part that lies at ``at``."""
        self._scores(lead, queries, start, scores, base, here)
        vectors = self.code.bind_index(self.code.ceildiv_plain(here, self.lanes), "vectors")
        for r in range(self.rows):
            self._weights(scores, r, vectors, self.code.simplify(at + r * self.record))
        self._values(lead, scores, at, base, here)

    def _queries(self, lead: Sequence[Index], queries: Any, start: Index) -> None:
        """The queries of a head, scaled, in the order of the keys' elements, from a place on."""
        code, q = self.code, self.form.parts.q
        plain = queries if self.key_order is in_order else code.alloc(self.depth, F32, "query")
        factor = tirx.const(self.attrs["scale"] * (LOG2E if self.attrs["softcap"] is None else 1.0 / self.attrs["softcap"]), F32)
        for r in range(self.rows):
            index = [*head_index(code, self.form, q, self._lead(lead, r)), r % self.m]
            row = code.simplify(start + r * self.depth) if plain is queries else 0

            def element(d: Index, x: Any, row: Index = row) -> None:
                code.store(plain, code.simplify(row + d), x * factor)

            write_row(self.args, q, lambda d, index=index: [*index, d], self.lanes, element)  # type: ignore[misc]
            if plain is not queries:
                for u, v in self._each(self.depth):
                    at = code.simplify(start + r * self.depth + u + v)
                    code.store(queries, at, code.load(plain, code.simplify(self.key_order(u, v))))

    def _each(self, count: int) -> Any:
        """Places of so many elements: where a vector starts, and its lanes, a loop a vector."""
        for u in range(0, count, self.lanes):
            with self.code.loop(self.lanes, "vectorized", "v") as v:
                yield u, v

    def _scores(self, lead: Sequence[Index], queries: Any, start: Index, scores: Any, base: Index, here: Index) -> None:
        """Scores of a block, -inf behind the last key."""
        code, lanes, step = self.code, self.lanes, self.block + self.lanes
        k = self.form.parts.k
        of_keys = head_index(code, self.form, k, self._lead(lead, 0))
        for r in range(self.rows):
            with code.loop(lanes, "vectorized", "v") as v:
                code.store(scores, code.simplify(r * step + code.div(here, lanes) * lanes + v), tirx.const(float("-inf"), F32))
        for first, count, part in self._spans(self.keys_of, base, here):
            whole = code.div(count, self.keys)
            with code.loop(whole, "serial", "t") as t:
                n = code.bind_index(code.simplify(first + t * self.keys), "n")
                self._products(part, of_keys, queries, start, scores, base, n, self.keys)
            with code.loop(code.simplify(count - whole * self.keys), "serial", "n") as n:
                rest = code.bind_index(code.simplify(first + whole * self.keys + n), "n")
                self._products(part, of_keys, queries, start, scores, base, rest, 1)
        if self.keys_of[0][1].integers is not None:
            self._scale_rows(scores, self.keys_of[0][1], of_keys, base, here)
        self._change_all(lead, scores, base, here)

    def _change_all(self, lead: Sequence[Index], scores: Any, base: Index, here: Index) -> None:
        if self.attrs["softcap"] is not None or self.extra.given or self.form.is_local or self.form.reads_all:
            for r in range(self.rows):
                self._change(self._lead(lead, r), scores, r, base, here)

    def _spans(self, parts: Sequence[tuple[Index, Rows]], base: Index, here: Index) -> Iterator[tuple[Index, Index, Rows]]:
        """The pieces of a block's ``here`` rows from ``base`` on that lie in one part each: (first row in the block, rows, the part)."""
        if len(parts) == 1:
            yield 0, here, parts[0][1]
            return
        code, ends = self.code, [*(first for first, _ in parts[1:]), None]
        for (begin, rows), end in zip(parts, ends, strict=True):
            first = code.bind_index(code.least(code.greatest(begin - base, 0), here), "first")
            last = here if end is None else code.bind_index(code.least(code.greatest(end - base, 0), here), "last")
            yield first, code.bind_index(code.simplify(last - first), "count"), rows

    def _products(self, part: Rows, of_keys: Sequence[Index], queries: Any, start: Index, scores: Any, base: Index, n: Index,
                  count: int) -> None:  # fmt: skip
        """Scores of ``count`` keys, 1 or as many as are taken together."""
        code, lanes = self.code, self.lanes
        places = [(r, i) for r in range(self.rows) for i in range(count)]
        sums = {place: code.alloc(lanes, F32, "acc") for place in places}
        rows = [code.bind_index(code.simplify(base + n + i), "row") for i in range(count)]
        for u in range(0, self.depth, lanes):
            for i, row in enumerate(rows):
                if self.ahead:
                    part.fetch(lambda i: [*of_keys, i], row, self.ahead, range(u, u + lanes))
                with self._floats(part, [*of_keys, row], u, self.key_order) as (x, v):
                    for r in range(self.rows):
                        term, acc = x * self._get(queries, start + (r * self.depth + u), v), sums[r, i]
                        self._put(acc, 0, v, term if u == 0 else self._get(acc, 0, v) + term)
        if count == 1:
            for (r, _), acc in sums.items():
                code.store(scores, code.simplify(r * (self.block + lanes) + n), combine(code, acc, lanes, lanes, SUM))
            return
        found = combine_each(code, [acc[self._ramp(0, lanes)] for acc in sums.values()], lanes, SUM)
        for r in range(self.rows):
            vector, first = divmod(r * count, lanes)
            sum_of = found[vector] if count == lanes else tirx.Shuffle([found[vector]], list(range(first, first + count)))
            code.emit(tirx.BufferStore(scores, sum_of, [self._ramp(code.simplify(r * (self.block + lanes) + n), count)]))

    @contextmanager
    def _floats(self, rows: Rows, index: Sequence[Index], u: int, order: Order) -> Iterator[tuple[Any, Any]]:
        """A vector of a row's elements, and its lane: the variable of a loop over lanes, or None where a vector is one value."""
        code = self.code
        if self.table and rows.per_word == 2 and order is not in_order:
            yield rows.from_table(index, u, order), None
            return
        with code.loop(self.lanes, "vectorized", "v") as v:
            yield code.bind(rows.at([*index, code.simplify(order(u, v))]), "x"), v

    def _get(self, buffer: Any, at: Index, v: Any) -> Any:
        return buffer[self._ramp(at, self.lanes)] if v is None else self.code.load(buffer, self.code.simplify(at + v))

    def _put(self, buffer: Any, at: Index, v: Any, value: Any) -> None:
        code = self.code
        if v is None:
            code.emit(tirx.BufferStore(buffer, value, [self._ramp(at, self.lanes)]))
        else:
            code.store(buffer, code.simplify(at + v), value)

    def _scale_rows(self, scores: Any, rows: Rows, lead: Sequence[Index], base: Index, here: Index) -> None:
        """Multiply scores, or weights, by the scales of the keys or values."""
        code, step = self.code, self.block + self.lanes

        def element(n: Index) -> None:
            scale = code.bind(rows.scale([*lead, code.simplify(base + n), 0]), "scale")
            for r in range(self.rows):
                place = code.simplify(r * step + n)
                code.store(scores, place, code.load(scores, place) * scale)

        vector_loop(code, 0, here, self.lanes, element, overlap=False)

    def _ramp(self, at: Index, count: int) -> Any:
        return tirx.Ramp(i64(at), i64(1), count) if count > 1 else i64(at)

    def _change(self, lead: Sequence[Index], scores: Any, r: int, base: Index, here: Index) -> None:
        """What is added to a row's scores, or taken from them."""
        code, row, cap = self.code, r % self.m, self.attrs["softcap"]
        offset, window = code.size(self.attrs["offset"]), self.attrs["window"]

        def element(n: Index) -> None:
            place, key = code.simplify(r * (self.block + self.lanes) + n), code.simplify(base + n)
            s = code.bind(code.load(scores, place))
            if cap is not None:
                s = code.bind(vecmath.tanh(code.bind, s) * tirx.const(cap * LOG2E, F32))
            if self.extra.tables:
                s = code.bind(s + self.extra.value(lead, row, key))
            if self.extra.slopes is not None:
                s = code.bind(s + self.extra.slope(lead) * (i64(key) - i64(row)).astype("int32").astype(F32))
            fill = tirx.const(self.form.fill, F32)
            middle, at = i64(row + offset).astype("int32"), i64(key).astype("int32")
            seen = [at <= middle] if self.attrs["causal"] else []
            if window is not None:
                reach = i64(code.size(window)).astype("int32")
                seen.append(at > middle - reach)
                if not self.attrs["causal"]:
                    seen.append(at < middle + reach)
            for condition in seen:
                s = code.bind(tirx.Select(condition, s, fill))
            if self.form.reads_all:
                s = code.bind(tirx.Select(s < fill, fill, s))
            code.store(scores, place, s)

        vector_loop(code, 0, here, self.lanes, element, overlap=False)

    def _weights(self, scores: Any, r: int, vectors: Index, at: Index) -> None:
        """Exponentials in the place of a row's scores; its sums are rescaled to the new maximum."""
        code, lanes, start = self.code, self.lanes, r * (self.block + self.lanes)
        most, total = (code.alloc(lanes, F32, n) for n in ("most", "total"))
        low = tirx.const(float("-inf"), F32)
        with code.loop(lanes, "vectorized", "v") as v:
            code.store(most, v, low)
            code.store(total, v, tirx.const(0.0, F32))
        with code.loop(vectors, "serial", "n") as n, code.loop(lanes, "vectorized", "v") as v:
            code.store(most, v, tirx.max(code.load(scores, code.simplify(start + n * lanes + v)), code.load(most, v)))
        old = code.bind(code.load(self.parts, code.simplify(at + self.width)))
        new = code.bind(tirx.max(combine(code, most, lanes, lanes, MAX), old))
        shift = code.bind(tirx.Select(tirx.EQ(new, low), tirx.const(0.0, F32), new))
        again = code.bind(vecmath.exp2_shifted(code.bind, code.bind(old - shift)))
        with code.loop(vectors, "serial", "n") as n, code.loop(lanes, "vectorized", "v") as v:
            place = code.simplify(start + n * lanes + v)
            e = code.bind(vecmath.exp2_shifted(code.bind, code.bind(code.load(scores, place) - shift)))
            code.store(scores, place, e)
            code.store(total, v, code.load(total, v) + e)
        code.store(self.parts, code.simplify(at + self.width), new)
        count = code.simplify(at + self.width + 1)
        code.store(self.parts, count, code.load(self.parts, count) * again + combine(code, total, lanes, lanes, SUM))
        for u, v in self._each(self.width):
            place = code.simplify(at + u + v)
            code.store(self.parts, place, code.load(self.parts, place) * again)

    def _values(self, lead: Sequence[Index], scores: Any, part: Index, base: Index, here: Index) -> None:
        """Weights times values, added to the rows' sums: as many rows at once as registers hold."""
        code, lanes, v_of = self.code, self.lanes, self.form.parts.v
        index = head_index(code, self.form, v_of, self._lead(lead, 0))
        if self.values_of[0][1].integers is not None:
            self._scale_rows(scores, self.values_of[0][1], index, base, here)
        columns = min(self.width, max(1, self.sums // self.rows) * lanes)
        at_once = max(1, self.sums * lanes // columns)
        for r0 in range(0, self.rows, at_once):
            for c0 in range(0, self.width, columns):
                rows, here_columns = range(r0, min(self.rows, r0 + at_once)), min(columns, self.width - c0)
                acc = {r: code.alloc(here_columns, F32, "acc") for r in rows}
                for u, v in self._each(here_columns):
                    for r in rows:
                        code.store(acc[r], code.simplify(u + v), tirx.const(0.0, F32))
                for first, count, part_of in self._spans(self.values_of, base, here):
                    with code.loop(count, "serial", "n") as i:
                        n = code.simplify(first + i)
                        row = code.bind_index(code.simplify(base + n), "row")
                        p = {r: code.bind(code.load(scores, code.simplify(r * (self.block + lanes) + n)), "p") for r in rows}
                        for u in range(0, here_columns, lanes):
                            if self.ahead and r0 == 0:
                                part_of.fetch(lambda i: [*index, i], row, self.ahead, range(c0 + u, c0 + u + lanes))
                            with self._floats(part_of, [*index, row], c0 + u, self.value_order) as (x, v):
                                for r in rows:
                                    weight = p[r] if v is not None else tirx.Broadcast(p[r], lanes)
                                    self._put(acc[r], u, v, self._get(acc[r], u, v) + weight * x)
                for u, v in self._each(here_columns):
                    for r in rows:
                        place = code.simplify(part + r * self.record + c0 + u + v)
                        code.store(self.parts, place, code.load(self.parts, place) + code.load(acc[r], code.simplify(u + v)))

    # --- the end --------------------------------------------------------------------------------------------------------------

    def _join(self, lead: Sequence[Index], first: Index) -> None:
        """The parts of a head's rows, from task ``first`` on, to results."""
        code, result, step = self.code, self.form.node.result, self.rows * self.record
        for r in range(self.rows):
            own = self._lead(lead, r)
            start = code.bind_index(code.simplify(first * step + r * self.record), "start")
            tops = [code.bind(code.load(self.parts, code.simplify(start + s * step + self.width))) for s in range(self.splits)]
            counts = [code.load(self.parts, code.simplify(start + s * step + self.width + 1)) for s in range(self.splits)]
            if self.extra.sinks is not None:
                sink, count = self.extra.sink(own)
                tops, counts = [*tops, sink], [*counts, count]
            shares, total = self._shares(tops, counts)
            inverse = code.bind(tirx.const(1.0, F32) / total)
            if self.form.node.attrs["empty"] == "zero" or self.extra.sinks is not None:
                nothing = tirx.const(0.0, F32)
                inverse = code.bind(tirx.Select(tirx.EQ(total, nothing), nothing, inverse))

            for u, v in self._each(self.width):
                value = tirx.const(0.0, F32)
                for s in range(self.splits):
                    value = value + code.load(self.parts, code.simplify(start + s * step + u + v)) * shares[s]
                value = scalar.rounded(code.bind(value * inverse), result.dtype)
                at = place_of(self.args, self.form, [*own, r % self.m, code.simplify(self.value_order(u, v))])
                code.store(self.args.outputs[0], at, scalar.store(value, result.dtype))

    def _shares(self, tops: Sequence[Any], counts: Sequence[Any]) -> tuple[list[Any], Any]:
        """By what each part counts, and the total of all."""
        code, most = self.code, tops[0]
        for t in tops[1:]:
            most = code.bind(tirx.max(most, t))
        shift = code.bind(tirx.Select(tirx.EQ(most, tirx.const(float("-inf"), F32)), tirx.const(0.0, F32), most))
        shares = [code.bind(vecmath.exp2_shifted(code.bind, code.bind(t - shift))) for t in tops]
        total = counts[0] * shares[0]
        for c, s in zip(counts[1:], shares[1:], strict=True):
            total = code.bind(total + c * s)
        return shares, code.bind(total)

"""The gradient of an attention in tiles: weights are computed again, a block of keys times a group of queries at a time.

A task takes the queries of all heads that share one head of keys, a group after the other, and for each the blocks of keys that it
sees. As in :mod:`flash`, queries lie along the lanes. Of a block and a group

    scores, dweights [keys, queries]  =  K (scale Q)^T,  V dO^T
    P = exp(scores - lse),  dS = P * (drop(dweights) - delta)    delta = rowsum(dO * O), lse: numbers of a query
    dV [keys, columns] += drop(P) dO,   dK [keys, depth] += dS (scale Q),   dQ^T [depth, queries] += K^T dS

dQ stays in scratch while a group goes through the keys; dK and dV are added to where they belong, which no other task writes, or, of
halves, to f32 of a task's own, which are rounded at the end. So
nothing is as long as a row of weights, and there are as many tasks as heads of keys.

The gradient of a bias is dS, which is transposed and added to where it belongs. A task then takes all heads (of all batches) that the
bias is the same for, one after the other, so that no other task writes there.

Reference: Dao, "FlashAttention-2", arXiv:2307.08691, section 3.1.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from tvm import tirx

from graphopt.backends.forms.flashform import Form, seen_span
from graphopt.backends.tvm import scalar, vecmath
from graphopt.backends.tvm.attended import LOG2E, Matrix, head_index
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.expr import Expressions, broadcast_index
from graphopt.backends.tvm.flash import F32, FlashKernel
from graphopt.backends.tvm.loops import SMALL, product, vector_loop
from graphopt.ir import types
from graphopt.ir.graph import Graph, Value
from graphopt.ir.opset.attention_training import GIVEN, heads_that_share

DQ, DK, DV, DBIAS = range(4)  # the outputs


class FlashGradientKernel(FlashKernel):
    """Emits a region with the gradient of one attention.

    Args: see :class:`~graphopt.backends.tvm.flash.FlashKernel`.
    """

    def __init__(self, graph: Graph, form: Form, lanes: int, vectors: int, rows: int, block: int, unroll: int, parallel: bool) -> None:
        super().__init__(graph, form, lanes, vectors, rows, block, 1, unroll, False, parallel)
        self.dout, self.result, self.lse = form.node.operands[:GIVEN]
        self.share = heads_that_share(form.parts.q.type, form.parts.k.type)
        self.bias = form.parts.bias if self.attrs["bias_gradient"] else None

    def emit(self) -> Code:
        code = self.code
        self.whole_groups = isinstance(self.m, int) and self.m % self.nr == 0
        *outer, heads = self.batch or [1]
        sizes = [*outer, code.div(heads, self.share)]
        inner = self._same_bias()  # axes that a task takes all of
        of_tasks, of_task = ([1 if (k in inner) == out else n for k, n in enumerate(sizes)] for out in (True, False))
        steps, several = product(code, of_tasks), product(code, of_task)
        work = product(code, [*sizes, self.share, self.m, self.n, self.depth + self.width])
        serial = not self.parallel or (isinstance(work, int) and work < SMALL) or (isinstance(steps, int) and steps == 1)
        with code.loop(steps, "serial" if serial else "parallel", "task") as task:
            own = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(task, of_tasks), of_tasks, strict=True)]
            self._scratch()
            self._no_bias(own)
            with code.loop(several, "serial", "same") as same:
                rest = [code.bind_index(i, "u", n) for i, n in zip(code.unflatten(same, of_task), of_task, strict=True)]
                self.shared = [rest[k] if k in inner else i for k, i in enumerate(own)]
                self._head_of_keys()
        return code

    def _same_bias(self) -> list[int]:
        """The axes of batch and heads along which the bias, of which the gradient is wanted, is broadcast."""
        if self.bias is None or not self.batch:
            return []
        lead = self.bias.shape[:-2]
        missing = len(self.batch) - len(lead)
        return [k for k in range(len(self.batch)) if k < missing or lead[k - missing] == 1]

    def _scratch(self) -> None:
        self._alloc()
        self.extra.scans = False  # blocks that a mask hides are visited
        self.extra.alloc(self.block, self.nr, self.lanes)
        self.dropped.alloc(self.block, self.nr, self.lanes)

    # --- one task -----------------------------------------------------------------------------------------------------------

    def _head_of_keys(self) -> None:
        code = self.code
        of_keys = self.shared if self.batch else []
        self.places = {k: self._matrix_of(k, of_keys) for k in (DK, DV)}
        of_outputs = dict(self.places)
        if self.sums:
            self.places = {k: (0, columns, 1) for k, columns in self.columns.items()}
        for k, columns in self.columns.items():
            with code.loop(self.n, "serial", "z") as row:
                vector_loop(code, 0, columns, self.lanes, partial(self._zero, k, row))
        with code.loop(self.share, "serial", "h") as h:
            head = code.bind_index(code.simplify(self.shared[-1] * self.share + h), "head", (self.batch or [1])[-1])
            self.lead = [*self.shared[:-1], head] if self.batch else []
            self.sides = [(m, None if m.plain else m.staged(self.block, self.lanes)) for m in self._matrices()]
            with code.loop(code.ceildiv(self.m, self.nr), "serial", "g") as g:
                self.start = code.bind_index(code.simplify(g * self.nr), "start")
                self._group()
        self._rounded_sums(of_outputs)

    def _alloc(self) -> None:
        code, nr = self.code, self.nr
        deep, wide = (-(-n // self.lanes) * self.lanes for n in (self.depth, self.width))
        self.deep, self.wide = deep, wide
        self.q_rows, self.qt, self.dqt = (code.alloc(nr * deep, F32, name) for name in ("q_rows", "queries", "dq"))
        self.do_rows, self.dot, self.products = (code.alloc(nr * wide, F32, name) for name in ("do_rows", "dout", "products"))
        self.rows_of = code.alloc(nr * deep, F32, "line")
        rows = self.block if self.bias is None else self.block + self.lanes  # squares of lanes are transposed
        self.scores, self.dscores = (code.alloc(rows * nr, F32, name) for name in ("scores", "dscores"))
        if self.bias is not None:
            self.step = -(-self.block // self.lanes) * self.lanes + self.lanes
            self.of_bias = code.alloc(nr * self.step, F32, "dbias")
            self.slopes = code.alloc(self.block * nr, F32, "slopes") if self.cap is not None else None
        self.columns = {DK: self.depth, DV: self.width}
        halves = self.graph.outputs[DK].dtype != types.f32
        self.sums = {k: code.alloc(code.simplify(self.n * n), F32, "sums") for k, n in self.columns.items()} if halves else {}
        self.shift, self.delta = (code.alloc(nr, F32, name) for name in ("shift", "delta"))

    def _matrix_of(self, k: int, lead: Sequence[Index]) -> tuple[Index, Index, Index]:
        """Where a head's gradient lies in output k: its first element, and the steps of rows and columns."""
        rows, columns = self.args.output_strides(k)[-2:]
        return self.code.bind_index(self.args.place(k, [*lead, 0, 0]), "gradient"), rows, columns

    def _place(self, k: int, row: Index, column: Index) -> Index:
        start, rows, columns = self.places[k]
        return self.code.simplify(start + row * rows + column * columns)

    def _zero(self, k: int, row: Index, column: Index) -> None:
        self.code.store(self._target(k), self._place(k, row, column), tirx.const(0.0, F32))

    def _target(self, k: int) -> Any:
        """What the gradients of a head's keys or values are added up in."""
        return self.sums.get(k, self.args.outputs[k])

    def _rounded_sums(self, places: Mapping[int, tuple[Index, Index, Index]]) -> None:
        """Sums in scratch to where they belong."""
        code = self.code
        for k, buffer in self.sums.items():
            start, rows, columns = places[k]
            with code.loop(self.n, "serial", "o") as row:

                def element(c: Index, k: int = k, row: Index = row) -> None:
                    value = code.bind(code.load(buffer, self._place(k, row, c)))  # noqa: B023
                    at = code.simplify(start + row * rows + c * columns)  # noqa: B023
                    code.store(self.args.outputs[k], at, self._half(k, value))

                vector_loop(code, 0, self.columns[k], self.lanes, element)

    def _half(self, k: int, value: Any) -> Any:
        dtype = self.graph.outputs[k].dtype
        return scalar.store(scalar.rounded(value, dtype), dtype)

    # --- a group of queries -------------------------------------------------------------------------------------------------

    def _group(self) -> None:
        code = self.code
        self._load_rows()
        with code.loop(self.deep, "serial", "d") as d:
            for at in self._lanes(code.simplify(d * self.nr)):
                code.store(self.dqt, at, tirx.const(0.0, F32))
        first, last = seen_span(code, self.form, self.start, code.simplify(self.start + (self.nr - 1)))
        begin = code.bind_index(code.div(first, self.block), "begin")
        end = code.bind_index(code.simplify(code.ceildiv_plain(last, self.block)), "end")
        with code.loop(code.simplify(code.greatest(end - begin, 0)), "serial", "b") as b:
            base = code.bind_index(code.simplify((begin + b) * self.block), "base")
            whole = isinstance(self.n, int) and self.n % self.block == 0
            here = self.block if whole else code.bind_index(code.least(self.n - base, self.block), "here")
            self.extra.keys_of(self.lead, base, here)
            self.dropped.keys_of(base, here)
            k, v = (copy.fill(m, base, here) if copy is not None else m.moved(base) for m, copy in self.sides)
            self._block(0, base, here, k, v)
        self._store_dq()

    def _load_rows(self) -> None:
        """Queries and the result's gradient of a group, as rows and transposed; and what each query has one number of."""
        code, nr, q, zero = self.code, self.nr, self.form.parts.q, tirx.const(0.0, F32)
        scale = tirx.const(self.attrs["scale"], F32)
        kept = tirx.const(self.dropped.scale, F32) if self.dropped.given else None
        self.dropped.rows_of(self.lead, self.start, 0, nr)
        with code.loop(nr, "serial", "i") as i:
            row = code.bind_index(self._clamped(code.simplify(self.start + i), self.m, nr), "row")
            inside = None if self.whole_groups else i64(code.simplify(self.start + i)) < i64(self.m)

            def held(x: Any) -> Any:
                """A query behind the last: zeros."""
                return x if inside is None else code.bind(tirx.Select(inside, x, zero))

            def query(d: Index) -> None:
                code.store(self.q_rows, code.simplify(i * self.deep + d), held(self._element(q, row, d) * scale))

            def gradient(e: Index) -> None:
                x = code.bind(held(self._element(self.dout, row, e)))
                code.store(self.do_rows, code.simplify(i * self.wide + e), x if kept is None else x * kept)
                code.store(self.products, code.simplify(i * self.wide + e), x * self._element(self.result, row, e))

            vector_loop(code, 0, self.depth, self.lanes, query)
            vector_loop(code, 0, self.width, self.lanes, gradient)
            lse = code.bind(self._element(self.lse, row) * tirx.const(LOG2E, F32))
            none = tirx.const(float("inf"), F32)  # whose weights are zero
            code.store(self.shift, i, lse if inside is None else code.bind(tirx.Select(inside, lse, none)))
        self._transposed(self.q_rows, self.deep, 0, self.qt, nr, 0, nr, self.deep)
        self._transposed(self.products, self.wide, 0, self.dot, nr, 0, nr, self.wide)
        for at in self._lanes():
            code.store(self.delta, at, zero)
        with code.loop(self.width, "serial", "e") as e:
            for at in self._lanes():
                code.store(self.delta, at, code.load(self.delta, at) + code.load(self.dot, code.simplify(e * nr + at)))
        self._transposed(self.do_rows, self.wide, 0, self.dot, nr, 0, nr, self.wide)

    def _element(self, v: Value, *at: Index) -> Any:
        """An element of the queries, or of what is like the result."""
        lead = head_index(self.code, self.form, v, self.lead) if v is self.form.parts.q else self.lead
        return Expressions(self.args, {}).at(v, [*lead, *at])

    def _store_dq(self) -> None:
        code, nr = self.code, self.nr
        self._transposed(self.dqt, nr, 0, self.rows_of, self.deep, 0, self.deep, nr)
        scale = tirx.const(self.attrs["scale"], F32)
        count = nr if self.whole_groups else code.bind_index(code.least(self.m - self.start, nr), "left")
        with code.loop(count, "serial", "i") as i:
            row = code.bind_index(code.simplify(self.start + i), "row")

            def element(d: Index) -> None:
                value = code.load(self.rows_of, code.simplify(i * self.deep + d)) * scale
                code.store(self.args.outputs[DQ], self.args.place(DQ, [*self.lead, row, d]), self._half(DQ, code.bind(value)))

            vector_loop(code, 0, self.depth, self.lanes, element)

    # --- a block of keys for a group of queries -----------------------------------------------------------------------------

    def _span(self, g: Index, low: Index, high: Index, k: Matrix, v: Matrix) -> None:
        code = self.code
        count = high if isinstance(low, int) and low == 0 else code.bind_index(code.simplify(high - low), "count")
        self._rows_times(k, low, count, self.qt, 0, self.depth, self.scores)
        self._rows_times(v, low, count, self.dot, 0, self.width, self.dscores)
        self.extra.block_of(self.lead, self.first, self.base, high)
        with_masks = self._partial(low, high)
        if with_masks is None:
            self._gradients(low, count, False)
        else:
            with code.when(with_masks):
                self._gradients(low, count, True)
            with code.when(tirx.Not(with_masks)):
                self._gradients(low, count, False)
        if self.bias is not None:
            self._add_bias(low, count)
        tiles = code.ceildiv_plain(count, self.mr)
        tiles = tiles if isinstance(tiles, int) else code.bind_index(tiles, "tiles")
        self._no_more(low, count, tiles)
        self._add(DV, low, tiles, self.scores, self.do_rows, self.wide, self.width)
        self._add(DK, low, tiles, self.dscores, self.q_rows, self.deep, self.depth)
        self._add_dq(low, count, k)

    def _gradients(self, low: Index, count: Index, masked: bool) -> None:
        """Weights in the place of scores, and the scores' gradient in that of the weights'."""
        code, nr, one = self.code, self.nr, tirx.const(1.0, F32)
        with code.loop(count, "serial", "n") as n:
            key = code.bind_index(code.simplify(low + n), "key")
            relative = self._relative(key) if masked else None
            row = self.extra.row(self.lead, key, self.base, self.first)
            column = self.dropped.column(key)
            for at in self._lanes():
                place = code.simplify(key * nr + at)
                s, slope = code.load(self.scores, place), None
                if self.cap is not None:
                    t = code.bind(vecmath.tanh(code.bind, code.bind(s * tirx.const(1.0 / self.cap, F32))))
                    s, slope = t * tirx.const(self.cap, F32), code.bind(one - t * t)
                s = row(s * tirx.const(LOG2E, F32), at)
                s = s if relative is None else self._if_seen(code.bind(s), at, relative)
                w = code.bind(vecmath.exp2_shifted(code.bind, code.bind(s - code.load(self.shift, at))))
                kept = self.dropped.kept(at, column)
                ds = code.bind(w * (kept(code.load(self.dscores, place)) - code.load(self.delta, at)))
                code.store(self.scores, place, kept(w))
                if slope is not None and self.bias is not None:
                    code.store(self.slopes, place, slope)
                    slope = None
                code.store(self.dscores, place, ds if slope is None else ds * slope)

    def _bias_place(self, lead: Sequence[Index], row: Index, column: Index) -> Index:
        assert self.bias is not None
        return self.args.place(DBIAS, broadcast_index(self.bias, [*lead, row, column]))

    def _no_bias(self, own: Sequence[Index]) -> None:
        """Zeros for the gradient of a task's bias."""
        if self.bias is None:
            return
        code, zero, heads = self.code, tirx.const(0.0, F32), bool(self.batch) and len(self.batch) - 1 not in self._same_bias()
        rows = 1 if self.bias.type.rank < 2 else code.size(self.bias.shape[-2])
        with code.loop(self.share if heads else 1, "serial", "h") as h, code.loop(rows, "serial", "z") as row:
            lead = [*own[:-1], code.simplify(own[-1] * self.share + h)] if self.batch else []
            vector_loop(code, 0, self.n, self.lanes, lambda n: code.store(self.args.outputs[DBIAS], self._bias_place(lead, row, n), zero))

    def _add_bias(self, low: Index, count: Index) -> None:
        """Add the gradient of a span's scores to that of the bias; then it is that of the products, in front of a soft cap."""
        code, nr, to = self.code, self.nr, self.args.outputs[DBIAS]
        squares = code.bind_index(code.ceildiv_plain(count, self.lanes), "squares")
        start = code.bind_index(code.simplify(low * nr), "start")
        self._transposed(self.dscores, nr, start, self.of_bias, self.step, 0, code.simplify(squares * self.lanes), nr)
        rows = nr if self.whole_groups else code.bind_index(code.least(self.m - self.start, nr), "left")
        first = code.bind_index(code.simplify(self.base + low), "first")
        with code.loop(rows, "serial", "i") as i:
            row = code.bind_index(code.simplify(self.start + i), "row")

            def element(n: Index) -> None:
                place = self._bias_place(self.lead, row, code.simplify(first + n))
                code.store(to, place, code.load(to, place) + code.load(self.of_bias, code.simplify(i * self.step + n)))

            vector_loop(code, 0, count, self.lanes, element, overlap=False)
        if self.slopes is not None:
            with code.loop(count, "serial", "n") as n:
                for at in self._lanes(code.simplify((low + n) * nr)):
                    code.store(self.dscores, at, code.load(self.dscores, at) * code.load(self.slopes, at))

    def _no_more(self, low: Index, count: Index, tiles: Index) -> None:
        """Zeros for the keys behind the last one of a span, up to a whole tile."""
        code, nr = self.code, self.nr
        left = code.simplify(tiles * self.mr - count)
        if isinstance(left, int) and left == 0:
            return
        with code.loop(left, "serial", "n") as n:
            row = code.bind_index(code.simplify((low + count + n) * nr), "row")
            for buffer in (self.scores, self.dscores):
                for at in self._lanes():
                    code.store(buffer, code.simplify(row + at), tirx.const(0.0, F32))

    def _add(self, k: int, low: Index, tiles: Index, factors: Any, rows: Any, step: int, columns: int) -> None:
        """``output k [keys, columns] += factors [keys, queries] * rows [queries, columns]``."""
        code, nr, mr = self.code, self.nr, self.mr
        with code.loop(tiles, "serial", "t") as t:
            row = code.bind_index(code.simplify(low + t * mr), "row")
            for c in range(0, step, nr):
                width = min(nr, step - c)
                acc = self._accumulators(mr, width)
                elements = [partial(self._factor, factors, row, i) for i in range(mr)]
                self._multiply(acc, nr, partial(self._line, rows, step, c), elements, width)
                for i, sums in enumerate(acc):
                    self._add_row(k, code.simplify(self.base + row + i), c, min(width, columns - c), sums)

    def _line(self, rows: Any, step: int, first: int, s: Index, at: Index) -> Any:
        return self.code.load(rows, self.code.simplify(s * step + first + at))

    def _factor(self, factors: Any, row: Index, i: int, s: Index) -> Any:
        return self.code.load(factors, self.code.simplify((row + i) * self.nr + s))

    def _add_row(self, k: int, row: Index, first: int, columns: int, sums: Any) -> None:
        """Add to a row of an output, unless it is behind the last."""
        code, to = self.code, self._target(k)

        def element(c: Index) -> None:
            at = self._place(k, row, code.simplify(first + c))
            code.store(to, at, code.load(to, at) + code.load(sums, c))

        if isinstance(self.n, int) and self.n % self.mr == 0:
            vector_loop(code, 0, columns, self.lanes, element, overlap=False)
            return
        with code.when(i64(row) < i64(self.n)):
            vector_loop(code, 0, columns, self.lanes, element, overlap=False)

    def _add_dq(self, low: Index, count: Index, k: Matrix) -> None:
        """``dq^T [depth, queries] += K^T [depth, keys] * ds [keys, queries]``."""
        code, nr = self.code, self.nr

        def tile(column: Index, rows: int) -> None:
            acc = self._accumulators(rows)
            first = k.row(low)
            columns: list[Callable[[Index], Any]] = [partial(k.transposed_at, first, code.simplify(column + i)) for i in range(rows)]
            self._multiply(acc, count, lambda n, at: code.load(self.dscores, code.simplify((low + n) * nr + at)), columns)
            for i, sums in enumerate(acc):
                for at in self._lanes():
                    place = code.simplify((column + i) * nr + at)
                    code.store(self.dqt, place, code.load(self.dqt, place) + code.load(sums, at))

        if whole := self.depth // self.mr:
            with code.loop(whole, "serial", "e") as e:
                tile(code.simplify(e * self.mr), self.mr)
        if self.depth % self.mr:
            tile(whole * self.mr, self.depth % self.mr)

"""Reductions over any axes, as loop nests.

Where the innermost axis is reduced, several vectors of partial results run side by side and are combined at the end;
where it is kept, the lanes are neighbouring results. Float sums over many elements are taken in blocks whose results are
added in f64, so that the error does not grow with the length. Few results over many elements are factored: the first reduced axis
is divided into pieces that run in parallel, each with partial results of its own, and these are joined at the end (Suriana, Adams and
Kamil, "Parallel Associative Reductions in Halide", CGO 2017). A product that is summed is added with one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tvm import tirx

from graphopt.backends.tvm import scalar, vecmath
from graphopt.backends.tvm.code import Index, i64
from graphopt.backends.tvm.elementwise import Probe, weight_of
from graphopt.backends.tvm.expr import Arguments, Expressions, Source
from graphopt.backends.tvm.loops import SMALL, Axis, Tuning, lanewise, linear_index, merge_axes, product, run_space, vector_loop
from graphopt.backends.tvm.monoid import Monoid, combine
from graphopt.ir import types
from graphopt.ir.graph import Node, Value

BLOCK = 1 << 13  # elements above which a lane-split float sum is taken in blocks, which are added to an f64 total
TERMS = 1 << 7  # of a block that each accumulator takes
ROWS = 256  # the same for sums along an outer axis, an element a lane
GRAIN = 1 << 14  # units of work of a piece at least, where a schedule does not say how many pieces there are
UNKNOWN = 64  # pieces of a sum of a symbolic number of elements
PIECES = 256  # at most so many of them run in parallel, over all results
Sink = Callable[[Sequence[Index], Any], None]


class Reduction:
    """One reduction node.

    Args:
        sink: stores a result (as held in expressions) at an index of the node's result.
    """

    def __init__(self, args: Arguments, sources: Mapping[Value, Source], node: Node, tuning: Tuning, sink: Sink) -> None:
        self.args, self.code, self.sources, self.node, self.tuning, self.sink = args, args.code, dict(sources), node, tuning, sink
        self.x, self.op = node.operands[0], node.name
        rank = self.x.type.rank
        axes = [node.attrs["axis"]] if "axis" in node.attrs else list(node.attrs["axes"])
        self.reduced = [a % rank for a in axes] if rank else []
        self.shape = [self.code.size(d) for d in self.x.shape]
        self.monoid = self._monoid()

    def _monoid(self) -> Monoid | None:
        """How accumulators are joined. Products are held in f64: near 1, roundings of f32 that tie all go one way and add up."""
        m = Monoid.of(self.op, self.x.dtype)
        return replace(m, held=m.total) if self.op == "prod" else m

    # --- entry ----------------------------------------------------------------------------------------------------------

    def emit(self) -> None:
        """Write the loops."""
        if any(isinstance(self.shape[a], int) and self.shape[a] == 0 for a in self.reduced):
            return self._empty()
        probe = Probe(self.args, self.sources, self.x)
        groups = [int(k in self.reduced) for k in range(len(self.shape))]
        merged = merge_axes(self.code, self.shape, probe, groups)
        if not merged:
            probe([0] * len(self.shape))
        self.lanes = 1 if probe.scalar_only else self.tuning.lanes
        self.axes = merged
        self.inner = [a for a in merged if a.members[0] in self.reduced]
        self.kept = [a for a in merged if a.members[0] not in self.reduced]
        self.weight = weight_of(self.x)
        self.count = product(self.code, [a.size for a in self.inner])
        across = bool(merged) and merged[-1] in self.kept
        if across:
            return self._columns()
        return self._rows()

    def _empty(self) -> None:
        """The reduced axes are empty: the neutral element everywhere."""
        shape = [self.code.size(d) for d in self.node.result.shape]
        axes = [Axis([k], n) for k, n in enumerate(shape)]
        assert self.monoid is not None
        value = (
            vecmath.fence(tirx.const(float("nan"), self.monoid.held), self.monoid.held)
            if self.op == "mean"
            else self._constant(self.monoid.start)
        )

        def piece(outer: list[Index], start: Index, length: Index) -> None:
            vector_loop(self.code, start, length, 1, lambda i: self.sink([*outer, i][: len(axes)], self._final(value, 1)))

        run_space(self.code, axes, self.tuning, 1, piece)

    # --- pieces that the strategies share --------------------------------------------------------------------------------

    def _constant(self, value: Any, dtype: str | None = None) -> Any:
        assert self.monoid is not None
        dtype = dtype or self.monoid.held
        if dtype == "uint64" or not dtype.startswith("uint"):
            return tirx.const(value, dtype)
        return tirx.const(int(value), dtype)

    def _operand_index(self, kept: Sequence[Index], reduced: Sequence[Index]) -> list[Index]:
        at = dict(zip((id(a) for a in self.kept), kept, strict=True)) | dict(zip((id(a) for a in self.inner), reduced, strict=True))
        return linear_index(self.axes, [at[id(a)] for a in self.axes], len(self.shape))

    def _element(self, kept: Sequence[Index], reduced: Sequence[Index]) -> Any:
        """The operand's element, as accumulators hold it."""
        value = Expressions(self.args, self.sources).at(self.x, self._operand_index(kept, reduced))
        if (self.monoid is not None and self.monoid.held == "uint8" and self.x.dtype != types.u8) or self.op in ("any", "all"):
            return scalar.cast(value, self.x.dtype, types.b1).astype("uint8")
        return value.astype("float64") if self.op == "prod" and self.x.dtype.is_float else value

    def _join(self, acc: Any, at: Index, kept: Sequence[Index], reduced: Sequence[Index]) -> None:
        """Join the operand's element with an accumulator; one that is a product is added without being rounded before."""
        assert self.monoid is not None
        held = self.code.load(acc, at)
        factors = None
        if self.op in ("sum", "mean"):
            factors = Expressions(self.args, self.sources).factors(self.x, self._operand_index(kept, reduced))
        value = self.monoid.join(held, self._element(kept, reduced)) if factors is None else held + factors[0] * factors[1]
        self.code.store(acc, at, value)

    def _final(self, total: Any, count: Index | None = None) -> Any:
        """The result from the total: the mean's division, the result's rounding."""
        dtype = self.node.result.dtype
        if self.op == "mean":
            n = i64(self.count if count is None else count).astype(total.ty.dtype)
            total = total / n
        if dtype.is_bool:
            return tirx.NE(total, tirx.const(0, "uint8"))
        name = scalar.COMPUTE[dtype]
        return scalar.rounded(self.code.bind(total if total.ty.dtype == name else total.astype(name)), dtype) if dtype.is_float else total

    def _result_index(self, kept: Sequence[Index]) -> list[Index]:
        """Index of the node's result from the kept loops."""
        full: list[Index] = [0] * len(self.shape)
        for axis, i in zip(self.kept, kept, strict=True):
            for k, value in zip(axis.members, self.code.unflatten(i, [self.shape[k] for k in axis.members]), strict=True):
                full[k] = value
        keep = self.node.attrs["keepdims"]
        return [0 if k in self.reduced else i for k, i in enumerate(full) if keep or k not in self.reduced]

    def _loops(self, axes: Sequence[Axis], body: Callable[[list[Index]], None]) -> None:
        """Serial loops over axes."""

        def level(k: int, at: list[Index]) -> None:
            if k == len(axes):
                body(at)
                return
            with self.code.loop(axes[k].size, "serial", "k") as i:
                level(k + 1, [*at, i])

        level(0, [])

    def _is_long(self, limit: int) -> bool:
        assert self.monoid is not None
        return self.monoid.total != self.monoid.held and (not isinstance(self.count, int) or self.count > limit)

    # --- pieces -------------------------------------------------------------------------------------------------------------

    def _pieces(self, steps: Index, width: int = 1) -> int:
        """Pieces of the first reduced axis, so that there is a task or several for each core; 1 if the results alone are tasks enough.

        Args:
            steps: tasks without pieces; each has the reduced elements of ``width`` results.
        """
        if not self.tuning.parallel or not self.inner:
            return 1
        cores = self.tuning.cores
        if self.tuning.pieces:
            wanted = self.tuning.pieces
        elif isinstance(steps, int) and isinstance(self.count, int):
            work = self.count * self.weight * width
            if steps >= 4 * cores or steps % cores == 0 or steps * work < 4 * SMALL:
                return 1
            wanted = min(-(-4 * cores // steps), work // GRAIN, PIECES // steps)
        else:
            wanted = UNKNOWN if steps == 1 else 1
        first = self.inner[0].size
        if isinstance(first, int):
            wanted = min(wanted, first // self.lanes if width == 1 and len(self.inner) == 1 else first)
        return max(1, wanted)

    def _part(self, piece: Index, chunk: Index) -> tuple[Index, Index]:
        """Where a piece of the first reduced axis begins, and its length."""
        code = self.code
        start = code.simplify(piece * chunk)
        return start, code.bind_index(code.greatest(code.least(self.inner[0].size - start, chunk), 0))

    # --- the innermost axis is reduced -------------------------------------------------------------------------------------

    def _rows(self) -> None:
        code, m = self.code, self.monoid
        assert m is not None
        steps = product(code, [a.size for a in self.kept])
        pieces = self._pieces(steps)
        first = self.inner[0].size if self.inner else 1
        chunk: Index = first
        if pieces > 1:
            chunk = code.ceildiv(first, pieces)
            if len(self.inner) == 1:
                chunk = code.simplify(code.ceildiv(chunk, self.lanes) * self.lanes)
        total_type = m.total if self._is_long(BLOCK) else m.held
        partial = code.alloc(code.simplify(steps * pieces), total_type, "partial", scope="global") if pieces > 1 else None
        with code.loop(code.simplify(steps * pieces), self._kind(steps, pieces), "row") as row:
            at = code.unflatten(row, [*(a.size for a in self.kept), pieces])
            kept, piece = at[:-1], at[-1]
            start, length = self._part(piece, chunk) if pieces > 1 else (0, first)
            total = self._row_total(kept, start, length, total_type)
            if partial is None:
                self.sink(self._result_index(kept), self._final(total))
            else:
                code.store(partial, row, total)
        if partial is None:
            return
        with code.loop(steps, "serial", "row") as row:
            acc = code.alloc(1, total_type, "acc")
            code.store(acc, 0, self._constant(m.start, total_type))
            with code.loop(pieces, "serial", "p") as p:
                code.store(acc, 0, m.join(code.load(acc, 0), code.load(partial, row * pieces + p)))
            kept = code.unflatten(row, [a.size for a in self.kept])
            self.sink(self._result_index(kept), self._final(code.load(acc, 0)))

    def _kind(self, steps: Index, pieces: int, width: int = 1) -> str:
        """The kind of a loop over tasks of ``width`` results each, or over pieces of them: these there are only where threads pay."""
        if not self.tuning.parallel:
            return "serial"
        if pieces == 1 and isinstance(steps, int):
            small = isinstance(self.count, int) and steps * self.count * self.weight * width < SMALL
            return "serial" if steps == 1 or small else "parallel"
        return "parallel"

    def _row_total(self, kept: list[Index], start: Index, length: Index, total_type: str) -> Any:
        """Reduce one row: the range of the outermost reduced axis, and all of the others."""
        code, m = self.code, self.monoid
        assert m is not None
        last = self.inner[-1].size if self.inner else 1
        lanes = 1 if isinstance(last, int) and last < self.lanes else self.lanes
        unroll = self.tuning.unroll if lanes > 1 and not (isinstance(last, int) and last < lanes * self.tuning.unroll) else 1
        width = lanes * unroll
        block_size = width * TERMS
        acc = code.alloc(width, m.held, "acc")
        long = self._is_long(BLOCK)
        total = code.alloc(1, total_type, "total")
        code.store(total, 0, self._constant(m.start, total_type))

        def clear() -> None:
            lanewise(code, width, lanes, lambda l: code.store(acc, l, self._constant(m.start)))

        def flush() -> None:
            value = combine(code, acc, width, lanes, m)
            code.store(total, 0, m.join(code.load(total, 0), value if total_type == m.held else value.astype(total_type)))

        def span(outer: list[Index], first: Index, count: Index) -> None:
            def update(at: Index, i: Index) -> None:
                self._join(acc, at, kept, [*outer, i][: len(self.inner)])

            whole, rest = code.div(count, width), code.mod(count, width)
            if not (isinstance(whole, int) and whole == 0):
                with code.loop(whole, "serial", "c") as c:
                    lanewise(code, width, lanes, lambda l: update(l, code.simplify(first + c * width + l)))
            if isinstance(rest, int) and rest == 0:
                return
            base = code.simplify(first + whole * width)
            whole_vectors = code.div(rest, lanes) if unroll > 1 else 0
            if not (isinstance(whole_vectors, int) and whole_vectors == 0):
                with code.loop(whole_vectors, "serial", "c") as c, code.loop(lanes, "vectorized", "v") as v:
                    update(v, code.simplify(base + c * lanes + v))
                base = code.simplify(base + whole_vectors * lanes)
                rest = code.mod(rest, lanes)
            with code.loop(rest, "serial", "r") as r:
                update(0, code.simplify(base + r))

        outer_axes = self.inner[:-1]
        ranged = [Axis(outer_axes[0].members, length), *outer_axes[1:]] if outer_axes else []
        if not long:
            clear()

        def line(outer: list[Index]) -> None:
            shifted = [code.simplify(outer[0] + start), *outer[1:]] if outer else []
            first, count = (0, last) if outer_axes else (start, length)
            if not long:
                span(shifted, first, count)
            elif isinstance(count, int) and count <= block_size:
                clear()
                span(shifted, first, count)
                flush()
            else:
                with code.loop(code.ceildiv(count, block_size), "serial", "block") as block:
                    done = code.simplify(block * block_size)
                    clear()
                    span(shifted, code.simplify(first + done), code.bind_index(code.least(count - done, block_size)))
                    flush()

        self._loops(ranged, line)
        if not long:
            flush()
        return code.load(total, 0)

    # --- the innermost axis is kept ------------------------------------------------------------------------------------------

    def _width(self, across: bool) -> int:
        """Neighbouring results that are reduced side by side."""
        last = self.kept[-1].size if across else 1
        if not across or self.lanes == 1 or (isinstance(last, int) and last < self.lanes):
            return 1
        wide = self.lanes * self.tuning.unroll
        return self.lanes if isinstance(last, int) and last < wide else wide

    def _along_lanes(self, across: bool, step: Callable[[list[Index], Index, int], None]) -> None:
        """Neighbouring results side by side: a tile of the innermost kept axis at a time."""
        code = self.code
        outer, last = (self.kept[:-1], self.kept[-1].size) if across else (self.kept, 1)
        width = self._width(across)
        tiles = code.ceildiv(last, width)
        steps = product(code, [*(a.size for a in outer), tiles])
        with code.loop(steps, self._kind(steps, 1, width), "tile") as tile:
            at = code.unflatten(tile, [*(a.size for a in outer), tiles])
            start = self._tile_start(at[-1], last, width)
            if width > 1 and not isinstance(last, int):
                with code.when(i64(last) >= i64(width)):
                    step(at[:-1], start, width)
                with code.when(i64(last) < i64(width)), code.loop(code.least(last, width), "serial", "j") as j:
                    step(at[:-1], j, 1)
            else:
                step(at[:-1], start, width)

    def _tile_start(self, tile: Index, last: Index, width: int) -> Index:
        """The first result of a tile; the last tile overlaps the one before."""
        code = self.code
        start: Index = code.simplify(tile * width)
        if width == 1 or (isinstance(last, int) and last % width == 0):
            return start
        return code.bind_index(code.greatest(code.least(start, last - width), 0))

    def _columns(self) -> None:
        code, m, last, outer = self.code, self.monoid, self.kept[-1].size, self.kept[:-1]
        assert m is not None
        width = self._width(True)
        tiles = code.ceildiv(last, width)
        sizes = [*(a.size for a in outer), tiles]
        steps = product(code, sizes)
        pieces = self._pieces(steps, width) if isinstance(last, int) and isinstance(self.count, int) else 1
        if pieces == 1:
            whole = self.inner[0].size if self.inner else 1  # reduced axes of one element are no loops

            def step(outer: list[Index], start: Index, width: int) -> None:
                self._store_columns(outer, start, width, self._column_total(outer, start, width, 0, whole))

            return self._along_lanes(True, step)
        chunk = code.ceildiv(self.inner[0].size, pieces)
        name = m.total if self._is_long(ROWS) else m.held
        partial = code.alloc(code.simplify(steps * (pieces * width)), name, "partial", scope="global")
        lanes = min(self.lanes, width)
        with code.loop(code.simplify(steps * pieces), self._kind(steps, pieces), "tile") as task:
            *at, tile, piece = code.unflatten(task, [*sizes, pieces])
            total = self._column_total(at, self._tile_start(tile, last, width), width, *self._part(piece, chunk))
            lanewise(code, width, lanes, lambda l: code.store(partial, code.simplify(task * width + l), code.load(total, l)))
        with code.loop(steps, "serial", "tile") as task:
            *at, tile = code.unflatten(task, sizes)
            total = code.alloc(width, name, "total")
            lanewise(code, width, lanes, lambda l: code.store(total, l, self._constant(m.start, name)))
            with code.loop(pieces, "serial", "p") as p:
                base = code.simplify((task * pieces + p) * width)

                def join(l: Index) -> None:
                    code.store(total, l, m.join(code.load(total, l), code.load(partial, code.simplify(base + l))))

                lanewise(code, width, lanes, join)
            self._store_columns(at, self._tile_start(tile, last, width), width, total)
        return None

    def _lane_index(self, outer: list[Index], i: Index) -> list[Index]:
        return [*outer, i][: len(self.kept)]

    def _column_total(self, outer: list[Index], start: Index, width: int, first: Index, count: Index) -> Any:
        """Reduce ``width`` neighbouring results over a range of the first reduced axis, and all of the others; returns the buffer."""
        code, m = self.code, self.monoid
        assert m is not None
        lanes = min(self.lanes, width)
        long = self._is_long(ROWS)
        acc = code.alloc(width, m.held, "acc")
        total = code.alloc(width, m.total, "total") if long else acc

        def fill(buffer: Any, dtype: str) -> None:
            lanewise(code, width, lanes, lambda l: code.store(buffer, l, self._constant(m.start, dtype)))

        def update(reduced: list[Index]) -> None:
            at = [code.simplify(first + reduced[0]), *reduced[1:]] if self.inner else []
            lanewise(code, width, lanes, lambda l: self._join(acc, l, self._lane_index(outer, code.simplify(start + l)), at))

        axes = [Axis(a.members, a.size if k else count) for k, a in enumerate(self.inner)]
        if not long:
            fill(acc, m.held)
            self._loops(axes, update)
            return acc
        fill(total, m.total)
        level, steps = self._block()

        def blocks(above: list[Index]) -> None:
            size = axes[level].size
            with code.loop(code.ceildiv(size, steps), "serial", "block") as block:
                done = code.simplify(block * steps)
                fill(acc, m.held)
                part = Axis(axes[level].members, code.bind_index(code.least(size - done, steps)))
                self._loops([part, *axes[level + 1 :]], lambda at: update([*above, code.simplify(done + at[0]), *at[1:]]))
                lanewise(code, width, lanes, lambda l: code.store(total, l, m.join(code.load(total, l), code.load(acc, l).astype(m.total))))

        self._loops(axes[:level], blocks)
        return total

    def _block(self) -> tuple[int, int]:
        """The elements of a column that one accumulator takes: some steps of a reduced axis, and all of the axes within it.

        Returns:
            The position of that axis among the reduced ones, and how many steps: no more than ``ROWS`` elements.
        """
        level, within = len(self.inner) - 1, 1
        while level and isinstance(n := self.inner[level].size, int) and within * n <= ROWS:
            level, within = level - 1, within * n
        return level, ROWS // within

    def _store_columns(self, outer: list[Index], start: Index, width: int, total: Any) -> None:
        code = self.code

        def out(l: Index) -> None:
            self.sink(self._result_index(self._lane_index(outer, code.simplify(start + l))), self._final(code.load(total, l)))

        lanewise(code, width, min(self.lanes, width), out)

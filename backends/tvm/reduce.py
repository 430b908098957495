"""Reductions over any axes, as loop nests.

Where the innermost axis is reduced, several vectors of partial results run side by side and are combined at the end;
where it is kept, the lanes are neighbouring results. Float sums over many elements are taken in blocks whose results are
added in f64, so that the error does not grow with the length. Few results over many elements are split into pieces that
run in parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

BLOCK = 1 << 13  # elements a lane-split float sum takes before it is added to an f64 total
ROWS = 256  # the same for sums along an outer axis, an element a lane
PIECES = 64  # at most so many pieces of one reduction run in parallel
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
        self.monoid = None if self.op.startswith("arg") else Monoid.of(self.op, self.x.dtype)

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
        if self.op.startswith("arg"):
            return self._along_lanes(across, self._arg_step)
        if across:
            return self._along_lanes(True, self._column_step)
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

    def _element(self, kept: Sequence[Index], reduced: Sequence[Index]) -> Any:
        """The operand's element, as accumulators hold it."""
        at = dict(zip((id(a) for a in self.kept), kept, strict=True)) | dict(zip((id(a) for a in self.inner), reduced, strict=True))
        index = linear_index(self.axes, [at[id(a)] for a in self.axes], len(self.shape))
        value = Expressions(self.args, self.sources).at(self.x, index)
        if (self.monoid is not None and self.monoid.held == "uint8" and self.x.dtype != types.u8) or self.op in ("any", "all"):
            return scalar.cast(value, self.x.dtype, types.b1).astype("uint8")
        return value

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
            start: Index = code.simplify(piece * chunk) if pieces > 1 else 0
            length: Index = code.bind_index(code.greatest(code.least(first - start, chunk), 0)) if pieces > 1 else first
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

    def _pieces(self, steps: Index) -> int:
        if not self.tuning.parallel or not self.inner:
            return 1
        if isinstance(steps, int) and isinstance(self.count, int):
            if steps >= PIECES or steps * self.count * self.weight < 2 * SMALL:
                return 1
            first = self.inner[0].size
            assert isinstance(first, int)
            return max(1, min(PIECES // steps, first // self.lanes if len(self.inner) == 1 else first))
        return PIECES if steps == 1 else 1

    def _kind(self, steps: Index, pieces: int) -> str:
        if not self.tuning.parallel or (isinstance(steps, int) and steps * pieces == 1):
            return "serial"
        if isinstance(steps, int) and isinstance(self.count, int) and steps * self.count * self.weight < SMALL:
            return "serial"
        return "parallel"

    def _row_total(self, kept: list[Index], start: Index, length: Index, total_type: str) -> Any:
        """Reduce one row: the range of the outermost reduced axis, and all of the others."""
        code, m = self.code, self.monoid
        assert m is not None
        last = self.inner[-1].size if self.inner else 1
        lanes = 1 if isinstance(last, int) and last < self.lanes else self.lanes
        unroll = self.tuning.unroll if lanes > 1 and not (isinstance(last, int) and last < lanes * self.tuning.unroll) else 1
        width = lanes * unroll
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
                reduced = [*outer, i][: len(self.inner)]
                code.store(acc, at, m.join(code.load(acc, at), self._element(kept, reduced)))

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
            elif isinstance(count, int) and count <= BLOCK:
                clear()
                span(shifted, first, count)
                flush()
            else:
                with code.loop(code.ceildiv(count, BLOCK), "serial", "block") as block:
                    clear()
                    span(shifted, code.simplify(first + block * BLOCK), code.bind_index(code.least(count - block * BLOCK, BLOCK)))
                    flush()

        self._loops(ranged, line)
        if not long:
            flush()
        return code.load(total, 0)

    # --- the innermost axis is kept ------------------------------------------------------------------------------------------

    def _along_lanes(self, across: bool, step: Callable[[list[Index], Index, int], None]) -> None:
        """Neighbouring results side by side: a tile of the innermost kept axis at a time."""
        code = self.code
        outer, last = (self.kept[:-1], self.kept[-1].size) if across else (self.kept, 1)
        wide = self.lanes * self.tuning.unroll if across else 1
        width = wide if across and not (isinstance(last, int) and last < wide) else self.lanes
        if not across or self.lanes == 1 or (isinstance(last, int) and last < self.lanes):
            width = 1
        tiles = code.ceildiv(last, width)
        steps = product(code, [*(a.size for a in outer), tiles])
        with code.loop(steps, self._kind(steps, 1), "tile") as tile:
            at = code.unflatten(tile, [*(a.size for a in outer), tiles])
            start: Index = code.simplify(at[-1] * width)
            if width > 1 and not (isinstance(last, int) and last % width == 0):  # the last tile overlaps the one before
                start = code.bind_index(code.greatest(code.least(start, last - width), 0))
            if width > 1 and not isinstance(last, int):
                with code.when(i64(last) >= i64(width)):
                    step(at[:-1], start, width)
                with code.when(i64(last) < i64(width)), code.loop(code.least(last, width), "serial", "j") as j:
                    step(at[:-1], j, 1)
            else:
                step([*at[:-1]] if across else list(at[:-1]), start, width)

    def _lane_index(self, outer: list[Index], i: Index) -> list[Index]:
        return [*outer, i][: len(self.kept)]

    def _column_step(self, outer: list[Index], start: Index, width: int) -> None:
        code, m = self.code, self.monoid
        assert m is not None
        lanes = min(self.lanes, width)
        long = self._is_long(ROWS)
        acc = code.alloc(width, m.held, "acc")
        total = code.alloc(width, m.total, "total") if long else acc

        def fill(buffer: Any, dtype: str) -> None:
            lanewise(code, width, lanes, lambda l: code.store(buffer, l, self._constant(m.start, dtype)))

        def update(reduced: list[Index]) -> None:
            def lane(l: Index) -> None:
                element = self._element(self._lane_index(outer, code.simplify(start + l)), reduced)
                code.store(acc, l, m.join(code.load(acc, l), element))

            lanewise(code, width, lanes, lane)

        if long:
            fill(total, m.total)
            first, rest = self.inner[0], self.inner[1:]
            with code.loop(code.ceildiv(first.size, ROWS), "serial", "block") as block:
                fill(acc, m.held)
                count = code.bind_index(code.least(first.size - block * ROWS, ROWS))
                with code.loop(count, "serial", "k") as k:
                    self._loops(rest, lambda at: update([code.simplify(block * ROWS + k), *at]))
                lanewise(code, width, lanes, lambda l: code.store(total, l, m.join(code.load(total, l), code.load(acc, l).astype(m.total))))
        else:
            fill(acc, m.held)
            self._loops(self.inner, update)

        def out(l: Index) -> None:
            self.sink(self._result_index(self._lane_index(outer, code.simplify(start + l))), self._final(code.load(total, l)))

        lanewise(code, width, lanes, out)

    def _arg_step(self, outer: list[Index], start: Index, width: int) -> None:
        """Index of the first extreme element; nan counts as the most extreme."""
        code = self.code
        name = scalar.COMPUTE[self.x.dtype] if not self.x.dtype.is_bool else "uint8"
        length = self.inner[0].size if self.inner else 1
        across = width > 1 or (bool(self.axes) and self.axes[-1] in self.kept)
        if not across and self.lanes > 1 and isinstance(length, int) and length >= 2 * self.lanes:
            return self._arg_row(self._lane_index(outer, start), length, name)
        lanes = min(self.lanes, width)
        best, where = code.alloc(width, name, "best"), code.alloc(width, "int64", "where")

        def element(l: Index, k: list[Index]) -> Any:
            return self._arg_element(self._lane_index(outer, code.simplify(start + l)), k)

        def begin(l: Index) -> None:
            code.store(best, l, element(l, [0] * len(self.inner)))
            code.store(where, l, i64(0))

        lanewise(code, width, lanes, begin)
        self._loops(
            self.inner,
            lambda k: lanewise(code, width, lanes, lambda l: self._arg_update(best, where, l, element(l, k), k[0] if k else 0)),
        )

        def out(l: Index) -> None:
            self.sink(self._result_index(self._lane_index(outer, code.simplify(start + l))), code.load(where, l))

        lanewise(code, width, lanes, out)
        return None

    def _arg_row(self, kept: list[Index], length: int, name: str) -> None:
        """One row by vectors: each lane finds its first extreme element, and the lanes are compared at the end."""
        code, lanes = self.code, self.lanes
        best, where = code.alloc(lanes, name, "best"), code.alloc(lanes, "int64", "where")

        def begin(l: Index) -> None:
            code.store(best, l, self._arg_element(kept, [l]))
            code.store(where, l, i64(l))

        lanewise(code, lanes, lanes, begin)
        with code.loop(length // lanes - 1, "serial", "c") as c:
            first = code.simplify((c + 1) * lanes)

            def lane(l: Index) -> None:
                self._arg_update(best, where, l, self._arg_element(kept, [code.simplify(first + l)]), first + l)

            lanewise(code, lanes, lanes, lane)
        with code.loop(lanes - 1, "serial", "l") as l:
            at = code.simplify(l + 1)
            self._arg_update(best, where, 0, code.load(best, at), code.load(where, at), ordered=False)
        with code.loop(length % lanes, "serial", "r") as r:
            k = code.simplify(length // lanes * lanes + r)
            self._arg_update(best, where, 0, self._arg_element(kept, [k]), k)
        self.sink(self._result_index(kept), code.load(where, 0))

    def _arg_element(self, kept: list[Index], k: list[Index]) -> Any:
        value = self._element(kept, k)
        return value.astype("uint8") if self.x.dtype.is_bool else value

    def _arg_update(self, best: Any, where: Any, l: Index, new: Any, k: Any, ordered: bool = True) -> None:
        """Take element k in the place of the best one so far, if it is better; among equals, unless all before were lower, the first."""
        code, dtype = self.code, self.x.dtype
        value, old, place = code.bind(new), code.bind(code.load(best, l)), code.load(where, l)
        better = value > old if self.op == "argmax" else value < old
        equal = tirx.EQ(value, old)
        if dtype.is_float:
            n = scalar.COMPUTE[dtype]
            isnan, wasnan = vecmath.isnan(value, n), vecmath.isnan(old, n)
            better = tirx.And(tirx.Or(better, tirx.And(isnan, tirx.Not(wasnan))), tirx.Not(wasnan))
            equal = tirx.Or(equal, tirx.And(isnan, wasnan))
        if not ordered:
            better = tirx.Or(better, tirx.And(equal, i64(k) < place))
        better = code.bind(better)
        code.store(where, l, tirx.Select(better, i64(k), place))
        code.store(best, l, tirx.Select(better, value, old))

"""The place of the greatest or the least element along an axis, as a loop nest: each accumulator keeps its element and where it was."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from graphopt.backends.tvm import scalar, vecmath
from graphopt.backends.tvm.code import Index, i64
from graphopt.backends.tvm.loops import lanewise
from graphopt.backends.tvm.monoid import Monoid
from graphopt.backends.tvm.reduce import Reduction


class ArgReduction(Reduction):
    """One ``argmax`` or ``argmin``."""

    def _monoid(self) -> Monoid | None:
        return None

    def _columns(self) -> None:
        self._along_lanes(True, self._step)

    def _rows(self) -> None:
        self._along_lanes(False, self._step)

    def _step(self, outer: list[Index], start: Index, width: int) -> None:
        """Index of the first extreme element; nan counts as the most extreme."""
        code = self.code
        name = scalar.COMPUTE[self.x.dtype] if not self.x.dtype.is_bool else "uint8"
        length = self.inner[0].size if self.inner else 1
        across = width > 1 or (bool(self.axes) and self.axes[-1] in self.kept)
        if not across and self.lanes > 1 and isinstance(length, int) and length >= 2 * self.lanes:
            return self._row(self._lane_index(outer, start), length, name)
        lanes = min(self.lanes, width)
        best, where = code.alloc(width, name, "best"), code.alloc(width, "int64", "where")

        def element(l: Index, k: list[Index]) -> Any:
            return self._at(self._lane_index(outer, code.simplify(start + l)), k)

        def begin(l: Index) -> None:
            code.store(best, l, element(l, [0] * len(self.inner)))
            code.store(where, l, i64(0))

        lanewise(code, width, lanes, begin)
        self._loops(
            self.inner,
            lambda k: lanewise(code, width, lanes, lambda l: self._update(best, where, l, element(l, k), k[0] if k else 0)),
        )

        def out(l: Index) -> None:
            self.sink(self._result_index(self._lane_index(outer, code.simplify(start + l))), code.load(where, l))

        lanewise(code, width, lanes, out)
        return None

    def _row(self, kept: list[Index], length: int, name: str) -> None:
        """One row by vectors: each lane finds its first extreme element, and the lanes are compared at the end."""
        code, lanes = self.code, self.lanes
        best, where = code.alloc(lanes, name, "best"), code.alloc(lanes, "int64", "where")

        def begin(l: Index) -> None:
            code.store(best, l, self._at(kept, [l]))
            code.store(where, l, i64(l))

        lanewise(code, lanes, lanes, begin)
        with code.loop(length // lanes - 1, "serial", "c") as c:
            first = code.simplify((c + 1) * lanes)

            def lane(l: Index) -> None:
                self._update(best, where, l, self._at(kept, [code.simplify(first + l)]), first + l)

            lanewise(code, lanes, lanes, lane)
        with code.loop(lanes - 1, "serial", "l") as l:
            at = code.simplify(l + 1)
            self._update(best, where, 0, code.load(best, at), code.load(where, at), ordered=False)
        with code.loop(length % lanes, "serial", "r") as r:
            k = code.simplify(length // lanes * lanes + r)
            self._update(best, where, 0, self._at(kept, [k]), k)
        self.sink(self._result_index(kept), code.load(where, 0))

    def _at(self, kept: list[Index], k: list[Index]) -> Any:
        value = self._element(kept, k)
        return value.astype("uint8") if self.x.dtype.is_bool else value

    def _update(self, best: Any, where: Any, l: Index, new: Any, k: Any, ordered: bool = True) -> None:
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

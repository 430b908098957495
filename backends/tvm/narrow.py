"""Reductions to fewer neighbouring results than a vector has lanes: rows that follow one another in memory fill the lanes.

    x: [R, c]  =>  a row of W = g c elements, W a multiple of the lanes and of c, holds g rows of x

[R / g, W] is reduced as any other, and the g partial results of each column are joined at the end; what rows are left over are joined
one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from graphopt.backends.tvm.code import Index
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.loops import Axis, lanewise, merge_axes, product
from graphopt.backends.tvm.reduce import ROWS, Reduction

FLIGHT = 4  # vectors of partial results that wait for each other no longer
LEAST = 8  # steps of as many rows, that it is worth it


class NarrowReduction(Reduction):
    """One reduction node, whose results may be narrower than a vector."""

    together = 1  # rows of the operand side by side

    def _columns(self) -> None:
        together = self._rows_together()
        if together == 1:
            return super()._columns()
        code, m = self.code, self.monoid
        assert m is not None
        columns, size = self.kept[-1].size, self.inner[0].size
        assert isinstance(columns, int) and isinstance(size, int)
        self.together, width = together, together * columns
        self.inner = [Axis(self.inner[0].members, size // together)]
        self.axes = [*self.axes[:-2], *self.inner, self.axes[-1]]
        sizes = [a.size for a in self.kept[:-1]]
        steps = product(code, sizes)
        pieces = self._pieces(steps, columns)
        chunk = code.ceildiv(self.inner[0].size, pieces)
        name = m.total if self._is_long(ROWS) else m.held
        if pieces == 1:
            with code.loop(steps, self._kind(steps, 1, columns), "tile") as task:
                at = code.unflatten(task, sizes)
                self._fold(at, self._column_total(at, 0, width, 0, self.inner[0].size), size, name)
            return None
        partial = code.alloc(code.simplify(steps * (pieces * width)), name, "partial", scope="global")
        with code.loop(code.simplify(steps * pieces), self._kind(steps, pieces), "tile") as task:
            *at, piece = code.unflatten(task, [*sizes, pieces])
            total = self._column_total(at, 0, width, *self._part(piece, chunk))
            lanewise(code, width, self.lanes, lambda l: code.store(partial, code.simplify(task * width + l), code.load(total, l)))
        with code.loop(steps, "serial", "tile") as task:
            total = code.alloc(width, name, "total")
            lanewise(code, width, self.lanes, lambda l: code.store(total, l, self._constant(m.start, name)))
            with code.loop(pieces, "serial", "p") as p:
                base = code.simplify((task * pieces + p) * width)

                def join(l: Index) -> None:
                    code.store(total, l, m.join(code.load(total, l), code.load(partial, code.simplify(base + l))))

                lanewise(code, width, self.lanes, join)
            self._fold(code.unflatten(task, sizes), total, size, name)
        return None

    def _rows_together(self) -> int:
        """How many rows fill whole vectors; 1 where they do not follow one another in memory, or are too few."""
        columns, (*_, inner) = self.kept[-1].size, self.inner or [Axis([], 1)]
        if not (isinstance(columns, int) and isinstance(inner.size, int)) or len(self.inner) != 1 or columns >= self.lanes:
            return 1
        if len(self.axes) < 2 or self.axes[-2] is not inner:
            return 1
        both = [*inner.members, *self.kept[-1].members]
        merged = merge_axes(self.code, self.shape, Probe(self.args, self.sources, self.x), [k in both for k in range(len(self.shape))])
        vectors = columns // math.gcd(columns, self.lanes)
        together = -(-FLIGHT // vectors) * vectors * self.lanes // columns
        return together if merged[-1].members == both and inner.size >= LEAST * together else 1

    def _operand_index(self, kept: Sequence[Index], reduced: Sequence[Index]) -> list[Index]:
        """As for any reduction; a place beyond the last column is one in the rows behind."""
        return super()._operand_index(kept, [self.code.simplify(k * self.together) for k in reduced])

    def _fold(self, outer: list[Index], total: Any, rows: int, name: str) -> None:
        """Join the partial results of each column, and the rows that fill no step, and store them."""
        code, m, columns = self.code, self.monoid, self.kept[-1].size
        assert m is not None
        done = rows // self.together * self.together
        with code.loop(columns, "serial", "j") as j:
            acc = code.alloc(1, name, "acc")
            code.store(acc, 0, code.load(total, j))
            with code.loop(self.together - 1, "serial", "t") as t:
                code.store(acc, 0, m.join(code.load(acc, 0), code.load(total, code.simplify((t + 1) * columns + j))))
            with code.loop(rows - done, "serial", "r") as r:
                element = code.bind(self._element([*outer, code.simplify((done + r) * columns + j)], [0]))
                code.store(acc, 0, m.join(code.load(acc, 0), element.astype(name)))
            self.sink(self._result_index([*outer, j]), self._final(code.load(acc, 0)))

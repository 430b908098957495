"""Where the sums of a register tile go: through a region's epilogue, into its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tvm import tirx

from graphopt.backends.forms.support import VIEWS
from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.elementwise import HEAVY, Probe
from graphopt.backends.tvm.expr import Arguments, store_computed
from graphopt.ir import types
from graphopt.ir.graph import Graph, Value

LINE = 64  # bytes of a cache line
_LIGHT = 4  # ops of an epilogue that is written out for each vector of a tile


@dataclass(frozen=True)
class TileStore:
    """Evaluates a region's outputs where a tile of its products is known, and stores them.

    Attributes:
        results: the products, all of one shape ``[..., m, n]``.
        rows, columns: of a whole tile.
        lanes: elements of a vector.
        fits: whether all rows of each tile are rows of the products.
    """

    code: Code
    args: Arguments
    graph: Graph
    results: tuple[Value, ...]
    rows: int
    columns: int
    lanes: int
    fits: bool = False

    @cached_property
    def sizes(self) -> tuple[Index, Index]:
        """Rows and columns of the products."""
        m, n = (self.code.size(d) for d in self.results[0].shape[-2:])
        return m, n

    @property
    def fits_rows(self) -> bool:
        m = self.sizes[0]
        return self.fits or (isinstance(m, int) and m % self.rows == 0)

    @property
    def held(self) -> str:
        return scalar.COMPUTE[self.results[0].dtype]

    @cached_property
    def vector(self) -> int:
        """Elements of a vector of the epilogue: 1 if it has no vector form."""

        def zero(index: Sequence[Index]) -> Any:
            return tirx.const(0, self.held)

        for v in self.graph.outputs:
            probe = Probe(self.args, dict.fromkeys(self.results, zero), v)
            probe([0] * v.type.rank)
            if probe.scalar_only:
                return 1
        return self.lanes

    @cached_property
    def is_light(self) -> bool:
        """Whether the epilogue of one product is little enough to be written out for a whole tile."""
        seen, stack = dict[Value, None](), list(self.graph.outputs)
        while stack:
            v = stack.pop()
            if v in seen or v in self.results or v.producer is None:
                continue
            if v.producer.name in HEAVY or v.dtype != types.f32:
                return False
            if v.producer.name not in VIEWS:
                seen[v] = None
            stack += v.producer.operands
        plain = self.vector == self.lanes and self.results[0].dtype == types.f32
        return plain and len(self.results) == len(self.graph.outputs) == 1 and len(seen) <= _LIGHT

    def ask(self, lead: Sequence[Index], row: Index, column: Index, width: int) -> None:
        """Ask for the lines of the outputs that a tile of so many columns will be written to."""
        for k, v in enumerate(self.graph.outputs):
            for i in range(self.rows):
                for u in range(0, width, LINE // v.dtype.itemsize):
                    self.args.ask(k, [*lead, self.code.simplify(row + i), self.code.simplify(column + u)])

    def write_registers(self, lead: Sequence[Index], row: Index, column: Index, acc: Sequence[Any], width: int, back: int = 0) -> None:
        """Store a tile of whole vectors, a row of accumulators a buffer; the last one lies ``back`` columns before its place."""
        code, (m, _) = self.code, self.sizes

        def line(i: int, sums: Any) -> None:
            r = code.bind_index(code.simplify(row + i), "r")
            for u in range(0, width, self.lanes):
                shift = back if u + self.lanes == width else 0
                with code.loop(self.lanes, "vectorized", "v") as v:
                    self._element([*lead, r, code.simplify(column + (u - shift) + v)], [(sums, code.simplify(u + v))])

        for i, sums in enumerate(acc):
            if self.fits_rows:
                line(i, sums)
            else:
                with code.when(i64(code.simplify(row + i)) < i64(m)):
                    line(i, sums)

    def write(self, lead: Sequence[Index], row: Index, column: Index, sums: Sequence[Any], width: int, inside: bool | None,
              base: Index = 0, back: int = 0) -> None:  # fmt: skip
        """Store a tile, which starts at ``base`` of a buffer for each product.

        Args:
            width: columns of the tile, which stand side by side in the buffers.
            inside: whether all columns are columns of the products; None if that is not known. All vectors are stored at once then,
                else element by element.
            back: by how many columns the last vector lies before its place; only where all are inside.
        """
        code, (m, n) = self.code, self.sizes
        count = self.rows if self.fits_rows else code.bind_index(code.least(m - row, self.rows), "rows")

        def one(i: Index, j: Index, shift: int = 0) -> None:
            place = code.simplify(base + i * width + j)
            self._element([*lead, code.simplify(row + i), code.simplify(column + j - shift)], [(x, place) for x in sums])

        def vectors(i: Index, first: int, end: int, lanes: int, shift: int = 0) -> None:
            if first == end:
                return
            with code.loop((end - first) // lanes, "serial", "u") as u, code.loop(lanes, "vectorized", "v") as v:
                one(i, code.simplify(first + u * lanes + v), shift)

        def lines(lanes: int) -> None:
            with code.loop(count, "serial", "i") as i:
                if lanes:
                    regular = width - self.lanes if back else width
                    vectors(i, 0, regular, lanes)
                    vectors(i, regular, width, lanes, back)
                else:
                    with code.loop(code.least(n - column, width), "serial", "j") as j:
                        one(i, j)

        if inside is not None:
            lines(self.vector if inside else 0)
            return
        full = i64(code.simplify(column + self.columns)) <= i64(n)
        if not isinstance(n, int) or n >= self.columns:
            with code.when(full):
                lines(self.vector)
        with code.when(tirx.Not(full)):
            lines(0)

    def _element(self, at: Sequence[Index], sums: Sequence[tuple[Any, Index]]) -> None:
        """Store one place of all outputs; ``sums``: where each product's sum lies."""
        code, dtype = self.code, self.results[0].dtype
        found = [scalar.rounded(code.bind(code.load(buffer, place)), dtype) for buffer, place in sums]
        store_computed(self.args, at, dict(zip(self.results, found, strict=True)))

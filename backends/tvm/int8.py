"""Products of 8-bit integers, summed exactly in 32 bits, with what makes integers of the first factor's rows and floats of the sums.

How rows and tasks go is :mod:`~graphopt.backends.tvm.panelproduct`'s; the engines are:

- ``amx``: TDPBSSD, tiles of 16 x 64 by 64 x 16; two by two are summed at once. Meanwhile the vector units make floats of the panel
  before.
- ``vnni``, ``sdot``, ``mul``: dot instructions (:mod:`~graphopt.backends.tvm.dots8`); for ``vnni``, unsigned by signed, rows are kept with
  128 added, and 128 times the sum of a column is taken off.

All of them give the same bits: sums of integers are exact, and wrap around alike.

Reference: Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter 20 (AMX) and section 19.2 (VNNI).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.tvm import amx, dots8
from graphopt.backends.tvm.code import Index
from graphopt.backends.tvm.dots8 import WORD
from graphopt.backends.tvm.int8form import packed_fours
from graphopt.backends.tvm.panelform import COLUMNS, products_of, statistic_of
from graphopt.backends.tvm.panelproduct import PanelProduct
from graphopt.errors import BuildError
from graphopt.ir.graph import Graph

UNROLL = 4  # words of a row at a time


class Int8Kernel(PanelProduct):
    """Emits a region with one integer matmul, or two of one first factor, and a pointwise epilogue of the product's shape.

    Args: see :func:`graphopt.backends.tvm.int8form.params`.
    """

    word, total = WORD, "int32"

    def __init__(self, graph: Graph, engine: str, **knobs: Any) -> None:
        nodes = products_of(graph)
        packed = [p for n in nodes if (p := packed_fours(n.operands[1])) is not None]
        if len(packed) != len(nodes):
            raise BuildError("the second factor is not packed in fours")
        self.unsigned = engine == "vnni"
        self.held = "uint8" if self.unsigned else "int8"
        super().__init__(graph, nodes, packed, statistic_of(graph), engine, **knobs)

    def _put(self, left: Any, at: Index, value: Any) -> None:
        if self.unsigned:
            value = tirx.bitwise_xor(tirx.reinterpret("uint8", value), tirx.const(128, "uint8"))
        self.code.store(left, at, value)

    def _multiply(self, total: int, a: int, b: int) -> None:
        amx.multiply_bytes(self.code, total, a, b)

    # --- dot instructions ---------------------------------------------------------------------------------------------------

    def _dots(self, left: Any, weight: Any, at: Index, total: Any, first: Index, here: Index) -> None:
        """A panel by rows: four elements of a row are broadcast, and multiplied with four of each column."""
        code, lanes = self.code, self.lanes
        vectors = 2 if lanes * 2 <= COLUMNS else 1  # at once
        width = vectors * lanes
        with code.loop(COLUMNS // width, "serial", "u") as u:
            y = code.bind_index(code.simplify(at + u * (width * WORD)), "y")
            column = code.simplify(u * width)
            count = self.depth // WORD
            taken = dots8.excess(code, self.engine, weight, y, COLUMNS * WORD, count, vectors, lanes) if self.unsigned else []
            with code.loop(here, "serial", "io") as io:
                self._dot_tile(left, weight, y, total, code.simplify(first + io), io, column, vectors, taken)

    def _dot_tile(self, left: Any, weight: Any, y: Index, total: Any, tile: Index, io: Index, column: Index, vectors: int,
                  taken: Sequence[Any]) -> None:  # fmt: skip
        code, lanes = self.code, self.lanes
        starts = [code.bind_index(code.simplify((tile * self.mr + i) * self.depth), "x") for i in range(self.mr)]
        sums = dots8.zeros(code, self.mr * vectors, lanes)

        def step(k: Index) -> None:
            ws = [dots8.words(code, weight, code.simplify(y + k * (COLUMNS * WORD) + v * lanes * WORD), lanes) for v in range(vectors)]
            for i, start in enumerate(starts):
                x = dots8.four(code, left, code.simplify(start + k * WORD), lanes)
                for v, w in enumerate(ws):
                    dots8.add(code, self.engine, sums[i * vectors + v], x, w, lanes)

        lines = self.depth // self.step
        with code.loop(lines, "serial", "s") as s:
            self._fetch(weight, y, code.simplify(io * lines + s))
            with code.loop(self.step // WORD // UNROLL, "serial", "k") as k:
                for q in range(UNROLL):
                    step(code.simplify(s * (self.step // WORD) + k * UNROLL + q))
        for i in range(self.mr):
            for v in range(vectors):
                value = dots8.vector(sums[i * vectors + v], lanes)
                value = value - taken[v] if taken else value
                to = code.simplify((io * self.mr + i) * COLUMNS + column + v * lanes)
                code.emit(tirx.BufferStore(total, value, [dots8.ramp(to, lanes)]))

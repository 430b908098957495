"""Products of one row: no tiles to multiply, a matrix to read once.

    for k0 in range(0, K, BLOCK_K):  acc += a[k0 + ks] * b[k0 + ks, columns]
    sums of acc over its BLOCK_K rows

Tiles of 16 rows would hold 15 of zeros. Lanes keep sums of their own over the whole loop, and meet once behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.backends.triton.code import Code, Launch, ceildiv, conditions
from graphopt.backends.triton.expr import Expressions, Index
from graphopt.backends.triton.index import Sum, Var, variable
from graphopt.backends.triton.matmul import columns_of, form_of, last
from graphopt.backends.triton.sums import Pieces, total_of
from graphopt.ir import dims
from graphopt.ir.graph import Graph, Value


class GemvKernel:
    """One region of products whose left factor is one row, or one a matrix of a batch.

    Args:
        columns, depth: of a program's block of the matrix.
        pieces: of the depth (:mod:`~graphopt.backends.triton.sums`).
    """

    def __init__(self, graph: Graph, columns: int, depth: int, pieces: int = 1) -> None:
        self.graph, self.form, self.columns, self.depth = graph, form_of(graph), columns, depth
        self.pieces = Pieces(self.form.nodes, pieces)
        self.code = Code(graph, self.pieces.scratch)
        self.e = Expressions(self.code)

    def emit(self, warps: int) -> tuple[Code, Launch]:
        code, form = self.code, self.form
        grid, lead = [ceildiv(form.columns, self.columns)], list[Sum]()
        if form.batch:
            lead = self.e.places.unflatten(variable(Var(code.program(1, "batch"), dims.numel(form.batch))), form.batch)
            grid.append(dims.numel(form.batch))
        piece = self.pieces.own(code, len(grid))
        column = code.block("column", start := f"{code.program(0)} * BLOCK_N", "BLOCK_N", self.columns, form.columns, 1, 2)
        index = [*lead, *[Sum()] * len(form.rows), variable(column)]
        rights = [columns_of(code, n.operands[1], column, start, self.columns) for n in form.nodes]
        self.pieces.finish(self.e, piece, index, self._sums(index, rights, piece), [column], "[1, BLOCK_N]")
        return code, Launch((*grid, *self.pieces.grid), {"BLOCK_N": self.columns, "BLOCK_K": self.depth}, warps, 1)

    def _sums(self, index: Index, rights: Sequence[tuple[Value, Sum]], piece: Var) -> list[str]:
        """Names of the products' sums, a row each; ``rights`` are the right factors and their columns."""
        code, form, total = self.code, self.form, total_of(self.form.dtype)
        accumulators = [code.let("acc", f"tl.zeros([BLOCK_K, BLOCK_N], {total})") for _ in form.nodes]
        start = code.fresh("k")
        with code.loop(f"for {start} in {self.pieces.steps(code, piece, form.depth)}:"):
            down = code.block("ks", start, "BLOCK_K", self.depth, form.depth, 0, 2, 1)
            left = form.nodes[0].operands[0]
            a = self._factor(left, last([*index[:-1], variable(down)], left.type.rank), down)
            for acc, (right, column) in zip(accumulators, rights, strict=True):
                b = self._factor(right, last([*index[: len(form.batch)], variable(down), column], right.type.rank), down)
                code.line(f"{acc} += {a} * {b}")
        return [code.let("sum", f"tl.sum({acc}, axis=0, keep_dims=True)") for acc in accumulators]

    def _factor(self, x: Value, index: Index, k: Var) -> str:
        """A factor at an index, as it is summed; zero beyond the summed axis."""
        tile = self.e.wide(x, [Sum() if d == 1 else i for i, d in zip(index, x.shape, strict=True)])
        text = tile.text if tile.dtype.is_float else f"{tile.text}.to(tl.int32)"
        outside = k.inside and not set(k.inside) <= tile.zero
        return self.code.let("z", f"tl.where({conditions(k.inside)}, {text}, 0)", max(tile.depth, k.depth)) if outside else text

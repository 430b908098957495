"""Products of bf16 with weights packed in pairs, by dot instructions: summed in f32, and rounded once if the result is bf16.

The weight is ``[panels, depth / 2, 32, 2]`` behind the views that the packing pass writes; a task computes a panel's 32 columns
for some rows, up to 12 by two vectors at once, from one straight stream. The first factor is read in place where its rows lie in memory
as they are; else (computed, or of a depth that fills no panel) it is brought into that form first. With AMX tiles it is
:mod:`~graphopt.backends.tvm.bf16`.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from graphopt.backends.tvm.bf16rows import Rows, rows_of_bf16
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.expr import Arguments
from graphopt.backends.tvm.imported import dot, import_dots
from graphopt.backends.tvm.loops import SMALL, product
from graphopt.backends.tvm.pairform import COLUMNS, packed_pairs
from graphopt.backends.tvm.panelform import LINE, products_of
from graphopt.backends.tvm.rowstore import RowStore
from graphopt.errors import BuildError
from graphopt.ir.graph import Graph

LANES = 16  # f32 of a vector


class PairKernel:
    """Emits a region with one matmul of bf16, or several of one first factor, and a pointwise epilogue of the product's shape.

    Args:
        rows: of a tile, as accumulators fit into registers.
        group: row tiles that a task computes.
    """

    def __init__(self, graph: Graph, rows: int, group: int, parallel: bool) -> None:
        self.graph, self.mr, self.group, self.parallel = graph, rows, group, parallel
        self.nodes = products_of(graph)
        self.node = self.nodes[0]
        packed = [p for n in self.nodes if (p := packed_pairs(n.operands[1])) is not None]
        if len(packed) != len(self.nodes):
            raise BuildError("the second factor is not packed in pairs")
        self.code = code = Code(graph.symbols)
        self.args = Arguments(code, graph)
        self.weights = [self.args.inputs[p] for p in packed]
        self.panels, half = int(packed[0].shape[0]), int(packed[0].shape[1])
        self.depth, self.k = 2 * half, int(self.node.operands[0].shape[-1])
        self.m = code.bind_index(product(code, [code.size(d) for d in self.node.result.shape[:-1]]), "rows")
        self.n = int(self.node.result.shape[-1])
        import_dots(code)

    def emit(self) -> Code:
        code = self.code
        left = rows_of_bf16(self.args, self.node.operands[0], self.depth, self.mr, self.parallel)
        tiles = code.ceildiv(self.m, self.mr)
        groups = code.ceildiv(tiles, self.group)
        work = product(code, [self.m, self.n, self.k])
        steps = product(code, [groups, self.panels])
        serial = not self.parallel or (isinstance(work, int) and work < 8 * SMALL) or (isinstance(steps, int) and steps == 1)
        rows = RowStore(code, self.args, self.graph, [n.result for n in self.nodes], COLUMNS, LANES)
        with code.loop(steps, "serial" if serial else "parallel", "task") as task:
            go, j = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(task, [groups, self.panels]), [groups, self.panels])]
            sums = [code.alloc(self.mr * COLUMNS, "float32", "acc") for _ in self.nodes]
            first = code.simplify(go * self.group)
            even = isinstance(tiles, int) and tiles % self.group == 0
            count = self.group if even else code.bind_index(code.least(tiles - first, self.group), "n")
            with code.loop(count, "serial", "io") as io:
                row = code.simplify((first + io) * self.mr)
                for weight, acc in zip(self.weights, sums, strict=True):
                    self._dots(left, weight, acc, row, j, io)
                exact = isinstance(self.m, int) and self.m % self.mr == 0
                here = self.mr if exact else code.bind_index(code.least(self.m - row, self.mr), "count")
                rows.write(sums, 0, row, here, code.simplify(j * COLUMNS))
        return code

    def _dots(self, left: Rows, weight: Any, acc: Any, row: Index, j: Index, io: Index) -> None:
        """A pair of a row's elements is broadcast, and multiplied with a pair of each column. ``io``: which row tile of the task it is."""
        code, vectors = self.code, COLUMNS // LANES
        exact = isinstance(self.m, int) and self.m % self.mr == 0
        starts = []
        for i in range(self.mr):
            r = code.simplify(row + i)
            r = r if exact else code.least(r, self.m - 1)
            starts.append(code.bind_index(code.simplify(left.base + r * left.step), "x"))
        panel = code.bind_index(code.simplify(j * (self.depth * COLUMNS)), "w")
        chains = 1 if self.mr > 2 else 4 // self.mr  # few rows: sums of their own for neighbouring steps hide the latency
        unroll = 4 // chains
        assert self.depth % 8 == 0, "packing fills the depth up to 32"
        # a buffer for each vector: one for all would be memory that is asked for and given back at every tile
        sums = [code.alloc(LANES, "float32", "sums") for _ in range(chains * self.mr * vectors)]

        def place(q: int) -> list[Any]:
            return [tirx.Ramp(i64(q * LANES), i64(1), LANES)]

        nothing = tirx.Broadcast(tirx.const(0, "float32"), LANES)
        for own in sums:
            code.emit(tirx.BufferStore(own, nothing, place(0)))
        steps = self.depth // (2 * chains * unroll)
        lines = -(-2 * chains * unroll // self.group)  # of the next panel, which is as long as its depth in lines
        with code.loop(steps, "serial", "k") as k:
            for q in range(lines):
                code.prefetch(weight, code.simplify(panel + self.depth * COLUMNS + ((io * steps + k) * lines + q) * (LINE // 2)))
            for s in range(chains * unroll):
                at = code.simplify((k * (chains * unroll) + s) * 2)
                ws = [self._pairs(weight, panel + at * COLUMNS + u * 2 * LANES) for u in range(vectors)]
                for i, start in enumerate(starts):
                    pair = tirx.reinterpret("uint32", left.buffer[tirx.Ramp(i64(code.simplify(start + at)), i64(1), 2)])
                    x = tirx.reinterpret(f"uint16x{2 * LANES}", tirx.Broadcast(pair, LANES))
                    for u, w in enumerate(ws):
                        own = sums[(s % chains * self.mr + i) * vectors + u]
                        code.emit(tirx.BufferStore(own, dot(own[place(0)[0]], x, w), place(0)))
        for q in range(self.mr * vectors):
            total = sums[q][place(0)[0]]
            for s in range(1, chains):
                total = total + sums[s * self.mr * vectors + q][place(0)[0]]
            code.emit(tirx.BufferStore(acc, total, place(q)))

    def _pairs(self, weight: Any, at: Index) -> Any:
        return self.code.bind(weight[tirx.Ramp(i64(self.code.simplify(at)), i64(1), 2 * LANES)], "w", hidden=False)

"""A matrix product of few rows and columns and a long depth: pieces of the depth are summed side by side, and their sums joined.

    x @ w  =>  sum over p of x[:, piece p] @ w[piece p, :]

The tiles of a result of 16 x 16 are too few for several cores, however deep the product is. Here a task is a piece of the depth and
some row tiles of a panel; it leaves its sums in scratch memory, and once all have, they are added and the region's pointwise end is
computed. A piece is summed a block at a time, by all row tiles of the task, while the block of the panel is near.

Reference: NVIDIA, "CUTLASS: efficient GEMM in CUDA", parallelized reductions (split-K).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.code import Code, Index
from graphopt.backends.tvm.loops import SMALL, product, vector_loop
from graphopt.backends.tvm.tile import Product, TileKernel
from graphopt.ir.graph import Graph


class SplitDepthKernel(TileKernel):
    """Emits a region as :class:`TileKernel` does; the depth is a number.

    Args:
        pieces: of the depth, at most; each is so many blocks.
    """

    def __init__(self, graph: Graph, lanes: int, rows: int, columns: int, unroll: int, group: int, block: int, pieces: int,
                 copied: bool = False) -> None:  # fmt: skip
        super().__init__(graph, lanes, rows, columns, unroll, group, False, True, block, copied=copied)
        assert isinstance(self.k, int)
        self.chunk = -(-self.k // (pieces * block)) * block
        self.pieces = -(-self.k // self.chunk)

    def emit(self) -> Code:
        code, zero = self.code, tirx.const(0, self.held)
        tiles = code.ceildiv(self.m, self.mr)
        blocks = [*self.batch, code.ceildiv(self.n, self.nr), code.ceildiv(tiles, self.group)]
        steps = product(code, blocks)
        size = self.mr * self.nr
        room = self.group * size
        partial = [code.alloc(code.simplify(steps * (self.pieces * room)), self.held, "partial") for _ in self.products]
        with code.loop(code.simplify(steps * self.pieces), "parallel", "task") as task:
            piece, *at = [code.bind_index(i, "t", n) for i, n in zip(
                code.unflatten(task, [self.pieces, *blocks]), [self.pieces, *blocks], strict=True)]  # fmt: skip
            begin = code.simplify(piece * self.chunk)
            even = isinstance(self.k, int) and self.k % self.chunk == 0
            length = self.chunk if even else code.bind_index(code.least(self.k - begin, self.chunk), "depth")
            for p, sums in zip(self.products, partial, strict=True):

                def one(kernel: Any, p: Product = p, sums: Any = sums) -> None:
                    kernel._piece(p, at, tiles, begin, length, sums, code.simplify(task * room), size)

                self._each_panel(code.simplify(at[-2] * self.nr), one)
        joined = product(code, [steps, self.pieces * room])
        with code.loop(steps, "serial" if isinstance(joined, int) and joined < 4 * SMALL else "parallel", "tile") as step:
            *lead, jo, go = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(step, blocks), blocks, strict=True)]
            first, column = code.simplify(go * self.group), code.simplify(jo * self.nr)
            totals = [code.alloc(size, self.held, "total") for _ in self.products]

            def join(kernel: Any) -> None:
                with code.loop(self._here(first, tiles), "serial", "io") as io:
                    for total, sums in zip(totals, partial, strict=True):
                        kernel._across(lambda q, total=total: code.store(total, q, zero))
                        with code.loop(self.pieces, "serial", "p") as piece:
                            base = code.simplify(((piece * steps + step) * self.group + io) * size)
                            kernel._across(lambda q, total=total, sums=sums, base=base: code.store(
                                total, q, code.load(total, q) + code.load(sums, code.simplify(base + q))))  # fmt: skip
                    kernel._store(lead, code.simplify((first + io) * self.mr), column, totals)

            self._each_panel(column, join)
        return code

    def _piece(self, p: Product, at: Sequence[Index], tiles: Index, begin: Index, length: Index, sums: Any, base: Index,
               size: int) -> None:  # fmt: skip
        """Sum a piece of the depth of some row tiles of a panel, into ``sums`` from ``base`` on, a tile every ``size`` elements."""
        code, (*lead, jo, go) = self.code, at
        column, first = code.simplify(jo * self.nr), code.simplify(go * self.group)
        here = self._here(first, tiles)
        with code.loop(here, "serial", "io") as io:
            start = code.simplify(base + io * size)
            self._across(lambda q: code.store(sums, code.simplify(start + q), tirx.const(0, self.held)))
        with code.loop(code.ceildiv(length, self.block), "serial", "block") as block:
            inner = code.simplify(block * self.block)
            count = self.block if isinstance(length, int) else code.bind_index(code.least(length - inner, self.block))
            near = code.simplify(begin + inner)
            panel = self._copied(p, lead, column, near, count)
            with code.loop(here, "serial", "io") as io:
                start = code.simplify(base + io * size)
                acc, span = self._tile_sum(p, lead, self._rows(code.simplify((first + io) * self.mr)), column, panel, None, near)
                self._everywhere(acc, lambda s, q, _: code.store(s, q, tirx.const(0, self.held)))
                span(near, count)

                def add(acc: Any, q: Index, place: Index, start: Index = start) -> None:
                    to = code.simplify(start + place)
                    code.store(sums, to, code.load(sums, to) + code.load(acc, q))

                self._everywhere(acc, add)

    def _across(self, body: Any) -> None:
        """``body(place in a tile)`` for all elements of a tile, a vector at a time."""
        vector_loop(self.code, 0, self.mr * self.width, self.lanes, body, overlap=False)

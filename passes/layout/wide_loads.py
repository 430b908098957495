"""How long a GPU takes for a product, by how the rows of its factors lie in memory. For choices between layouts; nothing was measured.

    access(row) = gcd(bytes of the row, 16)             what one lane reads at once, wherever a row begins
    loads       = (M K ceil(N / 128) + K N ceil(M / 128)) bytes / (min(128, 16 access) a cycle and processor)
    time        = max(arithmetic, bytes / memory, loads)        accesses of 4 bytes and more
                  max(bytes / memory, loads) + arithmetic       shorter ones

Each tile of 128 rows and columns reads its factors once. A processor starts a load of 32 lanes every other cycle, and moves 128 bytes a
cycle at most. What is copied asynchronously to shared memory is at least 4 bytes: less goes through registers, and the matrix instructions
wait for it. Rates are those of :mod:`graphopt.accelerators`. Symbolic sizes are looked at where all are least and where all are largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, gcd

from graphopt.accelerators import accelerator_of
from graphopt.ir import dims
from graphopt.ir.dims import Range
from graphopt.ir.graph import Node, Value
from graphopt.passes.fusion.cost import CLOCK, CostModel
from graphopt.target import Target

WORD = 16  # bytes that one lane reads at once, at most
ASYNCHRONOUS = 4  # bytes of an asynchronous copy, at least
TILE = 128
LAUNCH = 3e-6  # seconds of one more kernel: about

Cycles = tuple[float, float]


class WideLoads:
    """Times of products and copies on a GPU with matrix instructions, where sizes are least and largest; in cycles of ``CLOCK``."""

    def __init__(self, t: Target, symbols: Mapping[str, Range]) -> None:
        gpu = accelerator_of(t.arch, t.matrix_unit)
        self.costs = CostModel(t, symbols)
        self.memory, self.cycles, self.products = gpu.memory * 1e9, gpu.clock * 1e9 * t.cores, gpu.products

    def product(self, node: Node, columns: int, depth: int, left: int, right: int) -> Cycles:
        """A product of so many columns and elements of depth, by matrix instructions.

        Args:
            left, right: elements of a row of either factor in memory.
        """
        size = node.operands[0].dtype.itemsize
        rate = 2 * self.products * (2 / size) * self.cycles  # bytes of factors go in at one rate
        rows = self.costs.amount(dims.numel(node.result.shape[:-1]))
        low, high = (CLOCK * self._product(m, columns, depth, size, left, right, rate) for m in rows)
        return low, high

    def _product(self, m: float, n: int, k: int, size: int, left: int, right: int, rate: float) -> float:
        access = [gcd(row * size, WORD) for row in (left, right)]
        read = (m * k * ceil(n / TILE) * size, n * k * ceil(m / TILE) * size)
        loads = sum(b / min(128, 16 * a) for b, a in zip(read, access, strict=True)) / self.cycles
        arithmetic, traffic = 2 * m * n * k / rate, (m * k + k * n + m * n) * size / self.memory
        return max(arithmetic, traffic, loads) if min(access) >= ASYNCHRONOUS else max(traffic, loads) + arithmetic

    def copy(self, x: Value) -> Cycles:
        """A kernel of its own that reads and writes a value."""
        low, high = (CLOCK * (2 * n / self.memory + LAUNCH) for n in self.costs.amount(x.type.nbytes()))
        return low, high

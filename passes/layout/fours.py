"""Weights of products of 8-bit integers in fours: ``pack(w)[j, k, i, p] = w[4 * k + p, j * COLUMNS + i]``, zeros behind rows and columns.

Dot instructions (VNNI, Arm's SDOT) and tiles (AMX) multiply four neighbouring elements of the summed axis and add the products to one
32-bit sum. A vector register, or a row of a tile, then holds four of each of its columns.

Reference: Intel 64 and IA-32 Architectures Optimization Reference Manual, "Intel AMX instructions and data layout".
"""

from __future__ import annotations

from graphopt.ir import Builder
from graphopt.ir.graph import Value
from graphopt.passes.layout import interleaved

COLUMNS = 32  # of a panel: two tiles, or two vector registers
DEPTH = 64  # the summed axis is padded to a multiple: what a tile holds of it
LEAST = 16  # columns and rows of the smallest weight that is packed


def pack(b: Builder, w: Value, transposed: bool) -> Value:
    """``[K, N]`` (``[N, K]`` if transposed) to ``[ceil(N / 32), ceil(K / 64) * 16, 32, 4]``."""
    return interleaved.pack(b, w, transposed, 4, DEPTH, COLUMNS)


unpack = interleaved.unpack

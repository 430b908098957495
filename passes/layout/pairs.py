"""Weights of bf16 products in pairs: ``pack(w)[j, k, i, p] = w[2 * k + p, j * COLUMNS + i]``, zeros behind rows and columns.

Dot instructions (AVX512-BF16) and tiles (AMX) multiply two neighbouring elements of the summed axis and add both products to
one f32 sum. A vector register, or a row of a tile, then holds a pair of each of 16 columns.

Reference: Intel 64 and IA-32 Architectures Optimization Reference Manual, "Intel AMX instructions and data layout".
"""

from __future__ import annotations

from graphopt.ir import Builder
from graphopt.ir.graph import Value
from graphopt.passes.layout import interleaved

COLUMNS = 32  # of a panel: two tiles, or two vector registers
DEPTH = 32  # the summed axis is padded to a multiple: what a tile holds of it


def pack(b: Builder, w: Value, transposed: bool) -> Value:
    """``[K, N]`` (``[N, K]`` if transposed) to ``[ceil(N / 32), ceil(K / 32) * 16, 32, 2]``."""
    return interleaved.pack(b, w, transposed, 2, DEPTH, COLUMNS)


unpack = interleaved.unpack

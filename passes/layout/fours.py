"""Weights of products of 8-bit integers in fours: ``pack(w)[j, k, i, p] = w[4 * k + p, j * COLUMNS + i]``, zeros behind rows and columns.

Dot instructions (VNNI, Arm's SDOT) and tiles (AMX) multiply four neighbouring elements of the summed axis and add the products to one
32-bit sum. A vector register, or a row of a tile, then holds four of each of its columns.

Reference: Intel 64 and IA-32 Architectures Optimization Reference Manual, "Intel AMX instructions and data layout".
"""

from __future__ import annotations

from graphopt.ir import Builder
from graphopt.ir.graph import Value

COLUMNS = 32  # of a panel: two tiles, or two vector registers
DEPTH = 64  # the summed axis is padded to a multiple: what a tile holds of it
LEAST = 16  # columns and rows of the smallest weight that is packed


def pack(b: Builder, w: Value, transposed: bool) -> Value:
    """``[K, N]`` (``[N, K]`` if transposed) to ``[ceil(N / 32), ceil(K / 64) * 16, 32, 4]``."""
    if transposed:
        w = b.transpose(w, perm=(1, 0))
    k, n = (int(d) for d in w.shape)
    depth, panels = -(-k // DEPTH) * DEPTH, -(-n // COLUMNS)
    if (k, n) != (depth, panels * COLUMNS):
        w = b.pad(w, low=(0, 0), high=(depth - k, panels * COLUMNS - n), value=0)
    return b.transpose(b.reshape(w, shape=(depth // 4, 4, panels, COLUMNS)), perm=(2, 0, 3, 1))


def unpack(b: Builder, wp: Value, k: int, n: int) -> Value:
    """The inverse of :func:`pack`: ``[panels, depth / 4, 32, 4]`` to ``[K, N]``."""
    panels, quarter, columns, _ = (int(d) for d in wp.shape)
    wide = b.reshape(b.transpose(wp, perm=(1, 3, 0, 2)), shape=(4 * quarter, panels * columns))
    rows = b.create("slice", [wide], {"axis": 0, "stop": k})
    return b.create("slice", [rows], {"axis": 1, "stop": n})  # type: ignore[no-any-return]

"""Weights of f32 as sums of two f16: ``w = (h + l) * unit``, ``unit`` a power of two for each column.

``h`` is ``w / unit`` rounded to f16, which has 11 bits, ``l`` the rest, rounded to f16: 22 bits of the 24. ``unit`` brings the largest
element of a column to between 2**14 and 2**15, so that ``l`` of elements 2**15 times as small still has its bits. Both take as
much memory as the f32 they stand for. A tile of AMX is 16 rows of 16 pairs; a pair is two elements of the summed axis, 16 apart::

    pack(w)[j, s, p, c, r, i, e] = (h, l)[p][32 * s + 16 * e + r, 32 * j + 16 * c + i]

so that what a kernel reads of a panel of 32 columns, for 32 of the summed axis after the other, is one straight stream of tiles.

Reference: Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", IEEE
ARITH 2019 (three bf16); two f16 with scales as in Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while
surpassing the FP32 theoretical peak performance", IJHPCA 36(4), 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir import Builder, types
from graphopt.ir.graph import Value

COLUMNS, DEPTH = 32, 32  # of a panel: two tiles; what a row of a tile holds of the summed axis
TILE = 16  # rows and columns of a tile
TOP = 14  # the exponent that the largest of a column has in units
LEAST = 2.0**-100  # of what a unit is made of: 0 has one, too


def pack(b: Builder, w: Value, transposed: bool) -> tuple[Value, Value]:
    """Halves ``f16[N / 32, K / 32, 2, 2, 16, 16, 2]`` and units ``f32[N]`` of ``[K, N]`` (``[N, K]`` if transposed).

    N is padded to a multiple of 32 by zeros; K must be a multiple of it.
    """
    if transposed:
        w = b.transpose(w, perm=(1, 0))
    k, n = (int(d) for d in w.shape)
    panels = -(-n // COLUMNS)
    if panels * COLUMNS != n:
        w = b.pad(w, low=(0, 0), high=(0, panels * COLUMNS - n), value=0.0)
    largest = b.max(b.where(b.isinf(w), 0.0, b.abs(w)), axes=(0,), keepdims=True)
    unit = b.exp2(b.sub(b.floor(b.log2(b.maximum(largest, LEAST))), float(TOP)))
    y = b.div(w, unit)
    high = b.cast(y, types.f16)
    rest = b.where(b.isinf(y), 0.0, b.sub(y, b.cast(high, types.f32)))
    halves = b.concat(high, b.cast(rest, types.f16), axis=0)
    tiles = b.reshape(halves, shape=(2, k // DEPTH, 2, TILE, panels, 2, TILE))
    return b.transpose(tiles, perm=(4, 1, 0, 5, 3, 6, 2)), b.reshape(unit, shape=(panels * COLUMNS,))


def unpack(b: Builder, packed: Sequence[Value], n: int) -> Value:
    """The weight ``f32[K, N]`` from what :func:`pack` gives."""
    halves, unit = packed
    panels, steps = (int(d) for d in halves.shape[:2])
    k, wide = steps * DEPTH, panels * COLUMNS
    both = b.reshape(b.transpose(halves, perm=(2, 1, 6, 4, 0, 3, 5)), shape=(2 * k, wide))
    high, low = (b.cast(b.create("slice", [both], {"axis": 0, "start": p * k, "stop": (p + 1) * k}), types.f32) for p in range(2))
    w = b.mul(b.add(high, low), unit)
    return b.create("slice", [w], {"axis": 1, "stop": n})  # type: ignore[no-any-return]

"""Weights of f32 as sums of two f16: ``w = (h + l) * share * unit``, powers of two, ``unit`` for each column, ``share`` for each row.

``h`` is ``w / unit / share`` rounded to f16, which has 11 bits, ``l`` the rest, rounded to f16: 22 bits of the 24. ``unit`` brings the
largest element of a column to between 2**14 and 2**15, then ``share`` those of the rows: a row of the weight and the feature that it is
multiplied by are large and small by what they add to the sums, whichever of both is large. So ``l`` of elements 2**15 times as
small still has its bits. Products of one first factor have the same shares. A tile of AMX is 16 rows of 16 pairs; a pair is two
elements of the summed axis, 16 apart::

    pack(w)[j, s, p, c, r, i, e] = (h, l)[p][32 * s + 16 * e + r, 32 * j + 16 * c + i]

so that what a kernel reads of a panel of 32 columns, for 32 of the summed axis after the other, is one straight stream of tiles, as many
bytes as the f32 they stand for.

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


def pack(b: Builder, weights: Sequence[tuple[Value, bool]]) -> tuple[Value, list[tuple[Value, Value]]]:
    """Shares ``f32[K]``; halves ``f16[N / 32, K / 32, 2, 2, 16, 16, 2]`` and units ``f32[N]`` of each weight.

    Args:
        weights: ``[K, N]``, or ``[N, K]`` and True. N is padded to a multiple of 32 by zeros; K must be a multiple of it.
    """
    scaled = [_in_units(b, w, transposed) for w, transposed in weights]
    largest = [_largest(b, y, 1) for y, _ in scaled]
    most = largest[0] if len(largest) == 1 else b.maximum(*largest)
    nothing = b.eq(most, 0.0)
    share = b.where(nothing, 0.0, _power(b, most))
    divisor = b.where(nothing, 1.0, share)
    packed = [(_tiles(b, b.div(y, divisor)), b.reshape(unit, shape=(unit.shape[1],))) for y, unit in scaled]
    return b.reshape(share, shape=(share.shape[0],)), packed


def _in_units(b: Builder, w: Value, transposed: bool) -> tuple[Value, Value]:
    """The weight ``[K, N]`` in units of its columns, padded, and the units ``[1, N]``."""
    if transposed:
        w = b.transpose(w, perm=(1, 0))
    n = int(w.shape[1])
    whole = -(-n // COLUMNS) * COLUMNS
    if whole != n:
        w = b.pad(w, low=(0, 0), high=(0, whole - n), value=0.0)
    unit = _power(b, _largest(b, w, 0))
    return b.div(w, unit), unit


def _largest(b: Builder, x: Value, axis: int) -> Value:
    """The largest finite magnitude along an axis."""
    magnitude = b.abs(x)
    return b.max(b.where(b.lt(magnitude, float("inf")), magnitude, 0.0), axes=(axis,), keepdims=True)  # type: ignore[no-any-return]


def _power(b: Builder, largest: Value) -> Value:
    """The power of two in which a number is between 2**14 and 2**15."""
    return b.exp2(b.sub(b.floor(b.log2(b.maximum(largest, LEAST))), float(TOP)))  # type: ignore[no-any-return]


def _tiles(b: Builder, y: Value) -> Value:
    k, n = (int(d) for d in y.shape)
    high = b.cast(y, types.f16)
    rest = b.where(b.isinf(y), 0.0, b.sub(y, b.cast(high, types.f32)))
    both = b.concat(high, b.cast(rest, types.f16), axis=0)
    tiles = b.reshape(both, shape=(2, k // DEPTH, 2, TILE, n // COLUMNS, 2, TILE))
    return b.transpose(tiles, perm=(4, 1, 0, 5, 3, 6, 2))


def unpack(b: Builder, packed: Sequence[Value], n: int) -> Value:
    """The weight ``f32[K, N]`` from its halves, units and shares."""
    halves, unit, share = packed
    panels, steps = (int(d) for d in halves.shape[:2])
    k, wide = steps * DEPTH, panels * COLUMNS
    both = b.reshape(b.transpose(halves, perm=(2, 1, 6, 4, 0, 3, 5)), shape=(2 * k, wide))
    high, low = (b.cast(b.create("slice", [both], {"axis": 0, "start": p * k, "stop": (p + 1) * k}), types.f32) for p in range(2))
    w = b.mul(b.mul(b.add(high, low), b.reshape(share, shape=(k, 1))), unit)
    return b.create("slice", [w], {"axis": 1, "stop": n})  # type: ignore[no-any-return]

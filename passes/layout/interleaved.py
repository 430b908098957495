"""Weights whose neighbouring rows lie side by side: ``pack(w)[j, k, i, p] = w[count * k + p, j * columns + i]``, zeros behind all."""

from __future__ import annotations

from graphopt.ir import Builder
from graphopt.ir.graph import Value


def pack(b: Builder, w: Value, transposed: bool, count: int, depth: int, columns: int) -> Value:
    """``[K, N]`` (``[N, K]`` if transposed) to ``[ceil(N / columns), ceil(K / depth) * depth / count, columns, count]``."""
    if transposed:
        w = b.transpose(w, perm=(1, 0))
    k, n = (int(d) for d in w.shape)
    whole, panels = -(-k // depth) * depth, -(-n // columns)
    if (k, n) != (whole, panels * columns):
        w = b.pad(w, low=(0, 0), high=(whole - k, panels * columns - n), value=0.0 if w.dtype.is_float else 0)
    return b.transpose(b.reshape(w, shape=(whole // count, count, panels, columns)), perm=(2, 0, 3, 1))


def unpack(b: Builder, wp: Value, k: int, n: int) -> Value:
    """The inverse of :func:`pack`: ``[panels, depth / count, columns, count]`` to ``[K, N]``."""
    panels, groups, columns, count = (int(d) for d in wp.shape)
    wide = b.reshape(b.transpose(wp, perm=(1, 3, 0, 2)), shape=(count * groups, panels * columns))
    rows = b.create("slice", [wide], {"axis": 0, "stop": k})
    return b.create("slice", [rows], {"axis": 1, "stop": n})  # type: ignore[no-any-return]

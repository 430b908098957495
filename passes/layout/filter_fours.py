"""Weights of convolutions of 8-bit integers in fours: a matrix in the form of :mod:`~graphopt.passes.layout.fours`, a run after the other.

A run is what lies side by side in an image and is multiplied by one tap after another: the channels of a tap, or, where those do not
fill what a tile holds, of all taps of a line. Each run is filled with zeros to a multiple of 64, so that a step of a kernel never passes
from one to the next::

    pack(w[*K, C, O]) = fours(pad(reshape(w, [lines, run, O]))),   lines * run = K * C

Reference: Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures", SC 2018.
"""

from __future__ import annotations

from math import prod

from graphopt.ir import Builder
from graphopt.ir.graph import Node, Value
from graphopt.passes.layout import fours


def runs_of(conv: Node) -> tuple[int, int]:
    """(lines, elements of a run) of a convolution with its channels last."""
    *kernel, channels, _ = (int(d) for d in conv.operands[1].shape)
    if channels % fours.DEPTH == 0 or conv.attrs["dilation"][-1] != 1:
        return prod(kernel), channels
    return prod(kernel[:-1]), kernel[-1] * channels


def _whole(run: int) -> int:
    return -(-run // fours.DEPTH) * fours.DEPTH


def pack(b: Builder, w: Value, lines: int, run: int) -> Value:
    """``[*K, C, O]`` to ``[ceil(O / 32), lines * ceil(run / 64) * 16, 32, 4]``."""
    filters, whole = int(w.shape[-1]), _whole(run)
    w = b.reshape(w, shape=(lines, run, filters))
    if whole != run:
        w = b.pad(w, low=(0, 0, 0), high=(0, whole - run, 0), value=0)
    return fours.pack(b, b.reshape(w, shape=(lines * whole, filters)), False)


def unpack(b: Builder, wp: Value, lines: int, run: int, shape: tuple[int, ...]) -> Value:
    """The inverse of :func:`pack`; always the same nodes."""
    whole = _whole(run)
    w = fours.unpack(b, wp, lines * whole, shape[-1])
    w = b.create("reshape", [w], {"shape": (lines, whole, shape[-1])})
    w = b.create("slice", [w], {"axis": 1, "stop": run})
    return b.create("reshape", [w], {"shape": shape})  # type: ignore[no-any-return]

"""A transposed convolution as ordinary ones: output ``u * stride + r`` of each phase ``r`` is a convolution's output ``u``.

Along one axis, output o is the sum of ``x[i] w[k]`` over ``i * stride + k * dilation = o + padding``. For outputs of one phase
these are every t-th tap, ``t = stride / gcd(stride, dilation)``, in reverse order, over a window of x that moves by one element an
output. No product with the zeros between dilated elements is ever made.

Reference: Shi et al., "Is the deconvolution layer the same as a convolutional layer?", arXiv:1609.07009.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import gcd

from graphopt.ir import dims
from graphopt.ir.graph import Node, Value
from graphopt.rewrite import Rewriter


@dataclass(frozen=True)
class Phase:
    """Every ``stride``-th output of one axis, as a convolution of stride 1.

    Attributes:
        first, step, taps: the taps of the kernel that it takes, in reverse order; there may be none.
        dilation: between two taps.
        low, high: elements put around x; negative ones are cut away.
    """

    first: int
    step: int
    taps: int
    dilation: int
    low: int
    high: int


def phases_of(taps: int, stride: int, padding: int, output_padding: int, dilation: int) -> tuple[list[Phase], int]:
    """The phases of an axis, and how many outputs more than inputs each of them has."""
    common = gcd(stride, dilation)
    step, apart = stride // common, dilation // common
    more = -(-((taps - 1) * dilation + 1 + output_padding - 2 * padding - stride) // stride)
    found = []
    for r in range(stride):
        whole, rest = divmod(r + padding, stride)
        mine = [k for k in range(taps) if (k * dilation - rest) % stride == 0]
        if not mine:
            found.append(Phase(0, step, 0, 1, 0, 0))
            continue
        reach = (len(mine) - 1) * apart
        low = (mine[0] * dilation - rest) // stride + reach - whole
        found.append(Phase(mine[0], step, len(mine), apart, low, more + reach - low))
    return found, more


def build(rw: Rewriter, node: Node, x: Value) -> Value:
    """The result of a conv_transpose, channels last, from ``x`` [N, *S, C]."""
    attrs, w, n = node.attrs, node.operands[1], node.operands[0].type.rank - 2
    weight = _channels_last(rw, w, attrs["groups"])
    names = ("stride", "padding", "output_padding", "dilation")
    axes = [phases_of(*axis) for axis in zip(w.shape[2:], *(attrs[k] for k in names), strict=True)]  # type: ignore[arg-type]
    sizes = tuple(dims.add(d, more) for d, (_, more) in zip(x.shape[1:-1], axes, strict=True))
    strides: tuple[int, ...] = attrs["stride"]
    filters = node.results[0].shape[1]
    combined = list(product(*(phases for phases, _ in axes)))
    alike = len({tuple((p.taps, p.dilation, p.low, p.high) for p in phase) for phase in combined}) == 1
    if alike and attrs["groups"] == 1 and combined[0][0].taps:
        all_taps = [_taps(rw, weight, phase) for phase in combined]
        y = _convolve(rw, x, rw.concat(*all_taps, axis=n + 1) if len(all_taps) > 1 else all_taps[0], combined[0], node)
        y = rw.reshape(y, shape=(x.shape[0], *sizes, *strides, filters))
        y = rw.transpose(y, perm=(0, *(a for i in range(n) for a in (1 + i, 1 + n + i)), 1 + 2 * n))
    else:
        parts = []
        for phase in combined:
            if all(p.taps for p in phase):
                part = _convolve(rw, x, _taps(rw, weight, phase), phase, node)
            else:
                part = rw.broadcast_to(rw.constant(0.0, node.results[0].dtype), shape=(x.shape[0], *sizes, filters))
            parts.append(rw.reshape(part, shape=(x.shape[0], *(d for m in sizes for d in (m, 1)), filters)))
        for i in reversed(range(n)):  # the last axis varies fastest
            s = strides[i]
            parts = [rw.concat(*parts[k : k + s], axis=2 + 2 * i) if s > 1 else parts[k] for k in range(0, len(parts), s)]
        (y,) = parts
    y = rw.reshape(y, shape=(x.shape[0], *(dims.mul(m, s) for m, s in zip(sizes, strides, strict=True)), filters))
    for i, wanted in enumerate(node.results[0].shape[2:]):
        if not dims.same(y.shape[1 + i], wanted):
            y = rw.slice(y, axis=1 + i, start=0, stop=wanted)
    return y


def _channels_last(rw: Rewriter, w: Value, groups: int) -> Value:
    """[C, O / groups, *K] -> [*K, C / groups, O]."""
    channels, filters, *taps = w.shape
    n = len(taps)
    split = rw.reshape(w, shape=(groups, channels // groups, filters, *taps))  # type: ignore[operator]
    moved = rw.transpose(split, perm=(*range(3, n + 3), 1, 0, 2))
    return rw.reshape(moved, shape=(*taps, channels // groups, groups * filters))  # type: ignore[no-any-return, operator]


def _taps(rw: Rewriter, weight: Value, phase: tuple[Phase, ...]) -> Value:
    """The part of the weight that a phase takes, in the order of an ordinary convolution."""
    for axis, p in enumerate(phase):
        if p.taps != weight.shape[axis]:
            weight = rw.slice(weight, axis=axis, start=p.first, stop=p.first + (p.taps - 1) * p.step + 1, step=p.step)
    axes = tuple(axis for axis, p in enumerate(phase) if p.taps > 1)
    return rw.flip(weight, axes=axes) if axes else weight


def _convolve(rw: Rewriter, x: Value, w: Value, phase: tuple[Phase, ...], node: Node) -> Value:
    """One phase of a transposed convolution, ``node``."""
    n = len(phase)
    for axis, p in enumerate(phase, 1):
        if p.low < 0 or p.high < 0:
            x = rw.slice(x, axis=axis, start=max(0, -p.low), stop=dims.add(x.shape[axis], min(0, p.high)))
    even = all(p.low == p.high for p in phase)
    padding = tuple(max(0, p.low) for p in phase) if even else (0,) * n
    if not even and any(p.low > 0 or p.high > 0 for p in phase):
        low, high = ((0, *(max(0, side) for side in sides), 0) for sides in ([p.low for p in phase], [p.high for p in phase]))
        x = rw.pad(x, low=low, high=high, value=0.0)
    attrs = {"stride": (1,) * n, "padding": padding, "dilation": tuple(p.dilation for p in phase), "groups": node.attrs["groups"]}
    return rw.create("conv", [x, w], {**attrs, "channels_last": True, "acc": node.attrs["acc"]})  # type: ignore[no-any-return]

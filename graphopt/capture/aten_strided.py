"""What reads memory by steps: ``as_strided`` and windows of an axis, as slices, reshapes and concats of what was made there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.capture.aten import Context, lowers
from graphopt.capture.aten_pad import zero
from graphopt.capture.aten_shape import cut
from graphopt.capture.captured import Uncapturable
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Value

# operators whose sizes, steps and offset are of the storage, and where these stand among the arguments
OF_STORAGE = {"aten.as_strided.default": 1, "aten.as_strided_scatter.default": 2}
MOST_PIECES = 64  # that are read one after the other, where there is nothing else but a call of the library
MOST_WINDOWS = 16  # and where each element can be taken by its index instead; both are measured


@lowers("as_strided")
def as_strided(c: Context, x: Value, size: Sequence[Dim], stride: Sequence[Dim], storage_offset: Dim | None = None) -> Value:
    """Only where it is a reshape: the same elements of more than one step, in the same order."""
    strides, offset = c.layout(x)
    c.require(storage_offset is None or storage_offset == offset)
    old = [(n, s) for n, s in zip(x.shape, strides, strict=True) if n != 1]
    new = [(n, s) for n, s in zip(size, stride, strict=True) if n != 1]
    c.require(old == new)
    return c.b.reshape(x, c.shape)


def root_of(source: torch.fx.Node, known: Any) -> torch.fx.Node:
    """The first node of ``known`` that was made in the storage of ``source``."""
    storage = source.meta["val"].untyped_storage()._cdata
    for n in source.graph.nodes:
        val = n.meta.get("val")
        if isinstance(val, torch.Tensor) and n in known and val.untyped_storage()._cdata == storage:
            return n
    return source


def relative(root: torch.Tensor, source: torch.Tensor, size: Sequence[Any], stride: Sequence[Any], offset: Any) -> int:
    """The offset of an ``as_strided`` of ``source``, counted from the first element of ``root``, which has the same storage.

    Raises:
        Uncapturable: unknown sizes, a root without memory of its own, or elements that lie outside of it.
    """
    offset = source.storage_offset() if offset is None else offset
    static = [*size, *stride, offset, *root.shape, *root.stride(), root.storage_offset()]
    if not all(isinstance(v, int) for v in static) or root.dtype != source.dtype:
        raise Uncapturable("as_strided of symbolic sizes")
    if any(s == 0 and n > 1 for n, s in zip(root.shape, root.stride(), strict=True)):
        raise Uncapturable("as_strided of an expanded tensor")
    start = int(offset - root.storage_offset())
    reach = start + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    extent = sum((n - 1) * s for n, s in zip(root.shape, root.stride(), strict=True))
    if start < 0 or (reach > extent and 0 not in size):
        raise Uncapturable("as_strided reads outside of its operand")
    return start


def of_memory(c: Context, root: Value, size: Sequence[int], stride: Sequence[int], offset: int) -> Value:
    """``as_strided`` of a tensor that fills its memory: axis after axis, the longest step first, windows of what is left.

    Args:
        offset: of the first element that is read, from the first of ``root``.
    """
    c.require(0 not in size)
    steps, _ = c.layout(root)
    order = sorted((k for k in range(root.type.rank) if root.shape[k] != 1), key=lambda k: -int(steps[k]))
    length = 1
    for k in reversed(order):  # the last axis lies side by side, and each other one steps over the ones behind it
        c.require(steps[k] == length)
        length *= int(root.shape[k])
    order += [k for k in range(root.type.rank) if root.shape[k] == 1]
    flat = c.b.reshape(c.b.transpose(root, tuple(order)), (length,))
    axes = sorted((k for k in range(len(size)) if size[k] != 1 and stride[k]), key=lambda k: -stride[k])
    span = 1 + sum((size[k] - 1) * stride[k] for k in axes)
    part = cut(c, flat, 0, offset, length)
    for at, k in enumerate(axes):
        span -= (size[k] - 1) * stride[k]
        part = windows(c, part, at, size[k], span, stride[k])
    part = cut(c, part, len(axes), 0, 1)
    back = c.b.transpose(c.b.reshape(part, tuple(size[k] for k in axes)), tuple(axes.index(k) for k in sorted(axes)))
    expanded = c.b.reshape(back, tuple(n if k in axes else 1 for k, n in enumerate(size)))
    return c.b.broadcast_to(expanded, shape=c.shape)  # type: ignore[no-any-return]


def windows(c: Context, x: Value, axis: int, count: int, size: int, step: int) -> Value:
    """[..., N, ...] -> [..., count, at least size, ...]: windows of an axis, each ``step`` further on.

    Windows side by side are a reshape. Of windows that overlap, the k-th stretches of ``step`` elements are a slice of all
    stretches; or each window is a slice, if that makes fewer. What stands behind ``size`` elements is of no meaning.
    """
    before, after, n = x.shape[:axis], x.shape[axis + 1 :], int(x.shape[axis])  # type: ignore[arg-type]
    stretches = -(-size // step)
    c.require(min(stretches, count) <= MOST_PIECES, f"more than {MOST_PIECES} windows that overlap")

    if 1 < count < stretches:
        parts = [c.b.reshape(cut(c, x, axis, i * step, i * step + size), (*before, 1, size, *after)) for i in range(count)]
        return c.b.concat(*parts, axis=axis)  # type: ignore[no-any-return]
    whole = count + stretches - 1
    if n < whole * step:
        zeros = [0] * x.type.rank
        zeros[axis] = whole * step - n
        x = c.b.pad(x, low=(0,) * x.type.rank, high=tuple(zeros), value=zero(x))
    x = c.b.reshape(cut(c, x, axis, 0, whole * step), (*before, whole, step, *after))
    if stretches == 1:
        return x
    parts = [c.b.reshape(cut(c, x, axis, j, j + count), (*before, count, 1, step, *after)) for j in range(stretches)]
    return c.b.reshape(c.b.concat(*parts, axis=axis + 1), (*before, count, stretches * step, *after))  # type: ignore[no-any-return]


@lowers("unfold", "unfold_copy")
def unfold(c: Context, x: Value, dimension: int, size: int, step: int) -> Value:
    """Windows of an axis, behind all others; taken by the sum of where one starts and a place in it, if they are too many to be cut."""
    x = x if x.type.rank else c.b.reshape(x, (1,))
    axis = dimension % x.type.rank
    length = x.shape[axis]
    count = dims.add(dims.floordiv(dims.sub(length, size), step), 1)
    c.require(isinstance(count, int) and count > 0 and size > 0)
    assert isinstance(count, int)
    if isinstance(length, int) and min(count, -(-size // step)) <= MOST_WINDOWS:
        taken = windows(c, x, axis, count, size, step)
        taken = cut(c, taken, axis + 1, 0, size)
    else:
        start = c.b.reshape(c.b.iota(size=count, step=step), (count, 1))
        taken = c.b.take(x, c.b.add(start, c.b.iota(size=size)), axis=axis)
    order = [k for k in range(x.type.rank + 1) if k != axis + 1]
    return c.b.reshape(c.b.transpose(taken, (*order, axis + 1)), c.shape)

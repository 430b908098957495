"""Pooling, and what else images are padded, shuffled, resized and taken apart by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

from graphopt.capture.aten import Context, each, entry, lowers
from graphopt.capture.aten_pad import zero
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Value
from graphopt.ir.opset.window import spatial


def _pooled(c: Context, op: str, x: Value, n: int, result: int = 0, **attrs: Any) -> Value:
    """A pooling op; an image without a batch axis gets one for the time."""
    out = c.outs[result]
    assert out is not None
    c.require(x.type.rank in (n + 1, n + 2))
    batched = x if x.type.rank == n + 2 else c.b.reshape(x, (1, *x.shape))
    return c.b.reshape(c.b.create(op, [batched], attrs), out.shape)  # type: ignore[no-any-return]


def _max_pool(c: Context, x: Value, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
              dilation: Sequence[int] = (1,), ceil_mode: bool = False, *, n: int) -> list[Value | None]:  # fmt: skip
    window = [each(v, n) for v in (kernel, stride or kernel, padding, dilation)]
    attrs: dict[str, Any] = dict(zip(("kernel", "stride", "padding", "dilation"), window, strict=True))
    if ceil_mode:
        attrs["size"] = spatial((1,) * (n + 2 - c.out.rank) + c.shape, False)
    return [_pooled(c, op, x, n, i, **attrs) if used else None for i, (op, used) in enumerate(zip(("max_pool", "argmax_pool"), c.used))]


def _avg_pool(c: Context, x: Value, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
              ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None, *,
              n: int) -> Value:  # fmt: skip
    window = [each(v, n) for v in (kernel, stride or kernel, padding)]
    attrs: dict[str, Any] = dict(zip(("kernel", "stride", "padding"), window, strict=True))
    if ceil_mode:
        attrs["size"] = spatial((1,) * (n + 2 - c.out.rank) + c.shape, False)
    return _pooled(c, "avg_pool", x, n, count_include_pad=count_include_pad, divisor=divisor_override, **attrs)


for _n in (1, 2, 3):
    entry(f"avg_pool{_n}d", partial(_avg_pool, n=_n), f"avg_pool{_n}d")
    if _n > 1:
        entry(f"max_pool{_n}d", partial(_max_pool, n=_n), f"max_pool{_n}d_with_indices")


def _factors(x: Value, size: Sequence[Dim]) -> tuple[int, ...] | None:
    """How many elements each adaptive window has, where all have as many."""
    space = x.shape[-len(size) :]
    if not all(isinstance(n, int) and isinstance(m, int) and m > 0 and n % m == 0 for n, m in zip(space, size, strict=True)):
        return None
    return tuple(n // m for n, m in zip(space, size, strict=True))  # type: ignore[operator, misc]


def _adaptive(c: Context, op: str, x: Value, size: Sequence[Dim], result: int = 0) -> Value:
    """Windows of one length are a plain pooling; one window is a reduction."""
    n = len(size)
    factors = _factors(x, size)
    if op != "argmax_pool" and all(m == 1 for m in size):
        axes = tuple(range(x.type.rank - n, x.type.rank))
        if op == "max_pool":
            return c.b.max(x, axes=axes, keepdims=True)  # type: ignore[no-any-return]
        return c.b.mean(x, axes=axes, keepdims=True)  # type: ignore[no-any-return]
    if factors is None or not all(factors):
        return _pooled(c, f"adaptive_{op}", x, n, result, size=tuple(size))
    attrs = {"kernel": factors, "stride": factors, "padding": (0,) * n} | ({} if op == "avg_pool" else {"dilation": (1,) * n})
    return _pooled(c, op, x, n, result, **attrs)


@lowers("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d")
def adaptive_avg_pool(c: Context, x: Value, size: Sequence[Dim]) -> Value:
    c.require(x.dtype.is_float and all(m != 0 for m in size))
    return _adaptive(c, "avg_pool", x, size)


@lowers("adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(c: Context, x: Value, size: Sequence[Dim]) -> list[Value | None]:
    c.require(all(m != 0 for m in size))
    return [_adaptive(c, op, x, size, i) if used else None for i, (op, used) in enumerate(zip(("max_pool", "argmax_pool"), c.used))]


# shuffles and paddings -------------------------------------------------------------------------------------------------


@lowers("pixel_shuffle")
def pixel_shuffle(c: Context, x: Value, r: int) -> Value:
    """[..., C r r, H, W] -> [..., C, H r, W r]."""
    *batch, channels, h, w = x.shape
    split = c.b.reshape(x, (*batch, dims.floordiv(channels, r * r), r, r, h, w))
    n = len(batch)
    return c.b.reshape(c.b.transpose(split, (*range(n), n, n + 3, n + 1, n + 4, n + 2)), c.shape)


@lowers("pixel_unshuffle")
def pixel_unshuffle(c: Context, x: Value, r: int) -> Value:
    """[..., C, H r, W r] -> [..., C r r, H, W]."""
    *batch, channels, h, w = x.shape
    split = c.b.reshape(x, (*batch, channels, dims.floordiv(h, r), r, dims.floordiv(w, r), r))
    n = len(batch)
    return c.b.reshape(c.b.transpose(split, (*range(n), n, n + 2, n + 4, n + 1, n + 3)), c.shape)


def _border(c: Context, x: Value, pad: Sequence[Dim], reflect: bool) -> Value:
    """Padding with elements of the tensor itself: each axis is taken by an index that stays inside."""
    for i in range(len(pad) // 2):
        axis, (before, after) = x.type.rank - 1 - i, (pad[2 * i], pad[2 * i + 1])
        size, symbols = x.shape[axis], c.b.graph.symbols
        c.require(all(dims.prove(p, ">=", 0, symbols) for p in (before, after)))
        if before == 0 and after == 0:
            continue
        index = c.b.iota(size=dims.add(size, dims.add(before, after)), start=dims.sub(0, before))
        if reflect:
            last = c.constant(dims.sub(size, 1), index.dtype)
            index = c.b.sub(last, c.b.abs(c.b.sub(last, c.b.abs(index))))
        x = c.b.take(x, index, axis=axis, clip=True)
    return x


@lowers("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
def reflection_pad(c: Context, x: Value, pad: Sequence[Dim]) -> Value:
    return _border(c, x, pad, reflect=True)


@lowers("replication_pad1d", "replication_pad2d", "replication_pad3d")
def replication_pad(c: Context, x: Value, pad: Sequence[Dim]) -> Value:
    return _border(c, x, pad, reflect=False)


# windows side by side ---------------------------------------------------------------------------------------------------


def _tiled(size: Sequence[Dim], kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether windows lie side by side and fill the image, whose height and width are ``size``."""
    whole = all(isinstance(n, int) and n % k == 0 for n, k in zip(size, kernel, strict=True))
    return whole and tuple(stride) == tuple(kernel) and all(d == 1 for d in dilation) and not any(padding)


MOST_TAPS = 64  # of a window that are read, or added, one after the other


def _windows(c: Context, size: Sequence[Dim], kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
             stride: Sequence[int]) -> list[int]:  # fmt: skip
    """How many windows there are along the height and along the width."""
    c.require(all(isinstance(n, int) for n in size), "windows in an image of unknown size")
    return [(int(n) + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in zip(size, kernel, dilation, padding, stride, strict=True)]


@lowers("im2col")
def im2col(c: Context, x: Value, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]) -> Value:
    """``unfold``: [..., C, H, W] -> [..., C kh kw, windows]. An image that windows fill side by side only changes its order; else each
    place of the window is a slice of the image, with steps."""
    *batch, channels, h, w = x.shape
    n, (kh, kw) = len(batch), kernel
    if _tiled((h, w), kernel, dilation, padding, stride):
        split = c.b.reshape(x, (*batch, channels, dims.floordiv(h, kh), kh, dims.floordiv(w, kw), kw))
        return c.b.reshape(c.b.transpose(split, (*range(n), n, n + 2, n + 4, n + 1, n + 3)), c.shape)
    rows, columns = _windows(c, (h, w), kernel, dilation, padding, stride)
    c.require(kh * kw <= MOST_TAPS, f"windows of more than {MOST_TAPS} places that overlap")
    around = (*[0] * (n + 1), *padding)
    image = c.b.pad(x, low=around, high=around, value=zero(x)) if any(padding) else x
    taps = []
    for i, j in product(range(kh), range(kw)):
        tap = image
        for axis, at, count, step in ((n + 1, i * dilation[0], rows, stride[0]), (n + 2, j * dilation[1], columns, stride[1])):
            tap = c.b.slice(tap, axis=axis, start=at, stop=at + (count - 1) * step + 1, step=step)
        taps.append(c.b.reshape(tap, (*batch, channels, 1, rows, columns)))
    return c.b.reshape(c.b.concat(*taps, axis=n + 1) if len(taps) > 1 else taps[0], c.shape)


@lowers("col2im")
def col2im(c: Context, x: Value, size: Sequence[Dim], kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
           stride: Sequence[int]) -> Value:  # fmt: skip
    """``fold``: [..., C kh kw, windows] -> [..., C, H, W], where windows that overlap are added.

    Window (a, b) puts its place (i, j) at row ``a s + i d``: the places with one ``i d mod s`` make every s-th row, so they are
    images of their own, shifted by ``i d // s``; the sums of all these are interleaved.
    """
    *batch, deep, _ = x.shape
    n, (kh, kw), (h, w) = len(batch), kernel, size
    channels = dims.floordiv(deep, kh * kw)
    if _tiled(size, kernel, dilation, padding, stride):
        split = c.b.reshape(x, (*batch, channels, kh, kw, dims.floordiv(h, kh), dims.floordiv(w, kw)))
        return c.b.reshape(c.b.transpose(split, (*range(n), n, n + 3, n + 1, n + 4, n + 2)), c.shape)
    rows, columns = _windows(c, size, kernel, dilation, padding, stride)
    c.require(x.dtype.is_float and kh * kw <= MOST_TAPS, f"windows of more than {MOST_TAPS} places that overlap")
    taps = c.b.reshape(x, (*batch, channels, kh * kw, rows, columns))
    tall, wide = (-(-(int(m) + 2 * p) // s) for m, p, s in zip(size, padding, stride, strict=True))
    phases: dict[tuple[int, int], Value] = {}
    for i, j in product(range(kh), range(kw)):
        (down, first), (right, second) = divmod(i * dilation[0], stride[0]), divmod(j * dilation[1], stride[1])
        tap = c.b.slice(taps, axis=n + 1, start=i * kw + j, stop=i * kw + j + 1)
        tap = c.b.reshape(tap, (*batch, channels, rows, columns))
        low, high = (down, right), (tall - down - rows, wide - right - columns)
        if any((*low, *high)):
            tap = c.b.pad(tap, low=(*[0] * (n + 1), *low), high=(*[0] * (n + 1), *high), value=0.0)
        before = phases.get((first, second))
        phases[first, second] = tap if before is None else c.b.add(before, tap)
    zero = c.b.full((*batch, channels, tall, wide), 0.0, x.dtype)
    parts = [c.b.reshape(phases.get(at, zero), (*batch, channels, 1, tall, wide)) for at in product(range(stride[0]), range(stride[1]))]
    image = c.b.reshape(c.b.concat(*parts, axis=n + 1) if len(parts) > 1 else parts[0], (*batch, channels, *stride, tall, wide))
    image = c.b.transpose(image, (*range(n + 1), n + 3, n + 1, n + 4, n + 2))
    image = c.b.reshape(image, (*batch, channels, tall * stride[0], wide * stride[1]))
    for axis, p, m in ((n + 1, padding[0], h), (n + 2, padding[1], w)):
        image = c.b.slice(image, axis=axis, start=p, stop=p + int(m))
    return image  # type: ignore[no-any-return]

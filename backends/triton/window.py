"""What reads an image through a window: where a tap lies, and whether that is inside.

Depthwise convolutions and pooling are computed here, a lane an element of the result, one tap after another; where the place of the
greatest element is asked for, a lane keeps it beside the element. A convolution that sums channels is a product (:mod:`conv`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from graphopt.backends.forms.convform import conv_of
from graphopt.backends.forms.support import materialized
from graphopt.backends.triton.code import Code, Launch, Text, ceildiv, conditions
from graphopt.backends.triton.expr import Expressions, Tile
from graphopt.backends.triton.index import Sum, Var, add, scale, shift, variable
from graphopt.backends.triton.pointwise import held, number
from graphopt.backends.triton.sums import computed, total_of
from graphopt.ir import dims, types
from graphopt.ir.dims import Dim, Shape
from graphopt.ir.graph import Graph, Node
from graphopt.ir.opset.window import WINDOWS

UNROLLED = 64  # taps at most that are written one after another


@dataclass(frozen=True)
class Slide:
    """A window that slides along the spatial axes: tap k of output o reads ``o * stride + k * dilation - padding``."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    image: Shape

    @staticmethod
    def of(node: Node, kernel: tuple[int, ...], image: Shape) -> Slide:
        a = node.attrs
        return Slide(kernel, a["stride"], a["padding"], a.get("dilation", (1,) * len(kernel)), image)

    @property
    def taps(self) -> int:
        return prod(self.kernel)

    def places(self, e: Expressions, at: Sequence[Sum], tap: Sequence[Sum]) -> tuple[list[Sum], list[Text]]:
        """Index of the element that a tap reads along each spatial axis, and the conditions that it is there."""
        index: list[Sum] = []
        guards: list[Text] = []
        for o, k, stride, padding, dilation, size in zip(at, tap, self.stride, self.padding, self.dilation, self.image, strict=True):
            place = shift(add(scale(o, stride), scale(k, dilation)), -padding)
            if e.places.is_below(place, size):
                index.append(place)
                continue
            inner = e.code.derived(place, size, "s")
            guards.append(e.guard(inner, not e.places.is_nonnegative(place), size))
            index.append(variable(inner))
        return index, guards


def form_of(graph: Graph) -> Node | str:
    """The depthwise convolution or pooling of a region, or why it is none."""
    nodes = materialized(graph)
    if len(nodes) != 1:
        return "not exactly one window"
    (node,) = nodes
    if node.name == "conv":
        form = conv_of(graph, integers=node.attrs["acc"] == types.i32)
        return form if isinstance(form, str) else node if form.depthwise else "not a window over one channel"
    if node.name not in WINDOWS:
        return f"{node.name} has no template"
    if any(d == 0 for v in (*node.operands, node.result) for d in v.shape):
        return "a window without elements"
    if any(not dims.same_shape(v.shape, node.result.shape) for v in graph.outputs):
        return "an output of another shape than the window's"
    return node


def _spatial(node: Node, shape: Shape) -> Shape:
    return shape[1:-1] if node.attrs["channels_last"] else shape[2:]


class WindowKernel:
    """One region around a depthwise convolution or pooling: lanes along the last axis, and along all others together."""

    def __init__(self, graph: Graph, rows: int, columns: int) -> None:
        node = form_of(graph)
        assert isinstance(node, Node)
        self.graph, self.node, self.rows, self.columns = graph, node, rows, columns
        self.positions = "argmax" in node.name
        self.code = Code(graph)
        self.e = Expressions(self.code)

    def emit(self, warps: int) -> tuple[Code, Launch]:
        code, shape = self.code, self.node.result.shape
        tiles = ceildiv(dims.numel(shape[:-1]), self.rows), ceildiv(shape[-1], self.columns)
        pid = Var(code.program(0), dims.mul(*tiles))
        first, second = (code.place(s).text for s in self.e.places.unflatten(variable(pid), tiles))
        row = code.block("row", f"{first} * ROWS", "ROWS", self.rows, dims.numel(shape[:-1]), 0, 2)
        column = code.block("column", f"{second} * COLUMNS", "COLUMNS", self.columns, shape[-1], 1, 2)
        index = [*self.e.places.unflatten(variable(row), shape[:-1]), variable(column)]
        self.e.sources[self.node.result] = computed(self._value(index), self.node, index)
        for k in range(len(self.graph.outputs)):
            self.e.store(k, index, [row, column], "[ROWS, COLUMNS]")
        return code, Launch((dims.mul(*tiles),), {"ROWS": self.rows, "COLUMNS": self.columns}, warps, 1)

    def _value(self, index: Sequence[Sum]) -> str:
        """Name of the result's tile."""
        code, node, x = self.code, self.node, self.node.operands[0]
        last = node.attrs["channels_last"]
        self.batch, self.channel, at = index[0], index[-1] if last else index[1], _spatial(node, tuple(index))  # type: ignore[arg-type]
        image = _spatial(node, x.shape)
        self.where = code.let("where", f"tl.full([ROWS, COLUMNS], -1, {'tl.int64' if code.wide else 'tl.int32'})") if self.positions else ""
        if node.name.startswith("adaptive"):
            return self._adaptive(at, image)  # type: ignore[arg-type]
        w = node.operands[1] if node.name == "conv" else None
        slide = Slide.of(node, tuple(int(d) for d in w.shape[:-2]) if w is not None else node.attrs["kernel"], image)
        acc = self._start()
        tap = Var(code.fresh("tap"), slide.taps, depth=code.depth + 1)
        with code.loop(f"for {tap.name} in {_taps(slide.taps, code)}:"):
            taps = self.e.places.unflatten(variable(tap), slide.kernel)
            places, guards = slide.places(self.e, at, taps)  # type: ignore[arg-type]
            tile = self._read(places, guards)
            if w is not None:
                weight = self.e.wide(w, [*taps, Sum(), self.channel]).text
                if not x.dtype.is_float:
                    tile, weight = f"{tile}.to(tl.int32)", f"{weight}.to(tl.int32)"
                code.line(f"{acc} += {tile} * {weight}")
            else:
                self._join(acc, tile, places, guards)
        if node.name != "avg_pool":
            return self._found(acc)
        return self._mean(acc, slide, at)  # type: ignore[arg-type]

    def _read(self, places: Sequence[Sum], guards: Sequence[Text]) -> str:
        """The element at a place of the image, as held; what counts for nothing outside of it."""
        x = self.node.operands[0]
        index = [self.batch, *places, self.channel] if self.node.attrs["channels_last"] else [self.batch, self.channel, *places]
        index = [Sum() if d == 1 else i for i, d in zip(index, x.shape, strict=True)]
        tile = self.e.within(x, index, guards, Tile(self._neutral(), x.dtype, literal=True))
        return f"{tile.text}.to(tl.float32)" if tile.narrow else tile.text

    def _neutral(self) -> str:
        dtype = self.node.operands[0].dtype
        if "max" not in self.node.name:
            return "0.0" if dtype.is_float else "0"
        if dtype.is_float:
            return number(float("-inf"), dtype)
        return str(-(1 << (dtype.bits - 1)) if dtype.kind == "i" else 0)

    def _start(self) -> str:
        dtype = self.node.operands[0].dtype
        kind = held(dtype) if "max" in self.node.name else total_of(dtype)
        return self.code.let("acc", f"tl.full([ROWS, COLUMNS], {self._neutral()}, {kind})")

    def _join(self, acc: str, tile: str, places: Sequence[Sum], guards: Sequence[Text]) -> None:
        """One more element of a window, which lies at a place of the image where all conditions hold."""
        if self.positions:
            self._compare(acc, tile, places, guards)
            return
        nan = ", propagate_nan=tl.PropagateNan.ALL" if self.node.operands[0].dtype.is_float else ""
        self.code.line(f"{acc} = tl.maximum({acc}, {tile}{nan})" if "max" in self.node.name else f"{acc} += {tile}")

    def _compare(self, acc: str, tile: str, places: Sequence[Sum], guards: Sequence[Text]) -> None:
        """Keep an element and its place if it is the first of its window, greater than those before, or nan."""
        code, x = self.code, self.node.operands[0]
        at = code.place(self.e.places.flatten(places, _spatial(self.node, x.shape)))
        better = f"({tile} > {acc}) | ({self.where} < 0)" + (f" | ({tile} != {tile})" if x.dtype.is_float else "")
        inside = conditions([g.text for g in guards])
        better = code.let("better", f"{inside} & ({better})" if inside else better)
        code.line(f"{acc} = tl.where({better}, {tile}, {acc})")
        code.line(f"{self.where} = tl.where({better}, {at.text}, {self.where})")

    def _found(self, acc: str) -> str:
        """The result of what was joined."""
        return self.code.let("place", f"{self.where}.to(tl.int64)") if self.positions else acc

    def _mean(self, acc: str, slide: Slide, at: Sequence[Sum]) -> str:
        """The sum over the number of elements that count."""
        attrs = self.node.attrs
        if attrs["divisor"] is not None:
            return self.code.let("mean", f"{acc} / {float(attrs['divisor'])!r}")
        text = acc
        for o, k, stride, padding, size in zip(at, slide.kernel, slide.stride, slide.padding, slide.image, strict=True):
            first = shift(scale(o, stride), -padding)
            margin = padding if attrs["count_include_pad"] else 0
            if self.e.places.is_below(shift(first, k - 1 + margin), dims.add(size, 2 * margin)) and (
                margin == padding or self.e.places.is_nonnegative(first)
            ):
                text += f" / {k}"
                continue
            start = self.code.place(first)
            low = f"tl.maximum({start.text}, {-margin})" if margin != padding else start.text
            high = f"tl.minimum({start.text} + {k}, {self.code.size(dims.add(size, margin))})"
            count = self.code.let("count", f"tl.maximum({high} - {low}, 1)", start.depth)
            text += f" / {count}"
        return self.code.let("mean", text)

    def _adaptive(self, at: Sequence[Sum], image: Shape) -> str:
        """Windows from ``i n // m`` up to ``ceil((i + 1) n / m)``: as many taps as the longest has, the others left out."""
        e, code, sizes = self.e, self.code, _spatial(self.node, self.node.result.shape)
        spans = []
        for i, n, m in zip(at, image, sizes, strict=True):
            start = e.places.quotient(scale(i, n), m)
            stop = e.places.quotient(shift(scale(i, n), dims.sub(dims.add(n, m), 1)), m)
            spans.append((start, stop, _longest(n, m)))
        acc, longest = self._start(), [n for _, _, n in spans]
        tap = Var(code.fresh("tap"), dims.numel(longest), depth=code.depth + 1)
        with code.loop(f"for {tap.name} in {_taps(dims.numel(longest), code)}:"):
            places: list[Sum] = []
            guards: list[Text] = []
            for (start, stop, _), k, size in zip(spans, e.places.unflatten(variable(tap), longest), image, strict=True):
                inner, end = code.derived(add(start, k), size, "s"), code.place(stop)
                guards.append(Text(code.let("ok", f"{inner.name} < {end.text}", inner.depth), inner.axes | end.axes, inner.depth))
                places.append(variable(inner))
            self._join(acc, self._read(places, guards), places, guards)
        if "max" in self.node.name:
            return self._found(acc)
        for start, stop, _ in spans:
            acc = code.let("mean", f"{acc} / ({code.place(stop).text} - {code.place(start).text})")
        return acc


def _longest(n: Dim, m: Dim) -> Dim:
    """Elements of the longest of m windows over n elements; of sizes that are not known, one more than need be at most."""
    if isinstance(n, int) and isinstance(m, int):
        return max(-(-(i + 1) * n // m) - i * n // m for i in range(m))
    return dims.add(dims.floordiv(dims.sub(dims.add(n, m), 1), m), 1)


def _taps(count: Dim, code: Code) -> str:
    return f"tl.static_range({count})" if isinstance(count, int) and count <= UNROLLED else f"range({code.size(count)})"


def size_of(graph: Graph) -> tuple[Dim, Dim]:
    """(rows, columns) of the result of a region's window."""
    node = form_of(graph)
    assert isinstance(node, Node)
    return dims.numel(node.result.shape[:-1]), node.result.shape[-1]


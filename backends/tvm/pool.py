"""Pooling: a loop over the outputs, neighbouring ones side by side.

A small window is written out tap by tap. Where it may reach over the edge its places are clamped, and what must not count
is deselected; along an innermost spatial axis the outputs near the edges are computed one by one, so that the vectors
between them read without conditions. The taps of a large window, of an adaptive one, and of one whose position is wanted
are looped over, from its first element inside of the image to its last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as combinations
from math import prod
from typing import Any

from tvm import tirx

from graphopt.backends.tvm import scalar, vecmath
from graphopt.backends.tvm.code import Index, i64
from graphopt.backends.tvm.expr import Arguments, Expressions, Source
from graphopt.backends.tvm.loops import SMALL, Tuning, product, vector_loop, vector_steps
from graphopt.backends.tvm.monoid import Monoid
from graphopt.ir import dims
from graphopt.ir.graph import Node, Value

UNROLLED = 32  # taps of a window that are written out
Sink = Callable[[Sequence[Index], Any], None]


@dataclass(frozen=True)
class Axis:
    """One spatial axis: ``size`` elements become ``out`` windows, each from ``i * stride - padding`` on ``taps`` elements,
    ``dilation`` apart. An adaptive axis has no taps, its windows differ in length.

    Attributes:
        inside: whether all windows are known to lie in the image.
    """

    size: Index
    out: Index
    taps: int = 0
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    inside: bool = False

    @property
    def reach(self) -> int:
        """Elements from the first to the last of a window."""
        return (self.taps - 1) * self.dilation


class Pool:
    """Emits a pooling node.

    Args:
        sink: stores a result (as held in expressions) at an index of the node's result.
    """

    def __init__(self, args: Arguments, sources: Mapping[Value, Source], node: Node, tuning: Tuning, sink: Sink) -> None:
        self.args, self.code, self.sources, self.node, self.tuning, self.sink = args, args.code, dict(sources), node, tuning, sink
        self.x, self.result = node.operands[0], node.result
        self.last = bool(node.attrs["channels_last"])
        self.first = 1 if self.last else 2  # of the spatial axes
        self.op = node.name.removeprefix("adaptive_").removesuffix("_pool")  # max, argmax or avg
        self.monoid = Monoid.of("sum" if self.op == "avg" else "max", self.x.dtype)
        self.axes = [self._axis(k) for k in range(self.x.type.rank - 2)]
        taps = prod(a.taps for a in self.axes)
        self.unrolled = 0 < taps <= UNROLLED and self.op != "argmax"

    def _axis(self, k: int) -> Axis:
        attrs, at = self.node.attrs, self.first + k
        size, out = self.x.shape[at], self.result.shape[at]
        if "kernel" not in attrs:
            return Axis(self.code.size(size), self.code.size(out))
        taps, stride, padding = (attrs[name][k] for name in ("kernel", "stride", "padding"))
        dilation = attrs["dilation"][k] if "dilation" in attrs else 1
        end = dims.add(dims.mul(dims.sub(out, 1), stride), (taps - 1) * dilation + 1 - padding)
        inside = padding == 0 and dims.prove(end, "<=", size, self.args.graph.symbols) is True
        return Axis(self.code.size(size), self.code.size(out), taps, stride, padding, dilation, inside)

    # --- loops over the outputs -----------------------------------------------------------------------------------------

    def emit(self) -> None:
        code, tuning = self.code, self.tuning
        shape = [code.size(d) for d in self.result.shape]
        steps = product(code, shape[:-1])
        total = product(code, [*shape, max(1, prod(a.taps for a in self.axes))])
        serial = not tuning.parallel or (isinstance(total, int) and total < SMALL)
        with code.loop(steps, "serial" if serial else "parallel", "line") as step:
            lead = [code.bind_index(i, "p", n) for i, n in zip(code.unflatten(step, shape[:-1]), shape[:-1], strict=True)]
            if self.last:
                self._span(lead, 0, shape[-1], tuning.lanes, False)
                return
            low, high = self._interior(self.axes[-1])
            self._span(lead, 0, low, 1, False)
            self._span(lead, low, code.bind_index(code.simplify(high - low), "n"), tuning.lanes, True)
            self._span(lead, high, code.bind_index(code.simplify(shape[-1] - high), "n"), 1, False)

    def _interior(self, axis: Axis) -> tuple[Index, Index]:
        """The outputs between which windows do not reach over an edge."""
        code = self.code
        if not self.unrolled:
            return axis.out, axis.out
        if axis.inside:
            return 0, axis.out
        low = code.least(-(-axis.padding // axis.stride), axis.out)
        room = code.greatest(code.simplify(axis.size + axis.padding - axis.reach - 1 + axis.stride), 0)
        high = code.least(code.div(room, axis.stride), axis.out)
        return code.bind_index(low, "low"), code.bind_index(code.greatest(high, low), "high")

    def _span(self, lead: list[Index], start: Index, length: Index, lanes: int, inside: bool) -> None:
        """Outputs along the innermost axis; ``inside``: their windows do not reach over its edges."""
        if isinstance(length, int) and length <= 0:
            return
        code = self.code
        if self.unrolled:
            vector_loop(code, start, length, lanes, lambda j: self.sink([*lead, j], self._written_out([*lead, j], inside)))
            return
        first, count = self._windows(lead) if self.last else ([], [])

        def outputs(base: Index, width: int) -> None:
            place = (first, count) if self.last else self._windows([*lead, base])
            self._looped(lead, base, width, *place)

        vector_steps(code, start, length, lanes, outputs)

    def _element(self, at: Sequence[Index]) -> Any:
        return Expressions(self.args, self.sources).at(self.x, at)

    # --- a window that is written out -----------------------------------------------------------------------------------

    def _written_out(self, index: list[Index], inside: bool) -> Any:
        code, m, dtype = self.code, self.monoid, self.x.dtype
        value = None
        for tap in combinations(*(range(a.taps) for a in self.axes)):
            at, tests = list(index), []
            for k, (t, axis) in enumerate(zip(tap, self.axes, strict=True)):
                i = code.simplify(index[self.first + k] * axis.stride - axis.padding + t * axis.dilation)
                if not (axis.inside or (inside and k == len(self.axes) - 1)):
                    if self.op == "avg" or axis.dilation > 1:  # else the element clamped to is one of the window's own
                        tests += [i64(i) >= i64(0), i64(i) < i64(axis.size)]
                    i = code.greatest(code.least(i, axis.size - 1), 0)
                at[self.first + k] = i
            new = self._element(at)
            for test in tests:
                known = code.simplify(test)
                if not (isinstance(known, int) and known):
                    new = tirx.Select(test, new, self._start)
            new = code.bind(new)
            value = new if value is None else code.bind(m.join(value, new))
        if self.op != "avg":
            return value
        return scalar.rounded(code.bind(value / self._divisor(index, inside)), dtype)

    @property
    def _start(self) -> Any:
        return vecmath.fence(tirx.const(0, self.monoid.held), self.monoid.held) if self.op == "avg" else tirx.const(
            self.monoid.start, self.monoid.held)  # fmt: skip

    def _divisor(self, index: Sequence[Index], inside: bool) -> Any:
        """What the sum of a window is divided by."""
        attrs, held, code = self.node.attrs, self.monoid.held, self.code
        if attrs["divisor"] is not None:
            return tirx.const(attrs["divisor"], held)
        fixed, varying = 1, []
        for k, axis in enumerate(self.axes):
            if axis.inside or (inside and k == len(self.axes) - 1):
                fixed *= axis.taps
                continue
            around = axis.padding if attrs["count_include_pad"] else 0
            start = code.simplify(index[self.first + k] * axis.stride - axis.padding)
            stop = code.least(code.simplify(start + axis.taps), axis.size + around)
            varying.append(code.simplify(stop - code.greatest(start, -around)))
        if not varying:
            return tirx.const(fixed, held)
        count = code.bind_index(product(code, [fixed, *varying]), "count")
        return i64(count).astype(held)

    # --- a window that is looped over -----------------------------------------------------------------------------------

    def _windows(self, index: Sequence[Index]) -> tuple[list[Index], list[Index]]:
        """The first element of an output's window along each axis, and how many there are inside of the image."""
        code, first, count = self.code, [], []
        for k, axis in enumerate(self.axes):
            i = index[self.first + k]
            if not axis.taps:
                start = code.div(i * axis.size, axis.out)
                stop = code.div((i + 1) * axis.size + (axis.out - 1), axis.out)
                length = code.simplify(stop - start)
            else:
                start, d = code.simplify(i * axis.stride - axis.padding), axis.dilation
                missing = code.div(code.simplify(code.greatest(0 - start, 0) + (d - 1)), d)
                room = code.div(code.simplify(code.greatest(axis.size - start, 0) + (d - 1)), d)
                length = code.greatest(code.simplify(code.least(room, axis.taps) - missing), 0)
                start = code.simplify(start + missing * d)
            first.append(code.bind_index(start, "first"))
            count.append(code.bind_index(length, "count"))
        return first, count

    def _looped(self, lead: list[Index], base: Index, width: int, first: list[Index], count: list[Index]) -> None:
        """Reduce the windows of ``width`` outputs, which are channels of one pixel if there are several."""
        code, m = self.code, self.monoid
        best = code.alloc(width, m.held, "acc")
        place = code.alloc(width, "int64", "place") if self.op == "argmax" else None
        sizes = [a.size for a in self.axes]
        self._lanes(width, lambda v: code.store(best, v, tirx.const(m.start, m.held)))
        if place is not None:
            here = code.bind_index(code.flatten(first, sizes), "here")
            self._lanes(width, lambda v: code.store(place, v, i64(here)))

        def taps(k: int, at: list[Index]) -> None:
            if k < len(self.axes):
                with code.loop(count[k], "serial", "tap") as t:
                    taps(k + 1, [*at, code.simplify(first[k] + t * self.axes[k].dilation)])
                return
            here = code.bind_index(code.flatten(at, sizes), "here") if place is not None else 0

            def step(v: Index) -> None:
                j = code.simplify(base + v)
                new = code.bind(self._element([lead[0], *at, j] if self.last else [*lead[:2], *at]))
                if place is None:
                    code.store(best, v, m.join(code.load(best, v), new))
                    return
                old = code.bind(code.load(best, v))
                index = tirx.Select(new > old, i64(here), code.load(place, v))
                if self.x.dtype.is_float:
                    index = tirx.Select(vecmath.isnan(new, m.held), i64(here), index)
                code.store(place, v, index)
                code.store(best, v, scalar.extreme(old, new, self.x.dtype, True))

            self._lanes(width, step)

        taps(0, [])
        divisor = self._looped_divisor(lead, base, count)

        def finish(v: Index) -> None:
            value = code.load(best if place is None else place, v)
            if divisor is not None:
                value = scalar.rounded(code.bind(value / divisor), self.x.dtype)
            self.sink([*lead, code.simplify(base + v)], code.bind(value))

        self._lanes(width, finish)

    def _looped_divisor(self, lead: list[Index], base: Index, count: list[Index]) -> Any:
        if self.op != "avg":
            return None
        if self.axes[0].taps:
            return self.code.bind(self._divisor([*lead, base], False))
        return i64(self.code.bind_index(product(self.code, count), "count")).astype(self.monoid.held)

    def _lanes(self, width: int, body: Callable[[Index], None]) -> None:
        if width == 1:
            return body(0)
        with self.code.loop(width, "vectorized", "v") as v:
            return body(v)

"""3x3 convolution by Winograd's F(2x2, 3x3): squares of four results from sixteen products a channel.

A task takes some lines of squares. It transforms their image, ``B' d B`` of each overlapping 4x4 patch, into sixteen matrices
[squares, C]; multiplies each by its part of the transformed weight, in register tiles of ``rows`` squares by a panel of channels;
and takes the sixteen products of a square together, ``A' m A``, where the epilogue is computed and the result stored. The
matrices of a task stay in its cache. Zeros around the image are never in memory but in one line at a time: patches are
transformed down their columns first, four lines of the image into four lines of scratch with zeros at both ends.

    B' = [1  0 -1  0]      A' = [1  1  1  0]
         [0  1  1  0]           [0  1 -1 -1]
         [0 -1  1  0]
         [0  1  0 -1]

Reference: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.forms.convform import ConvForm
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Arguments, Expressions, store_computed
from graphopt.backends.tvm.lanes import Lanes
from graphopt.backends.tvm.loops import vector_loop
from graphopt.ir.graph import Graph

LINE = 16  # f32 of a cache line
BLOCK = 64  # products summed before the sum is added to the total, about: each error counts several times in a result


def _down(d: Sequence[Any]) -> list[Any]:
    """B' d, four values."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _together(m: Sequence[Any]) -> list[Any]:
    """A' m, two values."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


class WinogradKernel(Lanes):
    """Emits a region with one 3x3 convolution, its weight transformed, and a pointwise epilogue of its shape.

    Args:
        lanes: elements of a vector.
        rows: squares of a register tile.
        lines: lines of squares of a task.
        groups: parts of the panels; each is a task of its own.
        unroll: steps of the summed axis that are unrolled.
    """

    def __init__(self, graph: Graph, form: ConvForm, lanes: int, rows: int, lines: int, groups: int, unroll: int, parallel: bool) -> None:
        assert form.transformed is not None
        self.graph, self.form, self.mr, self.lines, self.groups, self.unroll = graph, form, rows, lines, groups, unroll
        self.code = code = Code(graph.symbols)
        self.args, self.parallel = Arguments(code, graph), parallel
        self.panels, _, self.channels, self.nr = (int(d) for d in form.transformed.shape)
        self.lanes = lanes if self.nr % lanes == 0 and self.channels % lanes == 0 else 1
        self.weight = self.args.inputs[form.transformed]
        self.images, *self.out = (int(d) for d in form.node.result.shape[:-1])  # H', W'
        self.space = [int(d) for d in form.x.shape[1:-1]]
        self.high, self.across = (-(-n // 2) for n in self.out)  # squares of an image
        self.squares = lines * self.across  # of a task
        self.tiles = -(-self.squares // rows)

    def emit(self) -> Code:
        code, lines = self.code, self.images * self.high
        bands = -(-lines // self.lines)
        steps = bands * self.groups
        with code.loop(steps, "parallel" if self.parallel and steps > 1 else "serial", "task") as task:
            band, group = code.unflatten(task, [bands, self.groups])
            band, group = code.bind_index(band, "band", bands), code.bind_index(group, "group", self.groups)
            first = code.simplify(band * self.lines)
            here = self.lines if lines % self.lines == 0 else code.bind_index(code.least(lines - first, self.lines), "lines")
            patches = code.alloc(16 * self.squares * self.channels, "float32", "patches")
            products = code.alloc(16 * self.tiles * self.mr * self.nr, "float32", "products")
            four = code.alloc(4 * self.width * self.channels, "float32", "four")
            self._clear_ends(four)
            with code.loop(here, "serial", "line") as line:
                self._transform(four, patches, line, self._place(first, line))
            each = self.panels // self.groups
            with code.loop(each, "serial", "panel") as panel:
                j = code.bind_index(code.simplify(group * each + panel), "j", self.panels)
                with code.loop(16, "serial", "p") as p:
                    self._multiply(patches, products, j, p, here)
                with code.loop(here, "serial", "line") as line:
                    self._finish(products, j, line, self._place(first, line))
        return code

    @property
    def width(self) -> int:
        """Pixels that the patches of a line of squares cover."""
        return 2 * self.across + 2

    def _place(self, first: Index, line: Index) -> tuple[Index, Index]:
        """The image of a line of squares, and which of its lines it is."""
        code = self.code
        n, y = code.unflatten(code.simplify(first + line), [self.images, self.high])
        return code.bind_index(n, "n", self.images), code.bind_index(y, "y", self.high)

    # --- the image ------------------------------------------------------------------------------------------------------

    def _clear_ends(self, four: Any) -> None:
        """Zeros at both ends of the four lines of scratch."""
        code, c, (low, size) = self.code, self.channels, (self.form.low[1], self.space[1])
        with code.loop(4, "serial", "i") as i:
            for start, count in ((0, low), (low + size, self.width - low - size)):
                at = code.simplify((i * self.width + start) * c)
                vector_loop(code, at, count * c, self.lanes, lambda k: code.store(four, k, tirx.const(0.0, "float32")))

    def _transform(self, four: Any, patches: Any, line: Index, place: tuple[Index, Index]) -> None:
        """Write the patches of a line of squares: ``B' d`` of the lines of the image, then ``(B' d) B``."""
        code, form, c, (n, y) = self.code, self.form, self.channels, place
        probe = Probe(self.args, {}, form.x)
        probe([0] * form.x.type.rank)
        lanes = 1 if probe.scalar_only else self.lanes
        zero = tirx.const(0.0, "float32")
        rows: list[tuple[Index, Any]] = []  # of the image: where, and whether inside
        for i in range(4):
            at = code.simplify(2 * y + (i - form.low[0]))
            inside = tirx.And(i64(at) >= i64(0), i64(at) < i64(self.space[0]))
            held = code.bind_index(code.greatest(code.least(at, self.space[0] - 1), 0), "row", self.space[0])
            rows.append((held, code.bind(tirx.Select(inside, tirx.const(1, "int32"), tirx.const(0, "int32")), "inside")))
        with code.loop(self.space[1], "serial", "x") as x:

            def column(k: Index) -> None:
                e = Expressions(self.args, {})
                d = [tirx.Select(tirx.NE(ok, tirx.const(0, "int32")), e.at(form.x, [n, row, x, k]), zero) for row, ok in rows]
                d = [code.bind(v) for v in d]
                for i, v in enumerate(_down(d)):
                    code.store(four, code.simplify((i * self.width + form.low[1] + x) * c + k), v)

            vector_loop(code, 0, c, lanes, column)
        with code.loop(self.across, "serial", "x") as x:

            def across(k: Index) -> None:
                for i in range(4):
                    at = code.simplify((i * self.width + 2 * x) * c + k)
                    d = [code.bind(code.load(four, code.simplify(at + q * c))) for q in range(4)]
                    for q, v in enumerate(_down(d)):
                        square = code.simplify((4 * i + q) * self.squares + line * self.across + x)
                        code.store(patches, code.simplify(square * c + k), v)

            vector_loop(code, 0, c, self.lanes, across)

    # --- the products ---------------------------------------------------------------------------------------------------

    def _multiply(self, patches: Any, products: Any, j: Index, p: Index, here: Index) -> None:
        """Multiply matrix p of the patches by its part of panel j, in register tiles."""
        code, c, nr, lanes = self.code, self.channels, self.nr, self.lanes
        exact = self.squares % self.mr == 0 and isinstance(here, int)
        count = self.tiles if isinstance(here, int) else code.bind_index(code.ceildiv(code.simplify(here * self.across), self.mr), "tiles")
        base = code.bind_index(code.simplify((j * 16 + p) * (c * nr)), "dw")
        length = max(n for n in range(1, BLOCK + 1) if c % n == 0)
        lines = -(-nr * self.unroll // (LINE * self.tiles))  # of the next panel, that a step brings nearer

        def multiply(tile: Index, start: Index, first: bool) -> None:
            rows: list[Index] = []
            for i in range(self.mr):
                r = code.simplify(tile * self.mr + i)
                r = r if exact else code.least(r, self.squares - 1)
                rows.append(code.bind_index(code.simplify((p * self.squares + r) * c + start), "x"))
            acc = [code.alloc(nr, "float32", "acc") for _ in rows]
            total = code.simplify((p * self.tiles + tile) * (self.mr * nr))
            panel = code.bind_index(code.simplify(base + start * nr), "w")
            part = -(-length // self.unroll) * lines * LINE
            ahead = code.bind_index(code.simplify(panel + length * nr + tile * part), "ahead")
            self._each(acc, total, lambda sums, at, q: self._put(sums, at, self._wide(tirx.const(0.0, "float32"))))

            def step(k: Index) -> None:
                ws = [code.bind(self._vector(self.weight, code.simplify(panel + k * nr + u)), "w") for u in range(0, nr, lanes)]
                for sums, r in zip(acc, rows, strict=True):
                    a = self._wide(code.bind(code.load(patches, code.simplify(r + k)), "a"))
                    for u, w in enumerate(ws):
                        self._put(sums, u * lanes, self._vector(sums, u * lanes) + a * w)

            whole, rest = length // self.unroll, length % self.unroll
            with code.loop(whole, "serial", "k") as k:
                for q in range(lines):
                    code.prefetch(self.weight, code.simplify(ahead + (k * lines + q) * LINE))
                for q in range(self.unroll):
                    step(code.simplify(k * self.unroll + q))
            for q in range(rest):
                step(whole * self.unroll + q)

            def add(sums: Any, at: Index, q: Index) -> None:
                self._put(products, q, self._vector(sums, at) if first else self._vector(products, q) + self._vector(sums, at))

            self._each(acc, total, add)

        with code.loop(count, "serial", "tile") as tile:
            multiply(tile, 0, first=True)
        if length < c:
            with code.loop(c // length - 1, "serial", "block") as block, code.loop(count, "serial", "tile") as tile:
                multiply(tile, code.simplify(block * length + length), first=False)

    def _each(self, acc: Sequence[Any], start: Index, body: Callable[[Any, Index, Index], None]) -> None:
        """``body(a row's sums, a vector's place in them, its place among the products)`` for all vectors of a tile."""
        for i, sums in enumerate(acc):
            for u in range(0, self.nr, self.lanes):
                body(sums, u, self.code.simplify(start + (i * self.nr + u)))

    # --- the results ----------------------------------------------------------------------------------------------------

    def _finish(self, products: Any, j: Index, line: Index, place: tuple[Index, Index]) -> None:
        """Take the products of a line of squares together, and store their pixels."""
        code, (n, y) = self.code, place
        lanes = self._store_lanes()
        with code.loop(self.across, "serial", "x") as x, code.loop(self.nr // lanes, "serial", "u") as u:
            square = code.simplify(line * self.across + x)
            four = code.alloc(4 * lanes, "float32", "square")
            with code.loop(lanes, "vectorized" if lanes > 1 else "serial", "v") as v:
                at = code.simplify(square * self.nr + u * lanes + v)
                m = [code.bind(code.load(products, code.simplify(at + p * (self.tiles * self.mr * self.nr)))) for p in range(16)]
                columns = [[code.bind(s) for s in _together(m[q::4])] for q in range(4)]  # A' m
                for a in range(2):
                    for b, value in enumerate(_together([column[a] for column in columns])):
                        code.store(four, code.simplify((2 * a + b) * lanes + v), value)
            for a in range(2):
                for b in range(2):
                    index = [n, code.simplify(2 * y + a), code.simplify(2 * x + b)]
                    tests = [i64(i) < i64(size) for i, size, odd in zip(index[1:], self.out, (a, b), strict=True) if odd and size % 2]

                    def store(index: list[Index] = index, base: int = (2 * a + b) * lanes) -> None:
                        with code.loop(lanes, "vectorized" if lanes > 1 else "serial", "v") as v:
                            self._element(four, code.simplify(base + v), [*index, code.simplify(j * self.nr + u * lanes + v)])

                    if not tests:
                        store()
                        continue
                    with code.when(tests[0] if len(tests) == 1 else tirx.And(*tests)):
                        store()

    def _store_lanes(self) -> int:
        for v in self.graph.outputs:
            probe = Probe(self.args, {self.form.node.result: lambda index: tirx.const(0.0, "float32")}, v)
            probe([0] * v.type.rank)
            if probe.scalar_only:
                return 1
        return self.lanes

    def _element(self, square: Any, at: Index, index: list[Index]) -> None:
        store_computed(self.args, index, {self.form.node.result: self.code.bind(self.code.load(square, at))})

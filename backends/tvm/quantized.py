"""Products of few rows with a weight of small integers: floats are made of them in registers, and the stream of integers is all
that is read.

A task computes a panel's columns. Integers of fewer than 8 bits stand several in a 32-bit word, those of neighbouring rows: a vector of
words is loaded once, and for each of the rows a shift brings its integers to the lowest bits, from where a table in a register
(VPERMPS, which looks at the lowest four bits alone) or a conversion makes floats. What a group of rows sums up to is multiplied by
the group's scales; zero points are taken off by the group's sum of the first factor::

    y[j] = sum over groups g of s[g, j] * (sum over k in g of x[k] * q[k, j]  -  z[g, j] * sum over k in g of x[k])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Expressions, bits_of
from graphopt.backends.tvm.loops import SMALL, product, vector_loop
from graphopt.backends.tvm.monoid import Monoid, combine
from graphopt.backends.tvm.product import operand_index
from graphopt.backends.tvm.quantform import Quantized, stored
from graphopt.backends.tvm.tile import TileKernel
from graphopt.errors import BuildError
from graphopt.ir import types
from graphopt.ir.graph import Graph

LINE = 64  # bytes of a cache line
_HALF = tirx.const(16, "int32")
SHORT = 64  # the same for weights that are exact, whose sums' rounding is the error
BLOCK = 256  # rows of a scale of its own or of none that are summed before the sum is added to the total


class QuantizedKernel(TileKernel):
    """Emits a region with one matmul, or two of one left factor, and a pointwise epilogue.

    Args:
        rows: of the product, all of which are summed at once.
        vectors: of a panel that are summed at once.
        unroll: rows of 8-bit integers at a time.
        table: whether floats of fewer bits than 8 come from a table in a register.
        ahead: bytes of the stream that are asked for before they are needed; 0 leaves it to the hardware. There is work between two
            loads, and the processor does not look far enough over it: by itself it has too few lines on their way.
    """

    def __init__(self, graph: Graph, lanes: int, rows: int, vectors: int, unroll: int, table: bool, ahead: int,
                 parallel: bool) -> None:  # fmt: skip
        forms = [stored(n.operands[1]) for n in graph.nodes() if n.name == "matmul"]
        self.forms = [f for f in forms if f is not None]
        if len(self.forms) != len(forms) or len({f.width for f in self.forms}) != 1:
            raise BuildError("the second factor is not of packed integers")
        super().__init__(graph, lanes, rows, self.forms[0].width, unroll, 1, False, parallel)
        self.vectors, self.table, self.ahead = vectors, table, ahead
        self.depth = max(f.depth for f in self.forms)

    def emit(self) -> Code:
        x = self._left()
        self._all_panels(x, self._sums(x))
        return self.code

    def _sums(self, x: Any) -> list[Any]:
        """What zero points are multiplied by, for each product that has any."""
        return [self._group_sums(f, x) if f.zeros is not None else None for f in self.forms]

    def _all_panels(self, x: Any, sums: Sequence[Any]) -> None:
        code, panels = self.code, self.forms[0].panels
        work = product(code, [self.m, self.n, self.k])
        serial = not self.parallel or panels == 1 or (isinstance(work, int) and work < 4 * SMALL)
        with code.loop(panels, "serial" if serial else "parallel", "panel") as j:
            totals = [code.alloc(self.mr * self.nr, "float32", "total") for _ in self.forms]
            for form, total, ones in zip(self.forms, totals, sums, strict=True):
                with code.loop(self.nr // (self.vectors * self.lanes), "serial", "part") as part:
                    self._sum_part(form, x, ones, total, j, code.simplify(part * (self.vectors * self.lanes)))
            self._store([0] * len(self.batch), 0, code.simplify(j * self.nr), totals)

    # --- the first factor ---------------------------------------------------------------------------------------------------

    def _left(self) -> Any:
        """The first factor's rows, zeros behind them: it is read again for every panel, computed or not."""
        code, a, depth = self.code, self.left, self.depth
        buffer = code.alloc(self.mr * depth, "float32", "left")
        lead = [0] * (a.type.rank - 2)
        probe = Probe(self.args, {}, a)
        probe([*lead, 0, 0])
        for r in range(self.mr):

            def element(k: Index, r: int = r) -> None:
                code.store(buffer, code.simplify(r * depth + k), Expressions(self.args, {}).at(a, operand_index(lead, a, r, k)))

            vector_loop(code, 0, self.k, 1 if probe.scalar_only else self.lanes, element)
            with code.loop(depth - self.k, "serial", "k") as k:
                code.store(buffer, code.simplify(r * depth + self.k + k), tirx.const(0, "float32"))
        return buffer

    def _group_sums(self, form: Quantized, x: Any) -> Any:
        """The sum of each group of a row's elements, ``[rows, groups]``."""
        code, lanes = self.code, self.lanes
        out = code.alloc(self.mr * form.groups, "float32", "sums")
        with code.loop(self.mr, "serial", "r") as r, code.loop(form.groups, "serial", "g") as g:
            acc = code.alloc(lanes, "float32", "acc")
            with code.loop(lanes, "vectorized", "v") as v:
                code.store(acc, v, tirx.const(0, "float32"))
            start = code.simplify(r * self.depth + g * form.group)
            with code.loop(form.group // lanes, "serial", "k") as k, code.loop(lanes, "vectorized", "v") as v:
                code.store(acc, v, code.load(acc, v) + code.load(x, code.simplify(start + k * lanes + v)))
            total = combine(code, acc, lanes, lanes, Monoid.of("sum", types.f32))
            cell = code.alloc(1, "float32", "sum")
            code.store(cell, 0, total)
            whole = form.group // lanes * lanes
            with code.loop(form.group - whole, "serial", "k") as k:
                code.store(cell, 0, code.load(cell, 0) + code.load(x, code.simplify(start + whole + k)))
            code.store(out, code.simplify(r * form.groups + g), code.load(cell, 0))
        return out

    # --- sums ---------------------------------------------------------------------------------------------------------------

    def _sum_part(self, form: Quantized, x: Any, ones: Any, total: Any, j: Index, column: Index) -> None:
        """Sum some vectors of a panel's columns into ``total``, ``[rows, width]``."""
        code = self.code
        places = [(r, u) for r in range(self.mr) for u in range(self.vectors)]

        def at(r: int, u: int) -> list[Any]:
            return self._ramp(code.simplify(column + (r * self.nr + u * self.lanes)))

        for r, u in places:
            code.emit(tirx.BufferStore(total, self._splat(tirx.const(0, "float32")), at(r, u)))
        span = form.group if form.groups > 1 else min(SHORT if form.chains > 1 else BLOCK, form.depth)
        whole, rest = divmod(form.groups * form.group, span)
        # a row of accumulators a buffer: small enough to become registers
        acc = [code.alloc(self.vectors * self.lanes, "float32", "acc") for _ in range(self.mr * form.chains)]

        def block(b: Index, length: int) -> None:
            for held in acc:
                for u in range(self.vectors):
                    code.emit(tirx.BufferStore(held, self._splat(tirx.const(0, "float32")), self._ramp(u * self.lanes)))
            self._span(form, x, acc, j, column, code.simplify(b * span), length)
            scales = [self._scale(form, j, b, column, u) for u in range(self.vectors)] if form.groups > 1 else None
            for r, u in places:
                place = self._ramp(u * self.lanes)[0]
                value = sum((held[place] for held in acc[r + self.mr :: self.mr]), acc[r][place])
                if form.groups > 1:
                    assert scales is not None
                    value = self._shifted(form, ones, r, b, value, scales[u][1]) * scales[u][0]
                code.emit(tirx.BufferStore(total, total[at(r, u)[0]] + value, at(r, u)))

        with code.loop(whole, "serial", "block") as b:
            block(b, span)
        if rest:
            block(whole, rest)
        if form.groups == 1 and form.scales is not None:
            scales = [self._scale(form, j, 0, column, u) for u in range(self.vectors)]
            for r, u in places:
                value = self._shifted(form, ones, r, 0, total[at(r, u)[0]], scales[u][1]) * scales[u][0]
                code.emit(tirx.BufferStore(total, value, at(r, u)))

    def _scale(self, form: Quantized, j: Index, g: Index, column: Index, u: int) -> tuple[Any, Any]:
        """A vector of a group's scales, and of its zero points, counted from what the table counts from; None if there are none."""
        code = self.code
        assert form.scales is not None
        place = self._ramp(code.simplify((j * form.groups + g) * form.width + column + u * self.lanes))[0]
        scale = self.args.inputs[form.scales][place]
        if form.floats is not None and scalar.FACTOR[form.floats] != 1.0:
            scale = scale * self._splat(tirx.const(scalar.FACTOR[form.floats], "float32"))
        scale = code.bind(scale, "scale", hidden=False)
        if form.zeros is None:
            return scale, None
        zero = self._float(self.args.inputs[form.zeros][place])
        return scale, code.bind(zero - self._splat(tirx.const(float(self._middle(form)), "float32")), "zero", hidden=False)

    def _shifted(self, form: Quantized, ones: Any, r: int, g: Index, value: Any, zero: Any) -> Any:
        """What a group sums up to, less its zero points' share."""
        if zero is None:
            return value
        return value - zero * self._splat(self.code.load(ones, self.code.simplify(r * form.groups + g)))

    @staticmethod
    def _middle(form: Quantized) -> int:
        """What is taken off an integer where its float is made: with zero points, sums of terms around zero lose fewer digits."""
        return 0 if form.signed or form.zeros is None else 1 << (form.bits - 1)

    def _span(self, form: Quantized, x: Any, acc: Sequence[Any], j: Index, column: Index, first: Index, length: int) -> None:
        """Add the products of so many rows, from one on, to the accumulators."""
        code, count = self.code, form.per_word
        step = count if count > 1 else self.unroll
        apart = 2 if form.bits == 16 else 1  # elements of memory in a word
        place = code.bind_index(code.simplify(((j * (form.depth // count)) * form.width + column) * apart), "panel")

        size = form.integers.dtype.itemsize

        def fetch(at: Index, first: int, last: int) -> None:
            """Ask for the lines of a row of words that begin within some of its vectors."""
            vector = self.lanes * size * apart
            for line in range(0, self.vectors * vector, LINE) if self.ahead else ():
                if first <= line // vector < last:
                    code.prefetch(self.args.inputs[form.integers], code.simplify(at + (self.ahead + line) // size), level=1)

        def rows(k: Index, number: int) -> None:
            """``number`` rows from ``k`` on: those of a word, or 8-bit ones. Lines are asked for evenly, between the products."""
            start = code.simplify(place + code.div(k, count) * (form.width * apart))
            if count > 1:
                words = [self._load(form, code.simplify(start + u * self.lanes * apart)) for u in range(self.vectors)]
                for i in range(number):
                    fetch(start, self.vectors * i // number, self.vectors * (i + 1) // number)
                    chain = acc[i % form.chains * self.mr :]
                    self._multiply(x, chain, code.simplify(k + i), [self._small(form, w, i) for w in words])
                return
            for i in range(number):
                at = code.simplify(start + i * form.width)
                fetch(at, 0, self.vectors)
                raws = [self._load(form, code.simplify(at + u * self.lanes)) for u in range(self.vectors)]
                self._multiply(x, acc, code.simplify(k + i), [self._whole(form, w) for w in raws])

        with code.loop(length // step, "serial", "k") as k:
            rows(code.simplify(first + k * step), step)
        if length % step:
            if count > 1:
                rows(code.simplify(first + length // step * step), length % step)
            else:
                with code.loop(length % step, "serial", "k") as k:
                    rows(code.simplify(first + length // step * step + k), 1)

    def _multiply(self, x: Any, acc: Sequence[Any], k: Index, weights: Sequence[Any]) -> None:
        """Add a row of the weight, times an element of each row of the first factor."""
        code = self.code
        for r in range(self.mr):
            element = code.bind(self._splat(code.load(x, code.simplify(r * self.depth + k))), "x", hidden=False)
            for u, w in enumerate(weights):
                place = self._ramp(u * self.lanes)
                code.emit(tirx.BufferStore(acc[r], acc[r][place[0]] + element * w, place))

    # --- vectors ------------------------------------------------------------------------------------------------------------

    def _small(self, form: Quantized, word: Any, i: int) -> Any:
        """Floats of the ``i``-th integers, or bf16, of a vector of words."""
        if form.bits == 16:
            upper = tirx.bitwise_and(word, self._splat(tirx.const(-0x10000, "int32"))) if i else tirx.shift_left(word, self._splat(_HALF))
            return self._named(tirx.reinterpret(f"float32x{self.lanes}", upper))
        if self.table:
            low, mask = (tirx.shift_right(word, self._splat(tirx.const(form.bits * i, "int32"))) if i else word), (1 << form.bits) - 1
            numbers = [n & mask for n in range(16)]
            if form.signed:
                numbers = [n - (1 << form.bits) if n >> (form.bits - 1) else n for n in numbers]
            table = tirx.Shuffle([tirx.const(float(n - self._middle(form)), "float32") for n in numbers], list(range(16)))
            return self._named(tirx.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", table, low))
        part = bits_of(word, i, form.bits, types.i8 if form.signed else types.u8, lanes=self.lanes)
        return self._centred(form, self._float(part))

    def _whole(self, form: Quantized, raw: Any) -> Any:
        """Floats of a vector of 8-bit integers; of floats of 8 bits, a part that the scales make up for."""
        if form.floats is not None:
            return self._named(scalar.f8_part(raw, form.floats, self.lanes))
        return self._centred(form, self._float(raw))

    def _centred(self, form: Quantized, value: Any) -> Any:
        middle = self._middle(form)
        return self._named(value - self._splat(tirx.const(float(middle), "float32")) if middle else value)

    def _load(self, form: Quantized, at: Index) -> Any:
        if form.bits == 16:
            pairs = self.args.inputs[form.integers][tirx.Ramp(i64(at), i64(1), 2 * self.lanes)]
            return self._named(tirx.reinterpret(f"int32x{self.lanes}", pairs))
        return self._named(self.args.inputs[form.integers][self._ramp(at)[0]])

    def _float(self, value: Any) -> Any:
        return value.astype(f"int32x{self.lanes}").astype(f"float32x{self.lanes}")

    def _named(self, value: Any) -> Any:
        return self.code.bind(value, "w", hidden=False)

    def _splat(self, value: Any) -> Any:
        return tirx.Broadcast(value, self.lanes)

    def _ramp(self, at: Index) -> list[Any]:
        return [tirx.Ramp(i64(at), i64(1), self.lanes)]

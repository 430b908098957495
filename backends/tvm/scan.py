"""Scans: running sums, products, extremes and their places, along any axis.

Where the scanned axis is not the innermost one, the lanes are neighbouring columns. Where it is, several rows advance
side by side, since the steps of one row wait for each other. Float sums and products are carried in f64, so that the error
does not grow with the length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.tvm import scalar, vecmath
from graphopt.backends.tvm.code import Index, i64
from graphopt.backends.tvm.elementwise import Probe, weight_of
from graphopt.backends.tvm.expr import Arguments, Expressions, Source
from graphopt.backends.tvm.loops import SMALL, Tuning, expand_index, lanewise, merge_axes, product
from graphopt.backends.tvm.monoid import Monoid
from graphopt.backends.tvm.pointwise import Ops
from graphopt.ir import types
from graphopt.ir.graph import Node, Value
from graphopt.ir.types import DType

ROWS = 4  # rows that advance side by side: more would crowd the same sets of the L1 cache where rows are a power of two long
Sink = Callable[[Sequence[Index], Any], None]
_MONOIDS = {"cumsum": "sum", "cumprod": "prod", "cummax": "max", "cummin": "min"}


class Scan:
    """One scan node.

    Args:
        sink: stores a result (as held in expressions) at an index.
    """

    def __init__(self, args: Arguments, sources: Mapping[Value, Source], node: Node, tuning: Tuning, sink: Sink) -> None:
        self.args, self.code, self.sources, self.node, self.tuning, self.sink = args, args.code, dict(sources), node, tuning, sink
        self.x = node.operands[0]
        self.shape = [self.code.size(d) for d in self.x.shape]
        self.axis = node.attrs["axis"] % max(1, self.x.type.rank)
        self.carry = carry_of(node)

    def emit(self) -> None:
        """Write the loops."""
        code = self.code
        probe = Probe(self.args, self.sources, self.x)
        groups = [0 if k < self.axis else 1 if k == self.axis else 2 for k in range(len(self.shape))]
        self.axes = merge_axes(code, self.shape, probe, groups)
        if not self.axes:
            probe([0] * len(self.shape))
        self.lanes = 1 if probe.scalar_only or self.carry.scalar_only else self.tuning.lanes
        self.outer = [a for a in self.axes if a.members[0] < self.axis]
        self.inner = [a for a in self.axes if a.members[0] > self.axis]
        self.length: Index = self.shape[self.axis] if self.shape else 1
        across = bool(self.inner)
        *others, size = [1, *(a.size for a in (*self.outer, *self.inner))]
        self.work = product(code, [*self.shape, weight_of(self.x)])
        wide = self.lanes * (1 if isinstance(self.carry, LogSum) else self.tuning.unroll)  # long steps keep a core busy by themselves
        self._tiles(others, size, (wide, self.lanes, 1) if across else (ROWS, 1), across)

    def _tiles(self, others: Sequence[Index], size: Index, widths: Sequence[int], across: bool) -> None:
        """A tile of neighbouring columns, or of rows, at a time; the last tile overlaps the one before."""
        code = self.code
        width = next(w for w in widths if w == 1 or not isinstance(size, int) or w <= size)
        tiles = code.ceildiv(size, width)
        steps = product(code, [*others, tiles])
        serial = not self.tuning.parallel or (isinstance(self.work, int) and self.work < SMALL) or (isinstance(steps, int) and steps == 1)
        with code.loop(steps, "serial" if serial else "parallel", "tile") as tile:
            *lead, t = code.unflatten(tile, [*others, tiles])
            start: Index = code.simplify(t * width)
            if width > 1 and not (isinstance(size, int) and size % width == 0):
                start = code.bind_index(code.greatest(code.least(start, size - width), 0))
            if width == 1 or isinstance(size, int):
                return self._line(lead, start, width, across)
            with code.when(i64(size) >= i64(width)):
                self._line(lead, start, width, across)
            with code.when(i64(size) < i64(width)), code.loop(code.least(size, width), "serial", "j") as j:
                self._line(lead, j, 1, across)
        return None

    def _line(self, lead: list[Index], start: Index, width: int, across: bool) -> None:
        """Scan ``width`` neighbouring columns (lanes) or rows (one after another in each step)."""
        code = self.code
        lanes = min(self.lanes, width) if across else 1
        cells = [code.alloc(width, dtype, "carry") for dtype in self.carry.held]

        def begin(l: Index) -> None:
            for cell, value in zip(cells, self.carry.start(), strict=True):
                code.store(cell, l, value)

        lanewise(code, width, lanes, begin)
        with code.loop(self.length, "serial", "k") as k:
            lanewise(code, width, lanes, lambda l: self._step(cells, l, [*lead, code.simplify(start + l)], k))

    def _step(self, cells: Sequence[Any], l: Index, others: list[Index], k: Index) -> None:
        code = self.code
        rest = iter(others[len(others) - len(self.outer) - len(self.inner) :])
        at = [k if a.members[0] == self.axis else next(rest) for a in self.axes]
        index = expand_index(code, self.axes, at, self.shape)
        value = Expressions(self.args, self.sources).at(self.x, index)
        held = [code.bind(code.load(c, l)) for c in cells]
        new = [v if isinstance(v, tirx.Var) else code.bind(v) for v in self.carry.join(held, value, k, code.bind)]
        for cell, v in zip(cells, new, strict=True):
            code.store(cell, l, v)
        self.sink(index, self.carry.result(new, code.bind))


# --- what is carried along -----------------------------------------------------------------------------------------------


class Carry:
    """What a scan carries from element to element.

    Attributes:
        held: types of the carried numbers.
        scalar_only: whether a step needs functions that only libm has.
    """

    held: tuple[str, ...]
    scalar_only = False

    def __init__(self, node: Node) -> None:
        self.op, self.dtype = node.name, node.operands[0].dtype

    def start(self) -> list[Any]:
        """Before the first element."""
        raise NotImplementedError

    def join(self, held: list[Any], x: Any, k: Index, let: vecmath.Let) -> list[Any]:
        """After the element x, the k-th."""
        raise NotImplementedError

    def result(self, held: list[Any], let: vecmath.Let) -> Any:
        """The element of the result."""
        raise NotImplementedError


def carry_of(node: Node) -> Carry:
    if node.name == "logcumsumexp":
        return LogSum(node)
    return Place(node) if node.name.startswith("arg") else Total(node)


class Total(Carry):
    """A sum, product or extreme."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.monoid = Monoid.of(_MONOIDS[self.op], self.dtype)
        summed = self.op in ("cumsum", "cumprod")
        self.held = (self.monoid.total if summed else self.monoid.held,)

    def start(self) -> list[Any]:
        (held,) = self.held
        return [tirx.const(int(self.monoid.start) if held.startswith("uint") else self.monoid.start, held)]

    def join(self, held: list[Any], x: Any, k: Index, let: vecmath.Let) -> list[Any]:
        if self.dtype.is_bool:
            x = x.astype("uint8")
        return [self.monoid.join(held[0], x if str(x.ty.dtype) == self.held[0] else let(x.astype(self.held[0])))]

    def result(self, held: list[Any], let: vecmath.Let) -> Any:
        if self.dtype.is_bool:
            return tirx.NE(held[0], tirx.const(0, "uint8"))
        name = scalar.COMPUTE[self.dtype]
        total = held[0] if name == self.held[0] else let(held[0].astype(name))
        return scalar.rounded(total, self.dtype) if self.dtype.is_float else total


class Place(Carry):
    """Where the extreme is: the last of equal ones; nan counts as the most extreme."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.name = "uint8" if self.dtype.is_bool else scalar.COMPUTE[self.dtype]
        self.held = (self.name, "int64")
        self.monoid = Monoid.of("max" if self.op == "argcummax" else "min", self.dtype)

    def start(self) -> list[Any]:
        start = int(self.monoid.start) if self.name.startswith("uint") else self.monoid.start
        return [tirx.const(start, self.name), tirx.const(0, "int64")]

    def join(self, held: list[Any], x: Any, k: Index, let: vecmath.Let) -> list[Any]:
        best, where = held
        x = x.astype("uint8") if self.dtype.is_bool else x
        better = x >= best if self.op == "argcummax" else x <= best
        if self.dtype.is_float:
            better = tirx.Or(vecmath.isnan(x, self.name), tirx.And(better, tirx.Not(vecmath.isnan(best, self.name))))
        better = let(better)
        return [tirx.Select(better, x, best), tirx.Select(better, i64(k), where)]

    def result(self, held: list[Any], let: vecmath.Let) -> Any:
        return held[1]


class LogSum(Carry):
    """log(sum(exp(x))) as a pair: the largest element m, and the sum of exp(x - m) in f64."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.wide: DType = types.f64 if self.dtype == types.f64 else types.f32
        self.name = scalar.COMPUTE[self.wide]
        self.held = (self.name, "float64")
        self.scalar_only = self.wide == types.f64

    def _call(self, op: str, x: Any, let: vecmath.Let) -> Any:
        return let(Ops(let).apply(op, [x], self.wide, self.wide, {}, [None]))

    def start(self) -> list[Any]:
        return [tirx.const(float("-inf"), self.name), tirx.const(0.0, "float64")]

    def _finite(self, m: Any, let: vecmath.Let) -> Any:
        """The finite number nearest to m, from which differences are taken: infinities then come out right by themselves."""
        limit = 3.4028234663852886e38 if self.name == "float32" else 1.7976931348623157e308
        least, most = (tirx.const(v, self.name) for v in (-limit, limit))
        return let(scalar.extreme(let(scalar.extreme(m, least, self.wide, True)), most, self.wide, False))

    def join(self, held: list[Any], x: Any, k: Index, let: vecmath.Let) -> list[Any]:
        most, total = held
        new = let(scalar.extreme(most, x, self.wide, True))
        middle = self._finite(new, let)
        shrink, term = (self._call("exp", let(v - middle), let).astype("float64") for v in (most, x))
        return [new, total * shrink + term]

    def result(self, held: list[Any], let: vecmath.Let) -> Any:
        most, total = held
        narrow = total if self.name == "float64" else let(total.astype(self.name))
        return scalar.rounded(let(self._finite(most, let) + self._call("log", narrow, let)), self.dtype)

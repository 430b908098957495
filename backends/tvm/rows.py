"""Regions over rows: softmax, the normalizations, and chains of reductions over the trailing axes, one row at a time.

Each reduction is one pass over the row, which stays in the cache; the last pass writes the outputs. Values that are dear
and needed by several passes (the exponentials of a softmax) are kept in a scratch row. Mean and variance take two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from graphopt.backends.forms.shapes import row_shape
from graphopt.backends.forms.support import REDUCTIONS, VIEWS, is_softmax_exp
from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.elementwise import HEAVY, Probe, weight_of
from graphopt.backends.tvm.expr import Arguments, Expressions, Source
from graphopt.backends.tvm.loops import SMALL, Tuning, lanewise, linear_index, merge_axes, product, vector_loop
from graphopt.backends.tvm.monoid import Monoid, combine
from graphopt.backends.tvm.reduce import BLOCK
from graphopt.errors import BuildError
from graphopt.ir import dims, types
from graphopt.ir.graph import Graph, Node, Value

IDEMPOTENT = ("max", "min", "any", "all")


@dataclass(frozen=True)
class Runs:
    """A row of a value as ``count`` runs of ``length`` columns; ``index(run, i)`` is the value's index of a run's element."""

    count: Index
    length: Index
    index: Callable[[Index, Index], list[Index]]


class RowKernel:
    """Emits one region.

    Args:
        rows_per_step: rows a parallel step takes.
    """

    def __init__(self, graph: Graph, tuning: Tuning, rows_per_step: int) -> None:
        shape = row_shape(graph)
        if isinstance(shape, str):
            raise BuildError(shape)
        self.graph, self.tuning, self.step = graph, tuning, rows_per_step
        self.code = Code(graph.symbols)
        self.args = Arguments(self.code, graph)
        self.row_count, self.columns = (self.code.size(d) for d in shape)
        self.sources: dict[Value, Source] = {}
        self.row: Index = 0

    def emit(self) -> Code:
        code = self.code
        kept = self._kept_values()
        weight = sum(weight_of(n.result) for n in self.graph.nodes() if n.name in REDUCTIONS) + 1
        total = product(code, [self.row_count, self.columns])
        small = isinstance(total, int) and total * weight < SMALL
        steps = code.ceildiv(self.row_count, self.step)
        kind = "serial" if small or not self.tuning.parallel else "parallel"
        with code.loop(steps, kind, "step") as step:
            buffers = {v: code.alloc(self.columns, _held(v), "kept", scope="global") for v in kept}
            first = code.simplify(step * self.step)
            whole = isinstance(self.row_count, int) and self.row_count % self.step == 0
            count = self.step if whole else code.bind_index(code.least(self.row_count - first, self.step))
            with code.loop(count, "serial", "r") as r:
                self.row = code.bind_index(code.simplify(first + r), "row")
                self._one_row(buffers)
        return code

    def _kept_values(self) -> list[Value]:
        """Operands of reductions that later passes need again and that are not cheap."""
        out = []
        for node in self.graph.nodes():
            if node.name in REDUCTIONS:
                v = node.operands[0]
                if len(v.users) > 1 and v.producer is not None and v not in out and _cost(v) >= 3:
                    out.append(v)
        return out

    def _one_row(self, buffers: dict[Value, Any]) -> None:
        self.sources = {}
        for node in self.graph.nodes():
            if node.name in REDUCTIONS:
                self._reduce(node, buffers.get(node.operands[0]) if node.operands[0] not in self.sources else None)
        for k, v in enumerate(self.graph.outputs):
            self._write(k, v)

    # --- indices ------------------------------------------------------------------------------------------------------------

    def _index(self, v: Value, column: Index) -> list[Index]:
        """Index of a value of the full size at this row and a column."""
        shape = [self.code.size(d) for d in v.shape]
        for k in range(len(shape), -1, -1):
            if self.code.equal(product(self.code, shape[k:]), self.columns):
                lead, trail = self.code.unflatten(self.row, shape[:k]), self.code.unflatten(column, shape[k:])
                return [0 if isinstance(n, int) and n == 1 else i for i, n in zip([*lead, *trail], shape, strict=True)]
        return self.code.unflatten(self.code.simplify(self.row * self.columns + column), shape)

    def _row_source(self, v: Value, value: Any) -> Source:
        shape = [self.code.size(d) for d in v.shape]

        def source(index: Sequence[Index]) -> Any:
            if not self.code.equal(self.code.flatten(index, shape), self.row):
                raise BuildError(f"{v!r} is used outside of its row")
            return value

        return source

    def _kept_source(self, v: Value, buffer: Any) -> Source:
        shape = [self.code.size(d) for d in v.shape]

        def source(index: Sequence[Index]) -> Any:
            column = self.code.simplify(self.code.flatten(index, shape) - self.row * self.columns)
            held = self.code.load(buffer, column)
            return scalar.load(held, types.b1) if v.dtype.is_bool else held

        return source

    def _runs(self, v: Value) -> Runs:
        """How to go through a row of a value: in one run, or where what it reads has other steps from run to run, in several."""
        code, shape = self.code, [self.code.size(d) for d in v.shape]
        whole = Runs(1, self.columns, lambda _, i: self._index(v, i))
        k = next((k for k in range(len(shape), -1, -1) if code.equal(product(code, shape[k:]), self.columns)), None)
        if k is None or len(shape) - k < 2:
            return whole
        lead, trail = code.unflatten(self.row, shape[:k]), shape[k:]

        def place(index: Sequence[Index]) -> list[Index]:
            return [0 if isinstance(n, int) and n == 1 else i for i, n in zip([*lead, *index], shape, strict=True)]

        def touched(index: Sequence[Index]) -> list[Any]:
            probe = Expressions(self.args, self.sources, probe=True)
            probe.at(v, place(index))
            written = [self.args.place(k, place(index)) for k, out in enumerate(self.graph.outputs) if out is v]
            return [*(at for _, at in probe.reads), *probe.conditions, *written]

        axes = merge_axes(code, trail, touched, [0] * len(trail))
        if not axes:
            return whole
        outer = [a.size for a in axes[:-1]]
        count, length = product(code, outer), axes[-1].size
        return Runs(count, length, lambda o, i: place(linear_index(axes, [*code.unflatten(o, outer), i], len(trail))))

    # --- passes -------------------------------------------------------------------------------------------------------------

    def _lanes(self, v: Value, length: Index) -> int:
        probe = Probe(self.args, self.sources, v)
        probe(self._index(v, self.row))
        lanes = 1 if probe.scalar_only else self.tuning.lanes
        while lanes > 1 and isinstance(length, int) and length < lanes:
            lanes //= 2
        return lanes

    def _reduce(self, node: Node, keep: Any) -> None:
        """One pass: reduce an operand over the row, and keep its elements if a later pass wants them."""
        code, x = self.code, node.operands[0]
        m = Monoid.of(node.name, x.dtype, nan_matters=not nan_shows_anyway(node))
        runs = self._runs(x)
        lanes = self._lanes(x, runs.length)
        unroll = self.tuning.unroll
        while unroll > 1 and isinstance(runs.length, int) and runs.length < lanes * unroll * 4:
            unroll //= 2
        width = lanes * unroll if lanes > 1 else 1
        long = m.total != m.held and not (isinstance(self.columns, int) and self.columns <= BLOCK)
        total_type = m.total if long else m.held
        acc, total = code.alloc(width, m.held, "acc"), code.alloc(1, total_type, "total")

        def fill() -> None:
            lanewise(code, width, lanes, lambda l: code.store(acc, l, _constant(m.start, m.held)))

        def join(at: Index, value: Any) -> None:
            code.store(acc, at, m.join(code.load(acc, at), value))

        def flush() -> None:
            value = combine(code, acc, width, lanes, m)
            code.store(total, 0, m.join(code.load(total, 0), value if total_type == m.held else value.astype(total_type)))

        def run(o: Index) -> None:
            def element(i: Index) -> Any:
                value = Expressions(self.args, self.sources).at(x, runs.index(o, i))
                if keep is not None:
                    code.store(keep, code.simplify(o * runs.length + i), value.astype("uint8") if x.dtype.is_bool else value)
                return scalar.cast(value, x.dtype, types.b1).astype("uint8") if m.held == "uint8" and x.dtype != types.u8 else value

            def add(at: Index, i: Index) -> None:
                summed = keep is None and node.name in ("sum", "mean")
                factors = Expressions(self.args, self.sources).factors(x, runs.index(o, i)) if summed else None
                if factors is None:
                    return join(at, element(i))
                return code.store(acc, at, code.load(acc, at) + factors[0] * factors[1])

            def vectors(start: Index, count: Index) -> None:
                with code.loop(count, "serial", "c") as c:
                    lanewise(code, width, lanes, lambda l: add(l, code.simplify(start + c * width + l)))

            if long and width > 1:
                block = BLOCK // width
                whole = code.div(runs.length, width)
                with code.loop(code.ceildiv(whole, block), "serial", "block") as b:
                    vectors(code.simplify(b * BLOCK), code.bind_index(code.least(whole - b * block, block)))
                    flush()
                    fill()
            elif not (isinstance(runs.length, int) and runs.length < width):
                vectors(0, code.div(runs.length, width))
            held = None if keep is None else lambda i: code.load(keep, code.simplify(o * runs.length + i))
            self._leftover(runs.length, weight_of(x), width, lanes, held, element, join, add, node.name in IDEMPOTENT and m.held != "uint8")

        code.store(total, 0, _constant(m.start, total_type))
        fill()
        with code.loop(runs.count, "serial", "run") as o:
            run(o)
        flush()
        value = code.load(total, 0)
        self.sources[node.result] = self._row_source(node.result, code.bind(finish(code, node, value, self.columns), "row_value"))
        if keep is not None:
            self.sources[x] = self._kept_source(x, keep)

    def _leftover(self, columns: Index, weight: int, width: int, lanes: int, held: Any, element: Any, join: Any, add: Any,
                  idempotent: bool) -> None:  # fmt: skip
        """The columns behind the last full step: single vectors, then elements.

        Where computing an element twice does no harm, the last elements are done by a vector that overlaps the one before.
        """
        code = self.code
        rest = code.mod(columns, width)
        if isinstance(rest, int) and rest == 0:
            return
        base = code.simplify(columns - rest)
        if width > lanes:
            with code.loop(code.div(rest, lanes), "serial", "c") as c, code.loop(lanes, "vectorized", "v") as v:
                add(v, code.simplify(base + c * lanes + v))
            rest = code.mod(rest, lanes)
            base = code.simplify(columns - rest)
        if isinstance(rest, int) and rest == 0:
            return
        if lanes > 1 and isinstance(columns, int) and columns >= lanes and weight > 2 and (idempotent or held is not None):
            with code.loop(lanes, "vectorized", "v") as v:
                value = element(code.simplify(columns - lanes + v))
                if idempotent:
                    join(v, value)
            if not idempotent:
                with code.loop(rest, "serial", "t") as t:
                    join(0, held(code.simplify(base + t)))
            return
        with code.loop(rest, "serial", "t") as t:
            add(0, code.simplify(base + t))

    def _write(self, k: int, v: Value) -> None:
        """Store an output's part of this row."""
        code = self.code
        if dims.same(v.type.numel, dims.numel(list(v.shape))) and not self._is_full(v):
            index = code.unflatten(self.row, [code.size(d) for d in v.shape])
            self.args.store(k, index, Expressions(self.args, self.sources).at(v, index))
            return
        runs = self._runs(v)
        lanes = self._lanes(v, runs.length)
        if isinstance(runs.length, int) and runs.length % lanes and lanes < self.tuning.lanes:
            lanes = 1

        def run(o: Index) -> None:
            def element(i: Index) -> None:
                index = runs.index(o, i)
                self.args.store(k, index, Expressions(self.args, self.sources).at(v, index))

            vector_loop(code, 0, runs.length, lanes, element)

        with code.loop(runs.count, "serial", "run") as o:
            run(o)

    def _is_full(self, v: Value) -> bool:
        return self.code.equal(product(self.code, [self.code.size(d) for d in v.shape]), product(self.code, [self.row_count, self.columns]))


def nan_shows_anyway(node: Node) -> bool:
    """Whether the result is the maximum of a softmax: a nan in the row reaches every output through the sum."""
    if node.name != "max":
        return False
    for shifted, _ in node.result.uses:
        if shifted.name != "sub" or shifted.operands != (node.operands[0], node.result):
            return False
        exps = [u for u in shifted.result.users if u.name == "exp"]
        sums = [u for e in exps for u in e.result.users if u.name == "sum" and u.attrs["axes"] == node.attrs["axes"]]
        others = [u for u in shifted.result.users if u.name not in ("exp", "sub")]
        if not sums or others or not all(is_softmax_exp(e) for e in exps):
            return False
    return True


def _held(v: Value) -> str:
    return "uint8" if v.dtype.is_bool else scalar.COMPUTE[v.dtype]


def _constant(value: Any, dtype: str) -> Any:
    return tirx.const(int(value) if "int" in dtype else float(value), dtype)


def finish(code: Code, node: Node, total: Any, count: Index) -> Any:
    """A reduction's result from its total: the mean's division, and rounding to the result's dtype."""
    dtype = node.result.dtype
    if node.name == "mean":
        total = total / i64(count).astype(total.ty.dtype)
    if dtype.is_bool:
        return tirx.NE(total, tirx.const(0, "uint8"))
    if not dtype.is_float:
        return total
    name = scalar.COMPUTE[dtype]
    return scalar.rounded(code.bind(total if total.ty.dtype == name else total.astype(name)), dtype)


def _cost(v: Value) -> int:
    """Rough cost of computing an element again: nodes down to inputs and reductions."""
    seen: dict[Value, None] = {}
    stack, total = [v], 0
    while stack:
        u = stack.pop()
        if u in seen or u.producer is None or u.producer.name in REDUCTIONS or u.producer.name == "constant":
            continue
        seen[u] = None
        total += HEAVY.get(u.producer.name, 0 if u.producer.name in VIEWS else 1)
        stack += u.producer.operands
    return total

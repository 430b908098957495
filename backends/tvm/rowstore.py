"""Writing sums of neighbouring columns, a row after the other, through the epilogue of a product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Arguments, Source, store_computed
from graphopt.ir.graph import Graph, Value


class RowStore:
    """Evaluates a region's outputs where its products are known, and stores them.

    Args:
        results: the products, all of one shape ``[*lead, columns]``.
        width: columns of the sums' rows; sums are f32, or the results' integers.
        lanes: f32 of a vector.
        known: how to read what else was computed before.
    """

    def __init__(self, code: Code, args: Arguments, graph: Graph, results: Sequence[Value], width: int, lanes: int,
                 known: Mapping[Value, Source] | None = None) -> None:  # fmt: skip
        self.code, self.args, self.graph, self.results, self.width = code, args, graph, tuple(results), width
        self.known = dict(known or {})
        *lead, columns = [code.size(d) for d in results[0].shape]
        self.lead, self.columns = lead, columns
        self.lanes = lanes if self._vectors() else 1

    def _vectors(self) -> bool:
        """Whether the epilogue has a vector form."""
        for v in self.graph.outputs:
            nothing = {r: lambda index, held=scalar.COMPUTE[r.dtype]: tirx.const(0, held) for r in self.results}
            probe = Probe(self.args, {**self.known, **nothing}, v)
            probe([0] * v.type.rank)
            if probe.scalar_only:
                return False
        return True

    @property
    def plain(self) -> bool:
        """Whether the rows of sums, through the epilogue, are rows of the one output."""
        out = self.graph.outputs[0]
        return len(self.graph.outputs) == 1 and self.graph.output_strides[0] is None and out.shape[-1:] == self.results[0].shape[-1:]

    def ask(self, row: Index, column: Index) -> None:
        """Ask for the cache line of an element of a ``plain`` output, which will be written soon: that it comes beside other work."""
        code = self.code
        code.prefetch(self.args.outputs[0], code.simplify(row * self.columns + column), write=True)

    def write(self, sums: Sequence[Any], base: Index, row: Index, count: Index, column: Index) -> None:
        """Store ``count`` rows from ``row`` on, the columns from ``column`` on; the sums begin at ``base`` of a buffer for each product."""
        code, width, lanes = self.code, self.width, self.lanes
        with code.loop(count, "serial", "i") as i:
            r = code.bind_index(code.simplify(row + i), "r")
            places = zip(code.unflatten(r, self.lead), self.lead, strict=True)
            lead = [0 if isinstance(n, int) and n == 1 else code.bind_index(x, "i", n) for x, n in places]  # as broadcasts ask for it
            start = code.bind_index(code.simplify(base + i * width), "at")

            def one(c: Index) -> None:
                self._element(sums, code.simplify(start + c), [*lead, code.simplify(column + c)])

            def vector(u: Index) -> None:
                with code.loop(lanes, "vectorized", "v") as v:
                    one(code.simplify(u * lanes + v))

            if isinstance(self.columns, int) and self.columns % width == 0:
                with code.loop(width // lanes, "serial", "u") as u:
                    vector(u)
            else:
                here = code.bind_index(code.least(self.columns - column, width), "here")
                whole = code.div(here, lanes)
                with code.loop(whole, "serial", "u") as u:
                    vector(u)
                with code.loop(code.simplify(here - whole * lanes), "serial", "c") as c:
                    one(code.simplify(whole * lanes + c))

    def _element(self, sums: Sequence[Any], at: Index, index: list[Index]) -> None:
        code = self.code

        def summed(buffer: Any, result: Value) -> Any:
            return scalar.rounded(code.bind(code.load(buffer, at)), result.dtype)

        store_computed(self.args, index, {r: summed(buffer, r) for r, buffer in zip(self.results, sums, strict=True)}, self.known)

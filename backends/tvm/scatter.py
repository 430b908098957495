"""Writing by index: a copy of the operand, then updates in the order of the index.

What lies before and after the indexed axis is independent, and is spread over the cores and over the lanes; along the index
everything is in order, so that repeated positions give the same result every time. A result that lies where the
operand lies is updated in place: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Index
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Arguments, Expressions, Source
from graphopt.backends.tvm.loops import SMALL, Axis, Tuning, expand_index, merge_axes, product, vector_loop
from graphopt.backends.tvm.pieces import write_output
from graphopt.backends.tvm.pointwise import Ops
from graphopt.ir.graph import Node, Value

_PIECE = 256  # neighbouring elements behind the indexed axis that one parallel step takes, at least
_TASKS = 16  # parallel steps that are enough
_OPS = {"add": "add", "mul": "mul", "max": "maximum", "min": "minimum"}


class Scatter:
    """One ``put`` or ``scatter`` node whose result is output k of the region.

    Args:
        in_place: the result's memory holds the operand already.
    """

    def __init__(self, args: Arguments, sources: Mapping[Value, Source], node: Node, tuning: Tuning, k: int, in_place: bool) -> None:
        self.args, self.code, self.sources, self.node, self.tuning, self.k = args, args.code, dict(sources), node, tuning, k
        self.x, self.index, self.source = node.operands
        self.in_place = in_place
        self.axis = node.attrs["axis"] % self.x.type.rank
        self.span = self.index.type.rank if node.name == "put" else 1  # axes of the source that the index gives
        self.shape = [self.code.size(d) for d in self.source.shape]
        after = len(self.shape) - self.axis - self.span
        self.groups = [0] * self.axis + [1] * self.span + [2] * after

    def emit(self) -> None:
        """Write the loops."""
        if not self.in_place:
            write_output(self.args, self.sources, self.k, self.tuning, self.x)
        if not any(isinstance(n, int) and n == 0 for n in self.shape):
            self._updates()

    def _merged(self) -> tuple[list[Axis], bool]:
        """The loops, and whether neighbouring elements can be updated by vectors."""
        code = self.code
        probe, places = Probe(self.args, self.sources, self.source), Probe(self.args, self.sources, self.index)

        def touched(at: Sequence[Index]) -> list[Any]:
            return [*probe(at), *places(self._of_index(at)), self._address(at, 0)]

        axes = merge_axes(code, self.shape, touched, self.groups)
        if not axes:
            touched([0] * len(self.shape))
        return axes, self.node.name == "put" and not probe.scalar_only and not places.scalar_only

    def _updates(self) -> None:
        code = self.code
        axes, vectors = self._merged()
        outer, along, inner = ([a for a in axes if self.groups[a.members[0]] == g] for g in range(3))
        last: Index = inner[-1].size if inner else 1
        lanes = self.tuning.lanes if vectors else 1
        free = [*outer, *inner[:-1]]
        chunk = self._chunk(last, lanes, product(code, [a.size for a in free]))
        pieces = code.ceildiv(last, chunk) if isinstance(chunk, int) else 1
        split = not (isinstance(pieces, int) and pieces == 1)
        steps, work = product(code, [*(a.size for a in free), pieces]), product(code, self.shape)
        serial = not self.tuning.parallel or (isinstance(steps, int) and steps == 1) or (isinstance(work, int) and work < SMALL)
        with code.loop(steps, "serial" if serial else "parallel", "part") as part:
            *fixed, piece = code.unflatten(part, [*(a.size for a in free), pieces])
            start: Index = code.simplify(piece * chunk) if split else 0
            length: Index = code.bind_index(code.least(last - start, chunk), "n") if split else last
            before, between = fixed[: len(outer)], fixed[len(outer) :]

            def at_index(at: list[Index]) -> None:
                def full(i: Index) -> list[Index]:
                    return expand_index(code, axes, [*before, *at, *between, *([i] if inner else [])], self.shape)

                known = self._place(full(0)) if self.node.name == "put" else None
                vector_loop(code, start, length, lanes, lambda i: self._update(full(i), known), overlap=self.node.attrs["update"] == "set")

            self._along(along, [], at_index)

    def _along(self, axes: Sequence[Axis], at: list[Index], body: Callable[[list[Index]], None]) -> None:
        if len(at) == len(axes):
            return body(at)
        with self.code.loop(axes[len(at)].size, "serial", "m") as m:
            self._along(axes, [*at, m], body)
        return None

    def _chunk(self, last: Index, lanes: int, others: Index) -> Index:
        """How much of the innermost loop one parallel step takes."""
        if not isinstance(last, int):
            return last if not isinstance(others, int) or others >= _TASKS else 4 * _PIECE
        if last <= _PIECE or not isinstance(others, int) or others >= _TASKS:
            return last
        return max(_PIECE, -(-last // (_TASKS * lanes)) * lanes)

    def _of_index(self, at: Sequence[Index]) -> list[Index]:
        """Where the index holds the place of an element of the source."""
        return list(at[self.axis : self.axis + self.span]) if self.node.name == "put" else list(at)

    def _place(self, at: Sequence[Index]) -> Any:
        size = self.code.size(self.x.shape[self.axis])
        return Expressions(self.args, self.sources).position(self.index, self._of_index(at), size)

    def _address(self, at: Sequence[Index], place: Index) -> Index:
        target = [*at[: self.axis], place, *at[self.axis + self.span :]]
        out: Index = 0
        for i, s in zip(target, self.args.output_strides(self.k), strict=True):
            out = out + i * s
        return self.code.simplify(out)

    def _update(self, at: list[Index], place: Any) -> None:
        code, dtype, update = self.code, self.x.dtype, self.node.attrs["update"]
        out = self._address(at, self._place(at) if place is None else place)
        value = Expressions(self.args, self.sources).at(self.source, at)
        buffer = self.args.outputs[self.k]
        if update != "set":
            ops = Ops(code.bind)
            old = code.bind(scalar.load(code.load(buffer, out), dtype))
            value = code.bind(ops.apply(_OPS[update], [old, value], dtype, dtype, {}, [None, None]))
        code.store(buffer, out, scalar.store(value, dtype))

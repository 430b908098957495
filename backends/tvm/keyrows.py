"""Keys or values, as the kernel of few queries reads them: a row at a time, wherever rows lie and whatever they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import tirx

from graphopt.backends.forms.flashform import joined_rows
from graphopt.backends.forms.support import VIEWS, constant_of
from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Index, i64
from graphopt.backends.tvm.expr import Arguments, Expressions, broadcast_index
from graphopt.ir import types
from graphopt.ir.graph import Node, Value

F32 = "float32"
LINE = 64  # bytes of a cache line
Order = Callable[[int, Index], Index]  # the element at a place of a row's vectors: lane v of the vector that starts at u


def in_order(u: int, v: Index) -> Index:
    return u + v


class Rows:
    """Keys or values, a row at a time: floats, or integers and a scale for all of a row.

    Args:
        part: of rows that are joined, the operand of the join that is read, and the first of its rows.

    Attributes:
        integers: what dequantizes the value, behind views; None if nothing does.
        per_word: integers that stand in one element of memory, along the row.
        paged: whether a table says where rows are.
    """

    def __init__(self, args: Arguments, value: Value, part: tuple[int, Index] | None = None) -> None:
        self.args, self.value, self.part = args, value, part
        node = value.producer
        while node is not None and node.name in VIEWS:
            node = node.operands[0].producer
        fits = node is not None and node.name == "dequantize" and node.operands[1].dtype == types.f32
        fits = fits and node is not None and all(constant_of(zero) is not None for zero in node.operands[2:])
        self.integers = node if fits and node is not None and self._constant(node) else None
        node, self.per_word = value.producer, 1
        while node is not None and node.name in (*VIEWS, "dequantize", "unpack_bits"):
            self.per_word *= node.operands[0].dtype.bits // node.attrs["bits"] if node.name == "unpack_bits" else 1
            node = node.operands[0].producer
        self.paged = node is not None and node.name == "take"

    def _constant(self, node: Node) -> bool:
        """Whether the scale does not change along a row of the value."""
        place = [tirx.Var(self.args.code.fresh("i"), "int64") for _ in self.value.shape]
        probe = Expressions(self.args, {node.result: lambda at: self._scale(node, at, probe)}, probe=True)
        probe.at(self.value, place)
        used = {v.name for _, e in probe.reads if not isinstance(e, int) for v in tirx.analysis.undefined_vars(e)}
        return place[-1].name not in used

    @staticmethod
    def _scale(node: Node, at: Sequence[Index], e: Expressions) -> Any:
        scale = node.operands[1]
        return e.at(scale, broadcast_index(scale, at))

    def at(self, index: Sequence[Index], probe: Expressions | None = None) -> Any:
        """An element, without the row's scale; read by ``probe`` if that is given."""
        e = probe or Expressions(self.args, {})
        if self.part is not None and (join := self.value.producer) is not None:
            (number, first), axis = self.part, self.value.type.rank - 2
            x = join.operands[number]
            e.sources = {self.value: lambda at: e.at(x, [*at[:axis], self.args.code.simplify(at[axis] - first), *at[axis + 1 :]])}
        elif self.integers is not None:
            whole, *zero = (self.integers.operands[0], *self.integers.operands[2:])
            taken = sum(float(constant_of(z) or 0) for z in zero)

            def floating(at: Sequence[Index]) -> Any:
                number = e.let(scalar.cast(e.at(whole, broadcast_index(whole, at)), whole.dtype, types.f32, e.let))
                return e.let(number - tirx.const(taken, F32)) if taken else number

            e.sources = {self.integers.result: floating}
        return e.at(self.value, index)

    def order(self, lanes: int) -> Order:
        """An order of a row's elements in which a vector of them comes from neighbouring words; as they are if there is none."""
        size, count = int(self.value.shape[-1]), self.per_word
        if self.integers is None or count == 1 or size % (count * lanes):
            return in_order

        def neighbours(u: int, v: Index) -> Index:
            return (u // (count * lanes) * lanes + v) * count + u // lanes % count

        def apart(u: int, v: Index) -> Index:
            return u // lanes % count * (size // count) + u // (count * lanes) * lanes + v

        return next((o for o in (neighbours, apart) if all(self.straight(o, u, lanes) for u in range(0, size, lanes))), in_order)

    def straight(self, order: Order, u: int, lanes: int) -> bool:
        """Whether the lanes of a vector are read from neighbouring places in memory."""
        code = self.args.code
        place, lane = ([tirx.Var(code.fresh("i"), "int64") for _ in self.value.shape[1:]], tirx.Var(code.fresh("v"), "int64"))
        code.analyzer.bind(lane, tvm.ir.Range.from_min_extent(i64(0), i64(lanes)))
        probe = Expressions(self.args, {}, probe=True)
        self.at([*place, code.simplify(order(u, lane))], probe)
        found = [tvm.sym.detect_linear_equation(i64(at), [lane]) for _, at in probe.reads]
        return all(len(f) and code.equal(f[0], int(k == len(found) - 1)) for k, f in enumerate(found))

    def from_table(self, index: Sequence[Index], u: int, order: Order) -> Any:
        """16 integers of 4 bits as floats, those of the vector that starts at place ``u`` of a row in an order of :meth:`order`: a table in
        a register is looked up by the lowest bits of each lane (VPERMPS)."""
        assert self.integers is not None
        code, probe = self.args.code, Expressions(self.args, {}, probe=True)
        self.at([*index, code.simplify(order(u, 0))], probe)
        source, at = probe.reads[-1]
        word = self.args.inputs[source][tirx.Ramp(i64(code.bind_index(at, "words")), i64(1), 16)].astype("int32x16")
        if half := u // 16 % self.per_word:
            word = tirx.shift_right(word, tirx.Broadcast(tirx.const(4 * half, "int32"), 16))
        taken = sum(float(constant_of(z) or 0) for z in self.integers.operands[2:])
        signed = self.integers.operands[0].dtype.kind == "i"
        floats = [n - taken - (16 if signed and n > 7 else 0) for n in range(16)]
        table = tirx.Shuffle([tirx.const(x, F32) for x in floats], list(range(16)))
        return code.bind(tirx.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", table, word), "x", hidden=False)

    def scale(self, index: Sequence[Index]) -> Any:
        """The scale of the row in which an element lies."""
        e, node = Expressions(self.args, {}), self.integers
        assert node is not None
        e.sources = {node.result: lambda at: self._scale(node, at, e)}
        return e.at(self.value, index)

    def fetch(self, index: Callable[[Index], list[Index]], row: Index, ahead: int, columns: range) -> None:
        """Ask for some of the row, so many bytes behind this one, that will be wanted later."""
        code, size = self.args.code, int(self.value.shape[-1])

        def later(width: int) -> Index:
            """The table is read, not asked for: it must hold the row."""
            there = code.simplify(row + max(1, ahead * self.per_word // (size * width)))
            return code.bind_index(code.least(there, code.size(self.value.shape[-2]) - 1), "later") if self.paged else there

        for column in (c for c in columns if c % (LINE // 4) == 0):
            probe = Expressions(self.args, {}, probe=True)
            self.at([*index(row), column], probe)
            for source, _ in probe.reads:
                width = source.dtype.itemsize
                if column * width // self.per_word % LINE == 0:
                    there = Expressions(self.args, {}, probe=True)
                    self.at([*index(later(width)), column], there)
                    code.prefetch(self.args.inputs[source], dict(there.reads)[source])


def parts_of(args: Arguments, value: Value) -> list[tuple[Index, Rows]]:
    """What rows are joined of: the number of each part's first row, and its rows. One part that begins at 0, if nothing is joined."""
    join = joined_rows(value)
    if join is None:
        return [(0, Rows(args, value))]
    out, first = [], 0
    for k, x in enumerate(join.operands):
        out.append((first, Rows(args, value, (k, first))))
        first = args.code.simplify(first + args.code.size(x.shape[-2]))
    return out

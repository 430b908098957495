"""The second factor of a product: how its elements lie, and copying a tile's columns side by side into scratch.

A tile wants ``nr`` neighbouring columns of one row in neighbouring places. Where the factor does not lie so (a transposed
view, a gathered or computed one), a tile's columns are copied once for all the row tiles that use them. Columns that are
contiguous along the summed axis are transposed in registers, a square of lanes at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx
from tvm.ir.expr import TensorLoad

from graphopt.backends.tvm.code import Index, i64
from graphopt.backends.tvm.expr import Arguments, Expressions
from graphopt.backends.tvm.product import operand_index
from graphopt.backends.tvm.squares import transpose_square
from graphopt.ir.graph import Value


class Factor:
    """The factor ``[..., K, N]``, in panels of ``width`` columns.

    Args:
        clamp: whether columns beyond the last must not be read; the last column is read for them.

    Attributes:
        unit: ``column`` if neighbouring columns of a panel are neighbours in memory, ``depth`` if neighbouring rows are,
            else ``none``.
        plain: whether an element is one load, without conversion or computation.
        scalar_only: whether an element needs a function that has no vector form.
    """

    def __init__(self, args: Arguments, value: Value, width: int, clamp: bool) -> None:
        self.args, self.code, self.value, self.width, self.clamp = args, args.code, value, width, clamp
        self.depth, self.columns = (self.code.size(d) for d in value.shape[-2:])
        panel, k, v = (tirx.Var(n, "int64") for n in ("panel", "k", "v"))
        extents = (self.code.ceildiv(self.columns, width), self.depth, width)
        for var, size in zip((panel, k, v), extents, strict=True):
            self.code.analyzer.bind(var, tvm.ir.Range.from_min_extent(i64(0), i64(size)))
        probe = Expressions(args, {}, probe=True)
        lead = [0] * (value.type.rank - 2)
        element = probe.at(value, operand_index(lead, value, k, self.code.simplify(panel * width + v)))
        self.plain = isinstance(element, TensorLoad)
        self.scalar_only = probe.scalar_only
        self.unit = self._unit(probe.addresses, k, v)

    def _unit(self, addresses: Sequence[Any], k: Any, v: Any) -> str:
        if len(addresses) != 1 or isinstance(addresses[0], int):
            return "none"
        found = tvm.sym.detect_linear_equation(addresses[0], [k, v])
        if not len(found):
            return "none"
        along_k, along_v = found[0], found[1]
        return "column" if self.code.equal(along_v, 1) else "depth" if self.code.equal(along_k, 1) else "none"

    def at(self, lead: Sequence[Index], k: Index, j: Index) -> Any:
        """The element at row k and column j."""
        if self.clamp:
            j = self.code.least(j, self.columns - 1)
        return Expressions(self.args, {}).at(self.value, operand_index(lead, self.value, k, j))

    def panel_start(self, lead: Sequence[Index], column: Index) -> tuple[Any, Index] | None:
        """The buffer and the position where the panel from a column on begins; None unless it is contiguous in memory."""
        if self.unit != "column" or not self.plain:
            return None
        places = []
        for k in (0, 1):
            probe = Expressions(self.args, {}, probe=True)
            probe.at(self.value, operand_index(lead, self.value, k, column))
            places.append(probe.reads[0])
        (v, first), (_, second) = places
        return (self.args.inputs[v], first) if self.code.equal(first + self.width, second) else None

    def copy(self, lead: Sequence[Index], column: Index, lanes: int, dtype: str, begin: Index = 0, depth: Index | None = None,
             width: int = 0, back: int = 0) -> Any:  # fmt: skip
        """Write code that copies the panel from a column on; returns the scratch buffer, ``[depth, width]``.

        Args:
            begin: the first row of the copy; ``depth``: how many, all of them unless given.
            width: columns of the copy, those of a panel unless given.
            back: by how many columns its last vector reaches back.
        """
        code = self.code
        depth, width = self.depth if depth is None else depth, width or self.width
        panel = code.alloc(code.simplify(depth * width), dtype, "panel")
        squares: Index = 0
        if self.unit == "depth" and self.plain and lanes > 1 and lanes & (lanes - 1) == 0:
            squares = code.div(depth, lanes)
            if not (isinstance(squares, int) and squares == 0):
                with code.loop(squares, "serial", "k") as k:
                    for u in range(0, width, lanes):
                        shift = back if u + lanes == width else 0
                        to = code.simplify(k * (lanes * width) + u)
                        first = code.simplify(column + (u - shift))
                        self._transpose(panel, lead, code.simplify(begin + k * lanes), first, to, width, lanes)
        rest = code.simplify(depth - squares * lanes)
        if not (isinstance(rest, int) and rest == 0):
            with code.loop(rest, "serial", "k") as k:
                row = code.simplify(squares * lanes + k)
                step = 1 if self.scalar_only else lanes
                for u in range(0, width, step):
                    shift = back if u + lanes >= width else 0
                    with code.loop(step, "vectorized", "v") as v:
                        value = self.at(lead, code.simplify(begin + row), code.simplify(column + (u - shift) + v))
                        code.store(panel, code.simplify(row * width + u + v), value)
        return panel

    def _transpose(self, panel: Any, lead: Sequence[Index], row: Index, column: Index, to: Index, width: int, lanes: int) -> None:
        """One square: a vector along the summed axis for each column, interleaved in log2(lanes) rounds."""
        code = self.code
        rows = []
        for q in range(lanes):
            j = code.simplify(column + q)
            j = code.least(j, self.columns - 1) if self.clamp else j
            first = Expressions(self.args, {}, probe=True).at(self.value, operand_index(lead, self.value, row, j))
            rows.append(code.bind(tirx.BufferLoad(first.source, [tirx.Ramp(i64(first.indices[0]), i64(1), lanes)]), "row"))
        for q, row in enumerate(transpose_square(code, rows, lanes)):
            at = code.simplify(to + q * width)
            code.emit(tirx.BufferStore(panel, row, [tirx.Ramp(i64(at), i64(1), lanes)]))

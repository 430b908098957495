"""Tiles that are read and written by descriptor: the device copies a whole one (TMA), and no thread works out where its elements lie.

    x[row, column] at row * S + column   =>   tiles = descriptor(x, [rows, columns], [S, 1], [BLOCK_M, BLOCK_K]);  tiles.load([row0, k0])

An axis of the tensor is one of the tile or, with a block of one, a number such as that of a batch. What lies beyond the extents is
read as zero and not written.
The tensor begins at a multiple of 16 bytes, as does each of its rows, and a part of it that is read: the first is seen to when a kernel is
launched (:mod:`.tensormap`), the others are proven here. NVIDIA, "CUDA driver API", tensor map objects.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.backends.triton.code import Code, Descriptor
from graphopt.backends.triton.index import Places, Sum, Var, exact
from graphopt.ir import types
from graphopt.ir.types import DType

ALIGNED = 16  # bytes at a multiple of which a tensor and its rows begin
MOST_AXES = 5


@dataclass(frozen=True)
class Block:
    """A tile of a tensor.

    Attributes:
        name: of its descriptor.
        at: where it begins, as text: a number for each axis of the tensor.
        box: its shape with an axis of one for each that is no axis of the tile, as text; empty where there is none.
        sides: its shape, as text, rows of memory first.
        across: its rows are the columns of the memory's rows.
        depth: loops within which that stands.
    """

    name: str
    at: str
    box: str
    sides: str
    across: bool
    depth: int

    @property
    def read(self) -> str:
        """What reads it."""
        text = f"{self.name}.load([{self.at}])"
        if self.box:
            text = f"tl.reshape({text}, [{self.sides}])"
        return f"tl.trans({text})" if self.across else text

    def written(self, value: str) -> str:
        """What writes a value to it."""
        if self.across:
            value = f"tl.trans({value})"
        return f"{self.name}.store([{self.at}], {f'tl.reshape({value}, [{self.box}])' if self.box else value})"


class Descriptors:
    """The descriptors of a kernel under construction."""

    def __init__(self, code: Code, places: Places) -> None:
        self.code, self.places = code, places

    def block(self, tensor: str, dtype: DType, at: Sum) -> Block | None:
        """The tile at a place in memory; None where no descriptor tells it.

        Args:
            tensor: the parameter's name.
        """
        spans, code = self.code.spans, self.code
        if dtype == types.b1:
            return None
        wide = [(v, step) for v, step in at.terms if isinstance(v, Var) and v.axes]
        single = [(a, step) for a, step in at.terms if not (isinstance(a, Var) and a.axes)]
        if len(wide) != 2 or len(at.terms) > MOST_AXES or any(code.place(Sum(((a, 1),))).axes for a, _ in single):
            return None
        (row, step), (column, one) = wide if wide[1][1] == 1 else reversed(wide)
        if one != 1 or row.axes == column.axes or row.name not in spans or column.name not in spans:
            return None
        strides = [*(s for _, s in single), step]
        if any(exact(s, max(1, ALIGNED // dtype.itemsize)) is None for s in (at.start, *strides)):
            return None
        if not self.places.is_nonnegative(Sum((), at.start)):
            return None
        ends = [self.places.end(a) for a, _ in single]
        if any(n is None for n in ends):
            return None
        shape = tuple(n for n in (*ends, row.extent, column.extent) if n is not None)
        tile = tuple(spans[v.name] for v in (row, column))
        box = (*(1 for _ in single), *(t.size for t in tile))
        name = self._named(Descriptor(tensor, dtype, at.start, shape, (*strides, 1), box))
        starts = [*(code.place(Sum(((a, 1),))).text for a, _ in single), *(t.start for t in tile)]
        sides = [t.size_name for t in tile]
        at_text = ", ".join(self._coordinate(s) for s in starts)
        whole = ", ".join([*("1" for _ in single), *sides]) if single else ""
        return Block(name, at_text, whole, ", ".join(sides), row.axes != {0}, max(v.depth for v in (row, column)))

    def _named(self, d: Descriptor) -> str:
        name = next((n for n, other in self.code.descriptors.items() if other == d), "") or self.code.fresh("tiles")
        self.code.descriptors[name] = d
        return name

    def _coordinate(self, text: str) -> str:
        return f"tl.cast({text}, tl.int32)" if self.code.wide and not text.isdigit() else text

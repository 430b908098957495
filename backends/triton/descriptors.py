"""Tiles that are read by descriptor: the device copies a whole one (TMA), and no thread works out where its elements lie.

    x[row, column] at row * S + column   =>   tiles = descriptor(x, [rows, columns], [S, 1], [BLOCK_M, BLOCK_K]);  tiles.load([row0, k0])

An axis of the tensor is one of the tile or, with a block of one, a number such as that of a batch. What lies beyond the extents is zero.
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
    """A descriptor's tile.

    Attributes:
        text: what reads it.
        depth: loops within which that stands.
    """

    text: str
    depth: int


class Descriptors:
    """The descriptors of a kernel under construction."""

    def __init__(self, code: Code, places: Places) -> None:
        self.code, self.places = code, places

    def load(self, tensor: str, dtype: DType, at: Sum) -> Block | None:
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
        text = f"{name}.load([{', '.join(self._coordinate(s) for s in starts)}])"
        if single:
            text = f"tl.reshape({text}, [{', '.join(t.size_name for t in tile)}])"
        return Block(text if row.axes == {0} else f"tl.trans({text})", max(v.depth for v in (row, column)))

    def _named(self, d: Descriptor) -> str:
        name = next((n for n, other in self.code.descriptors.items() if other == d), "") or self.code.fresh("tiles")
        self.code.descriptors[name] = d
        return name

    def _coordinate(self, text: str) -> str:
        return f"tl.cast({text}, tl.int32)" if self.code.wide and not text.isdigit() else text

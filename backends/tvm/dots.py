"""Products of few rows with a factor that is contiguous along the summed axis: vectors run along that axis.

A matrix times a vector reads the matrix once, in the order in which it lies in memory, instead of transposing it first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.code import Code, Index
from graphopt.backends.tvm.monoid import Monoid, combine
from graphopt.ir.types import DType

SUMS = 16  # vectors of partial sums that stay in registers beside their operands
Element = Callable[[Index, Index], Any]


def columns_at_once(rows: int, columns: int) -> int:
    """Columns whose sums run side by side: 8, or as many as there are, or fewer of several rows."""
    return max(1, min(8, columns, SUMS // rows))


def sum_dots(code: Code, depth: Index, rows: Sequence[Index], columns: int, lanes: int, dtype: DType, held: str,
             left: Element, right: Element) -> Any:  # fmt: skip
    """Write code for a tile of dot products.

    Args:
        rows: index of each of the tile's rows.
        left: (row, k) -> element of the first factor; ``right``: (k, column of the tile) -> element of the second.

    Returns:
        A buffer with the sums, ``[rows, columns]``.
    """
    tile = code.alloc(len(rows) * columns, held, "tile")
    side = columns_at_once(len(rows), columns)
    zero, m = tirx.const(0, held), Monoid.of("sum", dtype)
    whole = code.div(depth, lanes)

    def together(first: Index, count: int) -> None:
        """The sums of so many columns from the first on."""
        cells = [(i, c) for i in range(len(rows)) for c in range(count)]
        sums = {cell: code.alloc(lanes, held, "acc") for cell in cells}
        for cell in cells:
            with code.loop(lanes, "vectorized", "v") as v:
                code.store(sums[cell], v, zero)
        with code.loop(whole, "serial", "k") as k:
            for c in range(count):
                for i, r in enumerate(rows):
                    with code.loop(lanes, "vectorized", "v") as v:
                        at = code.simplify(k * lanes + v)
                        product = left(r, at) * right(at, code.simplify(first + c))
                        code.store(sums[i, c], v, code.load(sums[i, c], v) + product)
        for i, c in cells:
            code.store(tile, code.simplify(first + i * columns + c), combine(code, sums[i, c], lanes, lanes, m))
        rest = code.simplify(depth - whole * lanes)
        if not (isinstance(rest, int) and rest == 0):
            with code.loop(rest, "serial", "k") as k:
                for i, c in cells:
                    at, place = code.simplify(whole * lanes + k), code.simplify(first + i * columns + c)
                    code.store(tile, place, code.load(tile, place) + left(rows[i], at) * right(at, code.simplify(first + c)))

    with code.loop(columns // side, "serial", "side") as s:
        together(code.simplify(s * side), side)
    if columns % side:
        together(columns - columns % side, columns % side)
    return tile

"""Dropout of an attention's weights: lines of words of 32 bits, and which weights of a tile are kept."""

from __future__ import annotations

from graphopt.backends.triton.code import Text
from graphopt.backends.triton.expr import Expressions, Index
from graphopt.backends.triton.index import Sum
from graphopt.ir.dims import Shape
from graphopt.ir.graph import Value
from graphopt.ir.opset.dropout import Chances, least_kept


class _Lines:
    """Words as values of uint32, in which products and shifts are those of unsigned words."""

    def __init__(self, e: Expressions) -> None:
        self.code = e.code

    def xor(self, x: Text, y: Text | int) -> Text:
        return self._word(f"{x.text} ^ {y.text}", x, y) if isinstance(y, Text) else self._word(f"{x.text} ^ {y:#x}", x)

    def right(self, x: Text, bits: int) -> Text:
        return Text(f"({x.text} >> {bits})", x.axes, x.depth)

    def times(self, x: Text, c: int) -> Text:
        return self._word(f"{x.text} * {c:#x}", x)

    def _word(self, text: str, *of: Text) -> Text:
        depth = max(x.depth for x in of)
        return Text(self.code.let("word", text, depth), frozenset(a for x in of for a in x.axes), depth)

    def of(self, number: Text) -> Text:
        """The lower 32 bits of a number."""
        text = f"tl.full((), {number.text}, tl.int64)" if number.text.isdigit() else number.text
        return Text(self.code.let("word", f"{text}.to(tl.uint32)", number.depth), number.axes, number.depth)


class Dropped:
    """The dropout of one attention; see :mod:`graphopt.ir.opset.dropout`.

    Attributes:
        scale: what is kept is multiplied by; 1.0 without dropout.
    """

    def __init__(self, e: Expressions, seed: Value | None, rate: float) -> None:
        self.e, self.seed, self.least = e, seed, least_kept(rate)
        self.words, self.scale = _Lines(e), 1.0 / (1.0 - rate)
        self._chances: Chances[Text] | None = None
        self._rows: dict[Sum, tuple[Text, Text]] = {}
        self._columns: dict[Sum, Text] = {}
        self._elements: dict[tuple[Sum, Sum], Text] = {}

    def kept(self, value: str, lead: Index, row: Sum, rows: Shape, column: Sum) -> str:
        """What dropout makes of a tile, but for the scale: itself, or zero.

        Args:
            lead, row: the tile's rows, numbers of ``rows``: the batch, heads and queries.
        """
        if self.seed is None or self.least == 0:
            return value
        if self._chances is None:
            self._chances = Chances(self.words, *self._halves(self.seed))
        at = self.e.places.flatten([*lead, row], rows)
        if at not in self._rows:
            self._rows[at] = self._chances.of_row(self._number(at))
        if column not in self._columns:
            self._columns[column] = self._chances.of_column(self._number(column))
        if (at, column) not in self._elements:
            self._elements[at, column] = Chances.of_element(self.words, *self._rows[at], self._columns[column])
        return self.e.code.let("kept", f"tl.where({self._elements[at, column].text} > {self.least - 1:#x}, {value}, 0.0)")

    def _halves(self, seed: Value) -> tuple[Text, Text]:
        low = self.e.at(seed, [])
        return self.words.of(Text(low.text)), self.words.of(Text(f"({low.text} >> 32)"))

    def _number(self, at: Sum) -> Text:
        return self.words.of(self.e.code.place(at))

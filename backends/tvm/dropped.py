"""Dropout of an attention's weights: words of a block's keys and of a group's queries, and which weights of the two are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.forms.flashform import Form
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.expr import Arguments, Expressions
from graphopt.ir.opset.dropout import ALL, Chances, least_kept, signed

U32 = "uint32"


class _Vectors:
    """Words as expressions of uint32, in which no product overflows: TVM tells LLVM that none does."""

    def __init__(self, code: Code) -> None:
        self.code = code

    def xor(self, x: Any, y: Any) -> Any:
        return self.code.bind(tirx.bitwise_xor(x, tirx.const(y, U32) if isinstance(y, int) else y))

    def right(self, x: Any, bits: int) -> Any:
        return tirx.shift_right(x, tirx.const(bits, U32))

    def times(self, x: Any, c: int) -> Any:
        return self.code.bind((x.astype("int64") * tirx.const(signed(c), "int64")).astype(U32))  # LLVM makes one product of words of it


class Dropped:
    """The dropout of one attention; see :mod:`graphopt.ir.opset.dropout`.

    Attributes:
        given: whether there is any.
        scale: what is left is multiplied by.
    """

    def __init__(self, args: Arguments, form: Form) -> None:
        self.args, self.code, self.form = args, args.code, form
        self.rate = form.node.attrs["dropout"]
        self.given, self.scale = bool(self.rate), 1.0 / (1.0 - self.rate)
        self.words = _Vectors(self.code)

    def alloc(self, block: int, rows: int, lanes: int) -> None:
        """Scratch for a block of keys and ``rows`` queries."""
        if not self.given:
            return
        code, self.lanes = self.code, lanes
        self.keys = code.alloc(-(-block // lanes) * lanes, U32, "key_words")
        self.first, self.second = (code.alloc(rows, U32, name) for name in ("first_words", "second_words"))
        seed = Expressions(self.args, {}).at(self.form.parts.seed, [])  # type: ignore[arg-type]
        low, high = (code.bind(self._word(x), "seed") for x in (seed, tirx.shift_right(seed, tirx.const(32, "int64"))))
        self.chances = Chances[Any](self.words, low, high)

    @staticmethod
    def _word(x: Any) -> Any:
        return tirx.bitwise_and(x, tirx.const(ALL, "int64")).astype(U32)

    def keys_of(self, base: Index, count: Index) -> None:
        """Words of the keys from ``base`` on."""
        if not self.given:
            return
        code, lanes = self.code, self.lanes
        vectors = code.ceildiv_plain(count, lanes)
        with code.loop(vectors if isinstance(vectors, int) else code.bind_index(vectors, "vectors"), "serial", "s") as s, self._lane() as v:
            at = code.simplify(s * lanes + v)
            code.store(self.keys, at, self.chances.of_column(self._number(base, at)))

    def rows_of(self, lead: Sequence[Index], first: Index, place: Index, rows: int) -> None:
        """Words of ``rows`` queries of a head, to ``place``."""
        if not self.given:
            return
        code = self.code
        sizes = [code.size(d) for d in (*self.form.batch, self.form.queries)]
        start = code.bind_index(code.flatten([*lead, first], sizes), "row")
        with code.loop(rows // self.lanes, "serial", "s") as s, self._lane() as v:
            at = code.simplify(s * self.lanes + v)
            words = self.chances.of_row(self._number(start, at))
            for buffer, word in zip((self.first, self.second), words, strict=True):
                code.store(buffer, code.simplify(place + at), word)

    def _lane(self) -> Any:
        return self.code.loop(self.lanes, "vectorized", "v")

    def _number(self, start: Index, at: Index) -> Any:
        return self.code.bind(self._word(i64(start) + i64(at)))

    def kept(self, row: Index, column: Any) -> Callable[[Any], Any]:
        """What dropout makes of an f32 of a query and a key, but for the scale: itself, or zero. ``column``: of :meth:`column`."""
        if not self.given:
            return lambda x: x
        code, zero, least = self.code, tirx.const(0.0, "float32"), least_kept(self.rate)
        if least > ALL:
            return lambda x: zero
        chance = Chances.of_element(self.words, code.load(self.first, row), code.load(self.second, row), column)
        return lambda x: code.bind(tirx.Select(chance >= tirx.const(least, U32), x, zero))

    def column(self, key: Index) -> Any:
        """The word of a key of the block."""
        return self.code.load(self.keys, key) if self.given else None

"""What an attention reads and writes: matrices of keys and values wherever they lie, what is added to scores, and the result's places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx
from tvm.ir.expr import TensorLoad

from graphopt.backends.forms.flashform import Form, norms_of
from graphopt.backends.forms.support import VIEWS, constant_of
from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.expr import Arguments, Expressions, broadcast_index, reshape_groups
from graphopt.backends.tvm.loops import vector_loop, vector_steps
from graphopt.backends.tvm.prologue import unknown, write_row
from graphopt.backends.tvm.squares import transpose_square
from graphopt.ir import types
from graphopt.ir.graph import Node, Value
from graphopt.ir.opset.attention import groups

LOG2E = math.log2(math.e)
_LEAST = -(2.0**127)  # of what is added to scores: it hides a key beside others, and is a number
F32 = "float32"
LINE = 64  # bytes of a cache line
NONE, SOME, ALL = range(3)  # of a block's pairs of a query and a key, those that a mask leaves


def head_index(code: Code, form: Form, v: Value, lead: Sequence[Index]) -> list[Index]:
    """The batch index of queries, keys or values for a batch index of the result: broadcast, heads that are shared divided."""
    rank = v.type.rank - 2
    index = list(lead[len(lead) - rank :]) if rank else []
    share = groups(form.parts.q.shape, v.shape) if v is not form.parts.q else 1
    if share > 1:
        index[-1] = code.bind_index(code.div(index[-1], share), "head")
    return [0 if d == 1 else i for i, d in zip(index, v.shape[:-2], strict=True)]


def place_of(args: Arguments, form: Form, index: Sequence[Index]) -> Index:
    """Where in the output's memory an element of the attention's result lies."""
    code, at = args.code, list(index)
    for node in form.views:
        if node.name == "transpose":
            at = [at[p] for p in node.attrs["perm"]]
            continue
        old, new = ([code.size(d) for d in v.shape] for v in (node.operands[0], node.result))
        out: list[Index] = [0] * len(new)
        for a, b in reshape_groups(node.operands[0].shape, node.result.shape):
            flat = code.flatten([at[k] for k in a], [old[k] for k in a])
            for k, i in zip(b, code.unflatten(flat, [new[k] for k in b]), strict=True):
                out[k] = i
        at = out
    return args.place(0, at)


class Matrix:
    """The keys or values of one head, ``[N, D]``, in memory as they are.

    Attributes:
        plain: whether an element is an f32 at an address that is linear in row and column.
        padded: whether rows behind the last may be read.
    """

    def __init__(self, args: Arguments, value: Value, lead: Sequence[Index]) -> None:
        self.args, self.code, self.value, self.lead, self.padded = args, args.code, value, list(lead), False
        code = self.code
        row, column = (tirx.Var(code.fresh(n), "int64") for n in ("r", "c"))
        for var, size in ((row, value.shape[-2]), (column, value.shape[-1])):
            code.analyzer.bind(var, tvm.ir.Range.from_min_extent(i64(0), i64(code.size(size))))
        probe = Expressions(args, unknown(norms_of(value)), probe=True)
        element = probe.at(value, [*lead, row, column])
        self.plain = False
        if isinstance(element, TensorLoad) and str(element.ty.dtype) == F32 and len(probe.reads) == 1:
            source, address = probe.reads[0]
            found = [] if isinstance(address, int) else list(tvm.sym.detect_linear_equation(address, [row, column]))
            if found:
                self.plain = True
                self.buffer = args.inputs[source]
                self.rows, self.columns, start = (code.simplify(x) for x in found)
                self.start = code.bind_index(start, "matrix")

    def moved(self, base: Index) -> Matrix:
        """The matrix from a row on."""
        out = object.__new__(Matrix)
        out.__dict__.update(self.__dict__)
        out.start = self.code.bind_index(self.code.simplify(self.start + base * self.rows), "block")
        return out

    def row(self, i: Index) -> Index:
        """Where a row starts."""
        return self.code.bind_index(self.code.simplify(self.start + i * self.rows), "at")

    def at(self, start: Index, i: Index, j: Index) -> Any:
        """The element i rows and j columns behind a place."""
        return self.code.load(self.buffer, self.code.simplify(start + i * self.rows + j * self.columns))

    def transposed_at(self, start: Index, j: Index, i: Index) -> Any:
        return self.at(start, i, j)

    def staged(self, block: int, lanes: int) -> Staged:
        """Scratch for a block of rows."""
        columns = int(self.value.shape[-1])
        return Staged(self.code.alloc(block * columns, F32, "staged"), columns, lanes)


@dataclass
class Staged:
    """A block of rows, copied to scratch as f32."""

    buffer: Any
    columns: int
    lanes: int

    def fill(self, m: Matrix, base: Index, count: Index) -> Matrix:
        """Copy rows from ``base`` on."""
        code, args = m.code, m.args
        with code.loop(count, "serial", "c") as i:
            row = code.bind_index(code.simplify(base + i), "row")

            def element(d: Index, x: Any) -> None:
                code.store(self.buffer, code.simplify(i * self.columns + d), x)

            write_row(args, m.value, lambda d: [*m.lead, row, d], self.lanes, element)
        out = object.__new__(Matrix)
        out.__dict__.update(m.__dict__)
        out.__dict__.update(buffer=self.buffer, rows=self.columns, columns=1, start=0, padded=True)
        return out


Order = Callable[[int, Index], Index]  # the element at a place of a row's vectors: lane v of the vector that starts at u


def in_order(u: int, v: Index) -> Index:
    return u + v


class Rows:
    """Keys or values, a row at a time: floats, or integers and a scale for all of a row.

    Attributes:
        integers: what dequantizes the value, behind views; None if nothing does.
        per_word: integers that stand in one element of memory, along the row.
        paged: whether a table says where rows are.
    """

    def __init__(self, args: Arguments, value: Value) -> None:
        self.args, self.value = args, value
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
        if self.integers is not None:
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

        return next((o for o in (neighbours, apart) if all(self._straight(o, u, lanes) for u in range(0, size, lanes))), in_order)

    def _straight(self, order: Order, u: int, lanes: int) -> bool:
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

    def fetch(self, index: Callable[[Index], list[Index]], row: Index, ahead: int) -> None:
        """Ask for the row, so many bytes behind this one, that will be wanted later."""
        code, size = self.args.code, int(self.value.shape[-1])

        def later(width: int) -> Index:
            """The table is read, not asked for: it must hold the row."""
            there = code.simplify(row + max(1, ahead * self.per_word // (size * width)))
            return code.bind_index(code.least(there, code.size(self.value.shape[-2]) - 1), "later") if self.paged else there

        for column in range(0, size, LINE // 4):
            probe = Expressions(self.args, {}, probe=True)
            self.at([*index(row), column], probe)
            for source, _ in probe.reads:
                width = source.dtype.itemsize
                if column * width // self.per_word % LINE == 0:
                    there = Expressions(self.args, {}, probe=True)
                    self.at([*index(later(width)), column], there)
                    code.prefetch(self.args.inputs[source], dict(there.reads)[source])


class Extra:
    """What is added to scores: a bias, a mask, slopes by position; and sinks. All in logarithms of base 2.

    A bias or mask that is the same for all queries is read once a block of keys, for all groups; another one is read row by row,
    and transposed.

    Attributes:
        given: whether anything is added to scores.
        scans: whether a mask is looked through before a block is: what it hides wholly is left out, and where it hides nothing it is
            not read again.
    """

    def __init__(self, args: Arguments, form: Form, fill: float) -> None:
        self.args, self.code, self.form, self.fill = args, args.code, form, fill
        p = form.parts
        self.tables = [v for v in (p.bias, p.mask) if v is not None]
        self.of_keys = all(v.type.rank < 2 or v.shape[-2] == 1 for v in self.tables)
        self.slopes, self.sinks = p.slopes, p.sinks
        self.given = bool(self.tables) or p.slopes is not None
        self.scans = p.mask is not None and not form.reads_all
        self.m, self.n = self.code.size(form.queries), self.code.size(form.keys)

    def alloc(self, block: int, nr: int, lanes: int) -> None:
        code = self.code
        self.nr, self.lanes, self.step = nr, lanes, -(-block // lanes) * lanes
        if self.tables and self.of_keys:
            self.buffer = code.alloc(self.step, F32, "added")
        elif self.tables:
            self.rows = code.alloc(nr * self.step, F32, "table")
            self.buffer = code.alloc(self.step * nr, F32, "added")

    def value(self, lead: Sequence[Index], q: Index, n: Index) -> Any:
        """What bias and mask add to a score."""
        code, p, e = self.code, self.form.parts, Expressions(self.args, {})
        value = tirx.const(0.0, F32)
        index = [*lead, q, n]
        if p.bias is not None:
            added = code.bind(e.at(p.bias, broadcast_index(p.bias, index)))
            # the least number times this would be -inf, and a row of such numbers nan in the place of the mean of all values
            scaled = tirx.max(added * tirx.const(LOG2E, F32), tirx.const(_LEAST, F32))
            value = code.bind(tirx.Select(added > tirx.const(float("-inf"), F32), scaled, added))
        if p.mask is not None:
            value = code.bind(tirx.Select(e.at(p.mask, broadcast_index(p.mask, index)), value, tirx.const(self.fill, F32)))
        return value

    def scan(self, lead: Sequence[Index], first: Index, base: Index, count: Index) -> Any:
        """What a mask leaves of a block, from query ``first`` on: ``NONE``, ``SOME`` or ``ALL`` of its pairs."""
        code, mask, lanes = self.code, self.form.parts.mask, self.lanes
        assert mask is not None
        same, wide = mask.type.rank < 2 or mask.shape[-2] == 1, 4 * lanes
        plain = mask
        while plain.producer is not None and plain.producer.name in VIEWS:
            plain = plain.producer.operands[0]

        def bit(row: Index, at: Index) -> Any:
            """An element, as a byte."""
            e = Expressions(self.args, {}, probe=plain.is_input)
            value = e.at(mask, broadcast_index(mask, [*lead, row, code.simplify(base + at)]))
            if plain.is_input:  # truth values lie in memory as 0 and 1
                return code.load(self.args.inputs[plain], e.reads[0][1])
            return tirx.Select(value, tirx.const(1, "uint8"), tirx.const(0, "uint8"))

        sizes = dict.fromkeys((wide, 1))
        seen, every = ({n: code.alloc(n, "uint8", name) for n in sizes} for name in ("seen", "every"))
        for buffers, start in ((seen, 0), (every, 1)):
            for n, buffer in buffers.items():
                with code.loop(n, "vectorized", "v") as v:
                    code.store(buffer, v, tirx.const(start, "uint8"))
        with code.loop(1 if same else self.nr, "serial", "i") as i:
            row = 0 if same else code.bind_index(code.least(first + i, self.m - 1), "row")

            def step(at: Index, width: int) -> None:
                with code.loop(width, "vectorized", "v") as v:
                    x = code.bind(bit(row, at + v))
                    code.store(seen[width], v, tirx.bitwise_or(code.load(seen[width], v), x))
                    code.store(every[width], v, tirx.bitwise_and(code.load(every[width], v), x))

            vector_steps(code, 0, count, wide, step)

        def joined(buffers: dict[int, Any], how: str, join: Callable[[Any, Any], Any]) -> Any:
            many = tirx.call_llvm_pure_intrin("uint8", f"llvm.vector.reduce.{how}", buffers[wide][tirx.Ramp(i64(0), i64(1), wide)])
            return code.bind(join(code.bind(many), code.load(buffers[1], 0)).astype("int32"))

        return code.bind(joined(seen, "or", tirx.bitwise_or) + joined(every, "and", tirx.bitwise_and))

    def keys_of(self, lead: Sequence[Index], base: Index, count: Index) -> None:
        """Read what is the same for all queries."""
        if not self.tables or not self.of_keys:
            return
        code = self.code
        vector_loop(code, 0, count, self.lanes, lambda n: code.store(self.buffer, n, self.value(lead, 0, code.simplify(base + n))))

    def block_of(self, lead: Sequence[Index], first: Index, base: Index, count: Index) -> None:
        """Read what each query has of its own, and transpose it."""
        if not self.tables or self.of_keys:
            return
        code, nr, lanes, step = self.code, self.nr, self.lanes, self.step
        with code.loop(nr, "serial", "i") as i:
            row = code.bind_index(code.least(first + i, self.m - 1), "row")

            def element(n: Index) -> None:
                code.store(self.rows, code.simplify(i * step + n), self.value(lead, row, code.simplify(base + n)))

            vector_loop(code, 0, count, lanes, element)
        squares = code.ceildiv_plain(count, lanes)
        with code.loop(nr // lanes, "serial", "sr") as r, code.loop(squares, "serial", "sc") as c:
            vectors = []
            for k in range(lanes):
                at = i64(code.simplify((r * lanes + k) * step + c * lanes))
                vectors.append(code.bind(tirx.BufferLoad(self.rows, [tirx.Ramp(at, i64(1), lanes) if lanes > 1 else at]), "row"))
            for k, x in enumerate(transpose_square(code, vectors, lanes) if lanes > 1 else vectors):
                at = i64(code.simplify((c * lanes + k) * nr + r * lanes))
                code.emit(tirx.BufferStore(self.buffer, x, [tirx.Ramp(at, i64(1), lanes) if lanes > 1 else at]))

    def row(self, lead: Sequence[Index], key: Index, base: Index, first: Index, tables: bool = True) -> Callable[[Any, Index], Any]:
        """How the scores of a key (counted from ``base``) change: of a score and the query's place in its group.

        Args:
            tables: false where bias and mask change nothing.
        """
        code, slopes = self.code, self.form.parts.slopes
        tables = tables and bool(self.tables)
        same = code.bind(code.load(self.buffer, key)) if tables and self.of_keys else None
        slope = distance = None
        if slopes is not None:
            slope = self.slope(lead)
            distance = code.bind((i64(base) + i64(key) - i64(first)).astype("int32"))

        def change(s: Any, at: Index) -> Any:
            if same is not None:
                s = code.bind(s + same)
            elif tables:
                s = code.bind(s + code.load(self.buffer, code.simplify(key * self.nr + at)))
            if slope is not None:
                s = code.bind(s + slope * (distance - i64(at).astype("int32")).astype(F32))
            return s

        return change

    def slope(self, lead: Sequence[Index]) -> Any:
        """What a step to the right adds to a head's scores."""
        slopes = Expressions(self.args, {}).at(self.slopes, [lead[-1] if lead else 0])  # type: ignore[arg-type]
        return self.code.bind(slopes * tirx.const(LOG2E, F32))

    def sink(self, lead: Sequence[Index]) -> tuple[Any, Any]:
        """The maximum and the total before any key: of nothing, or of the head's sink."""
        sinks, low = self.form.parts.sinks, tirx.const(float("-inf"), F32)
        if sinks is None:
            return low, tirx.const(0.0, F32)
        code = self.code
        top = code.bind(Expressions(self.args, {}).at(sinks, [lead[-1] if lead else 0]) * tirx.const(LOG2E, F32))
        return top, code.bind(tirx.Select(tirx.EQ(top, low), tirx.const(0.0, F32), tirx.const(1.0, F32)))

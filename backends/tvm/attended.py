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
from graphopt.backends.forms.support import behind_views
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.expr import Arguments, Expressions, broadcast_index, reshape_groups
from graphopt.backends.tvm.loops import vector_loop, vector_steps
from graphopt.backends.tvm.prologue import unknown, write_row
from graphopt.backends.tvm.squares import transpose_square
from graphopt.ir.graph import Value
from graphopt.ir.opset.attention import BLOCK, groups

LOG2E = math.log2(math.e)
_LEAST = -(2.0**127)  # of what is added to scores: it hides a key beside others, and is a number
F32 = "float32"
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


class Extra:
    """What is added to scores: a bias, a mask, slopes by position; and sinks. All in logarithms of base 2.

    A bias or mask that is the same for all queries is read once a block of keys, for all groups; another one is read row by row,
    and transposed, unless neighbouring queries lie side by side in memory.

    Attributes:
        given: whether anything is added to scores.
        scans: whether a mask, or its table, is looked through before a block is: what it hides wholly is left out, and where it hides
            nothing it is not read again.
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
        self.side_by_side = self._side_by_side()
        if self.tables and self.of_keys:
            self.buffer = code.alloc(self.step, F32, "added")
        elif self.tables:
            if not self.side_by_side:
                self.rows = code.alloc(nr * self.step, F32, "table")
            self.buffer = code.alloc(self.step * nr, F32, "added")

    def _side_by_side(self) -> bool:
        """Whether a bias, and nothing beside it, has neighbouring queries next to each other, in whole vectors."""
        bias = self.form.parts.bias
        if bias is None or self.tables != [bias] or self.of_keys or not isinstance(self.m, int):
            return False
        padded = bias
        if self.m % self.lanes and bias.producer is not None and bias.producer.name == "slice":
            padded = bias.producer.operands[0]
        rows, row = padded.shape[-2], tirx.Var(self.code.fresh("r"), "int64")
        if not isinstance(rows, int) or rows % self.lanes or rows - self.m >= self.lanes:
            return False
        probe = Expressions(self.args, {}, probe=True)
        probe.at(bias, broadcast_index(bias, [*(0 for _ in self.form.batch), row, 0]))
        if len(probe.reads) != 1 or isinstance(probe.reads[0][1], int):
            return False
        found = list(tvm.sym.detect_linear_equation(probe.reads[0][1], [row]))
        return bool(found) and self.code.equal(found[0], 1)

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
        if self.form.parts.table is not None:
            return self._look_up(self.form.parts.table, lead, first, base, count)
        code, mask, lanes = self.code, self.form.parts.mask, self.lanes
        assert mask is not None
        same, wide = mask.type.rank < 2 or mask.shape[-2] == 1, 4 * lanes
        plain = behind_views(mask)

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

    def _look_up(self, table: Value, lead: Sequence[Index], first: Index, base: Index, count: Index) -> Any:
        """The same of all elements of a mask's table that the block touches: ``SOME`` where that is not known to be more or less."""
        code, one, (rows, keys) = self.code, tirx.const(1, "uint8"), BLOCK
        seen, every = (code.alloc(1, "uint8", name) for name in ("seen", "every"))
        code.store(seen, 0, tirx.const(0, "uint8"))
        code.store(every, 0, one)
        top, left = code.bind_index(code.div(first, rows), "top"), code.bind_index(code.div(base, keys), "left")
        fits = self.nr % rows == 0 or rows % self.nr == 0  # groups start at multiples of nr
        high = max(1, self.nr // rows) if fits else (self.nr + rows - 2) // rows + 1
        last = code.size(table.shape[-2]) - 1
        wide = code.bind_index(code.simplify(code.div(base + count - 1, keys) - left + 1), "wide")
        with code.loop(high, "serial", "i") as i, code.loop(wide, "serial", "j") as j:
            index = [*lead, code.least(top + i, last), code.simplify(left + j)]
            x = code.bind(Expressions(self.args, {}).at(table, broadcast_index(table, index)))
            code.store(seen, 0, tirx.bitwise_or(code.load(seen, 0), tirx.bitwise_and(x, one)))
            code.store(every, 0, tirx.bitwise_and(code.load(every, 0), x >> one))
        return code.bind(code.load(seen, 0).astype("int32") + code.load(every, 0).astype("int32"))

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
        if self.side_by_side:
            last = -(-int(self.m) // lanes) * lanes - lanes  # a vector of queries that are none repeats the last one
            starts = [code.bind_index(code.least(first + u, last), "start") for u in range(0, nr, lanes)]
            with code.loop(count, "serial", "n") as n:
                for u, start in zip(range(0, nr, lanes), starts, strict=True):
                    with code.loop(lanes, "vectorized", "v") as v:
                        value = self.value(lead, code.simplify(start + v), code.simplify(base + n))
                        code.store(self.buffer, code.simplify(n * nr + u + v), value)
            return
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

"""Products of many rows with a weight of 8-bit integers, one scale a column, on AMX tiles.

The first factor's elements are four bytes each (:mod:`keybytes`), counted from the power of two below the largest of their row. Sums of
products of bytes are exact in i32; four of them, rounded once each, are put together. So the error is below that of a sum of f32, and
tiles multiply a third as often as for f32 from thirds.

Rows become bytes once, shared among the cores. A task interleaves a panel's rows, four bytes in a word, as the second factor of a tile
product has them, for all of its row tiles. Their columns are in another order then, which is put right where sums leave the tiles.

A row is summed again, as floats, if bytes would lose digits: it is not finite, or below 2**-90, or seven of eight of its elements that
are not zero are below 2**-10 of its largest. That is slow, so rows of which more elements are large are let through: an output that
gives none of those any weight can have a greater error than a sum of f32.

Reference: as in :mod:`amx`.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from graphopt.backends.tvm import amx, keybytes
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Arguments, Expressions
from graphopt.backends.tvm.keybytes import BYTES, LANES, PARTS
from graphopt.backends.tvm.loops import SMALL, product, vector_loop
from graphopt.backends.tvm.product import operand_index
from graphopt.backends.tvm.quantform import Quantized, quantized
from graphopt.backends.tvm.rowstore import RowStore
from graphopt.errors import BuildError
from graphopt.ir.graph import Graph

TILE = amx.ROWS * BYTES  # bytes of a tile
WORDS = TILE // 4
COLUMNS = 64  # of a panel: four tiles
F32 = "float32"
_FEW = 7  # so many elements count as little as one that is large
_AHEAD = 3072  # bytes of a panel, asked for while its rows are interleaved


class QuantizedTilesKernel:
    """Emits a region with one matmul, or two of one first factor, and a pointwise epilogue of the product's shape.

    Args:
        group: row tiles of a task.
        panels: of a task.
    """

    def __init__(self, graph: Graph, group: int, panels: int, parallel: bool) -> None:
        self.graph, self.parallel = graph, parallel
        nodes = [n for n in graph.nodes() if n.name == "matmul"]
        forms = [quantized(n.operands[1]) for n in nodes]
        self.forms: list[Quantized] = [f for f in forms if f is not None]
        if len(self.forms) != len(nodes):
            raise BuildError("the second factor is not of packed integers")
        self.left = nodes[0].operands[0]
        self.code = code = Code(graph.symbols)
        self.args = Arguments(code, graph)
        self.depth, self.steps = int(self.left.shape[-1]), int(self.left.shape[-1]) // BYTES
        self.lead = [code.size(d) for d in nodes[0].result.shape[:-1]]
        self.m = code.bind_index(product(code, self.lead), "rows")
        self.panels = self.forms[0].panels
        self.tiles = code.ceildiv(self.m, amx.ROWS)
        self.group = min(group, self.tiles) if isinstance(self.tiles, int) else group
        self.share = min(panels, self.panels)
        self.store = RowStore(code, self.args, graph, [n.result for n in nodes], COLUMNS, LANES)

    def emit(self) -> Code:
        code = self.code
        self.bytes = code.alloc(code.simplify(self.tiles * (self.steps * PARTS * TILE)), "int8", "left")
        self.units = code.alloc(code.simplify(self.tiles * amx.ROWS), F32, "units")
        work = product(code, [self.m, self.depth])
        serial = not self.parallel or (isinstance(work, int) and work < SMALL)
        with code.loop(self.m, "serial" if serial else "parallel", "r") as r:
            self._row(r)
        groups, shares = code.ceildiv(self.tiles, self.group), -(-self.panels // self.share)
        work, steps = product(code, [self.m, self.panels, self.depth]), product(code, [groups, shares])
        serial = not self.parallel or (isinstance(work, int) and work < SMALL) or (isinstance(steps, int) and steps == 1)
        with code.loop(steps, "serial" if serial else "parallel", "task") as task:
            jo, go = [code.bind_index(i, "t", n) for i, n in zip(code.unflatten(task, [shares, groups]), [shares, groups], strict=True)]
            self._task(go, jo)
        return code

    # --- the first factor ---------------------------------------------------------------------------------------------------

    def _element(self, r: Index, k: Index) -> Any:
        code = self.code
        lead = [code.bind_index(x, "i", n) for x, n in zip(code.unflatten(r, self.lead), self.lead, strict=True)]
        return Expressions(self.args, {}).at(self.left, operand_index(lead[:-1], self.left, lead[-1], k))

    def _row(self, r: Index) -> None:
        """A row as bytes, ``[row tile, step, part, 16 rows, 64]``."""
        code = self.code
        row, largest = code.alloc(self.depth, F32, "row"), code.alloc(LANES, "int32", "largest")
        probe = Probe(self.args, {}, self.left)
        probe([0] * self.left.type.rank)
        lead = [code.bind_index(x, "i", n) for x, n in zip(code.unflatten(r, self.lead), self.lead, strict=True)]

        def element(k: Index) -> None:
            code.store(row, k, Expressions(self.args, {}).at(self.left, operand_index(lead[:-1], self.left, lead[-1], k)))

        vector_loop(code, 0, self.depth, 1 if probe.scalar_only else LANES, element)
        self._write(largest, 0, tirx.Broadcast(tirx.const(0, "int32"), LANES))
        with code.loop(self.depth // LANES, "serial", "c") as c:
            self._write(largest, 0, tirx.max(largest[self._vector(0)], keybytes.magnitude(row[self._vector(c * LANES)])))
        most = code.bind(tirx.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", largest[self._vector(0)]), "most")
        self._write(largest, 0, tirx.Broadcast(tirx.const(0, "int32"), LANES))
        with code.loop(self.depth // LANES, "serial", "c") as c:
            bits = self._named(keybytes.magnitude(row[self._vector(c * LANES)]))
            self._write(largest, 0, largest[self._vector(0)] + keybytes.outweighed(bits, most, _FEW))
        few = code.bind(tirx.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", largest[self._vector(0)]), "few")
        up, unit = keybytes.units(code.bind(keybytes.exponent(most), "power"))
        up = tirx.Broadcast(code.bind(up, "up"), LANES)
        exact = tirx.And(keybytes.countable(most), few <= tirx.const(0, "int32"))
        code.store(self.units, r, tirx.Select(exact, unit, tirx.const(float("nan"), F32)))
        start = code.simplify(code.div(r, amx.ROWS) * (self.steps * PARTS * TILE) + code.mod(r, amx.ROWS) * BYTES)
        start = code.bind_index(start, "start")
        with code.loop(self.steps, "serial", "s") as s:
            quarters = []
            for u in range(0, BYTES, LANES):
                parts = self._named(keybytes.parts(row[self._vector(s * BYTES + u)], up))
                quarters.append(self._named(tirx.Shuffle([parts], [i * PARTS + p for p in range(PARTS) for i in range(LANES)])))
            for p, x in enumerate(keybytes.transpose_quarters(code, quarters, BYTES)):
                at = code.simplify(start + s * (PARTS * TILE) + p * TILE)
                code.emit(tirx.BufferStore(self.bytes, x, [tirx.Ramp(i64(at), i64(1), BYTES)]))

    # --- a task -------------------------------------------------------------------------------------------------------------

    def _task(self, go: Index, jo: Index) -> None:
        code = self.code
        amx.configure(code, dict.fromkeys(range(8), amx.ROWS))
        first, panel = code.simplify(go * self.group), code.simplify(jo * self.share)
        here = code.bind_index(code.least(self.tiles - first, self.group), "tiles")
        count = code.bind_index(code.least(self.panels - panel, self.share), "panels")
        mixed = code.alloc(self.depth * COLUMNS // 2, "int16", "mixed")
        sums = code.alloc(4 * PARTS * WORDS, "int32", "sums")
        totals = [code.alloc(self.group * amx.ROWS * COLUMNS, F32, "total") for _ in self.forms]
        row = code.bind_index(code.simplify(first * amx.ROWS), "row")
        last = code.bind_index(code.least(self.m - row, self.group * amx.ROWS), "count")
        with code.loop(count, "serial", "j") as j:
            at = code.bind_index(code.simplify(panel + j), "panel")
            for form, total in zip(self.forms, totals, strict=True):
                self._mix(form, at, mixed)
                with code.loop(here, "serial", "io") as io:
                    self._row_tile(form, at, mixed, sums, total, io, code.simplify(first + io))
                self._mend(form, at, total, row, last)
            self.store.write(totals, 0, row, last, code.simplify(at * COLUMNS))
        amx.release(code)

    def _mix(self, form: Quantized, panel: Index, mixed: Any) -> None:
        """A panel's rows, interleaved, ``[step, tile, 16 fours of rows, 16 columns, 4]``."""
        code, source = self.code, self.args.inputs[form.integers]
        start = code.bind_index(code.simplify(panel * (form.depth * COLUMNS)), "w")
        with code.loop(self.depth // 4, "serial", "q") as q:
            rows = []
            for i in range(4):
                at = code.simplify(start + (q * 4 + i) * COLUMNS)
                code.prefetch(source, code.simplify(at + _AHEAD))
                raw = source[tirx.Ramp(i64(at), i64(1), BYTES)]
                rows.append(self._named(raw))
            to = code.simplify(code.div(q, 16) * (4 * TILE // 2) + code.mod(q, 16) * (BYTES // 2))
            for tile, x in enumerate(keybytes.interleave(code, rows)):
                code.emit(tirx.BufferStore(mixed, x, [tirx.Ramp(i64(code.simplify(to + tile * (TILE // 2))), i64(1), BYTES // 2)]))

    def _row_tile(self, form: Quantized, panel: Index, mixed: Any, sums: Any, total: Any, io: Index, tile: Index) -> None:
        """16 rows by a panel: two tiles of columns and two parts at a time, to totals ``[rows, 64]``."""
        code = self.code
        x = code.bind_index(code.simplify(tile * (self.steps * PARTS * TILE)), "x")
        for pair in range(0, 4, 2):
            for some in range(0, PARTS, 2):
                for t in range(4):
                    amx.zero(code, t)
                with code.loop(self.steps, "serial", "s") as s:
                    for i in range(2):
                        amx.load(code, 4 + i, self.bytes, code.simplify(x + s * (PARTS * TILE) + (some + i) * TILE), BYTES)
                        amx.load(code, 6 + i, mixed, code.simplify(s * (4 * TILE // 2) + (pair + i) * (TILE // 2)), BYTES)
                    for c in range(2):
                        for i in range(2):
                            amx.multiply_bytes(code, 2 * c + i, 4 + i, 6 + c)
                for c in range(2):
                    for i in range(2):
                        amx.store(code, 2 * c + i, sums, ((pair + c) * PARTS + some + i) * WORDS, BYTES)
        scales = [self._named(self._scale(form, panel, u)) for u in range(4)]
        with code.loop(amx.ROWS, "serial", "i") as i:
            unit = tirx.Broadcast(code.bind(code.load(self.units, code.simplify(tile * amx.ROWS + i)), "unit"), LANES)
            found = []
            for c in range(4):
                parts = [sums[self._vector((c * PARTS + p) * WORDS + i * LANES)] for p in range(PARTS)]
                found.append(self._named(keybytes.from_parts(parts) * unit))
            for u, value in enumerate(keybytes.transpose_quarters(code, found, LANES)):
                self._write(total, (io * amx.ROWS + i) * COLUMNS + u * LANES, value * scales[u])

    def _mend(self, form: Quantized, panel: Index, total: Any, row: Index, count: Index) -> None:
        """Sum rows whose unit is nan again: one element of the depth after the other, as f32."""
        code, source = self.code, self.args.inputs[form.integers]
        start = code.bind_index(code.simplify(panel * (form.depth * COLUMNS)), "w")
        with code.loop(count, "serial", "i") as i:
            bits = tirx.reinterpret("int32", code.load(self.units, code.simplify(row + i)))
            with code.when(tirx.bitwise_and(bits, tirx.const(keybytes.INFINITE, "int32")) >= tirx.const(keybytes.INFINITE, "int32")):
                at = code.bind_index(code.simplify(i * COLUMNS), "at")
                acc = [code.alloc(LANES, F32, "acc") for _ in range(4)]  # each by itself, to become a register
                places = [self._vector(at + u * LANES) for u in range(4)]
                nothing = tirx.Broadcast(tirx.const(0.0, F32), LANES)
                for place in places:
                    code.emit(tirx.BufferStore(total, nothing, [place]))
                with code.loop(self.steps, "serial", "s") as s:  # sums of sums: fewer roundings of a large one
                    for held in acc:
                        self._write(held, 0, nothing)
                    with code.loop(BYTES, "serial", "k") as n:
                        k = code.bind_index(code.simplify(s * BYTES + n), "k")
                        x = tirx.Broadcast(code.bind(self._element(code.simplify(row + i), k), "x"), LANES)
                        for u, held in enumerate(acc):
                            y = source[self._vector(start + k * COLUMNS + u * LANES)].astype(f"int32x{LANES}").astype(f"{F32}x{LANES}")
                            self._write(held, 0, held[self._vector(0)] + x * y)
                    for place, held in zip(places, acc, strict=True):
                        code.emit(tirx.BufferStore(total, total[place] + held[self._vector(0)], [place]))
                for u, place in enumerate(places):
                    code.emit(tirx.BufferStore(total, total[place] * self._scale(form, panel, u), [place]))

    def _scale(self, form: Quantized, panel: Index, u: int) -> Any:
        assert form.scales is not None  # of integers
        return self.args.inputs[form.scales][self._vector(panel * COLUMNS + u * LANES)]

    def _named(self, x: Any) -> Any:
        return self.code.bind(x, "x", hidden=False)

    def _vector(self, at: Index) -> Any:
        return tirx.Ramp(i64(self.code.simplify(at)), i64(1), LANES)

    def _write(self, buffer: Any, at: Index, x: Any) -> None:
        self.code.emit(tirx.BufferStore(buffer, x, [self._vector(at)]))

"""Updates by index: the operand, with elements set to or combined with others where an index says.

    put:      y = x;  for m in order:  y[p, index[m], q] = y[p, index[m], q] * source[p, m, q]
    scatter:  y = x;  for m in order:  y[p, index[p, m, q], q] = y[p, index[p, m, q], q] * source[p, m, q]

with the update's own operation for ``*``; nothing is written where the index is out of range. A *row* is a place along the indexed axis,
a *column* one along all others, a *position* an m. Positions may repeat, and no two programs write to one place where their order would
show. Three sketches:

``owned``: a program has some rows and columns of the result, looks through the index for its own rows, and joins what it finds in order;
    the result is written once, and the operand is not copied before. ``block`` positions are looked at together (1: each in turn).
    Where the result is small and positions are many, ``pieces`` of them have programs of their own, which leave what they joined in
    scratch memory; a second kernel joins the operand and the pieces, in order. Not of ``set``.
``ordered``: a lane has one column, and goes through the positions in memory. Of an update in place nothing else is touched.
``atomic``: a lane an element of the source. Only where any order gives the same bits: sums and extremes of integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from graphopt.backends.forms.support import SCATTERS, materialized
from graphopt.backends.triton.code import Code, Launch, Scratch, ceildiv, conditions
from graphopt.backends.triton.expr import Expressions, Tile
from graphopt.backends.triton.index import Sum, Var, add, scale, variable
from graphopt.backends.triton.pointwise import NARROW, held, typed
from graphopt.backends.triton.sums import PARTIAL
from graphopt.errors import BuildError
from graphopt.ir import dims, types
from graphopt.ir.dims import Dim, Shape
from graphopt.ir.graph import Graph, Node
from graphopt.ir.types import DType

TILE = "[ROWS, COLUMNS]"
_OPS = {"add": "add", "mul": "mul", "max": "maximum", "min": "minimum"}
_ATOMICS = {"add": "tl.atomic_add", "max": "tl.atomic_max", "min": "tl.atomic_min"}


class Update:
    """The roles of the axes of an update.

    Attributes:
        axis: the indexed one.
        size: rows of the result.
        before, after: sizes of its other axes.
        positions: shape of the positions; empty for one.
        beside: sizes of the source's axes beside them: those of the result, or, of ``scatter``, less.
        shared: whether all columns share one index.
    """

    def __init__(self, node: Node) -> None:
        self.node, self.update = node, str(node.attrs["update"])
        self.x, self.index, self.source = node.operands
        self.axis = node.attrs["axis"] % self.x.type.rank
        self.size: Dim = self.x.shape[self.axis]
        self.before, self.after = self.x.shape[: self.axis], self.x.shape[self.axis + 1 :]
        self.shared = node.name == "put"
        span = self.index.type.rank if self.shared else 1
        self.positions: Shape = self.source.shape[self.axis : self.axis + span]
        self.beside: Shape = (*self.source.shape[: self.axis], *self.source.shape[self.axis + span :])

    @property
    def others(self) -> Shape:
        """Sizes of the result's axes beside the indexed one."""
        return (*self.before, *self.after)

    @property
    def count(self) -> Dim:
        return dims.numel(self.positions)

    @property
    def any_order(self) -> bool:
        """Whether the processor's atomic operations give the same bits in any order."""
        return self.x.dtype in (types.i32, types.i64) and self.update in _ATOMICS

    def at(self, along: Sequence[Sum], beside: Sequence[Sum]) -> list[Sum]:
        """An index, of what lies along the indexed axis and beside it."""
        return [*beside[: self.axis], *along, *beside[self.axis :]]


def refusal(graph: Graph) -> str | None:
    """Why a region is no update by index with pointwise work before it, or None."""
    nodes = materialized(graph)
    if len(nodes) != 1 or nodes[0].name not in SCATTERS:
        return "not exactly one update by index"
    if list(graph.outputs) != [nodes[0].result]:
        return "an output beside the updated tensor"
    if any(d == 0 for v in (*nodes[0].operands, nodes[0].result) for d in v.shape):
        return "an update without elements"
    try:  # what is no pointwise work shows when it is written
        OwnedKernel(graph, 1, 16, 16).emit(1)
    except BuildError as error:
        return str(error)
    return None


def update_of(graph: Graph) -> Update:
    """The update of a region that is not refused."""
    return Update(next(n for n in graph.nodes() if n.name in SCATTERS))


class _Kernel:
    """What the sketches share."""

    def __init__(self, graph: Graph, scratch: Mapping[str, Scratch] | None = None) -> None:
        self.u, self.code = update_of(graph), Code(graph, scratch or {})
        self.e = Expressions(self.code)

    @contextmanager
    def in_turn(self, positions: str = "") -> Iterator[Var]:
        """A loop over the positions, in order; over all of them unless a range is given."""
        count = self.u.count
        if count == 1:
            yield Var("0", 1)
            return
        m = self.code.fresh("m")
        with self.code.loop(f"for {m} in range({positions or f'0, {self.code.size(count)}'}):"):
            yield Var(self.counted(m), count, depth=1)

    def counted(self, name: str) -> str:
        """A loop's variable, fit to be a factor of a place in memory."""
        return self.code.let("n", f"tl.full((), 0, tl.int64) + {name}") if self.code.wide else name

    def place(self, along: Sequence[Sum], beside: Sequence[Sum]) -> Tile:
        """What the index says."""
        return self.e.at(self.u.index, along if self.u.shared else self.u.at(along, beside))

    def row(self, along: Sequence[Sum], beside: Sequence[Sum], lane: Var) -> tuple[Sum, Var]:
        """The same as a row, kept within bounds, and the lane, which writes only where there is such a row."""
        at, last = self.place(along, beside), self.code.size(self.u.size)
        row = self.e.position(self.u.index, along if self.u.shared else self.u.at(along, beside), self.u.size)
        if at.literal:
            return row, lane
        valid = self.code.let("valid", f"({at.text} >= 0) & ({at.text} < {last})", at.depth)
        return row, replace(lane, inside=(*lane.inside, valid))

    def joined(self, old: str, new: Tile) -> str:
        """An element after the update."""
        if self.u.update == "set":
            return new.text
        dtype = self.u.x.dtype
        before = Tile(old, dtype, new.axes, self.code.depth)
        return self.e.apply(_OPS[self.u.update], [before, new], dtype, dtype).text


class OwnedKernel(_Kernel):
    """Sketch ``owned``."""

    def __init__(self, graph: Graph, rows: int, columns: int, block: int, pieces: int = 1) -> None:
        x = update_of(graph).x.type
        kind = types.f32 if x.dtype in NARROW else x.dtype
        super().__init__(graph, {PARTIAL: Scratch(kind, dims.mul(pieces, x.numel))} if pieces > 1 else None)
        self.rows, self.columns, self.block, self.pieces = rows, columns, block, pieces

    def emit(self, warps: int) -> tuple[Code, Launch]:
        code, e, u = self.code, self.e, self.u
        tiles = ceildiv(u.size, self.rows), ceildiv(dims.numel(u.others), self.columns)
        piece = Var(code.program(1, "piece"), self.pieces) if self.pieces > 1 else Var("0", 1)
        first, second = e.places.unflatten(variable(Var(code.program(0), dims.mul(*tiles))), tiles)
        start = f"{code.place(first).text} * ROWS"
        self.lane = code.block("row", start, "ROWS", self.rows, u.size, 0, 2)
        column = code.block("column", f"{code.place(second).text} * COLUMNS", "COLUMNS", self.columns, dims.numel(u.others), 1, 2)
        self.beside = e.places.unflatten(variable(column), u.others)
        index = u.at([variable(self.lane)], self.beside)
        neutral = Tile(typed(_neutral(u.update, u.x.dtype), u.x.dtype), u.x.dtype) if self.pieces > 1 else None
        self.acc = code.let("acc", self._lanes(neutral or e.wide(u.x, index)))
        positions = self._positions(piece)
        if u.shared and self.block > 1:
            self._looked_for(start, positions)
        else:
            with self.in_turn(positions) as position:
                self._join(position)
        if self.pieces == 1:
            e.store(0, index, [self.lane, column], TILE, self.acc)
        else:
            to = add(e.places.flatten(index, u.x.shape), scale(variable(piece), u.x.type.numel))
            e.write(PARTIAL, to, [self.lane, column], TILE, self.acc)
            code.then.append(self._together())
        blocks = {"ROWS": self.rows, "COLUMNS": self.columns, "BLOCK": self.block}
        return code, Launch((dims.mul(*tiles), *([self.pieces] if self.pieces > 1 else [])), blocks, warps, 1)

    def _positions(self, piece: Var) -> str:
        """The first position of a piece and the end of its positions, as arguments of a range; whole blocks, but for the last."""
        code, count = self.code, self.u.count
        if self.pieces == 1:
            return f"0, {code.size(count)}"
        share = code.size(dims.mul(ceildiv(ceildiv(count, self.pieces), self.block), self.block))
        first = code.let("first", f"{piece.name} * {share}")
        return f"{first}, {code.let('end', f'tl.minimum({first} + {share}, {code.size(count)})')}"

    def _together(self) -> tuple[Code, Launch]:
        """The kernel that joins the operand and what was joined of each piece."""
        of = _Kernel(self.code.graph, self.code.scratch)
        code, e, u, size = of.code, of.e, of.u, of.u.x.type.numel
        lane = code.block("i", f"{code.program(0)} * BLOCK", "BLOCK", _COPY, size, 0, 1)
        index = e.places.unflatten(variable(lane), u.x.shape)
        mask = f", mask={conditions(lane.inside)}" if lane.inside else ""
        acc = e.wide(u.x, index)
        total = code.let("acc", acc.text if acc.axes else f"tl.broadcast_to({_tensor(acc)}, [BLOCK])")
        piece = code.fresh("piece")
        with code.loop(f"for {piece} in range({self.pieces}):"):
            part = code.let("part", f"tl.load({PARTIAL} + ({code.size(size)} * {of.counted(piece)} + {lane.name}){mask})")
            code.line(f"{total} = {of.joined(total, Tile(part, u.x.dtype, lane.axes, 1))}")
        e.store(0, index, [lane], "[BLOCK]", total)
        return code, Launch((ceildiv(size, _COPY),), {"BLOCK": _COPY}, _COPY_WARPS, 1)

    def _lanes(self, x: Tile) -> str:
        """All lanes of a value that may be the same along an axis."""
        return x.text if x.axes == {0, 1} else f"tl.broadcast_to({_tensor(x)}, {TILE})"

    def _looked_for(self, start: str, positions: str) -> None:
        """Blocks of positions; those that are of this program's rows are taken one by one, the first of them first."""
        code, e, u = self.code, self.e, self.u
        count, first, block = code.size(u.count), code.let("first", start), code.fresh("start")
        with code.loop(f"for {block} in range({positions}, BLOCK):"):
            m = code.block("m", self.counted(block), "BLOCK", self.block, u.count, 0, 1, 1)
            at = self.place(e.places.unflatten(variable(m), u.positions), ())
            own = conditions([f"({at.text} >= {first})", f"({at.text} < {first} + ROWS)", *m.inside])
            hit, turn = code.let("own", own), code.fresh("turn")
            code.line(f"{turn} = tl.min(tl.where({hit}, {m.name}, {count}))")
            with code.loop(f"while {turn} < {count}:"):
                self._join(Var(turn, u.count, depth=2))
                code.line(f"{turn} = tl.min(tl.where({hit} & ({m.name} > {turn}), {m.name}, {count}))")

    def _join(self, position: Var) -> None:
        """One position, into those rows that it is for."""
        code, e, u = self.code, self.e, self.u
        along, beside = e.places.unflatten(variable(position), u.positions), list(self.beside)
        with ExitStack() as inside:
            here = []
            for k, (n, less) in enumerate(zip(u.others, u.beside, strict=True)):
                if not dims.same(n, less):
                    at = code.derived(beside[k], less, "s")
                    guard = e.guard(at, False, less)
                    inside.enter_context(e.guarded(guard))
                    here.append(guard.text)
                    beside[k] = variable(at)
            here.insert(0, f"({self.lane.name} == {self.place(along, beside).text})")
            new = self.joined(self.acc, e.wide(u.source, u.at(along, beside)))
        code.line(f"{self.acc} = tl.where({conditions(here)}, {new}, {self.acc})")


class _InMemory(_Kernel):
    """Sketches that write the result where the operand lies already: copied there by a kernel before, or the same memory."""

    def __init__(self, graph: Graph, block: int, in_place: bool) -> None:
        super().__init__(graph)
        self.block, self.in_place = block, in_place

    def lanes(self, prefix: str, size: Dim) -> Var:
        return self.code.block(prefix, f"{self.code.program(0)} * BLOCK", "BLOCK", self.block, size, 0, 1)

    def launched(self, size: Dim, warps: int) -> tuple[Code, Launch]:
        launch = Launch((ceildiv(size, self.block),), {"BLOCK": self.block}, warps, 1)
        if self.in_place:
            return self.code, launch
        code, copy = _copied(self.code.graph, self.u)
        code.then.append((self.code, launch))
        return code, copy


class OrderedKernel(_InMemory):
    """Sketch ``ordered``."""

    def emit(self, warps: int) -> tuple[Code, Launch]:
        code, e, u = self.code, self.e, self.u
        size = dims.numel(u.beside)
        column = self.lanes("column", size)
        beside = e.places.unflatten(variable(column), u.beside)
        with self.in_turn() as position:
            along = e.places.unflatten(variable(position), u.positions)
            row, there = self.row(along, beside, column)
            index = u.at([row], beside)
            new = e.wide(u.source, u.at(along, beside))
            old = "" if u.update == "set" else e.stored(0, index, [there], "[BLOCK]").text
            e.store(0, index, [there], "[BLOCK]", self.joined(old, new))
            if u.update != "set" and u.count != 1:
                code.line("tl.debug_barrier()")  # what one thread wrote another one may read
        return self.launched(size, warps)


class AtomicKernel(_InMemory):
    """Sketch ``atomic``."""

    def emit(self, warps: int) -> tuple[Code, Launch]:
        code, e, u = self.code, self.e, self.u
        size = u.source.type.numel
        lane = self.lanes("i", size)
        index = e.places.unflatten(variable(lane), u.source.shape)
        span = len(u.positions)
        along, beside = index[u.axis : u.axis + span], [*index[: u.axis], *index[u.axis + span :]]
        new, (row, there) = e.wide(u.source, index), self.row(along, beside, lane)
        place, mask = e.lanes_at("out0", e.output_place(0, u.at([row], beside)), [there], "[BLOCK]")
        code.line(f"{_ATOMICS[u.update]}({place}, {new.text}{mask}, sem=\"relaxed\")")
        return self.launched(size, warps)


_COPY, _COPY_WARPS = 1024, 4  # of the kernels that copy, and that join pieces


def _tensor(x: Tile) -> str:
    """A value as a tensor, which Python numbers are not."""
    return f"tl.full((), {x.text}, {held(x.dtype)})" if x.literal else x.text


def _neutral(update: str, dtype: DType) -> float | int | bool:
    """The number that an update leaves out."""
    if update in ("add", "mul"):
        return int(update == "mul")
    if dtype.is_float:
        return float("-inf") if update == "max" else float("inf")
    low = -(1 << (dtype.bits - 1)) if dtype.kind == "i" else 0
    return low if update == "max" else low + (1 << (1 if dtype.is_bool else dtype.bits)) - 1


def _copied(graph: Graph, u: Update) -> tuple[Code, Launch]:
    """The kernel that writes the operand to the result's memory."""
    code = Code(graph)
    e, size = Expressions(code), u.x.type.numel
    lane = code.block("i", f"{code.program(0)} * BLOCK", "BLOCK", _COPY, size, 0, 1)
    e.sources[u.node.result] = lambda index: e.at(u.x, index)
    e.store(0, e.places.unflatten(variable(lane), u.x.shape), [lane], "[BLOCK]")
    return code, Launch((ceildiv(size, _COPY),), {"BLOCK": _COPY}, _COPY_WARPS, 1)

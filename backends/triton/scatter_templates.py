"""The template of updates by index."""

from __future__ import annotations

from graphopt.autotune.space import Param, Schedule, SearchSpace, Workload
from graphopt.backends.triton.code import Code, Launch, power_of_two
from graphopt.backends.triton.prepare import prepared
from graphopt.backends.triton.scatter import AtomicKernel, OrderedKernel, OwnedKernel, Update, refusal, update_of
from graphopt.backends.triton.template import Template, divide, first, lanes_fit, largest, pieces_of
from graphopt.ir import dims
from graphopt.target import Target

UNKNOWN = 4096  # positions, rows or columns that an axis of any size is taken to have
TILE, LOOK = 4096, 1024  # elements that a program owns, and positions that it looks at together, at most by default
LEAST, JOINED, PIECE = 256, 1024, 64  # elements that it owns at least, of what is set and what is joined; positions of a piece, at least
LANES = 128  # columns, or elements of the source, of a program that works in memory
_THREAD = 16  # elements of a tile that a thread has

# Clock cycles, for the choice of the default. Rough, and not measured.
_SEARCH, _FIND, _TURN = 120, 400, 300  # to look at a block of positions, to join one that was found, and one taken in turn
_SET, _JOIN = 60, 800  # to write an element, and to read and write it again
_BYTES, _LAUNCH = 20, 5000  # bytes of memory that a processor has in a cycle; cycles of a launch
_AT_ONCE = 8  # programs of a processor whose waits overlap


def _refuse(w: Workload, t: Target) -> str | None:
    return refusal(prepared(w)) if w.kind in ("scatter", "update") else "not an update by index"


class _Sizes:
    """Sizes of an update as numbers, and the tile of a program that owns a part of the result."""

    def __init__(self, u: Update, t: Target) -> None:
        self.u, self.t = u, t
        self.size, self.count = largest(u.size, UNKNOWN), largest(u.count, UNKNOWN)
        self.others, self.beside = largest(dims.numel(u.others), UNKNOWN), largest(dims.numel(u.beside), UNKNOWN)
        tile, floor = TILE, LEAST if u.update == "set" else JOINED
        while tile > floor and self.programs(*self.tile(tile)) < t.cores:
            tile //= 2
        self.rows, self.columns = self.tile(tile)

    def tile(self, elements: int) -> tuple[int, int]:
        """Rows and columns, long along the axis whose elements are neighbours."""
        if largest(dims.numel(self.u.after), UNKNOWN) > 1:
            columns = min(power_of_two(self.others), 512, elements)
            return min(power_of_two(self.size), max(1, elements // columns)), columns
        rows = min(power_of_two(self.size), elements)
        return rows, min(power_of_two(self.others), max(1, elements // rows))

    def programs(self, rows: int, columns: int) -> int:
        return -(-self.size // rows) * -(-self.others // columns)

    @property
    def block(self) -> int:
        """Positions that are looked at together: many, unless nearly all of them are a program's own."""
        return 1 if self.size <= self.rows else max(16, min(LOOK, power_of_two(self.count)))

    @property
    def pieces(self) -> int:
        """Pieces of the positions: programs for all processors, if they have many positions each."""
        return 1 if self.u.update == "set" else pieces_of(self.programs(self.rows, self.columns), self.count, PIECE, self.t)

    def owned(self) -> float:
        """Cycles of ``owned``, whose programs read and write the result while others look."""
        count, pieces, result = self.count / self.pieces, self.pieces, self.size * self.others
        if self.u.shared and self.block > 1:
            each = count / self.block * _SEARCH + count * self.rows / self.size * _FIND
        else:
            each = count * (_TURN + self.rows * self.columns / LANES)
        turns = max(1.0, pieces * self.programs(self.rows, self.columns) / (_AT_ONCE * self.t.cores))
        parts = self._moved(result * pieces) + _LAUNCH if pieces > 1 else 0.0
        return max(turns * each, self._moved(result)) + parts

    def ordered(self, in_place: bool) -> float:
        turns = -(-self.beside // (LANES * _AT_ONCE * self.t.cores))
        return turns * self.count * (_SET if self.u.update == "set" else _JOIN) + self._copy(in_place)

    def atomic(self, in_place: bool) -> float:
        return 4 * self._moved(self.count * self.beside) + self._copy(in_place)

    def _moved(self, elements: int) -> float:
        return 2 * elements * self.u.x.dtype.itemsize / (_BYTES * self.t.cores)

    def _copy(self, in_place: bool) -> float:
        return 0.0 if in_place else self._moved(self.size * self.others) + _LAUNCH


def _spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    """All sketches that take the update, the one that is estimated to be the quickest first."""
    u, in_place = update_of(prepared(w)), w.kind == "update"
    n = _Sizes(u, t)
    warps = Param("warps", first(max(1, min(8, n.rows * n.columns // (_THREAD * t.warp))), (1, 2, 4, 8)))
    knob, full = divide(n.pieces, u.count, "block")
    owned = SearchSpace("scatter", ("owned",), (
        Param("rows", first(n.rows, tuple(r for r in (1, 2, 4, 8, 16, 64, 256, 1024) if r <= power_of_two(n.size))), "tile"),
        Param("columns", first(n.columns, tuple(c for c in (1, 4, 16, 64, 128, 256, 512) if c <= power_of_two(n.others))), "tile"),
        Param("block", first(n.block, (1, 64, 256, 1024)) if u.shared else (1,), "tile"),
        knob if u.update != "set" else Param("pieces", (1,)), warps), (lanes_fit(t), full))  # fmt: skip
    found = [(n.owned(), owned), (n.ordered(in_place), _in_memory("ordered", n.beside))]
    if u.any_order:
        found.append((n.atomic(in_place), _in_memory("atomic", n.count * n.beside)))
    return tuple(space for _, space in sorted(found, key=lambda f: f[0]))


def _in_memory(sketch: str, size: int) -> SearchSpace:
    block = min(LANES, power_of_two(size))
    params = Param("block", first(block, (32, 64, 128, 256, 512))), Param("warps", first(max(1, block // 64), (1, 2, 4)))
    return SearchSpace("scatter", (sketch,), params)


def _write(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    graph = prepared(w)
    if s.sketch == "owned":
        return OwnedKernel(graph, s["rows"], s["columns"], s["block"], s["pieces"]).emit(s["warps"])
    kernel = OrderedKernel if s.sketch == "ordered" else AtomicKernel
    return kernel(graph, s["block"], w.kind == "update").emit(s["warps"])


SCATTER = Template("scatter", _refuse, _spaces, _write)

"""The schedules of a matrix product by register tiles. Looks at the IR only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate, pairwise

from graphopt.autotune.space import Constraint, Knob, Level, LoopNest, Param, Schedule, SearchSpace
from graphopt.backends.forms.prepare import flatten_rows
from graphopt.backends.forms.support import is_materialized
from graphopt.backends.tvm import quantform
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph, Value
from graphopt.target import Target

BLOCK = 128  # terms that are summed before the sum is added to the total, where a schedule does not say
NEAR = 256  # terms of a block that stays in the second-level cache, beside the next one: half as many sums to add up as of 128
PLAIN = ("default", "rows-first")  # a row tile is summed to its end; threads divide the panels, or the rows
BLOCKED = ("blocked", "blocked-rows-first")  # a block of the depth is used by all row tiles of a step, then the next one
SPLIT = "split-depth"  # a task is a piece of the depth, summed as in the blocked ones; then the pieces' sums are joined
_PIECES = (2, 4, 8, 16, 32, 64)
_PIECE = 4 * BLOCK  # terms of a piece at least
_WORTH = 1 << 18  # multiplications of a piece at least, of a schedule that was not tuned
_READ = 8  # multiplications of vectors that take as long as reading one of the second factor
_DEEP = 8  # times as many terms as rows and columns: cores that divide them have less to read than those that divide rows or columns
_LOPSIDED = 1.1  # times its share that a core may be given before the depth is divided
_WIDEST = 8  # vectors of a tile of few rows at most
_COPIED = 4  # row tiles at least that use a panel which is copied
_MANY = 16  # tiles a core, with which there is nothing to gain from more tasks
_FEW_ROWS = 8  # rows of the highest tile of a default schedule
_HEIGHTS = (4, 6, 8, 1, 2, 3, 5, 10, 12, 14, 16, 20, 24)
_UNEVEN = 1.02  # times its share that a core may be given
_FINE = 256  # steps a core that are even enough, whatever they are
_SECOND = 100  # a share of the rows, its inverse, that pays for a lower last tile
_LINE = 64  # bytes of a cache line
AHEAD = 3072  # bytes: 1 and 3 KiB are equally good, 4 KiB are not: lines that far apart compete for a place in the first-level cache


def params(graph: Graph, t: Target) -> tuple[Param, ...]:
    """The knobs of the plain sketches."""
    node, packed = _product(graph)
    lanes = max(1, t.lanes(8 if node.dtype.bits == 64 else 4))
    rows, columns = (_fixed(d, graph) for d in node.shape[-2:])
    mr, most = t.tile
    vectors = most
    if isinstance(rows, int) and rows <= _FEW_ROWS * 3 // 2 and _beside(graph) == "columns":
        mr, vectors = rows, max(1, min(_WIDEST, (t.vector_registers - 1) // (rows + 1)))
    elif isinstance(rows, int) and rows < mr:
        mr, vectors = rows, (4 if rows == 1 else 3 if rows < 4 else most)
    elif isinstance(rows, int):
        mr = -(-rows // -(-rows // mr))  # the same number of tiles, filled evenly
    if (
        isinstance(columns, int)
        and columns % (3 * lanes)
        and columns % (2 * lanes) == 0
        and vectors == 3
        and not packed
    ):
        vectors = 2
    nr = lanes * vectors
    if isinstance(rows, int) and rows <= mr and isinstance(columns, int) and _beside(graph) == "rows" and columns < 4 * t.cores * nr:
        nr = lanes  # dot products: a panel is but so many columns side by side
    while isinstance(columns, int) and nr > lanes and columns <= nr - lanes:
        nr -= lanes
    if isinstance(columns, int) and columns < lanes:
        nr = columns
    if packed:
        nr = most * lanes
        width = _panel_width(graph)
        if width and width % lanes == 0 and width < nr:  # panels of two vectors, for AMX: more rows keep as many sums under way
            nr = width
            if not isinstance(rows, int) or rows >= mr:
                tallest = mr * most // (width // lanes)
                mr = -(-rows // -(-rows // tallest)) if isinstance(rows, int) else tallest
    if width := quantform.panel_width(flatten_rows(graph)):  # floats of a panel are made once, so it is taken whole where registers allow
        nr = min(width, lanes * (4 if t.vector_registers == 32 else 2))
        mr = -(-rows // -(-rows // 6)) if isinstance(rows, int) else 6
    several = not isinstance(rows, int) or rows > mr  # else panels are read once: a stream, asked for as it is read
    heights = (r for r in _HEIGHTS if not isinstance(rows, int) or r <= rows)
    return (
        Param("lanes", (lanes,)),
        Param("mr", tuple(dict.fromkeys((mr, *heights))), "tile"),
        Param("nr", tuple(dict.fromkeys((nr, *(v * lanes for v in (1, 2, 3, 4))))), "tile"),
        Param("unroll", tuple(dict.fromkeys((_unroll(t), 4, 1, 2, 8)))),
        Param("group", tuple(dict.fromkeys((_division(graph, mr, nr, t)[0], 1, 2, 4, 8, 16, 32, 64))), "tasks"),
        Param("prefetch", (False,) if packed and not several else (several, not several)),
        Param("parallel", (True, False), "tasks"),
        *([Param("ahead", (AHEAD, 0, 1024, 2048))] if packed and not several else []),
        *(_copy(graph, mr, nr, t) if several else []),
    )


def constraints(graph: Graph, t: Target) -> tuple[Constraint, ...]:
    """What all sketches must keep to. The default does, on every target."""
    default = {p.name: p.choices[0] for p in params(graph, t)}
    width = _panel_width(graph)
    registers = t.vector_registers

    def same(k: Mapping[str, Knob]) -> bool:
        return all(k[n] == default[n] for n in ("mr", "nr"))

    return (
        Constraint(
            f"the sums, the vectors of a row and an element need more than {registers} registers",
            lambda k: same(k) or needed_registers(k) <= registers,
        ),
        Constraint(
            f"tiles of columns that straddle packed panels of {width}",
            lambda k: same(k) or not width or width % _int(k, "nr") == 0,
        ),
    )


def needed_registers(k: Mapping[str, Knob]) -> int:
    """Vector registers of a tile: its sums, the vectors of a row of the second factor, an element of the first."""
    vectors = -(-_int(k, "nr") // _int(k, "lanes"))
    return _int(k, "mr") * vectors + vectors + 1


def variants(graph: Graph, t: Target) -> tuple[SearchSpace, ...]:
    """The spaces of the tiled sketches, that of the default first."""
    own, limits, loops = params(graph, t), constraints(graph, t), TileLoops(graph, t)
    out = [SearchSpace("tile", PLAIN, own, limits, loops)]
    node, _ = _product(graph)
    rows, depth = _fixed(node.shape[-2], graph), _depth(graph)
    if not (isinstance(rows, int) and rows <= t.tile[0]) and not (isinstance(depth, int) and depth <= 64):
        # A block of a packed panel stays near while row tiles use it, and the next one is fetched meanwhile: not a panel, which may be
        # larger than a cache. Of one row tile, or one block, the loops are the same.
        known = {p.name: p.choices[0] for p in own}
        better = _blocks(graph, _int(known, "mr"))
        rows_first = _division(graph, _int(known, "mr"), _int(known, "nr"), t)[1]
        block = Param("block", tuple(dict.fromkeys((NEAR if better else BLOCK, BLOCK, 64, 256, 384, 512))), "tasks")
        out.insert(0 if better else 1, SearchSpace("tile", BLOCKED[::-1] if rows_first else BLOCKED, (*own, block), limits, loops))
    split, better = _split(graph, t, own)
    if split:
        out.insert(0 if better else len(out), SearchSpace("tile", (SPLIT,), split, limits, loops))
    return tuple(out)


def _split(graph: Graph, t: Target, own: tuple[Param, ...]) -> tuple[tuple[Param, ...], bool]:
    """The knobs of a split depth, and whether its first choices are a better default; no knobs where tiles are tasks enough."""
    node, packed = _product(graph)
    depth = _depth(graph)
    if not isinstance(depth, int) or not all(isinstance(d, int) for d in node.shape) or depth < 2 * _PIECE:
        return (), False
    known = {p.name: p.choices[0] for p in own}
    *batch, m, n = (int(d) for d in node.shape)  # type: ignore[arg-type]
    mr, nr, lanes = (_int(known, name) for name in ("mr", "nr", "lanes"))
    tiles, panels, count = -(-m // mr), -(-n // nr), math.prod(batch)
    deep = not packed and count == 1 and depth >= _DEEP * max(m, n)
    if tiles * panels * count >= _MANY * t.cores and not deep:
        return (), False
    work = count * depth * max(m * -(-n // lanes) * lanes, _READ * n)
    pieces = min(max(-(-2 * t.cores // (panels * count)), t.cores if deep else 1), depth // _PIECE, work // _WORTH)
    group = tuple(dict.fromkeys((tiles, *(g for g in (1, 2, 4, 8) if g < tiles))))
    out = {p.name: p for p in own} | {"prefetch": Param("prefetch", (False,)), "parallel": Param("parallel", (True,))}
    out.pop("ahead", None)
    out["group"] = Param("group", group, "tasks")
    out["pieces"] = Param("pieces", tuple(dict.fromkeys((max(2, pieces), *(p for p in _PIECES if depth // p >= _PIECE)))), "tasks")
    out["block"] = Param("block", (BLOCK, 64, 256, 512), "tasks")
    plain = _int(known, "group")
    idle = count * panels * -(-tiles // plain) < t.cores
    last = _last_panel(n, nr, lanes) / nr
    uneven = _busiest(panels, tiles, plain, t.cores, count, last) > _LOPSIDED * count * tiles * (panels - 1 + last) / t.cores
    return tuple(out.values()), pieces > 1 and (idle or deep or (uneven and _beside(graph) == "columns"))


# --- the loops, for the cost model ---------------------------------------------------------------------------------------


class TileLoops:
    """What each loop of a schedule touches of the first factor, the second, the outputs with what is read beside them, and the totals."""

    def __init__(self, graph: Graph, t: Target) -> None:
        flat = flatten_rows(graph)
        products = [n for n in flat.nodes() if n.name == "matmul"]
        result, left = products[0].result, products[0].operands[0]
        *batch, self.m, self.n = [_typical(d, flat) for d in result.shape]
        self.k, self.count, self.products = _typical(left.shape[-1], flat), math.prod(batch), len(products)
        self.size, self.read = left.dtype.itemsize, products[0].operands[1].dtype.itemsize * len(products)
        beside = (v for v in flat.inputs if dims.same_shape(v.shape, result.shape))
        self.ends = sum(v.dtype.itemsize for v in (*flat.outputs, *beside))
        self.packed, self.target = _panel_width(flat), t

    def __call__(self, s: Schedule) -> LoopNest:
        m, n, k = self.m, self.n, self.k
        mr, nr, unroll, lanes = s["mr"], s["nr"], s["unroll"], s["lanes"]
        split = s["pieces"] if s.sketch == SPLIT else 1
        rows_first, blocked = s.sketch.endswith("rows-first"), s.sketch in (*BLOCKED, SPLIT)
        k = -(-k // split)
        block = min(k, s["block"] if blocked else BLOCK)
        tiles, panels = -(-m // mr), float(-(-n // nr))
        if n >= (nr if self.packed else lanes) and (split == 1 or not self.packed):  # unused vectors of the last one are left out
            panels += _last_panel(n, nr, lanes) / nr - 1
        pieces = -(-tiles // s["group"])
        height = tiles / pieces  # row tiles of a step, a mean
        tasks = self.count * panels * pieces * split
        cores = min(self.target.cores, math.ceil(tasks)) if s["parallel"] else 1

        def touched(rows: float, depth: float, columns: float) -> tuple[float, ...]:
            line = max(depth * self.size, min(_LINE, k * self.size))
            totals = 4.0 * rows * columns if blocked else 0.0
            return (rows * line, depth * columns * self.read, rows * columns * self.ends, totals)

        across, down = (min(cores, pieces), 1) if rows_first else (1, min(cores, math.ceil(panels)))  # how threads divide rows, and columns
        thread = touched(max(height * mr, m / across), k, max(nr, n / down))
        tile = Level(height, touched(mr, block if blocked else k, nr))
        blocks = Level(k / block, touched(height * mr if blocked else mr, block, nr))
        return LoopNest(
            ("left", "right", "ends", "totals"),
            (
                Level(cores, thread, "parallel"),
                Level(tasks / cores, touched(height * mr, k, nr)),
                *((blocks, tile) if blocked else (tile, blocks)),
                Level(block / unroll, touched(mr, unroll, nr), "unrolled"),
                Level(unroll * mr * -(-nr // lanes), (float(self.size), float(lanes * self.read), 0.0, 0.0), "vector"),
            ),
            flops=2.0 * lanes * self.products,
            waste=(m if tail_rows(m, mr) else tiles * mr) * panels * nr / (m * n),
            registers=needed_registers(dict(s.knobs)),
            moved=0.0 if self.packed or not dict(s.knobs).get("copy", True) else float(self.count * pieces * self.k * n * self.read),
        )


# --- what the region looks like ------------------------------------------------------------------------------------------


def _int(k: Mapping[str, Knob], name: str) -> int:
    value = k[name]
    assert isinstance(value, int)
    return value


def _product(graph: Graph) -> tuple[Value, bool]:
    """The result of the first product, its rows under one axis where they can be, and whether a second factor is packed."""
    products = [n for n in flatten_rows(graph).nodes() if n.name == "matmul"]
    return products[0].result, any(_is_packed(n.operands[1]) for n in products)


def _depth(graph: Graph) -> Dim:
    node = next(n for n in graph.nodes() if is_materialized(n))
    return node.operands[0].shape[-1]


def _beside(graph: Graph) -> str:
    """What lies side by side in the second factor's memory: its ``columns``, its ``rows`` (a column's elements), or nothing known."""
    v = next(n for n in flatten_rows(graph).nodes() if n.name == "matmul").operands[1]
    axes = list(range(v.type.rank))
    while v.producer is not None and v.producer.name == "transpose":
        axes = [v.producer.attrs["perm"][a] for a in axes]
        v = v.producer.operands[0]
    if not v.is_input or len(axes) < 2:
        return ""
    steps = v.type.strides or [0] * (v.type.rank - 1) + [1]
    return "columns" if steps[axes[-1]] == 1 else "rows" if steps[axes[-2]] == 1 else ""


def _panel_width(graph: Graph) -> int:
    """Columns of a panel of the packed second factor; 0 if it is not packed, or not by columns."""
    for node in graph.nodes():
        if node.name == "matmul" and _is_packed(node.operands[1]):
            v = node.operands[1]
            if form := quantform.quantized(v):
                return form.width
            while v.producer is not None and v.producer.name in ("slice", "reshape", "transpose"):
                v = v.producer.operands[0]
            if v.type.rank == 3 and isinstance(v.shape[-1], int):
                return v.shape[-1]
    return 0


def _copy(graph: Graph, mr: int, nr: int, t: Target) -> list[Param]:
    """Whether panels of a factor ``[K, N]`` of memory are copied, where that can be chosen.

    Rows of a panel lie apart there, often at distances that are powers of two: a panel beyond the first-level cache has but few places in
    the second. Where several row tiles use it, copying it once costs less than what is lost otherwise.
    """
    node = next(n for n in flatten_rows(graph).nodes() if n.name == "matmul")
    b = node.operands[1]
    if _beside(graph) != "columns":
        return []
    rows, depth = node.result.shape[-2], b.shape[-2]
    used_often = isinstance(rows, int) and rows >= _COPIED * mr
    large = isinstance(depth, int) and 4 * depth * nr > t.cache[0]
    return [Param("copy", (True, False) if used_often and large else (False, True), "tasks")]


def _unroll(t: Target) -> int:
    """Steps of the summed axis at a time: on Arm, LLVM gathers the elements of more steps into registers that it has not."""
    return 4 if t.arch != "aarch64" else 1 if t.sve_bits > 128 else 2


def _blocks(graph: Graph, mr: int) -> bool:
    """Whether a packed panel is better used a block at a time: several row tiles use it, and it is more than two blocks."""
    node, packed = _product(graph)
    rows, depth = _fixed(node.shape[-2], graph), _depth(graph)
    return packed and isinstance(rows, int) and rows >= _COPIED * mr and isinstance(depth, int) and depth >= 2 * NEAR


def _division(graph: Graph, mr: int, nr: int, t: Target) -> tuple[int, bool]:
    """Row tiles that share a panel, and whether threads divide the rows first.

    As many tiles as leave each core a few steps, and none much more work than the others; a power of two. Panels in blocks can be divided
    in either order, as they are near then.
    """
    node, packed = _product(graph)
    *batch, rows, columns = [_typical(d, graph) for d in node.shape]
    lanes = t.lanes(8 if node.dtype.bits == 64 else 4)
    last = _last_panel(columns, nr, lanes) / nr if packed or columns >= lanes else 1.0
    tiles, panels, count = -(-rows // mr), -(-columns // nr), math.prod(batch)
    share = count * tiles * (panels - 1 + last) / t.cores
    orders = (False, True) if _blocks(graph, mr) else (False,)
    group = 64
    while True:
        most, order = min((_busiest(panels, tiles, group, t.cores, count, last, o), o) for o in orders)
        few = group >= 2 * tiles or count * panels * -(-tiles // group) < 4 * t.cores
        if group == 4 or not (few or most > _UNEVEN * share):
            return group, order
        group //= 2


def tail_rows(rows: Dim, mr: int) -> int:
    """Rows of a last tile that is lower than the others; 0 if it is as high, or if too little is saved for a second code."""
    if not isinstance(rows, int) or rows <= mr:
        return 0
    rest = rows % mr
    return rest if rest and (mr - rest) * _SECOND >= rows else 0


def _last_panel(columns: int, nr: int, lanes: int) -> int:
    """Columns of the last panel that are computed: vectors of no column at all are left out."""
    return -(-(columns % nr) // lanes) * lanes or nr


def _busiest(panels: int, tiles: int, group: int, cores: int, count: int = 1, last: float = 1.0, rows_first: bool = False) -> float:
    """Row tiles of the core that gets most, of panels in groups of row tiles, divided in order; ``last``: what the last panel's take."""
    pieces = -(-tiles // group)
    if count * panels * pieces > _FINE * cores:
        return count * tiles * (panels - 1 + last) / cores
    heights = [min(group, tiles - p * group) for p in range(pieces)]
    widths = [1.0] * (panels - 1) + [last]
    work = [h * w for h in heights for w in widths] if rows_first else [h * w for w in widths for h in heights]
    before = list(accumulate(work * count, initial=0.0))
    ends = [-(-(len(before) - 1) * i // cores) for i in range(cores + 1)]
    return max(before[b] - before[a] for a, b in pairwise(ends))


def _fixed(d: Dim, graph: Graph) -> Dim:
    """A size that schedules may count on: of a symbolic one that cannot fill a tile of any kernel, its largest value."""
    least, most = dims.bounds(d, graph.symbols)
    return d if most is None or most > _FEW_ROWS or least is None or least < 0 else max(1, most)


def _typical(d: Dim, graph: Graph) -> int:
    """What a size may be like, where any guess is right: a symbolic one is taken for 16, or for the most it can be."""
    if isinstance(d, int):
        return d
    most = dims.bounds(d, graph.symbols)[1]
    return 16 if most is None else max(1, min(16, most))


def _is_packed(v: Value) -> bool:
    """Whether a factor is written as columns packed in panels: slice(reshape(transpose(wp)))."""
    node = v.producer
    if quantform.quantized(v) is not None:
        return True
    return node is not None and node.name == "slice" and node.operands[0].defined_by("reshape") is not None

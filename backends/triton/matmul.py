"""Matrix products on tiles: what feeds the factors is computed as they are read, what follows on the accumulator.

    for k0 in range(0, K, BLOCK_K):  acc += dot(a[rows, k0 + ks], b[k0 + ks, columns])

Programs that run at the same time take tiles that share factors: ``GROUP`` tiles of rows go through the columns together. Several
products of one left factor (a gate and its value) share its reads, an accumulator each.

A *persistent* kernel has as many programs as the device runs at once, each of which takes tile after tile; the two loops run as one, so
that the factors of the next tile are on their way while a tile is finished:

    for tile in range(program, tiles, PROGRAMS):  ...

Factors are read element by element or by descriptor (:mod:`~graphopt.backends.triton.descriptors`). Of the latter some warps can do the
copies and others the products (``specialized``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.backends.triton.code import Code, Launch, ceildiv, conditions
from graphopt.backends.triton.descriptors import Descriptors
from graphopt.backends.triton.expr import Expressions, Index, Tile
from graphopt.backends.triton.index import Sum, Var, variable
from graphopt.backends.triton.pointwise import NAMES, NARROW
from graphopt.backends.triton.sums import Pieces, total_of
from graphopt.ir import dims, types
from graphopt.ir.dims import Dim, Shape
from graphopt.ir.graph import Graph, Node, Value
from graphopt.target import Target

LEAST = 16  # of a tile's side, for the instructions that multiply tiles
UNSIGNED = "a product of unsigned integers, of which Triton makes no matrix instructions"


@dataclass(frozen=True)
class Form:
    """The roles of a product's axes.

    Attributes:
        nodes: the products; all of one left factor and type.
        batch: axes of batches of the second factor; empty where all rows share one matrix.
        rows: shape of what one matrix is multiplied with: all axes but the last, or one.
        columns, depth: sizes.
    """

    nodes: tuple[Node, ...]
    batch: Shape
    rows: Shape
    columns: Dim
    depth: Dim

    @property
    def dtype(self) -> types.DType:
        """Of the factors."""
        return self.nodes[0].operands[0].dtype


def form_of(graph: Graph) -> Form:
    """Read a region that :func:`~graphopt.backends.forms.shapes.product_of` accepts, 8-bit integers included."""
    nodes = tuple(n for n in graph.nodes() if n.name == "matmul")
    shape, b = nodes[0].result.shape, nodes[0].operands[1]
    shared = all(d == 1 for n in nodes for d in n.operands[1].shape[:-2])
    batch, rows = ((), shape[:-1]) if shared else (shape[:-2], shape[-2:-1])
    return Form(nodes, batch, rows, shape[-1], b.shape[-2])


def precision(dtype: types.DType, t: Target) -> str:
    """How f32 is multiplied: as it is, or rounded to tf32 where PyTorch's setting allows that."""
    return "tf32" if dtype == types.f32 and t.has("tf32") else "ieee"


def factor(e: Expressions, x: Value, index: Sequence[Sum], k: Var, shape: str) -> str:
    """A factor's tile at an index, as :func:`multiplied`; axes of one element are read at 0."""
    return multiplied(e.code, e.at(x, [Sum() if d == 1 else i for i, d in zip(index, x.shape, strict=True)]), k, shape)


def multiplied(code: Code, tile: Tile, k: Var, shape: str) -> str:
    """A tile as an operand of ``tl.dot``: zero beyond the summed axis ``k``, of full shape, in the type that is multiplied."""
    text = tile.text
    if k.inside and not set(k.inside) <= tile.zero:
        text = code.let("z", f"tl.where({conditions(k.inside)}, {text}, 0)", max(tile.depth, k.depth))
    if tile.axes != {0, 1}:
        text = f"tl.broadcast_to({text}, {shape})"
    return text if tile.narrow or tile.dtype not in NARROW else f"{text}.to({NAMES[tile.dtype]})"


def columns_of(code: Code, x: Value, column: Var, start: str, size: int) -> tuple[Value, Sum]:
    """Where a right factor's columns are read: of one that is the first columns of an input, among all of them.

    The sums of columns beyond the factor's own are stored nowhere; and rows of whole words are read in whole words if no lane is left out
    within one.

    Args:
        column: of the result.
        start, size: the first column of the tile, as text, and how many there are.
    """
    node = x.defined_by("slice")
    if node is None or not node.operands[0].is_input or node.attrs["axis"] % x.type.rank != x.type.rank - 1:
        return x, variable(column)
    if node.attrs["start"] != 0 or node.attrs["step"] != 1:
        return x, variable(column)
    whole = node.operands[0]
    return whole, variable(code.block("wide", start, "BLOCK_N", size, whole.shape[-1], 1, 2, column.depth))


def tile_numbers(code: Code, pid: str, rows: Dim, columns: Dim) -> tuple[str, str]:
    """A tile by its number: ``GROUP`` tiles of rows side by side go through all columns, then the next group."""
    if rows == 1 or columns == 1:
        return ("0", pid) if rows == 1 else (pid, "0")
    group = code.let("group", f"{pid} // (GROUP * {code.size(columns)})")
    first = code.let("first", f"{group} * GROUP")
    height = code.let("height", f"tl.minimum({code.size(rows)} - {first}, GROUP)")
    inside = code.let("inside", f"{pid} % (GROUP * {code.size(columns)})")
    return code.let("tile_m", f"{first} + {inside} % {height}"), code.let("tile_n", f"{inside} // {height}")


def last(index: Sequence[Sum], rank: int) -> list[Sum]:
    """The index of a factor: the last axes, after axes of one element where it has more."""
    return [*[Sum()] * (rank - len(index)), *index[max(0, len(index) - rank) :]]


@dataclass(frozen=True)
class Plan:
    """How tiles are read, and by whom.

    Attributes:
        programs: that take tile after tile; 0 for a program each.
        descriptors: factors are read by descriptor where they lie so.
        specialized: warps either copy or multiply.
        stores: parts of a tile's columns that are finished and written one after another, by descriptor where results lie so; 0 for
            all at once, by pointers.
    """

    programs: int = 0
    descriptors: bool = False
    specialized: bool = False
    stores: int = 0

    def loop(self, *ends: str, flatten: bool = False) -> str:
        """A loop with what the compiler is told of it."""
        told = [*(["flatten=True"] if flatten else []), *(["warp_specialize=True"] if self.specialized else [])]
        return f"tl.range({', '.join([*ends, *told])})"


class MatmulKernel:
    """One region of matrix products.

    Args:
        pieces: of the depth (:mod:`~graphopt.backends.triton.sums`); one where programs take tile after tile.
    """

    def __init__(self, graph: Graph, t: Target, tile: tuple[int, int, int], group: int, pieces: int = 1, plan: Plan | None = None) -> None:
        self.graph, self.form, self.target, self.group, self.plan = graph, form_of(graph), t, group, plan or Plan()
        self.m, self.n, self.k = tile
        self.pieces = Pieces(self.form.nodes, pieces)
        self.code = Code(graph, self.pieces.scratch)
        self.e = Expressions(self.code)

    def emit(self, warps: int, stages: int) -> tuple[Code, Launch]:
        code, form = self.code, self.form
        tiles = ceildiv(dims.numel(form.rows), self.m), ceildiv(form.columns, self.n)
        each, batches = dims.mul(*tiles), dims.numel(form.batch)
        blocks = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "GROUP": self.group}
        if self.plan.stores > 1:
            blocks["PART"] = self.n // self.plan.stores
        number = code.program(0)
        if not self.plan.programs:
            grid = [each]
            batch = Var("0", 1)
            if form.batch:
                batch = Var(code.program(1, "batch"), batches)
                grid.append(batches)
            self._tile(tile_numbers(code, number, *tiles), batch, self.pieces.own(code, len(grid)))
            return code, Launch((*grid, *self.pieces.grid), blocks, warps, stages)
        assert self.pieces.count == 1
        tile = code.fresh("tile")
        with code.loop(f"for {tile} in {self.plan.loop(number, code.size(dims.mul(each, batches)), 'PROGRAMS', flatten=True)}:"):
            batch = Var("0", 1)
            if form.batch:
                batch = Var(code.let("batch", f"{tile} // {code.size(each)}"), batches, depth=1)
                tile = code.let("tile", f"{tile} % {code.size(each)}")
            self._tile(tile_numbers(code, tile, *tiles), batch, Var("0", 1))
        return code, Launch((self.plan.programs,), {**blocks, "PROGRAMS": self.plan.programs}, warps, stages)

    def _tile(self, numbers: tuple[str, str], batch: Var, piece: Var) -> None:
        """Compute a tile of the result: of a row of tiles and a column of them."""
        code, form, depth, rows = self.code, self.form, self.code.depth, dims.numel(self.form.rows)
        lead = self.e.places.unflatten(variable(batch), form.batch) if form.batch else []
        row = code.block("row", f"{numbers[0]} * BLOCK_M", "BLOCK_M", self.m, rows, 0, 2, depth)
        column = code.block("column", start := f"{numbers[1]} * BLOCK_N", "BLOCK_N", self.n, form.columns, 1, 2, depth)
        index = [*lead, *self.e.places.unflatten(variable(row), form.rows)]
        rights = [columns_of(code, n.operands[1], column, start, self.n) for n in form.nodes]
        sums = self._products(index, rights, piece)
        assert all(v.type.rank == len(index) + 1 for v in self.graph.outputs)
        self.e.stores = Descriptors(code, self.e.places) if self.plan.stores else None
        parts = max(1, self.plan.stores)
        for k, part in enumerate(zip(*(self._columns(acc, self.n, parts) for acc in sums), strict=True)):
            shape, width = "[BLOCK_M, BLOCK_N]", self.n // parts
            if parts > 1:
                shape = "[BLOCK_M, PART]"
                column = code.block("column", f"{k * width} + {start}" if k else start, "PART", width, form.columns, 1, 2, depth)
            self.pieces.finish(self.e, piece, [*index, variable(column)], part, [row, column], shape)

    def _columns(self, acc: str, width: int, parts: int) -> list[str]:
        """Parts of the columns of an accumulator, from left to right."""
        if parts == 1:
            return [acc]
        left, right = self.code.fresh("left"), self.code.fresh("right")
        halves = f"tl.permute(tl.reshape({acc}, [BLOCK_M, 2, {width // 2}]), [0, 2, 1])"
        self.code.line(f"{left}, {right} = tl.split({halves})")
        return [part for half in (left, right) for part in self._columns(half, width // 2, parts // 2)]

    def _products(self, index: Index, rights: Sequence[tuple[Value, Sum]], piece: Var) -> list[str]:
        """Names of the accumulators in which the products of a tile are summed; ``rights`` are the right factors and their columns."""
        code, form = self.code, self.form
        total = total_of(form.dtype)
        accumulators = [code.let("acc", f"tl.zeros([BLOCK_M, BLOCK_N], {total})") for _ in form.nodes]
        start, depth = code.fresh("k"), code.depth + 1
        steps = self.pieces.steps(code, piece, form.depth)
        if self.plan.specialized and not self.plan.programs:
            steps = self.plan.loop(*self.pieces.ends(code, piece, form.depth))
        self.e.descriptors = Descriptors(code, self.e.places) if self.plan.descriptors else None
        with code.loop(f"for {start} in {steps}:"):
            along = code.block("ka", start, "BLOCK_K", self.k, form.depth, 1, 2, depth)  # as the columns of the left factor
            down = code.block("kb", start, "BLOCK_K", self.k, form.depth, 0, 2, depth)  # as the rows of the right one
            left = form.nodes[0].operands[0]
            a = factor(self.e, left, last([*index, variable(along)], left.type.rank), along, "[BLOCK_M, BLOCK_K]")
            for acc, (x, column) in zip(accumulators, rights, strict=True):
                b = factor(self.e, x, last([*index[: len(form.batch)], variable(down), column], x.type.rank), down, "[BLOCK_K, BLOCK_N]")
                code.line(f'{acc} = tl.dot({a}, {b}, {acc}, input_precision="{precision(form.dtype, self.target)}", out_dtype={total})')
        self.e.descriptors = None
        return accumulators

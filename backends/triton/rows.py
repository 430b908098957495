"""Reductions and what goes along with them, row by row: softmax, normalizations, sums over any axes.

A *row* is one element of the kept axes, a *column* one of the reduced axes, whichever they are: a mean over the space of an image with
its channels last has its columns far apart, and Triton lays its lanes out accordingly. A program has a few rows, [ROWS, COLUMNS] lanes.
Two sketches: ``persistent``, a whole row in lanes: everything is read once; ``looped``, a block of columns at a time: a loop for each
level of reductions that depend on one another, and one more for what is written to full rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphopt.backends.forms.support import REDUCTIONS, is_softmax_exp
from graphopt.backends.triton.code import Code, Launch, ceildiv, conditions
from graphopt.backends.triton.expr import Expressions, Index, Source, Tile
from graphopt.backends.triton.index import NO_AXES, Sum, Var, variable
from graphopt.backends.triton.pointwise import NARROW, cast, held, typed
from graphopt.errors import BuildError
from graphopt.ir import dims, types
from graphopt.ir.dims import Dim, Shape
from graphopt.ir.graph import Graph, Node, Value

ROW, COLUMN = 0, 1


class Split:
    """The kept and the reduced axes that all reductions of a region share.

    Attributes:
        kept, reduced: their sizes.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        x = nodes[0].operands[0]
        self.axes = reduced_axes(nodes[0])
        self.shape = x.shape
        self.kept: Shape = tuple(d for k, d in enumerate(x.shape) if k not in self.axes)
        self.reduced: Shape = tuple(x.shape[k] for k in self.axes)

    @property
    def rows(self) -> Dim:
        return dims.numel(self.kept)

    @property
    def columns(self) -> Dim:
        return dims.numel(self.reduced)

    def fits(self, node: Node) -> bool:
        """Whether a reduction goes over the same rows and columns."""
        other = Split([node])
        trailing = all(s.axes == list(range(len(s.shape) - len(s.axes), len(s.shape))) for s in (self, other))
        same = dims.same_shape(self.shape, other.shape) and self.axes == other.axes
        return same or (trailing and dims.same(self.rows, other.rows) and dims.same(self.columns, other.columns))


def reduced_axes(node: Node) -> list[int]:
    """The axes that a reduction goes over, in order."""
    rank = node.operands[0].type.rank
    return sorted(a % rank for a in node.attrs["axes"]) if rank else []


def reductions(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes() if n.name in REDUCTIONS]


def refusal(graph: Graph) -> str | None:
    """Why a region, whose composites are expanded, does not go row by row; None if it does."""
    nodes = reductions(graph)
    if not nodes:
        return "no reduction"
    split = Split(nodes)
    if any(not split.fits(n) for n in nodes):
        return "reductions over different rows"
    if any(d == 0 for d in split.shape):
        return "a reduction without elements"
    for v in graph.outputs:
        if not any(dims.same(v.type.numel, n) for n in (split.rows, dims.mul(split.rows, split.columns))):
            return f"an output {v.type} beside {dims.format_dim(split.rows)} rows of {dims.format_dim(split.columns)}"
    try:  # a use across rows, which shapes alone do not show
        emit(graph, 1, 16, looped=True, warps=1)
    except BuildError as error:
        return str(error)
    return None


class RowKernel:
    """A region of reductions over the same rows."""

    def __init__(self, graph: Graph, rows: int, columns: int) -> None:
        self.graph, self.block_rows, self.block_columns = graph, rows, columns
        self.code = Code(graph)
        self.e = Expressions(self.code)
        self.nodes = reductions(graph)
        self.split = Split(self.nodes)
        pid = self.code.program(0)
        self.row = self.code.block("row", f"{pid} * ROWS", "ROWS", rows, self.split.rows, ROW, 2)

    def column(self, start: str) -> Var:
        return self.code.block("column", start, "COLUMNS", self.block_columns, self.split.columns, COLUMN, 2, self.code.depth)

    # --- persistent ----------------------------------------------------------------------------------------------------------

    def persistent(self) -> None:
        """Everything in lanes, each reduction where it is first asked for."""
        column = self.column("")
        for node in self.nodes:
            self.e.sources[node.result] = self._lazily(node, column)
        self._outputs(column, lambda v: True)

    def _lazily(self, node: Node, column: Var) -> Source:
        found: list[Tile] = []

        def source(index: Index) -> Tile:
            self._check(node, index)
            if not found:
                x = self._operand(node, column)
                found.append(self._final(node, self._reduced(node, self._spread(self._masked(node, x, column)))))
            return found[0]

        return source

    # --- looped --------------------------------------------------------------------------------------------------------------

    def looped(self) -> None:
        """A loop for each level of reductions, and one for full rows."""
        for level in self._levels():
            accumulators = {n: self.code.let("acc", self._start(n)) for n in level}
            with self._columns() as column:
                for n in level:
                    x = self._masked(n, self._operand(n, column), column)
                    self.code.line(self._update(n, accumulators[n], x))
            for n in level:
                tile = self._final(n, self._reduced(n, accumulators[n]))
                self.e.sources[n.result] = self._given(n, tile)
        self._outputs(None, lambda v: not self._is_full(v))
        if any(self._is_full(v) for v in self.graph.outputs):
            with self._columns() as column:
                self._outputs(column, self._is_full)

    def _columns(self) -> _Columns:
        return _Columns(self)

    def _levels(self) -> list[list[Node]]:
        """Reductions by how many others stand before them, those first that need none."""
        depth: dict[Value, int] = {}
        levels: dict[int, list[Node]] = {}
        for node in self.graph.nodes():
            below = max((depth.get(v, 0) for v in node.operands), default=0)
            if node in self.nodes:
                levels.setdefault(below, []).append(node)
                below += 1
            for r in node.results:
                depth[r] = below
        return [levels[k] for k in sorted(levels)]

    def _given(self, node: Node, tile: Tile) -> Source:
        def source(index: Index) -> Tile:
            self._check(node, index)
            return tile

        return source

    # --- pieces that both share --------------------------------------------------------------------------------------------------

    def _check(self, node: Node, index: Index) -> None:
        """A row may only be asked for by its own lanes."""
        axes = reduced_axes(node)
        kept = [i for k, i in enumerate(index) if k not in axes] if node.attrs["keepdims"] else list(index)
        at = self.e.places.flatten(kept, [d for k, d in enumerate(node.operands[0].shape) if k not in axes])
        if at != variable(self.row):
            raise BuildError(f"{node.name} is read across rows")

    def _operand(self, node: Node, column: Var) -> Tile:
        """The element of what is reduced at this row and column."""
        x, axes = node.operands[0], reduced_axes(node)
        kept = [d for k, d in enumerate(x.shape) if k not in axes]
        rows = iter(self.e.places.unflatten(variable(self.row), kept))
        columns = iter(self.e.places.unflatten(variable(column), [x.shape[k] for k in axes]))
        return self.e.wide(x, [next(columns) if k in axes else next(rows) for k in range(x.type.rank)])

    def _masked(self, node: Node, x: Tile, column: Var) -> Tile:
        """The neutral element in lanes beyond the last column; truth values as numbers of what decides: a true, or a false one."""
        text, zero = x.text, x.zero
        if node.name in ("any", "all"):
            truth = cast(text, x.dtype, types.b1) if node.name == "any" else f"{text} == 0"
            text = self.code.let("bit", f"({truth}).to(tl.int32)", x.depth)
            zero = zero if node.name == "any" else frozenset()
        neutral = self._neutral(node)
        depth = max(x.depth, column.depth)
        if column.inside and not (set(column.inside) <= zero and neutral in ("0.0", "0")):
            text = self.code.let("m", f"tl.where({conditions(column.inside)}, {text}, {neutral})", depth)
        return Tile(text, x.dtype, x.axes | (frozenset([COLUMN]) if column.inside else NO_AXES), depth)

    def _neutral(self, node: Node) -> str:
        d = node.operands[0].dtype
        match node.name:
            case "any" | "all":
                return "0"
            case "sum" | "mean":
                return "0.0" if d == types.f32 or d in NARROW else typed(0, d)
            case "prod":
                return typed(1, d)
        least = node.name == "max"
        if d.is_float:
            return typed(float("-inf") if least else float("inf"), d)
        if d.is_bool:
            return typed(not least, d)
        signed = d.kind == "i"
        low, high = (-(1 << (d.bits - 1)) if signed else 0), (1 << (d.bits - signed)) - 1
        return typed(low if least else high, d)

    def _spread(self, x: Tile) -> str:
        """All lanes of a value that may be the same along an axis."""
        return x.text if x.axes == {ROW, COLUMN} else f"tl.broadcast_to({x.text}, [ROWS, COLUMNS])"

    def _reduced(self, node: Node, text: str) -> str:
        """The reduction of lanes along the columns, [ROWS, 1]."""
        d = node.operands[0].dtype
        match node.name:
            case "sum" | "mean" | "any" | "all":  # of truth values the extremes become vectors of bits, for which LLVM takes stack
                return f"tl.sum({text}, axis=1, keep_dims=True)"
            case "prod":
                return f"{self.code.helper('product')}({text})"
        if d.is_float and not _shifts_softmax(node):
            return f"{self.code.helper('greatest' if node.name == 'max' else 'least')}({text})"
        if d.is_bool:
            text = f"{text}.to(tl.int32)"
        return f"tl.{node.name}({text}, axis=1, keep_dims=True)"

    def _final(self, node: Node, text: str) -> Tile:
        """The result from the lanes' total: the mean's division, the result's type."""
        d = node.operands[0].dtype
        if node.name == "mean":
            text = f"{text} / {self.code.size(self.split.columns)}"
        elif node.name == "all":
            text = f"{text} == 0"
        elif node.name == "any" or d.is_bool:
            text = f"{text} != 0"
        elif not d.is_float:
            text = f"{text}.to({held(d)})"
        return Tile(self.code.let(node.name, text, 0), node.result.dtype, frozenset([ROW]))

    def _start(self, node: Node) -> str:
        kind = "tl.int32" if node.name in ("any", "all") else held(node.operands[0].dtype)
        value = self._neutral(node).removeprefix("tl.full((), ").rsplit(", tl.", 1)[0]
        return f"tl.full([ROWS, COLUMNS], {value}, {kind})"

    def _update(self, node: Node, acc: str, x: Tile) -> str:
        d = node.operands[0].dtype
        match node.name:
            case "sum" | "mean":
                return f"{acc} += {x.text}" if not d.is_bool else f"{acc} = {acc} | {x.text}"
            case "prod":
                return f"{acc} = {acc} * {x.text}"
            case "any" | "all":
                return f"{acc} = tl.maximum({acc}, {x.text})"
        if d.is_bool:
            return f"{acc} = {acc} {'|' if node.name == 'max' else '&'} {x.text}"
        nan = ", propagate_nan=tl.PropagateNan.ALL" if d.is_float and not _shifts_softmax(node) else ""
        return f"{acc} = tl.{node.name}imum({acc}, {x.text}{nan})"

    def _is_full(self, v: Value) -> bool:
        return not dims.same(v.type.numel, self.split.rows)

    def _outputs(self, column: Var | None, wanted: Callable[[Value], bool]) -> None:
        for k, v in enumerate(self.graph.outputs):
            if not wanted(v):
                continue
            if not self._is_full(v):
                self.e.store(k, self.e.places.unflatten(variable(self.row), v.shape), [self.row], "[ROWS, 1]")
                continue
            assert column is not None
            self.e.store(k, self._full_index(v, column), [self.row, column], "[ROWS, COLUMNS]")

    def _full_index(self, v: Value, column: Var) -> list[Sum]:
        """Index of an output of full rows."""
        split, places = self.split, self.e.places
        rows, columns = places.unflatten(variable(self.row), split.kept), places.unflatten(variable(column), split.reduced)
        taken = {k: columns[i] for i, k in enumerate(split.axes)}
        rest = iter(rows)
        full = [taken[k] if k in taken else next(rest) for k in range(len(split.shape))]
        return full if dims.same_shape(v.shape, split.shape) else places.unflatten(places.flatten(full, split.shape), v.shape)


class _Columns:
    """A loop over blocks of columns; gives the column's variable."""

    def __init__(self, kernel: RowKernel) -> None:
        self.kernel, self.start = kernel, kernel.code.fresh("start")
        size = kernel.code.size(kernel.split.columns)
        self._loop = kernel.code.loop(f"for {self.start} in range(0, {size}, COLUMNS):")

    def __enter__(self) -> Var:
        self._loop.__enter__()
        return self.kernel.column(self.start)

    def __exit__(self, *error: object) -> None:
        self._loop.__exit__(None, None, None)


def _shifts_softmax(node: Node) -> bool:
    """Whether a maximum is only what a softmax subtracts: a nan then comes through the sum by itself."""
    users = node.result.users
    return node.name == "max" and bool(users) and all(
        u.name == "sub" and u.results[0].users and all(is_softmax_exp(e) for e in u.results[0].users) for u in users
    )  # fmt: skip


def emit(graph: Graph, rows: int, columns: int, looped: bool, warps: int) -> tuple[Code, Launch]:
    """Write a region whose composites are expanded."""
    kernel = RowKernel(graph, rows, columns)
    if looped:
        kernel.looped()
    else:
        kernel.persistent()
    launch = Launch((ceildiv(kernel.split.rows, rows),), {"ROWS": rows, "COLUMNS": columns}, warps, 2 if looped else 1)
    return kernel.code, launch

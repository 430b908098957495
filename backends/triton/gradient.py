"""The gradient of an attention: weights are computed again from the logarithms of their sums, a tile of them at a time.

    P = exp(S - lse),  dS = P * (drop(dO V^T) - delta),  delta = rowsum(dO * O)
    dQ = scale dS K;   dV = drop(P)^T dO,  dK = scale dS^T Q;   dbias = dS

Two kernels, so that no two programs write to one place and a result has the same bits each time. In the first, a program has ``BLOCK_M``
rows of queries of one head and goes through the keys that they see; it leaves delta in scratch memory. In the second, a program has
``BLOCK_N`` keys of one head and goes through the rows that see them, of all heads that share these keys; its tiles lie the other way
around, as [keys, rows]. A third one, where the gradient of a bias is asked for, has a tile of the bias and goes through all heads (of all
batches) and rows that it is the same for. Dao, "FlashAttention-2", arXiv:2307.08691, section 3.1.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from graphopt.backends.forms.flashform import Form
from graphopt.backends.triton.attention import side
from graphopt.backends.triton.code import Code, Launch, Scratch, ceildiv, conditions
from graphopt.backends.triton.expr import Expressions, Index
from graphopt.backends.triton.index import Sum, Var, add, scale, variable
from graphopt.backends.triton.matmul import factor, precision
from graphopt.backends.triton.pointwise import NAMES, NARROW
from graphopt.backends.triton.scores import Scores
from graphopt.ir import dims, types
from graphopt.ir.dims import Shape
from graphopt.ir.graph import Graph, Value
from graphopt.ir.opset.attention_training import GIVEN, heads_that_share
from graphopt.target import Target

DQ, DK, DV, DBIAS = range(4)  # the outputs
DELTA = "delta"  # the scratch memory's name


@dataclass(frozen=True)
class Blocks:
    """Rows and keys of the tiles of a kernel."""

    rows: int
    keys: int


class GradientKernel:
    """One of the kernels of a gradient, under construction.

    Attributes:
        first: the axis of a tile along which rows lie; keys lie along the other.
    """

    def __init__(self, graph: Graph, form: Form, t: Target, blocks: Blocks, first: int = 0) -> None:
        self.graph, self.form, self.p, self.blocks, self.target = graph, form, form.parts, blocks, t
        self.dout, self.result, self.lse = form.node.operands[:GIVEN]
        self.d, self.e, self.first = side(form.depth), side(form.width), first
        self.tile = "[BLOCK_M, BLOCK_N]" if first == 0 else "[BLOCK_N, BLOCK_M]"
        self.rows = (*form.batch, form.queries)
        self.code = Code(graph, {DELTA: Scratch(types.f32, dims.numel(self.rows))})
        self.x = Expressions(self.code)
        self.scores = Scores(self.x, form)
        self.deep = self.code.block("d", "", "BLOCK_D", self.d, form.depth, 1, 2)
        self.wide = self.code.block("e", "", "BLOCK_E", self.e, form.width, 1, 2)

    def launch(self, grid: Sequence[dims.Dim], warps: int, stages: int) -> tuple[Code, Launch]:
        sizes = {"BLOCK_M": self.blocks.rows, "BLOCK_N": self.blocks.keys, "BLOCK_D": self.d, "BLOCK_E": self.e}
        return self.code, Launch(tuple(grid), sizes, warps, stages)

    # --- what is read -------------------------------------------------------------------------------------------------------

    def row(self, start: str, axis: int, depth: int = 0) -> Var:
        return self.code.block("row", start, "BLOCK_M", self.blocks.rows, self.form.queries, axis, 2, depth)

    def column(self, start: str, axis: int, depth: int = 0) -> Var:
        return self.code.block("column", start, "BLOCK_N", self.blocks.keys, self.form.keys, axis, 2, depth)

    def of_rows(self, lead: Index, row: Var) -> tuple[str, str]:
        """Rows of the queries and of the result's gradient, one below another."""
        q = self._read(self.p.q, lead, row, self.deep, "[BLOCK_M, BLOCK_D]")
        return q, self._read(self.dout, lead, row, self.wide, "[BLOCK_M, BLOCK_E]")

    def of_keys(self, lead: Index, column: Var) -> tuple[str, str]:
        """Rows of keys and values, one below another; ``lead`` is a head of queries."""
        lead = self.scores.lead_of(self.p.k, lead)
        k = self._read(self.p.k, lead, column, self.deep, "[BLOCK_N, BLOCK_D]")
        return k, self._read(self.p.v, lead, column, self.wide, "[BLOCK_N, BLOCK_E]")

    def _read(self, x: Value, lead: Index, row: Var, along: Var, shape: str) -> str:
        """Rows that are zero beyond the last one and beyond their end: products are summed along either."""
        both = replace(along, inside=(*row.inside, *along.inside), depth=max(row.depth, along.depth))
        return factor(self.x, x, [*lead, variable(row), variable(along)], both, shape)

    def place(self, lead: Index, row: Var) -> Sum:
        """Where in scratch memory the rows' numbers lie."""
        return self.x.places.flatten([*lead, variable(row)], self.rows)

    def delta_of(self, lead: Index, row: Var) -> str:
        """The rows' deltas, which the first kernel left."""
        at = self.code.place(self.place(lead, row))
        mask = f", mask={conditions(row.inside)}, other=0" if row.inside and at.axes else ""
        return self.code.let("delta", f"tl.load({DELTA} + {at.text}{mask})", max(at.depth, row.depth))

    # --- what is computed ---------------------------------------------------------------------------------------------------

    def dot(self, a: str, b: str, transposed: bool = False, acc: str = "") -> str:
        """A product of tiles, or of one with another's transpose."""
        b = f"tl.trans({b})" if transposed else b
        more = f", {acc}" if acc else ""
        return f'tl.dot({a}, {b}{more}, input_precision="{precision(self.p.q.dtype, self.target)}")'

    def narrow(self, x: str) -> str:
        """A tile as a factor of a product."""
        return f"{x}.to({NAMES[self.p.q.dtype]})" if self.p.q.dtype in NARROW else x

    def gradients(self, lead: Index, row: Var, column: Var, given: tuple[str, str, str, str], delta: str) -> tuple[str, str, str]:
        """Of a tile: the weights, and the gradients of the scores behind a soft cap and in front of it.

        Args:
            given: rows of queries, of the result's gradient, of keys, and of values.
        """
        code, (q, dout, k, v), turn = self.code, given, self.first == 1
        s = code.let("s", self.dot(k, q, True) if turn else self.dot(q, k, True))
        s, slope = self.scores.of(s, lead, row, column)
        if row.inside and turn:  # rows that are not there count for no key
            s = code.let("s", f'tl.where({conditions(row.inside)}, {s}, float("-inf"))')
        p = code.let("p", f"tl.exp({s} - {self.x.wide(self.lse, [*lead, variable(row)]).text})")
        dp = code.let("dp", self.dot(v, dout, True) if turn else self.dot(dout, v, True))
        if (times := self.scores.dropped.scale) != 1.0:
            dp = code.let("dp", f"{self.kept(dp, lead, row, column)} * {times!r}")
        behind = code.let("ds", f"{p} * ({dp} - {delta})")
        return p, behind, behind if slope is None else code.let("ds", f"{behind} * {slope}")

    def kept(self, value: str, lead: Index, row: Var, column: Var) -> str:
        """What dropout leaves of a tile."""
        return self.scores.dropped.kept(value, lead, variable(row), self.rows, variable(column))


class QueriesKernel(GradientKernel):
    """The gradient of the queries, and delta."""

    def emit(self, warps: int, stages: int) -> tuple[Code, Launch]:
        code, form = self.code, self.form
        tile = code.program(0, "tile")
        head = Var(code.program(1, "head"), dims.numel(form.batch))
        lead = self.x.places.unflatten(variable(head), form.batch)
        row = self.row(f"{tile} * BLOCK_M", 0)
        q, dout = self.of_rows(lead, row)
        index = [*lead, variable(row), variable(self.wide)]
        parts = [self.x.wide(x, index).text for x in (self.dout, self.result)]
        product = code.let("product", f"tl.broadcast_to({' * '.join(parts)}, [BLOCK_M, BLOCK_E])")
        if self.wide.inside:
            product = code.let("product", f"tl.where({conditions(self.wide.inside)}, {product}, 0.0)")
        delta = code.let("delta", f"tl.sum({product}, axis=1, keep_dims=True)")
        self.x.write(DELTA, self.place(lead, row), [row], "[BLOCK_M, 1]", delta)
        acc = code.let("acc", "tl.zeros([BLOCK_M, BLOCK_D], tl.float32)")
        low, high = self.scores.keys_of(tile)
        start = code.fresh("n")
        with code.loop(f"for {start} in range({low}, {high}, BLOCK_N):"):
            k, v = self.of_keys(lead, self.column(start, 0, 1))
            _, _, ds = self.gradients(lead, row, self.column(start, 1, 1), (q, dout, k, v), delta)
            code.line(f"{acc} = {self.dot(self.narrow(ds), k, acc=acc)}")
        value = code.let("dq", f"{acc} * {form.node.attrs['scale']!r}")
        self.x.store(DQ, [*lead, variable(row), variable(self.deep)], [row, self.deep], "[BLOCK_M, BLOCK_D]", value)
        return self.launch((ceildiv(form.queries, self.blocks.rows), dims.numel(form.batch)), warps, stages)


class KeysKernel(GradientKernel):
    """The gradients of keys and values."""

    def emit(self, warps: int, stages: int) -> tuple[Code, Launch]:
        code, form, share = self.code, self.form, heads_that_share(self.p.q.type, self.p.k.type)
        own: Shape = self.p.k.shape[:-2]
        tile = code.program(0, "tile")
        head = Var(code.program(1, "head"), dims.numel(own))
        of_keys = self.x.places.unflatten(variable(head), own)
        column = self.column(f"{tile} * BLOCK_N", 0)
        keys = self._read(self.p.k, of_keys, column, self.deep, "[BLOCK_N, BLOCK_D]")
        values = self._read(self.p.v, of_keys, column, self.wide, "[BLOCK_N, BLOCK_E]")
        dk, dv = (code.let(name, f"tl.zeros([BLOCK_N, {size}], tl.float32)") for name, size in (("dk", "BLOCK_D"), ("dv", "BLOCK_E")))
        low, high = self.scores.rows_of(tile)
        with ExitStack() as loops:
            lead = of_keys
            if share > 1:
                h = Var(code.fresh("h"), share, depth=1)
                loops.enter_context(code.loop(f"for {h.name} in range({share}):"))
                lead = [*of_keys[:-1], add(scale(of_keys[-1], share), variable(h))]
            start, depth = code.fresh("m"), code.depth + 1
            loops.enter_context(code.loop(f"for {start} in range({low}, {high}, BLOCK_M):"))
            below, beside = self.row(start, 0, depth), self.row(start, 1, depth)
            q, dout = self.of_rows(lead, below)
            p, _, ds = self.gradients(lead, beside, column, (q, dout, keys, values), self.delta_of(lead, beside))
            kept = self.kept(p, lead, beside, column)
            code.line(f"{dv} = {self.dot(self.narrow(kept), dout, acc=dv)}")
            code.line(f"{dk} = {self.dot(self.narrow(ds), q, acc=dk)}")
        for k, acc, times, along, shape in (
            (DK, dk, form.node.attrs["scale"], self.deep, "[BLOCK_N, BLOCK_D]"),
            (DV, dv, self.scores.dropped.scale, self.wide, "[BLOCK_N, BLOCK_E]"),
        ):
            value = code.let(acc[:2], f"{acc} * {times!r}") if times != 1 else acc
            self.x.store(k, [*of_keys, variable(column), variable(along)], [column, along], shape, value)
        return self.launch((ceildiv(form.keys, self.blocks.keys), dims.numel(own)), warps, stages)


class BiasKernel(GradientKernel):
    """The gradient of the bias: a program has a tile of it, and goes through what the bias is the same for, in order."""

    def emit(self, warps: int, stages: int) -> tuple[Code, Launch]:
        code, form, bias = self.code, self.form, self.p.bias
        assert bias is not None
        missing = len(form.batch) + 2 - bias.type.rank
        full = (*[1] * missing, *bias.shape)
        own = [n if one != 1 else 1 for n, one in zip(form.batch, full, strict=False)]
        same = [n if one == 1 else 1 for n, one in zip(form.batch, full, strict=False)]
        one_row = full[-2] == 1
        tile, of_rows = code.program(0, "tile"), "0" if one_row else code.program(1, "rows")
        part = Var(code.program(2, "part"), dims.numel(own))
        given = self.x.places.unflatten(variable(part), own)
        column = self.column(f"{tile} * BLOCK_N", 1)
        acc = code.let("acc", f"tl.zeros({self.tile}, tl.float32)")
        low, high = self.scores.rows_of(tile)
        if not one_row:
            low = code.let("low", f"tl.maximum({low}, {of_rows} * BLOCK_M)")
            high = code.let("high", f"tl.minimum({high}, ({of_rows} + 1) * BLOCK_M)")
        with ExitStack() as loops:
            lead = given
            if dims.numel(same) != 1:
                h = Var(code.fresh("h"), dims.numel(same), depth=1)
                loops.enter_context(code.loop(f"for {h.name} in range({code.size(dims.numel(same))}):"))
                lead = [add(a, b) for a, b in zip(given, self.x.places.unflatten(variable(h), same), strict=True)]
            start, depth = code.fresh("m"), code.depth + 1
            loops.enter_context(code.loop(f"for {start} in range({low}, {high}, BLOCK_M):"))
            row = self.row(start, 0, depth)
            both = (*self.of_rows(lead, row), *self.of_keys(lead, self.column(f"{tile} * BLOCK_N", 0)))
            _, ds, _ = self.gradients(lead, row, column, both, self.delta_of(lead, row))
            code.line(f"{acc} += " + (f"tl.where({conditions(row.inside)}, {ds}, 0.0)" if one_row and row.inside else ds))
        lanes, shape, value = [column], "[1, BLOCK_N]", acc
        if one_row:
            value = code.let("sum", f"tl.sum({acc}, axis=0, keep_dims=True)")
            index = [*given, Sum(), variable(column)]
        else:
            row = self.row(f"{of_rows} * BLOCK_M", 0)
            lanes, shape, index = [row, column], self.tile, [*given, variable(row), variable(column)]
        self.x.store(DBIAS, index[missing:], lanes, shape, value)
        rows = 1 if one_row else ceildiv(form.queries, self.blocks.rows)
        return self.launch((ceildiv(form.keys, self.blocks.keys), rows, dims.numel(own)), warps, stages)


def emit(graph: Graph, form: Form, t: Target, own: int, along: int, warps: int, stages: int) -> tuple[Code, Launch]:
    """Write the kernels of a gradient: ``own`` rows, or keys, of a program, which goes through the others by ``along``."""
    code, launch = QueriesKernel(graph, form, t, Blocks(own, along)).emit(warps, stages)
    code.then.append(KeysKernel(graph, form, t, Blocks(along, own), first=1).emit(warps, stages))
    if form.node.attrs["bias_gradient"]:
        code.then.append(BiasKernel(graph, form, t, Blocks(along, along)).emit(warps, stages))
    return code, launch

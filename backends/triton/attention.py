"""Attention in one kernel: a block of keys and values at a time, the scores never in memory.

    m' = max(m, max_j s_j);  l' = l e**(m - m') + sum_j e**(s_j - m');  o' = o e**(m - m') + sum_j e**(s_j - m') v_j

A program has ``BLOCK_M`` rows of queries of one head, and goes through the keys that those rows can see by position. A key that a row
does not see has the score -inf, or, where a row without keys is the mean of all values, the least number. A sink is where maximum and sum
begin. Dao et al., FlashAttention, arXiv:2205.14135; the running maximum: Milakov and Gimelshein, arXiv:1805.02867.

Heads that share keys and values can be rows of one program, which then reads these once for all of them: row ``r`` is query
``r // heads`` of head ``r % heads``, so that the rows of a tile are of neighbouring queries, which see nearly the same keys. Ainslie
et al., GQA, arXiv:2305.13245.

Where programs are fewer than processors and keys are many, as in decoding, programs share the keys of their rows (split-KV), block by block
in turns. Each leaves m, l and o in scratch memory, in f32; a second kernel joins them in order by the same rule, so a result has the same
bits each time. Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.backends.forms.flashform import Form
from graphopt.backends.triton.code import Code, Launch, Scratch, ceildiv, conditions, power_of_two
from graphopt.backends.triton.descriptors import Descriptors
from graphopt.backends.triton.expr import Expressions, Index
from graphopt.backends.triton.index import Sum, Var, add, scale, variable
from graphopt.backends.triton.matmul import LEAST, factor, precision
from graphopt.backends.triton.pointwise import NAMES, NARROW, number
from graphopt.backends.triton.scores import Scores
from graphopt.backends.triton.sums import in_turn
from graphopt.ir import dims, types
from graphopt.ir.graph import Graph, Value
from graphopt.ir.opset.attention_training import EMPTY
from graphopt.target import Target

JOINED = 512  # elements of a program that joins pieces, at most


def side(n: int) -> int:
    """Lanes along the elements of a head."""
    return max(LEAST, power_of_two(n))


class Rows:
    """Rows of the result, under construction: of one head, or of several that share keys and values.

    Args:
        rows: of a program.
        pieces: of the keys; where there are several, their parts of the result are in scratch memory.
        heads: whose queries are rows of one program; a divisor of ``form.share``.

    Attributes:
        row: number of a row.
        query: its query.
        lead: index of its batch and head.
        first_head: the same of the first of the heads.
    """

    def __init__(self, graph: Graph, form: Form, rows: int, pieces: int, heads: int = 1) -> None:
        self.graph, self.form, self.p, self.attrs = graph, form, form.parts, form.node.attrs
        self.m, self.e, self.pieces, self.heads = rows, side(form.width), pieces, heads
        self.groups = form.batch if heads == 1 else (*form.batch[:-1], dims.floordiv(form.batch[-1], heads))
        count, each = dims.numel([*form.batch, form.queries]), (("tops", 1), ("totals", 1), ("partial", form.width))
        self.parts = {name: (dims.mul(count, n), n) for name, n in each}
        scratch = {name: Scratch(types.f32, dims.mul(pieces, size)) for name, (size, _) in self.parts.items()}
        self.code = Code(graph, scratch if pieces > 1 else {})
        self.x = Expressions(self.code)
        self.scores = Scores(self.x, form)
        self.tile = self.code.program(0, "tile")
        head = Var(self.code.program(1, "head"), dims.numel(self.groups))
        self.lead = self.first_head = self.x.places.unflatten(variable(head), self.groups)
        self.row = self.query = self.code.block("row", f"{self.tile} * BLOCK_M", "BLOCK_M", rows, dims.mul(form.queries, heads), 0, 2)
        if heads > 1:
            *batch, group = self.lead
            row, own = variable(self.row), scale(group, heads)
            self.query = self.code.derived(self.x.places.quotient(row, heads), form.queries, "query")
            self.first_head, self.lead = [*batch, own], [*batch, add(own, self.x.places.remainder(row, heads))]
        self.width = self.code.block("e", "", "BLOCK_E", self.e, form.width, 1, 2)

    @property
    def grid(self) -> tuple[dims.Dim, ...]:
        return ceildiv(self.row.extent, self.m), dims.numel(self.groups)

    def start(self, sinks: bool) -> tuple[str, str, str]:
        """Names of the maximum, the sum and the result so far."""
        code = self.code
        top = code.let("top", 'tl.full([BLOCK_M, 1], float("-inf"), tl.float32)')
        total = code.let("total", "tl.zeros([BLOCK_M, 1], tl.float32)")
        if sinks and self.p.sinks is not None:
            code.line(f"{top} = tl.zeros([BLOCK_M, 1], tl.float32) + {self.scores.of_head(self.p.sinks, self.lead)}")
            code.line(f"{total} = tl.full([BLOCK_M, 1], 1.0, tl.float32)")
        return top, total, code.let("acc", "tl.zeros([BLOCK_M, BLOCK_E], tl.float32)")

    def weights(self, s: str, top: str, new: str) -> tuple[str, str]:
        """What scores (or other maxima), and what was summed below the maximum ``top``, count for below the maximum ``new``."""
        base = self.code.let("base", f'tl.where({new} == float("-inf"), 0.0, {new})')  # a row that has seen no key yet
        return self.code.let("p", f"tl.exp({s} - {base})"), self.code.let("alpha", f"tl.exp({top} - {base})")

    def place(self, name: str) -> Sum:
        """Where in scratch memory the rows' numbers of the first piece lie."""
        n = self.parts[name][1]
        at = scale(self.x.places.flatten([*self.lead, variable(self.query)], (*self.form.batch, self.form.queries)), n)
        return at if name != "partial" else add(at, variable(self.width))

    def lanes(self, name: str) -> tuple[list[Var], str]:
        """The variables of such a tile, and its shape as text."""
        return ([self.row, self.width], "[BLOCK_M, BLOCK_E]") if name == "partial" else ([self.row], "[BLOCK_M, 1]")

    def finish(self, top: str, total: str, out: str) -> None:
        """Write the rows through the views behind the attention; and the logarithm of their sums, if that is a result, too."""
        times = self.scores.dropped.scale
        result = self.code.let("o", f"{out} / {total}" if times == 1.0 else f"{out} * {times!r} / {total}")
        if self.attrs["empty"] == "zero":
            result = self.code.let("o", f"tl.where({total} == 0.0, 0.0, {result})")
        index: Sequence[Sum] = [*self.lead, variable(self.query), variable(self.width)]
        for node in self.form.views:
            if node.name == "transpose":
                index = [index[p] for p in node.attrs["perm"]]
            else:
                index = self.x.places.unflatten(self.x.places.flatten(index, node.operands[0].shape), node.result.shape)
        self.x.store(0, index, [self.row, self.width], "[BLOCK_M, BLOCK_E]", result)
        if self.form.keeps_lse:
            lse = self.code.let("lse", f"{top} + tl.log({total})")
            lse = self.code.let("lse", f'tl.where({lse} == float("-inf"), {number(EMPTY[self.attrs["empty"]], types.f32)}, {lse})')
            self.x.store(1, [*self.lead, variable(self.query)], [self.row], "[BLOCK_M, 1]", lse)


class JoinKernel(Rows):
    """A kernel that joins what pieces of the keys gave."""

    def emit(self) -> tuple[Code, Launch]:
        code, (top, total, out) = self.code, self.start(sinks=True)
        places = {name: code.let("place", code.place(self.place(name)).text) for name in self.parts}
        with code.loop(f"for _ in {in_turn(self.pieces)}:"):
            s, part, acc = (self._load(name, at) for name, at in places.items())
            new = code.let("new", f"tl.maximum({top}, {s})")
            p, alpha = self.weights(s, top, new)
            code.line(f"{total} = {total} * {alpha} + {part} * {p}")
            code.line(f"{out} = {out} * {alpha} + {acc} * {p}")
            code.line(f"{top} = {new}")
            for name, at in places.items():
                code.line(f"{at} += {code.size(self.parts[name][0])}")
        self.finish(top, total, out)
        return code, Launch(self.grid, {"BLOCK_M": self.m, "BLOCK_E": self.e}, 4 if self.m * self.e > 256 else 1, 1)

    def _load(self, name: str, at: str) -> str:
        lanes, shape = self.lanes(name)
        mask = conditions([c for lane in lanes for c in lane.inside])
        return self.code.let("x", f"tl.load(tl.broadcast_to({name} + {at}, {shape}){f', mask={mask}, other=0' if mask else ''})", 1)


class FlashKernel(Rows):
    """One region around an attention."""

    def __init__(self, graph: Graph, form: Form, t: Target, rows: int, keys: int, pieces: int = 1, heads: int = 1,
                 descriptors: bool = False) -> None:  # fmt: skip
        super().__init__(graph, form, rows, pieces, heads)
        self.n, self.d = keys, side(form.depth)
        self.precision = precision(form.out.dtype, t)
        self.by_descriptor = Descriptors(self.code, self.x.places) if descriptors else None

    def emit(self, warps: int, stages: int) -> tuple[Code, Launch]:
        code, form, p, lead, query, scores = self.code, self.form, self.p, self.lead, self.query, self.scores
        piece = Var(code.program(2, "piece") if self.pieces > 1 else "0", self.pieces)
        q_depth = code.block("dq", "", "BLOCK_D", self.d, form.depth, 1, 2)
        k_depth = code.block("dk", "", "BLOCK_D", self.d, form.depth, 0, 2)
        q = self._factor(p.q, [*scores.lead_of(p.q, lead), variable(query), variable(q_depth)], q_depth, "[BLOCK_M, BLOCK_D]")
        top, total, out = self.start(sinks=self.pieces == 1)
        low, high = scores.keys_of(self.tile, self.heads)
        first, blocks = code.fresh("n"), f"{low}, {high}, BLOCK_N"
        if self.pieces > 1:
            blocks = f"{low} + {piece.name} * BLOCK_N, {high}, {self.pieces} * BLOCK_N".removeprefix("0 + ")
        with code.loop(f"for {first} in range({blocks}):"):
            column = code.block("column", first, "BLOCK_N", self.n, form.keys, 1, 2, 1)
            down = code.block("down", first, "BLOCK_N", self.n, form.keys, 0, 2, 1)
            of_keys = [*scores.lead_of(p.k, self.first_head), variable(column), variable(k_depth)]
            k = self._factor(p.k, of_keys, k_depth, "[BLOCK_D, BLOCK_N]")
            s, _ = scores.of(code.let("s", f'tl.dot({q}, {k}, input_precision="{self.precision}")'), lead, query, column)
            new = code.let("new", f"tl.maximum({top}, tl.max({s}, axis=1, keep_dims=True))")
            weight, alpha = self.weights(s, top, new)
            code.line(f"{total} = {total} * {alpha} + tl.sum({weight}, axis=1, keep_dims=True)")
            v = self._factor(p.v, [*scores.lead_of(p.v, self.first_head), variable(down), variable(self.width)], down, "[BLOCK_N, BLOCK_E]")
            kept = scores.dropped.kept(weight, lead, variable(query), (*form.batch, form.queries), variable(column))
            weight = f"{kept}.to({NAMES[p.v.dtype]})" if p.v.dtype in NARROW else kept
            code.line(f'{out} = tl.dot({weight}, {v}, {out} * {alpha}, input_precision="{self.precision}")')
            code.line(f"{top} = {new}")
        if self.pieces == 1:
            self.finish(top, total, out)
        else:
            self._keep(piece, (top, total, out))
        sizes = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_D": self.d, "BLOCK_E": self.e}
        return code, Launch((*self.grid, *([self.pieces] if self.pieces > 1 else [])), sizes, warps, stages)

    def _factor(self, v: Value, index: Index, along: Var, shape: str) -> str:
        """A tile of queries, keys or values; ``along`` is the axis that is summed."""
        self.x.descriptors = self.by_descriptor
        text = factor(self.x, v, index, along, shape)
        self.x.descriptors = None
        return text

    def _keep(self, piece: Var, found: tuple[str, str, str]) -> None:
        """Leave the piece's part, and join all in another kernel, of a few rows a program."""
        for (name, (size, _)), value in zip(self.parts.items(), found, strict=True):
            self.x.write(name, add(self.place(name), scale(variable(piece), size)), *self.lanes(name), value)
        rows = min(self.m, power_of_two(self.form.queries) if isinstance(self.form.queries, int) else self.m, max(1, JOINED // self.e))
        self.code.then.append(JoinKernel(self.graph, self.form, rows, self.pieces).emit())

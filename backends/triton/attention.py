"""Attention in one kernel: a block of keys and values at a time, the scores never in memory.

    m' = max(m, max_j s_j);  l' = l e**(m - m') + sum_j e**(s_j - m');  o' = o e**(m - m') + sum_j e**(s_j - m') v_j

A program has ``BLOCK_M`` rows of queries of one head, and goes through the keys that those rows can see by position. A key that a row
does not see has the score -inf, or, where a row without keys is the mean of all values, the least number. A sink is where maximum and sum
begin. Dao et al., FlashAttention, arXiv:2205.14135; the running maximum: Milakov and Gimelshein, arXiv:1805.02867.

Where programs are fewer than processors and keys are many, as in decoding, programs share the keys of their rows (split-KV), block by block
in turns. Each leaves m, l and o in scratch memory, in f32; a second kernel joins them in order by the same rule, so a result has the same
bits each time. Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.backends.forms.flashform import Form
from graphopt.backends.triton.code import Code, Launch, Scratch, ceildiv, conditions, power_of_two
from graphopt.backends.triton.expr import Expressions
from graphopt.backends.triton.index import Sum, Var, add, scale, variable
from graphopt.backends.triton.matmul import LEAST, factor, precision
from graphopt.backends.triton.pointwise import NAMES, NARROW
from graphopt.ir import dims, types
from graphopt.ir.graph import Graph, Value
from graphopt.ir.opset.attention import groups
from graphopt.target import Target

JOINED = 2048  # elements of a program that joins pieces, at most


def side(n: int) -> int:
    """Lanes along the elements of a head."""
    return max(LEAST, power_of_two(n))


class Rows:
    """Rows of one head's result, under construction.

    Args:
        rows: of a program.
        pieces: of the keys; where there are several, their parts of the result are in scratch memory.
    """

    def __init__(self, graph: Graph, form: Form, rows: int, pieces: int) -> None:
        self.graph, self.form, self.p, self.attrs = graph, form, form.parts, form.node.attrs
        self.m, self.e, self.pieces = rows, side(form.width), pieces
        count, each = dims.numel([*form.batch, form.queries]), (("tops", 1), ("totals", 1), ("partial", form.width))
        self.parts = {name: (dims.mul(count, n), n) for name, n in each}
        scratch = {name: Scratch(types.f32, dims.mul(pieces, size)) for name, (size, _) in self.parts.items()}
        self.code = Code(graph, scratch if pieces > 1 else {})
        self.x = Expressions(self.code)
        self.tile = self.code.program(0, "tile")
        head = Var(self.code.program(1, "head"), dims.numel(form.batch))
        self.lead = self.x.places.unflatten(variable(head), form.batch)
        self.row = self.code.block("row", f"{self.tile} * BLOCK_M", "BLOCK_M", rows, form.queries, 0, 2)
        self.width = self.code.block("e", "", "BLOCK_E", self.e, form.width, 1, 2)

    @property
    def grid(self) -> tuple[dims.Dim, ...]:
        return ceildiv(self.form.queries, self.m), dims.numel(self.form.batch)

    def start(self, sinks: bool) -> tuple[str, str, str]:
        """Names of the maximum, the sum and the result so far."""
        code = self.code
        top = code.let("top", 'tl.full([BLOCK_M, 1], float("-inf"), tl.float32)')
        total = code.let("total", "tl.zeros([BLOCK_M, 1], tl.float32)")
        if sinks and self.p.sinks is not None:
            sink = self.x.wide(self.p.sinks, [self.lead[-1] if self.lead else Sum()])
            code.line(f"{top} = tl.zeros([BLOCK_M, 1], tl.float32) + {sink.text}")
            code.line(f"{total} = tl.full([BLOCK_M, 1], 1.0, tl.float32)")
        return top, total, code.let("acc", "tl.zeros([BLOCK_M, BLOCK_E], tl.float32)")

    def weights(self, s: str, top: str, new: str) -> tuple[str, str]:
        """What scores (or other maxima), and what was summed below the maximum ``top``, count for below the maximum ``new``."""
        base = self.code.let("base", f'tl.where({new} == float("-inf"), 0.0, {new})')  # a row that has seen no key yet
        return self.code.let("p", f"tl.exp({s} - {base})"), self.code.let("alpha", f"tl.exp({top} - {base})")

    def place(self, name: str) -> Sum:
        """Where in scratch memory the rows' numbers of the first piece lie."""
        n = self.parts[name][1]
        at = scale(self.x.places.flatten([*self.lead, variable(self.row)], (*self.form.batch, self.form.queries)), n)
        return at if name != "partial" else add(at, variable(self.width))

    def lanes(self, name: str) -> tuple[list[Var], str]:
        """The variables of such a tile, and its shape as text."""
        return ([self.row, self.width], "[BLOCK_M, BLOCK_E]") if name == "partial" else ([self.row], "[BLOCK_M, 1]")

    def finish(self, total: str, out: str) -> None:
        """Write the rows through the views behind the attention."""
        result = self.code.let("o", f"{out} / {total}")
        if self.attrs["empty"] == "zero":
            result = self.code.let("o", f"tl.where({total} == 0.0, 0.0, {result})")
        index: Sequence[Sum] = [*self.lead, variable(self.row), variable(self.width)]
        for node in self.form.views:
            if node.name == "transpose":
                index = [index[p] for p in node.attrs["perm"]]
            else:
                index = self.x.places.unflatten(self.x.places.flatten(index, node.operands[0].shape), node.result.shape)
        self.x.store(0, index, [self.row, self.width], "[BLOCK_M, BLOCK_E]", result)


class JoinKernel(Rows):
    """A kernel that joins what pieces of the keys gave."""

    def emit(self) -> tuple[Code, Launch]:
        code, (top, total, out) = self.code, self.start(sinks=True)
        places = {name: code.let("place", code.place(self.place(name)).text) for name in self.parts}
        with code.loop(f"for _ in tl.static_range({self.pieces}):"):
            s, part, acc = (self._load(name, at) for name, at in places.items())
            new = code.let("new", f"tl.maximum({top}, {s})")
            p, alpha = self.weights(s, top, new)
            code.line(f"{total} = {total} * {alpha} + {part} * {p}")
            code.line(f"{out} = {out} * {alpha} + {acc} * {p}")
            code.line(f"{top} = {new}")
            for name, at in places.items():
                code.line(f"{at} += {code.size(self.parts[name][0])}")
        self.finish(total, out)
        return code, Launch(self.grid, {"BLOCK_M": self.m, "BLOCK_E": self.e}, 4 if self.m * self.e > 256 else 1, 1)

    def _load(self, name: str, at: str) -> str:
        lanes, shape = self.lanes(name)
        mask = conditions([c for lane in lanes for c in lane.inside])
        return self.code.let("x", f"tl.load(tl.broadcast_to({name} + {at}, {shape}){f', mask={mask}, other=0' if mask else ''})", 1)


class FlashKernel(Rows):
    """One region around an attention."""

    def __init__(self, graph: Graph, form: Form, t: Target, queries: int, keys: int, pieces: int = 1) -> None:
        super().__init__(graph, form, queries, pieces)
        self.n, self.d = keys, side(form.depth)
        self.precision = precision(form.node.result.dtype, t)

    def emit(self, warps: int, stages: int) -> tuple[Code, Launch]:
        code, form = self.code, self.form
        piece = Var(code.program(2, "piece") if self.pieces > 1 else "0", self.pieces)
        q_depth = code.block("dq", "", "BLOCK_D", self.d, form.depth, 1, 2)
        k_depth = code.block("dk", "", "BLOCK_D", self.d, form.depth, 0, 2)
        q = factor(self.x, self.p.q, [*self._of(self.p.q), variable(self.row), variable(q_depth)], q_depth, "[BLOCK_M, BLOCK_D]")
        top, total, out = self.start(sinks=self.pieces == 1)
        low, high = self._span(self.tile)
        first, blocks = code.fresh("n"), f"{low}, {high}, BLOCK_N"
        if self.pieces > 1:
            blocks = f"{low} + {piece.name} * BLOCK_N, {high}, {self.pieces} * BLOCK_N".removeprefix("0 + ")
        with code.loop(f"for {first} in range({blocks}):"):
            column = code.block("column", first, "BLOCK_N", self.n, form.keys, 1, 2, 1)
            down = code.block("down", first, "BLOCK_N", self.n, form.keys, 0, 2, 1)
            k = factor(self.x, self.p.k, [*self._of(self.p.k), variable(column), variable(k_depth)], k_depth, "[BLOCK_D, BLOCK_N]")
            s = self._scores(code.let("s", f'tl.dot({q}, {k}, input_precision="{self.precision}")'), column)
            new = code.let("new", f"tl.maximum({top}, tl.max({s}, axis=1, keep_dims=True))")
            p, alpha = self.weights(s, top, new)
            code.line(f"{total} = {total} * {alpha} + tl.sum({p}, axis=1, keep_dims=True)")
            v = factor(self.x, self.p.v, [*self._of(self.p.v), variable(down), variable(self.width)], down, "[BLOCK_N, BLOCK_E]")
            weight = f"{p}.to({NAMES[self.p.v.dtype]})" if self.p.v.dtype in NARROW else p
            code.line(f'{out} = tl.dot({weight}, {v}, {out} * {alpha}, input_precision="{self.precision}")')
            code.line(f"{top} = {new}")
        if self.pieces == 1:
            self.finish(total, out)
        else:
            self._keep(piece, (top, total, out))
        sizes = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_D": self.d, "BLOCK_E": self.e}
        return code, Launch((*self.grid, *([self.pieces] if self.pieces > 1 else [])), sizes, warps, stages)

    def _keep(self, piece: Var, found: tuple[str, str, str]) -> None:
        """Leave the piece's part, and join all in another kernel, of a few rows a program."""
        for (name, (size, _)), value in zip(self.parts.items(), found, strict=True):
            self.x.write(name, add(self.place(name), scale(variable(piece), size)), *self.lanes(name), value)
        rows = min(self.m, power_of_two(self.form.queries) if isinstance(self.form.queries, int) else self.m, max(1, JOINED // self.e))
        self.code.then.append(JoinKernel(self.graph, self.form, rows, self.pieces).emit())

    def _of(self, x: Value) -> list[Sum]:
        """Index of the batch and head axes of queries, keys or values: heads that share, and axes of one."""
        lead = self.lead[len(self.lead) - (x.type.rank - 2) :] if x.type.rank > 2 else []
        share = groups(self.p.q.shape, x.shape)
        if share > 1:
            lead = [*lead[:-1], self.x.places.quotient(lead[-1], share)]
        return [Sum() if d == 1 else i for i, d in zip(lead, x.shape[:-2], strict=True)]

    def _span(self, tile: str) -> tuple[str, str]:
        """The keys that the tile's rows may see by position: from, and up to but not with."""
        code, attrs, keys = self.code, self.attrs, self.code.size(self.form.keys)
        if self.form.reads_all or not self.form.is_local:
            return "0", keys
        low, high, offset, window = "0", keys, code.size(attrs["offset"]), attrs["window"]
        end = f"({tile} + 1) * BLOCK_M + {offset}"  # behind the last row's own position
        if attrs["causal"]:
            high = code.let("high", f"tl.minimum({keys}, {end})")
        if window is not None:
            start = f"{tile} * BLOCK_M + {offset} - {code.size(window)} + 1"
            low = code.let("low", f"tl.maximum({start}, 0) // BLOCK_N * BLOCK_N")
            if not attrs["causal"]:
                high = code.let("high", f"tl.minimum({keys}, {end} + {code.size(window)} - 1)")
        return low, high

    def _scores(self, s: str, column: Var) -> str:
        """Scale, soft cap, bias, slopes; then what is not seen."""
        code, attrs, p = self.code, self.attrs, self.p
        if attrs["scale"] != 1:
            s = code.let("s", f"{s} * {attrs['scale']!r}")
        if attrs["softcap"] is not None:
            s = code.let("s", f"{attrs['softcap']!r} * {code.helper('tanh')}({s} / {attrs['softcap']!r})")
        if p.bias is not None:
            s = code.let("s", f"{s} + {self.x.wide(p.bias, self._beside(p.bias, column)).text}")
        if p.slopes is not None:
            slope = self.x.wide(p.slopes, [self.lead[-1] if self.lead else Sum()])
            s = code.let("s", f"{s} + {slope.text} * ({column.name} - {self.row.name}).to(tl.float32)")
        return self._seen(s, column)

    def _beside(self, x: Value, column: Var) -> list[Sum]:
        """Index of what broadcasts to the scores."""
        full = [*self.lead, variable(self.row), variable(column)]
        return [Sum() if d == 1 else i for i, d in zip(full[len(full) - x.type.rank :], x.shape, strict=True)]

    def _seen(self, s: str, column: Var) -> str:
        code, attrs, i, j = self.code, self.attrs, self.row.name, column.name
        offset, window = code.size(attrs["offset"]), attrs["window"]
        middle = i if attrs["offset"] == 0 else f"{i} + {offset}"
        seen: list[str] = []
        if attrs["causal"]:
            seen.append(f"({j} <= {middle})")
        if window is not None:
            seen.append(f"({j} > {middle} - {code.size(window)})")
            if not attrs["causal"]:
                seen.append(f"({j} < {middle} + {code.size(window)})")
        if self.p.mask is not None:
            seen.append(self.x.at(self.p.mask, self._beside(self.p.mask, column)).text)
        if self.form.reads_all:
            least = repr(float(torch.finfo(torch.float32).min))
            kept = f"tl.where({conditions(seen)}, {s}, {least})" if seen else s
            s = code.let("s", f"tl.maximum({kept}, {least}, propagate_nan=tl.PropagateNan.ALL)")
            seen = []
        seen += column.inside
        return code.let("s", f'tl.where({conditions(seen)}, {s}, float("-inf"))') if seen else s

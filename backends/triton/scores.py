"""The scores of an attention on tiles, whichever axes their rows and columns lie along; and what a tile can see.

    s = scale * q_i . k_j;   s = softcap * tanh(s / softcap);   s = s + bias[i, j] + slopes[h] * (j - i);   s = -inf where not seen
"""

from __future__ import annotations

import torch

from graphopt.backends.forms.flashform import Form
from graphopt.backends.triton.code import conditions
from graphopt.backends.triton.dropped import Dropped
from graphopt.backends.triton.expr import Expressions, Index
from graphopt.backends.triton.index import Sum, Var, variable
from graphopt.ir.graph import Value
from graphopt.ir.opset.attention import groups, sees_a_key


class Scores:
    """The scores of one attention, for the rows of a head and a block of keys."""

    def __init__(self, x: Expressions, form: Form) -> None:
        self.x, self.code, self.form, self.p, self.attrs = x, x.code, form, form.parts, form.node.attrs
        self.dropped = Dropped(x, self.p.seed, self.attrs["dropout"])

    # --- which elements -----------------------------------------------------------------------------------------------------

    def lead_of(self, x: Value, lead: Index) -> list[Sum]:
        """Index of the batch and head axes of queries, keys or values: heads that share, and axes of one."""
        own = list(lead)[len(lead) - (x.type.rank - 2) :] if x.type.rank > 2 else []
        share = groups(self.p.q.shape, x.shape)
        if share > 1:
            own = [*own[:-1], self.x.places.quotient(own[-1], share)]
        return [Sum() if d == 1 else i for i, d in zip(own, x.shape[:-2], strict=True)]

    def beside(self, x: Value, lead: Index, row: Var, column: Var) -> list[Sum]:
        """Index of what broadcasts to the scores."""
        full = [*lead, variable(row), variable(column)]
        return [Sum() if d == 1 else i for i, d in zip(full[len(full) - x.type.rank :], x.shape, strict=True)]

    def of_head(self, x: Value, lead: Index) -> str:
        """A head's own number."""
        return self.x.wide(x, [lead[-1] if lead else Sum()]).text

    @property
    def is_local(self) -> bool:
        """Whether a tile leaves out what its rows do not see by position. NaN of a row that sees nothing reaches all keys."""
        form, attrs = self.form, self.attrs
        if form.reads_all or not form.is_local:
            return False
        if form.node.name != "attention_backward" or attrs["empty"] != "nan":
            return True
        return self.p.bias is None and self.p.mask is None and sees_a_key(attrs, form.queries, form.keys, form.symbols)

    def keys_of(self, tile: str, heads: int = 1) -> tuple[str, str]:
        """The keys that ``BLOCK_M`` rows may see by position: from, and up to but not with; ``heads`` rows are of one query."""
        code, attrs, keys = self.code, self.attrs, self.code.size(self.form.keys)
        if not self.is_local:
            return "0", keys
        low, high, offset, window = "0", keys, code.size(attrs["offset"]), attrs["window"]
        first, last = f"{tile} * BLOCK_M", f"({tile} + 1) * BLOCK_M"
        if heads > 1:
            first, last = f"({first}) // {heads}", f"({last} + {heads - 1}) // {heads}"
        end = f"{last} + {offset}"  # behind the last row's own position
        if attrs["causal"]:
            high = code.let("high", f"tl.minimum({keys}, {end})")
        if window is not None:
            start = f"{first} + {offset} - {code.size(window)} + 1"
            low = code.let("low", f"tl.maximum({start}, 0) // BLOCK_N * BLOCK_N")
            if not attrs["causal"]:
                high = code.let("high", f"tl.minimum({keys}, {end} + {code.size(window)} - 1)")
        return low, high

    def rows_of(self, tile: str) -> tuple[str, str]:
        """The rows that may see some of ``BLOCK_N`` keys by position: from, and up to but not with."""
        code, attrs, rows = self.code, self.attrs, self.code.size(self.form.queries)
        if not self.is_local:
            return "0", rows
        high, offset, window = rows, code.size(attrs["offset"]), attrs["window"]
        start = f"{tile} * BLOCK_N - {offset}"  # the row whose own position is the first key
        if not attrs["causal"]:
            start += f" - {code.size(window)} + 1"
        low = code.let("low", f"tl.maximum({start}, 0) // BLOCK_M * BLOCK_M")
        if window is not None:
            high = code.let("high", f"tl.minimum({rows}, ({tile} + 1) * BLOCK_N - {offset} + {code.size(window)} - 1)")
        return low, high

    # --- their values -------------------------------------------------------------------------------------------------------

    def of(self, s: str, lead: Index, row: Var, column: Var) -> tuple[str, str | None]:
        """Scores from a product of queries and keys; and, under a soft cap, what their gradient is times behind it."""
        code, attrs, p, slope = self.code, self.attrs, self.p, None
        if attrs["scale"] != 1:
            s = code.let("s", f"{s} * {attrs['scale']!r}")
        if (cap := attrs["softcap"]) is not None:
            t = code.let("t", f"{code.helper('tanh')}({s} / {cap!r})")
            s, slope = code.let("s", f"{cap!r} * {t}"), f"(1.0 - {t} * {t})"
        if p.bias is not None:
            s = code.let("s", f"{s} + {self.x.wide(p.bias, self.beside(p.bias, lead, row, column)).text}")
        if p.slopes is not None:
            s = code.let("s", f"{s} + {self.of_head(p.slopes, lead)} * ({column.name} - {row.name}).to(tl.float32)")
        return self._seen(s, lead, row, column), slope

    def _seen(self, s: str, lead: Index, row: Var, column: Var) -> str:
        code, attrs, i, j = self.code, self.attrs, row.name, column.name
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
            seen.append(self.x.at(self.p.mask, self.beside(self.p.mask, lead, row, column)).text)
        if self.form.reads_all:
            least = repr(float(torch.finfo(torch.float32).min))
            kept = f"tl.where({conditions(seen)}, {s}, {least})" if seen else s
            s = code.let("s", f"tl.maximum({kept}, {least}, propagate_nan=tl.PropagateNan.ALL)")
            seen = []
        seen += column.inside
        return code.let("s", f'tl.where({conditions(seen)}, {s}, float("-inf"))') if seen else s

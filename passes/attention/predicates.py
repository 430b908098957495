"""Masks as predicates: which keys a row sees, proven from the graph.

A mask is read as a conjunction. Each part of it that compares positions gives a bound on ``j - i``; a part that depends on no input is
computed, and is a band or is not; what is left stays a mask of truth values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from graphopt.ir import Value, dims
from graphopt.ir.dims import Dim
from graphopt.ir.interpreter import evaluate_node
from graphopt.ir.ops import EvalContext
from graphopt.passes.attention.affine import Affine, at_least_zero
from graphopt.passes.attention.axes import Atom, Axes, Group, Placed, aligned, flat, up
from graphopt.rewrite import scalar_of

LARGEST = 1 << 24  # elements of a constant that is computed in order to look at it
_DEEPEST = 60


def hides(number: float, dtype_is_f16: bool) -> bool:
    """Whether a score of this number, or one to which it is added, weighs nothing beside any that is not: exp gives 0."""
    return number <= (-6e4 if dtype_is_f16 else -1e9)


@dataclass
class Band:
    """Bounds on ``j - i``: low <= j - i <= high; None: no bound."""

    low: Dim | None = None
    high: Dim | None = None

    def narrow(self, low: Dim | None, high: Dim | None, symbols: dims.Symbols) -> bool:
        """Take in further bounds; False, and nothing is changed, where it is not known which one is the tighter."""
        new_low, new_high = _tighter(self.low, low, ">=", symbols), _tighter(self.high, high, "<=", symbols)
        if new_low is False or new_high is False:
            return False
        self.low, self.high = new_low, new_high
        return True

    @property
    def is_all(self) -> bool:
        return self.low is None and self.high is None

    def attrs(self, keys: Dim, symbols: dims.Symbols) -> dict[str, object] | None:
        """The attributes of an attention; None if the band is not known to have a width of one key at least."""
        if self.is_all:
            return {}
        high = self.high if self.high is not None else dims.sub(keys, 1)
        if self.low is None:
            return {"causal": True, "offset": high}
        if dims.prove(self.low, "<=", high, symbols) is not True:
            return None
        if dims.same(self.low, dims.mul(high, -1), symbols) and self.high is not None and dims.prove(high, ">", 0, symbols) is True:
            return {"window": dims.add(high, 1)}
        return {"causal": True, "offset": high, "window": dims.add(dims.sub(high, self.low), 1)}

    def sees_a_key(self, rows: Dim, keys: Dim, symbols: dims.Symbols) -> bool:
        """Whether each row is proven to keep a key."""
        above = self.high is None or dims.prove(self.high, ">=", 0, symbols) is True
        below = self.low is None or dims.prove(dims.add(self.low, dims.sub(rows, 1)), "<", keys, symbols) is True
        return above and below


def _tighter(a: Dim | None, b: Dim | None, relation: str, symbols: dims.Symbols) -> Dim | bool | None:
    if a is None or b is None:
        return b if a is None else a
    if dims.same(a, b, symbols) or dims.prove(a, relation, b, symbols) is True:
        return a
    return b if dims.prove(b, relation, a, symbols) is True else False


@dataclass
class Seen:
    """What is known of the keys that rows see: a band, and further masks (``True``: the mask is to be negated)."""

    rows: Group
    keys: Group
    symbols: dims.Symbols
    band: Band = field(default_factory=Band)
    masks: list[tuple[Placed, bool]] = field(default_factory=list)
    proven: bool = True  # each row of what was computed keeps a key

    def take(self, mask: Placed, negated: bool = False) -> None:
        """Take in one mask: all parts of its conjunction."""
        for part, inverse in conjuncts(mask, negated):
            if not self._positions(part, inverse) and not self._computed(part, inverse):
                self.masks.append((part, inverse))

    @property
    def keeps_a_key(self) -> bool:
        rows, keys = (dims.numel([a.size for a in flat(g)]) for g in (self.rows, self.keys))
        return not self.masks and self.band.sees_a_key(rows, keys, self.symbols)

    # --- by comparison of positions -----------------------------------------------------------------------------------

    def _positions(self, part: Placed, inverse: bool) -> bool:
        found = at_least_zero(part.value, inverse)
        bounds = [self._bound(a, part.axes) for a in found] if found is not None else [None]
        trial = Band(self.band.low, self.band.high)
        if any(b is None or not trial.narrow(*b, self.symbols) for b in bounds):
            return False
        self.band = trial
        return True

    def _bound(self, a: Affine, axes: Axes) -> tuple[Dim | None, Dim | None] | None:
        """(low, high) for a >= 0; None if it does not speak of j - i."""
        steps: dict[Atom, Dim] = {}
        for step, group in zip((0,) * (len(axes) - len(a.steps)) + a.steps, axes, strict=True):
            if step != 0:
                if len(flat(group)) != 1:
                    return None
                steps[flat(group)[0]] = step
        row, key = flat(self.rows), flat(self.keys)
        i = steps.pop(row[0], 0) if len(row) == 1 else 0
        j = steps.pop(key[0], 0) if len(key) == 1 else 0
        if steps:
            return None
        keys = dims.numel([k.size for k in key])
        if i == j == 0:
            return (None, None) if dims.prove(a.base, ">=", 0, self.symbols) is True else None
        if j == -1 and (i == 1 or not row):  # j <= i + base
            return None, (None if dims.prove(a.base, ">=", dims.sub(keys, 1), self.symbols) is True else a.base)
        if j == 1 and (i == -1 or not row):  # j >= i - base
            last = dims.sub(dims.numel([r.size for r in row]), 1)
            low = dims.mul(a.base, -1)
            return (None if dims.prove(dims.add(last, low), "<=", 0, self.symbols) is True else low), None
        return None

    # --- by computation -----------------------------------------------------------------------------------------------

    def _computed(self, part: Placed, inverse: bool) -> bool:
        matrix = self.matrix(part)
        if matrix is None:
            return False
        found = band_of(matrix.logical_not() if inverse else matrix.bool())
        if found is None:
            return False
        trial = Band(self.band.low, self.band.high)
        if not trial.narrow(*found, self.symbols):
            return False
        self.band = trial
        return True

    def matrix(self, part: Placed) -> torch.Tensor | None:
        """A value that depends on no input as a matrix [M, N]; None if it depends on one, or differs from head to head."""
        constant = constant_value(part.value)
        if constant is None:
            return None
        atoms = [a for group in part.axes for a in flat(group)]
        if not dims.is_static([a.size for a in (*atoms, *flat(self.rows), *flat(self.keys))]):
            return None
        x = constant.reshape([int(a.size) for a in atoms])
        row, key = flat(self.rows), flat(self.keys)
        for a in [a for a in atoms if a not in row and a not in key]:  # what is the same for all of a batch is so for one
            first = x.select(atoms.index(a), 0)
            if not torch.equal(x, first.unsqueeze(atoms.index(a)).expand_as(x)):
                return None
            atoms.remove(a)
            x = first
        order = [a for a in (*row, *key) if a in atoms]
        x = x.permute([atoms.index(a) for a in order]) if order else x
        x = x.reshape([int(a.size) if a in order else 1 for a in (*row, *key)])
        x = x.expand([int(a.size) for a in (*row, *key)])
        return x.reshape(int(dims.numel([a.size for a in row])), int(dims.numel([a.size for a in key])))


def band_of(seen: torch.Tensor) -> tuple[int | None, int | None] | None:
    """(low, high) with ``seen[i, j] == (low <= j - i <= high)``; None if it is no band. A bound that hides nothing is None."""
    rows, keys = seen.shape
    if not rows or not keys or not bool(seen.any(-1).all()):
        return None
    i, j = torch.arange(rows), torch.arange(keys)
    gap = j[None, :] - i[:, None]
    first = seen.to(torch.uint8).argmax(-1)
    last = keys - 1 - seen.flip(-1).to(torch.uint8).argmax(-1)
    cut_low, cut_high = first > 0, last < keys - 1
    low = int((first - i)[cut_low][0]) if bool(cut_low.any()) else None
    high = int((last - i)[cut_high][0]) if bool(cut_high.any()) else None
    band = torch.ones_like(seen)
    if low is not None:
        band &= gap >= low
    if high is not None:
        band &= gap <= high
    return (low, high) if torch.equal(band, seen) else None


def conjuncts(mask: Placed, negated: bool = False) -> list[tuple[Placed, bool]]:
    """The parts of a truth value that all must hold, each with whether it is negated, and each but once."""
    return _conjuncts(mask, negated, 0, {})


def _conjuncts(mask: Placed, negated: bool, depth: int, met: dict[tuple[Value, Axes, bool], None]) -> list[tuple[Placed, bool]]:
    v, axes = mask.value, mask.axes
    if (v, axes, negated) in met:
        return []
    met[v, axes, negated] = None
    node = v.producer
    if node is None or depth > _DEEPEST:
        return [(mask, negated)]
    if (step := up(v, axes)) is not None:
        return _conjuncts(Placed(*step), negated, depth + 1, met)
    if node.name in ("logical_not", "bitwise_not") and v.dtype.is_bool:
        return _conjuncts(Placed(node.operands[0], axes), not negated, depth + 1, met)
    if node.name == "cast" and (node.operands[0].dtype.is_bool or v.dtype.is_bool):
        return _conjuncts(Placed(node.operands[0], axes), negated, depth + 1, met)
    joins = ("logical_or", "bitwise_or", "add") if negated else ("logical_and", "bitwise_and", "mul")
    if node.name in joins and v.dtype.is_bool:
        return [p for x in node.operands for p in _conjuncts(Placed(x, aligned(x.shape, axes)), negated, depth + 1, met)]
    if node.name in ("eq", "ne") and (number := scalar_of(node.operands[1])) in (0, 1):  # (m == 0) of a mask that is no number
        x = node.operands[0]
        inner = x.defined_by("cast")
        if x.dtype.is_bool or (inner is not None and inner.operands[0].dtype.is_bool):
            turned = (node.name == "eq") == (number == 0)
            return _conjuncts(Placed(x, aligned(x.shape, axes)), negated != turned, depth + 1, met)
    return [(mask, negated)]


def constant_value(v: Value) -> torch.Tensor | None:
    """The tensor of a value that depends on no input and is not too large; None otherwise."""
    known: dict[Value, torch.Tensor] = {}
    return _constant(v, known, 0)


def _constant(v: Value, known: dict[Value, torch.Tensor], depth: int) -> torch.Tensor | None:
    if v in known:
        return known[v]
    node = v.producer
    if node is None or depth > _DEEPEST or node.has_effect or node.op.name == "aten" or not v.type.is_static or int(v.type.numel) > LARGEST:
        return None
    operands: list[torch.Tensor] = []
    for x in node.operands:
        found = _constant(x, known, depth + 1)
        if found is None:
            return None
        operands.append(found)
    if dims.free_symbols([a for a in node.attrs.values() if hasattr(a, "free_symbols")]):
        return None
    results: Sequence[torch.Tensor] = evaluate_node(node, operands, EvalContext({}))
    known.update(zip(node.results, results, strict=True))
    return known[v]

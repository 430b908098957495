"""What is added to the scores, and what hides keys, sorted: a band, masks of truth values, slopes (ALiBi), and the rest, a bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from graphopt.ir import Value, dims
from graphopt.passes.attention.affine import affine
from graphopt.passes.attention.axes import Axes, Group, Placed, aligned, apart, flat, up, within
from graphopt.passes.attention.predicates import Band, Seen, band_of, constant_value, hides
from graphopt.passes.attention.reading import Reading
from graphopt.passes.attention.scores import Fill, Term
from graphopt.passes.recompose.spelling import number
from graphopt.rewrite import Reject

ABSORBS = -1e30  # a number so large that a score added to it is lost: hidden keys all have the same score then


@dataclass
class Slopes:
    """ALiBi: ``steps * at`` of a head for each position."""

    at: Placed
    factor: float


@dataclass
class Sorted:
    """An attention's masks and biases.

    Attributes:
        band, masks: the keys that are seen; ``True``: the mask is negated.
        biases: what is added.
        empty: as the op's attribute.
        notes: masks that are kept as biases, and why.
    """

    band: Band
    masks: list[tuple[Placed, bool]]
    biases: list[Term]
    slopes: Slopes | None
    empty: str
    notes: list[Reject] = field(default_factory=list)


@dataclass
class _Hard:
    """Keys hidden by one number: the masks that say which (all must hold), or a constant that is 0 where they are seen."""

    number: float
    masks: list[tuple[Placed, bool]]
    constant: Placed | None
    term: Term | None  # None: scores were set to the number, not added to it


def sort(r: Reading, symbols: dims.Symbols) -> Sorted | Reject:
    """Sort what was read, or say why it cannot be."""
    half = r.scores.product.result.dtype.name == "f16"
    hard: list[_Hard] = []
    biases: list[Term] = []
    slopes: Slopes | None = None
    for fill in r.scores.hidden:
        if not hides(fill.number, half):
            return Reject(f"masked scores are set to {fill.number:g}, which is a score like others", fill.mask.value)
        hard.append(_Hard(fill.number, [(fill.mask, fill.negated)], None, None))
    for t in r.scores.terms:
        found = _mask_of(t, half)
        if found is not None:
            hard.append(found)
        elif slopes is None and (line := _slopes_of(t, r)) is not None:
            slopes = line
        else:
            biases.append(t)
    return _together(r, hard, biases, slopes, symbols)


def _together(r: Reading, hard: list[_Hard], biases: list[Term], slopes: Slopes | None, symbols: dims.Symbols) -> Sorted | Reject:
    """Whether the masks may become predicates: only where a row that sees nothing gives the same afterwards."""
    seen = Seen(r.rows, r.keys, symbols)
    for h in hard:
        _take(seen, h)
    least = r.scores.least
    if least is not None and not hides(least, False):
        return Reject(f"scores are clamped to {least:g} from below, which is a score like others", r.scores.product)
    numbers = [max(h.number, least) if least is not None else h.number for h in hard]
    rivals = any(may_hide(t.at.value) for t in biases)
    natural = r.empty or ("mean" if least is not None else "nan" if hard or biases else "zero")
    certain = (seen.keeps_a_key or r.sinks is not None) and not rivals
    one = (len(hard) == 1 or all(n == least for n in numbers)) and not rivals
    if seen.band.attrs(dims.numel([a.size for a in flat(r.keys)]), symbols) is not None:
        if r.sinks is not None or (certain and not biases):
            natural = "zero"
        if certain or (least is None and all(n == -math.inf for n in numbers)):
            return Sorted(seen.band, seen.masks, biases, slopes, natural)
        if one and all(h.term is None or n <= ABSORBS for h, n in zip(hard, numbers, strict=True)):
            return Sorted(seen.band, seen.masks, biases, slopes, "mean")
    return _as_biases(hard, biases, slopes, natural)


def _as_biases(hard: list[_Hard], biases: list[Term], slopes: Slopes | None, natural: str) -> Sorted | Reject:
    """The additive masks stay what they are."""
    notes = []
    for h in hard:
        if h.term is None:
            why = "keys are hidden in several ways: what a row gives that sees no key is not known"
            return Reject(why, h.masks[0][0].value)
        biases = [*biases, h.term]
        notes.append(Reject("a mask stays a bias: a row that sees no key would give something else", h.term.at.value))
    return Sorted(Band(), [], biases, slopes, natural, notes)


def _take(seen: Seen, h: _Hard) -> None:
    for mask, negated in h.masks:
        seen.take(mask, negated)
    if h.constant is not None:
        matrix = seen.matrix(h.constant)
        found = band_of(matrix == 0) if matrix is not None else None
        if found is None or not seen.band.narrow(*found, seen.symbols):
            seen.masks.append((h.constant, True))  # hidden where it is not zero


def _is_truth(v: Value) -> bool:
    cast = v.defined_by("cast")
    return cast is not None and cast.operands[0].dtype.is_bool


def may_hide(v: Value, learned: Callable[[Value], bool] = lambda v: v.weight) -> bool:
    """Whether a bias may hold numbers that hide keys: what comes from outside, a mask that was added, but no product or parameter.

    Args:
        learned: whether an input is a parameter.
    """
    seen, stack = set(), [v]  # membership only
    while stack:
        x = stack.pop()
        node = x.producer
        if node is None:
            if not learned(x):
                return True
            continue
        if node in seen:
            continue
        seen.add(node)
        factors = [abs(c) for y in node.operands if (c := number(y)) is not None] if node.name == "mul" else []
        if factors and min(factors) < 1e4 and any(_is_truth(y) for y in node.operands):
            continue  # a small number where a condition holds
        if node.name in ("reshape", "transpose", "broadcast_to", "cast", "slice", "where", "mul", "add", "sub", "concat"):
            stack += [y for y in node.operands if y.dtype.is_float or node.name == "cast"]
        elif node.name == "constant" and (c := number(x)) is not None and c <= -1e4:
            return True
    return False


# --- masks that are added ----------------------------------------------------------------------------------------------


def _mask_of(t: Term, half: bool) -> _Hard | None:
    """A term that is 0 where a key is seen and hides it elsewhere; None if it is not that."""
    if t.others:
        return None
    v, axes = t.at.value, t.at.axes
    while True:
        node = v.producer
        if node is None:
            return None
        if (step := up(v, axes)) is not None:
            v, axes = step
        elif node.name == "cast" and node.operands[0].dtype.is_float:
            v = node.operands[0]
        else:
            break
    read = _chosen(Placed(v, axes))
    if read is not None and hides(read[1] * t.factor, half):
        return _Hard(read[1] * t.factor, [read[0]], None, t)
    constant = constant_value(t.at.value)
    if constant is None:
        return None
    values = torch.unique(constant.double())
    hidden = values[values != 0]
    fits = len(values) - len(hidden) == 1 and len(hidden) == 1 and hides(float(hidden[0]) * t.factor, half)
    return _Hard(float(hidden[0]) * t.factor, [], t.at, t) if fits else None


def _chosen(p: Placed) -> tuple[tuple[Placed, bool], float] | None:
    """((mask, negated), number) of where(mask, 0, number), where(mask, number, 0), (1 - mask) * number, mask * number."""
    node = p.value.producer
    assert node is not None
    if node.name == "where":
        condition, x, y = node.operands
        mask, a, b = Placed(condition, aligned(condition.shape, p.axes)), number(x), number(y)
        if a == 0 and b is not None:
            return (mask, False), b
        return ((mask, True), a) if b == 0 and a is not None else None
    if node.name != "mul" or (c := number(node.operands[1])) is None:
        return None
    x = node.operands[0]
    found = truth(Placed(x, aligned(x.shape, p.axes)))
    return ((found[0], not found[1]), c) if found is not None else None


def truth(p: Placed) -> tuple[Placed, bool] | None:
    """(mask, negated) of a number that is 1 where a truth value holds and 0 elsewhere."""
    v, axes, negated = p.value, p.axes, False
    for _ in range(16):
        if v.dtype.is_bool:
            return Placed(v, axes), negated
        node = v.producer
        if node is None:
            return None
        if (step := up(v, axes)) is not None:
            v, axes = step
        elif node.name == "cast":
            v = node.operands[0]
        elif node.name == "sub" and number(node.operands[0]) == 1:
            v, negated = node.operands[1], not negated
            axes = aligned(v.shape, axes)
        elif node.name == "add" and number(node.operands[1]) == 1 and (minus := node.operands[0].defined_by("neg")) is not None:
            v, negated = minus.operands[0], not negated
            axes = aligned(v.shape, axes)
        else:
            return None
    return None


# --- ALiBi -------------------------------------------------------------------------------------------------------------


def _slopes_of(t: Term, r: Reading) -> Slopes | None:
    """A term that is, for each head, a multiple of the position."""
    if t.others or not r.lead:
        return None
    p = t.at.above()
    while (node := p.value.producer) is not None and node.name == "cast" and node.operands[0].dtype.is_float:
        p = Placed(node.operands[0], p.axes).above()
    if node is None or node.name != "mul":
        return None
    for slope, line in (node.operands, node.operands[::-1]):
        s, position = Placed(slope, aligned(slope.shape, p.axes)).above(), Placed(line, aligned(line.shape, p.axes))
        step = _step(position, r.rows, r.keys)
        heads = tuple(a for g in r.lead for a in flat(g))
        if step is not None and s.atoms and within(s.atoms, heads) and slope.dtype.is_float:
            return Slopes(s, step * t.factor)
    return None


def _step(p: Placed, rows: Group, keys: Group) -> float | None:
    """c of a value c * (j + anything that is the same along a row)."""
    known = affine(p.value)
    if known is None or not apart_but(p.axes, rows, keys):
        return None
    steps = {flat(g): s for g, s in zip(p.axes, known.steps, strict=True) if s != 0}
    of_key, of_row = steps.pop(flat(keys), 0), steps.pop(flat(rows), 0)
    fits = not steps and isinstance(of_key, int) and of_key != 0 and of_row in (0, -of_key)
    return float(of_key) if fits else None


def apart_but(axes: Axes, rows: Group, keys: Group) -> bool:
    """Whether each axis is the rows, the keys, or neither."""
    return all(flat(g) in (flat(rows), flat(keys)) or (apart(g, rows) and apart(g, keys)) for g in axes)


__all__ = ["Fill", "Slopes", "Sorted", "sort", "truth"]

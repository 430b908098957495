"""Moves of single knobs: to another choice, by the kind of the knob, and to the one nearest to a value of another space.

Of tile sizes a factor moves from one level to another, a number goes to the next smaller or larger choice, a name or a truth value
becomes another one.

Reference: Zheng et al., "Ansor: Generating High-Performance Tensor Programs for Deep Learning", OSDI 2020, section 5.1.
"""

from __future__ import annotations

import math
from random import Random

from graphopt.autotune.space import Knob, Param

FAR = 0.2  # share of the moves of an ordered knob that go to any choice, not to a neighbour


def move(p: Param, value: Knob, rng: Random) -> Knob:
    """Another choice of a knob, by its kind. The knob must have one."""
    others = [c for c in p.choices if c != value]
    if all(isinstance(c, tuple) for c in p.choices) and isinstance(value, tuple):
        near = [c for c in others if isinstance(c, tuple) and _factor_apart(c, value)]
        return rng.choice(near or others)
    if _ordered(p) and rng.random() >= FAR:
        order = sorted(p.choices, key=_number)
        if value in order:
            at = order.index(value)
            return rng.choice([order[k] for k in (at - 1, at + 1) if 0 <= k < len(order)])
    return rng.choice(others)


def _ordered(p: Param) -> bool:
    return all(isinstance(c, int) and not isinstance(c, bool) for c in p.choices)


def _number(value: Knob) -> float:
    return float(value) if isinstance(value, int) else 0.0


def _factor_apart(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether one factor moved from one level to another: two levels differ, and their product does not."""
    if len(a) != len(b):
        return False
    apart = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
    return len(apart) == 2 and math.prod(x for x, _ in apart) == math.prod(y for _, y in apart)


def nearest(p: Param, value: Knob) -> Knob:
    """The choice most like a value; the default where nothing is."""
    if value in p.choices and any(type(c) is type(value) and c == value for c in p.choices):
        return value
    if _ordered(p) and isinstance(value, int):
        return min(p.choices, key=lambda c: abs(math.log2(max(_number(c), 0.5)) - math.log2(max(float(value), 0.5))))
    if isinstance(value, tuple):
        same = [c for c in p.choices if isinstance(c, tuple) and len(c) == len(value)]
        if same:
            return min(same, key=lambda c: sum(abs(math.log2(max(x, 0.5) / max(y, 0.5))) for x, y in zip(c, value, strict=True)))
    return p.choices[0]

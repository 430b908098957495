"""Moves in a search space: a random point, a neighbour, a child of two points, the point nearest to one of another space.

A neighbour differs by the kind of the knob: of tile sizes a factor moves from one level to another, a number goes to the next
smaller or larger choice, a name or a truth value becomes another one. A child takes each group of knobs whole from one of its
parents (node-based crossover), since the knobs of one structure are only good together.

No move looks at the space's constraints: who asks for a point asks the space whether it is one.

Reference: Zheng et al., "Ansor: Generating High-Performance Tensor Programs for Deep Learning", OSDI 2020, section 5.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from random import Random

from graphopt.autotune.space import Knob, Param, Schedule, SearchSpace

FAR = 0.2  # share of the moves of an ordered knob that go to any choice, not to a neighbour
MORE = 0.3  # share of neighbours that differ in one more knob (and of those again)


@dataclass(frozen=True)
class Sketch:
    """The points of one sketch of a space: every choice of every knob."""

    space: SearchSpace
    name: str

    @cached_property
    def size(self) -> int:
        """Points, with those that a constraint rejects."""
        return math.prod(len(p.choices) for p in self.space.params)

    @cached_property
    def free(self) -> tuple[Param, ...]:
        """Knobs with a choice."""
        return tuple(p for p in self.space.params if len(p.choices) > 1)

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the knobs with a choice, by group."""
        found: dict[str, list[str]] = {}
        for p in self.free:
            found.setdefault(p.group or p.name, []).append(p.name)
        return tuple(tuple(names) for names in found.values())

    def make(self, knobs: dict[str, Knob]) -> Schedule:
        return Schedule.make(self.space.template, self.name, **knobs)

    def default(self) -> Schedule:
        """The first choice of every knob."""
        return self.make({p.name: p.choices[0] for p in self.space.params})

    def points(self) -> Iterator[Schedule]:
        """Every point, the default first; a constraint may reject some."""
        names = [p.name for p in self.space.params]
        for values in product(*(p.choices for p in self.space.params)):
            yield self.make(dict(zip(names, values, strict=True)))

    def holds(self, s: Schedule) -> bool:
        """Whether a schedule is of this sketch."""
        return s.template == self.space.template and s.sketch == self.name

    def random(self, rng: Random) -> Schedule:
        """Any point, all alike likely."""
        return self.make({p.name: rng.choice(p.choices) for p in self.space.params})

    def neighbour(self, s: Schedule, rng: Random) -> Schedule:
        """A point that differs in one knob, sometimes in more; the same point if no knob has a choice."""
        knobs, left = dict(s.knobs), list(self.free)
        while left:
            p = left.pop(rng.randrange(len(left)))
            knobs[p.name] = move(p, knobs[p.name], rng)
            if rng.random() >= MORE:
                break
        return self.make(knobs)

    def child(self, a: Schedule, b: Schedule, rng: Random) -> Schedule:
        """A point with each group of knobs from one of two points of this sketch."""
        knobs, other = dict(a.knobs), dict(b.knobs)
        for names in self.groups:
            if rng.random() < 0.5:
                knobs.update({n: other[n] for n in names})
        return self.make(knobs)

    def nearest(self, s: Schedule) -> Schedule:
        """The point most like a schedule of any space: a knob of the same name gets the nearest choice, another its default."""
        known = dict(s.knobs)
        return self.make({p.name: _nearest(p, known[p.name]) if p.name in known else p.choices[0] for p in self.space.params})


def sketches_of(spaces: tuple[SearchSpace, ...]) -> tuple[Sketch, ...]:
    """All sketches of some spaces, in order."""
    return tuple(Sketch(space, name) for space in spaces for name in space.sketches)


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


def _nearest(p: Param, value: Knob) -> Knob:
    if value in p.choices and any(type(c) is type(value) and c == value for c in p.choices):
        return value
    if _ordered(p) and isinstance(value, int):
        return min(p.choices, key=lambda c: abs(math.log2(max(_number(c), 0.5)) - math.log2(max(float(value), 0.5))))
    if isinstance(value, tuple):
        same = [c for c in p.choices if isinstance(c, tuple) and len(c) == len(value)]
        if same:
            return min(same, key=lambda c: sum(abs(math.log2(max(x, 0.5) / max(y, 0.5))) for x, y in zip(c, value, strict=True)))
    return p.choices[0]

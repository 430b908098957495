"""Sketches: the structures that derivation rules yield for a workload, and the points of each.

A template's space names its sketches, the rules that yielded each (:class:`~graphopt.autotune.space.Rule`), their knobs, and the
constraints on these, which say why they reject. A search moves through the points of a sketch: a random one, a neighbour, a child of
two, the one nearest to a point of another space. A neighbour differs in a knob (:mod:`moves`); a child takes each group of knobs whole
from one of its parents (node-based crossover), since the knobs of one structure are only good together.

No move looks at the constraints: who asks for a point asks the space whether it is one (``SearchSpace.rejection``).

Reference: Zheng et al., "Ansor: Generating High-Performance Tensor Programs for Deep Learning", OSDI 2020, sections 4 and 5.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from random import Random

from graphopt.autotune.moves import move, nearest
from graphopt.autotune.space import Knob, Param, Rule, Schedule, SearchSpace

MORE = 0.3  # share of neighbours that differ in one more knob (and of those again)


@dataclass(frozen=True)
class Sketch:
    """One structure of a template: every choice of every knob."""

    space: SearchSpace
    name: str

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that yielded it, in order."""
        return self.space.rules.get(self.name, ())

    def __str__(self) -> str:
        return f"{self.space.template}/{self.name}" + (f" ({', '.join(self.rules)})" if self.rules else "")

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
        return self.make({p.name: nearest(p, known[p.name]) if p.name in known else p.choices[0] for p in self.space.params})


def sketches_of(spaces: tuple[SearchSpace, ...]) -> tuple[Sketch, ...]:
    """All sketches of some spaces, in order."""
    return tuple(Sketch(space, name) for space in spaces for name in space.sketches)

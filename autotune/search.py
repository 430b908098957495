"""Evolutionary search: which candidates of a workload to measure next.

The first candidates are every sketch's default, the seeds (what was best for this workload elsewhere, or for a similar one) and
random points. Later ones descend from the best that was measured, by the moves of :mod:`sketch`; a cost model, once it has learned
enough, ranks a population over several generations, and only those that it picks are measured. A share of every batch is random
whatever the model thinks (epsilon-greedy). Nothing is proposed twice, and nothing that a constraint rejects; the reasons are
counted. A space that is small enough is enumerated, so that its end is known. Same seed and same results, same candidates.

Reference: Zheng et al., "Ansor: Generating High-Performance Tensor Programs for Deep Learning", OSDI 2020, section 5.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from graphopt.autotune.records import Measured
from graphopt.autotune.sketch import Sketch, sketches_of
from graphopt.autotune.space import Schedule, SearchSpace, Workload
from graphopt.target import Target

TRIES = 200  # random points in a row that are rejected or known, after which a space counts as exhausted


class Model(Protocol):
    """What the search asks of a cost model (:class:`~graphopt.autotune.cost_model.CostModel` is one)."""

    def observe(self, w: Workload, target: Target, results: Sequence[tuple[Schedule, Measured]], spaces: Sequence[SearchSpace]) -> None:
        """Learn from what was measured."""

    def predict(self, w: Workload, target: Target, schedules: Sequence[Schedule], spaces: Sequence[SearchSpace]) -> list[float] | None:
        """A score for each, the greater the faster; None while too little is known."""

    def pick(self, w: Workload, target: Target, schedules: Sequence[Schedule], spaces: Sequence[SearchSpace],
             n: int) -> list[Schedule] | None:  # fmt: skip
        """The n of them to measure next, together; None while too little is known."""


@dataclass(frozen=True)
class Evolution:
    """How the search goes about.

    Attributes:
        epsilon: share of a batch that is random, rounded down, but one at least unless it is 0.
        around: share of random points that are a few moves from a sketch's default: often good, and if not, a waste of the first trials.
        population: points of a generation, where a model ranks them.
        generations: of a model's ranking between two batches.
        parents: how many of the best measured points have children.
        crossover: share of children with two parents.
        wander: share of children that carry a parent's knobs over to another sketch of its template.
        enumerated: points of a space, or fewer, are listed.
    """

    epsilon: float = 0.2
    around: float = 0.25
    population: int = 128
    generations: int = 4
    parents: int = 32
    crossover: float = 0.3
    wander: float = 0.05
    enumerated: int = 4096


class Search:
    """Candidates for one workload.

    Args:
        spaces: of all templates that take it, the preferred one first; each with one sketch or more.
        seed: of all that is random here.
        model: ranks candidates; None to go by what was measured alone.
        known: what was measured before, on this device and with these versions; never proposed again.
        seeds: what may be good: tried early, each brought to the nearest point of the space.

    Attributes:
        rejected: reason -> how many points were rejected for it.
        measured: every observed candidate, in order.
    """

    def __init__(self, w: Workload, target: Target, spaces: Sequence[SearchSpace], *, seed: int, model: Model | None = None,
                 known: Iterable[tuple[Schedule, Measured]] = (), seeds: Iterable[Schedule] = (),
                 evolution: Evolution | None = None) -> None:  # fmt: skip
        self.workload, self.target, self.spaces, self.model = w, target, tuple(spaces), model
        self.options = evolution or Evolution()
        self.sketches = sketches_of(self.spaces)
        self.rejected: Counter[str] = Counter()
        self.measured: dict[Schedule, Measured] = {}
        self._rng = Random(f"{seed}/{w.key}")
        self._seen: dict[Schedule, None] = {}  # proposed or known
        self._refused: dict[Schedule, None] = {}
        self._predicted: dict[Schedule, float] = {}  # what the model said of candidates that are being measured
        self._rounds: list[tuple[list[float], list[float]]] = []
        self._ended = False
        self._listed = self._enumerate()
        self._first = [*(k.default() for k in self.sketches), *self._brought(seeds)]
        known = [(s, m) for s, m in known if self._sketch(s) is not None]
        if known:
            self.observe(known)

    # --- what a tuner calls ---------------------------------------------------------------------------------------------

    @property
    def exhausted(self) -> bool:
        """Whether every point of the space has been proposed (of a space that is not enumerated: whether no new one was found)."""
        if self._listed is not None:
            return not self._unseen()
        return self._ended

    @property
    def size(self) -> int:
        """Points of the space; of one that is not enumerated, with those that constraints reject."""
        return len(self._listed) if self._listed is not None else sum(k.size for k in self.sketches)

    @property
    def best(self) -> tuple[Schedule, Measured] | None:
        """The fastest candidate so far, if one ran."""
        ok = self._ranked()
        return (ok[0], self.measured[ok[0]]) if ok else None

    def propose(self, n: int) -> list[Schedule]:
        """Up to n candidates that were never proposed before; fewer only where the space is exhausted."""
        batch: dict[Schedule, None] = {}
        while self._first and len(batch) < n:
            self._take(batch, self._first.pop(0))
        chance = min(n - len(batch), max(math.ceil(self.options.epsilon), int(self.options.epsilon * n)))
        for s in self._guided(n - len(batch) - chance, batch):
            self._take(batch, s)
        self._fill(batch, n)
        chosen = list(batch)
        self._remember_predictions(chosen)
        self._seen.update(batch)
        return chosen

    def give_back(self, schedules: Sequence[Schedule]) -> None:
        """Take back candidates that were proposed and not tried: they are proposed again, before any others."""
        for s in schedules:
            self._seen.pop(s, None)
        self._first = [*schedules, *self._first]

    def observe(self, results: Sequence[tuple[Schedule, Measured]]) -> None:
        """Take in what was measured, also of candidates that were not proposed here."""
        self._judge(results)
        self.measured.update(results)
        self._seen.update(dict.fromkeys(s for s, _ in results))
        if self.model is not None:
            self.model.observe(self.workload, self.target, results, self.spaces)

    @property
    def predictions(self) -> list[tuple[list[float], list[float]]]:
        """(scores that the model gave, seconds that were then measured) of every batch that it had ranked."""
        return list(self._rounds)

    # --- points -----------------------------------------------------------------------------------------------------------

    def _sketch(self, s: Schedule) -> Sketch | None:
        return next((k for k in self.sketches if k.holds(s)), None)

    def _accepts(self, s: Schedule) -> bool:
        """Whether the space has a point; a reason why not is counted once for each point."""
        if s in self._refused:
            return False
        sketch = self._sketch(s)
        reason = "no sketch of the space" if sketch is None else sketch.space.rejection(s)
        if reason is not None:
            self._refused[s] = None
            self.rejected[reason] += 1
        return reason is None

    def _take(self, batch: dict[Schedule, None], s: Schedule) -> bool:
        """Add a point to a batch if it is new and in the space."""
        new = s not in batch and s not in self._seen and self._accepts(s)
        if new:
            batch[s] = None
        return new

    def _enumerate(self) -> list[Schedule] | None:
        """All points in a random order, if they are few."""
        if sum(k.size for k in self.sketches) > self.options.enumerated:
            return None
        points = [s for k in self.sketches for s in k.points() if self._accepts(s)]
        self._rng.shuffle(points)
        return points

    def _unseen(self) -> list[Schedule]:
        return [s for s in self._listed or () if s not in self._seen]

    def _brought(self, seeds: Iterable[Schedule]) -> list[Schedule]:
        """Seeds as points of this space: of their own sketch if it is here, else of their template's first one."""
        out = []
        for s in seeds:
            own = self._sketch(s) or next((k for k in self.sketches if k.space.template == s.template), None)
            if own is not None:
                out.append(own.nearest(s))
        return out

    def _fill(self, batch: dict[Schedule, None], n: int) -> None:
        """Add random points until there are n."""
        if self._listed is not None:
            for s in self._unseen():
                if len(batch) >= n:
                    return
                self._take(batch, s)
            return
        failures = 0
        while len(batch) < n and failures < TRIES:
            failures = 0 if self._take(batch, self._random()) else failures + 1
        self._ended = failures >= TRIES

    def _random(self) -> Schedule:
        """A random point, anywhere in its sketch or not far from its default; of a sketch the likelier the more points it has."""
        (sketch,) = self._rng.choices(self.sketches, [math.sqrt(k.size) for k in self.sketches])
        if self._rng.random() >= self.options.around:
            return sketch.random(self._rng)
        s = sketch.default()
        for _ in range(self._rng.randint(1, 3)):
            s = sketch.neighbour(s, self._rng)
        return s

    # --- evolution --------------------------------------------------------------------------------------------------------

    def _ranked(self) -> list[Schedule]:
        """Candidates that ran, the fastest first."""
        ok = [(m.seconds, i, s) for i, (s, m) in enumerate(self.measured.items()) if m.ok and m.seconds is not None]
        return [s for _, _, s in sorted(ok, key=lambda item: item[:2]) if self._sketch(s) is not None]

    def _guided(self, n: int, batch: dict[Schedule, None]) -> list[Schedule]:
        """n points that may be better than those measured, the most promising first; fewer if nothing is known yet."""
        best = self._ranked()[: self.options.parents]
        if n <= 0 or not best:
            return []
        listed = None if self._listed is None else [s for s in self._unseen() if s not in batch]
        if listed:
            picked = self._picked(listed, n)
            if picked is not None:
                return picked
        elif self._scores(best) is not None:
            return self._evolved(n, best, batch)
        return self._offspring(best, n, batch)

    def _scores(self, points: Sequence[Schedule]) -> list[float] | None:
        return None if self.model is None else self.model.predict(self.workload, self.target, points, self.spaces)

    def _picked(self, points: Sequence[Schedule], n: int) -> list[Schedule] | None:
        return None if self.model is None else self.model.pick(self.workload, self.target, points, self.spaces, n)

    def _offspring(self, best: Sequence[Schedule], n: int, batch: dict[Schedule, None]) -> list[Schedule]:
        """New points from the best ones, whatever a model would say of them."""
        found: dict[Schedule, None] = {}
        for _ in range(20 * n):
            s = self._child(best)
            if s not in batch and s not in self._seen and self._accepts(s):
                found[s] = None
                if len(found) == n:
                    break
        return list(found)

    def _child(self, ranked: Sequence[Schedule]) -> Schedule:
        """A child of points, the best first: they have the more children the better they are."""
        rng = self._rng
        a = ranked[_early(rng, len(ranked))]
        sketch = self._sketch(a)
        assert sketch is not None
        chance = rng.random()
        if chance < self.options.crossover:
            b = ranked[_early(rng, len(ranked))]
            if sketch.holds(b) and b != a:
                return sketch.child(a, b, rng)
        elif chance < self.options.crossover + self.options.wander:
            others = [k for k in self.sketches if k.space.template == a.template and k != sketch]
            if others:
                return rng.choice(others).nearest(a)
        return sketch.neighbour(a, rng)

    def _evolved(self, n: int, best: Sequence[Schedule], batch: dict[Schedule, None]) -> list[Schedule]:
        """The best points that the model finds in several generations, none of them measured yet."""
        size = self.options.population
        people: dict[Schedule, None] = dict.fromkeys(best)
        for _ in range(4 * size):
            if len(people) >= size:
                break
            s = self._random()
            if self._accepts(s):
                people[s] = None
        found: dict[Schedule, None] = {}
        for generation in range(self.options.generations + 1):
            points = list(people)
            scores = self._scores(points)
            assert scores is not None
            found.update(dict.fromkeys(s for s in points if s not in self._seen and s not in batch))
            if generation == self.options.generations:
                break
            ranked = _by_score(points, scores)
            people = dict.fromkeys(ranked[: size // 4])
            for _ in range(4 * size):
                if len(people) >= size:
                    break
                s = self._child(ranked[: size // 2])
                if self._accepts(s):
                    people[s] = None
        return self._picked(list(found), n) or []

    # --- how good the model is ---------------------------------------------------------------------------------------------

    def _remember_predictions(self, chosen: Sequence[Schedule]) -> None:
        scores = self._scores(chosen) if chosen else None
        if scores is not None:
            self._predicted.update(zip(chosen, scores, strict=True))

    def _judge(self, results: Sequence[tuple[Schedule, Measured]]) -> None:
        """Keep what the model had said of a batch beside what came out."""
        pairs = [(self._predicted.pop(s), m.seconds) for s, m in results if s in self._predicted and m.ok and m.seconds is not None]
        if len(pairs) > 1:
            self._rounds.append(([p for p, _ in pairs], [t for _, t in pairs]))


def _by_score(points: Sequence[Schedule], scores: Sequence[float]) -> list[Schedule]:
    """Points, the greatest score first; among equals the earlier one."""
    order = sorted(range(len(points)), key=lambda i: (-scores[i], i))
    return [points[i] for i in order]


def _early(rng: Random, n: int) -> int:
    """An index below n, small ones more likely: the smaller of two."""
    return min(rng.randrange(n), rng.randrange(n))

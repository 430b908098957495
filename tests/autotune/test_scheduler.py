"""The task scheduler, on tasks whose curves are known: time goes where the models gain most by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import pytest

from graphopt.autotune.measure import Built, Incumbent, Subject
from graphopt.autotune.records import Measured
from graphopt.autotune.scheduler import ByGain
from graphopt.autotune.space import Schedule, Workload
from graphopt.autotune.tasks import Progress, Scheduler, Task

BATCH = 16
SCHEDULE = Schedule.make("fake")


class NoSearch:
    exhausted = False

    def propose(self, n: int) -> list[Schedule]:
        raise AssertionError("nothing is proposed here")

    def observe(self, results: Sequence[tuple[Schedule, Measured]]) -> None:
        raise AssertionError("nothing is measured here")


@dataclass
class Curve:
    """A task that comes down from ``start`` to ``end`` seconds, most of the way in ``rounds`` rounds; each takes ``cost`` seconds."""

    start: float
    end: float
    rounds: float = 4.0
    calls: int = 1
    least: float = 0.0
    cost: float = 1.0
    op: str = "relu"

    def at(self, rounds: int) -> float:
        return self.end + (self.start - self.end) * math.exp(-rounds / self.rounds)

    def progress(self, size: int) -> Progress:
        t = f"f32[{size}]"
        w = Workload("pointwise", f"graph @g(%arg0: {t}) -> {t} {{\n  %0: {t} = {self.op}(%arg0)\n  return %0\n}}\n")
        subject = Subject(w, lambda seed: pytest.fail("no case is needed"), least=self.least)
        return Progress(Task(subject, self.op, SCHEDULE, self.calls, self.start), NoSearch())


def play(scheduler: Scheduler, curves: Sequence[Curve], seconds: float) -> tuple[float, list[int]]:
    """Let it choose for some seconds. Returns the models' time after that, and the tasks chosen."""
    tasks = [c.progress(8 * (i + 1)) for i, c in enumerate(curves)]
    chosen: list[int] = []
    spent = 0.0
    while spent < seconds:
        i = scheduler.next(tasks)
        if i is None:
            break
        p, c = tasks[i], curves[i]
        chosen.append(i)
        p.trials += BATCH
        p.spent += c.cost
        spent += c.cost
        p.incumbent = Incumbent(Built(SCHEDULE), c.at(len(p.rounds)))  # the first round has the default schedule in it
        p.rounds.append((p.trials, p.best))
    return sum(c.calls * (p.best or c.start) for c, p in zip(curves, tasks, strict=True)), chosen


class InTurns:
    def __init__(self) -> None:
        self.n = -1

    def next(self, tasks: Sequence[Progress]) -> int | None:
        self.n += 1
        return self.n % len(tasks)


class Knowing:
    """Knows every curve, and takes what gains most in the next round: as good as greed can be."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        self.curves = curves

    def next(self, tasks: Sequence[Progress]) -> int | None:
        def gain(i: int) -> float:
            c, n = self.curves[i], len(tasks[i].rounds)
            return c.calls * ((tasks[i].best or c.start) - c.at(n + 1)) / c.cost

        return max(range(len(tasks)), key=gain)


def some_model(seed: int, n: int = 12) -> list[Curve]:
    """Tasks as models have them: a few take most of the time, some gain much, some nothing."""
    rng = Random(seed)
    out = []
    for i in range(n):
        start = 1e-4 * 10 ** rng.uniform(-1, 1)
        left = rng.choice([1.0, 0.97, 0.8, 0.5])
        out.append(Curve(start, start * left, rng.uniform(1, 8), rng.choice([1, 1, 2, 12]), start * left * rng.uniform(0.4, 0.95),
                         op=("relu", "exp", "tanh", "sqrt")[i % 4]))  # fmt: skip
    return out


def quiet(**more: float) -> ByGain:
    """Without a share of chance."""
    return ByGain(epsilon=0.0, **more)


def test_each_task_gets_a_round_first_the_dearest_before_the_others() -> None:
    curves = [Curve(1e-4, 1e-4, calls=2), Curve(9e-4, 8e-4), Curve(1e-4, 5e-5, calls=12)]
    assert play(quiet(), curves, 3)[1] == [2, 1, 0]


def test_a_task_near_its_roofline_gets_one_round() -> None:
    _, chosen = play(quiet(), [Curve(1e-3, 1e-3, least=0.95e-3), Curve(1e-4, 0.9e-4, least=1e-5)], 20)
    assert chosen.count(0) == 1 and chosen.count(1) == 19


def test_a_task_that_is_faster_than_its_roofline_goes_on() -> None:
    """A limit that was measured too low must not end anything."""
    _, chosen = play(quiet(), [Curve(1e-3, 4e-4, least=3e-3)], 20)
    assert len(chosen) == 20


def test_an_exhausted_task_gets_none_and_without_any_it_ends() -> None:
    tasks = [Curve(1e-3, 5e-4).progress(8), Curve(1e-3, 5e-4).progress(16)]
    tasks[0].search = type("Ended", (NoSearch,), {"exhausted": True})()
    assert quiet().next(tasks) == 1
    tasks[1].search = tasks[0].search
    assert quiet().next(tasks) is None
    assert quiet().next([]) is None


def test_what_does_not_get_faster_gets_less() -> None:
    _, chosen = play(quiet(), [Curve(1e-3, 1e-3), Curve(1e-3, 3e-4, rounds=12)], 30)
    assert chosen.count(1) > chosen.count(0) > 3, "but it is not given up"


def test_the_roofline_says_where_there_is_something_to_gain() -> None:
    _, chosen = play(quiet(), [Curve(1e-3, 0.99e-3, least=0.8e-3), Curve(1e-3, 0.99e-3, least=1e-4)], 30)
    assert chosen.count(1) > 1.4 * chosen.count(0)


def test_calls_count() -> None:
    _, chosen = play(quiet(), [Curve(1e-3, 5e-4, rounds=9, calls=12), Curve(1e-3, 5e-4, rounds=9)], 30)
    assert chosen.count(0) > 2 * chosen.count(1)


def test_a_round_that_takes_longer_must_bring_more() -> None:
    _, chosen = play(quiet(), [Curve(1e-3, 5e-4, rounds=9, cost=4.0), Curve(1e-3, 5e-4, rounds=9, cost=1.0)], 60)
    assert chosen.count(1) > 1.5 * chosen.count(0)


def test_a_task_far_behind_one_like_it_is_gone_on_with() -> None:
    """One relu has come to 1.2 times its roofline, another of a different size stands at 8 times: there is something to find."""
    ahead = Curve(1.2e-3, 1.2e-3, least=1e-3, calls=0)
    behind, alone = Curve(8e-4, 8e-4, least=1e-4), Curve(8e-4, 8e-4, least=1e-4, op="exp")
    _, chosen = play(quiet(), [ahead, behind, alone], 40)
    assert chosen.count(1) > 1.5 * chosen.count(2) > 0


def test_a_resumed_task_is_not_taken_for_a_fresh_one() -> None:
    old, new = Curve(1e-3, 5e-4).progress(8), Curve(1e-5, 5e-6).progress(16)
    old.earlier = 64
    assert quiet().next([old, new]) == 1


def test_chance_reaches_every_task_and_is_seeded() -> None:
    curves = [Curve(1e-2, 5e-3, rounds=50), Curve(1e-7, 1e-7), Curve(1e-7, 1e-7)]
    _, chosen = play(ByGain(epsilon=0.2, seed=1), curves, 100)
    assert min(chosen.count(i) for i in range(3)) >= 3
    assert play(ByGain(epsilon=0.2, seed=1), curves, 100)[1] == chosen != play(ByGain(epsilon=0.2, seed=2), curves, 100)[1]


@pytest.mark.parametrize("rounds", [24, 48, 96])
def test_of_what_can_be_gained_it_gains_more_than_in_turns_and_nearly_what_one_gains_who_knows(rounds: int) -> None:
    def gained(make: Callable[[list[Curve]], Scheduler]) -> float:
        shares = []
        for seed in range(20):
            curves = some_model(seed)
            start, end = (sum(c.calls * x for c, x in zip(curves, xs, strict=True)) for xs in (
                [c.start for c in curves], [c.end for c in curves]))  # fmt: skip
            shares.append((start - play(make(curves), curves, rounds)[0]) / (start - end))
        return sum(shares) / len(shares)

    known, ours, turns = gained(Knowing), gained(lambda curves: ByGain()), gained(lambda curves: InTurns())
    print(f"{rounds} rounds: {known:.3f} if known, {ours:.3f} by gain, {turns:.3f} in turns")
    assert turns < ours <= known + 0.01
    assert known - ours < 0.5 * (known - turns)

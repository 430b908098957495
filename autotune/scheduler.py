"""The task scheduler: which task gets the next round, by the gain for the whole that is to be expected of it.

The models' time is f = sum of w * g(t) over the tasks: calls, and seconds of a call after t rounds. What another round of a task brings
is guessed from what its last rounds brought, and from how far it may still fall: an optimist's guess, that wears off as it is disappointed;
slower where tasks alike have come much nearer to their rooflines; and never below its roofline. Per second of tuning, not per round: where
a trial takes long, fewer are made.

Reference: Zheng et al., "Ansor: Generating High-Performance Tensor Programs for Deep Learning", OSDI 2020, section 6.2 and
appendix A. Here the roofline bounds both guesses, tasks alike are compared by their distance to it, a round costs its seconds, and the
optimist's guess falls with the square of the rounds, not with their number: on the simulated models of tests/autotune/test_scheduler.py
that, with what the last rounds brought weighed at a half instead of a fifth, gains 93% of what can be gained where Ansor's rule gains 82%
(96 rounds of 12 tasks), as tasks that have nothing to gain are found out earlier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from graphopt.autotune.similar import structure
from graphopt.autotune.tasks import Progress, Task


class ByGain:
    """The task of the steepest descent of the models' time; each task gets one round first, the dearest before the others.

    A task near its roofline, or that has been through its space, gets no more.

    Args:
        near: how many times its least time a task may take and count as near.
        alpha: weight of what the last rounds brought, against what may be hoped for.
        beta: a task is expected to come within this factor of the distance to the roofline of tasks like it.
        window: rounds over which "the last" are taken.
        epsilon: share of rounds that go to a task at random, so that no guess is for ever.
        seed: of those.
    """

    def __init__(self, *, near: float = 1.1, alpha: float = 0.5, beta: float = 2.0, window: int = 3, epsilon: float = 0.05,
                 seed: int = 0) -> None:  # fmt: skip
        self.near, self.alpha, self.beta, self.window, self.epsilon = near, alpha, beta, window, epsilon
        self._rng = Random(seed)
        self._structures: dict[str, str] = {}

    def next(self, tasks: Sequence[Progress]) -> int | None:
        """Index of a task, or None if none is worth going on with."""
        going = [i for i, p in enumerate(tasks) if not (p.exhausted or p.left_out or (p.trials and p.at_roofline(self.near)))]
        fresh = [i for i in going if not _tried(tasks[i])]
        if fresh:
            return max(fresh, key=lambda i: tasks[i].task.calls * tasks[i].task.seconds)
        if len(going) > 1 and self._rng.random() < self.epsilon:
            return self._rng.choice(going)
        reached = self._reached(tasks)
        return max(going, key=lambda i: self.gain(tasks[i], reached), default=None)

    def _reached(self, tasks: Sequence[Progress]) -> dict[str, float]:
        """structure -> the smallest multiple of its least time that a task of this structure has come down to."""
        out: dict[str, float] = {}
        for p in tasks:
            if p.best and p.task.least:
                kind = self._structure(p.task)
                out[kind] = min(out.get(kind, p.best / p.task.least), p.best / p.task.least)
        return out

    def _structure(self, task: Task) -> str:
        key = task.workload.key
        if key not in self._structures:
            self._structures[key] = structure(task.workload)
        return self._structures[key]

    def gain(self, p: Progress, reached: Mapping[str, float]) -> float:
        """Seconds of a run of the models that a second of tuning this task may save.

        Args:
            reached: how near to their least time tasks of a structure have come.
        """
        now = p.best or p.task.seconds
        rounds = max(1.0, _tried(p) / self._size(p))
        hoped = min(now / rounds**2, now - p.task.least)
        if p.task.least:
            like = self.beta * reached.get(self._structure(p.task), 1.0) * p.task.least
            hoped = max(hoped, (now - max(p.task.least, like)) / rounds)
        expected = self.alpha * self._lately(p) + (1 - self.alpha) * hoped
        return p.task.calls * expected / self._seconds(p)

    def _lately(self, p: Progress) -> float:
        """Seconds that the last rounds have brought, each."""
        known = [best for _, best in p.rounds[-self.window - 1 :] if best is not None]
        return (known[0] - known[-1]) / (len(known) - 1) if len(known) > 1 else 0.0

    def _size(self, p: Progress) -> float:
        """Trials a round."""
        return p.trials / len(p.rounds) if p.trials and p.rounds else 16.0

    def _seconds(self, p: Progress) -> float:
        """What a round costs; the same for tasks that have had none in this part of the run."""
        return p.spent / len(p.rounds) if p.spent and p.rounds else 1.0


def _tried(p: Progress) -> int:
    """Trials of a task, those of earlier parts of the run included."""
    return p.earlier + p.trials

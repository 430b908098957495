"""A model with default and with tuned schedules, measured in turns: whole, and kernel by kernel inside of it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from graphopt.autotune.space import Workload
from graphopt.lower import KernelStep, LibraryStep
from graphopt.profile import CallCost, Profile
from graphopt.run_delay import Undisturbed, run_delay


@dataclass(frozen=True)
class KernelTimes:
    """A kernel in a model: seconds of a call, median over all its calls, with default and with tuned schedules.

    Attributes:
        changed: whether its schedule is another one now; if not, its two times tell how far such times can be trusted.
        workloads: keys of what it computes.
    """

    name: str
    calls: int
    before: float
    after: float
    changed: bool = True
    workloads: tuple[str, ...] = ()

    def slower(self, noise: float) -> bool:
        """Whether another schedule made it slower in the model than by noise: by more than a tenth, and by more than that."""
        return self.changed and self.after > max(1.1, noise) * self.before


@dataclass(frozen=True)
class BeforeAfter:
    """A model with default and with tuned schedules: seconds of runs that took turns, and its kernels, the dearest first.

    Attributes:
        before, after: seconds; run i of the one and of the other were neighbours.
    """

    name: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    kernels: tuple[KernelTimes, ...]

    @property
    def noisy(self) -> bool:
        """Whether the times vary so much that their medians claim nothing: quartiles further apart than a fifth."""
        return any(_quartiles(t) > 0.2 * median(t) for t in (self.before, self.after))

    @property
    def gain(self) -> tuple[float, float, float]:
        """Time before in times of the time after: the median over neighbouring runs, and the 95% interval of that median.

        The interval comes from order statistics: of n pairs each lies above the true median or below it, like a coin's throws.
        """
        ratios = sorted(b / a for b, a in zip(self.before, self.after, strict=True))
        n = len(ratios)
        k = max(0, min(n // 2, math.floor(n / 2 - 0.98 * math.sqrt(n))))
        return median(ratios), ratios[k], ratios[n - 1 - k]

    @property
    def slower(self) -> bool:
        """Whether the whole is slower now, beyond doubt."""
        return self.gain[2] < 1.0

    @property
    def noise(self) -> float:
        """How many times as slow a kernel may seem though nothing is known of it: where times vary much, twice as far as those are apart
        whose schedule is the same, and a half at least."""
        if not self.noisy:
            return 1.0
        apart = max((max(k.before / k.after, k.after / k.before) for k in self.kernels if not k.changed), default=1.0)
        return max(1.5, 1.0 + 2.0 * (apart - 1.0))

    @property
    def to_take_back(self) -> tuple[str, ...]:
        """Keys of the workloads whose new schedules do harm: those of kernels that are slower by more than noise; where the whole is
        slower, of all that are not faster in it, or if there are none, of all that changed: what one kernel leaves in the caches, the
        next one has to do with."""
        changed = [k for k in self.kernels if k.changed]
        chosen = [k for k in changed if k.slower(self.noise)]
        if self.slower:
            chosen = [k for k in changed if k.after >= k.before] or changed
        return tuple(dict.fromkeys(key for k in chosen for key in k.workloads))


Call = Callable[[], object]


def before_and_after(name: str, calls: tuple[Call, Call], profiles: tuple[Callable[[], Profile], Callable[[], Profile]],
                     seconds: float = 3.0) -> BeforeAfter:  # fmt: skip
    """Measure a model with default and with tuned schedules, in turns.

    Args:
        calls: run the one and the other.
        profiles: profile the one and the other.
    """
    before, after = interleaved(calls, seconds)
    found: tuple[list[Profile], list[Profile]] = ([], [])
    for n in range(3):
        for which in (0, 1) if n % 2 else (1, 0):
            found[which].append(profiles[which]())
    kernels: dict[tuple[str, str, bool], list[tuple[float, float]]] = {}
    workloads: dict[tuple[str, str, bool], dict[str, None]] = {}
    tuned = [counterparts(found[0][0], p) for p in found[1]]
    for i, call in enumerate(found[0][0].calls):
        old, new = median(p.calls[i].seconds for p in found[0]), median(p[i][0] for p in tuned)
        changed = _schedule(call) != tuned[0][i][1]
        group = call.kind, call.what, changed
        kernels.setdefault(group, []).append((old, new))
        if isinstance(call.step, KernelStep):
            workloads.setdefault(group, {})[call.step.workload.key] = None
    rows = [KernelTimes(g[1], len(t), median(a for a, _ in t), median(b for _, b in t), g[2], tuple(workloads.get(g, ())))
            for g, t in kernels.items()]  # fmt: skip
    return BeforeAfter(name, tuple(before), tuple(after), tuple(sorted(rows, key=lambda r: -r.calls * r.before)))


def counterparts(before: Profile, after: Profile) -> list[tuple[float, object]]:
    """Seconds and schedule of what does the same in the tuned program, for each call: one, or the library's in its place."""
    instead: dict[Workload, float] = {}
    others = []
    for call in after.calls:
        w = call.step.instead if isinstance(call.step, LibraryStep) else None
        if w is None:
            others.append(call)
        else:
            instead[w] = instead.get(w, 0.0) + call.seconds
    uses = Counter(c.step.workload for c in before.calls if isinstance(c.step, KernelStep))
    out: list[tuple[float, object]] = []
    rest = iter(others)
    for call in before.calls:
        if isinstance(call.step, KernelStep) and call.step.workload in instead:
            out.append((instead[call.step.workload] / uses[call.step.workload], None))
        else:
            same = next(rest, call)
            out.append((same.seconds, _schedule(same)))
    return out


def _schedule(call: CallCost) -> object:
    return call.step.schedule if isinstance(call.step, KernelStep) else None


def interleaved(calls: Sequence[Call], seconds: float, rounds: int = 9,
                waited: Callable[[], float] = run_delay) -> list[list[float]]:  # fmt: skip
    """Seconds of calls that take turns: a list each, in the order of the calls. Rounds in which a thread waited for a processor count where
    there are too few others.

    Args:
        seconds: for all of it; each is called in so many rounds at least.
        waited: seconds that threads have waited for processors so far.
    """
    for call in calls:
        call()
    end, n = time.perf_counter() + seconds, 0
    times = Undisturbed[list[float]](2 * seconds, waited)
    while (len(times.quiet) < rounds or time.perf_counter() < end) and not times.hopeless:
        taken = [0.0] * len(calls)
        for i in range(len(calls)) if n % 2 else reversed(range(len(calls))):
            calls[i]()  # not timed: the other one has just used the caches
            start = time.perf_counter()
            calls[i]()
            taken[i] = time.perf_counter() - start
        times.add(2 * sum(taken), taken)
        n += 1
    found = times.quiet if len(times.quiet) >= rounds else [*times.quiet, *(taken for _, taken in times.rest)]
    return [list(column) for column in zip(*found, strict=True)]


def _quartiles(times: Sequence[float]) -> float:
    low, _, high = quantiles(times, n=4)
    return high - low

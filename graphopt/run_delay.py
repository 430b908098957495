"""Linux's run delay: how long threads of this process were ready to run, and had no processor.

Threads of a parallel kernel that are put behind one another on one processor wait for the scheduler's slices, which are milliseconds,
where the kernel takes microseconds; a serial kernel takes what it always does. A time that was taken meanwhile says nothing of either.

Reference: the Linux kernel's Documentation/scheduler/sched-stats.rst, ``/proc/<pid>/schedstat``: its second number.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from graphopt.openmp import usable_processors

T = TypeVar("T")
TASKS = Path("/proc/self/task")
WAKING = 2.5e-5  # seconds that a thread takes to wake up
SLICE = 2.5e-4  # seconds: waiting for another thread's slice takes several times as much
SHARE = 0.05  # of a longer time
LEAST = 0.05


def run_delay(tasks: Path = TASKS) -> float:
    """Seconds that the threads of this process have waited so far; 0 where the system does not tell."""
    total = 0
    try:
        for task in os.listdir(tasks):
            try:
                with open(f"{tasks}/{task}/schedstat", "rb", buffering=0) as file:
                    total += int(file.read().split()[1])
            except (OSError, ValueError, IndexError):
                continue  # it ended meanwhile, or the kernel keeps no count
    except OSError:
        return 0.0
    return total * 1e-9


class Undisturbed(Generic[T]):
    """Sorts what was timed: apart from times in which no thread waited for a processor, those in which some did.

    Args:
        patience: seconds of disturbed times, ``LEAST`` at least, after which nobody should wait for undisturbed ones any more.
        waited: the run delay so far.

    Attributes:
        quiet: what was undisturbed, in order.
        rest: (share of the time that was waited for, what was timed) of the others.
    """

    def __init__(self, patience: float, waited: Callable[[], float] = run_delay) -> None:
        self._left, self._waited = max(patience, LEAST), waited
        self._slice = max(SLICE, WAKING * len(usable_processors()))  # as many threads may wake up
        self.quiet: list[T] = []
        self.rest: list[tuple[float, T]] = []
        self._before = waited()

    def add(self, seconds: float, what: T) -> None:
        """What took so long, ends now, and began where the last one ended."""
        before, self._before = self._before, self._waited()
        delay = self._before - before
        if delay <= max(self._slice, SHARE * seconds):
            self.quiet.append(what)
        else:
            self._left -= seconds
            self.rest.append((delay / max(seconds, 1e-9), what))

    @property
    def hopeless(self) -> bool:
        """Whether the patience has ended."""
        return bool(self.rest) and self._left <= 0.0

    def best(self) -> list[T]:
        """What was undisturbed; without any, the quarter that was disturbed least."""
        if self.quiet or not self.rest:
            return self.quiet
        least = sorted(self.rest, key=lambda item: item[0])
        return [what for _, what in least[: max(1, len(least) // 4)]]

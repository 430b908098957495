"""Linux's run delay: how long threads of this process were ready to run, and had no processor.

Threads of a parallel kernel that are put behind one another on one processor wait for the scheduler's slices, which are milliseconds,
where the kernel takes microseconds; a serial kernel takes what it always does. A time that was taken meanwhile says nothing of either.

Reference: the Linux kernel's Documentation/scheduler/sched-stats.rst, ``/proc/<pid>/schedstat``: its second number.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

TASKS = Path("/proc/self/task")
SLICE = 2.5e-4  # seconds: waking up takes a tenth of it, waiting for another thread's slice several times as much
SHARE = 0.05  # of a longer time


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


class Undisturbed:
    """Which times count: those in which no thread waited for a processor. On a machine that is busy throughout, all do after a while.

    Args:
        patience: seconds of times that are dropped at most.
        waited: the run delay so far.
    """

    def __init__(self, patience: float, waited: Callable[[], float] = run_delay) -> None:
        self._left, self._waited = patience, waited
        self._before = waited()

    def counts(self, seconds: float) -> bool:
        """Whether the time that ends now, and began where the last one ended, counts; it took so long."""
        before, self._before = self._before, self._waited()
        if self._left <= 0.0 or self._before - before <= max(SLICE, SHARE * seconds):
            return True
        self._left -= seconds
        return False

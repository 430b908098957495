"""Run delay: read from what Linux tells of each thread; it grows when threads share a processor; such times are repeated, for a while."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.run_delay import SLICE, Undisturbed, run_delay

SHARED = """
import os, threading, time
from graphopt.run_delay import run_delay
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
before, end = run_delay(), time.perf_counter() + 0.3
threads = [threading.Thread(target=lambda: [sum(range(20000)) for _ in iter(lambda: time.perf_counter() < end, False)]) for _ in range(3)]
for t in threads: t.start()
alive = run_delay()
while time.perf_counter() < end - 0.05: alive = max(alive, run_delay())
for t in threads: t.join()
print(alive - before)
"""


def test_the_threads_of_a_process_are_added_up(tmp_path: Path) -> None:
    for name, text in {"11": "500 2000000 3\n", "12": "7 1000000000 1\n", "13": "nonsense\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    (tmp_path / "14").mkdir()  # ended since the folder was listed
    assert run_delay(tmp_path) == pytest.approx(1.002)
    assert run_delay(tmp_path / "missing") == 0.0


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="this system keeps no count")
def test_threads_that_share_a_processor_wait() -> None:
    done = subprocess.run([sys.executable, "-c", SHARED], capture_output=True, text=True, check=True)
    assert float(done.stdout) > SLICE


class Sorted:
    """Times that are taken, with a run delay each."""

    def __init__(self, patience: float) -> None:
        self.waited = 0.0
        self.times = Undisturbed[str](patience, lambda: self.waited)

    def add(self, what: str, delay: float, seconds: float) -> None:
        self.waited += delay
        self.times.add(seconds, what)


def test_what_was_disturbed_stands_apart() -> None:
    s = Sorted(1.0)
    s.add("nothing", 0.0, 1e-4)
    s.add("waking up", SLICE / 2, 1e-4)
    s.add("a slice", 4e-3, 5e-3)
    s.add("hardly a hundredth", 4e-3, 0.4)
    assert s.times.quiet == ["nothing", "waking up", "hardly a hundredth"]
    assert [what for _, what in s.times.rest] == ["a slice"] and not s.times.hopeless
    s.add("half", 0.5, 0.999)
    assert s.times.hopeless and s.times.best() == s.times.quiet


def test_of_what_was_disturbed_the_least_disturbed_quarter_is_the_best() -> None:
    s = Sorted(1.0)
    assert s.times.best() == [] and not s.times.hopeless
    for n, delay in enumerate((0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.6)):
        s.add(str(n), delay, 1.0)
    assert s.times.hopeless and s.times.best() == ["1", "5"]

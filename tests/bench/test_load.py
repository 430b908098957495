"""Whether the machine was quiet, from a made-up ``/proc`` and from a process that really is busy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.bench import load
from graphopt.bench.load import Load, Snapshot, between, descendants

TICK = os.sysconf("SC_CLK_TCK")


def fake(proc: Path, busy: int, stolen: int, processes: dict[int, tuple[int, int, int]]) -> Path:
    """A ``/proc``: all times in seconds; pid -> (parent, seconds, forced switches)."""
    proc.mkdir(exist_ok=True)
    (proc / "stat").write_text(f"cpu  {busy * TICK} 0 0 999 0 0 0 {stolen * TICK} 0 0\ncpu0 1 2 3\n")
    for pid, (parent, seconds, switches) in processes.items():
        task = proc / str(pid) / "task" / str(pid)
        task.mkdir(parents=True, exist_ok=True)
        fields = ["S", str(parent), *["0"] * 9, str(seconds * TICK), "0", "0", "0"]
        (proc / str(pid) / "stat").write_text(f"{pid} (a (strange) name) {' '.join(fields)}\n")
        (task / "status").write_text(f"Name:\tx\nvoluntary_ctxt_switches:\t7\nnonvoluntary_ctxt_switches:\t{switches}\n")
    return proc


def test_own_processes_are_not_others(tmp_path: Path) -> None:
    first = load.snapshot(fake(tmp_path, 100, 0, {10: (1, 5, 0), 11: (10, 20, 100), 12: (11, 1, 0), 50: (1, 70, 900)}), pid=10)
    last = load.snapshot(fake(tmp_path, 110, 2, {10: (1, 6, 50), 11: (10, 26, 130), 12: (11, 2, 5), 50: (1, 72, 990)}), pid=10)
    assert first and last
    found = between(first, Snapshot(last.busy, last.stolen, last.own, last.switches, first.at + 10))
    assert found.others == pytest.approx((10 - 8) / 10)
    assert found.stolen == pytest.approx(2 / 10)
    assert found.switches == pytest.approx((30 + 5) / 10)  # the measuring process itself only waits


def test_descendants() -> None:
    tree = {1: (0, 0.0), 2: (1, 0.0), 3: (2, 0.0), 4: (1, 0.0), 5: (9, 0.0)}
    assert set(descendants(tree, 2)) == {2, 3}
    assert set(descendants(tree, 1)) == {1, 2, 3, 4}
    assert descendants(tree, 77) == {}


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (Load(1.0, 0.5, 0.0, 0.0), "other processes kept 0.50"),
        (Load(1.0, 0.0, 0.2, 0.0), "hypervisor took 0.20"),
        (Load(1.0, 0.0, 0.0, 500.0), "500 forced context switches"),
    ],
)
def test_complaints(found: Load, word: str) -> None:
    (complaint,) = found.complaints("during it")
    assert word in complaint and "during it" in complaint


def test_a_quiet_machine_is_fine() -> None:
    assert Load(1.0, 0.02, 0.0, 3.0).complaints("during it") == []


def test_where_nothing_can_be_read_nothing_is_known(tmp_path: Path) -> None:
    assert load.snapshot(tmp_path) is None
    assert load.watch(0.0, tmp_path) is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux")
def test_a_busy_child_counts_as_own_and_a_stranger_does_not() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            first = load.snapshot()
            while True:  # until the child had some time, however busy the machine is
                last = load.snapshot()
                assert first and last
                if last.own - first.own > 0.2:
                    break
            stranger = load.snapshot(pid=1 << 30)
            assert stranger and stranger.own == 0.0
        finally:
            child.kill()

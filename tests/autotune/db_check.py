"""Records for tests, and processes that write them as fast as they can."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from graphopt.autotune.database import Database, Versions
from graphopt.autotune.records import Measured, Status, TuningRecord
from graphopt.autotune.space import Schedule, Workload

HERE, ELSEWHERE = "0123456789abcdef", "fedcba9876543210"
NOW = (("graphopt", "0.1.0"), ("tvm", "0.27.0"))
OLD = (("graphopt", "0.0.9"), ("tvm", "0.27.0"))


def workload(rows: int = 8, op: str = "relu") -> Workload:
    """A pointwise workload of some size."""
    t = f"f32[{rows}, 64]"
    return Workload("pointwise", f"graph @g(%arg0: {t}) -> {t} {{\n  %0: {t} = {op}(%arg0)\n  return %0\n}}\n")


def record(trial: int = 0, seconds: float | None = 1e-6, gain: float | None = None, *, unroll: int | None = None, rows: int = 8,
           op: str = "relu", status: Status = Status.OK, target: str = HERE, threads: int = 2, versions: Versions = NOW,
           run: str = "run-1", when: str = "2026-01-31T12:00:00Z") -> TuningRecord:  # fmt: skip
    """A record whose schedule is told by ``unroll``, else by its trial."""
    schedule = Schedule.make("nest", lanes=16, unroll=trial if unroll is None else unroll, parallel=True)
    measured = Measured(status, seconds if status is Status.OK else None, 0.01, 0.5, gain, "" if status is Status.OK else "a reason")
    device = "cpu:x86_64 (a processor, 2 cores)"
    return TuningRecord(workload(rows, op), target, device, threads, schedule, measured, versions, run, trial, when)


def write(path: Path, run: str, acknowledged: int, count: int | None = None) -> None:
    """Add ``count`` records one by one, or without end; after each, write its trial to the file descriptor ``acknowledged``."""
    db = Database(path)
    for trial in itertools.count() if count is None else range(count):
        r = record(trial, run=run)
        db.add([replace(r, measured=replace(r.measured, reason="x" * (trial * 97 % 9000)))])  # small rows, and some over several pages
        os.write(acknowledged, f"{trial}\n".encode())


@contextmanager
def writers(path: Path, runs: Sequence[str], count: int | None = None) -> Iterator[list[tuple[int, int]]]:
    """Processes that ``write``: (process, file descriptor to read what was acknowledged from); killed at the end if need be."""
    made = []
    for run in runs:
        read, end = os.pipe()
        process = os.fork()
        if process == 0:
            status = 1
            try:
                write(path, run, end, count)
                status = 0
            finally:
                os._exit(status)
        os.close(end)
        made.append((process, read))
    try:
        yield made
    finally:
        for process, read in made:
            os.close(read)
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)

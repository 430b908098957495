"""Tuning real kernels: bad templates are tried and never chosen, and a tuner that is killed at any moment loses nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import tuning, tuning_tvm
from graphopt.autotune.claim import Claim, going_on
from graphopt.autotune.database import Database
from graphopt.autotune.library_kernel import TEMPLATE
from graphopt.autotune.measure import Built
from graphopt.autotune.records import Measured, Status, TuningRecord
from graphopt.autotune.runner import ProcessRunner
from graphopt.autotune.space import Param, Schedule, SearchSpace, Workload
from graphopt.autotune.tasks import Task
from graphopt.autotune.tuner import Budget
from graphopt.errors import DatabaseError
from graphopt.target import Target, detect
from graphopt.tuned import device_key
from graphopt.tuning import Run, last_run, moment, spaces_of, tune, versions, withdraw
from graphopt.tuning_tasks import tasks_of
from graphopt.tuning_tvm import TvmCandidates
from tests.autotune.busy import timing

pytestmark = pytest.mark.tvm

X = torch.randn(4, 48)
BATCH = 4
BAD = """
#include <stdint.h>
int __tvm_ffi_segfaults(void* self, const void* args, int32_t n, void* result) { *(volatile int*)8 = 1; return 0; }
int __tvm_ffi_never_ends(void* self, const void* args, int32_t n, void* result) { for (volatile int i = 0;; i = 1) {} return 0; }
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(48, 96), nn.Linear(96, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def tasks(cache_dir: Path) -> list[Task]:
    """The tasks of a small model, the same in every process."""
    compiled = graphopt.compile(Net(), (X,), cache_dir=cache_dir, tuning_db=None)
    found = tasks_of([compiled.profile(X, runs=2)], detect()).tasks
    return sorted(found, key=lambda t: t.workload.key)


# --- bad templates -----------------------------------------------------------------------------------------------------


class WithBadTemplates(TvmCandidates):
    """Builds for three more templates: one computes something else for some of its knobs, one segfaults, one never ends."""

    def build(self, w: Workload, schedules: Sequence[Schedule]) -> list[Built]:
        return [self._one(w, s) for s in schedules]

    def _one(self, w: Workload, s: Schedule) -> Built:
        if s.template in ("segfaults", "never_ends"):
            return Built(s, str(self._bad()), s.template)
        if s.template != "mistaken":
            return super().build(w, [s])[0]
        other = Workload(w.kind, w.text.replace("= relu(", "= tanh(")) if s["mistaken"] else w
        (built,) = super().build(other, [spaces_of(w, self.target)[0].default()])
        return Built(s, built.path, built.entry, built.seconds, built.failure)

    def _bad(self) -> Path:
        file = self._folder / "bad.so"
        if not file.exists():
            (self._folder / "bad.c").write_text(BAD)
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", file, self._folder / "bad.c"], check=True)
        return file


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, for kernels that are bad on purpose")
def test_bad_templates_are_tried_and_none_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (task, *_) = [t for t in tasks(tmp_path / "cache") if "relu" in t.workload.text]
    bad = [
        SearchSpace("mistaken", params=(Param("mistaken", (True, False)), Param("n", (0, 1)))),
        SearchSpace("segfaults", params=(Param("n", (0, 1)),)), SearchSpace("never_ends"),
    ]  # fmt: skip

    def spaces(w: Workload, target: Target) -> list[SearchSpace]:
        (first, *_) = spaces_of(w, target)
        return [SearchSpace(first.template, first.sketches[:1], tuple(Param(p.name, p.choices[:1]) for p in first.params)), *bad]

    monkeypatch.setattr(tuning, "spaces_of", spaces)  # not the name that this file imported
    monkeypatch.setattr(tuning_tvm, "TvmCandidates", WithBadTemplates)
    database = Database(tmp_path / "t.db")
    run = Run(detect(), database, 1, batch=BATCH, timing=timing(floor=0.002, recheck=0.004, patience=2.0))
    outcome = tune([task], run, Budget(seconds=300))
    assert outcome.why == "done", "it has been through the whole space"
    ended = {(r.schedule.template, dict(r.schedule.knobs).get("mistaken")): r.measured.status for r in database.records()}
    assert ended[task.default.template, None] is Status.OK and ended["mistaken", False] is Status.OK
    assert ended["mistaken", True] is Status.WRONG
    assert ended["segfaults", None] is Status.CRASHED
    assert ended["never_ends", None] is Status.TIMED_OUT
    best = database.best(task.workload, device_key(detect()), 1, versions(detect()))
    assert best is not None and best.schedule.template in (task.default.template, "mistaken")
    assert best.schedule.template != "mistaken" or not best.schedule["mistaken"]
    compiled = graphopt.compile(Net(), (X,), cache_dir=tmp_path / "cache", tuning_db=tmp_path / "t.db")
    torch.testing.assert_close(compiled(X), Net()(X))


def test_a_model_that_cannot_be_read_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(self: Database, name: str) -> bytes:
        raise DatabaseError("the disk does not answer")

    closed: list[str] = []
    monkeypatch.setattr(Database, "load_model", damaged)
    monkeypatch.setattr(TvmCandidates, "close", lambda self, close=TvmCandidates.close: closed.append("builder") or close(self))
    monkeypatch.setattr(ProcessRunner, "close", lambda self, close=ProcessRunner.close: closed.append("runner") or close(self))
    with pytest.raises(DatabaseError):
        tune([], Run(detect(), Database(tmp_path / "t.db"), 1, workers=1), Budget(trials=1))
    assert sorted(closed) == ["builder", "runner"]


# --- killed at any moment ----------------------------------------------------------------------------------------------

TRIALS, KILLS, SEED = 64, 20, 0  # trials that so many killed tuners do not get done


def tune_all(found: list[Task], file: Path) -> int:
    """Tune to a number of trials in all, going on with whatever there is."""
    database = Database(file)
    last = last_run(database, found, detect(), 1) or ""
    run = Run(detect(), database, 1, run=last, workers=1, batch=BATCH, timing=timing(floor=0.002, recheck=0.004))
    return tune(found, run, Budget(trials=TRIALS)).trials


def forked(found: list[Task], file: Path) -> int:
    """The same in a process of its own; its id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            tune_all(found, file)
            status = 0
        finally:
            os._exit(status)
    return pid


def ends(seconds: float, is_so: partial[bool]) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + seconds
    while not (found := is_so()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def no_process_of(pid: int) -> bool:
    """Whether no process is left in the session of one that was killed, nor a build process of it."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "cmdline").read_text()
            except OSError:
                continue
            if f"main({pid})" in text:
                return False
    return True


@pytest.mark.slow
def test_a_tuner_that_is_killed_at_random_moments_makes_the_trials_of_an_undisturbed_one(tmp_path: Path) -> None:
    found = tasks(tmp_path / "cache")
    assert tune_all(found, tmp_path / "undisturbed.db") == TRIALS
    rng, file, seen = Random(SEED), tmp_path / "killed.db", dict[str, None]()
    for kill in range(KILLS):
        pid = forked(found, file)
        before = len(seen)
        end = time.monotonic() + 120
        # half of them before or while the first candidate is built, the others when some trials were written down
        wanted = 0 if kill % 2 else 1
        while len(Database(file).records()) < min(before + wanted, TRIALS - 1) and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.1 if wanted else 1.0))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"it ended by itself, after {kill} that were killed"
        now = dict.fromkeys(r.key for r in Database(file).records())
        assert list(now)[: len(seen)] == list(seen), "what was written down stays, and is whole"
        seen = now
        assert ends(30, partial(no_process_of, pid)), "its build processes end with it"
    assert tune_all(found, file) == TRIALS - len(seen)
    for name in ("undisturbed.db", "killed.db"):
        records = Database(tmp_path / name).records()
        assert [r.trial for r in records] == list(range(1, TRIALS + 1))
        assert len({(r.workload.key, r.schedule) for r in records}) == TRIALS, "none is made twice"
        assert len({r.run for r in records}) == 1
        assert all(r.measured.ok for r in records), Counter(r.measured.reason for r in records)
    assert not [p for p in Path(tempfile.gettempdir()).glob("graphopt-tune-*-*") if not Path(f"/proc/{p.name.split('-')[2]}").exists()]


def test_pytorchs_kernels_are_a_candidate_that_is_checked_and_timed_like_any_other(tmp_path: Path) -> None:
    found = tasks(tmp_path / "cache")
    run = Run(detect(), Database(tmp_path / "tuning.db"), 1, workers=1)
    tune(found, run, Budget(seconds=120.0, trials=16))
    mine = [r for r in run.database.records() if r.schedule.template == TEMPLATE]
    assert {r.workload.key for r in mine} == {t.workload.key for t in found} and all(r.measured.ok for r in mine)
    assert all(r.measured.error is not None and 0 < r.measured.error < 1e-5 for r in mine)


@pytest.mark.parametrize("change", [{"machine": detect()}, {"target": Target.from_name("cpu:x86-64-v2")}])
def test_pytorchs_kernels_are_none_where_they_do_not_run_on_what_is_tuned_for(tmp_path: Path, change: dict[str, Any]) -> None:
    run = Run(detect(), Database(tmp_path / "tuning.db"), 1)
    assert run.has_library and not replace(run, **change).has_library


def test_what_is_slower_in_the_model_is_withdrawn(tmp_path: Path) -> None:
    database, target = Database(tmp_path / "tuning.db"), detect()
    first, second = tasks(tmp_path / "cache")[:2]

    def variants(task: Task) -> list[Schedule]:
        space = spaces_of(task.workload, target)[0]
        base = space.default()
        return [Schedule.make(base.template, base.sketch, **{**dict(base.knobs), p.name: c}) for p in space.params for c in p.choices[1:]]

    one, other = variants(first), variants(second)

    def add(task: Task, schedule: Schedule, gain: float | None, when: str, trial: int, run: str = "r") -> None:
        measured = Measured(Status.OK, 1e-5 / (gain or 1.0), 0.0, 0.0, gain)
        made = versions(target)
        database.add([TuningRecord(task.workload, device_key(target), str(target), 1, schedule, measured, made, run, trial, when)])

    def best(task: Task) -> Schedule | None:
        found = database.best(task.workload, device_key(target), 1, versions(target))
        return found and found.schedule

    add(first, one[0], 1.5, "2026-01-01T00:00:00Z", 1, "earlier")
    add(first, first.default, None, "2026-01-02T00:00:00Z", 2)
    add(first, one[1], 9.0, "2026-01-02T00:00:00Z", 3)
    add(first, one[2], 0.99, "2026-01-02T00:00:00Z", 4)
    add(second, other[1], 2.0, "2026-01-02T00:00:00Z", 5)
    assert best(first) == one[1]
    assert withdraw(database, [first.workload.key, first.workload.key], target, 1) == 1
    assert len(database.records()) == 5 and best(second) == other[1]
    assert best(first) == one[0], "what counted before, not what lost by little to the one that is withdrawn"
    assert withdraw(database, [first.workload.key], target, 1) == 1 and best(first) != one[0], "of an earlier run"
    assert withdraw(database, [first.workload.key], target, 1) == 0


def test_a_withdrawal_that_is_interrupted_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, file = tasks(tmp_path / "cache"), tmp_path / "tuning.db"
    database, target = Database(file), detect()
    schedule = replace_knob(found[0])
    made = versions(target)
    database.add([TuningRecord(found[0].workload, device_key(target), str(target), 1, s, Measured(Status.OK, 1e-5, gain=g), made, "r", n,
                               moment()) for n, (s, g) in enumerate([(found[0].default, None), (schedule, 2.0)])])  # fmt: skip
    before = database.records()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("graphopt.autotune.database._insert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            withdraw(database, [found[0].workload.key], target, 1)
    assert Database(file).records() == before


def replace_knob(task: Task) -> Schedule:
    """Another point of the default's sketch."""
    space = spaces_of(task.workload, detect())[0]
    base = space.default()
    param = next(p for p in space.params if len(p.choices) > 1)
    return Schedule.make(base.template, base.sketch, **{**dict(base.knobs), param.name: param.choices[1]})


def test_a_run_that_a_process_is_at_is_not_gone_on_with(tmp_path: Path) -> None:
    found, file = tasks(tmp_path / "cache"), tmp_path / "tuning.db"
    database, target = Database(file), detect()

    def add(run: str, when: str, some: Sequence[Task]) -> None:
        measured = Measured(Status.OK, 1e-5)
        database.add([TuningRecord(t.workload, device_key(target), str(target), 1, t.default, measured, versions(target), run, 1, when)
                      for t in some])  # fmt: skip

    name = f"test-{os.getpid()}"
    add(f"{name}-all", "2026-01-01T00:00:00Z", found)
    add(f"{name}-one", "2026-01-02T00:00:00Z", found[:1])
    assert last_run(database, found, target, 1) == f"{name}-all", "it has most of them"
    assert last_run(database, found[:1], target, 1) == f"{name}-one", "the latest"
    claim = Claim(f"{name}-all")
    assert last_run(database, found, target, 1) == f"{name}-one"
    claim.close()
    assert last_run(database, found, target, 1) == f"{name}-all" and not going_on(f"{name}-all")

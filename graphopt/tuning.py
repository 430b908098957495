"""Tuning: here the tuner (:mod:`graphopt.autotune.tuner`), which knows no backend, meets the TVM backend and the database.

Which kernels of a model to tune: :mod:`graphopt.tuning_tasks`. What the model gained: :mod:`graphopt.before_after`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from graphopt.autotune.cost_model import CostModel
from graphopt.autotune.database import Database
from graphopt.autotune.measure import Built, Timing, Trial
from graphopt.autotune.records import Measured, Status, TuningRecord
from graphopt.autotune.runner import ProcessRunner
from graphopt.autotune.search import Search
from graphopt.autotune.space import Schedule, SearchSpace, Workload
from graphopt.autotune.tasks import Scheduler, Task
from graphopt.autotune.tuner import Budget, Listener, Outcome, Standing, Tuner
from graphopt.errors import BuildError, DatabaseError, DeviceError, DiskFullError, UsageError, counted, first_line
from graphopt.hidden import missing_here
from graphopt.target import Target, detect
from graphopt.tuned import device_key

LOADER = "graphopt.backends.tvm.launch:load"
BUILD_SECONDS = 30.0  # of one file of candidates

def spaces_of(w: Workload, target: Target) -> list[SearchSpace]:
    """The search spaces of all templates that take a workload, the preferred one first."""
    return [space for t in _backend().templates(w, target) for space in t.spaces(w, target)]


def _backend() -> Any:
    from graphopt.backends.tvm.backend import TvmBackend  # tvm is an optional package

    return TvmBackend()


# --- building and running ----------------------------------------------------------------------------------------------


class CandidateBuilder:
    """Builds candidates into a folder of its own that goes away with it."""

    def __init__(self, target: Target, workers: int = 0, together: int = 8) -> None:
        from graphopt.backends.tvm.build import KernelBuilder

        _sweep()
        self.target, self.workers, self.together = target, workers, together
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self._builder = KernelBuilder(BUILD_SECONDS)
        self._builder.prestart(workers or detect().cores)

    def build(self, w: Workload, schedules: Sequence[Schedule]) -> list[Built]:
        from graphopt.backends.tvm.template import entry_name

        """Raises DiskFullError if the folder's disk is full, which is no candidate's fault."""
        done = self._builder.build_together(w, schedules, self.target, self._folder, self.workers, self.together)
        if any(isinstance(r, BuildError) and os.strerror(errno.ENOSPC) in str(r) for r in done):
            raise DiskFullError(f"there is no room for candidates: the disk of {self._folder} is full; TMPDIR chooses another one")
        return [
            Built(s, failure=first_line(r)) if isinstance(r, BuildError) else Built(s, str(r[0]), entry_name(w, s), r[1])
            for s, r in zip(schedules, done, strict=True)
        ]

    def close(self) -> None:
        """End the build processes and remove the folder."""
        self._builder.close()
        shutil.rmtree(self._folder, ignore_errors=True)


PREFIX = "graphopt-tune-"  # of folders; then the process, by which those of killed tuners are known


def _sweep() -> None:
    """Remove what tuners left that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


# --- a run -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a tuning run is done with.

    Attributes:
        threads: that kernels may use.
        run: its id; that of an earlier run to go on with it.
        machine: where candidates run; None for this one.
    """

    target: Target
    database: Database
    threads: int
    seed: int = 0
    run: str = ""
    workers: int = 0
    batch: int = 16
    timing: Timing = field(default_factory=Timing)
    machine: Target | None = None

    @property
    def device(self) -> str:
        """``TuningRecord.target`` of its trials."""
        return device_key(self.target, self.machine)


def tune(tasks: Sequence[Task], run: Run, budget: Budget, *, scheduler: Scheduler | None = None,
         listener: Listener | None = None, runner: ProcessRunner | None = None) -> Outcome:  # fmt: skip
    """Tune tasks until the budget ends. What was found is in the database, also if this is interrupted.

    Args:
        runner: of ``run.machine``, where that is another one. It is closed at the end.
    """
    done = run_records(run, tasks) if run.run else []
    name = run.run or new_run()
    builder = CandidateBuilder(run.target, run.workers)
    runner = runner or ProcessRunner(LOADER, run.threads, run.timing, run.seed)
    runner.start()
    model = _cost_model(run)
    try:
        tuner = Tuner(
            tasks, search=partial(_search, run, model, done), builder=builder, runner=runner, record=partial(_record, run, name),
            scheduler=scheduler, batch=run.batch, known=_incumbents(run, tasks, done), done=max((r.trial for r in done), default=0),
            listener=listener,
        )  # fmt: skip
        runner.ready()  # the budget is for trials
        return tuner.run(budget)
    finally:
        runner.close()
        builder.close()
        if len(model):
            with contextlib.suppress(DatabaseError):  # it can be taught again, and must not hide what else went wrong
                run.database.save_model(_model_name(run), model.to_bytes())


def new_run() -> str:
    """An id: when it began, and something random."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"


def run_records(run: Run, tasks: Iterable[Task]) -> list[TuningRecord]:
    """What a run has tried of some tasks so far."""
    keys = {t.workload.key for t in tasks}
    return [r for r in run.database.records(run=run.run, versions=versions()) if r.workload.key in keys]


def withdraw(database: Database, workloads: Iterable[str], target: Target, threads: int, since: str) -> int:
    """Let nothing count that was found faster since a moment (``TuningRecord.when``), for workloads given by key.

    For schedules that are slower in the model: they won while something else ran. The trials stay, without their gain. Returns
    how many workloads lost one.
    """
    keys = set(workloads)
    found = database.records(target=device_key(target), threads=threads, versions=versions())
    won = [r for r in found if r.workload.key in keys and r.when >= since and (r.measured.gain or 0.0) > 1.0]
    database.remove([r.key for r in won])
    for r in won:  # as fast as what it was timed against
        m = r.measured
        database.add([replace(r, measured=replace(m, seconds=(m.seconds or 0.0) * (m.gain or 1.0), gain=1.0))])
    return len({r.workload.key for r in won})


def last_run(database: Database, tasks: Sequence[Task], target: Target, threads: int, machine: Target | None = None) -> str | None:
    """The latest run that tuned any of these tasks under the same conditions."""
    found = [r for t in tasks for r in database.records(t.workload, device_key(target, machine), threads, versions())]
    return max(found, key=lambda r: (r.when, r.trial)).run if found else None


def versions() -> tuple[tuple[str, str], ...]:
    """(name, version) of all that makes a kernel."""
    return _backend().versions()  # type: ignore[no-any-return]


def _model_name(run: Run) -> str:
    return f"{run.device} {counted(run.threads, 'thread')}"


def _cost_model(run: Run) -> CostModel:
    """The model that earlier runs on this device taught, or one that knows nothing."""
    data = run.database.load_model(_model_name(run))
    try:
        return CostModel.from_bytes(data, run.seed) if data else CostModel(run.seed)
    except UsageError:  # of another version: it is taught anew
        return CostModel(run.seed)


def _search(run: Run, model: CostModel, done: Sequence[TuningRecord], task: Task) -> Search:
    known = [(r.schedule, r.measured) for r in done if r.workload.key == task.workload.key]
    best = run.database.best(task.workload, run.device, run.threads, versions())
    seeds = run.database.seeds(task.workload, run.device, run.threads, versions())
    if best is not None:
        seeds = [best.schedule, *seeds]
    return Search(task.workload, run.target, spaces_of(task.workload, run.target), seed=run.seed, model=model, known=known, seeds=seeds)


def search_for(task: Task, target: Target, known: Sequence[tuple[Schedule, Measured]] = ()) -> Search:
    """The search of a task, with nothing to go by but what was measured."""
    return Search(task.workload, target, spaces_of(task.workload, target), seed=0, known=known)


def _incumbents(run: Run, tasks: Sequence[Task], done: Sequence[TuningRecord]) -> dict[int, Standing]:
    """Where an earlier part of the run stood."""
    out: dict[int, Standing] = {}
    for i, task in enumerate(tasks):
        mine = [r for r in done if r.workload.key == task.workload.key]
        default = next((r.measured for r in mine if r.schedule == task.default and r.measured.status is not Status.LOST), None)
        lead: TuningRecord | None = None
        for r in mine:
            if r.measured.ok and (lead is None or (r.measured.gain or 0.0) > 1.0):
                lead = r
        if lead is not None and lead.measured.seconds is not None:
            out[i] = Standing(lead.schedule, lead.measured.seconds, default, len(mine))
    return out


def _record(run: Run, name: str, task: Task, trial: Trial, number: int) -> None:
    run.database.add([TuningRecord(task.workload, run.device, str(run.target), run.threads, trial.schedule, trial.measured,
                                   versions(), name, number, moment())])  # fmt: skip


def moment() -> str:
    """Now, as records have it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def check_device(name: str, machine: Target | None = None) -> Target:
    """The device to tune for, on a machine, this one unless given. Raises DeviceError for one whose kernels do not run there."""
    target = machine if machine and name == "cpu" else Target.from_name(name)
    if target.kind != "cpu":
        raise DeviceError(f"{name!r}: only processors are tuned so far")
    if why := machine.lacks(target) if machine else missing_here(target):
        raise DeviceError(f"kernels for {name!r} cannot be timed {'on the other machine' if machine else 'here'}: {why}")
    return target

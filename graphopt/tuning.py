"""Tuning: here the tuner (:mod:`graphopt.autotune.tuner`), which knows no backend, meets backends and the database.

Which kernels of a model to tune: :mod:`graphopt.tuning_tasks`. What the model gained: :mod:`graphopt.before_after`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial

import torch

from graphopt.autotune.claim import Claim, going_on
from graphopt.autotune.cost_model import CostModel
from graphopt.autotune.database import Database, leader
from graphopt.autotune.library_kernel import LibraryBuilder, library_space
from graphopt.autotune.measure import Builder, Timing, Trial
from graphopt.autotune.records import Measured, TuningRecord
from graphopt.autotune.runner import ProcessRunner
from graphopt.autotune.search import Search
from graphopt.autotune.space import Schedule, SearchSpace, Workload
from graphopt.autotune.tasks import Scheduler, Task
from graphopt.autotune.tuner import Budget, Listener, Outcome, Standing, Tuner
from graphopt.candidates import TuningBackend, new_folder
from graphopt.devices import choose_target
from graphopt.errors import DatabaseError, DeviceError, UsageError, counted
from graphopt.hidden import missing_here
from graphopt.options import Options
from graphopt.target import Target, detect
from graphopt.tuned import device_key
from graphopt.tuning_triton import TritonTuning
from graphopt.tuning_tvm import TvmTuning


def tuning_backend(target: Target, machine: Target | None = None, gpu: int = 0) -> TuningBackend:
    """The backend that tunes kernels for a target.

    Args:
        machine, gpu: where they run; see :class:`Run`.
    """
    return TritonTuning(target, machine is not None, gpu) if target.is_gpu else TvmTuning(target)


def spaces_of(w: Workload, target: Target) -> list[SearchSpace]:
    """The search spaces of all templates that take a workload, the preferred one first."""
    return [space for t in tuning_backend(target).backend.templates(w, target) for space in t.spaces(w, target)]


def versions(target: Target) -> tuple[tuple[str, str], ...]:
    """(name, version) of all that makes a kernel for a target."""
    return tuning_backend(target).backend.versions()


def all_versions() -> list[tuple[tuple[str, str], ...]]:
    """The same for each backend that is installed."""
    found: list[tuple[TuningBackend, str]] = [(TvmTuning(detect()), "tvm"), (TritonTuning(detect(), interpret=True), "triton")]
    return [b.backend.versions() for b, package in found if importlib.util.find_spec(package) is not None]


# --- a run -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a tuning run is done with.

    Attributes:
        threads: that kernels may use.
        run: its id; that of an earlier run to go on with it.
        timing: None for how the backend's kernels are timed best.
        machine: where candidates run: None for this processor, or for the GPU that is the target. Kernels for a GPU that are given a
            processor here are interpreted on it.
        gpu: PyTorch's number of that GPU.
    """

    target: Target
    database: Database
    threads: int
    seed: int = 0
    run: str = ""
    workers: int = 0
    batch: int = 16
    timing: Timing | None = None
    machine: Target | None = None
    gpu: int = 0

    @property
    def has_library(self) -> bool:
        """Whether PyTorch's kernels are candidates: where they run on what is tuned for."""
        return self.machine is None and (self.target.is_gpu or self.target == detect())

    @property
    def device(self) -> str:
        """``TuningRecord.target`` of its trials."""
        return device_key(self.target, self.machine)

    @property
    def label(self) -> str:
        """``TuningRecord.device`` of its trials: the same for people."""
        return f"{self.target} interpreted on {self.machine}" if self.target.is_gpu and self.machine else str(self.target)


def tune(tasks: Sequence[Task], run: Run, budget: Budget, *, scheduler: Scheduler | None = None,
         listener: Listener | None = None, runner: ProcessRunner | None = None) -> Outcome:  # fmt: skip
    """Tune tasks until the budget ends. What was found is in the database, also if this is interrupted.

    Args:
        runner: of ``run.machine``, where that is another one. It is closed at the end.
    """
    name = run.run or new_run()
    backend = tuning_backend(run.target, run.machine, run.gpu)
    with ExitStack() as stack:
        runner = stack.enter_context(closing(runner or backend.runner(run.threads, run.timing, run.seed)))
        builder: Builder = stack.enter_context(closing(backend.builder(run.workers)))
        if run.has_library:
            folder = new_folder()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            builder = LibraryBuilder(builder, folder)
        stack.enter_context(closing(Claim(name)))
        done = run_records(run, tasks) if run.run else []
        runner.start()
        model = _cost_model(run)
        try:
            tuner = Tuner(
                tasks, search=partial(_search, run, model, done), builder=builder, runner=runner, record=partial(_record, run, name),
                scheduler=scheduler, batch=run.batch, known=_incumbents(run, tasks, done), done=max((r.trial for r in done), default=0),
                listener=listener,
            )  # fmt: skip
            runner.ready()  # the budget is for trials
            return replace(tuner.run(budget), why_unranked=model.why_not)
        finally:
            if len(model):
                with suppress(DatabaseError):  # it can be taught again, and must not hide what else went wrong
                    run.database.save_model(_model_name(run), model.to_bytes())


def new_run() -> str:
    """An id: when it began, and something random."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"


def run_records(run: Run, tasks: Iterable[Task]) -> list[TuningRecord]:
    """What a run has tried of some tasks so far."""
    keys = {t.workload.key for t in tasks}
    return [r for r in run.database.records(run=run.run, versions=versions(run.target)) if r.workload.key in keys]


def withdraw(database: Database, workloads: Iterable[str], target: Target, threads: int, machine: Target | None = None) -> int:
    """Let the schedules that count for workloads, given by key, count no more: a model is slower with them than without.

    They won while something else ran, or what they leave in the caches is worth less in a model than alone. The trials stay: what the
    run that each comes from has found faster loses its gain, and is as fast as what it was timed against.

    Returns:
        For how many of them there was something to withdraw. What counts because the default schedule failed is left.
    """
    out = 0
    found = database.records(target=device_key(target, machine), threads=threads, versions=versions(target))
    for key in dict.fromkeys(workloads):
        mine = [r for r in found if r.workload.key == key]
        lead = leader([(r.schedule, r.measured, r.run) for r in mine])
        won = [r for r in mine if lead is not None and r.run == mine[lead].run and (r.measured.gain or 0.0) > 1.0]
        as_before = [replace(r.measured, seconds=(r.measured.seconds or 0.0) * (r.measured.gain or 1.0), gain=1.0) for r in won]
        database.replace([r.key for r in won], [replace(r, measured=m) for r, m in zip(won, as_before, strict=True)])
        out += bool(won)
    return out


def last_run(database: Database, tasks: Sequence[Task], target: Target, threads: int, machine: Target | None = None) -> str | None:
    """Of the runs under the same conditions the one that tuned most of these tasks, the latest of several; none that a process is at."""
    found: dict[str, tuple[int, str]] = {}
    for t in tasks:
        latest = {r.run: r.when for r in database.records(t.workload, device_key(target, machine), threads, versions(target))}
        for run, when in latest.items():
            count, before = found.get(run, (0, ""))
            found[run] = count + 1, max(before, when)
    return max((run for run in found if not going_on(run)), key=lambda run: found[run], default=None)


def threads_of_runs(database: Database, tasks: Sequence[Task], target: Target, machine: Target | None = None) -> list[int]:
    """With how many threads runs under otherwise the same conditions tuned some of these tasks."""
    key, now = device_key(target, machine), versions(target)
    return sorted({r.threads for t in tasks for r in database.records(t.workload, key, versions=now)})


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
    known = [(r.schedule, r.measured) for r in done if r.workload.key == task.workload.key and not r.measured.says_nothing]
    best = run.database.best(task.workload, run.device, run.threads, versions(run.target))
    seeds = run.database.seeds(task.workload, run.device, run.threads, versions(run.target))
    if best is not None:
        seeds = [best.schedule, *seeds]
    return Search(task.workload, run.target, _spaces(run, task.workload), seed=run.seed, model=model, known=known, seeds=seeds)


def _spaces(run: Run, w: Workload) -> list[SearchSpace]:
    library = library_space(w) if run.has_library else None
    return [*spaces_of(w, run.target), *([library] if library else ())]


def search_for(task: Task, target: Target, known: Sequence[tuple[Schedule, Measured]] = ()) -> Search:
    """The search of a task, with nothing to go by but what was measured."""
    return Search(task.workload, target, spaces_of(task.workload, target), seed=0, known=known)


def _incumbents(run: Run, tasks: Sequence[Task], done: Sequence[TuningRecord]) -> dict[int, Standing]:
    """Where an earlier part of the run stood."""
    out: dict[int, Standing] = {}
    for i, task in enumerate(tasks):
        mine = [r for r in done if r.workload.key == task.workload.key]
        default = next((r.measured for r in mine if r.schedule == task.default and not r.measured.says_nothing), None)
        lead = leader([(r.schedule, r.measured, r.run) for r in mine])
        if lead is not None:
            seconds = mine[lead].measured.seconds
            assert seconds is not None
            out[i] = Standing(mine[lead].schedule, seconds, default, len(mine))
    return out


def _record(run: Run, name: str, task: Task, trial: Trial, number: int) -> None:
    run.database.add([TuningRecord(task.workload, run.device, run.label, run.threads, trial.schedule, trial.measured,
                                   versions(run.target), name, number, moment())])  # fmt: skip


def moment() -> str:
    """Now, as records have it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


_INTERPRET = ("--device cuda:sm_90:4 --interpret runs kernels under Triton's interpreter, to check the tuner: what is found so counts for "
              "interpreted models alone")  # fmt: skip


def check_device(name: str, machine: Target | None = None, interpret: bool = False) -> Target:
    """The device to tune for, on a machine, this one unless given.

    Args:
        name: as for :meth:`Target.from_name`; ``cuda`` for the GPU that is here.
        interpret: kernels of a GPU are interpreted here.

    Raises:
        DeviceError: its kernels do not run there.
    """
    if name in ("cuda", "hip") and not interpret:
        return _gpu_here(name, machine)
    target = machine if machine and name == "cpu" else Target.from_name(name)
    if target.is_gpu and not interpret:
        raise DeviceError(f"{name!r}: kernels for GPUs are timed on the GPU itself: --device {target.kind}, where it is. {_INTERPRET}")
    if interpret and not target.is_gpu:
        raise UsageError(f"--interpret is for kernels of a GPU, and {name!r} is a processor; --device cuda:sm_90:4, for instance")
    if target.is_gpu:
        return target
    if why := machine.lacks(target) if machine else missing_here(target):
        raise DeviceError(f"kernels for {name!r} cannot be timed {'on the other machine' if machine else 'here'}: {why}")
    return target


def _gpu_here(kind: str, machine: Target | None) -> Target:
    """The GPU that PyTorch uses, as a model on it is compiled for it. Raises DeviceError."""
    if machine is not None:
        raise DeviceError(f"{kind!r}: another machine times kernels of processors alone")
    found = "" if not torch.cuda.is_available() else "hip" if torch.version.hip else "cuda"
    if found != kind:
        raise DeviceError(f"{kind!r}: there is no such GPU here that PyTorch can use. {_INTERPRET}")
    return choose_target(torch.device("cuda", torch.cuda.current_device()), Options())

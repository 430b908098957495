"""``mode="max-autotune"``: a compilation tunes its own kernels first, for some seconds, and then takes what was found.

There is no program yet that could be profiled, so tasks are weighed by an estimate until their default schedules were timed, which is
the first thing that is done with each. A kernel that was tuned enough before, on this device and with these versions, is left
as it is: the second compilation of a model costs nothing more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from graphopt.accelerators import accelerator_of
from graphopt.autotune.database import Database
from graphopt.autotune.sqlite import Damaged
from graphopt.autotune.tasks import Task
from graphopt.autotune.tuner import Budget, Event, Outcome
from graphopt.errors import GraphoptError, counted
from graphopt.ir import dims, work
from graphopt.ir.graph import Graph
from graphopt.lower import KernelStep, Lowered
from graphopt.profile import CallCost, Profile, describe
from graphopt.report import Report, TunedKernel
from graphopt.sampling import sample_bindings
from graphopt.target import Target
from graphopt.trials import CPU
from graphopt.tuned import device_key
from graphopt.tuning import Run, last_run, search_for, tune, versions
from graphopt.tuning_tasks import tasks_of

ENOUGH = 64  # candidates of a workload, after which a later compilation does not go on
_CYCLES, _BYTES, _CALL = 2.5e9, 20e9, 2e-6  # a second; for estimates that only order tasks which were never timed

Progress = Callable[[str, int, int], None]


def autotune(units: Sequence[tuple[Graph, Lowered]], target: Target, path: Path, threads: int, seconds: float, report: Report,
             progress: Progress | None = None, machine: Target | None = None, gpu: int = 0) -> None:  # fmt: skip
    """Tune the kernels of one compilation. What comes of it is in the database, and told in the report.

    Args:
        units: its programs, lowered with default schedules; the general one first, behind it those for some sizes, which are tuned
            in its place.
        path: the tuning database.
        threads: that kernels will use.
        seconds: for trials.
        progress: told how far it is; if there is none, a line on stderr says at the beginning what is done.
        machine, gpu: where kernels run; see :class:`~graphopt.tuning.Run`.

    Raises:
        KeyboardInterrupt: on Ctrl-C; what was tried is kept.
    """
    start = time.perf_counter()
    try:
        outcome = _tune(units, target, Database(path), threads, seconds, progress, machine, gpu)
    except GraphoptError as error:  # a compilation does without
        if isinstance(error, Damaged):
            error.set_aside()
        report.notes.append(f"max-autotune: {error}")
        return
    finally:
        report.seconds["tune"] = time.perf_counter() - start
    if outcome is None:
        report.notes.append("max-autotune: nothing to tune that was not tuned before")
        return
    for p in outcome.progress:
        default = p.default.seconds if p.default else None
        report.tuning.append(TunedKernel(p.task.name, p.trials, p.trials - p.statuses.get("ok", 0), default, p.best))
    if outcome.why == "interrupted":
        raise KeyboardInterrupt
    report.notes += [f"max-autotune: {p.task.name} was left out: {p.left_out}" for p in outcome.progress if p.left_out]
    report.notes.append(_told(outcome, seconds))


def _tune(units: Sequence[tuple[Graph, Lowered]], target: Target, database: Database, threads: int, seconds: float,
          progress: Progress | None, machine: Target | None, gpu: int) -> Outcome | None:  # fmt: skip
    device = torch.device("cuda", gpu) if target.is_gpu and machine is None else CPU
    profiles = [estimate(graph, lowered, target) for graph, lowered in units[1:] or units]
    tasks = [t for t in tasks_of(profiles, target, device=device).tasks if not _done(t, target, database, threads, machine)]
    if not tasks:
        return None
    database.check_writable()
    if progress is None:  # nobody else says what takes so long
        print(f"graphopt: max-autotune tunes {counted(len(tasks), 'kernel')} for {seconds:g} s; Ctrl-C ends the compilation, and what was "
              "tried is kept", file=sys.stderr, flush=True)  # fmt: skip
    last = last_run(database, tasks, target, threads, machine)
    run = Run(target, database, threads, run=last or "", machine=machine, gpu=gpu)
    begin = time.monotonic()

    def listen(event: Event) -> None:
        if progress:
            progress("tune", min(round(time.monotonic() - begin), round(seconds)), round(seconds))

    return tune(tasks, run, Budget(seconds), listener=listen)


def _done(task: Task, target: Target, database: Database, threads: int, machine: Target | None) -> bool:
    """Whether a workload was tuned enough, or there is nothing left to try."""
    known = database.records(task.workload, device_key(target, machine), threads, versions(target))
    tried = {r.schedule: r.measured for r in known if not r.measured.says_nothing}
    return len(tried) >= ENOUGH or (bool(tried) and search_for(task, target, tuple(tried.items())).exhausted)


def _told(outcome: Outcome, seconds: float) -> str:
    why = f"the budget of {seconds:g} s ended" if outcome.why == "budget" else "nothing was left to try"
    faster = sum((p.gain or 1.0) > 1.0 for p in outcome.progress)
    tried = sum(p.trials > 0 for p in outcome.progress)
    return (f"max-autotune: {counted(outcome.trials, 'trial')} of {counted(tried, 'kernel')} in {outcome.seconds:.1f} s, {why}; "
            f"{faster} of {len(outcome.progress)} faster than before")  # fmt: skip


def estimate(graph: Graph, lowered: Lowered, target: Target) -> Profile:
    """A profile of a program that never ran: what its calls may take."""
    sizes = sample_bindings(graph, count=1)[0]
    peak, read = _rates(target)
    calls = []
    for step in lowered.steps:
        if isinstance(step, KernelStep):
            flops, moved = (dims.evaluate(d, sizes) for d in (work.flops(step.node), work.bytes_moved(step.node)))
            seconds = max(flops / peak, moved / read) + _CALL
            calls.append(CallCost(describe(step.node, sizes), step.workload.kind, seconds, flops, moved, str(step.node.loc or ""), step))
    return Profile(tuple(calls), sum(c.seconds for c in calls), graph, sizes)


def _rates(target: Target) -> tuple[float, float]:
    """Operations and bytes a second, roughly."""
    if not target.is_gpu:
        return 4.0 * target.cores * target.lanes(4) * _CYCLES, _BYTES
    gpu = accelerator_of(target.arch, target.matrix_unit or "mma")
    return 2.0 * target.cores * gpu.products * gpu.clock * 1e9, gpu.memory * 1e9

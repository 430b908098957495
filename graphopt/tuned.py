"""Tuned schedules: a compilation asks the tuning database once, for all of its kernels.

A record is used only if it was measured on this device, with this number of threads and these versions, and if its schedule is
still in its template's space. Everything else keeps its default schedule, and a remark says why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from graphopt.asked import say
from graphopt.autotune.database import Database
from graphopt.autotune.library_kernel import TEMPLATE, library_space
from graphopt.autotune.records import TuningRecord
from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.base import Backend
from graphopt.errors import DatabaseError, UsageError
from graphopt.lower import KernelStep, Lowered
from graphopt.remarks import Kind, Remark
from graphopt.report import Report
from graphopt.target import Target, detect

DEFAULT = "default schedule"
PYTORCH = "PyTorch's kernels, as tuned"
_PATIENCE = 2.0  # seconds that a compilation waits for a process that writes the database


def device_key(target: Target, machine: Target | None = None) -> str:
    """Fingerprint of what was timed where: kernels for a target, on a machine. ``TuningRecord.target``.

    Args:
        machine: this one unless given, and the GPU itself for a GPU's kernels. Those may be interpreted on a processor: the times
            that are found there must never count on a GPU, and have another fingerprint than that of any GPU.
    """
    machine = machine or (target if target.is_gpu else detect())
    if target == machine:
        return target.fingerprint
    return hashlib.sha256(f"{target.fingerprint} on {machine.fingerprint}".encode()).hexdigest()[:16]


def kernel_threads(target: Target) -> int:
    """``TuningRecord.threads`` of kernels that run in this process: those of PyTorch. A GPU's kernels do not depend on them."""
    return 1 if target.is_gpu else torch.get_num_threads()


def use_records(units: Sequence[tuple[Lowered, Report]], target: Target, backend: Backend, path: Path, threads: int,
                machine: Target | None = None, *, strict: bool) -> list[tuple[Workload, Schedule]]:  # fmt: skip
    """Give kernel steps the schedules of the best records, and say so in the reports.

    Args:
        units: the programs of one compilation, lowered; their steps are changed.
        path: the tuning database; there may be none, which is said where the user named it.
        threads: how many the kernels will use.
        machine: where they will run; see :func:`device_key`.
        strict: the user named the file: one that is no tuning database is an error, not a note.

    Returns:
        What was chosen that is not the default.
    """
    if not path.exists():
        if strict:
            say(units[0][1], [f"tuning_db: there is no file {path}; default schedules are used"])
        return []
    defaults = {s.workload: s.schedule for lowered, _ in units for s in lowered.steps if isinstance(s, KernelStep)}
    versions = backend.versions()
    try:
        db = Database(path, _PATIENCE)
        key = device_key(target, machine)
        best = db.best_of(defaults, key, threads, versions)
        before = db.seconds_of([(w, defaults[w], r.run) for w, r in best.items()], key, threads, versions)
        others = db.elsewhere([w for w in defaults if w not in best])
    except (DatabaseError, UsageError) as error:
        if strict and isinstance(error, UsageError):
            raise
        units[0][1].notes.append(f"{error}; default schedules are used")
        return []
    verdicts: dict[Workload, tuple[Schedule, str, Remark | None]] = {}
    for w, default in defaults.items():
        if w in best:
            verdicts[w] = _verdict(best[w], default, before.get(w), target, backend)
        else:
            where = next((_elsewhere(r, key, threads, versions) for r in others.get(w, [])), "")
            verdicts[w] = default, DEFAULT, _remark("missed", where) if where else None
    for lowered, report in units:
        _apply(lowered, report, verdicts)
    return [(w, schedule) for w, (schedule, _, _) in verdicts.items() if schedule != defaults[w]]


def key_with(key: str, chosen: Sequence[tuple[Workload, Schedule]]) -> str:
    """Identity of a compilation with tuned schedules; the same without."""
    parts = [key, *(f"{w.key} {s.to_json()}" for w, s in chosen)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16] if chosen else key


def _apply(lowered: Lowered, report: Report, verdicts: Mapping[Workload, tuple[Schedule, str, Remark | None]]) -> None:
    told: dict[Workload, None] = {}
    for step in lowered.steps:
        if isinstance(step, KernelStep):
            step.schedule, step.tuned, remark = verdicts[step.workload]
            if remark and step.workload not in told:
                told[step.workload] = None
                report.remarks.append(replace(remark, node=str(step.node).partition(" body (")[0], loc=str(step.node.loc or "")))


def _verdict(r: TuningRecord, default: Schedule, before: float | None, target: Target, backend: Backend) -> tuple[Schedule, str, Remark]:
    """What becomes of the best record of a workload: the schedule to use, what it is called, and the remark."""
    date = r.when[:10]
    if (why := _outside(r.workload, r.schedule, target, backend)) is not None:
        return default, DEFAULT, _remark("missed", f"the best record, of {date}, is not used: {why}")
    if r.schedule == default:
        text = f"{DEFAULT}, the best that was found, measured {date}"
        return default, text, _remark("analysis", text)
    assert r.measured.seconds is not None
    gain = f"{before / r.measured.seconds:.2f}x over the {DEFAULT}, " if before else ""
    text = f"{PYTORCH if r.schedule.template == TEMPLATE else 'tuned'}: {gain}measured {date}"
    return r.schedule, text, _remark("passed", text)


def _outside(w: Workload, s: Schedule, target: Target, backend: Backend) -> str | None:
    """Why a schedule cannot be used, or None if it can."""
    if s.template == TEMPLATE:
        space = library_space(w)
        return space.rejection(s) if space else "PyTorch's kernels do not take its place"
    template = next((t for t in backend.templates(w, target) if t.name == s.template), None)
    if template is None:
        return f"no template {s.template!r} takes this region"
    spaces = template.spaces(w, target)
    return next((space for space in spaces if s.sketch in space.sketches), spaces[0]).rejection(s)


def _elsewhere(r: TuningRecord, key: str, threads: int, versions: tuple[tuple[str, str], ...]) -> str:
    """Where a record was measured, so that it does not count here; in words."""
    if r.target != key:
        return f"tuned {r.when[:10]} on another device ({r.device}): not used here"
    if r.threads != threads:
        return f"tuned {r.when[:10]} for {r.threads} threads, this process has {threads}: not used"
    now = dict(versions)
    differ = ", ".join(k for k in sorted({**dict(r.versions), **now}) if dict(r.versions).get(k) != now.get(k))
    return f"tuned {r.when[:10]} for another version ({differ}): not used until it is measured again"


def _remark(kind: Kind, message: str) -> Remark:
    return Remark(kind, "lower", "tuned-schedule", message)

"""Tuning models: which kernels to tune, with what, and what comes of it.

Here the tuner (:mod:`graphopt.autotune.tuner`), which knows no backend, meets the TVM backend, the database, and compiled models.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from math import prod
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from graphopt.autotune.cost_model import CostModel
from graphopt.autotune.database import Database
from graphopt.autotune.measure import Built, Subject, Timing, Trial
from graphopt.autotune.records import TuningRecord
from graphopt.autotune.runner import ProcessRunner
from graphopt.autotune.search import Search
from graphopt.autotune.space import Schedule, SearchSpace, Workload
from graphopt.autotune.tuner import Budget, Listener, Outcome, Scheduler, Standing, Task, Tuner
from graphopt.errors import BuildError, UsageError, counted
from graphopt.ir import dims
from graphopt.ir.graph import Value
from graphopt.ir.stage import staged_values
from graphopt.lower import KernelStep
from graphopt.profile import Profile
from graphopt.target import Target, detect
from graphopt.trials import cannot_be_tried, case_maker
from graphopt.tuned import device_key

LOADER = "graphopt.backends.tvm.launch:load"
MOST_BETWEEN = 256 << 20  # bytes over which weights are rotated at most
BUILD_SECONDS = 30.0  # of one file of candidates

LeastSeconds = Callable[[float, float], float]
"""(floating-point operations, bytes from memory) -> seconds that the machine needs at least."""


# --- tasks -------------------------------------------------------------------------------------------------------------


@dataclass
class _Use:
    """A workload in a model, and the calls of it."""

    step: KernelStep
    sizes: dict[str, int]
    weights: tuple[int, ...]
    weight_bytes: int
    name: str = ""
    calls: int = 0
    seconds: float = 0.0
    flops: int = 0


@dataclass
class Tasks:
    """What can be tuned of some models.

    Attributes:
        tasks: the dearest first.
        share: of the models' time, by task.
        seconds: of a run of each model, with default schedules.
        left_out: (what, why) of calls that are not tuned.
    """

    tasks: list[Task] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def tasks_of(profiles: Sequence[Profile], target: Target, least: LeastSeconds | None = None) -> Tasks:
    """The tasks of models that were profiled with default schedules.

    Args:
        least: what the machine can do; None if that was not measured.
    """
    found = Tasks()
    uses: dict[Workload, _Use] = {}
    between = 0
    for profile in profiles:
        assert profile.graph is not None
        found.seconds.append(profile.seconds)
        staged, sizes = staged_values(profile.graph), profile.sizes
        values: dict[Value, None] = {}
        for call in profile.calls:
            if not isinstance(call.step, KernelStep):
                found.left_out.append((call.what, "a library call"))
                continue
            values.update(dict.fromkeys((*call.step.node.operands, *call.step.node.results)))
            use = uses.setdefault(call.step.workload, _use(call.step, staged, sizes))
            use.name, use.calls, use.flops = call.what, use.calls + 1, call.flops
            use.seconds += call.seconds
        between += sum(_bytes(v, sizes) for v in values)
    total = sum(found.seconds)
    cold = between > 4 * target.cores * target.cache[1]
    for w, use in sorted(uses.items(), key=lambda item: -item[1].seconds):
        if why := cannot_be_tried(w) or _fixed(w, target):
            found.left_out.append((use.name, why))
            continue
        one = use.seconds / use.calls
        floor = least(use.flops, use.weight_bytes if cold else 0) if least else 0.0
        subject = Subject(w, case_maker(w, use.sizes), use.weights, min(between, MOST_BETWEEN))
        found.tasks.append(Task(subject, use.name, use.step.schedule, use.calls, one, floor))
        found.share.append(use.seconds / total if total else 0.0)
    return found


def _use(step: KernelStep, staged: Any, sizes: Mapping[str, int]) -> _Use:
    operands = step.node.operands
    weights = tuple(i for i, v in enumerate(operands) if v in staged and i != step.in_place)
    values = {new: sizes[old] for new, old in zip(sorted(step.workload.graph.symbols), step.symbols, strict=True)}
    return _Use(step, values, weights, sum(_bytes(operands[i], sizes) for i in weights))


def _bytes(v: Value, sizes: Mapping[str, int]) -> int:
    return prod(d if isinstance(d, int) else dims.evaluate(d, sizes) for d in v.shape) * v.dtype.itemsize


def _fixed(w: Workload, target: Target) -> str:
    """Why there is nothing to choose for a workload; empty if there is."""
    spaces = spaces_of(w, target)
    return "" if sum(prod(len(p.choices) for p in s.params) * len(s.sketches) for s in spaces) > 1 else "there is one schedule only"


def spaces_of(w: Workload, target: Target) -> list[SearchSpace]:
    """The search spaces of all templates that take a workload, the preferred one first."""
    return [t.space(w, target) for t in _backend().templates(w, target)]


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
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        self._builder = KernelBuilder(BUILD_SECONDS)
        self._builder.prestart(workers or detect().cores)

    def build(self, w: Workload, schedules: Sequence[Schedule]) -> list[Built]:
        from graphopt.backends.tvm.templates import entry_name

        done = self._builder.build_together(w, schedules, self.target, self._folder, self.workers, self.together)
        return [
            Built(s, failure=str(r).splitlines()[0]) if isinstance(r, BuildError) else Built(s, str(r[0]), entry_name(w, s), r[1])
            for s, r in zip(schedules, done, strict=True)
        ]

    def close(self) -> None:
        """End the build processes and remove the folder."""
        self._builder.close()
        shutil.rmtree(self._folder, ignore_errors=True)


_PREFIX = "graphopt-tune-"


def _sweep() -> None:
    """Remove what tuners left that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


# --- a run -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a tuning run is done with.

    Attributes:
        threads: that kernels may use.
        run: its id; that of an earlier run to go on with it.
    """

    target: Target
    database: Database
    threads: int
    seed: int = 0
    run: str = ""
    workers: int = 0
    batch: int = 16
    timing: Timing = field(default_factory=Timing)


def tune(tasks: Sequence[Task], run: Run, budget: Budget, *, scheduler: Scheduler | None = None,
         listener: Listener | None = None) -> Outcome:  # fmt: skip
    """Tune tasks until the budget ends. What was found is in the database, also if this is interrupted."""
    done = run_records(run, tasks) if run.run else []
    name = run.run or new_run()
    builder = CandidateBuilder(run.target, run.workers)
    runner = ProcessRunner(LOADER, run.threads, run.timing, run.seed)
    runner.start()
    model = _cost_model(run)
    try:
        tuner = Tuner(
            tasks, search=partial(_search, run, model, done), builder=builder, runner=runner, record=partial(_record, run, name),
            scheduler=scheduler, batch=run.batch, known=_incumbents(run, tasks, done), done=max((r.trial for r in done), default=0),
            listener=listener,
        )  # fmt: skip
        return tuner.run(budget)
    finally:
        runner.close()
        builder.close()
        if len(model):
            run.database.save_model(_model_name(run), model.to_bytes())


def new_run() -> str:
    """An id: when it began, and something random."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"


def run_records(run: Run, tasks: Iterable[Task]) -> list[TuningRecord]:
    """What a run has tried of some tasks so far."""
    keys = {t.workload.key for t in tasks}
    return [r for r in run.database.records(run=run.run, versions=versions()) if r.workload.key in keys]


def last_run(database: Database, tasks: Sequence[Task], target: Target, threads: int) -> str | None:
    """The latest run that tuned any of these tasks under the same conditions."""
    found = [r for t in tasks for r in database.records(t.workload, device_key(target), threads, versions())]
    return max(found, key=lambda r: (r.when, r.trial)).run if found else None


def versions() -> tuple[tuple[str, str], ...]:
    """(name, version) of all that makes a kernel."""
    return _backend().versions()  # type: ignore[no-any-return]


def _model_name(run: Run) -> str:
    return f"{device_key(run.target)} {counted(run.threads, 'thread')}"


def _cost_model(run: Run) -> CostModel:
    """The model that earlier runs on this device taught, or one that knows nothing."""
    data = run.database.load_model(_model_name(run))
    try:
        return CostModel.from_bytes(data, run.seed) if data else CostModel(run.seed)
    except UsageError:  # of another version: it is taught anew
        return CostModel(run.seed)


def _search(run: Run, model: CostModel, done: Sequence[TuningRecord], task: Task) -> Search:
    known = [(r.schedule, r.measured) for r in done if r.workload.key == task.workload.key]
    best = run.database.best(task.workload, device_key(run.target), run.threads, versions())
    seeds = run.database.seeds(task.workload, device_key(run.target), run.threads, versions())
    if best is not None:
        seeds = [best.schedule, *seeds]
    return Search(task.workload, run.target, spaces_of(task.workload, run.target), seed=run.seed, model=model, known=known, seeds=seeds)


def _incumbents(run: Run, tasks: Sequence[Task], done: Sequence[TuningRecord]) -> dict[int, Standing]:
    """Where an earlier part of the run stood."""
    out: dict[int, Standing] = {}
    for i, task in enumerate(tasks):
        mine = [r for r in done if r.workload.key == task.workload.key]
        default = next((r.measured for r in mine if r.schedule == task.default), None)
        lead: TuningRecord | None = None
        for r in mine:
            if r.measured.ok and (lead is None or (r.measured.gain or 0.0) > 1.0):
                lead = r
        if lead is not None and lead.measured.seconds is not None:
            out[i] = Standing(lead.schedule, lead.measured.seconds, default)
    return out


def _record(run: Run, name: str, task: Task, trial: Trial, number: int) -> None:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    run.database.add([TuningRecord(task.workload, device_key(run.target), str(run.target), run.threads, trial.schedule, trial.measured,
                                   versions(), name, number, now)])  # fmt: skip


# --- before and after --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelTimes:
    """A kernel in a model: seconds of a call, median over all its calls, with default and with tuned schedules."""

    name: str
    calls: int
    before: float
    after: float


@dataclass(frozen=True)
class BeforeAfter:
    """A model with default and with tuned schedules: seconds of runs that took turns, and its kernels, the dearest first."""

    name: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    kernels: tuple[KernelTimes, ...]

    @property
    def noisy(self) -> bool:
        """Whether the times vary so much that their medians claim nothing: quartiles further apart than a fifth."""
        return any(_quartiles(t) > 0.2 * median(t) for t in (self.before, self.after))


Call = Callable[[], object]


def before_and_after(name: str, calls: tuple[Call, Call], profiles: tuple[Callable[[], Profile], Callable[[], Profile]],
                     seconds: float = 3.0) -> BeforeAfter:  # fmt: skip
    """Measure a model with default and with tuned schedules, in turns.

    Args:
        calls: run the one and the other.
        profiles: profile the one and the other.
    """
    before, after = interleaved(calls, seconds)
    found: tuple[list[Profile], list[Profile]] = ([], [])
    for n in range(3):
        for which in (0, 1) if n % 2 else (1, 0):
            found[which].append(profiles[which]())
    kernels: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for i, call in enumerate(found[0][0].calls):
        old, new = (median(p.calls[i].seconds for p in side) for side in found)
        kernels.setdefault((call.kind, call.what), []).append((old, new))
    rows = [KernelTimes(what, len(t), median(a for a, _ in t), median(b for _, b in t)) for (_, what), t in kernels.items()]
    return BeforeAfter(name, tuple(before), tuple(after), tuple(sorted(rows, key=lambda r: -r.calls * r.before)))


def interleaved(calls: Sequence[Call], seconds: float, rounds: int = 9) -> list[list[float]]:
    """Seconds of calls that take turns: a list each, in the order of the calls.

    Args:
        seconds: for all of it; each is called in so many rounds at least.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end, n = time.perf_counter() + seconds, 0
    while n < rounds or time.perf_counter() < end:
        for i in range(len(calls)) if n % 2 else reversed(range(len(calls))):
            calls[i]()  # not timed: the other one has just used the caches
            start = time.perf_counter()
            calls[i]()
            times[i].append(time.perf_counter() - start)
        n += 1
    return times


def _quartiles(times: Sequence[float]) -> float:
    low, _, high = quantiles(times, n=4)
    return high - low


def check_device(name: str) -> Target:
    """The device to tune for. Raises UsageError for one whose kernels do not run here."""
    target = Target.from_name(name)
    if target.kind != "cpu":
        raise UsageError(f"{name!r}: only processors are tuned so far")
    if why := detect().lacks(target):
        raise UsageError(f"kernels for {name!r} cannot be timed here: {why}")
    return target

"""What one call of ``graphopt tune`` does, step by step: for this processor, for a GPU, or on another machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch.utils._pytree import tree_leaves, tree_map_only

import graphopt
from graphopt.autotune.database import Database
from graphopt.autotune.tuner import Budget, Event, Outcome, RoundBegins
from graphopt.before_after import BeforeAfter, before_and_after
from graphopt.bench.limits import LimitMeter, Limits
from graphopt.bench.load import Snapshot, between, snapshot, watch
from graphopt.bench.loading import load
from graphopt.bench.measure import label
from graphopt.capture.export import example_inputs
from graphopt.cli.tune_view import View, show_model, show_result
from graphopt.devices import choose_target
from graphopt.errors import CaptureError, GraphoptError, UsageError, WholeFallback, counted
from graphopt.library_time import library_seconds
from graphopt.max_autotune import estimate
from graphopt.model import CompiledModel, lowered
from graphopt.options import Options
from graphopt.profile import Profile, waits_for
from graphopt.remote import Address, RemoteRunner
from graphopt.target import Target, detect
from graphopt.trials import CPU
from graphopt.tuned import kernel_threads
from graphopt.tuning import Run, check_device, last_run, run_records, threads_of_runs, tune, withdraw
from graphopt.tuning_tasks import Tasks, tasks_of

LOOK = 1.0  # seconds for which other processes are watched before the first trial
MEASURED = 3  # times at most that a model is measured, as long as something is withdrawn
MOST_LOAD = 0.25  # processors that they may keep busy without a word

T = TypeVar("T")


@dataclass
class _Model:
    """A model of the command line."""

    name: str
    module: Any
    args: Any
    kwargs: Any
    compiled: CompiledModel

    def call(self, compiled: CompiledModel) -> Callable[[], object]:
        wait = waits_for(tree_leaves((self.args, self.kwargs)))

        def run() -> None:
            compiled(*self.args, **self.kwargs)
            wait()

        return run

    def profile(self, compiled: CompiledModel) -> Callable[[], Profile]:
        return lambda: compiled.profile(*self.args, runs=10, **self.kwargs)


class Session:
    """One call of the command, and how far it has come."""

    runner: RemoteRunner | None = None
    machine: Target | None = None
    gpu = 0

    def __init__(self, names: list[str], target: Target, database: Database, options: dict[str, Any], threads: int) -> None:
        self.names, self.target, self.database, self.options, self.threads = names, target, database, options, threads
        self.console = Console()
        self.console.width = max(self.console.width, 125)
        self.errors = Console(stderr=True)
        self.models: list[_Model] = []
        self.found = Tasks()
        self.limits: Limits | None = None
        self.view: View | None = None
        self.outcome: Outcome | None = None
        self._seen: tuple[Snapshot, ...] = ()

    @property
    def trials(self) -> int:
        """Trials that were made, and written down."""
        return sum(self.view.trials) if self.view else 0

    @property
    def spent(self) -> float:
        """Seconds of the budget that are gone."""
        return self.view.elapsed if self.view else 0.0

    def say(self, text: str) -> None:
        self.errors.print(text, style="dim", highlight=False, soft_wrap=True)

    def prepare(self) -> None:
        """Compile and profile the models with default schedules: what there is to tune, and how far it is from the limits."""
        self.check_threads(detect().cores)
        self.models = self.of_each(self.load)
        if self.models:
            self.find_tasks()

    def check_threads(self, cores: int) -> None:
        """Say so if kernels get more threads than there are cores."""
        if self.threads > cores:
            self.say(f"{self.threads} threads are more than the {counted(cores, 'core')} there: they are in each other's way, and what is "
                     f"found counts for compilations with {self.threads} threads alone")  # fmt: skip

    def of_each(self, take: Callable[[str], T]) -> list[T]:
        """What is made of each model. Those that cannot be captured are named and left out, be it all of them.

        Raises:
            CaptureError: all of them, and one cannot even be exported.
        """
        out, failed = [], dict[str, CaptureError]()
        for name in self.names:
            try:
                out.append(take(name))
            except CaptureError as error:
                failed[name] = error
        unexportable = [why for why in failed.values() if not isinstance(why, WholeFallback)]
        if unexportable and not out:
            raise unexportable[0]
        for name, why in failed.items():
            self.say(f"{label(name)} is left out: {why}")
        return out

    def load(self, name: str) -> _Model:
        """The model, compiled with default schedules."""
        return self.compiled(name, *_loaded(name))

    def compiled(self, name: str, module: Any, args: Any, kwargs: Any) -> _Model:
        if isinstance(module, Path):
            args, kwargs = example_inputs(module)
        self.say(f"compiling {label(name)} with default schedules")
        compiled = graphopt.compile(module, args, kwargs, name=label(name), **self.options)
        if compiled.report.whole:
            raise WholeFallback(compiled.report.whole)
        return _Model(label(name), module, args, kwargs, compiled)

    def find_tasks(self) -> None:
        """Measure the limits and the models."""
        self.say("measuring the machine's limits, the models, and PyTorch's kernels")
        meter = _meter(self.threads)
        first = meter.measure() if meter else None
        profiles = [m.compiled.profile(*m.args, runs=10, **m.kwargs) for m in self.models]
        if meter and first:
            limits = first.best(meter.measure())  # something else may have been in the way, once
            self.limits = None if limits.disturbed else limits
        self.found = tasks_of(profiles, self.target, self.limits.least_seconds if self.limits else None, library_seconds)

    def tune(self, budget: Budget, seed: int, resume: bool) -> None:
        """Make trials. Raises KeyboardInterrupt if it was interrupted."""
        if self.machine is None and (load := watch(LOOK)) and load.others > MOST_LOAD:
            self.say(f"other processes keep {load.others:.1f} processors busy: what wins now may be slower on a quiet machine")
        run = self._run(seed, resume)
        done = len(run_records(run, self.found.tasks)) if run.run else 0
        if done:
            self.say(f"going on with run {run.run}, which has made {counted(done, 'trial')}")
        self.view = View(self.found, budget, self.errors)
        with self.view:
            self.outcome = tune(self.found.tasks, run, budget, listener=self._listen, runner=self.runner)
        for complaint in self._complaints():
            self.say(f"{complaint}: times, and what won by little, are the less sure")
        if self.outcome.why == "interrupted":
            raise KeyboardInterrupt
        show_result(self.outcome, self.found, self.limits, self.console)

    def _listen(self, event: Event) -> None:
        if isinstance(event, RoundBegins) and (seen := snapshot()):
            self._seen = (*self._seen[:1], seen)
        assert self.view is not None
        self.view.listen(event)

    def _complaints(self) -> list[str]:
        """What else the machine did between the first round and the last one. Builds are ours, and switch as they like."""
        if len(self._seen) < 2 or self.machine is not None:
            return []
        load = between(*self._seen)
        return replace(load, switches=0.0).complaints("meanwhile")

    def _run(self, seed: int, resume: bool) -> Run:
        last = last_run(self.database, self.found.tasks, self.target, self.threads, self.machine) if resume else None
        if resume and last is None:
            others = threads_of_runs(self.database, self.found.tasks, self.target, self.machine)
            which = f" with {counted(self.threads, 'thread')} (--threads {', '.join(map(str, others))} has one)" if others else ""
            if self.threads in others:
                which = " that no other process is at"
            self.say(f"{self.database.path} has no run of these models on this device{which} to go on with; a new one begins")
        return Run(self.target, self.database, self.threads, seed, last or "", machine=self.machine, gpu=self.gpu)

    def finish(self) -> None:
        """Measure the models before and after. What does them harm is withdrawn, and they are measured again: what is said last is so."""
        for again in range(MEASURED):
            harmful: list[str] = []
            for m in self.models:
                self.say(f"measuring {m.name} with default and with tuned schedules, in turns")
                found = _measured(m, self.options, self.database)
                show_model(m.name, found, self.console)
                harmful += found.to_take_back if found else ()
            lost = withdraw(self.database, harmful, self.target, self.threads, self.machine)
            if not lost:
                break
            then = "what counted before does again" + ("" if again + 1 < MEASURED else "; this was not measured any more")
            self.console.print(f"{counted(lost, 'kernel')} of them withdrawn, as the model is slower with them: {then}", highlight=False)
        use = "" if self.database.path == Options().tuning_path else f" with options={{'tuning_db': '{self.database.path}'}}"
        self.console.print(f"{counted(self.trials, 'record')} in {self.database.path}; the best of them count from the next compilation on"
                           f"{use}", highlight=False, soft_wrap=True)  # fmt: skip

    def close(self) -> None:
        """Give back what another machine lent."""

    def interrupted(self, again: str) -> str:
        """What to say after Ctrl-C."""
        kept = f"{counted(self.trials, 'trial')} made, and kept in {self.database.path}"
        if self.outcome is not None and self.outcome.why != "interrupted":
            return (f"interrupted while the models were measured; {kept}: they count from the next compilation on. Schedules that are "
                    f"slower in a model were not looked for; to measure the models again:\n  {again}")  # fmt: skip
        if not self.trials:
            return "interrupted before the first trial; nothing was tuned"
        if self.outcome is not None:  # else it was interrupted again, while its processes were ended
            show_result(self.outcome, self.found, self.limits, self.console)
        return f"interrupted; {kept}. To go on:\n  {again}"


class GpuSession(Session):
    """The same for the GPU of this machine, or for one that is not there, whose kernels this processor interprets.

    The limits of a GPU are not measured, so no time is ``incredible``, and no task ends as it is near its roofline.
    """

    def __init__(self, names: list[str], target: Target, database: Database, options: dict[str, Any], interpret: bool) -> None:
        self.interpret = interpret
        chosen = {**options, "backend": "triton", "target": f"{target.kind}:{target.arch}:{target.cores}"} if interpret else options
        super().__init__(names, target, database, chosen, kernel_threads(target))
        self.machine = detect() if interpret else None
        self.gpu = 0 if interpret else torch.cuda.current_device()
        self.device = CPU if interpret else torch.device("cuda", self.gpu)

    def load(self, name: str) -> _Model:
        return self.compiled(name, *_loaded(name, self.device))

    def find_tasks(self) -> None:
        self.target = choose_target(self.device, Options(**self.options))  # a model's file may have allowed tf32, of which records tell
        if self.interpret:
            self.say("measuring the models under Triton's interpreter: times and gains are the interpreter's, and say nothing of a GPU")
            profiles = [m.compiled.profile(*m.args, runs=1, **m.kwargs) for m in self.models]
            self.found = tasks_of(profiles, self.target)
            return
        self.say("measuring the models, and PyTorch's kernels")
        profiles = [m.compiled.profile(*m.args, runs=10, **m.kwargs) for m in self.models]
        self.found = tasks_of(profiles, self.target, library=partial(library_seconds, device=self.device), device=self.device)

    def finish(self) -> None:
        """Measure the models before and after, if they run as they will."""
        if not self.interpret:
            super().finish()
            return
        self.console.print(f"{counted(self.trials, 'record')} in {self.database.path}, which count for interpreted models alone",
                           highlight=False, soft_wrap=True)  # fmt: skip


class RemoteSession(Session):
    """The same for another machine. The models are not run, neither here nor there: only their kernels are."""

    runner: RemoteRunner

    def __init__(self, names: list[str], device: str, address: Address, database: Database, threads: int | None, seed: int) -> None:
        super().__init__(names, detect(), database, {}, threads or 0)
        self.device, self.address = device, address
        self.runner = RemoteRunner(address, threads, seed=seed)

    def prepare(self) -> None:
        """Ask the machine what it is, and find out what there is to tune for it."""
        self.say(f"asking for {self.address}")
        remote = self.runner.connect()
        self.machine, self.threads = remote.target, remote.threads
        self.target = check_device(self.device, remote.target)
        pool = "in an OpenMP pool" if remote.pool == "libgomp" else "in TVM's own pool, as it has no libgomp.so.1"
        self.say(f"it is {remote.target}; kernels run with {counted(remote.threads, 'thread')}, {pool}")
        self.check_threads(remote.target.cores)
        profiles = [p for found in self.of_each(self._estimates) for p in found]
        self.found = tasks_of(profiles, self.target)  # the machine's limits are not known: ``least`` is 0
        self.found.estimated = True

    def _estimates(self, name: str) -> list[Profile]:
        """What the programs of a model may take."""
        self.say(f"compiling {label(name)} for {self.target}, without running it")
        programs = lowered(*_loaded(name), self.target, Options())
        return [estimate(graph, program, self.target) for graph, program in programs[1:] or programs]

    def finish(self) -> None:
        """Say where the records are good for something."""
        faster = sum((p.gain or 1.0) > 1.0 for p in self.outcome.progress) if self.outcome else 0
        here = self.machine == detect()
        use = "they count from the next compilation on" if here else (
            f"to use them there: graphopt db export --best --db {self.database.path} best.jsonl, and there graphopt db import best.jsonl"
        )  # fmt: skip
        self.console.print(f"{counted(faster, 'kernel')} faster, each measured alone on {self.machine}; the models were not run. "
                           f"{counted(self.trials, 'record')} in {self.database.path}: {use}", highlight=False, soft_wrap=True)  # fmt: skip

    def close(self) -> None:
        self.runner.close()


def _loaded(name: str, device: torch.device = CPU) -> tuple[Any, Any, Any]:
    """The model on a device, as it is for inference, and its arguments."""
    module, args, kwargs = load(name)
    if isinstance(module, torch.nn.Module):
        module.eval()
    if device != CPU:
        if not isinstance(module, torch.nn.Module):
            raise UsageError(f"{name} is on the device that it was exported on; for a GPU, give the model itself: file.py:factory")
        module.to(device)
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to(device), (args, kwargs))
    return module, args, kwargs


def _meter(threads: int) -> LimitMeter | None:
    try:
        return LimitMeter(threads)
    except GraphoptError:
        return None


def _measured(m: _Model, options: dict[str, Any], database: Database) -> BeforeAfter | None:
    """The model as it was compiled at first, and as it is compiled now; None if that is the same."""
    tuned = graphopt.compile(m.module, m.args, m.kwargs, name=m.name, **{**options, "tuning_db": str(database.path)})
    if tuned.report.key == m.compiled.report.key:  # tuned schedules are part of it
        return None
    return before_and_after(m.name, (m.call(m.compiled), m.call(tuned)), (m.profile(m.compiled), m.profile(tuned)))

"""``graphopt tune``: find faster schedules for the kernels of models on this machine, and keep them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import graphopt
from graphopt.autotune import DEFAULT_NAME
from graphopt.autotune.database import Database
from graphopt.autotune.sqlite import Damaged
from graphopt.autotune.tuner import Budget, Event, Outcome, RoundBegins
from graphopt.before_after import BeforeAfter, before_and_after
from graphopt.bench.limits import LimitMeter, Limits
from graphopt.bench.load import Snapshot, between, snapshot, watch
from graphopt.bench.loading import load
from graphopt.bench.measure import label
from graphopt.bench.models import MODELS
from graphopt.cli import INTERRUPTED
from graphopt.cli.tune_plot import check_plot, plot
from graphopt.cli.tune_view import View, show_model, show_plan, show_result
from graphopt.errors import GraphoptError, UsageError, counted
from graphopt.library_time import library_seconds
from graphopt.max_autotune import estimate
from graphopt.model import CompiledModel, lowered
from graphopt.options import Options, default_cache_dir
from graphopt.profile import Profile
from graphopt.remote import Address, RemoteRunner
from graphopt.target import Target, detect
from graphopt.tuning import Run, check_device, last_run, moment, run_records, tune, withdraw
from graphopt.tuning_tasks import Tasks, tasks_of

LOOK = 1.0  # seconds for which other processes are watched before the first trial
MEASURED = 3  # times at most that a model is measured, as long as something is withdrawn
MOST_LOAD = 0.25  # processors that they may keep busy without a word
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


@dataclass
class _Model:
    """A model of the command line."""

    name: str
    module: Any
    args: Any
    kwargs: Any
    compiled: CompiledModel

    def call(self, compiled: CompiledModel) -> Callable[[], object]:
        return lambda: compiled(*self.args, **self.kwargs)

    def profile(self, compiled: CompiledModel) -> Callable[[], Profile]:
        return lambda: compiled.profile(*self.args, runs=10, **self.kwargs)


def tune_command(
    models: Annotated[list[str] | None, typer.Argument(help="Built-in models, or file.py:factory.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="What to tune for: cpu, or a processor such as cpu:x86-64-v3.")] = "cpu",
    budget: Annotated[str, typer.Option(help="How long: 90s, 10m, 1h30m.")] = "10m",
    trials: Annotated[int | None, typer.Option(min=1, help="End after so many trials, those of the resumed run included.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be tuned, and what may be gained; try nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last run of these models.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random: the same seed proposes the same candidates.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that kernels use; what PyTorch uses, or --rpc has.")] = None,
    rpc: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Measure on a machine that this tracker of TVM's RPC lends.")] = None,
    key: Annotated[str | None, typer.Option(help="The key of the server to ask that tracker for.")] = None,
    db: Annotated[Path | None, typer.Option(help="The tuning database; tuning.db in the cache folder unless given.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw best-so-far curves and a roofline: out.png.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where kernels are kept; ~/.cache/graphopt unless given.")] = None,
) -> None:
    """Find faster schedules for the kernels of models, and keep them: every later compile on this machine uses them.

    Candidates are built, checked against f64, and timed in turns with the fastest one so far, in processes of their own. Every trial
    is kept at once: Ctrl-C, or worse, loses nothing. At the end the models are measured with default and with tuned schedules,
    in turns. The budget is for the trials; compiling before and measuring after come on top.

    \b
    graphopt tune mlp --budget 30s                   a built-in model, for half a minute
    graphopt tune model.py:make bert --budget 10m    two models; they share what they have in common
    graphopt tune mlp --plan                         what would be tuned, and how far from the machine's limits it is
    graphopt tune mlp --resume                       go on where it was interrupted
    graphopt tune mlp --plot mlp.png                 curves of the best so far, and a roofline

    \b
    For another machine, with Linux and TVM: candidates are built here, sent there, checked and timed there. Start a tracker somewhere, and
    on the machine a server; its processor is asked for, and records are of that machine:
    python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190
    python -m tvm.exec.rpc_server --tracker HOST:9190 --key rack7
    graphopt tune mlp --rpc HOST:9190 --key rack7 --budget 10m

    \b
    Exit status: 130 if it was interrupted; what was found is kept. 9 the database is damaged (it is kept aside) or out of reach,
    10 no such device here, 11 the disk is full, 12 no process to build or run candidates in, 13 the tracker or the server of --rpc is
    out of reach, or was lost several times. How it works: docs/tuning.md.
    """
    seconds = duration(budget)
    address = Address.parse(rpc, key) if rpc else None
    if key and not rpc:
        raise UsageError(f"--key {key} is that of a server; --rpc HOST:PORT says which tracker lends it")
    if not models:
        raise UsageError(f"which model? One of {', '.join(MODELS)}, or file.py:factory; graphopt tune --help shows examples")
    if plot_file:
        check_plot(plot_file)
    folder = cache_dir or default_cache_dir()
    database = Database(db or folder / DEFAULT_NAME)
    names = list(dict.fromkeys(models))
    session: _Session
    if address is None:
        target = check_device(device)
        if threads:
            torch.set_num_threads(threads)
        threads = torch.get_num_threads()
        session = _Session(names, target, database, {"target": device, "cache_dir": folder, "tuning_db": None}, threads)
    else:
        session = _RemoteSession(names, device, address, database, threads, seed)
    again = _again(models, device, budget, trials, seed, threads, db, cache_dir, address)
    try:
        database.models()  # a file that is no database is told now
        session.prepare()
        if plan or not session.found.tasks:
            show_plan(session.found, session.limits, seconds, session.console)
            return
        try:
            session.tune(Budget(seconds, trials), seed, resume)
        finally:
            if plot_file and session.outcome:
                plot(session.outcome, session.found, session.limits, " ".join(map(label, session.names)), plot_file)
        session.finish()
    except KeyboardInterrupt:
        typer.echo(session.interrupted(again), err=True)
        raise typer.Exit(INTERRUPTED) from None
    except GraphoptError as error:
        if isinstance(error, Damaged):
            error.set_aside()
        if session.trials:
            error.add_note(f"{counted(session.trials, 'trial')} of this run are kept in {database.path}. To go on:\n  {again}")
        raise
    finally:
        session.close()


class _Session:
    """One call of the command, and how far it has come."""

    runner: RemoteRunner | None = None
    machine: Target | None = None

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
        self._began = moment()

    @property
    def trials(self) -> int:
        """Trials that were made, and written down."""
        return sum(self.view.trials) if self.view else 0

    def say(self, text: str) -> None:
        self.errors.print(text, style="dim", highlight=False, soft_wrap=True)

    def prepare(self) -> None:
        """Compile and profile the models with default schedules: what there is to tune, and how far it is from the limits."""
        for name in self.names:
            self.say(f"compiling {label(name)} with default schedules")
            self.models.append(_load(name, self.options))
        self.say("measuring the machine's limits, the models, and PyTorch's kernels")
        self.limits = _limits(self.threads)
        profiles = [m.compiled.profile(*m.args, runs=10, **m.kwargs) for m in self.models]
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
        show_result(self.outcome, self.found, self.console)

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
            self.say(f"{self.database.path} has no run of these models on this device to go on with; a new one begins")
        return Run(self.target, self.database, self.threads, seed, last or "", machine=self.machine)

    def finish(self) -> None:
        """Measure the models before and after. What does them harm is withdrawn, and they are measured again: what is said last is so."""
        for m in self.models:
            for _ in range(MEASURED):
                self.say(f"measuring {m.name} with default and with tuned schedules, in turns")
                found = _measured(m, self.options, self.database)
                show_model(m.name, found, self.console)
                keys = found.to_take_back if found else ()
                lost = withdraw(self.database, keys, self.target, self.threads, self._began) if keys else 0
                if not lost:
                    break
                text = f"{counted(lost, 'kernel')} of them withdrawn, as the model is slower with them: the default schedules stay"
                self.console.print(text, highlight=False)

    def close(self) -> None:
        """Give back what another machine lent."""

    def interrupted(self, again: str) -> str:
        """What to say after Ctrl-C."""
        kept = f"{counted(self.trials, 'trial')} made, and kept in {self.database.path}"
        if self.outcome is not None and self.outcome.why != "interrupted":
            return f"interrupted while the models were measured; {kept}: they count from the next compilation on"
        if not self.trials or self.outcome is None:
            return "interrupted before the first trial; nothing was tuned"
        show_result(self.outcome, self.found, self.console)
        return f"interrupted; {kept}. To go on:\n  {again}"


class _RemoteSession(_Session):
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
        profiles = []
        for name in self.names:
            self.say(f"compiling {label(name)} for {self.target}, without running it")
            programs = lowered(*_loaded(name), self.target, Options())
            profiles += [estimate(graph, program, self.target) for graph, program in programs[1:] or programs]
        self.found = tasks_of(profiles, self.target)  # the machine's limits are not known: ``least`` is 0
        self.found.estimated = True

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


def duration(text: str) -> float:
    """Seconds of a text such as ``90s``, ``10m`` or ``1h30m``. Raises UsageError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text)
    if not parts or "".join(n + u for n, u in parts) != text.strip():
        raise UsageError(f"--budget {text!r} is no duration; write 90s, 10m or 1h30m")
    seconds = sum(float(n) * _UNITS[u] for n, u in parts)
    if seconds <= 0:
        raise UsageError(f"--budget {text!r}: there is no time to tune in")
    return seconds


def _load(name: str, options: dict[str, Any]) -> _Model:
    """The model, compiled with default schedules."""
    module, args, kwargs = _loaded(name)
    return _Model(label(name), module, args, kwargs, graphopt.compile(module, args, kwargs, name=label(name), **options))


def _loaded(name: str) -> tuple[Any, Any, Any]:
    """The model as it is for inference, and its arguments."""
    module, args, kwargs = load(name)
    if isinstance(module, torch.nn.Module):
        module.eval()
    return module, args, kwargs


def _limits(threads: int) -> Limits | None:
    try:
        return LimitMeter(threads).measure()
    except GraphoptError:
        return None


def _again(models: Sequence[str], device: str, budget: str, trials: int | None, seed: int, threads: int | None, db: Path | None,
           cache_dir: Path | None, address: Address | None) -> str:  # fmt: skip
    """The command that goes on."""
    words = ["graphopt", "tune", *models, "--device", device, "--budget", budget, "--seed", str(seed)]
    words += ["--threads", str(threads)] if threads else []
    words += ["--rpc", f"{address.host}:{address.port}", "--key", address.key] if address else []
    words += ["--trials", str(trials)] if trials else []
    words += ["--db", str(db)] if db else []
    words += ["--cache-dir", str(cache_dir)] if cache_dir else []
    return shlex.join([*words, "--resume"])


def _measured(m: _Model, options: dict[str, Any], database: Database) -> BeforeAfter | None:
    """The model as it was compiled at first, and as it is compiled now; None if that is the same."""
    tuned = graphopt.compile(m.module, m.args, m.kwargs, name=m.name, **{**options, "tuning_db": str(database.path)})
    if tuned.report.key == m.compiled.report.key:  # tuned schedules are part of it
        return None
    return before_and_after(m.name, (m.call(m.compiled), m.call(tuned)), (m.profile(m.compiled), m.profile(tuned)))

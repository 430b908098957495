"""``graphopt tune``: find faster schedules for the kernels of models on this machine, and keep them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import graphopt
from graphopt.autotune.database import Database
from graphopt.autotune.tuner import Budget
from graphopt.bench.limits import LimitMeter, Limits
from graphopt.bench.loading import load
from graphopt.bench.measure import label
from graphopt.bench.models import MODELS
from graphopt.cli.tune_view import View, show_plan, show_result
from graphopt.errors import GraphoptError, UsageError, counted
from graphopt.model import CompiledModel
from graphopt.options import default_cache_dir
from graphopt.profile import Profile
from graphopt.target import Target
from graphopt.tuning import BeforeAfter, Run, Tasks, before_and_after, check_device, last_run, tasks_of, tune

INTERRUPTED = 130  # exit status, as shells give for SIGINT
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
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that kernels use; what PyTorch uses if not given.")] = None,
    db: Annotated[Path | None, typer.Option(help="The tuning database; tuning.db in the cache folder unless given.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where kernels are kept; ~/.cache/graphopt unless given.")] = None,
) -> None:
    """Find faster schedules for the kernels of models, and keep them: every later compile on this machine uses them.

    Candidates are built, checked against f64, and timed in turns with the fastest one so far, in processes of their own. Every trial
    is kept at once: Ctrl-C, or worse, loses nothing. At the end the models are measured with default and with tuned schedules,
    in turns.

    \b
    graphopt tune mlp --budget 30s                   a built-in model, for half a minute
    graphopt tune model.py:make bert --budget 10m    two models; they share what they have in common
    graphopt tune mlp --plan                         what would be tuned, and how far from the machine's limits it is
    graphopt tune mlp --resume                       go on where it was interrupted

    \b
    Exit status: 130 if it was interrupted; what was found is kept. How it works: docs/tuning.md.
    """
    seconds = duration(budget)
    target = check_device(device)
    if not models:
        raise UsageError(f"which model? One of {', '.join(MODELS)}, or file.py:factory; graphopt tune --help shows examples")
    if threads:
        torch.set_num_threads(threads)
    threads = torch.get_num_threads()
    cache_dir = cache_dir or default_cache_dir()
    database = Database(db or cache_dir / "tuning.db")
    database.models()  # a file that is no database is told now
    console = Console()
    console.width = max(console.width, 110)
    options = {"target": device, "cache_dir": cache_dir, "tuning_db": None}
    loaded = [_load(name, options) for name in dict.fromkeys(models)]
    limits = _limits(threads)
    found = tasks_of([m.compiled.profile(*m.args, **m.kwargs) for m in loaded], target, limits.least_seconds if limits else None)
    if plan or not found.tasks:
        show_plan(found, limits, seconds, console)
        return
    run = _run(target, database, threads, seed, found, resume)
    view = View(found, Budget(seconds, trials), Console(stderr=True))
    with view:
        outcome = tune(found.tasks, run, Budget(seconds, trials), listener=view.listen)
    if outcome.why == "interrupted":
        show_result(outcome, found, None, console)
        again = _again(models, device, budget, seed, db, cache_dir if cache_dir != default_cache_dir() else None)
        typer.echo(f"interrupted; {counted(outcome.trials, 'trial')} made, and kept in {database.path}. To go on:\n  {again}", err=True)
        raise typer.Exit(INTERRUPTED)
    measured = [_measured(m, options, database) for m in loaded]
    show_result(outcome, found, measured, console)


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
    module, args, kwargs = load(name)
    if isinstance(module, torch.nn.Module):
        module.eval()
    return _Model(label(name), module, args, kwargs, graphopt.compile(module, args, kwargs, name=label(name), **options))


def _limits(threads: int) -> Limits | None:
    try:
        return LimitMeter(threads).measure()
    except GraphoptError:
        return None


def _run(target: Target, database: Database, threads: int, seed: int, found: Tasks, resume: bool) -> Run:
    last = last_run(database, found.tasks, target, threads) if resume else None
    if resume and last is None:
        typer.echo(f"{database.path} has no run of these models on this device to go on with; a new one begins", err=True)
    return Run(target, database, threads, seed, last or "")


def _again(models: Sequence[str], device: str, budget: str, seed: int, db: Path | None, cache_dir: Path | None) -> str:
    """The command that goes on."""
    words = ["graphopt", "tune", *models, "--device", device, "--budget", budget, "--seed", str(seed)]
    words += ["--db", str(db)] if db else []
    words += ["--cache-dir", str(cache_dir)] if cache_dir else []
    return shlex.join([*words, "--resume"])


def _measured(m: _Model, options: dict[str, Any], database: Database) -> BeforeAfter:
    """The model as it was compiled at first, and as it is compiled now."""
    tuned = graphopt.compile(m.module, m.args, m.kwargs, name=m.name, **{**options, "tuning_db": str(database.path)})
    return before_and_after(m.name, (m.call(m.compiled), m.call(tuned)), (m.profile(m.compiled), m.profile(tuned)))

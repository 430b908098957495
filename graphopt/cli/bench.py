"""``graphopt bench``: a model under graphopt and other systems in the same run, beside the machine's measured limits."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from graphopt.bench.loading import load
from graphopt.bench.measure import PATIENCE, Settings, label, measure, measure_limits
from graphopt.bench.models import MODELS
from graphopt.bench.plot import plot
from graphopt.bench.results import OURS, UNCERTAINTY_LIMIT, ModelResult, Results
from graphopt.bench.session import Session
from graphopt.bench.system import SystemFailure
from graphopt.bench.systems import FLOAT, PEERS, QUANTIZED_PEERS, SYSTEMS, by_scheme
from graphopt.bench.table import show
from graphopt.errors import UsageError, nearest
from graphopt.target import detect

PACKAGES = ("torch", "graphopt", "transformers", "onnxruntime", "openvino", "nncf", "torchao")
QUICK_ROUNDS = 4
ROUNDS_HELP = f"Turns of every system on every model; up to {PATIENCE} times as many, while a ratio is not sure to {UNCERTAINTY_LIMIT:.0%}."
INTERRUPTED = 130  # exit status, as shells give for SIGINT
WIDTH = 112  # tables are no use when their cells are broken


def bench(
    models: Annotated[list[str] | None, typer.Argument(help="Built-in models, all, or file.py:factory.", show_default=False)] = None,
    against: Annotated[str | None, typer.Option(help="Whom to compare with besides eager, comma-separated, or none.")] = None,
    quantize: Annotated[str, typer.Option(metavar="SCHEME", help="Compare graphopt's model quantized so, with its own in f32 too.")] = "",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every system; all processors if not given.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help=ROUNDS_HELP)] = 12,
    quick: Annotated[bool, typer.Option("--quick", help=f"--rounds {QUICK_ROUNDS} --no-compile-time")] = False,
    compile_time: Annotated[bool, typer.Option("--compile-time/--no-compile-time", help="Measure compile times with empty caches.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw a roofline and the shares of the limits to this PNG.")] = None,
    list_models: Annotated[bool, typer.Option("--list-models", help="List the built-in models.")] = False,
) -> None:
    """Measure models under graphopt, eager PyTorch and other systems, in turns, in the same run.

    Each system runs in a process of its own; they take turns, round by round. Printed are medians with their spread, the share of
    the machine's measured limits, the error against f64, peak memory, compile times, and the ratios to graphopt's time. If something
    else kept the machine busy, or the rounds differ too much, no ratio is claimed, and the reason is printed.

    \b
    graphopt bench bert                                    BERT against eager, Inductor, ONNX Runtime and OpenVINO
    graphopt bench mlp decode --quick                      two models, few rounds, no compile times
    graphopt bench model.py:make --against inductor        a model of your own: make() returns (module, example inputs)
    graphopt bench all --threads 2 --json r.json --plot r.png
    graphopt bench bert --quantize int8-dynamic --against onnxruntime-int8,openvino-int8
    graphopt bench --list-models

    \b
    The other systems are optional: pip install 'graphopt[bench]'. One that is missing, or cannot run a model, is shown with
    the reason. What each figure means: docs/benchmarking.md.
    """
    if list_models:
        for name, factory in MODELS.items():
            typer.echo(f"{name:10} {(factory.__doc__ or '').strip().splitlines()[0]}")
        return
    names = _models(models or [])
    if quick:
        rounds, compile_time = QUICK_ROUNDS, False
    ours, systems = _systems(against, quantize)
    settings = Settings(systems, threads or torch.get_num_threads(), rounds, compile_time, ours, dict(os.environ))
    results = Results(machine(settings))
    for file in (json_file, plot_file):
        if file is not None and not file.resolve().parent.is_dir():
            raise UsageError(f"there is no folder {file.parent} to write {file.name} into")
    try:
        _run(results, names, settings, lambda: _write(results, json_file))
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {len(results.models)} of {len(names)} models were measured", err=True)
        if not results.models:
            raise
    console = Console()
    console.width = max(console.width, WIDTH)
    show(results, console)
    _write(results, json_file)
    if plot_file:
        plot(results, plot_file)
    if len(results.models) < len(names):
        raise typer.Exit(INTERRUPTED)
    if any(m.systems[m.ours].failed for m in results.models):
        raise typer.Exit(1)


def _write(results: Results, file: Path | None) -> None:
    if file:
        part = file.with_name(file.name + ".part")
        part.write_text(json.dumps(results.to_json(), indent=2) + "\n")
        part.replace(file)  # a reader never sees half of it


def _run(results: Results, names: list[str], settings: Settings, keep: Callable[[], None]) -> None:
    """Measure the limits, then model by model; ``keep`` is called after each.

    Progress goes to stderr, and stands still while something is timed: a bar on a terminal, a line for each model elsewhere.
    """
    count = TextColumn("{task.completed}/{task.total}")
    columns = (SpinnerColumn(), TextColumn("{task.description:48}"), BarColumn(), count, TimeElapsedColumn())
    console = Console(stderr=True)
    with Session(settings.environment) as meter, Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        bar = progress.add_task("", total=len(names) + 1)

        def tell(name: str, what: str) -> None:
            progress.update(bar, description=f"{name}: {what}", refresh=True)

        for name in [*names, None]:  # the limits before each model and after the last: a processor's clock changes
            if not results.limits_failed:
                tell("machine", "limits")
                try:
                    results.limits = measure_limits(meter, settings, results.limits)
                except SystemFailure as failure:
                    results.limits_failed = str(failure)
            if name is not None:
                results.models.append(measure(name, settings, partial(tell, label(name)), None if results.limits_failed else meter))
                keep()
                if not console.is_terminal:
                    typer.echo(_line(results.models[-1], len(results.models), len(names)), err=True)
            progress.advance(bar)


def _line(found: ModelResult, index: int, of: int) -> str:
    """A model's medians in a line."""
    times = [f"{n} {t * 1e3:.4g} ms" if (t := found.median(n)) else f"{n} -" for n in found.systems]
    return f"[{index}/{of}] {found.name}: " + ", ".join(times)


def _models(wanted: list[str]) -> list[str]:
    """The names, checked. Raises UsageError for none, or for one that cannot be loaded."""
    if not wanted:
        raise UsageError(f"which model? One of {', '.join(MODELS)}, all, or file.py:factory; graphopt bench --help shows examples")
    names = list(dict.fromkeys(n for w in wanted for n in (list(MODELS) if w == "all" else [w])))
    for name in names:
        if name not in MODELS:
            load(name)  # a wrong name or factory is told now, not after minutes
    return names


def _systems(against: str | None, quantize: str) -> tuple[str, tuple[str, ...]]:
    """The system that the others are compared with, and all of them. In f32 the default is all peers, quantized those in 8 or 4 bits."""
    ours = by_scheme(f"{OURS}-{quantize}").name if quantize else OURS
    if against is None:
        against = ",".join(PEERS if not quantize else (n for n in QUANTIZED_PEERS if quantize.startswith(n.split("-")[1])))
    peers = [p.strip() for p in against.split(",") if p.strip() not in ("", "none", "eager", ours)]
    known = [n for n in SYSTEMS if n not in ("eager", ours)]
    for p in peers:
        if p not in known:
            raise UsageError(f"--against {p!r} is none of {', '.join(known)}{nearest(p, known)}")
    return ours, tuple(dict.fromkeys(("eager", ours, *((FLOAT.name,) if quantize else ()), *(p for p in known if p in peers))))


def machine(settings: Settings) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    return {
        "processor": detect().model or platform.processor() or platform.machine(), "cores": detect().cores, "threads": settings.threads,
        "rounds": settings.rounds, "system": platform.platform(), "python": sys.version.split()[0],
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

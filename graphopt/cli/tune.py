"""``graphopt tune``: find faster schedules for the kernels of models on this machine, and keep them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from graphopt.autotune import DEFAULT_NAME
from graphopt.autotune.database import Database
from graphopt.autotune.sqlite import Damaged
from graphopt.autotune.tuner import Budget
from graphopt.bench.measure import label
from graphopt.bench.models import MODELS
from graphopt.cli import INTERRUPTED
from graphopt.cli.tune_plot import check_plot, plot
from graphopt.cli.tune_sessions import GpuSession, RemoteSession, Session
from graphopt.cli.tune_view import show_plan
from graphopt.errors import GraphoptError, UsageError, counted
from graphopt.options import default_cache_dir
from graphopt.remote import Address
from graphopt.tuning import check_device

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def tune_command(
    models: Annotated[list[str] | None, typer.Argument(help="Built-in models, file.py:factory, or .pt2 files.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="What to tune for: cpu, a processor such as cpu:x86-64-v3, or cuda: the GPU here.")] = "cpu",
    interpret: Annotated[bool, typer.Option("--interpret", help="Check the tuner for a GPU that is not here: slow.")] = False,
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
    For a GPU, on the machine that has it; TVM is not needed. Candidates are compiled ahead, and timed by events, the cache flushed.
    Without one, --interpret runs all of it under Triton's interpreter: what is found so counts for interpreted models alone.
    graphopt tune mlp --device cuda --budget 10m
    graphopt tune model.py:make --device cuda:sm_90:4 --interpret --trials 8

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
    if rpc and interpret:
        raise UsageError("--interpret runs kernels here; --rpc times them on another machine")
    if not models:
        raise UsageError(f"which model? One of {', '.join(MODELS)}, or file.py:factory; graphopt tune --help shows examples")
    if plot_file:
        check_plot(plot_file)
    folder = cache_dir or default_cache_dir()
    database = Database(db or folder / DEFAULT_NAME)
    names = list(dict.fromkeys(models))
    session: Session
    if address is None:
        target = check_device(device, interpret=interpret)
        if threads:
            torch.set_num_threads(threads)
        options = {"cache_dir": folder, "tuning_db": None}
        if target.is_gpu:
            session = GpuSession(names, target, database, options, interpret)
        else:
            threads = torch.get_num_threads()
            session = Session(names, target, database, {**options, "target": device}, threads)
    else:
        session = RemoteSession(names, device, address, database, threads, seed)
    again = partial(_again, models, device, trials, seed, threads, db, plot_file, cache_dir, address, interpret)
    try:
        database.models()  # a file that is no database is told now
        if not plan:
            database.check_writable()
        session.prepare()
        if plan or not session.found.tasks:
            show_plan(session.found, session.limits, seconds, session.console)
            return
        session.tune(Budget(seconds, trials), seed, resume)
        session.finish()
        _draw(session, plot_file)
    except KeyboardInterrupt:
        typer.echo(session.interrupted(again(seconds - session.spent)), err=True)
        try:
            _draw(session, plot_file)
        except UsageError as error:  # must not hide how it ended
            typer.echo(str(error), err=True)
        raise typer.Exit(INTERRUPTED) from None
    except GraphoptError as error:
        if isinstance(error, Damaged):
            error.set_aside()
        if session.trials:
            error.add_note(f"{counted(session.trials, 'trial')} of this run are kept in {database.path}. To go on:\n"
                           f"  {again(seconds - session.spent)}")  # fmt: skip
        raise
    finally:
        session.close()


def _draw(session: Session, file: Path | None) -> None:
    """The picture, if one is wanted and anything was tried. Raises UsageError if it cannot be written."""
    if file and session.outcome:
        plot(session.outcome, session.found, session.limits, " ".join(map(label, session.names)), file)
        session.say(f"drawn: {file}")


def duration(text: str) -> float:
    """Seconds of a text such as ``90s``, ``10m`` or ``1h30m``. Raises UsageError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text)
    if not parts or "".join(n + u for n, u in parts) != text.strip():
        hint = f"{text.strip()}s, {text.strip()}m" if re.fullmatch(r"\s*\d+(\.\d+)?\s*", text) else "90s, 10m"
        raise UsageError(f"--budget {text!r} is no duration; write {hint} or 1h30m")
    seconds = sum(float(n) * _UNITS[u] for n, u in parts)
    if seconds <= 0:
        raise UsageError(f"--budget {text!r}: there is no time to tune in")
    return seconds


def _again(models: Sequence[str], device: str, trials: int | None, seed: int, threads: int | None, db: Path | None, plot_file: Path | None,
           cache_dir: Path | None, address: Address | None, interpret: bool, left: float) -> str:  # fmt: skip
    """The command that goes on, for the seconds that are left."""
    words = ["graphopt", "tune", *models, "--device", device, "--budget", f"{max(1.0, left):.0f}s", "--seed", str(seed)]
    words += ["--threads", str(threads)] if threads else []
    words += ["--interpret"] if interpret else []
    words += ["--rpc", f"{address.host}:{address.port}", "--key", address.key] if address else []
    words += ["--trials", str(trials)] if trials else []
    words += ["--db", str(db)] if db else []
    words += ["--plot", str(plot_file)] if plot_file else []
    words += ["--cache-dir", str(cache_dir)] if cache_dir else []
    return shlex.join([*words, "--resume"])

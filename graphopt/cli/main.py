"""The command ``graphopt``: puts the commands together, and turns errors into messages and exit statuses."""

from __future__ import annotations

import traceback
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from graphopt import __version__
from graphopt.cli.bench import bench
from graphopt.cli.db import app as db
from graphopt.cli.doctor import doctor
from graphopt.cli.explain import explain
from graphopt.cli.opt import opt
from graphopt.cli.quantize import quantize_command
from graphopt.cli.tune import tune_command
from graphopt.errors import GraphoptError

INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h

HELP = """A graph compiler for PyTorch that people can read, verify and tune.

\b
graphopt opt mlp.gir --pipeline canonicalize,fuse    run passes on IR text, print the result
graphopt explain model.py:make                       compile a model, tell what was done and why
graphopt bench bert mlp                              times beside other systems and the machine's limits
graphopt tune bert --budget 10m                      find faster schedules for its kernels, and keep them
graphopt quantize model.py:make --scheme int4-weight  weights as small integers; what it costs and gains
graphopt db ls                                       what was tuned; show, export, import, merge, prune
graphopt doctor                                      what is installed, what was found, what is missing

\b
Exit status: 0 fine, 1 a check failed, 2 wrong request (unknown pass, option or file), 3 malformed IR text,
4 a graph is not well-formed, 5 a pass changed what a graph computes, 6 a model could not be captured,
7 a library fallback under --strict, 8 a kernel could not be built, 9 the tuning database is damaged or out of reach,
10 a device that is not known or not here, 11 the disk is full, 12 a process of the tuner does not start, 13 another machine
is out of reach, 130 interrupted, 70 a fault in graphopt itself or in a pass.
"""


class Commands(TyperGroup):
    """The group of commands: errors made on purpose become one paragraph on stderr and their own exit status."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:  # may stand anywhere
            args = ["--debug", *(a for a in args if a != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg|torch")  # of PyTorch about its own code
        try:
            return super().invoke(ctx)
        except GraphoptError as error:
            notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
            typer.echo(f"{_traceback(ctx, error)}graphopt: error: {error}{notes}", err=True)
            raise typer.Exit(error.exit_status) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("click", "typer"):
                raise
            trace = _traceback(ctx, error)
            hint = "" if trace else "\nrun with --debug for the traceback"
            typer.echo(f"{trace}graphopt: internal error: {type(error).__name__}: {error}{hint}", err=True)
            raise typer.Exit(INTERNAL_ERROR) from error


def _traceback(ctx: Any, error: BaseException) -> str:
    """What ``--debug`` shows before the message; empty without it."""
    return "".join(traceback.format_exception(error)) if ctx.params.get("debug") else ""


app = typer.Typer(
    cls=Commands, help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphopt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options of all commands."""


app.command("opt")(opt)
app.command("explain")(explain)
app.command("bench")(bench)
app.command("tune")(tune_command)
app.add_typer(db, name="db")
app.command("quantize")(quantize_command)
app.command("doctor")(doctor)


def main() -> None:
    """Entry point of the command ``graphopt``."""
    app()

"""``graphopt explain``: compile a model, and tell what was done to it, what was declined, and why."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from enum import Enum
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import typer

import graphopt
from graphopt.bench.loading import load
from graphopt.capture.export import example_inputs
from graphopt.errors import UsageError, nearest
from graphopt.report import Report


class Remarks(str, Enum):
    """Which remarks to show."""

    none = "none"
    passed = "passed"
    missed = "missed"
    all = "all"


def explain(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="file.py:factory, module:factory, a .pt2 file of torch.export.save, or a built-in model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    remarks: Annotated[Remarks, typer.Option(help="Which remarks to show.")] = Remarks.missed,
    strict: Annotated[bool, typer.Option(help="Fail if an operation runs through a library kernel that was not asked for.")] = False,
    verify: Annotated[str, typer.Option(help="off, structure, or each-pass (compare values after every pass).")] = "structure",
    backend: Annotated[str, typer.Option(help="auto, tvm, triton, or eager (library kernels only, nothing is built).")] = "auto",
    target: Annotated[str, typer.Option(help="What to compile for: cpu, cpu:x86-64-v3; with --backend triton a GPU, cuda:sm_90.")] = "cpu",
    precision: Annotated[str, typer.Option(help="bf16: products and attention in it, summed in f32.")] = "",
    pipeline: Annotated[str | None, typer.Option("--pipeline", "-p", help="Other passes than the default: a,b{option=1}.")] = None,
    fuel: Annotated[int | None, typer.Option(min=0, help="Make at most this many rewrites.")] = None,
    skip_rewrite: Annotated[list[int] | None, typer.Option(min=1, help="Leave out the rewrite of this number. May be given again.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where kernels are kept; ~/.cache/graphopt unless given.")] = None,
    name: Annotated[str, typer.Option(help="What the report calls the model; MODEL unless given.")] = "",
    show: Annotated[list[str] | None, typer.Option(help="Also print: before, after (the IR), program. May be given again.")] = None,
    profile: Annotated[bool, typer.Option(help="Run it, and tell what every call costs.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Lines of each kind at most.")] = 20,
) -> None:
    """Compile a model and print the report: passes, kernels, library fallbacks with source lines, remarks.

    The factory takes no arguments and returns (module, example inputs):

    \b
    def make():
        return torch.nn.Linear(8, 4), (torch.randn(2, 8),)

    \b
    graphopt explain model.py:make                      passes, kernels, fallbacks, what was nearly done
    graphopt explain mypackage.models:make --strict     an error that names each library fallback
    graphopt explain model.pt2 --remarks all            what was done, too
    graphopt explain model.py:make --verify each-pass   every pass checked against f64
    graphopt explain model.py:make --show after         the IR that kernels are made from
    graphopt explain model.py:make --profile            time, GFLOP/s and GB/s of every kernel
    graphopt explain model.py:make --json > report.json
    """
    wanted = _sections(show or [])
    module, args, kwargs = load(model)
    if profile and isinstance(module, Path):
        args, kwargs = example_inputs(module)
    options: dict[str, Any] = {"strict": strict, "verify": verify, "pipeline": pipeline, "backend": backend, "target": target,
                               "precision": precision, "fuel": fuel, "skip_rewrites": skip_rewrite or [],
                               "cache_dir": cache_dir}  # fmt: skip
    with _quiet(bool(ctx.parent and ctx.parent.params.get("debug"))):
        compiled = graphopt.compile(module, args, kwargs, name=name or model, **options)
    report: Report = compiled.report
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2, default=str))
        return
    typer.echo(report.summary(remarks=remarks.value, limit=limit), nl=False)
    for title, text in wanted.items():
        typer.echo(f"\n// {title}\n{getattr(report, text)}")
    if profile:
        typer.echo("\n" + compiled.profile(*args, **kwargs).table(limit), nl=False)


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Keep away what PyTorch prints and warns of while it captures: what matters is in the report, or in the error."""
    if debug:
        yield
        return
    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _sections(names: list[str]) -> dict[str, str]:
    known = {"before": "text_before", "after": "text_after", "program": "program"}
    for name in names:
        if name not in known:
            raise UsageError(f"--show {name!r} is none of {', '.join(known)}{nearest(name, known)}")
    return {name: known[name] for name in names}

"""``graphopt quantize``: quantize a model's weights, and tell what that cost and gained, weight by weight."""

from __future__ import annotations

import json
import pickle
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from graphopt.bench.loading import load, load_function, load_samples
from graphopt.bits import SCHEMES, Front, fastest_within, plot
from graphopt.cli.explain import _quiet
from graphopt.errors import UsageError, first_line
from graphopt.passes.quantization.scheme import FORMS, Scheme
from graphopt.quantization import ledger_of, quantize

WITHIN = """Choose the scheme of each layer: as fast as can be while the metric moves by no more than this share of the float model's,
0.5% or 0.005. Without --metric: while the outputs move by no more than this share of their norm, on the calibration."""


def quantize_command(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="file.py:factory, module:factory, or a built-in model.")],
    scheme: Annotated[str, typer.Option(help=f"How numbers are stored: {FORMS}.")] = "int8-weight",
    method: Annotated[str, typer.Option(help="rtn (to the nearest), gptq, smoothquant, awq or split.")] = "rtn",
    calibration: Annotated[str | None, typer.Option(help="file.py:factory of calls to look at; the example inputs otherwise.")] = None,
    observer: Annotated[str, typer.Option(help="Ranges of a static scheme: minmax, percentile, mse, entropy.")] = "minmax",
    keep: Annotated[list[str] | None, typer.Option(help="A layer that stays in float; * for anything. May be given again.")] = None,
    within: Annotated[str | None, typer.Option("--fastest-within", help=WITHIN)] = None,
    schemes: Annotated[str, typer.Option(help="Those to choose from, for --fastest-within.")] = ",".join(SCHEMES),
    metric: Annotated[str | None, typer.Option(help="file.py:function of a model that gives a number; for --fastest-within.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for model.pt (for torch.load), ledger.json, front.json, front.png.")] = None,
    measure: Annotated[bool, typer.Option(help="Time each kernel against the float one.")] = True,
    revert: Annotated[bool, typer.Option(help="Put back in float what became slower.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ledger as JSON.")] = False,
    cache_dir: Annotated[Path | None, typer.Option(help="Where kernels are kept; ~/.cache/graphopt unless given.")] = None,
) -> None:
    """Quantize a model's linear layers (by int8-static and int8-dynamic its convolutions, too), and print the ledger.

    \b
    graphopt quantize model.py:make --scheme int8-weight                  a scale an output
    graphopt quantize model.py:make --scheme int4-weight-g128-zp --out q  a scale and a zero point for 128 inputs of an output
    graphopt quantize model.py:make --scheme int8-static --method smoothquant --calibration data.py:samples
    graphopt quantize model.py:make --keep lm_head --json                 leave the last layer, print for programs
    graphopt quantize model.py:make --fastest-within 0.5% --metric data.py:perplexity --out q
    """
    names, budget = schemes.split(","), None if within is None else _share(within)
    for option in ("schemes", "metric") if budget is None else ("scheme", "revert"):
        source = ctx.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{option} goes {'only' if budget is None else 'not'} with --fastest-within")
    for name in (scheme, *names):
        Scheme.parse(name)  # before anything is loaded
    if out is not None:
        _folder(out)
    module, args, kwargs = load(model)
    if isinstance(module, Path):
        raise UsageError(f"{model} is an exported program; graphopt quantize takes a factory that returns a module and example inputs")
    samples = None if calibration is None else load_samples(calibration)
    judge, front = None if metric is None else load_function(metric), None
    given: dict[str, Any] = {"method": method, "calibration": samples, "observer": observer, "keep": keep or (), "measure": measure}
    with _quiet(bool(ctx.parent and ctx.parent.params.get("debug"))):
        if budget is None:
            made = quantize(module, args, kwargs, scheme=scheme, revert=revert, cache_dir=cache_dir, **given)
        else:
            made, front = fastest_within(module, args, kwargs, budget=budget, schemes=names, metric=judge, cache_dir=cache_dir, **given)
    ledger = ledger_of(made)
    if as_json:
        typer.echo(json.dumps(ledger.to_json() if front is None else {**ledger.to_json(), "front": front.to_json()}, indent=2))
    else:
        typer.echo(str(ledger) + ("" if front is None else front.table(160)), nl=False)
    if out is not None:
        _write(made, front, out)


def _folder(out: Path) -> None:
    """Make the folder of ``--out``, before anything takes long. Raises UsageError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # which tells more than permissions do
            pass
    except FileExistsError as error:
        raise UsageError(f"--out {out} is a file: give a folder, which is made if there is none") from error
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror or error}") from error


def _write(made: torch.nn.Module, front: Front | None, out: Path) -> None:
    """Write the files of ``--out``. Raises UsageError."""
    try:
        (out / "ledger.json").write_text(json.dumps(ledger_of(made).to_json(), indent=2))
        if front is not None:
            (out / "front.json").write_text(json.dumps(front.to_json(), indent=2))
            _picture(front, out / "front.png")
        _save(made, out / "model.pt")
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror or error}") from error


def _save(made: torch.nn.Module, file: Path) -> None:
    """Raises UsageError for a model that cannot be pickled."""
    part = file.with_name(f"{file.name}.part")
    try:
        torch.save(made, part)
        part.replace(file)  # one that was there stays until this one is whole
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # as Python says it of local classes, lambdas, locks
        part.unlink()
        raise UsageError(f"{file} is not written, the model cannot be pickled: {first_line(error)}") from error


def _picture(front: Front, file: Path) -> None:
    """Where there is matplotlib."""
    try:
        plot(front, file)
    except ImportError:
        typer.echo(f"{file} is not written: pip install matplotlib (or 'graphopt[bench]')", err=True)


def _share(text: str) -> float:
    """``0.5%`` or ``0.005``. Raises UsageError for what is no share of something."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UsageError(f"--fastest-within {text}: give a share of the metric, such as 0.5%")
    return share

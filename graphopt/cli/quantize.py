"""``graphopt quantize``: quantize a model's weights, and tell what that cost and gained, weight by weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from graphopt.bench.loading import load, load_samples
from graphopt.cli.explain import _quiet
from graphopt.errors import UsageError
from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantization import ledger_of, quantize


def quantize_command(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="file.py:factory, module:factory, or a built-in model.")],
    scheme: Annotated[str, typer.Option(help="int8-, int4- or int2-weight, with -g32, -g128, -zp; int8-dynamic, -static.")] = "int8-weight",
    method: Annotated[str, typer.Option(help="rtn (to the nearest), gptq, smoothquant or awq.")] = "rtn",
    calibration: Annotated[str | None, typer.Option(help="file.py:factory of calls to look at; the example inputs otherwise.")] = None,
    observer: Annotated[str, typer.Option(help="Ranges of a static scheme: minmax, percentile, mse, entropy.")] = "minmax",
    keep: Annotated[list[str] | None, typer.Option(help="A layer that stays in float; * for anything. May be given again.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for model.pt (for torch.load) and ledger.json.")] = None,
    measure: Annotated[bool, typer.Option(help="Time each kernel against the float one.")] = True,
    revert: Annotated[bool, typer.Option(help="Put back in float what became slower.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ledger as JSON.")] = False,
    cache_dir: Annotated[Path | None, typer.Option(help="Where kernels are kept; ~/.cache/graphopt unless given.")] = None,
) -> None:
    """Quantize a model's linear layers, and print the ledger.

    \b
    graphopt quantize model.py:make --scheme int8-weight                  a scale an output
    graphopt quantize model.py:make --scheme int4-weight-g128-zp --out q  a scale and a zero point for 128 inputs of an output
    graphopt quantize model.py:make --scheme int8-static --method smoothquant --calibration data.py:samples
    graphopt quantize model.py:make --keep lm_head --json                 leave the last layer, print for programs
    """
    Scheme.parse(scheme)  # before anything is loaded
    module, args, kwargs = load(model)
    if isinstance(module, Path):
        raise UsageError(f"{model} is an exported program; graphopt quantize takes a factory that returns a module and example inputs")
    samples = None if calibration is None else load_samples(calibration)
    with _quiet(bool(ctx.parent and ctx.parent.params.get("debug"))):
        made = quantize(module, args, kwargs, scheme=scheme, method=method, calibration=samples, observer=observer, keep=keep or (),
                        measure=measure, revert=revert, cache_dir=cache_dir)  # fmt: skip
    ledger = ledger_of(made)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        torch.save(made, out / "model.pt")
        (out / "ledger.json").write_text(json.dumps(ledger.to_json(), indent=2))
    typer.echo(json.dumps(ledger.to_json(), indent=2) if as_json else str(ledger), nl=as_json)

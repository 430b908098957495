"""The demo: real transformers models through ``torch.compile(model, backend="graphopt")``.

Prints one table (errors against eager and against f64, times, kernels, library calls), then the report of one model.

    python examples/demo.py [--models bert,gpt2,llama,resnet50] [--report bert] [--repeats 15]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import graphopt
from graphopt.bench.load import watch
from graphopt.bench.models import MODELS
from graphopt.verification import ROUNDINGS

BUSY = 0.25  # processors that others may keep busy without a word
STEPS = ("build the model", "f64 reference", "eager", "compile", "measure")


@dataclass
class Row:
    """Results of one model. Errors are the largest difference relative to the largest reference magnitude."""

    name: str
    against_eager: float
    error: float
    eager_error: float
    eager_ms: float
    graphopt_ms: float
    calls: int
    fallbacks: int
    compile_seconds: float


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a - b| / max|b|, in f64."""
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max())


def interleaved(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each function, run in turns."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 2):
        for f, record in zip(functions, times, strict=True):
            start = time.perf_counter()
            f()
            if turn >= 2:  # the first turns warm up
                record.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def run(name: str, repeats: int, step: Callable[[str], None]) -> Row:
    step(STEPS[0])
    model, inputs = MODELS[name]()
    step(STEPS[1])
    with torch.no_grad():
        wide = copy.deepcopy(model).double()
        reference = wide(*[x.double() if x.is_floating_point() else x for x in inputs])
        del wide
        step(STEPS[2])
        eager = model(*inputs)
        step(STEPS[3])
        graphopt.clear_reports()
        torch._dynamo.reset()  # or the next model of the same wrapper class is taken for this one with other, unknown sizes
        compiled = torch.compile(model, backend="graphopt", options={"name": name})
        start = time.perf_counter()
        got = compiled(*inputs)
        seconds = time.perf_counter() - start
        step(STEPS[4])
        eager_s, graphopt_s = interleaved([lambda: model(*inputs), lambda: compiled(*inputs)], repeats)
    reports = graphopt.reports()
    return Row(
        name, relative(got, eager), relative(got, reference), relative(eager, reference), eager_s * 1e3, graphopt_s * 1e3,
        sum(k.calls for r in reports for k in r.kernels), sum(len(r.fallbacks) for r in reports), seconds,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="bert,gpt2,llama,resnet50", help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--report", default="bert", help="whose report to print")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each model, interleaved with eager")
    args = parser.parse_args()
    names = args.models.split(",")
    console = Console()
    console.width = max(console.width, 118)  # the table is no use when its cells are broken
    table = Table("model", "error vs eager", "error vs f64", "eager vs f64", "eager ms", "graphopt ms", "speed-up", "kernel calls",
                  "library calls", "compile s", title="torch.compile(model, backend='graphopt'), f32, batch 1")  # fmt: skip
    summary, wrong = "", []
    if (load := watch(0.5)) and load.others > BUSY:
        console.print(f"other processes keep {load.others:.1f} processors busy: the times are worth little", highlight=False)
    count = TextColumn("{task.completed}/{task.total}")
    columns = (SpinnerColumn(), TextColumn("{task.description:32}"), BarColumn(), count, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(names) * len(STEPS))
        for done, name in enumerate(names):

            def step(what: str, name: str = name, done: int = done) -> None:
                if not console.is_terminal:
                    print(f"{name}: {what}", file=sys.stderr, flush=True)
                progress.update(bar, description=f"{name}: {what}", completed=done * len(STEPS) + STEPS.index(what))

            row = run(name, args.repeats, step)
            if row.error > 2 * row.eager_error + ROUNDINGS * torch.finfo(torch.float32).eps:  # the budget of verify="each-pass"
                wrong.append(name)
            table.add_row(name, f"{row.against_eager:.1e}", f"{row.error:.1e}", f"{row.eager_error:.1e}", f"{row.eager_ms:.1f}",
                          f"{row.graphopt_ms:.1f}", f"{row.eager_ms / row.graphopt_ms:.2f}x", str(row.calls), str(row.fallbacks),
                          f"{row.compile_seconds:.1f}")  # fmt: skip
            if name == args.report:
                summary = "\n".join(r.summary(width=console.width) for r in graphopt.reports())
    console.print(table)
    if summary:
        console.print(f"\nThe report of {args.report}:\n")
        console.print(summary, markup=False, highlight=False)
    if wrong:
        console.print(f"[red]error against f64 is more than twice eager's own and eight roundings: {', '.join(wrong)}[/red]")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

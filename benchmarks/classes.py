"""Many classes of ``transformers`` that graphopt is not tuned for: is each right, and what has no kernel?

    python benchmarks/classes.py                                   # all; an hour and more on two cores
    python benchmarks/classes.py --only BertModel MambaModel       # some; --list names them all
    python benchmarks/classes.py --only Dino --time --json out.json  # every class with Dino in its name, timed against eager, too

Each class gets random weights (graphopt.bench.models.redraw), goes through torch.compile(model, backend="graphopt") in a process of
its own, and every tensor that it returns is judged against the same model in f64. An error is the largest difference, relative to
the largest element of that tensor. The table shows, of each class, the tensor that is worst beside its bound:

    graphs      how many Dynamo made of the model          kernels   launches of a call, all graphs together
    library     operators that ran through PyTorch, and how often
    error       of graphopt, and of eager; x: the first over the second
    verdict     ok; wrong: an error above 4 times eager's and 16 units of f32's last place, another pattern of nan and infinities,
                other integers than eager and f64 agree on, or other shapes; crash: graphopt raised an error, or took too long;
                refused: eager itself did, which is a mistake of the table (benchmarks/class_table.py); dynamo: backend="eager"
                fails in the same way, before any compiler is asked

A model that does not run in f64, gives nan there, or decides otherwise (a hash, a choice of experts: eager is off by a hundredth and
more), is judged against eager, to 1e-4, and marked *. With --time, eager and graphopt are called in turns and the medians are shown in ms.
The exit status is 1 if any class is wrong, crashes or is refused.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.class_table import ENTRIES  # noqa: E402

SLACK = 4.0  # times eager's error
ULPS = 16 * torch.finfo(torch.float32).eps
AGAINST_EAGER = 1e-4  # where there is no f64 run
OTHERWISE = 1e-2  # an error of eager's that is no rounding: the f64 run took another way
ROUNDS, TURN = 7, 0.05  # turns of each, and seconds of one


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in a model's output, in order; caches and strings are passed over."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference of finite elements, relative to the largest; infinite where nan and infinities lie elsewhere."""
    finite = exact.isfinite()
    if got.shape != exact.shape or not torch.equal(got.isfinite(), finite):
        return float("inf")
    difference = (got.double() - exact.double())[finite].abs()
    return float(difference.max() / max(float(exact.double()[finite].abs().max()), 1e-30)) if difference.numel() else 0.0


def judge(got: torch.Tensor, own: torch.Tensor, exact: torch.Tensor) -> tuple[float, float, float]:
    """Errors of graphopt and of eager against ``exact``, and the first over its bound: wrong above 1."""
    if got.shape != own.shape or got.dtype != own.dtype:
        return float("inf"), 0.0, float("inf")
    if not own.is_floating_point():
        agreed = own == exact.to(own.dtype)
        return 0.0, 0.0, float("inf") if bool((got != own)[agreed].any()) else 0.0
    eager = error(own, exact)
    if exact is own:
        mine = error(got, own)
        return mine, eager, mine / AGAINST_EAGER
    if eager == float("inf"):  # f64 has a wider range: where nan and infinities lie is then eager's to say
        exact = torch.where(own.isfinite(), exact, own.double())
        eager = error(own, exact)
    mine = error(got, exact)
    return mine, eager, mine / (SLACK * eager + ULPS)


def in_f64(module: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor] | None:
    """What the model gives in f64; None if it does not run there."""
    wide = copy.deepcopy(module).double()
    for child in wide.modules():  # the grouped products of experts know no f64
        if hasattr(getattr(child, "config", None), "_experts_implementation"):
            child.config._experts_implementation = "eager"  # type: ignore[union-attr]
    try:
        return run(wide, {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
    except (RuntimeError, TypeError, ValueError):
        return None


def is_yardstick(exact: list[torch.Tensor], own: list[torch.Tensor]) -> bool:
    """Whether the f64 run went the way of eager's: the same shapes, finite where eager is, and no further off than by rounding."""
    if [x.shape for x in exact] != [x.shape for x in own]:
        return False
    return all(bool(e.isfinite()[o.isfinite()].all()) and judge(o, o, e)[1] <= OTHERWISE for e, o in zip(exact, own))


def run(call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The results, of the same random numbers each time; copies, as a later call may write over them."""
    torch.manual_seed(0)
    return [x.clone() for x in tensors(call(**inputs))]


def in_turns(eager: Callable[..., Any], mine: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Seconds of a call, medians of turns that alternate."""

    def turn(call: Callable[..., Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call(**inputs)
        return (time.perf_counter() - start) / calls

    calls = max(1, int(TURN / max(turn(eager, 1), turn(mine, 1))))
    times = [(turn(eager, calls), turn(mine, calls)) for _ in range(ROUNDS)]
    return median(t[0] for t in times), median(t[1] for t in times)


def child(name: str, timed: bool) -> dict[str, Any]:
    """The row of one class, in this process."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import graphopt
    from graphopt.bench.models import redraw

    entry = next(e for e in ENTRIES if e.name == name)
    torch.manual_seed(0)
    try:
        module, inputs = redraw(entry.make()), entry.draw()
        own = run(module, inputs)
    except Exception as refusal:
        return {"class": name, "verdict": "refused", "why": f"{type(refusal).__name__}: {refusal}"}
    exact = in_f64(module, inputs)
    if exact is None or not is_yardstick(exact, own):
        exact = own
    compiled = torch.compile(module, backend="graphopt")
    try:
        got = run(compiled, inputs)
    except torch._dynamo.exc.TorchDynamoException as failure:
        torch._dynamo.reset()
        try:
            run(torch.compile(module, backend="eager"), inputs)
        except torch._dynamo.exc.TorchDynamoException:
            return {"class": name, "verdict": "dynamo", "why": f"{type(failure).__name__}: {failure}"}
        raise
    rows = [judge(*three) for three in zip(got, own, exact)]
    mine, eager, worst = max(rows, key=lambda row: row[2], default=(0.0, 0.0, 0.0))
    reports = graphopt.reports()
    row = {"class": name, "against": "eager" if exact is own else "f64", "graphs": len(reports),
           "kernels": sum(k.calls for r in reports for k in r.kernels),
           "library": dict(Counter(f.op for r in reports for f in r.fallbacks)), "error": mine, "eager": eager,
           "verdict": "wrong" if not own or len(got) != len(own) or not worst <= 1 else "ok"}  # fmt: skip
    if timed:
        row["eager_ms"], row["ms"] = (round(1000 * t, 3) for t in in_turns(module, compiled, inputs))
    return row


def parent(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one class, from a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--threads", str(args.threads), *(["--time"] if args.time else [])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return {"class": name, "verdict": "crash", "why": f"not done in {args.timeout} s"}
    if done.returncode == 0:
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    errors = [line for line in done.stderr.splitlines() if "Error" in line and not line.startswith(" ")]
    return {"class": name, "verdict": "crash", "why": (errors or [f"exit status {done.returncode}"])[-1]}


def show(rows: list[dict[str, Any]], timed: bool) -> Table:
    columns = ("class", "graphs", "kernels", "library", "error", "eager's", "x", *(("eager, ms", "ms") if timed else ()), "verdict")
    counts = Counter(row["verdict"] for row in rows)
    table = Table(*columns, title=f"{len(rows)} classes: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
    for row in rows:
        if "error" not in row:
            table.add_row(row["class"], "", "", row["why"][:200], *[""] * (len(columns) - 5), row["verdict"])
            continue
        library = ", ".join(f"{op.removeprefix('aten.').removesuffix('.default')} {n}" for op, n in row["library"].items())
        ratio = f"{row['error'] / row['eager']:.1f}" if row["eager"] else ""
        times = (f"{row['eager_ms']:.2f}", f"{row['ms']:.2f}") if timed else ()
        eager = f"{row['eager']:.1e}" if row["against"] == "f64" else "*"
        counted = (row["class"], str(row["graphs"]), str(row["kernels"]), library)
        table.add_row(*counted, f"{row['error']:.1e}", eager, ratio, *times, row["verdict"])
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these classes, or all that have NAME in their name")
    parser.add_argument("--time", action="store_true", help="time against eager, in turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, after each class")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--timeout", type=int, default=600, help="seconds for a class (default 600)")
    parser.add_argument("--list", action="store_true", help="name the classes and stop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        torch.set_num_threads(args.threads)
        with torch.no_grad():
            print(json.dumps(child(args.child, args.time)))
        return 0
    every = [e.name for e in ENTRIES]
    names = [n for n in every if not args.only or n in args.only or any(o not in every and o in n for o in args.only)]
    if args.list or not names:
        print("\n".join(names or every))
        return 0 if names else 2
    rows = []
    for at, name in enumerate(names, 1):
        start = time.perf_counter()
        rows.append(parent(name, args))
        print(f"{at}/{len(names)} {name}: {rows[-1]['verdict']}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    Console(width=None if sys.stdout.isatty() else 160).print(show(rows, args.time))
    return int(any(row["verdict"] not in ("ok", "dynamo") for row in rows))


if __name__ == "__main__":
    sys.exit(main())

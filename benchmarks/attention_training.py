"""A forward and a backward of attention: naive PyTorch, scaled_dot_product_attention, and naive code compiled by graphopt, in turns.

    python benchmarks/attention_training.py [--lengths 512,2048] [--systems naive,sdpa,graphopt] [--runs 5] [--dropout 0.1] [--memory]
                                            [--json FILE]

Times are medians in ms of f32 on ``--threads`` threads, a batch of 1. ``--prepare`` only builds the kernels, so that a later run is
short. ``--dropout`` is a rate at which weights are dropped, each system by choices of its own. ``--memory`` measures what a step takes at
most beside its inputs, and how that grows with ``--lengths``: two causal heads of 64.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from attention import Case, cases, naive
from rich.console import Console
from rich.table import Table

SYSTEMS = ("naive", "sdpa", "graphopt")
Step = Callable[[], list[torch.Tensor]]
PRODUCTS = 3.5  # of a forward and a backward, beside the forward's two: two, and five more


def spelled(case: Case, rate: float) -> Callable[..., torch.Tensor]:
    """Naive code, its mask made in it."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(case.queries, case.keys, dtype=torch.bool).tril() if case.causal else None
        return naive(q, k, v, mask, rate)

    return attention


def library(case: Case, rate: float) -> Callable[..., torch.Tensor]:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, dropout_p=rate, enable_gqa=case.heads != case.shared)

    return attention


def steps(case: Case, systems: list[str], rate: float = 0.0) -> dict[str, Step]:
    """A forward and its backward of each system, which gives the gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, h, n, case.size) for h, n in ((case.heads, case.queries), *[(case.shared, case.keys)] * 2, (case.heads, case.queries))]
    *inputs, dout = (torch.randn(s, generator=generator) for s in shapes)
    torch._dynamo.reset()
    compiled = torch.compile(spelled(case, rate), backend="graphopt", dynamic=False)
    of = {"naive": spelled(case, rate), "sdpa": library(case, rate), "graphopt": compiled}

    def step(system: str) -> list[torch.Tensor]:
        xs = [x.detach().requires_grad_() for x in inputs]
        of[system](*xs).backward(dout)
        return [x.grad for x in xs if x.grad is not None]

    return {s: lambda s=s: step(s) for s in systems}  # type: ignore[misc]


def compare(case: Case, ready: dict[str, Step]) -> None:
    """All gradients are SDPA's, where that is among the systems."""
    for system, step in ready.items() if "sdpa" in ready else ():
        for got, want in zip(step(), ready["sdpa"](), strict=True):
            error = float((got - want).abs().max() / want.abs().max())
            if not error < 1e-4:
                raise SystemExit(f"{case.name}: the gradients of {system} differ from SDPA's by {error}")


def measure(case: Case, systems: list[str], runs: int, rate: float) -> None:
    """Medians of runs in turns."""
    ready = steps(case, systems, rate)
    compare(case, ready if not rate else {})
    for step in ready.values():
        step()  # whatever is built once is there
    times: dict[str, list[float]] = {s: [] for s in ready}
    for _ in range(runs):
        for system, step in ready.items():
            start = time.perf_counter()
            step()
            times[system].append(time.perf_counter() - start)
    case.ms = {s: 1e3 * statistics.median(t) for s, t in times.items()}


def memory(lengths: list[int], systems: list[str], rate: float) -> Table:
    """Most memory that a step takes at once beside its inputs, and the exponent of its growth."""
    from graphopt.bench.memory import peak, reset_peak, settle

    table = Table("tokens", *systems, title="forward and backward, causal, 2 heads of 64: MB at most")
    found: dict[str, list[float]] = {s: [] for s in systems}
    for n in lengths:
        for system in systems:
            step = steps(Case("memory", 2, 2, n, n, 64, True), [system], rate)[system]
            step()  # whatever is built or loaded once is there
            before = settle()
            reset_peak()
            step()
            found[system].append((peak() - before) / 1e6)
        table.add_row(str(n), *(f"{found[s][-1]:.1f}" for s in systems))
    logs = [math.log(n) for n in lengths]
    table.add_row("exponent", *(f"{statistics.linear_regression(logs, [math.log(x) for x in found[s]]).slope:.2f}" for s in systems))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,1024,2048,4096")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    systems, lengths = given.systems.split(","), [int(n) for n in given.lengths.split(",")]
    torch.set_num_threads(given.threads)
    if given.memory and not given.prepare:
        Console(width=160).print(memory(lengths, systems, given.dropout))
        return
    found = [Case("memory", 2, 2, n, n, 64, True) for n in lengths] if given.memory else cases(["prefill"], lengths)
    if given.prepare:
        for case in found:
            steps(case, ["graphopt"], given.dropout)["graphopt"]()
        return
    from graphopt.bench.limits import LimitMeter

    meter = LimitMeter(given.threads)
    limits = meter.measure()
    for case in found:
        measure(case, systems, given.runs, given.dropout)
    limits = limits.best(meter.measure())
    table = Table("case", *systems, "of SDPA", "of the limit", title="attention, forward and backward, f32, ms")
    for c in found:
        mine = c.ms.get("graphopt", math.nan)
        ratio = f"{c.ms['sdpa'] / mine:.2f}x" if "sdpa" in c.ms else ""
        table.add_row(c.name, *(f"{c.ms[s]:.2f}" for s in systems), ratio, f"{1e3 * PRODUCTS * c.flops / limits.flops / mine:.0%}")
    Console(width=160).print(table)
    print(f"{limits.flops / 1e9:.0f} GFLOP/s, torch {torch.__version__}, {given.threads} threads")
    if given.json:
        given.json.write_text(json.dumps({"limits": asdict(limits), "cases": [asdict(c) for c in found]}, indent=1))


if __name__ == "__main__":
    main()

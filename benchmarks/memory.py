"""Peak memory while running: eager, graphopt, and graphopt that owns the weights, each in a process of its own.

    python benchmarks/memory.py [--models bert,resnet50,gpt2,llama] [--threads 2]

Figures are MiB of resident memory (Linux only). The model is made, run and dropped once, then made and run again: what the first
time leaves behind for good is the process's (the interpreter, PyTorch and pages of its libraries, MKL's buffers; for graphopt also
torch.export, the passes, TVM's runtime), and everything after it is the model's.

"before": what the process held before the model was made again. "running": the highest value during three calls after a warm-up, with
freed memory handed back to the system first. "model": the difference. "first": the same difference the first time, when the
process had compiled a single layer (or nothing, for eager). "compiling": the highest value from making the model again to its first
result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SYSTEMS = ("eager", "graphopt", "graphopt, own_weights")
COLUMNS = ("weights", "before", "running", "model", "first", "compiling")


def resident(key: str = "VmRSS") -> float:
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` the highest since :func:`start_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def start_peak() -> None:
    """Forget the peak so far."""
    Path("/proc/self/clear_refs").write_text("5")


def child(system: str, model: str, threads: int) -> dict[str, float]:
    """MiB of one system in this process."""
    torch.set_num_threads(threads)
    if system != "eager":
        import graphopt

        graphopt.compile(torch.nn.Linear(64, 64), (torch.randn(4, 64),))(torch.randn(4, 64))
    first = once(system, model)["model"]
    return {**once(system, model), "first": first}


def once(system: str, model: str) -> dict[str, float]:
    """Make the model, run it, and drop it."""
    from benchmarks.models import MODELS
    from graphopt.ownership import give_back_memory

    module, inputs = MODELS[model]()
    weights = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())) / 2**20
    give_back_memory()
    base = resident() - weights
    start_peak()
    call: Any = module
    with torch.no_grad():
        if system != "eager":
            import graphopt

            call = graphopt.compile(module, inputs, own_weights=system != "graphopt")
        call(*inputs)
        compiling = resident("VmHWM")
        call(*inputs)
        give_back_memory()
        start_peak()
        for _ in range(3):
            call(*inputs)
    running = resident("VmHWM")
    return {"weights": weights, "before": base, "running": running, "model": running - base, "compiling": compiling}


def run(system: str, model: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", system, "--models", model, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="bert,resnet50,gpt2,llama")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.models, args.threads)))
        return
    table = Table("model", "system", *COLUMNS, title="peak resident memory, MiB")
    for model in args.models.split(","):
        for system in SYSTEMS:
            r = run(system, model, args.threads)
            table.add_row(model if system == "eager" else "", system, *(f"{r[k]:.0f}" for k in COLUMNS))
    Console().print(table)


if __name__ == "__main__":
    main()

"""Compile time: cold (empty caches), then warm in a second process; and planning time against depth.

    python benchmarks/compile_time.py [--models bert,llama] [--against inductor]

Cold and warm are the seconds from Dynamo handing over the graph to the first result, in fresh processes. Planning is the
time of all passes on BERT of width 64 with 48 and with 96 layers. Inductor's caches get a folder of their own: it is as cold and
as warm as graphopt, in the same run. ``inductor`` freezes weights, as graphopt does, and its graph cache takes no frozen graph;
``inductor-cached`` does without freezing, so that its cache can take part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SYSTEMS = ("graphopt", "inductor", "inductor-cached")


def child(system: str, model: str, layers: int, cache: str) -> dict[str, Any]:
    """Compile in this process; seconds from the graph's arrival to the first result, and what the system tells of itself."""
    from graphopt.bench.models import MODELS, redraw

    if layers:
        from transformers import BertConfig, BertModel

        narrow = BertConfig(hidden_size=64, num_attention_heads=2, intermediate_size=128, num_hidden_layers=layers)
        module, inputs = redraw(BertModel(narrow, add_pooling_layer=False)), (torch.arange(16)[None],)
    else:
        module, inputs = MODELS[model]()
    backend = BACKENDS[system](cache)  # imported before the clock starts
    arrived: list[float] = []

    def timed(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        arrived.append(time.perf_counter())
        return backend(gm, example_inputs)

    with torch.no_grad():
        torch.compile(module, backend=timed)(*inputs)
    return {"seconds": time.perf_counter() - arrived[0], **TOLD[system]()}


def _graphopt(cache: str) -> Any:
    from graphopt.capture.dynamo import backend

    return lambda gm, inputs: backend(gm, inputs, options={"cache_dir": cache})


def _graphopt_told() -> dict[str, Any]:
    import graphopt

    reports = graphopt.reports()
    built, kernels = sum(r.kernels_built for r in reports), sum(len(r.kernels) for r in reports)
    return {"found": f"{kernels - built} of {kernels} kernels", "passes": sum(r.seconds.get("passes", 0.0) for r in reports)}


def _inductor(cache: str, freezing: bool = True) -> Any:
    import torch._inductor.config
    from torch._inductor.compile_fx import compile_fx

    torch._inductor.config.freezing = freezing
    return compile_fx


def _inductor_told() -> dict[str, Any]:
    found = torch._dynamo.utils.counters["inductor"]
    return {"found": f"graphs found {found['fxgraph_cache_hit']}, passed over {found['fxgraph_cache_bypass']}"}


BACKENDS = {"graphopt": _graphopt, "inductor": _inductor, "inductor-cached": lambda cache: _inductor(cache, freezing=False)}
TOLD = {"graphopt": _graphopt_told, "inductor": _inductor_told, "inductor-cached": _inductor_told}


def run(system: str, model: str, layers: int, cache: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", system, "--models", model, "--layers", str(layers), "--cache", cache]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache})
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="bert,gpt2,llama,resnet50")
    parser.add_argument("--against", choices=SYSTEMS[1:], help="also measure this one, and give the ratios")
    parser.add_argument("--no-planning", action="store_true", help="leave out the time of the passes against depth")
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--cache", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.models, args.layers, args.cache)))
        return
    console = Console()
    systems = ["graphopt", *([args.against] if args.against else [])]
    console.print("from the graph's arrival to the first result")
    table = Table("model", "system", "cold s", "warm s", "found when warm")
    with tempfile.TemporaryDirectory() as root:
        for model in args.models.split(","):
            measured = []
            for system in systems:
                cache = str(Path(root) / model / system)
                measured.append([run(system, model, 0, cache) for _ in range(2)])
                cold, warm = measured[-1]
                table.add_row(model, system, f"{cold['seconds']:.2f}", f"{warm['seconds']:.2f}", warm["found"])
                print(f"{model}, {system}: {cold['seconds']:.2f} s, {warm['seconds']:.2f} s", file=sys.stderr)  # as it comes
            if args.against:
                ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(*measured, strict=True)]
                table.add_row(model, f"graphopt / {args.against}", *(f"{r:.2f}" for r in ratios), "")
        console.print(table)
        if not args.no_planning:
            cache = str(Path(root) / "planning")
            short, long = run("graphopt", "bert", 48, cache)["passes"], run("graphopt", "bert", 96, cache)["passes"]
            console.print(f"passes: 48 layers {short:.2f} s, 96 layers {long:.2f} s: {long / short:.2f} times")


if __name__ == "__main__":
    main()

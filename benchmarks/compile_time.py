"""Compile time: cold (empty kernel cache), then warm in a second process; and planning time against depth.

    python benchmarks/compile_time.py [--models bert,llama]

Cold and warm are the seconds from Dynamo handing over the graph to the first result, in fresh processes. Planning is the
time of all passes on BERT of width 64 with 48 and with 96 layers.
"""

from __future__ import annotations

import argparse
import json
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


def child(model: str, layers: int, cache: str) -> dict[str, Any]:
    """Compile in this process; seconds from the graph's arrival to the first result, kernels built, seconds of the passes."""
    import graphopt
    from graphopt.bench.models import MODELS, redraw
    from graphopt.capture.dynamo import backend

    if layers:
        from transformers import BertConfig, BertModel

        narrow = BertConfig(hidden_size=64, num_attention_heads=2, intermediate_size=128, num_hidden_layers=layers)
        module, inputs = redraw(BertModel(narrow, add_pooling_layer=False)), (torch.arange(16)[None],)
    else:
        module, inputs = MODELS[model]()
    arrived: list[float] = []

    def timed(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        arrived.append(time.perf_counter())
        return backend(gm, example_inputs, options={"cache_dir": cache})

    with torch.no_grad():
        torch.compile(module, backend=timed)(*inputs)
    seconds = time.perf_counter() - arrived[0]
    reports = graphopt.reports()
    return {
        "seconds": seconds,
        "built": sum(r.kernels_built for r in reports),
        "kernels": sum(len(r.kernels) for r in reports),
        "passes": sum(r.seconds["passes"] for r in reports),
    }


def run(model: str, layers: int, cache: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", model, "--layers", str(layers), "--cache", cache]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="bert,gpt2,llama,resnet50")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--cache", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.layers, args.cache)))
        return
    console = Console()
    table = Table("model", "cold s", "kernels built", "warm s", "kernels built warm", title="from the graph's arrival to the first result")
    with tempfile.TemporaryDirectory() as cache:
        for model in args.models.split(","):
            cold, warm = run(model, 0, cache), run(model, 0, cache)
            table.add_row(model, f"{cold['seconds']:.2f}", f"{cold['built']}/{cold['kernels']}", f"{warm['seconds']:.2f}",
                          f"{warm['built']}/{warm['kernels']}")  # fmt: skip
        console.print(table)
        short, long = run("bert", 48, cache)["passes"], run("bert", 96, cache)["passes"]
    console.print(f"passes: 48 layers {short:.2f} s, 96 layers {long:.2f} s: {long / short:.2f} times")


if __name__ == "__main__":
    main()

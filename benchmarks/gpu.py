"""Kernels of the triton backend on this machine's GPU: right against f64, and how fast beside the library.

    python benchmarks/gpu.py [--runs 30] [--seconds 400] [--json gpu.json]

For each case: the error against f64 with eager's as the yardstick, at a small size; then the median time of a call by CUDA events, the L2
cache flushed before each, graphopt's kernel with its default schedule (or one that the case names) and PyTorch's own call in turns; the
ratio, and the bytes of operands and result as a share of the bandwidth of a copy, measured in the same run. After ``--seconds`` no case is
begun; what was not measured is listed.

Without a GPU it says so and exits with status 3; kernels can then be checked under the interpreter (docs/triton.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from graphopt.autotune.gpu_clock import GpuClock
from graphopt.autotune.space import Knob, Schedule, Workload
from graphopt.backends.base import KernelSource
from graphopt.backends.triton.backend import TritonBackend
from graphopt.ir import parse_graph
from graphopt.ir.interpreter import evaluate
from graphopt.sampling import random_inputs
from graphopt.target import Target, detect_gpu

NO_GPU = 3
CASES = {
    "gelu": ("pointwise", "(%x: f16[4096, 4096]) -> f16[4096, 4096] {\n %0: f16[4096, 4096] = gelu(%x)\n return %0\n}"),
    "layer norm": ("rowwise", "(%x: f16[8192, 4096], %w: f16[4096], %b: f16[4096]) -> f16[8192, 4096] {\n"
                   " %0: f16[8192, 4096] = layer_norm(%x, %w, %b)\n return %0\n}"),
    "softmax": ("rowwise", "(%x: f32[4096, 4000]) -> f32[4096, 4000] {\n %0: f32[4096, 4000] = softmax(%x) {axis = 1}\n return %0\n}"),
    "sum": ("reduction", "(%x: f32[8192, 4096]) -> f32[8192] {\n %0: f32[8192] = sum(%x) {axes = [1]}\n return %0\n}"),
    "matmul": ("matmul", "(%x: bf16[4096, 4096], %w: bf16[4096, 4096]) -> bf16[4096, 4096] {\n"
               " %0: bf16[4096, 4096] = matmul(%x, %w)\n return %0\n}"),
    "matmul, odd": ("matmul", "(%x: bf16[4095, 4095], %w: bf16[4095, 4095]) -> bf16[4095, 4095] {\n"
                    " %0: bf16[4095, 4095] = matmul(%x, %w)\n return %0\n}"),
    "matmul, few tiles": ("matmul", "(%x: bf16[256, 16384], %w: bf16[16384, 256]) -> bf16[256, 256] {\n"
                          " %0: bf16[256, 256] = matmul(%x, %w)\n return %0\n}"),
    **dict.fromkeys(("matmul, by descriptor", "matmul, tile after tile", "matmul, both"),
                    ("matmul", "(%x: bf16[4096, 4080], %w: bf16[4080, 4088]) -> bf16[4096, 4088] {\n"
                     " %0: bf16[4096, 4088] = matmul(%x, %w)\n return %0\n}")),
    "3x3": ("conv", "(%x: f16[32, 56, 56, 64], %w: f16[3, 3, 64, 64]) -> f16[32, 56, 56, 64] {\n"
            " %0: f16[32, 56, 56, 64] = conv(%x, %w) {stride = [1, 1], padding = [1, 1], dilation = [1, 1], channels_last = true}\n"
            " return %0\n}"),
    "rows added by index": ("scatter", "(%x: f32[30522, 768], %i: i64[8192], %s: f32[8192, 768]) -> f32[30522, 768] {\n"
                            " %0: f32[30522, 768] = put(%x, %i, %s) {axis = 0, update = \"add\"}\n return %0\n}"),
    **dict.fromkeys(("attention", "attention, by descriptor"),
                    ("attention", "(%q: bf16[4, 16, 4096, 64], %k: bf16[4, 16, 4096, 64], %v: bf16[4, 16, 4096, 64])"
                     " -> bf16[4, 16, 4096, 64] {\n"
                     " %0: bf16[4, 16, 4096, 64] = attention(%q, %k, %v) {scale = 0.125, causal = true}\n return %0\n}")),
    "attention, one query": ("attention", "(%q: bf16[1, 32, 1, 128], %k: bf16[1, 8, 8192, 128], %v: bf16[1, 8, 8192, 128])"
                             " -> bf16[1, 32, 1, 128] {\n"
                             " %0: bf16[1, 32, 1, 128] = attention(%q, %k, %v) {scale = 0.125}\n return %0\n}"),
}  # fmt: skip
SCHEDULES: dict[str, tuple[str, dict[str, Knob]]] = {  # of cases whose schedule is not the default: a structure, and knobs
    "matmul, by descriptor": ("tiled", {"reads": "descriptors"}),
    "matmul, tile after tile": ("persistent", {"reads": "pointers", "stores": 0}),
    "matmul, both": ("persistent", {"reads": "descriptors"}),
    "attention, by descriptor": ("flash", {"reads": "descriptors"}),
}


@dataclass
class Row:
    """What was measured of a case. Times in ms; ``error`` and ``eager_error`` are the greatest against f64."""

    name: str
    error: float
    eager_error: float
    ms: float
    library_ms: float
    bytes: int

    @property
    def ratio(self) -> float:
        return self.library_ms / self.ms


def small(text: str) -> str:
    """The same region at a size that f64 can check in a moment."""
    for large, less in (("8192", "130"), ("4096", "257"), ("4095", "259"), ("4000", "300"), ("16384", "4099"), ("30522", "51"),
                       ("56, 56", "15, 13"), ("[32, 15", "[3, 15")):
        text = text.replace(large, less)
    return text


def source_of(name: str, w: Workload, target: Target) -> KernelSource:
    """The kernel of a case.

    Raises:
        UsageError: its schedule is not for this target; the error tells why.
    """
    template = TritonBackend().templates(w, target)[0]
    space, knobs = template.space(w, target), dict[str, Knob]()
    if name in SCHEDULES:
        sketch, knobs = SCHEDULES[name]
        space = next(space for space in template.spaces(w, target) if sketch in space.sketches)
    s = Schedule.make(space.template, space.sketches[0], **{**dict(space.default().knobs), **knobs})
    return template.emit(w, space.check(s), target)


def kernel_of(name: str, text: str, device: torch.device) -> tuple[Any, list[torch.Tensor], Callable[[], None]]:
    """A region's graph, its inputs on the GPU, and a call of its kernel."""
    graph, target = parse_graph("graph @g" + text), detect_gpu(device.index or 0)
    kernel = TritonBackend().build(source_of(name, Workload.of(graph, CASES[name][0]), target), target)
    inputs = [x.to(device) for x in random_inputs(graph, {}, 0)]
    outputs = [torch.empty([int(d) for d in v.shape], dtype=v.dtype.torch, device=device) for v in graph.outputs]

    def call() -> None:
        kernel(*inputs, *outputs)

    call()
    torch.cuda.synchronize()
    return graph, [*inputs, *outputs], call


def errors(name: str, device: torch.device) -> tuple[float, float]:
    """Greatest error of the kernel and of eager against f64, at a small size."""
    graph, tensors, _ = kernel_of(name, small(CASES[name][1]), device)
    inputs, (got,) = tensors[: len(graph.inputs)], tensors[len(graph.inputs) :]
    (true,), (own,) = evaluate(graph, inputs, wide=True), evaluate(graph, inputs)
    return float((got.double() - true).abs().max()), float((own.double() - true).abs().max())


def interleaved(calls: Sequence[Callable[[], Any]], runs: int, device: torch.device) -> list[float]:
    """Median ms of each call, in turns, the L2 cache flushed before each."""
    clock = GpuClock(device)
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(runs):
        for call, found in zip(calls, times, strict=True):
            found += clock.time([call])
    return [1e3 * statistics.median(found) for found in times]


def measure(name: str, runs: int, device: torch.device) -> Row:
    error, eager = errors(name, device)
    graph, tensors, call = kernel_of(name, CASES[name][1], device)
    inputs = tensors[: len(graph.inputs)]
    ms, library = interleaved([call, lambda: evaluate(graph, inputs)], runs, device)
    return Row(name, error, eager, ms, library, sum(x.nbytes for x in tensors))


def copy_rate(runs: int, device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    x = torch.empty(512 << 20, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    (ms,) = interleaved([lambda: y.copy_(x)], runs, device)
    return 2 * x.nbytes / ms * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--json", type=Path)
    chosen, console = parser.parse_args(), Console(width=120)
    if not torch.cuda.is_available():
        console.print("There is no GPU here that PyTorch can use: nothing was measured.")
        return NO_GPU
    device, end = torch.device("cuda", 0), time.monotonic() + chosen.seconds
    rate, rows, missed = copy_rate(chosen.runs, device), list[Row](), list[str]()
    for name in CASES:
        if time.monotonic() > end:
            missed.append(f"{name}: out of time")
            continue
        try:
            rows.append(measure(name, chosen.runs, device))
        except Exception as error:  # one kernel's failure is its own, and is told
            missed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    title = f"{torch.cuda.get_device_name(device)}, a copy {rate / 1e9:.0f} GB/s"
    table = Table("case", "error / eager's", "ms", "library ms", "ratio", "of copy", title=title)
    for r in rows:
        error, share = r.error / max(r.eager_error, 1e-30), r.bytes / r.ms * 1e3 / rate
        table.add_row(r.name, f"{error:.2f}", f"{r.ms:.4f}", f"{r.library_ms:.4f}", f"{r.ratio:.2f}", f"{share:.0%}")
    console.print(table)
    for why in missed:
        console.print(f"not measured: {why}")
    if chosen.json:
        versions = {"torch": torch.__version__, **dict(TritonBackend().versions())}
        found = {"device": torch.cuda.get_device_name(device), "copy_bytes_per_second": rate, "versions": versions, "not_measured": missed}
        chosen.json.write_text(json.dumps({**found, "rows": [asdict(r) for r in rows]}, indent=1))
    return 1 if any(r.error > 4 * r.eager_error + 1e-6 for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

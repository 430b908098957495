"""Regions that read along one axis and write along another: transposed in squares; memory order decides the loops."""

from __future__ import annotations

import pytest
import torch
from tvm_check import check

from graphopt.autotune.space import Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir.text import parse_graph
from graphopt.target import detect

FORMS = {
    "transpose": "(%x: D[40, 70], %y: D[70, 40]) -> D[70, 40] {\n %0: D[70, 40] = transpose(%x) {perm = [1, 0]}\n"
    " %1: D[70, 40] = maximum(%0, %y)\n return %1\n}",
    "both transposed": "(%x: D[3, 33, 20], %y: D[3, 33, 20]) -> D[3, 20, 33] {\n %0: D[3, 33, 20] = maximum(%x, %y)\n"
    " %1: D[3, 20, 33] = transpose(%0) {perm = [0, 2, 1]}\n return %1\n}",
    "outermost": "(%x: D[17, 5, 40]) -> D[40, 17, 5] {\n %1: D[40, 17, 5] = transpose(%x) {perm = [2, 0, 1]}\n return %1\n}",
    "used twice": "(%x: D[32, 32]) -> D[32, 32] {\n"
    " %0: D[32, 32] = transpose(%x) {perm = [1, 0]}\n %1: D[32, 32] = maximum(%0, %x)\n return %1\n}",
    "sliced": "(%x: D[50, 60]) -> D[30, 25] {\n %0: D[50, 30] = slice(%x) {axis = 1, start = 7, stop = 37}\n"
    " %1: D[30, 50] = transpose(%0) {perm = [1, 0]}\n %2: D[30, 25] = slice(%1) {axis = 1, start = 1, stop = 50, step = 2}\n return %2\n}",
    "padded": "(%x: D[30, 40]) -> D[40, 33] {\n %0: D[30, 40] = relu(%x)\n %1: D[40, 30] = transpose(%0) {perm = [1, 0]}\n"
    " %2: D[40, 33] = pad(%1) {low = [0, 1], high = [0, 2], value = 0.0}\n return %2\n}",
}


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-90, 90, shape, generator=generator).to(dtype)


def test_transposed_reads(compile_all) -> None:
    graphs = [
        parse_graph("graph @g" + text.replace("D[", f"{d}["))
        for name, text in FORMS.items()
        for d in ("f32", "f64", "f16", "bf16", "i64", "i8", "b1")
        if not (name == "padded" and d in ("i64", "i8", "b1"))
    ]
    for graph, run in zip(graphs, compile_all([(g, "pointwise") for g in graphs]), strict=True):
        check(graph, run, [values(v.shape, v.dtype.torch, k) for k, v in enumerate(graph.inputs)])


@pytest.mark.parametrize("to", ["channels last", "contiguous"])
@pytest.mark.parametrize("source", ["channels last", "contiguous"])
def test_channels_last(builder, kernels_dir, source: str, to: str) -> None:
    from graphopt.backends.tvm.build import load_kernel

    layout = {"channels last": "; 5760, 1, 480, 24", "contiguous": ""}
    w = Workload(
        "pointwise",
        f"graph @g(%x: f32[3, 24, 12, 20{layout[source]}], %b: f32[24, 1, 1]) -> f32[3, 24, 12, 20{layout[to]}] {{\n"
        " %0: f32[3, 24, 12, 20] = add(%x, %b)\n %1: f32[3, 24, 12, 20] = relu(%0)\n return %1\n}",
    )
    s = TvmBackend().templates(w, detect())[0].space(w, detect()).default()
    kernel = load_kernel(builder.build_many([(w, s)], detect(), kernels_dir)[0], w, s)
    formats = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
    x, b = torch.randn(3, 24, 12, 20).to(memory_format=formats[source]), torch.randn(24, 1, 1)
    y = torch.empty(3, 24, 12, 20).to(memory_format=formats[to])
    kernel(x, b, y)
    assert torch.equal(y, (x + b).relu())

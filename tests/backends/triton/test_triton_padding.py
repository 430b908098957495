"""Padded products as kernels: right under the interpreter, and read by words of 16 bytes where they were read number by number."""

from __future__ import annotations

import re

import pytest
import torch
from test_triton_programs import agree, compiled
from test_triton_split_k import divided
from torch import nn
from triton_check import runner, templates

import graphopt
from graphopt.accelerators import ACCELERATORS
from graphopt.autotune.space import Workload
from graphopt.backends.triton.backend import TritonBackend
from graphopt.backends.triton.offline import compile_offline
from graphopt.ir.graph import Graph
from graphopt.ir.text import parse_graph
from graphopt.pass_manager import Pass, run_passes
from graphopt.passes.fusion import Fuse
from graphopt.passes.layout import PadProducts
from graphopt.rewrite import PassContext
from graphopt.sampling import random_inputs
from graphopt.target import Target
from graphopt.testing.kernels import check

WORDS = {"cuda": r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", "hip": r"(?:global_load_(?:lds_)?|buffer_load_)dwordx4"}
NUMBERS = {"cuda": r"ld\.global\.b16", "hip": r"(?:global|buffer)_load_ushort"}
FIRST_COLUMNS = """
graph @g(%x: bf16[ROWS, 40], %w: bf16[40, 48], %v: bf16[40, 48]) -> bf16[ROWS, 45] {
  %a: bf16[40, 45] = slice(%w) {axis = 1, stop = 45}
  %b: bf16[40, 45] = slice(%v) {axis = 1, stop = 45}
  %0: bf16[ROWS, 45] = matmul(%x, %a)
  %1: bf16[ROWS, 45] = matmul(%x, %b)
  %2: bf16[ROWS, 45] = silu(%0)
  %3: bf16[ROWS, 45] = mul(%2, %1)
  return %3
}"""
DEPTH = """
graph @g(%x: bf16[B, 1023], weight %w: bf16[512, 1023]) -> bf16[B, 512] where 1 <= B <= 65536 {
  %0: bf16[1023, 512] = transpose(%w) {perm = [1, 0]}
  %1: bf16[B, 512] = matmul(%x, %0)
  return %1
}"""
COLUMNS = """
graph @g(%x: f16[B, 1024], weight %w: f16[1024, 509]) -> f16[B, 509] where 1 <= B <= 65536 {
  %0: f16[B, 509] = matmul(%x, %w)
  return %0
}"""


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("rows", [13, 1])
def test_columns_beyond_a_slice_count_for_nothing(rows: int, pieces: int) -> None:
    """A kernel reads them with their neighbours; here they are nan."""
    graph = parse_graph(FIRST_COLUMNS.replace("ROWS", str(rows)))
    inputs = random_inputs(graph, {}, 0)
    for w in inputs[1:]:
        w[:, 45:] = float("nan")
    for template in templates(graph, "matmul")[1]:
        check(graph, runner(graph, "matmul", divided(graph, pieces, template.name)), inputs, factor=4.0, slack=2)


def product_of(text: str, target: Target, *passes: Pass) -> Graph:
    """The region of the one product."""
    graph = parse_graph(text)
    run_passes(graph, [*passes, Fuse()], PassContext(target=target))
    (region,) = [n.body for n in graph.nodes() if n.body is not None and n.attrs["kind"] == "matmul"]
    return region


def loads(region: Graph, target: Target) -> tuple[int, int]:
    """How many instructions of the default kernel read a word of 16 bytes, and how many a number."""
    w = Workload.of(region, "matmul")
    template = TritonBackend().templates(w, target)[0]
    code = compile_offline(template.emit(w, template.space(w, target).default(), target), target)
    assert code.spills == 0 and code.uses(target.matrix_unit)
    return len(re.findall(WORDS[target.kind], code.assembly)), len(re.findall(NUMBERS[target.kind], code.assembly))


@pytest.mark.parametrize("text", [DEPTH, COLUMNS], ids=["depth", "columns"])
@pytest.mark.parametrize("target", [f"{a.kind}:{name}" for name, a in ACCELERATORS.items()])
def test_padded_factors_are_read_by_words(text: str, target: str) -> None:
    t = Target.from_name(target)
    before, after = loads(product_of(text, t), t), loads(product_of(text, t, PadProducts(always=True)), t)
    assert before[1] > 0 == after[1] and after[0] > before[0]


class Odd(nn.Module):
    """Odd sizes everywhere: of the input, between two layers that are gated, of a weight that is not transposed, and of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(37, 45), nn.Linear(37, 45, bias=False), nn.Linear(45, 33)
        self.last = nn.Parameter(torch.randn(33, 19) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return torch.relu(h @ self.last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_of_odd_sizes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Odd().to(dtype).eval(), torch.randn(2, 13, 37, dtype=dtype)
    c = compiled(model, x, pipeline={"replace": {"pad-products": "pad-products{always=True}"}})
    said = [r.message for r in c.report.remarks if r.pass_name == "pad-products" and r.kind == "passed"]
    assert len(said) == 4 and sum("what computes the left factor grows" in m for m in said) == 2
    agree(model, c, x)


def test_a_batch_of_any_size() -> None:
    torch.manual_seed(0)
    model = Odd().bfloat16().eval()
    options = {"backend": "triton", "target": "cuda:sm_90:4", "strict": True,
               "pipeline": {"replace": {"pad-products": "pad-products{always=True}"}}}  # fmt: skip
    with torch.no_grad():
        f = torch.compile(model, backend="graphopt", dynamic=True, options=options)
        for n in (5, 1, 19):
            x = torch.randn(n, 13, 37, dtype=torch.bfloat16)
            torch.testing.assert_close(f(x), model(x), rtol=2e-2, atol=2e-2)
    assert any(r.pass_name == "pad-products" and r.kind == "passed" for r in graphopt.reports()[-1].remarks)

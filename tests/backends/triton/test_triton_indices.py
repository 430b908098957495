"""Indices under the interpreter: the kernel that looks for one out of range, who is told, and writes that are not made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_scatter import numbers, put, scatter
from test_triton_offline import TARGETS
from test_triton_scatter import ATOMIC, SKETCHES
from torch import nn
from triton_check import SM_90, templates

import graphopt
from graphopt.backends.base import KernelSource
from graphopt.backends.triton import indices
from graphopt.backends.triton.build import load_source
from graphopt.backends.triton.code import Launch, Payload
from graphopt.backends.triton.offline import compile_offline
from graphopt.backends.triton.provider import Provider
from graphopt.ir.interpreter import evaluate
from graphopt.ir.text import parse_graph
from graphopt.target import Target

OPTIONS: dict[str, Any] = {"backend": "triton", "target": "cuda:sm_90:4", "tuning_db": None, "strict": True}
DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel(dtype: torch.dtype) -> None:
    look = Provider(interpret=True).index_look()
    for count in (1, 7, 1024, 2500):
        for low, high in ((0, 100), (-100, 100), (0, 1)):
            index = torch.randint(0 if dtype == torch.uint8 else low, high, (count,)).to(dtype)
            found = torch.zeros(9, dtype=torch.int64)
            look(index, found, 5, low, high)
            assert not found.any()
            for bad in (high, 127, low - 1):
                if dtype == torch.uint8 and bad < 0:
                    continue
                other, found = index.clone(), torch.zeros(9, dtype=torch.int64)
                other[count * 2 // 3] = bad
                look(other, found, 5, low, high)
                assert found.tolist() == [1, 0, 0, 0, 0, 1, bad, low, high]


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernel_compiled(target: str) -> None:
    signature = {"index": "*i64", "found": "*i64", "row": "i32", "count": "i32", "low": "i32", "high": "i32", "BLOCK": "constexpr"}
    payload = Payload("_look", signature, Launch((1,), {"BLOCK": 1024}, 4, 1))
    compiled = compile_offline(KernelSource("look", "triton", Path(indices.__file__).read_text(), (payload,)), Target.from_name(target))
    assert compiled.spills == 0 and compiled.registers <= 48


@pytest.mark.parametrize("update", ["set", "add"])
@pytest.mark.parametrize("sketch", [*SKETCHES, "atomic"])
def test_nothing_is_written_out_of_range(sketch: str, update: str) -> None:
    """Bit for bit what comes of the positions that are within range alone."""
    if sketch == "atomic" and update == "set":
        return
    s = {**SKETCHES, "atomic": ATOMIC}[sketch]
    dtype, bad = "i64" if sketch == "atomic" else "f32", [1, 4, 5, 8]
    good = [i for i in range(9) if i not in bad]
    for make in (put, scatter):
        sizes = ((9,), (5,)) if make is put else ((9, 18), (5, 18))
        large, small = (parse_graph(make(dtype, (6, 20), n, 0, update)) for n in sizes)
        x, index, source = (v.float() if dtype == "f32" and v.dtype != torch.int64 else v for v in numbers(large, 0))
        for wrong, i in zip((6, -1, 2**40, -(2**40)), bad, strict=True):
            index[i] = wrong
        w, found = templates(large, "scatter")
        out = torch.full((6, 20), 77, dtype=x.dtype)
        text = next(t for t in found if t.name == s.template).emit(w, s, SM_90)
        load_source(text, interpret=True)(x, index, source, out)
        assert torch.equal(out, evaluate(small, [x, index[good], source[good]])[0]), make


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)

    def forward(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return self.table(i)[j] * 2


@pytest.mark.parametrize("graphs", [False, True])
def test_a_program_is_not_held_up_and_says_what_it_found(graphs: bool) -> None:
    model, i, j = Table(), torch.arange(6), torch.tensor([0, -6, 5])
    with torch.no_grad():
        compiled = graphopt.compile(model, (i, j), cuda_graphs=graphs, **OPTIONS)
        for k in range(4):
            torch.testing.assert_close(compiled(i + k, j), model(i + k, j))
        for bad in ((i + 5, j), (i - 1, j), (i, j + 1), (i, j - 1), (i, torch.tensor([0, 10**15, 0]))):
            with pytest.raises(IndexError, match=r"index out of range in take \(.*test_triton_indices.py:\d+\): -?\d+ is not within"):
                compiled(*bad)
            torch.testing.assert_close(compiled(i, j), model(i, j))  # once, and nothing is left of it
    assert ".tolist" not in compiled.report.program
    if graphs:
        assert compiled.report.graphs is not None and compiled.report.graphs.recorded == 1 and not compiled.report.graphs.stopped


def test_only_what_is_read_must_be_in_range() -> None:
    def f(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return x[i[::2]] + 1

    torch._dynamo.reset()
    x, compiled = torch.randn(5, 8), torch.compile(f, backend="graphopt", options=OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, torch.tensor([0, 9, 4, -9])), f(x, torch.tensor([0, 0, 4, 0])))
        with pytest.raises(IndexError):
            compiled(x, torch.tensor([0, 0, 5, 0]))


@pytest.mark.parametrize("graphs", [False, True])
def test_a_cache_and_an_index_out_of_range(graphs: bool) -> None:
    def step(cache: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(1, at, k)
        return cache.sum(1)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="graphopt", dynamic=False, options={**OPTIONS, "cuda_graphs": graphs})
    cache = torch.randn(2, 16, 8)
    own = cache.clone()
    with torch.no_grad():
        for i in range(4):
            k = torch.randn(2, 2, 8)
            at = torch.tensor([i, 15 - i])
            torch.testing.assert_close(compiled(cache, at, k), step(own, at, k))
        for bad in (16, -1):
            with pytest.raises(IndexError, match="in put"):
                compiled(cache, torch.tensor([bad, bad]), k)
        assert torch.equal(cache, own)
        torch.testing.assert_close(compiled(cache, at, k), step(own, at, k))
    report = graphopt.reports()[-1]
    assert [x.kind for x in report.kernels].count("update") == 1
    assert not graphs or (report.graphs is not None and report.graphs.replayed == 5)

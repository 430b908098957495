"""Recorded calls of kernels, under the interpreter: caches updated in place, variants of sizes, torch.compile, and what is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import graphed
from graphopt.errors import UsageError
from graphopt.graphed import MOST
from graphopt.recorders import CpuRecorder
from graphopt.report import GraphCalls, Report

OPTIONS: dict[str, Any] = {"backend": "triton", "target": "cuda:sm_90:4", "tuning_db": None, "strict": True}


def graphs(report: Report) -> GraphCalls:
    assert report.graphs is not None
    return report.graphs


def said(report: Report) -> str:
    return "\n".join(r.message for r in report.remarks if r.pass_name == "cuda-graphs")


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(31, 65), nn.GELU(), nn.LayerNorm(65), nn.Linear(65, 33)).eval()


def test_a_model() -> None:
    model = mlp()
    with torch.no_grad():
        compiled = graphopt.compile(model, (torch.randn(5, 31),), cuda_graphs=True, **OPTIONS)
        calls = [(x, compiled(x.clone())) for x in torch.randn(5, 5, 31)]
        for x, y in calls:
            torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
        assert graphs(compiled.report) == GraphCalls(1, 3, 2)
        model[0].weight.mul_(2)
        x = torch.randn(5, 31)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert "CUDA graphs: 1 recorded, 4 calls replayed, 2 launched" in compiled.report.summary()
    assert compiled.report.to_json()["graphs"]["replayed"] == 4 and "graphs" in compiled.report.memory
    assert compiled.profile(x, runs=1).calls  # call by call, beside the recording


def test_own_weights() -> None:
    model, x = mlp(), torch.randn(5, 31)
    with torch.no_grad():
        want = model(x)
        compiled = graphopt.compile(model, (x,), cuda_graphs=True, own_weights=True, **OPTIONS)
        for _ in range(4):
            torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-5)
    assert graphs(compiled.report).replayed == 2


@pytest.mark.parametrize("how", [{"mode": "reduce-overhead"}, {"options": {"cuda_graphs": True}}])
def test_torch_compile(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """``mode`` and ``options`` cannot be given together: the mode's options are put in where they arrive."""
    make = graphopt.Options.make
    monkeypatch.setattr(graphopt.Options, "make", staticmethod(lambda mode, options: make(mode, {**OPTIONS, **(options or {})})))
    torch._dynamo.reset()
    model = mlp()
    compiled = torch.compile(model, backend="graphopt", dynamic=False, **how)
    with torch.no_grad():
        for x in torch.randn(4, 5, 31):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert graphs(graphopt.reports()[-1]).replayed == 2


def test_training_is_refused_with_a_reason() -> None:
    torch._dynamo.reset()
    graphopt.clear_reports()
    model = mlp()
    torch.compile(model, backend="graphopt", options={**OPTIONS, "strict": False, "cuda_graphs": True})(torch.randn(5, 31)).sum().backward()
    reports = graphopt.reports()
    assert len(reports) == 2 and all("in training" in graphs(r).stopped and "in training" in said(r) for r in reports)


def test_whole_graphs_of_the_library_and_the_cpu_are_refused_with_a_reason() -> None:
    with torch.no_grad():
        compiled = graphopt.compile(mlp(), (torch.randn(5, 31),), cuda_graphs=True, backend="eager")
    assert "the model is on cpu" in graphs(compiled.report).stopped and "the model is on cpu" in said(compiled.report)
    with pytest.raises(UsageError, match="cuda_graphs"):
        graphopt.Options(cuda_graphs="yes")  # type: ignore[arg-type]


class Cache(nn.Module):
    """Writes one row of a cache, and sums it up."""

    def forward(self, cache: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        cache.index_add_(1, at.remainder(16), k)
        return (cache * 2).sum(1)


def steps(compiled: Callable[..., Any], caches: list[torch.Tensor], count: int) -> None:
    """Calls on caches in turn, each as eager's. The cache is added to: a call that is made twice would show."""
    own, model = [c.clone() for c in caches], Cache()
    kept = []
    for i in range(count):
        at, k = torch.tensor([i * 5]), torch.randn(2, 1, 8)
        which = i % len(caches)
        with torch.no_grad():
            kept.append((compiled(caches[which], at, k), model(own[which], at, k)))
        torch.testing.assert_close(caches[which], own[which])
    for got, want in kept:
        torch.testing.assert_close(got, want)


def compiled_cache() -> Any:
    torch._dynamo.reset()
    return torch.compile(Cache(), backend="graphopt", dynamic=False, options={**OPTIONS, "cuda_graphs": True})


def test_a_cache_is_updated_where_it_lies() -> None:
    compiled = compiled_cache()
    steps(compiled, [torch.zeros(2, 16, 8)], 6)
    report = graphopt.reports()[-1]
    assert [k.kind for k in report.kernels].count("update") == 1 and graphs(report) == GraphCalls(1, 4, 2)
    assert (report.memory["graphs"] or 0) < 2 * 16 * 8 * 4 * 3  # inputs of the graph: the index and the row, not the cache


class Addresses(CpuRecorder):
    """Keeps no more of a call than a CUDA graph does: what it returned."""

    def record(self, run: Any, written: Any) -> Any:
        recording = super().record(run, written)
        recording._steps.clear()
        return recording


def test_a_recording_does_not_keep_a_cache_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "CpuRecorder", Addresses)
    compiled, cache = compiled_cache(), torch.zeros(2, 16, 8)
    steps(compiled, [cache], 2)
    assert graphs(graphopt.reports()[-1]).recorded == 1
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


def test_caches_in_turn_have_a_recording_each_up_to_the_bound() -> None:
    compiled = compiled_cache()
    caches = [torch.zeros(2, 16, 8) for _ in range(MOST + 2)]
    steps(compiled, caches, 3 * len(caches))
    report = graphopt.reports()[-1]
    assert graphs(report).recorded == MOST and graphs(report).replayed == MOST and "update other memory in place" in said(report)


def test_sizes_and_variants() -> None:
    model = mlp()
    rows = torch.export.Dim("rows", min=2, max=64)
    with torch.no_grad():
        compiled = graphopt.compile(model, (torch.randn(5, 31),), dynamic_shapes=({0: rows},), cuda_graphs=True, **OPTIONS)
        for n in (5, 7, 5, 7, 5, 7, 9, 5):
            x = torch.randn(n, 31)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    (variant,) = compiled.report.variants
    assert graphs(variant) == GraphCalls(1, 2, 2) and graphs(compiled.report) == GraphCalls(1, 1, 3)


def test_dropout_draws_anew() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: torch.nn.functional.dropout(x, 0.5) * 2, backend="graphopt",
                             options={**OPTIONS, "strict": False, "cuda_graphs": True})  # fmt: skip
    with torch.no_grad():
        draws = [compiled(torch.ones(1000)) for _ in range(5)]
    assert graphs(graphopt.reports()[-1]).replayed == 3
    for a, b in pairwise(draws):
        assert not torch.equal(a, b) and set(b.unique().tolist()) == {0.0, 4.0}

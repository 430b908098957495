"""What only a GPU can show, skipped without one: captured graphs, indices that nobody waits for, streams, attention in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
DEVICE = "cuda"
OPTIONS: dict[str, Any] = {"strict": True, "tuning_db": None}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    graphopt.clear_reports()
    torch.manual_seed(0)


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(31, 65), nn.GELU(), nn.LayerNorm(65), nn.Linear(65, 33)).eval().to(DEVICE)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_calls_are_replayed() -> None:
    model = mlp()
    with torch.no_grad():
        compiled = graphopt.compile(model, (x(5, 31),), cuda_graphs=True, **OPTIONS)
        calls = [(given, compiled(given.clone())) for given in (x(5, 31) for _ in range(20))]
        for given, got in calls:
            close(got, model(given))
        model[0].weight.mul_(2)
        model[0].bias.data = x(65)
        for _ in range(4):
            given = x(5, 31)
            close(compiled(given), model(given))
    graphs = compiled.report.graphs
    assert graphs is not None and not graphs.stopped and graphs.replayed >= 18, graphs
    assert (compiled.report.memory["graphs"] or 0) > 0


def test_sizes_and_streams() -> None:
    model = mlp()
    rows = torch.export.Dim("rows", min=2, max=64)
    streams: list[Any] = [None, None]
    if DEVICE == "cuda":
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for graphs in (False, True):
        with torch.no_grad():
            compiled = graphopt.compile(model, (x(5, 31),), dynamic_shapes=({0: rows},), cuda_graphs=graphs, **OPTIONS)
            calls = []
            for k in range(40):
                given = x(5 + k % 3, 31)
                if DEVICE == "cuda":
                    streams[k % 2].wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(streams[k % 2]):
                        calls.append((given, compiled(given)))
                else:
                    calls.append((given, compiled(given)))
            for s in streams if DEVICE == "cuda" else ():
                torch.cuda.current_stream().wait_stream(s)
            for given, got in calls:
                close(got, model(given))


@pytest.mark.parametrize("graphs", [False, True])
def test_a_cache_and_indices_out_of_range(graphs: bool) -> None:
    def step(cache: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(1, at, k)
        return cache.sum(1)

    compiled = torch.compile(step, backend="graphopt", dynamic=False, options={**OPTIONS, "cuda_graphs": graphs})
    cache = x(2, 16, 8)
    own, kept = cache.clone(), []
    with torch.no_grad():
        for i in range(8):
            at, k = torch.tensor([i, 15 - i], device=DEVICE), x(2, 2, 8)
            kept.append((compiled(cache, at, k), step(own, at, k)))
        for got, want in kept:
            close(got, want)
        graphopt.check_indices()
        for bad in (16, -1):
            with pytest.raises(IndexError, match=f"in put .*{bad} is not within 0 .. 15"):
                compiled(cache, torch.tensor([bad, 3], device=DEVICE), k[:, :2])
                graphopt.check_indices()
            own[:, 3] = k[:, 1]
        assert torch.equal(cache, own)
        close(compiled(cache, at, k), step(own, at, k))
        graphopt.check_indices()
    report = graphopt.reports()[-1]
    assert not graphs or (report.graphs is not None and report.graphs.recorded == 1 and not report.graphs.stopped)


def test_dropout_draws_anew_at_each_replay() -> None:
    compiled = torch.compile(lambda x: F.dropout(x, 0.5) * 2, backend="graphopt", options={**OPTIONS, "strict": False, "cuda_graphs": True})
    with torch.no_grad():
        draws = [compiled(torch.ones(1000, device=DEVICE)) for _ in range(6)]
    report = graphopt.reports()[-1]
    assert report.graphs is not None and report.graphs.replayed == 4, report.graphs
    assert len({tuple(d.tolist()) for d in draws}) == 6 and all(set(d.unique().tolist()) == {0.0, 4.0} for d in draws)


def test_a_training_step() -> None:
    def layer(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        q, k, v = ((x @ w).view(2, 9, 2, 8).transpose(1, 2) for w in weights)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 9, 16)

    def step(fn: Any, given: list[torch.Tensor]) -> list[torch.Tensor]:
        given = [t.detach().requires_grad_() for t in given]
        y = fn(*given)
        y.square().sum().backward()
        return [y.detach(), *(t.grad for t in given if t.grad is not None)]

    given = [x(2, 9, 16), *(x(16, 16) * 0.3 for _ in range(3))]
    for got, want in zip(step(torch.compile(layer, backend="graphopt", options=OPTIONS), given), step(layer, given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    forward, backward = graphopt.reports()
    assert "attention_forward" in forward.text_after and "attention_backward" in backward.text_after

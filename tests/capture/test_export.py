"""torch.export: called like the model, with state that stays shared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations, prune

import graphopt
from graphopt.capture.captured import evaluate
from graphopt.capture.export import exported_graph
from graphopt.capture.fx import capture_fx
from graphopt.errors import CaptureError, UsageError
from graphopt.guards import InputError
from tests.opinfo.harness import difference

B = torch.export.Dim("B", min=2, max=64)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(4))
        self.register_buffer("hidden", torch.ones(4), persistent=False)
        self.constant = torch.arange(4.0)

    def forward(self, x: torch.Tensor, *, pair: tuple[torch.Tensor, ...], factor: int = 3) -> dict[str, Any]:
        self.calls.add_(1)
        x.mul_(2)
        y = self.fc(x) + self.hidden + self.constant + self.calls
        return {"y": y, "list": [pair[0] * factor, None, 5], "same": pair[1]}


def test_called_like_the_model() -> None:
    m = Model().eval()
    twin = copy.deepcopy(m)
    compiled = graphopt.compile(m, (torch.randn(3, 4),), {"pair": (torch.randn(2), torch.randn(1))}, backend="eager")
    for _ in range(2):
        x, pair = torch.randn(3, 4), (torch.randn(2), torch.randn(1))
        other = x.clone()
        with torch.no_grad():
            want = twin(other, pair=pair)
        got = compiled(x, pair=pair)
        assert not difference(want, got) and got["same"] is pair[1]
        assert torch.equal(x, other) and torch.equal(m.calls, twin.calls)


def test_weights_that_change_or_are_replaced() -> None:
    m, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).eval(), torch.randn(3, 4)
    compiled = graphopt.compile(m, (x,), backend="eager")
    with torch.no_grad():
        m[0].weight.mul_(2)
        torch.testing.assert_close(compiled(x), m(x))
        m[0].weight = torch.nn.Parameter(torch.randn(4, 4))
        torch.testing.assert_close(compiled(x), m(x))
        m[1].running_mean.add_(1)
        torch.testing.assert_close(compiled(x), m(x))


def _as_buffer(layer: torch.nn.Linear) -> None:
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("change, gone", [
    (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "1.weight"),
    (parametrizations.weight_norm, "1.weight"),
    (_as_buffer, "1.weight"),
    (lambda layer: setattr(layer, "bias", None), "1.bias"),
])  # fmt: skip
def test_a_weight_that_is_gone_is_named(change: Callable[[torch.nn.Module], object], gone: str, backend: str) -> None:
    m, x = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(4, 4)).eval(), torch.randn(3, 4)
    compiled = graphopt.compile(m, (x,), backend=backend)
    compiled(x)
    change(m[1])
    for _ in range(2):
        with pytest.raises(InputError, match=rf"^{gone} is gone .* compile again"):
            compiled(x)


def test_a_weight_that_came_back() -> None:
    m, x = torch.nn.Linear(4, 4).eval(), torch.randn(3, 4)
    compiled = graphopt.compile(m, (x,), backend="eager")
    m.bias, bias = None, m.bias
    with pytest.raises(InputError, match="bias is gone"):
        compiled(x)
    m.bias = bias
    torch.testing.assert_close(compiled(x), m(x).detach())


def test_dynamic_sizes() -> None:
    m = torch.nn.Linear(4, 4)
    compiled = graphopt.compile(m, (torch.randn(3, 4),), dynamic_shapes=({0: B},), backend="eager")
    for n in (2, 9, 64):
        x = torch.randn(n, 4)
        torch.testing.assert_close(compiled(x), m(x).detach())


def test_a_saved_program(tmp_path: Path) -> None:
    m, x = torch.nn.Linear(4, 4).eval(), torch.randn(3, 4)
    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(m, (x,), dynamic_shapes=({0: B},)), file)
    compiled = graphopt.compile(file, backend="eager")
    torch.testing.assert_close(compiled(torch.cat([x, x])), m(torch.cat([x, x])).detach())
    with pytest.raises(UsageError, match="no file"):
        graphopt.compile(tmp_path / "missing.pt2")


def test_the_graph_is_dynamos() -> None:
    """Attention, linear and softmax arrive as the same ops that ``torch.compile`` gives."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.fc(x).view(1, -1, 2, 4).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q).softmax(-1)

    exported = exported_graph(Block(), (torch.randn(5, 8),))
    captured = capture_fx(exported.gm, weights=exported.weights)
    assert {"matmul", "attention", "softmax"} <= {n.op.name for n in captured.graph} and "aten" not in {n.op.name for n in captured.graph}
    x = torch.randn(5, 8)
    assert exported.unflatten(evaluate(captured, exported.flatten((x,), {}))).shape == (1, 2, 5, 4)


def test_a_model_that_cannot_be_exported_is_named_by_its_line() -> None:
    class Bad(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else x + 1

    with pytest.raises(CaptureError, match=r"test_export\.py:\d+.*cannot branch on values.* torch\.compile\("):
        graphopt.compile(Bad(), (torch.randn(3),))


def test_arguments_that_do_not_fit() -> None:
    compiled = graphopt.compile(torch.nn.Linear(4, 4), (torch.randn(3, 4),), backend="eager")
    with pytest.raises(TypeError, match="was given"):
        compiled(torch.randn(3, 4), torch.randn(3))
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        compiled(torch.randn(5, 4))
    with pytest.raises(ValueError, match="float64"):
        compiled(torch.randn(3, 4, dtype=torch.float64))

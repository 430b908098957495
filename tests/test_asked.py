"""What was asked for and came to nothing is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import graphopt


def model(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(256, 128), nn.ReLU()).eval().to(dtype), torch.randn(8, 256, dtype=dtype)


def compiled(dtype: torch.dtype, grad: bool, **options: object) -> str:
    module, x = model(dtype)
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(module, backend="graphopt", options=options)(x)
    return "\n".join(graphopt.reports()[-1].notes)


@pytest.mark.parametrize(
    ("dtype", "grad", "options", "reason"),
    [
        (torch.float32, True, {"quantize": "int8-weight"}, "gradients are recorded: call the model under torch.no_grad()"),
        (torch.bfloat16, False, {"quantize": "int8-dynamic"}, "no product of f32 with a weight was found"),
        (torch.float64, False, {"quantize": "int8-weight"}, "it is f64, only f32 is"),
    ],
)
def test_a_scheme_that_changed_nothing_says_why(dtype: torch.dtype, grad: bool, options: dict[str, object], reason: str) -> None:
    with pytest.warns(UserWarning, match=f"quantize='{options['quantize']}' changed nothing"):
        assert reason in compiled(dtype, grad, **options)


class Products(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.t()


@pytest.mark.parametrize("module", [Products(), nn.Embedding(300, 64)])
def test_a_graph_without_a_weight_to_round_says_nothing(module: nn.Module) -> None:
    x = torch.arange(40) if isinstance(module, nn.Embedding) else torch.randn(8, 256)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        graphopt.compile(module, (x,), quantize="int8-weight", precision="bf16")(x)


def test_precision_that_changed_nothing_says_why() -> None:
    with pytest.warns(UserWarning, match="precision='f16' changed nothing"):
        assert "changed nothing" in compiled(torch.float64, False, precision="f16", target="cpu:x86-64-v3")


def test_nothing_is_said_where_it_was_done_or_there_was_nothing_to_do() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert "changed nothing" not in compiled(torch.float32, False, quantize="int8-weight")
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(lambda x: x.sin() + 1, backend="graphopt", options={"quantize": "int8-weight"})(torch.randn(300))
        assert not graphopt.reports()[-1].notes


def test_a_forgotten_no_grad_is_noted() -> None:
    assert "no weight is frozen" in compiled(torch.float32, True)
    assert not compiled(torch.float32, True, freeze=False) and "frozen" not in compiled(torch.float32, False)


def test_training_mode_is_noted() -> None:
    module, x = model()
    assert not graphopt.compile(module, (x,)).report.notes
    (note,) = graphopt.compile(module.train(), (x,)).report.notes
    assert "training mode" in note and "model.eval()" in note

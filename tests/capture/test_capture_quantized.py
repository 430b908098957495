"""Models that are quantized already: their operators become ``quantize`` and ``dequantize``, with eager's very values."""

from __future__ import annotations

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch import nn

import graphopt
from tests.capture.helpers import check, library_calls

OPS = torch.ops.quantized_decomposed


def test_per_channel() -> None:
    q = torch.randint(-127, 128, (6, 8), dtype=torch.int8)
    scales, zeros = torch.rand(6) + 0.1, torch.tensor([0, 1, -3, 0, 7, 0])

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x @ OPS.dequantize_per_channel(q, scales, zeros, 0, -127, 127, torch.int8).t()

    check(layer, torch.randn(3, 8))


@pytest.mark.parametrize(("dtype", "low", "high", "zero"), [
    (torch.int8, -128, 127, 0), (torch.uint8, 0, 255, 12), (torch.int8, -127, 100, -5),
])  # fmt: skip
def test_per_tensor(dtype: torch.dtype, low: int, high: int, zero: int) -> None:
    """Quantized and dequantized, halves and what is out of range, too."""
    x = torch.cat([torch.randn(100) * 3, torch.tensor([1e9, -1e9, 0.0, 0.125, 0.375, -0.125])])

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = OPS.quantize_per_tensor(x, 0.25, zero, low, high, dtype)
        return q, OPS.dequantize_per_tensor(q, 0.25, zero, low, high, dtype)

    check(both, x)


@pytest.mark.parametrize("scheme", ["int8-weight", "int4-weight-g32-zp", "int2-weight"])
def test_own_layers(scheme: str) -> None:
    made = graphopt.quantize(nn.Linear(70, 40).eval(), scheme=scheme, least=1)
    check(made, torch.randn(3, 70))
    (report,) = graphopt.reports()[-1:]
    assert not library_calls() and "dequantize" in report.text_before

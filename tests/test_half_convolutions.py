"""Convolutions of half precision through the whole compiler on a CPU: no library call where a kernel is, and eager's error at most."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphopt

CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(6, 10, 3, padding=1), (2, 6, 17)),
    "2d": (nn.Conv2d(6, 18, 3, padding=1), (2, 6, 9, 11)),
    "3d": (nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 6, 7)),
    "strided": (nn.Conv2d(6, 18, 3, stride=2, padding=1), (2, 6, 9, 11)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4), (2, 8, 9, 11)),
    "depthwise": (nn.Conv2d(12, 12, 3, padding=1, groups=12), (2, 12, 9, 11)),
    "transposed": (nn.ConvTranspose2d(6, 8, 4, stride=2, padding=1), (2, 6, 7, 5)),
    "transposed, grouped, 1d": (nn.ConvTranspose1d(8, 4, 3, stride=2, groups=2), (2, 8, 7)),
}


def model(name: str, dtype: torch.dtype, bias: bool) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer, shape = CASES[name]
    layer = copy.deepcopy(layer)
    if not bias:
        layer.bias = None
    return nn.Sequential(layer, nn.ReLU()).to(dtype).eval(), torch.randn(shape).to(dtype)


def right(compiled: nn.Module, m: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        reference, eager, ours = copy.deepcopy(m).double()(x.double()), m(x), compiled(x)
    assert ours.dtype == eager.dtype and ours.stride() == eager.stride()
    allowed = float((eager - reference).abs().max()) + torch.finfo(x.dtype).eps * float(reference.abs().max())
    assert float((ours - reference).abs().max()) <= allowed


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float16, True), (torch.float16, False), (torch.bfloat16, False)])
def test_half_convolutions_have_kernels(name: str, dtype: torch.dtype, bias: bool) -> None:
    m, x = model(name, dtype, bias)
    right(graphopt.compile(m, (x,), strict=True), m, x)


@pytest.mark.parametrize("name", CASES)
def test_a_sum_and_its_bias_are_rounded_once(name: str) -> None:
    """Biases cancel a sum each: had it been rounded to f16 before, that rounding would be all that is left."""
    m, x = model(name, torch.float16, bias=True)
    layer = m[0]
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        exact.bias.zero_()
        sums = exact(x.double())
        column = (slice(None), *(size // 2 for size in sums.shape[2:]))
        layer.bias.copy_(0.01 - sums[0][column])  # what is left is positive, and f16 tells it apart
        shape = (-1,) + (1,) * (sums.ndim - 2)
        bias = layer.bias.double().view(shape)
        exact.weight.abs_()
        terms = layer.weight.numel() // layer.bias.numel() + 1
        lost = terms * 2.0**-24 * (exact(x.double().abs()) + bias.abs())  # in sums in f32
        once = torch.relu(sums + bias)
        twice = torch.relu(sums.half().double() + bias)
        ours = graphopt.compile(m, (x,), strict=True)(x)
    allowed = lost + torch.finfo(torch.float16).eps / 2 * once + 2.0**-25
    assert bool(((twice - once).abs() > allowed).any()), "this says nothing"
    assert bool(((ours.double() - once).abs() <= allowed).all())


@pytest.mark.parametrize("name", ["2d", "depthwise", "transposed"])
def test_any_number_of_images(name: str) -> None:
    m, x = model(name, torch.float16, bias=True)
    compiled = graphopt.compile(m, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},), strict=True)
    for count in (2, 3, 5):
        right(compiled, m, torch.randn(count, *x.shape[1:]).to(x.dtype))


def test_bf16_with_a_bias_is_a_reported_library_call() -> None:
    """PyTorch's kernel has units for bf16, and is faster where sums are long."""
    m, x = model("2d", torch.bfloat16, bias=True)
    compiled = graphopt.compile(m, (x,))
    (call,) = compiled.report.fallbacks
    assert call.op == "aten.convolution.default" and call.types.startswith("(bf16")
    right(compiled, m, x)

"""Chains of float arithmetic whose steps read a value several times: building them takes time by their length, not exponentially."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.backends.tvm import scalar
from graphopt.ir import types

pytestmark = pytest.mark.tvm


class Chain(nn.Module):
    def __init__(self, steps: int, product: bool) -> None:
        super().__init__()
        self.steps, self.linear = steps, nn.Linear(96, 64) if product else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        for _ in range(self.steps):
            y = torch.tanh(y * y * 0.5 - y) + y
        return y


class Rounded(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("product", [False, True])
def test_a_long_chain_is_built(dtype: torch.dtype, product: bool) -> None:
    """As calls of the library, which ``strict`` refuses, it would be right as well."""
    torch.manual_seed(0)
    module, x = Chain(6, product).eval().to(dtype), torch.randn(40, 96).to(dtype)
    with torch.no_grad():
        found = graphopt.compile(module, (x,), strict=True)(x).double()
        eager, want = module(x).double(), module.double()(x.double())
    limit = 2 * float((eager - want).norm()) + 1e-7 * float(want.norm())
    assert float((found - want).norm()) <= limit


def test_what_the_analyzer_sees_stays_small() -> None:
    """Names are counted as often as they are read; beyond a thousand nodes a value goes through memory, where it is not looked for."""
    from graphopt.backends.tvm.code import _DEEP, Code

    code = Code({})
    data = code.argument("float32", 4, "data")
    with code.loop(16, "vectorized", "v") as v:
        x = code.bind(code.load(data, v))
        for _ in range(40):
            x = code.bind(scalar.rounded(x, types.bf16) + x)
        code.store(data, v, x)
    assert max(code._nodes.values()) <= _DEEP
    assert 10 < str(code.function("chain")).count("_cell") < 200


@pytest.mark.parametrize("bits", [0x7F800001, 0xFF800001, 0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 1, 0])
def test_a_cast_to_bf16_keeps_what_is_no_number(bits: int) -> None:
    x = torch.tensor([bits - (1 << 32) if bits >> 31 else bits] * 40, dtype=torch.int32).view(torch.float32)
    with torch.no_grad():
        found = graphopt.compile(Rounded(), (x,), strict=True)(x)
    torch.testing.assert_close(found, x.to(torch.bfloat16), equal_nan=True, rtol=0, atol=0)


class Buckets(nn.Module):
    """Relative positions of boxes, in buckets that widen with the distance, as LayoutLMv3 and T5 have them: integers, chosen and chosen
    again."""

    def forward(self, boxes: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        place = boxes[:, :, 0]
        apart = place.unsqueeze(-2) - place.unsqueeze(-1)
        far = apart.abs()
        large = 8 + (torch.log(far.float() / 8) / 2.0 * 8).to(torch.long)
        bucket = (apart > 0).long() * 16 + torch.where(far < 8, far, torch.minimum(large, torch.full_like(large, 15)))
        return bias[bucket * 2 - bucket].permute(0, 3, 1, 2).contiguous()


def test_a_chain_of_integers_is_built() -> None:
    boxes, bias = torch.randint(0, 100, (1, 37, 4), generator=torch.Generator().manual_seed(0)), torch.arange(128.0).reshape(32, 4)
    for dtype in (torch.int64, torch.int32):
        given = boxes.to(dtype)
        with torch.no_grad():
            assert torch.equal(graphopt.compile(Buckets(), (given, bias), strict=True)(given, bias), Buckets()(given, bias))

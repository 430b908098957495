"""Caches of keys and values that the kernel reads as they are: integers of 8 and 4 bits with a scale a token, and pages of a table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import graphopt

# error in the 2-norm, relative to an f32 cache, for keys and values of normal numbers
BUDGET = 0.015
BUDGET_4 = 0.2


def small(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().to(torch.int8), scale


class Step(torch.nn.Module):
    """Attention of one token over a cache of 8-bit integers, heads sharing keys, as a model spells it."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, ks: torch.Tensor, v: torch.Tensor, vs: torch.Tensor) -> torch.Tensor:
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k.to(q.dtype) * ks, v.to(q.dtype) * vs))
        return torch.softmax(q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ values


def test_a_step_over_cached_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 64, generator=generator) for h, n in ((8, 1), (2, 300), (2, 300)))
    (kq, ks), (vq, vs) = small(k), small(v)
    model = Step()
    compiled = graphopt.compile(model, (q, kq, ks, vq, vs))
    found = compiled(q, kq, ks, vq, vs)
    want = model(q.double(), kq, ks.double(), vq, vs.double())
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)  # no other loss than what the integers lost
    whole = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    assert float((found - whole).norm() / whole.norm()) < BUDGET
    assert len(compiled.report.kernels) == 1 and not compiled.report.fallbacks
    assert "decode" in str(compiled.report.kernels[0])


def halves(x: torch.Tensor, stacked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Two integers of 4 bits a byte: neighbours, or those of the two halves of a row."""
    scale = x.abs().amax(-1, keepdim=True) / 7
    q = (x / scale).round().to(torch.int8) + 8
    low, high = (q[..., ::2], q[..., 1::2]) if stacked else q.chunk(2, -1)
    return (low | high << 4).to(torch.uint8), scale


class PackedStep(torch.nn.Module):
    """Attention over a cache of 4-bit integers, two a byte, as models spell it; causal where there are several queries."""

    def __init__(self, spelled: str) -> None:
        super().__init__()
        self.spelled = spelled

    def whole(self, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        low, high = packed & 0xF, packed >> 4
        if self.spelled == "stacked":
            return (torch.stack((low, high), -1).flatten(-2).to(scale.dtype) - 8) * scale
        if self.spelled == "joined":
            return (torch.cat((low, high), -1).to(torch.int8) - 8).to(scale.dtype) * scale
        return torch.cat((low.to(torch.int8) - 8, high.to(torch.int8) - 8), -1).to(scale.dtype) * scale

    def forward(self, q: torch.Tensor, k: torch.Tensor, ks: torch.Tensor, v: torch.Tensor, vs: torch.Tensor) -> torch.Tensor:
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (self.whole(k, ks), self.whole(v, vs)))
        scores = q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
        rows, columns = q.shape[2], k.shape[2]
        mask = torch.arange(columns) <= torch.arange(rows)[:, None] + columns - rows
        return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ values


@pytest.mark.parametrize("spelled", ["stacked", "joined", "each"])
@pytest.mark.parametrize("queries", [1, 70])
def test_a_cache_of_two_integers_a_byte(spelled: str, queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 64, generator=generator) for h, n in ((8, queries), (2, 300), (2, 300)))
    (kq, ks), (vq, vs) = (halves(x, spelled == "stacked") for x in (k, v))
    model = PackedStep(spelled)
    compiled = graphopt.compile(model, (q, kq, ks, vq, vs))
    found = compiled(q, kq, ks, vq, vs)
    want = model(q.double(), kq, ks.double(), vq, vs.double())
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)  # no other loss than what the integers lost
    (kernel,) = compiled.report.kernels
    assert not compiled.report.fallbacks and kernel.kind == "attention" and ("decode" in kernel.schedule) == (queries == 1)
    if queries == 1:
        whole = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
        assert float((found - whole).norm() / whole.norm()) < BUDGET_4


class ManyScales(torch.nn.Module):
    """Attention over integers that all sequences share, with scales that each has for itself."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, ks: torch.Tensor, v: torch.Tensor, vs: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ (k.float() * ks).transpose(-1, -2) * 0.125, -1) @ (v.float() * vs)


@pytest.mark.parametrize("lead", [(1, 2), (2,), (1, 1)])
def test_scales_broadcast_the_integers(lead: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 1, 64, generator=generator)
    k, v = (torch.randint(-127, 128, (*lead, 40, 64), generator=generator, dtype=torch.int8) for _ in range(2))
    ks, vs = (torch.rand(3, 2, 40, 1, generator=generator) * 0.02 for _ in range(2))
    compiled = graphopt.compile(ManyScales(), (q, k, ks, v, vs))
    torch.testing.assert_close(compiled(q, k, ks, v, vs), ManyScales()(q, k, ks, v, vs), rtol=1e-4, atol=1e-5)
    assert not compiled.report.fallbacks


class PagedStep(torch.nn.Module):
    """Attention of one token over a cache of pages ``[page, token, head, element]``, named in order by a table a sequence."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        keys, values = (x[table].flatten(1, 2).transpose(1, 2).repeat_interleave(q.shape[1] // x.shape[2], 1) for x in (k, v))
        return torch.softmax(q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ values


def test_a_step_over_pages() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for shape in ((2, 8, 1, 64), (40, 16, 2, 64), (40, 16, 2, 64)))
    table = torch.randperm(40, generator=generator)[:32].reshape(2, 16)
    model = PagedStep()
    compiled = graphopt.compile(model, (q, k, v, table))
    want = model(q.double(), k.double(), v.double(), table)
    torch.testing.assert_close(compiled(q, k, v, table).double(), want, rtol=1e-5, atol=1e-6)
    (attention,) = (x for x in compiled.report.kernels if x.kind == "attention")
    assert attention.ops.count("take") == 2 and "decode" in attention.schedule and not compiled.report.fallbacks
    assert all(x.ops == ("wrap_index",) for x in compiled.report.kernels if x is not attention)  # of the table: no copy of pages
    with pytest.raises(IndexError, match="out of range"):
        compiled(q, k, v, table + 30)

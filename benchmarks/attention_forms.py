"""Attention that need not look at all pairs: masks of blocks, and no softmax. Eager PyTorch and graphopt, in turns.

    python benchmarks/attention_forms.py [--tokens 8192] [--heads 2] [--runs 5] [--prepare]

``sparse`` is scaled_dot_product_attention with a mask that is a buffer of the model: each block of 64 queries sees the first two blocks
of keys, itself and its neighbours, and three by chance (Zaheer et al., Big Bird, arXiv:2007.14062). ``dense`` is the same without a
mask. ``linear`` is ``phi(q) phi(k)^T v``, divided by the rows' sums, in this order (phi is elu + 1); ``bracketed`` is the same as
``phi(q) (phi(k)^T v)`` in eager PyTorch; ``causal`` is ``linear`` with ``torch.tril`` of the scores. Medians in ms on ``--threads``
threads, f32, heads of 64; results are compared first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import graphopt

BLOCK, SIZE = 64, 64


def pattern(tokens: int) -> torch.Tensor:
    """Which keys each query sees: ``[tokens, tokens]``."""
    n = -(-tokens // BLOCK)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    chance = torch.rand(n, n, generator=torch.Generator().manual_seed(0)).argsort(-1) < 3
    blocks = (j < 2) | ((i - j).abs() <= 1) | chance
    return blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:tokens, :tokens].contiguous()


class Masked(nn.Module):
    """Attention with a mask of its own, or none."""

    mask: torch.Tensor | None

    def __init__(self, mask: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.mask)


class Linear(nn.Module):
    """Attention without a softmax, in either order, or causal."""

    def __init__(self, bracketed: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.bracketed, self.causal = bracketed, causal

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if self.bracketed:
            return (q @ (k.transpose(-1, -2) @ v)) / (q @ k.sum(-2, keepdim=True).transpose(-1, -2))
        scores = torch.tril(q @ k.transpose(-1, -2)) if self.causal else q @ k.transpose(-1, -2)
        return (scores / scores.sum(-1, keepdim=True)) @ v


def medians(calls: dict[str, Callable[[], torch.Tensor]], runs: int) -> dict[str, float]:
    """Milliseconds of each, in turns, after all are seen to give the same."""
    want, *others = (call() for call in calls.values())
    for got in others:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prepare", action="store_true", help="only build the kernels")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    generator = torch.Generator().manual_seed(1)
    x = tuple(torch.randn(1, given.heads, given.tokens, SIZE, generator=generator) for _ in range(3))
    mask = pattern(given.tokens)
    models = {"sparse": Masked(mask), "dense": Masked(None), "linear": Linear(), "causal": Linear(causal=True)}
    with torch.no_grad():
        compiled = {name: graphopt.compile(model, x) for name, model in models.items()}
        if given.prepare:
            return
        print(f"{given.tokens} tokens, {given.heads} heads of {SIZE}; the mask leaves {mask.float().mean():.1%}")
        for name, model in models.items():
            calls = {"eager": lambda model=model: model(*x), "graphopt": lambda name=name: compiled[name](*x)}
            if name == "linear":
                calls["bracketed"] = lambda: Linear(True)(*x)
            print(f"{name:8}" + ", ".join(f"{k} {v:.2f} ms" for k, v in medians(calls, given.runs).items()))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

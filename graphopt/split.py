"""SplitQuant: a weight as the sum of three, each with the elements of one range of values and zeros elsewhere, and each rounded by itself.

    W = W_low + W_middle + W_high        k-means of the weight's elements, three clusters

A range is a part of the whole, so that the few integers of 2 or 4 bits are nearer to each other: those of the middle, where most elements
are, by far. A product with each is summed. That costs three times the bytes: a ledger tells whether fewer of more bits cost less.

Reference: Song and Lin, "SplitQuant: Layer Splitting for Low-Bit Neural Network Quantization", arXiv:2501.12428; SplitQuantV2,
arXiv:2503.07657.
"""

from __future__ import annotations

import torch
from torch import nn

from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantized_linear import QuantizedLinear, called

PARTS = 3
_ROUNDS = 100  # of k-means at most


def ranges(weight: torch.Tensor, parts: int = PARTS) -> torch.Tensor:
    """The limits ``[parts - 1]`` between the clusters of a weight's elements, by k-means from evenly filled ones."""
    values = weight.detach().flatten().double().sort().values
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    ends = torch.tensor([len(values) * i // parts for i in range(parts + 1)])
    for _ in range(_ROUNDS):
        counts = ends.diff()
        centers = torch.where(counts > 0, sums[ends].diff() / counts.clamp_min(1), values[ends[:-1].clamp_max(len(values) - 1)])
        limits = (centers[1:] + centers[:-1]) / 2
        moved = torch.searchsorted(values, limits)
        if torch.equal(moved, ends[1:-1]):
            break
        ends[1:-1] = moved
    return limits.to(weight.dtype)


def split(weight: torch.Tensor, parts: int = PARTS) -> list[torch.Tensor]:
    """Weights of disjoint elements whose sum is the weight, exactly."""
    which = torch.bucketize(weight.detach(), ranges(weight, parts))
    return [torch.where(which == i, weight.detach(), 0.0) for i in range(parts)]


class SplitLinear(nn.Module):
    """The sum of quantized layers that read the same inputs; the first one has the bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scheme: Scheme, name: str = "weight") -> None:
        super().__init__()
        self.scheme, self.in_features, self.out_features = f"{scheme}, in {PARTS} parts", weight.shape[1], weight.shape[0]
        pieces = split(weight)
        self.register_forward_pre_hook(called)
        self.parts = nn.ModuleList(QuantizedLinear.of(w, None if i else bias, scheme, name) for i, w in enumerate(pieces))

    def _layers(self) -> list[QuantizedLinear]:
        return [p for p in self.parts if isinstance(p, QuantizedLinear)]

    @property
    def bias(self) -> torch.Tensor | None:
        return self._layers()[0].bias

    @property
    def weight(self) -> torch.Tensor:
        """The weight ``[out, in]`` in f32, computed anew."""
        return torch.stack([p.weight for p in self._layers()]).sum(0)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as stored."""
        return sum(p.nbytes for p in self._layers())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        first, *others = (p(input) for p in self.parts)
        return sum(others, first)

"""Rounding to the nearest on a narrower grid: what lies outside of a group's range is clipped, where that costs the output less.

    minimize  || X_g (w - q(w; c * range(w)))^T ||^2    over  c = 1, 0.95, ... 0.5,     a group of a row at a time

with X_g the inputs of the group's columns; their products ``X_g^T X_g`` are the blocks on the Hessian's diagonal. A whole range is among
the candidates: by that measure clipping never loses.

Reference: Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978 (their search for a clipping threshold).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from graphopt.gptq import Hessian
from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantized_linear import grid_of, in_groups, off_grid, on_grid, packed_rows

FRACTIONS = tuple(1 - i / 20 for i in range(11))  # of a range


def round_clipped(weight: torch.Tensor, hessian: Hessian, scheme: Scheme,
                  name: str = "weight") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """A weight ``[N, K]`` in the form of :func:`~graphopt.quantized_linear.quantize_groups`.

    Raises:
        UsageError: the weight has elements that are no finite numbers; names it.
    """
    rows = in_groups(weight, scheme, name)
    scales, zeros = grid_of(rows, scheme)
    blocks, least = _blocks(hessian.matrix, rows.shape[1], rows.shape[2]), torch.full_like(scales, float("inf"))
    for fraction in FRACTIONS:
        tried, points = grid_of(rows * fraction, scheme)
        wrong = off_grid(on_grid(rows, tried, points, scheme), tried, points) - rows
        lost = ((wrong.transpose(0, 1) @ blocks).transpose(0, 1) * wrong).sum(-1)
        better = lost < least
        least, scales = torch.where(better, lost, least), torch.where(better, tried, scales)
        if zeros is not None and points is not None:
            zeros = torch.where(better, points, zeros)
    return packed_rows(on_grid(rows, scales, zeros, scheme).flatten(1), scheme, signed=zeros is None), scales, zeros


def _blocks(matrix: torch.Tensor, groups: int, size: int) -> torch.Tensor:
    """The blocks ``[G, g, g]`` on the diagonal, zeros behind the last column."""
    full = functional.pad(matrix, (0, groups * size - len(matrix)) * 2)
    return torch.stack([full[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(groups)])

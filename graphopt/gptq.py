"""GPTQ: columns of a weight are rounded one after the other, and what each lost is made up for by those that follow.

    minimize  ||X (W - Q)^T||^2 :   after rounding column j,   W[:, k] -= (W[:, j] - Q[:, j]) * U[j, k] / U[j, j]   for k > j

with U the upper Cholesky factor of the inverse of ``X^T X``, damped by a hundredth of its mean diagonal. Of few rows much that ``X^T X``
tells is of those rows alone: then several dampings, and rounding to the nearest, are tried on a fourth of the rows, held out. Scales and
zero points of a group are those of its columns as they stand when its first one is reached.

Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323.
"""

from __future__ import annotations

import torch

from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantized_linear import dequantize_groups, grid_of, group_size, in_groups, off_grid, on_grid, packed_rows, quantize_groups

DAMPING = 0.01
DAMPINGS = (0.01, 0.1, 1.0)  # that are tried where rows are few
ENOUGH = 8  # rows a column
OUTPUTS = 64  # of a weight that they are tried on
BLOCK = 128  # columns whose effect on later ones is applied at once


class Hessian:
    """The sum of ``x^T x`` over rows: ``[K, K]`` f32; ``held``, that of each fourth row while rows are few; ``rows``, how many there were.

    Args:
        holds: whether rows are held out at all.
    """

    def __init__(self, columns: int, holds: bool = True) -> None:
        self.matrix, self.rows = torch.zeros(columns, columns), 0
        self.held = torch.zeros(columns, columns) if holds else None

    def see(self, x: torch.Tensor) -> None:
        self.matrix += x.t() @ x
        if self.held is not None:
            fourth = x[-self.rows % 4 :: 4]
            self.held += fourth.t() @ fourth
        self.rows += len(x)
        if not self.few:
            self.held = None  # nobody asks

    @property
    def few(self) -> bool:
        """Whether correlations that were seen may be those of the rows alone."""
        return 0 < self.rows < ENOUGH * len(self.matrix)

    def remark(self) -> str:
        """What people should know of a rounding by it; empty if nothing."""
        if not self.rows or not bool(self.matrix.any()):
            return "to the nearest, as calibration " + ("met nothing but zeros there" if self.rows else "never reached it")
        return f"calibration had {self.rows} rows of {len(self.matrix)} columns" if self.rows < len(self.matrix) else ""

    def inverse_factor(self, damping: float = DAMPING) -> torch.Tensor:
        """The upper Cholesky factor of the damped inverse, f64; columns that are always zero count as independent."""
        h = self.matrix.double()
        diagonal = h.diagonal()
        diagonal[diagonal == 0] = 1.0
        damp = damping * float(diagonal.mean())
        eye = torch.eye(h.shape[0], dtype=torch.float64)
        for _ in range(10):  # more damping until it is positive definite
            factor, info = torch.linalg.cholesky_ex(h + damp * eye)
            if int(info) == 0:
                break
            damp *= 10
        return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)


Rounded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""A weight in the form of :func:`~graphopt.quantized_linear.quantize_groups`."""


def round_weight(weight: torch.Tensor, hessian: Hessian, scheme: Scheme, name: str = "weight") -> Rounded:
    """A weight ``[N, K]``, rounded with the damping that suits its rows; to the nearest, where none does.

    Raises:
        UsageError: the weight has elements that are no finite numbers; names it.
    """
    damping = best_damping(weight, hessian, scheme, name)
    return quantize_groups(weight, scheme, name) if damping is None else round_damped(weight, hessian.inverse_factor(damping), scheme, name)


def best_damping(weight: torch.Tensor, hessian: Hessian, scheme: Scheme, name: str = "weight") -> float | None:
    """The damping by which some outputs of a weight have the least error on held-out rows, the others being looked at; None if rounding
    to the nearest has less. Of rows that are many there is no need to ask."""
    held = hessian.held
    if held is None or not hessian.few:
        return DAMPING if hessian.rows or bool(hessian.matrix.any()) else None
    some = weight.detach()[:: -(-len(weight) // OUTPUTS)]
    seen = Hessian(len(hessian.matrix))
    seen.matrix = hessian.matrix - held

    def lost(parts: Rounded) -> float:
        wrong = dequantize_groups(*parts, scheme.bits, some.shape[1]) - some
        return float(((wrong @ held) * wrong).double().sum())

    errors: dict[float | None, float] = {None: lost(quantize_groups(some, scheme, name))}
    for damping in DAMPINGS if bool((seen.matrix.diagonal() > 0).any()) else ():
        errors[damping] = lost(round_damped(some, seen.inverse_factor(damping), scheme, name))
    best = min(errors, key=lambda d: errors[d])
    return best if errors[best] < errors[None] * (1 - 1 / max(1, hessian.rows // 4)) else None  # a row alone tells nothing


def round_damped(weight: torch.Tensor, factor: torch.Tensor, scheme: Scheme, name: str = "weight") -> Rounded:
    """A weight ``[N, K]`` by the factor of an inverse Hessian."""
    groups = in_groups(weight, scheme, name)
    n, k = weight.shape
    size = group_size(k, scheme)
    w = groups.flatten(1).double()
    q, scales, zeros = torch.zeros_like(w), torch.zeros(groups.shape[:2], dtype=torch.float64), None
    if scheme.zero_points:
        zeros = torch.zeros(groups.shape[:2], dtype=torch.uint8)
    for first in range(0, k, BLOCK):
        last = min(first + BLOCK, k)
        errors = torch.zeros(n, last - first, dtype=torch.float64)
        for j in range(first, last):
            g = j // size
            if j % size == 0:
                found, points = grid_of(w[:, j : j + size], scheme)  # a group that is larger than a block begins where a block does
                scales[:, g] = found
                if zeros is not None and points is not None:
                    zeros[:, g] = points
            points = None if zeros is None else zeros[:, g]
            column = w[:, j : j + 1]
            rounded = on_grid(column, scales[:, g], points, scheme)
            q[:, j] = rounded[:, 0]
            lost = (column - off_grid(rounded, scales[:, g], points)) / factor[j, j]
            w[:, j:last] -= lost * factor[j, j:last]
            errors[:, j - first] = lost[:, 0]
        w[:, last:k] -= errors @ factor[first:last, last:]
    if zeros is not None and q.shape[1] > k:
        q[:, k:] = zeros[:, -1:].double()
    return packed_rows(q.float(), scheme, signed=zeros is None), scales.float(), zeros

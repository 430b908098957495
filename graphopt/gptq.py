"""GPTQ: columns of a weight are rounded one after the other, and what each lost is made up for by those that follow.

    minimize  ||X (W - Q)^T||^2 :   after rounding column j,   W[:, k] -= (W[:, j] - Q[:, j]) * U[j, k] / U[j, j]   for k > j

with U the upper Cholesky factor of the inverse of ``X^T X``, damped by a hundredth of its mean diagonal. Scales and zero points of a
group are those of its columns as they stand when its first one is reached.

Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323.
"""

from __future__ import annotations

import torch

from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantized_linear import grid_of, group_size, in_groups, off_grid, on_grid, packed_rows

DAMPING = 0.01
BLOCK = 128  # columns whose effect on later ones is applied at once


class Hessian:
    """The sum of ``x^T x`` over rows: ``[K, K]`` f32."""

    def __init__(self, columns: int) -> None:
        self.matrix = torch.zeros(columns, columns)

    def see(self, x: torch.Tensor) -> None:
        self.matrix += x.t() @ x

    def inverse_factor(self) -> torch.Tensor:
        """The upper Cholesky factor of the damped inverse, f64; columns that are always zero count as independent."""
        h = self.matrix.double()
        diagonal = h.diagonal()
        diagonal[diagonal == 0] = 1.0
        damp = DAMPING * float(diagonal.mean())
        eye = torch.eye(h.shape[0], dtype=torch.float64)
        for _ in range(10):  # more damping until it is positive definite
            factor, info = torch.linalg.cholesky_ex(h + damp * eye)
            if int(info) == 0:
                break
            damp *= 10
        return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)


def round_weight(weight: torch.Tensor, hessian: Hessian, scheme: Scheme,
                 name: str = "weight") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """A weight ``[N, K]`` in the form of :func:`~graphopt.quantized_linear.quantize_groups`.

    Raises:
        UsageError: the weight has elements that are no finite numbers; names it.
    """
    groups = in_groups(weight, scheme, name)
    n, k = weight.shape
    size = group_size(k, scheme)
    w = groups.flatten(1).double()
    factor = hessian.inverse_factor()
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

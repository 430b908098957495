"""Which scales to move from the inputs of linear layers into their weights: candidates are tried on calibrated rows, and the best kept.

Rows ``x`` and weights are divided and multiplied by ``s`` ``[K]``, both are rounded as the scheme will round them, and ``s`` is that
with the least squared error of the outputs. Moving nothing is among the candidates, and is kept unless another wins by more than
rounding another grid does by chance: where rows have much in common (large means), one error in common to all is most of what is measured,
which the layers behind may make much of.

- SmoothQuant: ``s = max|x|^a / max|w|^(1 - a)``. One strength ``a`` for a model leaves layers behind an activation far from their best:
  a single token in a single channel may be a hundred times as large as the rest. Here each group of layers has a strength of its own.
- AWQ: ``s = mean|x|^a``.

Reference: Xiao et al., "SmoothQuant", arXiv:2211.10438; Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.passes.quantization.quantize_weights import TINY
from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantized_linear import dequantize_groups, largest_of, on_grid, quantize_groups

STRENGTHS = tuple(i / 10 for i in range(3, 11))  # SmoothQuant's alpha
POWERS = tuple(i / 20 for i in range(1, 21))  # AWQ's
SURE = 2.0  # deviations of the difference that chance makes: moving must win by as many
ROWS = 512  # of a layer's inputs that are kept


class Inputs:
    """What calibration keeps of a layer's inputs: each channel's largest and mean magnitude ``[K]``, and rows to try scales on.

    Those rows are held out of ``rest``, the largest magnitudes of all others: scales are chosen by the others, and tried on these, as
    rows to come may be larger than all that were seen. A static range that is full in every channel is left by most of them.

    Args:
        calls: how many there will be.
    """

    def __init__(self, columns: int, calls: int) -> None:
        self.most, self.rest, self._total = torch.zeros(columns), torch.zeros(columns), torch.zeros(columns, dtype=torch.float64)
        self._each, self._count, self._random = -(-ROWS // calls), 0, torch.Generator().manual_seed(0)
        self._held, self._first = list[torch.Tensor](), torch.empty(0)

    def see(self, x: torch.Tensor) -> None:
        """Rows ``[R, K]``, none of which may be there."""
        if not len(x):
            return
        magnitudes = x.abs()
        self.most = torch.maximum(self.most, magnitudes.amax(0))
        self._total += magnitudes.double().sum(0)
        self._count += len(x)
        held = torch.rand(len(x), generator=self._random) < min(0.5, self._each / len(x))
        if bool(held.all()) or sum(map(len, self._held)) >= ROWS:
            held = torch.zeros(len(x), dtype=torch.bool)
        if not bool(held.all()):
            self.rest = torch.maximum(self.rest, magnitudes[~held].amax(0))
        self._held.append(x[held])
        self._first = self._first if len(self._first) else x[:ROWS].clone()

    @property
    def mean(self) -> torch.Tensor:
        return (self._total / max(1, self._count)).float()

    @property
    def rows(self) -> torch.Tensor:
        """Those that are held out; of so few that none is, the first."""
        held = torch.cat(self._held)
        return held if len(held) else self._first


def scales(method: str, inputs: Inputs, weights: Sequence[torch.Tensor], schemes: Sequence[Scheme]) -> torch.Tensor:
    """The best scales ``[K]`` for the weights ``[N, K]`` of a group, each with its scheme; ``method`` is ``smoothquant`` or ``awq``."""

    def made(power: float, most: torch.Tensor) -> torch.Tensor:
        return smoothquant_scales(most, weights, power) if method == "smoothquant" else awq_scales(inputs.mean, power)

    powers = STRENGTHS if method == "smoothquant" else POWERS
    unmoved, products = _error(torch.ones_like(inputs.most), inputs, weights, schemes)
    tried = [made(p, inputs.rest) for p in powers]
    errors = [_error(s, inputs, weights, schemes)[0] for s in tried]
    best = errors.index(min(errors))
    outputs = sum(len(w) for w in weights)
    if not errors[best] < unmoved * (1 - SURE * (4 / _draws(products, outputs)) ** 0.5):
        return torch.ones_like(inputs.most)
    # a static range will be that of all rows; of weights, others than those that were tried would round otherwise
    return made(powers[best], inputs.most) if any(s.activations == "static" for s in schemes) else tried[best]


def _draws(products: torch.Tensor, outputs: int) -> float:
    """How many independent numbers of like size errors are, given their products ``[R, R]`` of rows with rows; where rows are much alike,
    little more than one an output.

    A sum of n squares has the variance ``2 / n`` of its mean squared, the difference of two such sums twice that.
    """
    squares = float(products.square().sum())
    return outputs * float(products.trace()) ** 2 / squares if squares else 1.0


def smoothquant_scales(most: torch.Tensor, weights: Sequence[torch.Tensor], strength: float) -> torch.Tensor:
    """``max|x|^a / max|w|^(1 - a)`` a channel ``[K]``, of the weights ``[N, K]`` of a group; 1 where a channel is silent."""
    w_most = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    s = most.pow(strength) / w_most.clamp_min(TINY).pow(1 - strength)
    return torch.where((most > 0) & (w_most > 0), s, 1.0).clamp(1e-4, 1e4)


def awq_scales(mean: torch.Tensor, power: float) -> torch.Tensor:
    """A power of the mean magnitudes ``[K]``, with 1 in the geometric middle of the least and the greatest."""
    s = torch.where(mean > 0, mean.pow(power), 1.0).clamp_min(1e-4)
    return s / (s.max() * s.min()).sqrt()


def _error(s: torch.Tensor, inputs: Inputs, weights: Sequence[torch.Tensor], schemes: Sequence[Scheme]) -> tuple[float, torch.Tensor]:
    """Squared errors of the outputs, each weight's relative to its outputs' norm, for the rows that are held out; and the products
    ``[R, R]`` of rows of errors with one another, f64."""
    x, lost = inputs.rows, 0.0
    products = torch.zeros(len(x), len(x), dtype=torch.float64)
    for w, scheme in zip(weights, schemes, strict=True):
        q = dequantize_groups(*quantize_groups(w * s, scheme), scheme.bits, w.shape[1])
        y = x @ w.t()
        wrong = _as_rounded(x / s, scheme, float((inputs.rest / s).max())) @ q.t() - y
        wrong /= y.norm().clamp_min(1e-30)
        lost += float(wrong.norm().square())
        products += (wrong @ wrong.t()).double()
    return lost, products


def _as_rounded(x: torch.Tensor, scheme: Scheme, most: float) -> torch.Tensor:
    """Rows as the scheme rounds them, given the largest magnitude of a static range."""
    if not scheme.activations:
        return x
    limit = largest_of(scheme)
    step = ((x.abs().amax(1, keepdim=True) if scheme.activations == "dynamic" else x.new_tensor(most)) / limit).clamp_min(TINY)
    return on_grid((x / step).unsqueeze(1), torch.ones(len(x), 1, dtype=x.dtype), None, scheme).squeeze(1) * step

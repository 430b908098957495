"""Layers that round in floats, as their quantized form will, and pass gradients as if they did not: the modules of a fake quantization.

Reference: Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation",
arXiv:1308.3432 (the straight-through estimator).
"""

from __future__ import annotations

import torch
from torch import nn

from graphopt.linears import is_convolution, replaced, weight_of
from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantized_linear import called, divided, grid_of, largest_of, off_grid, on_grid


class FakeQuantized(nn.Module):
    """A linear layer or a convolution that rounds its weight at each call, and its inputs where the scheme has both factors rounded.

    Gradients pass the rounding unchanged, but not where a static range cuts an input off.

    Args:
        layer: its parameters are those that are trained.
        scheme: as users write it.
        step: the scale of the inputs, where the scheme is static.
    """

    step: torch.Tensor | None

    def __init__(self, layer: nn.Module, scheme: str, step: torch.Tensor | None = None) -> None:
        super().__init__()
        self.layer, self.scheme, self._parsed = layer, scheme, Scheme.parse(scheme)
        self.activations = self._parsed.activations
        self.register_buffer("step", step)
        self.register_forward_pre_hook(called)

    @property
    def weight(self) -> torch.Tensor:
        """The layer's weight, rounded, of its shape."""
        own: torch.Tensor = self.layer.weight  # type: ignore[assignment]
        with torch.no_grad():
            rows = weight_of(self.layer)
            near = rounded(divided(rows.to(torch.float32), self._parsed), self._parsed).flatten(1)[:, : rows.shape[1]]
            near = near.reshape(own.shape) if is_convolution(self.layer) or rows.shape == own.shape else near.t()
        return straight_through(own, near.to(own.dtype))

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's."""
        return self.layer.bias  # type: ignore[return-value]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = self._rounded_inputs(input) if self.activations else input
        return torch.func.functional_call(self.layer, {"weight": self.weight}, (x,))  # type: ignore[no-any-return]

    def _rounded_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Each row, or each image, by the scale of its largest magnitude; or all by ``step``."""
        if self.step is not None:
            most = self.step * largest_of(self._parsed)
            least = -most if self._parsed.storage else -most - self.step
            x = torch.minimum(torch.maximum(x, least.to(x.dtype)), most.to(x.dtype))
        with torch.no_grad():
            rows = x
            if is_convolution(self.layer):
                rows = x.flatten(1) if x.dim() == self.layer.weight.dim() else x.flatten()  # type: ignore[operator, union-attr]
            near = rounded(rows, self._parsed, self.step).reshape(x.shape)
        return straight_through(x, near)


def rounded(rows: torch.Tensor, scheme: Scheme, step: torch.Tensor | None = None) -> torch.Tensor:
    """Elements ``[..., g]`` of groups, to the nearest that the scheme represents, by a scale for each group or by ``step``."""
    scales, zeros = grid_of(rows, scheme) if step is None else (step.to(rows.dtype).expand(rows.shape[:-1]), None)
    return off_grid(on_grid(rows, scales, zeros, scheme), scales, zeros)


def straight_through(x: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """``near``, to the bit where ``x`` is finite; its gradient is ``x``'s."""
    return near.detach() + (x - x.detach())


def without_fakes(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """The model with the layers that were trained in the place of those that round them, and the schemes of these by name.

    The model itself if it has none.
    """
    fakes = {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantized)}
    return replaced(model, {name: m.layer for name, m in fakes.items()}) if fakes else model, {n: m.scheme for n, m in fakes.items()}

"""Training with rounding: a model that rounds in floats as its quantized form will, and passes gradients as if it did not.

References: Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation",
arXiv:1308.3432 (the straight-through estimator); Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphopt.calibration import OBSERVERS, samples_of
from graphopt.errors import UsageError, nearest
from graphopt.linears import is_convolution, layers_of, left_in_float, linears_of, replaced, schemes_of, weight_of
from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantization import LEAST, set_steps
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


def fake_quantize(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *,
                  scheme: str | Mapping[str, str] = "int8-dynamic", calibration: Iterable[Any] | None = None, observer: str = "minmax",
                  keep: Iterable[str] = (), least: int = LEAST) -> nn.Module:  # fmt: skip
    """A model that computes as :func:`graphopt.quantize` would have it, in floats, and can be trained.

    It shares its parameters with ``model``: train the result, then quantize ``model``. Batch norms stay apart from convolutions, as they
    are still learning. Ranges of a static scheme are those of the calibration, and are not trained.

    Args:
        model: stays as it is, but for what training does to its parameters.
        args, kwargs: example inputs; only static schemes without ``calibration`` need them.
        scheme, calibration, observer, keep, least: as of :func:`graphopt.quantize`.

    Raises:
        UsageError: there is no such scheme or observer, a pattern fits nothing, or a static scheme has nothing to calibrate on.
    """
    if observer not in OBSERVERS:
        raise UsageError(f"there is no observer {observer!r}{nearest(str(observer), OBSERVERS)}; observers are {', '.join(OBSERVERS)}")
    schemes = schemes_of(scheme, list(layers_of(model)))
    left = left_in_float(model, schemes, tuple(keep), least)
    layers = layers_of(model)
    made: dict[str, Any] = {n: FakeQuantized(layers[n], str(s)) for n, s in schemes.items() if n not in left}
    if any(m.activations == "static" for m in made.values()):
        linears = layers if any(is_convolution(layers[n]) for n in made) else linears_of(model)
        set_steps(model, linears, made, samples_of(calibration, args, dict(kwargs or {})), observer, lambda *_: None, left)
    return replaced(model, made)

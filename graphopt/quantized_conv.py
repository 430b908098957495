"""Convolutions of 8-bit integers as PyTorch modules, and the operator ``graphopt::integer_conv`` that they call.

In eager the integers are multiplied as floats that hold them exactly; compiled by graphopt, a kernel of integer instructions does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from graphopt.passes.quantization.quantize_weights import TINY
from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantized_linear import EXACT, LIBRARY, quantize_groups

_SIGNATURE = "integer_conv(Tensor x, Tensor integers, Tensor scales, Tensor? step, int[] stride, int[] padding, int[] dilation) -> Tensor"
LIBRARY.define(_SIGNATURE)  # type: ignore[no-untyped-call]


def integer_conv(x: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor, step: torch.Tensor | None, stride: Sequence[int],
                 padding: Sequence[int], dilation: Sequence[int]) -> torch.Tensor:  # fmt: skip
    """A convolution in f32 by integers: images ``[N, C, *S]`` are rounded, the sums are exact, and only then floats are made of them.

    Args:
        integers: i8 ``[O, C, *K]``; ``scales``: ``[O, 1]``.
        step: the scale of ``x``: what is beyond its range becomes the end of that, and nan becomes zero. None for one of each image, whose
            largest magnitude becomes 127; an image that is not finite gives nan.
    """
    n = x.dim() - 2
    most = x.abs().amax(tuple(range(1, n + 2)), keepdim=True)
    s = (most * (1 / 127)).clamp_min(TINY) if step is None else step
    q = torch.round(x * s.reciprocal()).clamp(-128, 127).nan_to_num(0.0)
    held = torch.float32 if integers[0].numel() <= EXACT else torch.float64
    zeros = [0] * n
    total = torch.convolution(q.to(held), integers.to(held), None, list(stride), list(padding), list(dilation), False, zeros, 1)
    return (total.float() * (s.float() * scales.float().reshape(1, -1, *[1] * n))).to(x.dtype)


LIBRARY.impl("integer_conv", integer_conv, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def padding_of(conv: nn.Module) -> tuple[int, ...] | None:
    """Zeros on either side of each axis; None for a convolution that pads otherwise."""
    padding, sizes, dilation = (getattr(conv, name) for name in ("padding", "kernel_size", "dilation"))
    if conv.padding_mode != "zeros":
        return None
    if not isinstance(padding, str):
        return tuple(padding)
    reach = [0 if padding == "valid" else (k - 1) * d for k, d in zip(sizes, dilation, strict=True)]
    return tuple(r // 2 for r in reach) if not any(r % 2 for r in reach) else None


class QuantizedConv(nn.Module):
    """A convolution of one group whose weight and images are 8-bit integers. See :func:`integer_conv` for the buffers.

    Args:
        step: the scale of the images, where the scheme is static.
        like: the layer that it stands for: its strides, padding and dilation.
    """

    integers: torch.Tensor
    scales: torch.Tensor
    step: torch.Tensor | None

    def __init__(self, integers: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, scheme: str, like: nn.Module,
                 step: torch.Tensor | None = None) -> None:  # fmt: skip
        super().__init__()
        self.scheme, self.activations = scheme, Scheme.parse(scheme).activations
        padding = padding_of(like)
        assert padding is not None
        self.stride, self.padding, self.dilation = tuple(like.stride), padding, tuple(like.dilation)  # type: ignore[arg-type]
        self.register_buffer("integers", integers)
        self.register_buffer("scales", scales)
        self.register_buffer("step", step)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)

    @staticmethod
    def of(conv: nn.Module, scheme: Scheme, name: str = "weight") -> QuantizedConv:
        """A layer from a float one, rounded to the nearest, by a scale for each output channel."""
        weight = conv.weight
        assert isinstance(weight, nn.Parameter)
        rows, scales, _ = quantize_groups(weight.flatten(1), scheme, name)
        return QuantizedConv(rows[:, : weight[0].numel()].reshape(weight.shape), scales, conv._parameters["bias"], str(scheme), conv)

    @property
    def weight(self) -> torch.Tensor:
        """The weight ``[O, C, *K]`` in f32, computed anew."""
        return self.integers.float() * self.scales.reshape(-1, *[1] * (self.integers.dim() - 1))

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as stored."""
        return sum(x.nbytes for x in (self.integers, self.scales, self.step) if x is not None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.ndim == self.integers.ndim - 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        where = self.stride, self.padding, self.dilation
        y = torch.ops.graphopt.integer_conv(input, self.integers, self.scales, self.step, *where)
        return y if self.bias is None else y + self.bias.reshape(-1, *[1] * (self.integers.ndim - 2))

    def extra_repr(self) -> str:
        o, c, *kernel = self.integers.shape
        return f"{c}, {o}, kernel_size={tuple(kernel)}, stride={self.stride}, padding={self.padding}, scheme={self.scheme!r}"

"""Quantized linear layers as PyTorch modules: small integers, scales and zero points as buffers, saved and loaded as any others.

In eager the weight is dequantized at each call; compiled by graphopt, the kernel reads the integers. The operators
``graphopt::dequantize_groups`` and, where both factors are integers, ``graphopt::integer_linear`` stand for what happens in between,
so that a captured graph still tells.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from graphopt.errors import UsageError
from graphopt.ir.opset.quantize import LARGEST
from graphopt.passes.quantization.quantize_weights import FLOATS, TINY
from graphopt.passes.quantization.scheme import Scheme

_LIMITS = {d.torch: most for d, most in LARGEST.items()}
EXACT = (1 << 24) // (128 * 128)  # products of 8 bits that f32 sums exactly, in any order

LIBRARY = torch.library.Library("graphopt", "DEF")  # type: ignore[no-untyped-call]
for _signature in (
    "dequantize_groups(Tensor integers, Tensor scales, Tensor? zeros, int bits, int columns) -> Tensor",
    "integer_linear(Tensor x, Tensor integers, Tensor scales, Tensor? step) -> Tensor",
):
    LIBRARY.define(_signature)  # type: ignore[no-untyped-call]


def dequantize_groups(integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, columns: int) -> torch.Tensor:
    """The weight ``[N, K]`` of packed rows.

    Args:
        integers: ``[N, K' * bits / 8]``: i8 or u8 of 8 bits, or floats of 8 bits; of fewer, u8 with several in a byte, the first in the
            lowest bits. Signed unless there are zero points.
        scales: ``[N, G]`` f32, of the G groups of a row's K' elements; ``zeros``: likewise, u8.
        columns: K, at most K'.
    """
    q = integers
    if bits < 8:
        parts = [(integers >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)]
        q = torch.stack(parts, -1).flatten(-2).to(torch.int8)
        if zeros is None:
            q = torch.where(q >= 1 << (bits - 1), q - (1 << bits), q)
    grouped = q.reshape(*scales.shape, -1).to(scales.dtype)
    grouped = grouped if zeros is None else grouped - zeros.unsqueeze(-1).to(scales.dtype)
    return (grouped * scales.unsqueeze(-1)).flatten(-2)[:, :columns].contiguous()


def integer_linear(x: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor, step: torch.Tensor | None) -> torch.Tensor:
    """``x @ w.T`` in f32 by integers: rows ``[..., K]`` are rounded, the product is exact, and only then floats are made of it.

    Args:
        integers: i8, or floats of 8 bits, ``[N, K]``; ``scales``: ``[N, 1]``.
        step: the scale of ``x``; None for one of each row, whose largest magnitude becomes the largest of 8 bits. Rows that are not
            finite give nan either way: integers could not tell.
    """
    most, limit = x.abs().amax(-1, keepdim=True), _LIMITS.get(integers.dtype, 127.0)
    s = (most * (1 / limit)).clamp_min(TINY) if step is None else most * 0.0 + step
    if integers.is_floating_point():
        rounded = (x * s.reciprocal()).clamp(-limit, limit).to(integers.dtype).float()
        return ((rounded @ integers.t().float()) * (s.float() * scales.t().float())).to(x.dtype)
    q = torch.round(x * s.reciprocal()).clamp(-128, 127)
    held = torch.float32 if x.shape[-1] <= EXACT else torch.float64
    return ((q.to(held) @ integers.t().to(held)).float() * (s.float() * scales.t().float())).to(x.dtype)


LIBRARY.impl("dequantize_groups", dequantize_groups, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
LIBRARY.impl("integer_linear", integer_linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def group_size(columns: int, scheme: Scheme) -> int:
    """Columns that share a scale, or all of them, up to whole bytes."""
    return scheme.group or -(-columns // (8 // scheme.bits)) * (8 // scheme.bits)


def largest_of(scheme: Scheme) -> float:
    """The largest magnitude of what a scheme rounds to."""
    return LARGEST[FLOATS[scheme.storage]] if scheme.storage else float((1 << (scheme.bits - 1)) - 1)


def grid_of(rows: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales ``[...]``, and zero points of as many groups ``[..., g]``, so that their extremes are represented."""
    if scheme.zero_points:
        low, high = rows.amin(-1).clamp_max(0), rows.amax(-1).clamp_min(0)
        scales = ((high - low) * (1 / ((1 << scheme.bits) - 1))).clamp_min(TINY)
        return scales, torch.round(-low * scales.reciprocal()).clamp(0, (1 << scheme.bits) - 1).to(torch.uint8)
    return (rows.abs().amax(-1) * (1 / largest_of(scheme))).clamp_min(TINY), None


def on_grid(rows: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """The integers, or floats of 8 bits, as floats, nearest to elements ``[..., g]`` of groups."""
    if scheme.storage:
        most, held = LARGEST[FLOATS[scheme.storage]], FLOATS[scheme.storage].torch
        return (rows * scales.reciprocal().unsqueeze(-1)).clamp(-most, most).to(held).to(rows.dtype)
    q = torch.round(rows * scales.reciprocal().unsqueeze(-1))
    if zeros is not None:
        return (q + zeros.unsqueeze(-1)).clamp(0, (1 << scheme.bits) - 1)
    most = (1 << (scheme.bits - 1)) - 1
    return q.clamp(-most - 1, most)


def off_grid(q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """What integers stand for: inverse of :func:`on_grid`, up to rounding."""
    return (q if zeros is None else q - zeros.unsqueeze(-1).to(q.dtype)) * scales.unsqueeze(-1)


def in_groups(weight: torch.Tensor, scheme: Scheme, name: str = "weight") -> torch.Tensor:
    """A weight ``[N, K]`` as f32 ``[N, G, g]``, zeros behind the last column.

    Raises:
        UsageError: the weight has elements that are no finite numbers; names it.
    """
    w = weight.detach().to(torch.float32)
    if not bool(torch.isfinite(w).all()):
        count = int((~torch.isfinite(w)).sum())
        raise UsageError(f"{name} cannot be quantized: {count} of its {w.numel()} elements are infinite or no numbers")
    return divided(w, scheme)


def divided(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """A weight ``[N, K]`` as ``[N, G, g]``, zeros behind the last column."""
    n, k = weight.shape
    group = group_size(k, scheme)
    groups = -(-k // group)
    return functional.pad(weight, (0, groups * group - k)).reshape(n, groups, group)


def quantize_groups(weight: torch.Tensor, scheme: Scheme, name: str = "weight") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Round a weight ``[N, K]`` to the nearest: what :func:`dequantize_groups` takes, as the pass ``quantize-weights`` computes it.

    Raises:
        UsageError: see :func:`in_groups`.
    """
    rows = in_groups(weight, scheme, name)
    scales, zeros = grid_of(rows, scheme)
    return packed_rows(on_grid(rows, scales, zeros, scheme).flatten(1), scheme, signed=zeros is None), scales, zeros


def packed_rows(q: torch.Tensor, scheme: Scheme, signed: bool) -> torch.Tensor:
    """What :func:`on_grid` gives ``[N, K]``, as it is stored."""
    return q.to(FLOATS[scheme.storage].torch) if scheme.storage else pack_rows(q, scheme.bits, signed)


def pack_rows(q: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    """Integers ``[N, K]`` as bytes ``[N, K * bits / 8]``."""
    if bits == 8:
        return q.to(torch.int8 if signed else torch.uint8)
    parts = (q.to(torch.int32) & ((1 << bits) - 1)).reshape(q.shape[0], -1, 8 // bits)
    shifts = torch.arange(0, 8, bits, device=q.device, dtype=torch.int32)
    return (parts << shifts).sum(-1).to(torch.uint8)


def called(module: nn.Module, inputs: object) -> None:
    """A hook that does nothing. Where a layer has one, PyTorch's own layers (``nn.TransformerEncoderLayer``) call it; else they take its
    weight, and multiply by that as if it were all."""


class QuantizedLinear(nn.Module):
    """``x @ w.T + bias`` with ``w`` stored as small integers. See :func:`dequantize_groups` for the buffers.

    Args:
        integers, scales, zeros: of the weight.
        columns: input features.
        scheme: as users write it.
        step: the scale of the inputs, where the scheme is static.
        smooth: what the inputs' channels ``[K]`` are multiplied by first, the weight having been divided by it.
    """

    integers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    step: torch.Tensor | None
    smooth: torch.Tensor | None

    def __init__(self, integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bias: torch.Tensor | None, columns: int,
                 scheme: str, step: torch.Tensor | None = None, smooth: torch.Tensor | None = None) -> None:  # fmt: skip
        super().__init__()
        parsed = Scheme.parse(scheme)
        self.scheme, self.bits, self.in_features, self.out_features = scheme, parsed.bits, columns, integers.shape[0]
        self.activations = parsed.activations
        self.register_buffer("integers", integers)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("step", step)
        self.register_buffer("smooth", smooth)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        self.register_forward_pre_hook(called)

    @staticmethod
    def of(weight: torch.Tensor, bias: torch.Tensor | None, scheme: Scheme, name: str = "weight") -> QuantizedLinear:
        """A layer from its float weight ``[out, in]``, rounded to the nearest."""
        return QuantizedLinear(*quantize_groups(weight, scheme, name), bias, weight.shape[1], str(scheme))

    @property
    def weight(self) -> torch.Tensor:
        """The weight ``[out, in]`` in f32, computed anew: what ``smooth`` inputs are multiplied by."""
        stored = self.integers, self.scales, self.zeros
        return torch.ops.graphopt.dequantize_groups(*stored, self.bits, self.in_features)  # type: ignore[no-any-return]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as stored."""
        return sum(x.nbytes for x in (self.integers, self.scales, self.zeros, self.step, self.smooth) if x is not None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.ndim == 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        x = input if self.smooth is None else input * self.smooth
        if self.activations:
            y = torch.ops.graphopt.integer_linear(x, self.integers, self.scales, self.step)
            return y if self.bias is None else y + self.bias
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, scheme={self.scheme!r}"

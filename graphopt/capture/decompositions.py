"""Operators that are taken apart while PyTorch traces: where its own tracing gets the layout of the result wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._prims_common import suggest_memory_format
from torch.nn.functional import dropout


def channel_shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Channel i of group g becomes channel g of group i, [N, C, *S]. The layout stays; the operator's fake result is row-major."""
    n, channels, *space = x.shape
    split = x.reshape(n, groups, channels // groups, *space)
    return split.transpose(1, 2).reshape(x.shape).clone(memory_format=suggest_memory_format(x))


def spelled_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """torch.nn.functional.dropout by what it draws."""
    if not training or not 0 < p < 1 or inplace:
        return dropout(x, p, training, inplace)
    return x * (torch.bernoulli(torch.zeros_like(x), 1 - p) / (1 - p))


def spelled_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
                      dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                      enable_gqa: bool = False) -> torch.Tensor:  # fmt: skip
    """scaled_dot_product_attention as its documentation defines it; a row that sees no key gives zeros."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    s = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril() if is_causal else attn_mask
    if seen is not None:
        s = s.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else s + seen
    return spelled_dropout(torch.ops.aten._safe_softmax(s, -1), dropout_p) @ value


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.channel_shuffle.default: channel_shuffle,
    torch.ops.aten.native_channel_shuffle.default: channel_shuffle,
}

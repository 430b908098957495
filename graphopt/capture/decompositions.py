"""Operators that are taken apart while PyTorch traces: where its own tracing gets the layout of the result wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._prims_common import suggest_memory_format


def channel_shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Channel i of group g becomes channel g of group i, [N, C, *S]. The layout stays; the operator's fake result is row-major."""
    n, channels, *space = x.shape
    split = x.reshape(n, groups, channels // groups, *space)
    return split.transpose(1, 2).reshape(x.shape).clone(memory_format=suggest_memory_format(x))


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.channel_shuffle.default: channel_shuffle,
    torch.ops.aten.native_channel_shuffle.default: channel_shuffle,
}

"""Descriptors as a launch makes them of its tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from graphopt.backends.triton.descriptors import ALIGNED


def tensor_map(x: torch.Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int],
               start: int = 0) -> TensorDescriptor:  # fmt: skip
    """Describe where tiles of a tensor lie. One that does not begin where descriptors need it is copied first: what is
    written to it is in the copy (:func:`copy_back`).

    Args:
        shape, strides: of the tensor's memory, in elements; the last stride is 1.
        block: shape of a tile.
        start: the element at which what is described begins.
    """
    if x.data_ptr() % ALIGNED:
        x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    if start:
        x = x.as_strided((1,), (1,), x.storage_offset() + start)
    return TensorDescriptor(x, list(shape), list(strides), list(block))


def copy_back(tiles: TensorDescriptor, x: torch.Tensor) -> None:
    """Where what a kernel wrote is in a copy of a tensor, write it to the tensor itself. For tiles of all of it (``start`` 0)."""
    assert tiles.base.shape == x.shape
    if tiles.base.data_ptr() != x.data_ptr():
        x.copy_(tiles.base)

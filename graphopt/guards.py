"""What a program checks of its inputs: kernels trust dtype, shape, layout and device, and would read other memory otherwise.

Dynamo guards the sizes and layouts of what a user passes, but not those of parameters that are replaced later, and
``graphopt.compile`` has no Dynamo in front.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from graphopt.errors import GraphoptError
from graphopt.ir import dims
from graphopt.ir.graph import Graph, Value


class InputError(GraphoptError, ValueError):
    """An input is not what the program was compiled for."""


class InputGuard:
    """Checks inputs, and brings those in another layout into the one that kernels expect.

    A weight is looked at again only when another tensor, or other storage, arrives in its place.
    """

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self._device = device
        self._values = list(graph.inputs)
        self._specs = [_Spec(v) for v in graph.inputs]
        self._seen: list[tuple[weakref.ref[torch.Tensor], int, tuple[int, ...]] | None] = [None] * len(graph.inputs)
        self._weights = [v.weight for v in graph.inputs]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The inputs, those of an unexpected layout copied. Raises InputError for a wrong dtype, size or device."""
        changed: list[torch.Tensor] | None = None
        for i, x in enumerate(inputs):
            if self._weights[i]:
                seen = self._seen[i]
                if seen is not None and seen[0]() is x and seen[1] == x.data_ptr() and seen[2] == x.stride():
                    continue
            spec = self._specs[i]
            if x.dtype is not spec.dtype or x.device != self._device or not spec.fits(x):
                self._refuse(i, x)
            if not spec.has_layout(x):
                changed = list(inputs) if changed is None else changed
                changed[i] = spec.copy(x)
            elif self._weights[i] and not x.is_inference():
                self._seen[i] = (weakref.ref(x), x.data_ptr(), x.stride())
        return inputs if changed is None else changed

    def _refuse(self, i: int, x: torch.Tensor) -> None:
        v = self._values[i]
        name = v.hint or f"input {i}"
        raise InputError(f"{name} is {x.dtype}{list(x.shape)} on {x.device}; the program was compiled for {v.type} on {self._device}")


class _Spec:
    """Dtype, size and layout of one input."""

    def __init__(self, v: Value) -> None:
        self.dtype = v.dtype.torch
        self.rank = v.type.rank
        self.shape = tuple(d if isinstance(d, int) else None for d in v.shape)
        self.static = torch.Size(v.shape) if v.type.is_static else None  # type: ignore[arg-type]
        strides = v.type.strides
        self.strides = tuple(strides) if strides is not None and dims.is_static(strides) else None
        self.any_layout = strides is not None and self.strides is None  # symbolic strides: the program itself makes it contiguous

    def fits(self, x: torch.Tensor) -> bool:
        if self.static is not None:
            return x.shape == self.static
        return x.dim() == self.rank and all(d is None or d == n for d, n in zip(self.shape, x.shape))

    def has_layout(self, x: torch.Tensor) -> bool:
        if x.is_neg() or x.is_conj():  # the memory holds something else than the values
            return False
        if self.any_layout:
            return True
        if self.strides is None:
            return x.is_contiguous()
        return all(n <= 1 or a == b for n, a, b in zip(x.shape, x.stride(), self.strides)) or x.numel() == 0

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        x = x.resolve_neg().resolve_conj()
        if self.strides is None:
            return x.contiguous()
        out = torch.empty_strided(x.shape, self.strides, dtype=x.dtype, device=x.device)  # type: ignore[arg-type]
        return out.copy_(x)

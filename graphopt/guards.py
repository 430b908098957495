"""What a program checks of its inputs: kernels trust dtype, shape, layout and device, and would read other memory otherwise.

Dynamo guards the sizes and layouts of what a user passes, but not those of parameters that are replaced later, and
``graphopt.compile`` has no Dynamo in front.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch

from graphopt.errors import GraphoptError
from graphopt.ir import dims
from graphopt.ir.graph import Value

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # a PyTorch without them: every call is checked attribute by attribute
    TensorGuards = None  # type: ignore[assignment, misc]


class InputError(GraphoptError, ValueError):
    """An input is not what the program was compiled for."""


def alike(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """A check whether others are exactly like these tensors, in whatever a kernel could trust: class, dtype, device, sizes, strides, views
    that conjugate or negate; and in more: requires_grad, the thread's modes, that none is given twice.

    It is native code, a few tenths of a microsecond, and says False to anything that is no tensor. None where it is not to be had, for no
    tensors, and for those that are not strided or of other classes than PyTorch's two. The tensors are not kept.
    """
    if TensorGuards is None or not tensors or any(type(x) not in (torch.Tensor, torch.nn.Parameter) for x in tensors):
        return None
    if any(x.is_nested or x.layout is not torch.strided for x in tensors):
        return None
    sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
    native = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check  # type: ignore[arg-type]

    def check(*given: Any) -> bool:
        try:  # the native code ends the process when it asks a nested tensor for its strides
            return not any(map(_is_nested, given)) and native(*given)
        except AttributeError:
            return False

    return check


_is_nested = attrgetter("is_nested")


class Known:
    """Tensors that were right are the measure of the next ones; those that are unlike, and right, of the ones after that, a few times."""

    def __init__(self) -> None:
        self.check: Callable[..., bool] = lambda *given: False
        self._left = 4  # a model whose sizes change with every call must not learn with every call

    def learn(self, tensors: Sequence[torch.Tensor]) -> None:
        """These were right."""
        if self._left and (check := alike(tensors)) is not None:
            self.check = check
            self._left -= 1


class InputGuard:
    """Checks inputs, and brings those in another layout into the one that kernels expect.

    Args:
        values: the graph's inputs to look at, by position.
    """

    def __init__(self, values: Mapping[int, Value], device: torch.device) -> None:
        self._device = device
        self._specs = [(i, _Spec(v)) for i, v in values.items()]
        self._values = dict(values)
        self._static = bool(values) and all(v.type.is_static for v in values.values())
        few = tuple(values)  # one, or none: a program of weights and sizes only
        self._pick = itemgetter(*values) if len(few) > 1 else lambda inputs: tuple(inputs[i] for i in few)
        self._known = Known()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The inputs, those of an unexpected layout copied. Raises InputError for a wrong dtype, size or device."""
        if self._known.check(*self._pick(inputs)):
            return inputs
        misplaced = self.check(inputs)
        if self._static and not misplaced:
            self._known.learn(self._pick(inputs))
        return self.in_layout(inputs, misplaced)

    def check(self, inputs: Sequence[torch.Tensor]) -> Misplaced:
        """The inputs that have another layout. Raises InputError for a wrong dtype, size or device."""
        misplaced: Misplaced = []
        for i, spec in self._specs:
            x = inputs[i]
            if x.dtype is not spec.dtype or x.device != self._device or not spec.fits(x):
                self._refuse(i, x)
            if not spec.has_layout(x):
                misplaced.append((i, spec))
        return misplaced

    def in_layout(self, inputs: Sequence[torch.Tensor], misplaced: Misplaced) -> Sequence[torch.Tensor]:
        """The inputs, with those that :meth:`check` found copied into the layout that kernels expect."""
        if not misplaced:
            return inputs
        changed = list(inputs)
        for i, spec in misplaced:
            changed[i] = spec.copy(changed[i])
        return changed

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


Misplaced = list[tuple[int, _Spec]]
"""Inputs in another layout than kernels expect, by position."""

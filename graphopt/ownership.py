"""Weights that a compiled model took over: what stands in their place in the module, and how they leave it.

Packing makes a second copy of a weight. Under ``own_weights=True`` the first one is let go as soon as the second exists, and
the module holds a :class:`GivenUp` in its place: it still tells its shape and dtype, and says what happened when its values
are asked for.
"""

from __future__ import annotations

import ctypes
import gc
import linecache
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from graphopt.errors import GraphoptError

# fmt: off
_METADATA = frozenset([
    "shape", "dtype", "device", "layout", "ndim", "is_leaf", "requires_grad", "requires_grad_", "grad", "grad_fn", "size", "dim", "numel",
    "nelement", "element_size", "itemsize", "nbytes", "stride", "is_contiguous", "is_floating_point", "is_complex", "is_sparse", "is_meta",
    "is_quantized", "is_cuda", "is_cpu", "names", "__hash__", "_backward_hooks",
])
# fmt: on


class OwnershipError(GraphoptError, RuntimeError):
    """The values of a weight were asked for that a compiled model has taken over."""


class GivenUp(torch.nn.Parameter):
    """In the place of a weight that a compiled model took over: shape and dtype, and no memory."""

    _weight = "a weight"
    _owner = "a compiled model"

    @staticmethod
    def of(weight: torch.Tensor, name: str, owner: str) -> GivenUp:
        """What stands for a weight.

        Args:
            weight: only its form is looked at.
            name, owner: for the error's text.
        """
        made = GivenUp(torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta"), requires_grad=False)
        made._weight, made._owner = name, owner
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"GivenUp({self._weight}: {self.dtype}{list(self.shape)}, owned by {self._owner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> GivenUp:
        raise OwnershipError(_message(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise OwnershipError(_message(self))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **dict(kwargs or {}))
        found = next((x for x in _leaves(args, kwargs) if isinstance(x, GivenUp)), None)
        raise OwnershipError(_message(found))


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> list[Any]:
    return list(torch.utils._pytree.tree_leaves((args, dict(kwargs or {}))))


def _message(weight: GivenUp | None) -> str:
    name, owner = (weight._weight, weight._owner) if weight is not None else ("a weight", "a compiled model")
    return (
        f"{name} was given up to {owner}, which was compiled with own_weights=True: its values exist only in packed form. Call the "
        "compiled model, save the state_dict before compiling, or compile without own_weights"
    )


def replace_everywhere(modules: Sequence[torch.nn.Module], weight: torch.Tensor, stand_in: torch.nn.Parameter) -> None:
    """Put something else in the place of a weight, under all of the names that it has (tied weights)."""
    for module in modules:
        for table in (module._parameters, module._buffers):
            for key, x in table.items():
                if x is weight:
                    table[key] = stand_in


def refuse_loading(modules: Sequence[torch.nn.Module]) -> None:
    """Have these modules say what happened where a state_dict is to be copied into weights that they have no more.

    Under ``assign=True`` nothing is copied: a module gets weights of its own again.
    """
    for module in modules:
        if any(isinstance(x, GivenUp) for _, x in _named(module)):
            module.register_load_state_dict_pre_hook(_refuse_loading)  # type: ignore[no-untyped-call]


def _refuse_loading(module: torch.nn.Module, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
    if metadata.get("assign_to_params_buffers"):
        return
    for name, x in _named(module):
        if isinstance(x, GivenUp) and prefix + name in state_dict:
            raise OwnershipError(
                f"{x!r} cannot be loaded: the compiled model holds it in packed form, and will not follow. Load the state_dict into a "
                "fresh model and compile that, or load it with assign=True: the module then has weights of its own, the compiled "
                "model stays as it is"
            )


def _named(module: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    return chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))


def give_back_memory() -> None:
    """Let the allocator hand freed memory back to the system, where it can (glibc).

    The lines of source files, some MiB of them, that Python holds since torch.export wrote down where operations come from, go first:
    whoever wants to see one reads the file again. What has no file, a notebook's cell for instance, stays.
    """
    for name, entry in list(linecache.cache.items()):
        if len(entry) == 4 and entry[1] is not None:  # the time of a file
            linecache.cache.pop(name, None)
    gc.collect()
    if sys.platform.startswith("linux"):
        trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

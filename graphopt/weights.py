"""Staged values at run time: computed from the weights once, kept, and computed again when a weight has changed.

A weight counts as changed when another tensor object arrives in its place, when its storage moved (``p.data = ...``) or
is seen in other sizes or strides (``p.data = p.data.t()``), or when its version counter advanced (any in-place operation,
``load_state_dict``). Writing in place through ``p.data`` or NumPy leaves none of these traces; on the CPU a few words
of every weight are compared as well, which shows every write to a whole tensor. A write to a few elements alone,
through ``p.data`` or NumPy, can go unseen: call :meth:`StagedValues.forget` (``refresh()`` of the compiled model) after
that.

All of this is looked at on every call, so it is done in bulk: one loop in C an aspect, not one loop in Python a weight.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # a PyTorch without it: sizes and strides are compared one by one
    TensorGuards = None  # type: ignore[assignment, misc]

_ALIVE: weakref.WeakSet[StagedValues] = weakref.WeakSet()
_PROBES = 4  # words compared a weight, spread over the tensor
_MOST_ENTRIES = 64  # one entry a set of weights: layers that share one compiled graph alternate between their sets
_version = attrgetter("_version")
_pointer = torch.Tensor.data_ptr

ChangedWords = Callable[[int, int, int], int]
"""(addresses, words, n): whether any of the n 8-byte addresses holds another 32-bit word than the one in ``words``."""


class Admit(Protocol):
    """Checks weights that arrive for the first time; raises for one that the program cannot take."""

    def __call__(self, weights: Sequence[torch.Tensor]) -> object: ...


class Probes:
    """A few words of CPU tensors, as they were when this was made.

    Args:
        changed: compares all of them in native code; None to do it here.
    """

    def __init__(self, weights: Sequence[torch.Tensor], changed: ChangedWords | None) -> None:
        addresses = [a for w in weights for a in _addresses(w)]
        self._changed, self._n = changed, len(addresses)
        self._at = (ctypes.c_uint64 * self._n)(*addresses)
        self._probes = [ctypes.c_uint32.from_address(a) for a in addresses]
        self._seen = (ctypes.c_uint32 * self._n)(*(p.value for p in self._probes))
        self._words = list(self._seen)
        self._places = ctypes.addressof(self._at), ctypes.addressof(self._seen)

    def hold(self) -> bool:
        """Whether no word has changed. The tensors must be alive, and where they were."""
        if self._changed is not None:
            return not self._changed(*self._places, self._n)
        return [p.value for p in self._probes] == self._words


def _addresses(w: torch.Tensor) -> list[int]:
    """Where to look into a CPU tensor: addresses of 4-byte words within a few elements, spread evenly."""
    if w.device.type != "cpu" or w.numel() == 0 or w.layout is not torch.strided:
        return []
    storage = w.untyped_storage()
    if storage.nbytes() < 4:
        return []
    last = storage.data_ptr() + storage.nbytes() - 4
    out = []
    for index in range(0, w.numel(), max(1, -(-w.numel() // _PROBES))):
        offset = 0
        for size, stride in zip(reversed(w.shape), reversed(w.stride()), strict=True):
            index, at = divmod(index, size)
            offset += at * stride
        at = w.data_ptr() + offset * w.element_size()
        words = (at, at + 4) if w.element_size() >= 8 else (at,)
        out += [min(word, last) & ~3 for word in words]
    return out


class Values(list[torch.Tensor]):
    """Staged values of one state of the weights. ``made``: what programs made for it; it goes when the values do."""

    def __init__(self, values: Iterable[torch.Tensor] = ()) -> None:
        super().__init__(values)
        self.made: dict[object, Any] = {}


class _Entry:
    """One set of weights: the state that it was in, and the staged values of that state.

    Args:
        weights: those that values are staged from come first; ``staged`` is their number.
        admitted: what ``admit`` returned for them.
    """

    def __init__(self, weights: Sequence[torch.Tensor], staged: int, values: list[torch.Tensor], admitted: object,
                 changed: ChangedWords | None) -> None:  # fmt: skip
        self.values, self.admitted = Values(values), admitted
        self._staged = staged
        self._ids = [*map(id, weights)]
        self._died: list[object] = []  # the callbacks must not refer to this entry, or it would be freed by the garbage collector alone
        self._refs = [weakref.ref(w, self._died.append) for w in weights]  # so that an id cannot come to mean another tensor
        self._pointers = [*map(_pointer, weights)]
        self._versions = [*map(_version, weights[:staged])]
        self._forms = _forms(weights)
        self._fast = self._fast_forms(weights)
        self._probes = Probes(weights[:staged], changed)

    @property
    def dead(self) -> bool:
        return bool(self._died)

    def same_tensors(self, weights: Sequence[torch.Tensor]) -> bool:
        return not self._died and [*map(id, weights)] == self._ids

    def is_current(self, weights: Sequence[torch.Tensor]) -> bool:
        if self._died or [*map(id, weights)] != self._ids or [*map(_pointer, weights)] != self._pointers:
            return False
        if [*map(_version, weights[: self._staged])] != self._versions or not self._same_forms(weights):
            return False
        return self._probes.hold()  # only now: the addresses are known to be valid

    def _fast_forms(self, weights: Sequence[torch.Tensor]) -> Any:
        """Compares sizes, strides, dtypes and devices of all weights at once; what it sees depends on PyTorch's modes."""
        if TensorGuards is None or not weights:
            return None
        return TensorGuards(*weights, dynamic_dims_sizes=None, dynamic_dims_strides=None).check

    def _same_forms(self, weights: Sequence[torch.Tensor]) -> bool:
        if self._fast is not None and self._fast(*weights):
            return True
        if _forms(weights) != self._forms:
            return False
        self._fast = self._fast_forms(weights)  # for the mode of this call
        return True


def _forms(weights: Sequence[torch.Tensor]) -> list[tuple[object, ...]]:
    return [(w.shape, w.stride(), w.dtype, w.device) for w in weights]


class StagedValues:
    """Keeps staged values true to their weights.

    Args:
        compute: from the weights that it reads to the staged values.
        read: how many of the weights ``compute`` reads: the first ones.
        admit: checks a set of weights when it arrives for the first time, and again when one of them is another; what
            it returns is kept with the set.
        changed: compares words in native code, see :class:`Probes`.
    """

    def __init__(self, compute: Callable[[list[torch.Tensor]], list[torch.Tensor]], read: int, admit: Admit,
                 changed: ChangedWords | None = None) -> None:  # fmt: skip
        self._compute, self._read, self._admit, self._changed = compute, read, admit, changed
        self._entries: list[_Entry] = []  # most recently used first
        self._lock = threading.Lock()
        self.computed = 0
        _ALIVE.add(self)

    def get(self, weights: Sequence[torch.Tensor]) -> tuple[Values, Any]:
        """The values for these weights in their present state, and what ``admit`` said of the weights."""
        entries = self._entries
        if entries and entries[0].is_current(weights):
            return entries[0].values, entries[0].admitted
        return self._find_or_compute(weights)

    def forget(self) -> None:
        """Compute everything again at the next call."""
        with self._lock:
            self._entries = []

    def _find_or_compute(self, weights: Sequence[torch.Tensor]) -> tuple[Values, Any]:
        read = weights[: self._read]
        if any(w.is_inference() for w in read):  # no version counter: a change could not be seen, so nothing is kept
            admitted = self._admit(weights)
            self.computed += 1
            return Values(self._compute(list(read))), admitted
        with self._lock:
            kept = [e for e in self._entries if not e.dead]
            for e in kept:
                if e.same_tensors(weights):
                    kept.remove(e)
                    if not e.is_current(weights):
                        break
                    self._entries = [e, *kept]
                    return e.values, e.admitted
            admitted = self._admit(weights)
            self._entries = kept  # what is stale is let go before its successor is made
            self.computed += bool(self._read)
            with torch.no_grad():
                entry = _Entry(weights, self._read, self._compute(list(read)), admitted, self._changed)
            self._entries = [entry, *kept][:_MOST_ENTRIES]
            return entry.values, admitted


def refresh() -> None:
    """Let every compiled model of this process compute what it folded from weights again, at its next call.

    Needed only after writing to a few elements of a weight through ``.data`` or NumPy, which leaves no trace to be seen.
    """
    for staged in list(_ALIVE):
        staged.forget()

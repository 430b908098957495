"""Staged values at run time: computed from the weights once, kept, and computed again when a weight has changed.

A weight counts as changed when another tensor object arrives in its place, when its storage moved (``p.data = ...``) or
is seen in other strides (``p.data = p.data.t()``), or when its version counter advanced (any in-place operation,
``load_state_dict``). Writing in place through ``p.data`` or NumPy leaves none of these traces; on the CPU a few words
of every weight are compared as well, which shows every write to a whole tensor. A write to a few elements alone,
through ``p.data`` or NumPy, can go unseen: call :meth:`StagedValues.forget` (``refresh()`` of the compiled model) after
that.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

_ALIVE: weakref.WeakSet[StagedValues] = weakref.WeakSet()
_PROBES = 4  # words compared a weight: spread over the tensor, 50 ns each
_MOST_ENTRIES = 64  # one entry a set of weights: layers that share one compiled graph alternate between their sets


class _Entry:
    """Staged values of one set of weights."""

    __slots__ = ("pointers", "probes", "refs", "seen", "strides", "values", "versions")

    def __init__(self, weights: Sequence[torch.Tensor], values: list[torch.Tensor]) -> None:
        self.refs = [weakref.ref(w) for w in weights]
        self.pointers = [w.data_ptr() for w in weights]
        self.versions = [w._version for w in weights]
        self.strides = [w.stride() for w in weights]
        self.values = values
        self.probes = [probe for w in weights for probe in _probes(w)]
        self.seen = [p.value for p in self.probes]

    def same_tensors(self, weights: Sequence[torch.Tensor]) -> bool:
        return all(r() is w for r, w in zip(self.refs, weights))

    def is_current(self, weights: Sequence[torch.Tensor]) -> bool:
        for r, p, v, s, w in zip(self.refs, self.pointers, self.versions, self.strides, weights):
            if r() is not w or w._version != v or w.data_ptr() != p or w.stride() != s:
                return False
        return [p.value for p in self.probes] == self.seen  # only now: the pointers are known to be alive


def _probes(w: torch.Tensor) -> list[Any]:
    """A few elements of a CPU tensor, spread evenly, as integers that read its memory."""
    if w.device.type != "cpu" or w.numel() == 0 or w.layout is not torch.strided:
        return []
    flat = range(0, w.numel(), max(1, -(-w.numel() // _PROBES)))
    out = []
    for index in flat:
        offset = 0
        for size, stride in zip(reversed(w.shape), reversed(w.stride()), strict=True):
            index, at = divmod(index, size)
            offset += at * stride
        address = w.data_ptr() + offset * w.element_size()
        word = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32}.get(w.element_size(), ctypes.c_uint64)
        out.append(word.from_address(address))
    return out


class StagedValues:
    """Keeps staged values true to their weights.

    Args:
        compute: from the weights to the staged values.
    """

    def __init__(self, compute: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]) -> None:
        self._compute = compute
        self._entries: list[_Entry] = []  # most recently used first
        self._lock = threading.Lock()
        self.computed = 0
        _ALIVE.add(self)

    def get(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The values for these weights, in their present state."""
        entries = self._entries
        if entries and entries[0].is_current(weights):
            return entries[0].values
        return self._find_or_compute(weights)

    def forget(self) -> None:
        """Compute everything again at the next call."""
        with self._lock:
            self._entries = []

    def _find_or_compute(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if any(w.is_inference() for w in weights):  # no version counter: a change could not be seen, so nothing is kept
            self.computed += 1
            return self._compute(weights)
        with self._lock:
            kept = [e for e in self._entries if not any(r() is None for r in e.refs)]
            for e in kept:
                if e.same_tensors(weights):
                    kept.remove(e)
                    if not e.is_current(weights):
                        break
                    self._entries = [e, *kept]
                    return e.values
            self.computed += 1
            with torch.no_grad():
                entry = _Entry(weights, self._compute(weights))
            self._entries = [entry, *kept][:_MOST_ENTRIES]
            return entry.values


def refresh() -> None:
    """Let every compiled model of this process compute what it folded from weights again, at its next call.

    Needed only after writing to a few elements of a weight through ``.data`` or NumPy, which leaves no trace to be seen.
    """
    for staged in list(_ALIVE):
        staged.forget()

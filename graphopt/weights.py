"""Staged values at run time: computed from the weights once, kept, and computed again when a weight has changed.

A weight counts as changed when another tensor object arrives in its place, when its storage moved (``p.data = ...``), or
when its version counter advanced (any in-place operation, ``load_state_dict``). Writing through ``p.data`` in place or
through NumPy leaves none of these traces: call :meth:`StagedValues.forget` (``CompiledModel.refresh()``) after that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence

import torch

_MOST_ENTRIES = 64  # one entry a set of weights: layers that share one compiled graph alternate between their sets


class _Entry:
    """Staged values of one set of weights."""

    __slots__ = ("pointers", "refs", "values", "versions")

    def __init__(self, weights: Sequence[torch.Tensor], values: list[torch.Tensor]) -> None:
        self.refs = [weakref.ref(w) for w in weights]
        self.pointers = [w.data_ptr() for w in weights]
        self.versions = [w._version for w in weights]
        self.values = values

    def same_tensors(self, weights: Sequence[torch.Tensor]) -> bool:
        return all(r() is w for r, w in zip(self.refs, weights))

    def is_current(self, weights: Sequence[torch.Tensor]) -> bool:
        for r, p, v, w in zip(self.refs, self.pointers, self.versions, weights):
            if r() is not w or w._version != v or w.data_ptr() != p:
                return False
        return True


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

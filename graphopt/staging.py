"""Computing the staged values of a program: by library calls, letting go of everything as soon as it is not needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.ir.graph import Node, Value
from graphopt.lower import Lowered
from graphopt.pages import Pages
from graphopt.program_writer import Call

Release = Callable[[int], None]
"""Told the position of a weight whose memory nothing refers to any more."""


def staged_weights(lowered: Lowered) -> list[Value]:
    """The inputs that staged values are computed from, in order."""
    used = dict.fromkeys(v for node in lowered.staged for v in node.operands)
    return [v for v in lowered.graph.inputs if v in used]


class StagedCompute:
    """Computes the staged values that a program uses; contiguous where a kernel reads them.

    Args:
        wanted: staged values, and whether in row-major memory.
        library: makes the call of a node.

    Attributes:
        pages: where the next values come to lie, if a place was got ready for them; empty if not.
    """

    def __init__(self, lowered: Lowered, wanted: Sequence[tuple[Value, bool]], library: Callable[[Node], Call]) -> None:
        self.weights = staged_weights(lowered)
        self.pages: list[Pages] = []
        self._calls = [(node, library(node)) for node in lowered.staged]
        self._wanted: dict[Value, list[tuple[int, bool]]] = {}
        self._count = len(wanted)
        for i, (v, contiguous) in enumerate(wanted):
            self._wanted.setdefault(v, []).append((i, contiguous))
        last: dict[Value, int] = {}
        for i, node in enumerate(lowered.staged):
            last.update(dict.fromkeys((*node.results, *node.operands), i))
        self._done: list[list[Value]] = [[] for _ in lowered.staged]  # the values that no later node reads
        for v, i in last.items():
            self._done[i].append(v)

    def __call__(self, weights: list[torch.Tensor], release: Release | None = None) -> list[torch.Tensor]:
        """The wanted values, in order.

        Args:
            weights: one tensor a weight of :attr:`weights`.
            release: called as soon as neither a wanted value nor a later node refers to the memory of a weight; that of
                one which a wanted value is a view of is kept. ``weights`` is emptied, so that nothing here keeps them.
        """
        try:
            pages = self.pages.pop()
        except IndexError:  # as every time but the first
            pages = Pages()
        out: list[Any] = [None] * self._count
        env: dict[Value, torch.Tensor] = dict(zip(self.weights, weights, strict=True))
        held = Counter(map(_memory, weights))
        places: dict[int, list[int]] = {}
        for i, memory in enumerate(map(_memory, weights)):
            places.setdefault(memory, []).append(i)
        if release is not None:
            weights.clear()
        for (node, call), done in zip(self._calls, self._done, strict=True):
            results = call([env[v] for v in node.operands], {})
            for v, x in zip(node.results, results, strict=True):
                wanted = self._wanted.get(v, ())
                plain = pages.contiguous(x) if any(contiguous for _, contiguous in wanted) else x
                for i, contiguous in wanted:
                    out[i] = plain if contiguous else x
                    held[_memory(out[i])] += 1
                if wanted and all(contiguous for _, contiguous in wanted):
                    x = plain  # later nodes read it from there, too
                del plain
                env[v] = x
                held[_memory(x)] += 1
            del results
            for v in done:
                memory = _memory(env.pop(v))
                held[memory] -= 1
                if release is not None and not held[memory]:
                    for i in places.pop(memory, ()):
                        release(i)
        pages.end()
        return out


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()

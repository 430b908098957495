"""Reading the values of a graph's symbols from the inputs of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from graphopt.ir import dims
from graphopt.ir.graph import Graph
from graphopt.ir.interpreter import bind_symbols


class SizeReader:
    """Where each symbol can be read is found once; equations are only solved for symbols that are nowhere a size by themselves."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._bare: dict[str, tuple[int, int]] = {}  # symbol -> input and axis
        for i, v in enumerate(graph.inputs):
            for axis, d in enumerate(v.shape):
                if not isinstance(d, int) and d.is_Symbol:
                    self._bare.setdefault(d.name, (i, axis))
        self._wanted = list(graph.symbols)
        self._derived = [s for s in dims.free_symbols([d for v in graph.inputs for d in v.shape]) if s not in self._bare]

    def __call__(self, inputs: Sequence[torch.Tensor], known: Mapping[str, int] | None = None) -> dict[str, int]:
        """Values of the symbols.

        Args:
            inputs: one tensor an input of the graph.
            known: values given from outside; they are not read again.

        Raises:
            GraphoptError: a size that has to be solved for disagrees with its equation.
        """
        bound = dict(known or {})
        if not self._wanted:
            return bound
        for s, (i, axis) in self._bare.items():
            if s not in bound:
                bound[s] = inputs[i].shape[axis]
        if any(s not in bound for s in self._derived):
            return bind_symbols(self._graph, [x.shape for x in inputs], bound)
        return bound

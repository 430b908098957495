"""The values of a graph's symbols: reading them from the inputs of a call, and which ones calls may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from graphopt.bounds import INDEXED
from graphopt.guards import InputError
from graphopt.ir import dims
from graphopt.ir.dims import Range
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


def accepted(graph: Graph) -> dict[str, Range]:
    """Which values of its symbols a program takes.

    torch.export takes a size to be 2 or more, and lets a call pass 0 or 1 all the same: so does this, but for sizes of
    axes that are cut or indexed, where elements that do not exist would be read.
    """
    cut = _cut_sizes(graph)
    return {s: r if r.lo > 2 or s in cut else Range(0, r.hi) for s, r in graph.symbols.items()}


def refuse(graph: Graph, inputs: Sequence[torch.Tensor]) -> None:
    """Raises InputError for inputs whose sizes are not what the program takes; says what it does."""
    shown = [i for i, v in enumerate(graph.inputs) if not all(isinstance(d, int) for d in v.shape)]
    given = ", ".join(f"{graph.inputs[i].hint or i}: {list(inputs[i].shape)}" for i in shown)
    wanted = ", ".join(f"{graph.inputs[i].hint or i}: {graph.inputs[i].type}" for i in shown)
    spans = [f"{f'{r.lo} <= ' if r.lo > 0 else ''}{s}{'' if r.hi is None else f' <= {r.hi}'}"
             for s, r in accepted(graph).items() if r.lo > 0 or r.hi is not None]  # fmt: skip
    where = f" where {', '.join(spans)}" if spans else ""
    raise InputError(f"the sizes ({given}) do not fit the program, which was compiled for ({wanted}){where}")


def _cut_sizes(graph: Graph) -> list[str]:
    """The symbols in sizes of axes that are sliced, indexed or padded."""
    found: list[dims.Dim] = []
    for node in graph.nodes():
        if node.body is not None:
            found += [dims.symbol(s) for s in _cut_sizes(node.body)]
        elif node.op.name in ("slice", *INDEXED):
            found.append(node.operands[0].shape[node.attrs["axis"]])
        elif node.op.name == "pad":
            found += node.operands[0].shape
    return dims.free_symbols(found)

"""PyTorch's own kernels for a workload, as one more candidate: a call for each of its operations, as eager would make them.

What depends on weights alone (the packing that a kernel undoes by how it reads) is computed before anything is timed, as a program
does that takes such a candidate.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from graphopt.autotune.measure import Builder, Built
from graphopt.autotune.space import Rule, Schedule, SearchSpace, Workload
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.interpreter import evaluate_node
from graphopt.ir.ops import EvalContext

TEMPLATE = "library"
SUFFIX = ".library"  # of files that say which workload a kernel is of
KINDS = ("matmul", "conv")  # what libraries are good at: the rest is as fast as memory, or worse where it is several calls


def library_space(w: Workload) -> SearchSpace | None:
    """The space of one schedule, PyTorch's kernels; None for a workload that is not left to them.

    So are products of weights that are held in fewer bits than they are multiplied in: the library would be handed wide ones, made once,
    and the memory that the narrow ones save is what they are for.
    """
    factors = [v for n in w.graph.nodes() if n.op.name in KINDS for v in n.operands[:2]]
    narrow = any(v.type.rank > 1 and v.dtype.bits < f.dtype.bits and not v.dtype.is_bool for v in w.graph.inputs for f in factors)
    strided = any(s is not None for s in w.graph.output_strides)  # the library chooses the strides of what it returns
    if not factors or narrow or strided:
        return None
    return SearchSpace(TEMPLATE, rules={"default": (Rule.LIBRARY,)})


class LibraryKernel:
    """PyTorch's kernels behind the interface of a built kernel: ``kernel(*operands, *outputs, *sizes)``.

    Args:
        weights: positions of the operands that do not change between two calls.
        device: where tensors without operands are made.
    """

    def __init__(self, graph: Graph, weights: Sequence[int] = (), device: torch.device | str = "cpu") -> None:
        self._graph, self._weights, self._device = graph, tuple(weights), device
        self._before, self._nodes = _divided(graph, self._weights)
        self._symbols = sorted(graph.symbols)
        self._prepared: dict[tuple[int, ...], dict[Value, torch.Tensor]] = {}

    def prepare(self, args: Sequence[Any]) -> None:
        """Compute what depends on weights alone, for calls with the weights of this one."""
        key = self._key(args)
        if key not in self._prepared:
            fixed = {self._graph.inputs[i]: args[i] for i in self._weights}
            self._prepared[key] = _run(self._before, fixed, self._context(args))

    def compute(self, *args: Any) -> list[torch.Tensor]:
        """The results of a call, in memory that PyTorch gives. What lies in ``outputs`` is left alone."""
        self.prepare(args)
        values = dict(zip(self._graph.inputs, args, strict=False))
        values.update(self._prepared[self._key(args)])
        _run(self._nodes, values, self._context(args))
        return [values[v] for v in self._graph.outputs]

    def __call__(self, *args: Any) -> None:
        inputs = len(self._graph.inputs)
        results = self.compute(*args)
        for out, x in zip(args[inputs : inputs + len(results)], results, strict=True):
            out.copy_(x)

    def _key(self, args: Sequence[Any]) -> tuple[int, ...]:
        return tuple(args[i].data_ptr() for i in self._weights)

    def _context(self, args: Sequence[Any]) -> EvalContext:
        sizes = args[len(self._graph.inputs) + len(self._graph.outputs) :]
        return EvalContext(dict(zip(self._symbols, sizes, strict=True)), device=self._device)


def load_library_kernel(path: Path, weights: Sequence[int], device: torch.device | str) -> LibraryKernel:
    """The kernel of a file that :class:`LibraryBuilder` wrote."""
    said = json.loads(path.read_text())
    return LibraryKernel(Workload(said["kind"], said["text"]).graph, weights, device)


class LibraryBuilder:
    """Adds what :func:`library_space` has to what another builder builds.

    Args:
        folder: where files are written.
    """

    def __init__(self, others: Builder, folder: Path) -> None:
        self._others, self._folder = others, folder

    def build(self, w: Workload, schedules: Sequence[Schedule]) -> list[Built]:
        others = [s for s in schedules if s.template != TEMPLATE]
        built = dict(zip(others, self._others.build(w, others) if others else (), strict=True))
        for s in schedules:
            if s.template == TEMPLATE:
                path = self._folder / f"{w.key}{SUFFIX}"
                path.write_text(json.dumps({"kind": w.kind, "text": w.text}))
                built[s] = Built(s, str(path), TEMPLATE)
        return [built[s] for s in schedules]


def _divided(graph: Graph, weights: Sequence[int]) -> tuple[list[Node], list[Node]]:
    """Nodes that depend on weights alone, and the others."""
    fixed = dict.fromkeys(graph.inputs[i] for i in weights)
    before, rest = [], []
    for node in graph.nodes():
        if all(v in fixed for v in node.operands):
            fixed.update(dict.fromkeys(node.results))
            before.append(node)
        else:
            rest.append(node)
    return before, rest


def _run(nodes: Sequence[Node], values: dict[Value, torch.Tensor], ctx: EvalContext) -> dict[Value, torch.Tensor]:
    """The values, with those of the nodes among them."""
    for node in nodes:
        values.update(zip(node.results, evaluate_node(node, [values[v] for v in node.operands], ctx), strict=True))
    return values

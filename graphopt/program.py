"""The program: straight-line Python over kernels, views and library calls, with planned memory.

The text of the program is generated (:mod:`graphopt.program_writer`), kept in the report, and compiled once; a run does
nothing that could be done before.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphopt.guards import InputGuard
from graphopt.ir import dims
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.interpreter import bind_symbols
from graphopt.lower import Lowered
from graphopt.program_writer import Call, KernelFunction, ProgramWriter
from graphopt.weights import StagedValues

_CALL = re.compile(r"^(.*?\b)([kL]\d+)\(", re.MULTILINE)  # of a kernel or the library; at most one a line


class Program:
    """A compiled graph: ``program(inputs, sizes) -> outputs``.

    Safe for concurrent and re-entrant calls: each call takes an arena of its own from a pool. Outputs are fresh memory.

    Args:
        lowered: steps and staged nodes.
        kernels: one loaded kernel a KernelStep, in order.
        library: makes the call of a node that PyTorch runs.
        device: where buffers live.

    Attributes:
        source: the generated text.
        plan: the arena's plan; None when no buffer has a static size.
        graph: what the program computes.
        calls: the steps that the text calls kernels or the library for, in order.
    """

    def __init__(self, lowered: Lowered, kernels: Sequence[KernelFunction], library: Callable[[Node], Call], device: torch.device) -> None:
        self.device = device
        self.graph = lowered.graph
        writer = ProgramWriter(lowered, kernels, library, device)
        self.source = writer.write()
        self.plan, self.calls = writer.plan, writer.calls
        self._layout = writer.arena
        self._buffers = writer.buffers
        self._arenas: list[list[torch.Tensor]] = []
        self._weights = [v.index for v in staged_weights(lowered)]
        self.staged = StagedValues(_StagedCompute(lowered, writer.staged, library)) if writer.staged else None
        self._guard = InputGuard(lowered.graph, device) if kernels else None
        self._symbols = bool(lowered.graph.symbols)
        self._namespace = writer.namespace
        self._run = self._compiled(self.source, self._namespace)

    def _compiled(self, source: str, namespace: Mapping[str, Any]) -> Callable[..., list[torch.Tensor]]:
        names = dict(namespace)
        exec(compile(source, f"<graphopt program {self.graph.name}>", "exec"), names)
        run: Callable[..., list[torch.Tensor]] = names["program"]
        return run

    def wrapped(self, wrap: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Program:
        """The same program over the same memory, each call of a kernel or the library made through a wrapper.

        Args:
            wrap: (position in ``calls``, what is called) -> what to call in its place.
        """
        namespace, count = dict(self._namespace), itertools.count()

        def renamed(match: re.Match[str]) -> str:
            i = next(count)
            namespace[f"call{i}"] = wrap(i, self._namespace[match[2]])
            return f"{match[1]}call{i}("

        twin = copy.copy(self)
        twin._run = self._compiled(_CALL.sub(renamed, self.source), namespace)
        return twin

    def __call__(self, inputs: Sequence[torch.Tensor], sizes: Mapping[str, int] | None = None) -> list[torch.Tensor]:
        """Run.

        Args:
            inputs: one tensor an input of the graph.
            sizes: values of symbols; those that an input has as a size of its own may be left out.

        Raises:
            InputError: an input has not the dtype, the sizes or the device that the program was compiled for.
        """
        if self._guard is not None:
            inputs = self._guard(inputs)
        staged: Sequence[torch.Tensor] = ()
        if self.staged is not None:
            staged = self.staged.get([inputs[i] for i in self._weights])
        bound = bind_symbols_fast(self.graph, inputs, sizes) if self._symbols else {}
        arena = self._arenas.pop() if self._arenas else self._make_arena()
        try:
            return self._run(inputs, staged, arena, bound)
        finally:
            self._arenas.append(arena)

    def _make_arena(self) -> list[torch.Tensor]:
        if self.plan is None:
            return []
        memory = torch.empty(self.plan.peak, dtype=torch.uint8, device=self.device)
        out = []
        for place, dtype in self._layout:
            start = self.plan.offsets[place.buffer]
            flat = memory[start : start + self._buffers[place.buffer]].view(dtype)
            out.append(flat.as_strided(place.shape, place.strides, flat.storage_offset() + place.offset))
        return out


def bind_symbols_fast(graph: Graph, inputs: Sequence[torch.Tensor], sizes: Mapping[str, int] | None) -> dict[str, int]:
    """Values of the graph's symbols; only solves equations when a symbol is given neither by name nor as a bare size."""
    bound = dict(sizes or {})
    if all(s in bound for s in graph.symbols):
        return bound
    for v, x in zip(graph.inputs, inputs):
        for i, d in enumerate(v.shape):
            if not isinstance(d, int) and d.is_Symbol and d.name not in bound:
                bound[d.name] = x.shape[i]
    if all(s in bound for s in graph.symbols):
        return bound
    used = dims.free_symbols([d for v in graph.inputs for d in v.shape])
    return bind_symbols(graph, [x.shape for x in inputs], bound) if any(s not in bound for s in used) else bound


def staged_weights(lowered: Lowered) -> list[Value]:
    """The inputs that staged values are computed from, in order."""
    used = dict.fromkeys(v for node in lowered.staged for v in node.operands)
    return [v for v in lowered.graph.inputs if v in used]


class _StagedCompute:
    """Computes the staged values that a program uses, by library calls; contiguous where a kernel reads them."""

    def __init__(self, lowered: Lowered, wanted: Sequence[tuple[Value, bool]], library: Callable[[Node], Call]) -> None:
        self._inputs = staged_weights(lowered)
        self._calls = [(node, library(node)) for node in lowered.staged]
        self._wanted = wanted

    def __call__(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        env: dict[Value, torch.Tensor] = dict(zip(self._inputs, weights, strict=True))
        for node, call in self._calls:
            env.update(zip(node.results, call([env[v] for v in node.operands], {}), strict=True))
        return [env[v].contiguous() if contiguous else env[v] for v, contiguous in self._wanted]



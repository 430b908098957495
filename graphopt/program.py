"""The program: straight-line Python over kernels, views and library calls, with planned memory.

The text of the program is generated (:mod:`graphopt.program_writer`), kept in the report, and compiled once; a run does
nothing that could be done before.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch

from graphopt.guards import InputGuard, Misplaced
from graphopt.ir.graph import Node
from graphopt.lower import Lowered
from graphopt.program_writer import Call, KernelFunction, ProgramWriter
from graphopt.sizes import SizeReader
from graphopt.staging import Release, StagedCompute
from graphopt.weights import ChangedWords, StagedValues

_CALL = re.compile(r"^(.*?\b)([kL]\d+)\(", re.MULTILINE)  # of a kernel or the library; at most one a line


class Program:
    """A compiled graph: ``program(inputs, sizes) -> outputs``.

    Safe for concurrent and re-entrant calls: each call takes an arena of its own from a pool. Outputs are fresh memory.

    Args:
        lowered: steps and staged nodes.
        kernels: one loaded kernel a KernelStep, in order.
        library: makes the call of a node that PyTorch runs.
        device: where buffers live.
        changed_words: compares words of weights in native code; None to do it in Python.

    Attributes:
        source: the generated text.
        plan: the arena's plan; None when no buffer has a static size.
        graph: what the program computes.
        calls: the steps that the text calls kernels or the library for, in order.
        staged: what is computed from weights once; None where the program reads no weights.
        read_sizes: values of the graph's symbols from a call's inputs.
    """

    def __init__(self, lowered: Lowered, kernels: Sequence[KernelFunction], library: Callable[[Node], Call], device: torch.device,
                 changed_words: ChangedWords | None = None) -> None:  # fmt: skip
        self.device = device
        graph = self.graph = lowered.graph
        writer = ProgramWriter(lowered, kernels, library, device)
        self.source = writer.write()
        self.plan, self.calls = writer.plan, writer.calls
        self._layout = writer.arena
        self._buffers = writer.buffers
        self._arenas: list[list[torch.Tensor]] = []
        self._compute = StagedCompute(lowered, writer.staged, library)
        read = [v.index for v in self._compute.weights]
        used = dict.fromkeys(v for node in (*(step.node for step in lowered.steps), graph.ret) for v in node.operands)
        direct = [v.index for v in graph.inputs if v.weight and v in used]
        self._guard: InputGuard | None = None
        self._weights = read
        self._direct = dict.fromkeys(direct)
        if kernels:  # library calls look at their operands themselves; kernels trust them
            self._guard = InputGuard({i: v for i, v in enumerate(graph.inputs) if not v.weight}, device)
            self._weights = [*read, *(i for i in direct if i not in read)]
        self._weight_guard = InputGuard({k: graph.inputs[i] for k, i in enumerate(self._weights)} if kernels else {}, device)
        self._pick = _picker(self._weights)
        keeps = bool(self._weights or writer.staged)
        self.staged = StagedValues(self._compute, len(read), self._admit, changed_words) if keeps else None
        self._owned: list[torch.Tensor] | None = None
        self.read_sizes = SizeReader(graph)
        self._symbols = bool(graph.symbols)
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
            inputs: one tensor an input of the graph; anything in the place of a weight that :meth:`own_weights` gave up.
            sizes: values of all symbols; None to read them from the inputs.

        Raises:
            InputError: an input has not the dtype, the sizes or the device that the program was compiled for.
        """
        staged: Sequence[torch.Tensor] = ()
        if self._owned is not None:
            staged = self._owned
        elif self.staged is not None:
            staged, misplaced = self.staged.get(self._pick(inputs))
            if misplaced:
                inputs = self._weight_guard.in_layout(inputs, misplaced)
        if self._guard is not None:
            inputs = self._guard(inputs)
        if sizes is None:
            sizes = self.read_sizes(inputs) if self._symbols else {}
        torch.get_num_threads()  # in a new thread, the call that makes OpenMP's number of threads PyTorch's
        arena = self._arenas.pop() if self._arenas else self._make_arena()
        try:
            return self._run(inputs, staged, arena, sizes)
        finally:
            self._arenas.append(arena)

    @property
    def weight_inputs(self) -> list[int]:
        """Positions of the inputs that are weights and are read."""
        return list(self._weights)

    def own_weights(self, weights: list[torch.Tensor], release: Release) -> dict[int, torch.Tensor]:
        """Compute what is staged for good: from now on no weight is watched, and those that were only staged are let go.

        Args:
            weights: the tensors of :attr:`weight_inputs`; emptied.
            release: told the input's position of each weight whose memory nothing here refers to any more, at once.

        Returns:
            Input's position -> what calls have to hand in there, for the weights that the program itself reads.

        Raises:
            InputError: a weight is not what the program was compiled for.
        """
        misplaced = self._admit(weights)
        kept = {i: w for i, w in zip(self._weights, weights, strict=True) if i in self._direct}
        for i, spec in misplaced:
            kept[i] = spec.copy(kept[i])
        memory = [w.untyped_storage().data_ptr() for w in weights]
        busy = dict.fromkeys(w.untyped_storage().data_ptr() for w in kept.values())
        read = weights[: len(self._compute.weights)]
        weights.clear()

        def gone(k: int) -> None:
            if memory[k] not in busy:
                release(self._weights[k])

        with torch.no_grad():
            self._owned = self._compute(read, gone)
        return kept

    @property
    def owned_bytes(self) -> int | None:
        """Bytes of the staged values; None before :meth:`own_weights`."""
        return None if self._owned is None else sum(x.untyped_storage().nbytes() for x in self._owned)

    def _admit(self, weights: Sequence[torch.Tensor]) -> Misplaced:
        """Check the weights; those in another layout than kernels expect, by input position."""
        return [(self._weights[k], spec) for k, spec in self._weight_guard.check(weights) if self._weights[k] in self._direct]

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


def _picker(positions: Sequence[int]) -> Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]:
    """Takes the tensors at these positions."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda inputs: [inputs[i] for i in positions]



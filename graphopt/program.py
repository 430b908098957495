"""The program: straight-line Python over kernels, views and library calls, with planned memory.

The text of the program is generated (:mod:`graphopt.program_writer`), kept in the report, and compiled once; a run does
nothing that could be done before.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from graphopt.graphed import Graphed
from graphopt.guards import InputGuard
from graphopt.index_flags import IndexFlags, Look
from graphopt.ir.graph import Node
from graphopt.lower import KernelStep, Lowered
from graphopt.pages import uninitialized
from graphopt.program_weights import ProgramWeights, picker
from graphopt.program_writer import Call, ProgramWriter
from graphopt.sizes import SizeReader
from graphopt.tape import KernelFunction, Native, Tapes
from graphopt.weights import ChangedWords, StagedValues, Values

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
        native: makes calls of kernels that follow one another in one go; None to make each from Python.
        look: looks through indices without waiting for what it finds; None to look at each before a kernel reads by it.

    Attributes:
        source: the generated text, call by call.
        plan: the arena's plan; None when no buffer has a static size.
        graph: what the program computes.
        calls: the steps that the text calls kernels or the library for, in order.
        written: positions of the inputs whose memory a run updates in place.
        weights: the weights that are read, and what is staged from them.
        read_sizes: values of the graph's symbols from a call's inputs.
        graphed: records calls and replays them; None to make each.
        flags: what checks of indices found that nobody waits for; None where there are no such checks.
    """

    def __init__(self, lowered: Lowered, kernels: Sequence[KernelFunction], library: Callable[[Node], Call], device: torch.device,
                 changed_words: ChangedWords | None = None, native: Native | None = None, look: Look | None = None) -> None:  # fmt: skip
        self.device = device
        graph = self.graph = lowered.graph
        writer = ProgramWriter(lowered, kernels, library, device, numbered=look is not None)
        self.source = writer.write()
        self.plan, self.calls = writer.plan, writer.calls
        self.written = tuple(dict.fromkeys(lowered.in_place.values()))
        self._layout = writer.arena
        self._buffers = writer.buffers
        self._arenas = Arenas(partial(torch.cuda.current_stream, device) if device.type == "cuda" else None)
        used = dict.fromkeys(v for node in (*(step.node for step in lowered.steps), graph.ret) for v in node.operands)
        direct = [v.index for v in graph.inputs if v.weight and v in used]
        self.weights = ProgramWeights(lowered, writer.staged, direct, bool(kernels), library, device, changed_words)
        self._mine: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]] | None = None  # of the staged values; None: all
        self._guard: InputGuard | None = None
        self.graphed: Graphed | None = None
        self.flags: IndexFlags | None = None
        if look is not None and writer.checks:
            self.flags = IndexFlags(look, writer.checks, device, late=device.type != "cpu")
            writer.namespace["check_index"] = self.flags.checking(look)
        if kernels:
            self._guard = InputGuard({i: v for i, v in enumerate(graph.inputs) if not v.weight}, device)
        self.read_sizes = SizeReader(graph)
        self._symbols = bool(graph.symbols)
        self._namespace = writer.namespace
        self._run = self._compiled(self.source, self._namespace)
        self._native, self._joined = native, writer.joined() if native is not None else None
        self._run_joined: Callable[..., list[torch.Tensor]] | None = None
        if native is not None and self._joined is not None:
            self._run_joined = self._compiled(self._joined.source, {**self._namespace, "run": native.run})

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
        twin._run_joined = twin.graphed = None
        twin._run = self._compiled(_CALL.sub(renamed, self.source), namespace)
        return twin

    def alone(self, kernel: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[..., list[torch.Tensor]]:
        """The program over an arena of its own, for one call at a time: ``run(inputs, staged, sizes)``, inputs in the right layout.

        Args:
            kernel: a kernel -> what to call in its place.
        """
        twin = copy.copy(self)
        if self.flags is not None:
            twin._namespace = {**self._namespace, "check_index": self.flags.checking(kernel(self.flags.look))}
        twin = twin.wrapped(lambda i, call: kernel(call) if isinstance(self.calls[i], KernelStep) else call)
        tensors = self._make_arena().tensors
        return lambda inputs, staged, sizes: twin._run(inputs, staged, tensors, sizes)

    def _on_gpu(self, values: Values | None, inputs: Sequence[torch.Tensor], staged: Sequence[torch.Tensor], sizes: Mapping[str, int],
                ) -> list[torch.Tensor]:  # fmt: skip
        """Run on inputs in the right layout, by a recording or call by call. ``values``: None where weights were copied for this call."""
        if self.flags is not None:
            self.flags.raise_found()
        outputs = None if self.graphed is None else self.graphed(values, inputs, staged, sizes)
        if outputs is None:
            free = self._arenas.free()
            arena = free.pop() if free else self._make_arena()
            try:
                outputs = self._run(inputs, staged, arena.tensors, sizes)
            finally:
                free.append(arena)
        if self.flags is not None:
            self.flags.fetch()
            self.flags.raise_found()
        return outputs

    @property
    def guarded(self) -> bool:
        """Whether inputs are checked to be what was compiled for."""
        return self._guard is not None

    def __call__(self, inputs: Sequence[torch.Tensor], sizes: Mapping[str, int] | None = None) -> list[torch.Tensor]:
        """Run.

        Args:
            inputs: one tensor an input of the graph; anything in the place of a weight that was given up.
            sizes: values of all symbols; None to read them from the inputs.

        Raises:
            InputError: an input has not the dtype, the sizes or the device that the program was compiled for.
        """
        values, placed = self.weights(inputs)
        staged = values if self._mine is None else self._mine(values)
        lasting = placed is inputs  # copies of weights, for this call alone, lie elsewhere each time
        run = self._run_joined if lasting else None
        inputs = placed
        if self._guard is not None:
            inputs = self._guard(inputs)
        if sizes is None:
            sizes = self.read_sizes(inputs) if self._symbols else {}
        if self.graphed is not None or self.flags is not None:
            return self._on_gpu(values if lasting else None, inputs, staged, sizes)
        torch.get_num_threads()  # in a new thread, the call that makes OpenMP's number of threads PyTorch's
        free = self._arenas.free()
        arena = free.pop() if free else self._make_arena()
        try:
            if run is None or self._joined is None:
                return self._run(inputs, staged, arena.tensors, sizes)
            table = values.made.get(self._joined)
            if table is None:
                table = values.made[self._joined] = self._joined.table(staged, inputs)
            return run(inputs, staged, arena.tensors, sizes, arena.tapes.addresses, table.address)
        finally:
            free.append(arena)

    @property
    def staged(self) -> StagedValues | None:
        """What is computed from weights once; None where no weights are read."""
        return self.weights.staged

    def _make_arena(self) -> _Arena:
        tensors = []
        if self.plan is not None:
            peak = self.plan.peak
            memory = uninitialized(peak) if self.device.type == "cpu" else torch.empty(peak, dtype=torch.uint8, device=self.device)
            for place, dtype in self._layout:
                start = self.plan.offsets[place.buffer]
                flat = memory[start : start + self._buffers[place.buffer]].view(dtype)
                tensors.append(flat.as_strided(place.shape, place.strides, flat.storage_offset() + place.offset))
        joined, native = self._joined, self._native
        return _Arena(tensors, Tapes([]) if joined is None or native is None else joined.tapes(tensors, native))


class _Arena(NamedTuple):
    """The memory of one call at a time, and the tapes of the kernels' calls that work on it."""

    tensors: list[torch.Tensor]
    tapes: Tapes


class Arenas:
    """Arenas that no call has at the moment.

    Args:
        stream: the current one; where kernels go on when a call has returned, the next call of another stream must not have its arena.
            None where they do not.
    """

    def __init__(self, stream: Callable[[], Any] | None = None) -> None:
        self._stream = stream
        self._all: list[_Arena] = []
        self._of: dict[Any, list[_Arena]] = {}

    def free(self) -> list[_Arena]:
        """Those that a call may take from the end of, and has to put back to."""
        return self._all if self._stream is None else self._of.setdefault(self._stream(), [])


def share_weights(programs: Sequence[Program]) -> None:
    """Let programs over the same inputs keep what they stage from weights together, each value once."""
    weights, order = ProgramWeights.shared([p.weights for p in programs])
    for p, mine in zip(programs, order, strict=True):
        p.weights, p._mine = weights, picker(mine)

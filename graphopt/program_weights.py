"""The weights of a program, and of its variants: what is staged from them, and that they are what kernels expect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch

from graphopt.exact import Widened, is_bf16
from graphopt.guards import InputGuard, Misplaced
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.printer import format_attr
from graphopt.lower import Lowered
from graphopt.pages import Pages
from graphopt.program_writer import Call
from graphopt.staging import Release, StagedCompute
from graphopt.weights import ChangedWords, StagedValues, Values

Wanted = Sequence[tuple[Value, bool]]
"""Staged values that a program reads, and whether in row-major memory."""


class ProgramWeights:
    """Staged values kept true to their weights, or computed for good once :meth:`own` has been called.

    Args:
        lowered: whose staged nodes and weights these are.
        direct: positions of the weights that steps read as they are.
        kernels: whether kernels are among the steps: library calls look at their operands themselves, kernels trust them.

    Attributes:
        positions: of the inputs that are weights and are read.
        staged: what is computed from weights once; None where no weights are read.
        owned: the staged values, once they are computed for good.
    """

    def __init__(self, lowered: Lowered, wanted: Wanted, direct: Sequence[int], kernels: bool, library: Callable[[Node], Call],
                 device: torch.device, changed_words: ChangedWords | None = None) -> None:  # fmt: skip
        self._made_from = lowered, wanted, direct, kernels, library, device, changed_words
        inputs = lowered.graph.inputs
        self._compute = StagedCompute(lowered, wanted, library)
        read = [v.index for v in self._compute.weights]
        self._direct = dict.fromkeys(direct)
        self.positions = [*read, *(i for i in direct if i not in read)] if kernels else read
        self._inputs = inputs
        self._exact = [k for k, i in enumerate(self.positions) if inputs[i].exact is not None]
        self._guard = InputGuard({k: inputs[i] for k, i in enumerate(self.positions)} if kernels else {}, device)
        self._pick = picker(self.positions)
        keeps = bool(self.positions or wanted)
        self.staged = StagedValues(self._compute, len(read), self._admit, changed_words) if keeps else None
        self.owned: Values | None = None
        self._none = Values()
        self._kept: list[torch.Tensor] = []  # weights that are read as they are, once this owns them

    def __call__(self, inputs: Sequence[torch.Tensor]) -> tuple[Values, Sequence[torch.Tensor]]:
        """The staged values of a call, and its inputs, with the weights in the layout that kernels expect.

        The values are the same object as long as all weights lie where they lay, unless the inputs are not the ones given.
        """
        if self.owned is not None:
            return self.owned, inputs
        if self.staged is None:
            return self._none, inputs
        staged, misplaced = self.staged.get(self._pick(inputs))
        return staged, self._guard.in_layout(inputs, misplaced) if misplaced else inputs

    def own(self, weights: list[torch.Tensor], release: Release) -> dict[int, torch.Tensor]:
        """Compute what is staged for good: from now on no weight is watched, and those that were only staged are let go.

        Args:
            weights: the tensors of :attr:`positions`; emptied.
            release: told the input's position of each weight whose memory nothing here refers to any more, at once.

        Returns:
            Input's position -> what calls have to hand in there, for the weights that the program itself reads.

        Raises:
            InputError: a weight is not what the program was compiled for.
        """
        misplaced = self._admit(weights)
        # a tensor of its own over the same memory: ``p.data = ...`` and ``to()`` must not put another type under the kernels
        kept = {i: w.detach() for i, w in zip(self.positions, weights, strict=True) if i in self._direct}
        for i, spec in misplaced:
            kept[i] = spec.copy(kept[i])
        memory = [w.untyped_storage().data_ptr() for w in weights]
        busy = dict.fromkeys(w.untyped_storage().data_ptr() for w in kept.values())
        read = weights[: len(self._compute.weights)]
        weights.clear()

        def gone(k: int) -> None:
            if memory[k] not in busy:
                release(self.positions[k])

        with torch.no_grad():
            self.owned = Values(self._compute(read, gone))
        self._kept = list(kept.values())
        return kept

    def stage_into(self, pages: Pages) -> None:
        """Where the staged values shall lie when they are computed next."""
        self._compute.pages[:] = [pages]

    @property
    def owned_bytes(self) -> int | None:
        """Bytes of the staged values; None before :meth:`own`."""
        return None if self.owned is None else sum(x.untyped_storage().nbytes() for x in self.owned)

    def _admit(self, weights: Sequence[torch.Tensor]) -> Misplaced:
        """Check the weights; those in another layout than kernels expect, by input position.

        Raises:
            Widened: a weight is not exact any more in the float that it is kept in.
        """
        for k in self._exact:
            if not is_bf16(weights[k]):
                raise Widened(f"weight %{self._inputs[self.positions[k]].hint} is not exact in bf16 any more")
        return [(self.positions[k], spec) for k, spec in self._guard.check(weights) if self.positions[k] in self._direct]

    @staticmethod
    def shared(several: Sequence[ProgramWeights]) -> tuple[ProgramWeights, list[list[int]]]:
        """The weights of several programs over the same inputs, as one: values that are staged alike are computed and kept once.

        Returns:
            The weights, and for each program the positions of its own among all staged values, in its order.
        """
        merged, mapping = _merged([w._made_from[0] for w in several])
        slots: dict[tuple[Value, bool], int] = {}
        order = [[slots.setdefault((mapping[v], c), len(slots)) for v, c in w._made_from[1]] for w in several]
        direct = sorted({i for w in several for i in w._direct})
        kernels = any(w._made_from[3] for w in several)
        return ProgramWeights(merged, list(slots), direct, kernels, *several[0]._made_from[4:]), order


def _merged(programs: Sequence[Lowered]) -> tuple[Lowered, dict[Value, Value]]:
    """One graph of all staged nodes, equal ones once, and where each program's values are in it."""
    graph = Graph("weights", programs[0].graph.symbols)
    inputs = [graph.add_input(v.type, v.hint, v.weight, v.exact) for v in programs[0].graph.inputs]
    mapping: dict[Value, Value] = {}
    known: dict[tuple[Any, ...], Node] = {}
    for lowered in programs:
        mapping.update(zip(lowered.graph.inputs, inputs, strict=True))
        for node in lowered.staged:
            operands = [mapping[v] for v in node.operands]
            attrs = tuple((k, format_attr(a)) for k, a in sorted(node.attrs.items()))
            key = node.op.name, tuple(operands), attrs, tuple(r.type for r in node.results)
            if key not in known:
                known[key] = graph.create(node.op, operands, node.attrs, types=[r.type for r in node.results], loc=node.loc)
            mapping.update(zip(node.results, known[key].results, strict=True))
    return Lowered(graph, list(graph.nodes()), [], []), mapping


def picker(positions: Sequence[int]) -> Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]:
    """Takes the tensors at these positions."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda tensors: [tensors[i] for i in positions]

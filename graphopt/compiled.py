"""What a compilation hands over: a graph that is called with its runtime arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch

from graphopt.capture.captured import Captured, TensorArgument, ValueResult, make_result, size_arguments
from graphopt.errors import WholeFallback
from graphopt.exact import Widened
from graphopt.pages import Pages
from graphopt.profile import Profile, profile
from graphopt.program import Program
from graphopt.report import Report
from graphopt.variants import VariantProgram


class CompiledGraph:
    """A compiled captured graph: takes the runtime arguments as a list, returns the results as a list."""

    _boxed_call = True  # AOTAutograd's convention: the caller hands over the list, so that arguments can be freed early

    def __init__(self, captured: Captured, program: Program | VariantProgram, report: Report,
                 widen: Callable[[], CompiledGraph] | None = None) -> None:  # fmt: skip
        self.program, self.report, self.captured = program, report, captured
        positions = {a.input: i for i, a in enumerate(captured.arguments) if isinstance(a, TensorArgument)}
        self._order = [positions.get(i) for i in range(len(captured.graph.inputs))]
        self._constants = [captured.constants[i] for i, p in enumerate(self._order) if p is None]
        self._select = _selector([p for p in self._order if p is not None])
        self._sizes = size_arguments(captured) if captured.graph.symbols else None
        in_order = all(isinstance(r, ValueResult) and r.output == i for i, r in enumerate(captured.results))
        self._widen = widen
        self._plain = in_order and not captured.mutations and len(captured.results) == len(captured.graph.outputs)

    def __call__(self, args: list[Any]) -> list[Any]:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._call(args)
        return self._call(args)

    def _call(self, args: list[Any]) -> list[Any]:
        inputs, sizes = self.operands(args)
        try:
            outputs = self.program(inputs, sizes)
        except Widened as change:
            self._compile_again(change)
            outputs = self.program(inputs, sizes)
        if self._plain:
            return outputs
        for m in self.captured.mutations:
            args[m.argument].copy_(outputs[m.output])
        return [make_result(r, args, outputs, sizes) for r in self.captured.results]

    def _compile_again(self, change: Widened) -> None:
        """Weights are not what was relied on: from now on rely on nothing."""
        if self._widen is None:
            raise change
        other = self._widen()
        other.report.notes.append(f"compiled again: {change}")
        self.program, self.report = other.program, other.report

    def operands(self, args: Sequence[Any]) -> tuple[Sequence[torch.Tensor], dict[str, int]]:
        """What the program takes for the runtime arguments: its inputs, and the values of its symbols."""
        inputs = [*self._select(args), *self._constants] if self._constants else self._select(args)
        if self._sizes is None:
            return inputs, {}
        return inputs, self.program.read_sizes(inputs, {s: int(args[p]) for s, p in self._sizes.items()})

    def profile(self, args: Sequence[Any], runs: int = 20) -> Profile:
        """Measure every call of the program; the arguments stay as they are."""
        with torch.no_grad():
            inputs, sizes = self.operands(args)
            program = self.program.choose(sizes)[0] if isinstance(self.program, VariantProgram) else self.program
            return profile(program, inputs, sizes, runs)

    def own_weights(self, take: Callable[[int], torch.Tensor], give_up: Callable[[int], None]) -> dict[int, torch.Tensor | None]:
        """Compute what is staged for good, and let go of the weights that it was made from.

        Args:
            take: an argument's position -> the weight.
            give_up: told the argument's position of a weight whose memory nothing here refers to any more.

        Returns:
            Argument's position -> what to hand in there from now on, for all weights.
        """
        first_constant = len(self._order) - len(self._constants)
        weights = self.program.weights
        wanted = weights.positions

        def give_up_input(i: int) -> None:
            p = self._order[i]
            if p is not None:
                give_up(p)
            else:
                self._constants[i - first_constant] = self.captured.constants[i] = torch.empty(0)

        def take_input(i: int) -> torch.Tensor:
            p = self._order[i]
            return take(p) if p is not None else self._constants[i - first_constant]

        kept = weights.own([take_input(i) for i in wanted], give_up_input)
        for i, x in kept.items():
            if self._order[i] is None:
                self._constants[i - first_constant] = x
        self.report.owns_weights = True
        self.report.memory["staged"] = weights.owned_bytes
        self.report.memory["weights"] = sum(x.nbytes for x in kept.values())
        return {p: kept.get(i) for i, p in enumerate(self._order) if p is not None and i in wanted}

    def stage_into(self, pages: Pages) -> None:
        """Where what depends on weights shall lie when it is computed next."""
        self.program.weights.stage_into(pages)

    def refresh(self) -> None:
        """Compute everything that depends on weights again at the next call."""
        if self.program.staged is not None:
            self.program.staged.forget()


def _selector(positions: list[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Takes the arguments at these positions."""
    if positions == list(range(len(positions))):
        return lambda args: args[: len(positions)]
    return itemgetter(*positions) if len(positions) > 1 else lambda args: [args[p] for p in positions]


class LibraryGraph:
    """A whole graph that runs through library kernels."""

    _boxed_call = True

    def __init__(self, gm: torch.fx.GraphModule, report: Report) -> None:
        self._gm, self.report = gm, report

    def __call__(self, args: list[Any]) -> Any:
        return torch.fx.Interpreter(self._gm).boxed_run(args)

    def profile(self, args: Sequence[Any], runs: int = 20) -> Profile:
        """There are no calls to measure one by one."""
        raise WholeFallback(self.report.whole)

    def stage_into(self, pages: Pages) -> None:
        """Nothing is computed from weights ahead."""

    def refresh(self) -> None:
        """Nothing is kept."""

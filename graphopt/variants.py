"""Variants of a program with symbolic sizes: the same model, compiled once more for sizes that are called often.

The general program is right at every size. A *variant* is chosen before it where its domain holds: at one size of each
symbol everything is static (schedules, the arena, what can be staged); in a range, schedules know the bounds. Which
domains there are is decided when the model is compiled, so no call ever compiles: they are declared
(``options={"hot_sizes": {"input_ids[1]": [128, (1, 16)]}}``), or the sizes of the example inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from graphopt.capture.captured import Captured
from graphopt.errors import UsageError, nearest
from graphopt.ir import dims
from graphopt.ir.dims import Range
from graphopt.program import Program
from graphopt.program_weights import ProgramWeights
from graphopt.report import Report
from graphopt.weights import StagedValues

MOST = 16  # variants of one graph: each is a program of its own
_REMEMBERED = 1024  # combinations of sizes whose choice is remembered


@dataclass(frozen=True)
class Domain:
    """Where a variant holds: (symbol, range) for each symbol that is narrowed, and why there is a variant for it."""

    ranges: tuple[tuple[str, Range], ...]
    reason: str

    def __contains__(self, sizes: Mapping[str, int]) -> bool:
        return all(sizes[s] in r for s, r in self.ranges)

    def __str__(self) -> str:
        return " and ".join(f"{s} == {r.lo}" if r.lo == r.hi else f"{r.lo} <= {s} <= {r.hi}" for s, r in self.ranges)

    @property
    def freedom(self) -> tuple[int, int]:
        """Domains of less freedom come first: (ranges that are not one value, sizes in the narrowed ranges)."""
        spans = [r.hi - r.lo for _, r in self.ranges if r.hi is not None]
        return sum(s > 0 for s in spans), sum(spans)


def plan_domains(captured: Captured, hot_sizes: Any) -> tuple[list[Domain], list[str]]:
    """The domains of a graph's variants, in the order in which they are tried, and notes on what was asked for in vain.

    Args:
        hot_sizes: as in :class:`graphopt.Options`.

    Raises:
        UsageError: a size cannot have a value that is given for it, or there would be too many variants.
    """
    symbols = captured.graph.symbols
    if hot_sizes == "none" or (hot_sizes == "auto" and not symbols):
        return [], []
    if not symbols:
        return [], [f"hot_sizes: this graph has no symbolic sizes, so none is {' or '.join(map(repr, hot_sizes))}"] if hot_sizes else []
    if hot_sizes == "auto":
        known = captured.examples
        if not all(s in known and known[s] in r for s, r in symbols.items()):
            return [], []
        return [Domain(tuple((s, Range(known[s], known[s])) for s in sorted(symbols)), "sizes of the example inputs")], []
    choices: dict[str, list[Range]] = {}
    notes = []
    for name, sizes in hot_sizes.items():
        symbol = _symbol(captured, name)
        if isinstance(symbol, str):
            choices.setdefault(symbol, []).extend(_range(name, s, symbols[symbol]) for s in sizes)
        else:
            notes.append(f"hot_sizes: {symbol.reason}")
    found = [Domain(tuple(zip(sorted(choices), ranges, strict=True)), "declared")
             for ranges in product(*(dict.fromkeys(choices[s]) for s in sorted(choices)))] if choices else []  # fmt: skip
    if len(found) > MOST:
        raise UsageError(f"hot_sizes ask for {len(found)} variants of one graph; at most {MOST} are made")
    return sorted(found, key=lambda d: d.freedom), notes


@dataclass(frozen=True)
class _Unknown:
    """Why a name stands for no symbol. Another graph of the same model may have it."""

    reason: str


def _symbol(captured: Captured, name: str) -> str | _Unknown:
    """The symbol that a name stands for: its own, or ``input[axis]``."""
    graph = captured.graph
    if name in graph.symbols:
        return name
    axes = {f"{captured.input_names[i]}[{k}]": d for i, v in enumerate(graph.inputs) if i in captured.input_names
            for k, d in enumerate(v.shape)}  # fmt: skip
    if name not in axes:
        known = [*graph.symbols, *(k for k, d in axes.items() if not isinstance(d, int))]
        return _Unknown(f"this graph has no size {name!r}{nearest(name, known)}; symbolic are {', '.join(known)}")
    d = axes[name]
    if isinstance(d, int):
        return _Unknown(f"{name} is always {d}")
    if not d.is_Symbol:
        return _Unknown(f"{name} is {dims.format_dim(d)}: give sizes of {', '.join(dims.free_symbols([d]))} instead")
    return str(d.name)


def _range(name: str, size: int | Sequence[int], allowed: Range) -> Range:
    """The part of a size or a range that the symbol can have."""
    lo, hi = (size, size) if isinstance(size, int) else size
    least, most = max(lo, allowed.lo), hi if allowed.hi is None else min(hi, allowed.hi)
    if least > most:
        span = f"at least {allowed.lo}" if allowed.hi is None else f"from {allowed.lo} to {allowed.hi}"
        raise UsageError(f"hot_sizes: {name} cannot be {lo if lo == hi else f'{lo} to {hi}'}; it is {span}")
    return Range(least, most)


@dataclass
class Variant:
    """A variant's program; calls are counted in its report."""

    domain: Domain
    program: Program
    report: Report


class VariantProgram:
    """The general program with its variants before it; called like a :class:`~graphopt.program.Program`.

    Which one runs is decided once a call, by the sizes alone: equal sizes take the same program every time.
    """

    def __init__(self, general: Program, variants: Sequence[Variant], report: Report) -> None:
        self.general, self.variants, self.report = general, list(variants), report
        self.read_sizes = general.read_sizes
        self._symbols = list(general.graph.symbols)
        self._chosen: dict[tuple[int, ...], tuple[Program, Report]] = {}

    @property
    def staged(self) -> StagedValues | None:
        """What is computed from weights once; None where no weights are read."""
        return self.general.staged

    @property
    def weights(self) -> ProgramWeights:
        """The weights that are read; all programs share them."""
        return self.general.weights

    def __call__(self, inputs: Sequence[torch.Tensor], sizes: Mapping[str, int] | None = None) -> list[torch.Tensor]:
        """Run; see :meth:`graphopt.program.Program.__call__`."""
        bound = self.general.read_sizes(inputs) if sizes is None else sizes
        program, report = self.choose(bound)
        report.runs += 1
        return program(inputs, bound)

    def choose(self, sizes: Mapping[str, int]) -> tuple[Program, Report]:
        """The program for these values of the symbols, and its report; remembered."""
        key = tuple([sizes[s] for s in self._symbols])
        found = self._chosen.get(key)
        if found is None:
            hit = next((v for v in self.variants if sizes in v.domain), None)
            found = (hit.program, hit.report) if hit is not None else (self.general, self.report)
            if len(self._chosen) >= _REMEMBERED:
                self._chosen.clear()
            self._chosen[key] = found
        return found

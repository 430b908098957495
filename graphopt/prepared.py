"""From a captured graph to steps: passes, then lowering. Nothing is built here, and nothing depends on what weights hold."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphopt.asked import came_to_nothing, has_products, say
from graphopt.backends.base import Backend
from graphopt.capture.captured import AliasResult, Captured, TensorArgument, ValueResult
from graphopt.devices import choose_backend, choose_target, kernel_provider
from graphopt.exact import unmarked
from graphopt.fallbacks import report_fallbacks
from graphopt.in_place import update_in_place
from graphopt.ir.graph import Graph
from graphopt.ir.hashing import canonical_text
from graphopt.ir.narrow import narrow
from graphopt.lower import KernelStep, Lowered, lower
from graphopt.options import Options
from graphopt.pass_manager import Fuel, Instrument, PassContext, run_passes
from graphopt.passes.pipelines import default_pipeline, edit_pipeline
from graphopt.program import Program
from graphopt.report import Report
from graphopt.target import Target
from graphopt.value_check import ValueCheck
from graphopt.variants import Domain, plan_domains


class Unit:
    """One program on its way: the general one, or a variant."""

    lowered: Lowered
    program: Program

    def __init__(self, graph: Graph, report: Report) -> None:
        self.graph, self.report = graph, report
        self.kernels: list[Callable[..., Any]] = []

    @property
    def has_checks(self) -> bool:
        """Whether kernels read or write by indices that must be in range."""
        return any(isinstance(s, KernelStep) and s.checks for s in self.lowered.steps)


@dataclass
class Prepared:
    """A captured graph whose programs are steps already.

    Attributes:
        captured: its graph is that of the general program.
        units: the programs: the general one first, then a variant for each of ``domains``.
        wide: the graph as captured, where weights are marked as exact in a narrower float, without these marks.
        eager: the most bytes that eager's intermediate results and outputs take at once; None if that is not known.
        seconds: what it took.
    """

    captured: Captured
    units: list[Unit]
    domains: list[Domain]
    wide: Graph | None = None
    eager: int | None = None
    seconds: float = 0.0


def prepare(captured: Captured, options: Options, label: str) -> Prepared:
    """Run the passes on a captured graph, in place, and make steps.

    Raises:
        EquivalenceError: ``verify="each-pass"`` found a pass that changes values.
        FallbackError: ``strict`` is on and an operation has no kernel.
    """
    start = time.perf_counter()
    target = choose_target(captured.device, options)
    backend, why_none = choose_backend(target, options)
    wide = unmarked(captured.graph) if any(v.exact is not None for v in captured.graph.inputs) else None
    units, domains = _units(captured, target, backend, options, label)
    if backend is not None:
        kernel_provider(backend, captured.device).prestart(options.kernels_dir, options.workers, units[0].report.key)
    for unit in units:
        _lower(unit, target, backend, why_none, options, len(units) > 1)
    return Prepared(captured, units, domains, wide, seconds=time.perf_counter() - start)


def lowered_programs(captured: Captured, target: Target, options: Options, *, label: str = "model") -> list[tuple[Graph, Lowered]]:
    """The programs of a captured graph for a target whose kernels need not run here: the general one first."""
    backend, why_none = choose_backend(target, options)
    units, _ = _units(captured, target, backend, options, label)
    for unit in units:
        _lower(unit, target, backend, why_none, options, len(units) > 1)
        update_in_place(unit.lowered, mutated_inputs(captured), target, backend)
    return [(u.graph, u.lowered) for u in units]


def _units(captured: Captured, target: Target, backend: Backend | None, options: Options, label: str) -> tuple[list[Unit], list[Domain]]:
    """The general program and those for some sizes, before any pass; and those sizes."""
    name = options.name or label
    report = Report(name, str(target))
    domains: list[Domain] = []
    if backend is not None:
        domains, notes = plan_domains(captured, options.hot_sizes)
        report.notes += notes
    narrowed = [narrow(captured.graph, dict(d.ranges)) for d in domains]  # of the graph as captured: passes work in place
    units = [Unit(captured.graph, report)]
    report.key = compilation_key(captured.graph, target, options, domains)
    for domain, graph in zip(domains, narrowed, strict=True):
        sub = Report(name, str(target), condition=str(domain), reason=domain.reason, key=report.key)
        report.variants.append(sub)
        units.append(Unit(graph, sub))
    return units, domains


def _lower(unit: Unit, target: Target, backend: Backend | None, why_none: str, options: Options, variants: bool) -> None:
    """Run the passes, and make steps of what they leave."""
    unit.report.text_before = str(unit.graph)
    optimize(unit.graph, target, options, unit.report, variants)
    lowering = time.perf_counter()
    unit.lowered = lower(unit.graph, target, backend, why_none, asked=options.backend == "eager")
    unit.report.text_after = str(unit.graph)
    report_fallbacks(unit.report, unit.lowered, options)  # before time is spent on building
    unit.report.seconds["lower"] = time.perf_counter() - lowering


def optimize(graph: Graph, target: Target, options: Options, report: Report, variants: bool = False) -> None:
    """Run the pipeline on a graph in place, and report on it; ``variants``: whether it is one of several programs."""
    start = time.perf_counter()
    products = bool(options.quantize or options.precision) and has_products(graph)
    ctx = PassContext(target=target, owns_weights=options.own_weights, variants=variants, fuel=Fuel(options.fuel, options.skip_rewrites))
    instruments: list[Instrument] = [ValueCheck()] if options.verify == "each-pass" else []
    pipeline = edit_pipeline(default_pipeline(quantize=options.quantize, precision=options.precision), options.pipeline)
    report.pipeline = [str(p) for p in pipeline]
    run_passes(graph, pipeline, ctx, instruments, structure=options.verify != "off")
    report.passes, report.remarks = ctx.runs, ctx.remarks
    say(report, came_to_nothing(options, products, ctx.remarks))
    report.seconds["passes"] = time.perf_counter() - start


def compilation_key(graph: Graph, target: Target, options: Options, domains: Sequence[Domain]) -> str:
    """Identity of a compilation: the captured graph, its variants, the target, the code and options of every pass; 16 hex digits."""
    pipeline = edit_pipeline(default_pipeline(quantize=options.quantize, precision=options.precision), options.pipeline)
    chosen = [*map(str, domains), str(options.fuel), str(options.skip_rewrites), str(options.own_weights)]
    ingredients = [canonical_text(graph), target.fingerprint, *chosen, *(p.key() for p in pipeline)]
    return hashlib.sha256("\n".join(ingredients).encode()).hexdigest()[:16]


def mutated_inputs(captured: Captured) -> dict[int, int]:
    """Graph output -> graph input that it is copied into; only outputs that are no result besides."""
    results = [r.base if isinstance(r, AliasResult) else r for r in captured.results]
    returned = {r.output: None for r in results if isinstance(r, ValueResult)}
    out = {}
    for m in captured.mutations:
        argument = captured.arguments[m.argument]
        if isinstance(argument, TensorArgument) and m.output not in returned:
            out[m.output] = argument.input
    return out


def as_captured(prepared: Prepared) -> Captured:
    """The captured graph anew, without marks: what is compiled where weights are not what was relied on."""
    assert prepared.wide is not None
    return replace(prepared.captured, graph=prepared.wide.clone())

"""Drives the whole: a captured graph goes through the passes, is lowered, its kernels are built or found, and a program is made."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from graphopt.backends.base import Backend
from graphopt.backends.eager import LibraryCall
from graphopt.built import Progress, build_kernels
from graphopt.capture.captured import Captured, Uncapturable
from graphopt.capture.fx import capture_fx
from graphopt.capture.liveness import eager_peak
from graphopt.compiled import CompiledGraph, LibraryGraph
from graphopt.devices import KernelProvider, choose_backend, choose_target, interpreting, kernel_provider
from graphopt.exact import mark
from graphopt.fallbacks import fallback_graph, report_fallbacks
from graphopt.graphed import record_calls
from graphopt.in_place import update_in_place
from graphopt.ir import dims
from graphopt.library_choice import take_library
from graphopt.max_autotune import autotune
from graphopt.options import Options
from graphopt.prepared import Prepared, Unit, as_captured, mutated_inputs, prepare
from graphopt.program import Program, share_weights
from graphopt.report import record
from graphopt.tape import Native
from graphopt.target import Target
from graphopt.tuned import kernel_threads, key_with, use_records
from graphopt.variants import Variant, VariantProgram


def compile_fx(gm: torch.fx.GraphModule, weights: Mapping[int, str], options: Options, *, inputs: Mapping[int, str] | None = None,
               exact: Collection[int] = (), label: str = "model", progress: Progress | None = None,
               keep: Callable[[Prepared], None] | None = None) -> CompiledGraph | LibraryGraph:  # fmt: skip
    """Compile a functional aten graph; what the IR cannot hold runs through library kernels as a whole, and is reported.

    Args:
        weights: placeholder index -> name of the frozen weight that it is.
        inputs: placeholder index -> name of the user's argument that it is.
        exact: placeholders that are weights of f32 whose elements are bf16.
        keep: told what the passes and lowering made of it, before anything else is done with that.

    Raises:
        FallbackError: ``strict`` is on and an operation has no kernel.
        EquivalenceError: ``verify="each-pass"`` found a pass that changes values.
    """
    try:
        captured = capture_fx(gm, weights=weights, inputs=inputs, name=re.sub(r"\W+", "_", label).strip("_") or "main")
    except Uncapturable as error:
        return fallback_graph(gm, error.reason, str(error.loc or ""), options, label=label)
    eager = eager_peak(gm)
    del gm  # the caller's, if it kept no other reference: what is made from here on comes to lie where it lay
    mark(captured, exact)
    prepared = prepare(captured, options, label)
    prepared.eager = eager
    if keep is not None:
        keep(prepared)
    return compile_prepared(prepared, options, label=label, progress=progress)


def compile_prepared(prepared: Prepared, options: Options, *, label: str = "model", progress: Progress | None = None) -> CompiledGraph:
    """Build or find the kernels of a prepared graph, and make its program. Where weights are marked as exact in a narrower float,
    one that is so no more has the graph compiled again."""
    start = time.perf_counter()
    captured, units = prepared.captured, prepared.units
    device = captured.device
    target = choose_target(device, options)
    backend, _ = choose_backend(target, options)
    provider = kernel_provider(backend, device) if backend is not None else None
    report = units[0].report
    captured_key = report.key
    for unit in units:
        update_in_place(unit.lowered, mutated_inputs(captured), target, backend)
    if options.tune_seconds and backend is not None:
        tune_kernels(units, target, device, options, progress)
    if backend is not None and provider is not None:
        choose_schedules(units, captured, target, backend, provider, options)
        building = time.perf_counter()
        build_kernels(units, dict.fromkeys([captured_key, report.key]), target, provider, options, progress)
        report.seconds["build"] = time.perf_counter() - building
    use_native = provider is not None and bool(units[0].kernels)
    changed_words, found = (provider.changed_words(), provider.native()) if provider is not None and use_native else (None, None)
    native = None if found is None else Native(*found)
    look = provider.index_look() if provider is not None and any(u.has_checks for u in units) else None
    for unit in units:
        report_fallbacks(unit.report, unit.lowered, options)
        unit.program = Program(unit.lowered, unit.kernels, lambda node: LibraryCall(node, device), device, changed_words, native, look)
        unit.report.program = unit.program.source
        unit.report.memory = _memory(unit)
    report.memory["eager"] = prepared.eager
    first, *others = units
    program: Program | VariantProgram = first.program
    if others:
        share_weights([u.program for u in units])
        variants = [Variant(d, u.program, u.report) for d, u in zip(prepared.domains, others, strict=True)]
        program = VariantProgram(first.program, variants, report)
    if options.records:
        for u in units:
            record_calls(u.program, u.lowered, u.report, device, interpreting(target, device) is not None)
    report.seconds["total"] = prepared.seconds + time.perf_counter() - start
    record(report)

    def widen() -> CompiledGraph:
        return compile_prepared(prepare(as_captured(prepared), options, label), options, label=label)

    return CompiledGraph(captured, program, report, widen if prepared.wide is not None else None)


def tune_kernels(units: Sequence[Unit], target: Target, device: torch.device, options: Options, progress: Progress | None) -> None:
    """``mode="max-autotune"``: let the tuning database learn about these kernels."""
    report, path = units[0].report, options.tuning_path
    if path is None:
        report.notes.append("max-autotune: nothing is tuned, as tuning_db=None asks for default schedules")
        return
    autotune([(u.graph, u.lowered) for u in units], target, path, kernel_threads(target), options.tune_seconds, report, progress,
             interpreting(target, device), device.index or 0)  # fmt: skip


def choose_schedules(units: Sequence[Unit], captured: Captured, target: Target, backend: Backend, provider: KernelProvider,
                     options: Options) -> None:  # fmt: skip
    """Take schedules from the tuning database, where it has any, or the library's kernels. They become part of the compilation's key."""
    path = options.tuning_path
    if path is None:
        return
    start = time.perf_counter()
    report = units[0].report
    strict = options.tuning_db != "auto"
    chosen = use_records([(u.lowered, u.report) for u in units], target, backend, path, kernel_threads(target),
                         interpreting(target, captured.device), strict=strict)  # fmt: skip
    if chosen:
        for u in units:
            u.report.key = key_with(u.report.key, chosen)
            u.lowered = take_library(u.lowered, mutated_inputs(captured), target, backend)
            u.report.text_after = str(u.graph)
        provider.prestart(options.kernels_dir, options.workers, report.key)
    report.seconds["lower"] = report.seconds.get("lower", 0.0) + time.perf_counter() - start


def _memory(unit: Unit) -> dict[str, int | None]:
    graph, program = unit.graph, unit.program
    outputs = [v.type.nbytes() for v in graph.outputs]
    weights = [v.type.nbytes() for v in graph.inputs if v.weight]
    staged = [v.type.nbytes() for v in unit.lowered.boundary]
    return {
        "planned": program.plan.peak if program.plan else 0,
        "unplanned": program.plan.total if program.plan else 0,
        "weights": sum(int(b) for b in weights) if dims.is_static(weights) else None,
        "staged": sum(int(b) for b in staged),
        "outputs": sum(int(b) for b in outputs) if dims.is_static(outputs) else None,
    }

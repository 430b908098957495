"""Drives the whole: a captured graph goes through the passes, is lowered, its kernels are built or found, and a program is made."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch

from graphopt.asked import came_to_nothing, has_products, say
from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.base import Backend
from graphopt.backends.eager import LibraryCall
from graphopt.capture.captured import AliasResult, Captured, TensorArgument, Uncapturable, ValueResult, make_result, size_arguments
from graphopt.capture.fx import capture_fx
from graphopt.capture.liveness import eager_peak
from graphopt.devices import KernelProvider, choose_backend, choose_target, interpreting, kernel_provider
from graphopt.errors import BuildError, FallbackError, WholeFallback, counted, first_line
from graphopt.exact import Widened, mark, unmarked
from graphopt.graphed import not_recorded, record_calls
from graphopt.in_place import update_in_place
from graphopt.ir import dims
from graphopt.ir.graph import Graph, Node
from graphopt.ir.hashing import canonical_text
from graphopt.ir.narrow import narrow
from graphopt.library_choice import take_library
from graphopt.lower import KernelStep, LibraryStep, Lowered, lower
from graphopt.max_autotune import autotune
from graphopt.options import Options
from graphopt.pages import Pages
from graphopt.pass_manager import Fuel, Instrument, PassContext, run_passes
from graphopt.passes.pipelines import default_pipeline, edit_pipeline
from graphopt.profile import Profile, profile
from graphopt.program import Program, share_weights
from graphopt.report import WHOLE, Fallback, KernelInfo, Report, record
from graphopt.tape import Native
from graphopt.target import Target
from graphopt.tuned import kernel_threads, key_with, use_records
from graphopt.variants import Domain, Variant, VariantProgram, plan_domains
from graphopt.verification import ValueCheck

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total) while a compilation goes on."""


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


def compile_captured(captured: Captured, options: Options, *, label: str = "model", progress: Progress | None = None) -> CompiledGraph:
    """Compile a captured graph. Where weights are marked as exact in a narrower float, one that is so no more has it compiled again.

    Raises:
        FallbackError: ``strict`` is on and an operation has no kernel.
        EquivalenceError: ``verify="each-pass"`` found a pass that changes values.
    """
    start = time.perf_counter()
    device = captured.device
    wide = unmarked(captured.graph) if any(v.exact is not None for v in captured.graph.inputs) else None
    target = choose_target(device, options)
    backend, why_none = choose_backend(target, options)
    provider = kernel_provider(backend, device) if backend is not None else None
    units, domains = _units(captured, target, backend, options, label)
    report = units[0].report
    captured_key = report.key
    if provider is not None:
        provider.prestart(options.kernels_dir, options.workers, report.key)
    for unit in units:
        _lower(unit, captured, target, backend, why_none, options)
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
        unit.report.memory = _memory(unit.graph, unit.lowered, unit.program)
    first, *others = units
    program: Program | VariantProgram = first.program
    if others:
        share_weights([u.program for u in units])
        program = VariantProgram(first.program, [Variant(d, u.program, u.report) for d, u in zip(domains, others, strict=True)], report)
    if options.records:
        for u in units:
            record_calls(u.program, u.lowered, u.report, device, interpreting(target, device) is not None)
    report.seconds["total"] = time.perf_counter() - start
    record(report)

    def widen() -> CompiledGraph:
        assert wide is not None
        return compile_captured(replace(captured, graph=wide.clone()), options, label=label)

    return CompiledGraph(captured, program, report, widen if wide is not None else None)


def lowered_programs(captured: Captured, target: Target, options: Options, *, label: str = "model") -> list[tuple[Graph, Lowered]]:
    """The programs of a captured graph for a target whose kernels need not run here: the general one first. Nothing is built."""
    backend, why_none = choose_backend(target, options)
    units, _ = _units(captured, target, backend, options, label)
    for unit in units:
        _lower(unit, captured, target, backend, why_none, options)
    return [(u.graph, u.lowered) for u in units]


def _units(captured: Captured, target: Target, backend: Backend | None, options: Options, label: str) -> tuple[list[_Unit], list[Domain]]:
    """The general program and those for some sizes, before any pass; and those sizes."""
    name = options.name or label
    report = Report(name, str(target))
    domains: list[Domain] = []
    if backend is not None:
        domains, notes = plan_domains(captured, options.hot_sizes)
        report.notes += notes
    narrowed = [narrow(captured.graph, dict(d.ranges)) for d in domains]  # of the graph as captured: passes work in place
    units = [_Unit(captured.graph, report)]
    report.key = compilation_key(captured.graph, target, options, domains)
    for domain, graph in zip(domains, narrowed, strict=True):
        sub = Report(name, str(target), condition=str(domain), reason=domain.reason, key=report.key)
        report.variants.append(sub)
        units.append(_Unit(graph, sub))
    return units, domains


def _lower(unit: _Unit, captured: Captured, target: Target, backend: Backend | None, why_none: str, options: Options) -> None:
    """Run the passes, and make steps of what they leave."""
    optimize(unit.graph, target, options, unit.report)
    lowering = time.perf_counter()
    unit.lowered = lower(unit.graph, target, backend, why_none, asked=options.backend == "eager")
    update_in_place(unit.lowered, _mutated_inputs(captured), target, backend)
    unit.report.text_after = str(unit.graph)
    report_fallbacks(unit.report, unit.lowered, options)  # before time is spent on building
    unit.report.seconds["lower"] = time.perf_counter() - lowering


def tune_kernels(units: Sequence[_Unit], target: Target, device: torch.device, options: Options, progress: Progress | None) -> None:
    """``mode="max-autotune"``: let the tuning database learn about these kernels."""
    report, path = units[0].report, options.tuning_path
    if path is None:
        report.notes.append("max-autotune: nothing is tuned, as tuning_db=None asks for default schedules")
        return
    autotune([(u.graph, u.lowered) for u in units], target, path, kernel_threads(target), options.tune_seconds, report, progress,
             interpreting(target, device), device.index or 0)  # fmt: skip


def choose_schedules(units: Sequence[_Unit], captured: Captured, target: Target, backend: Backend, provider: KernelProvider,
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
            u.lowered = take_library(u.lowered, _mutated_inputs(captured), target, backend)
            u.report.text_after = str(u.graph)
        provider.prestart(options.kernels_dir, options.workers, report.key)
    report.seconds["lower"] += time.perf_counter() - start


def _mutated_inputs(captured: Captured) -> dict[int, int]:
    """Graph output -> graph input that it is copied into; only outputs that are no result besides."""
    results = [r.base if isinstance(r, AliasResult) else r for r in captured.results]
    returned = {r.output: None for r in results if isinstance(r, ValueResult)}
    out = {}
    for m in captured.mutations:
        argument = captured.arguments[m.argument]
        if isinstance(argument, TensorArgument) and m.output not in returned:
            out[m.output] = argument.input
    return out


class _Unit:
    """One program on its way: the general one, or a variant."""

    lowered: Lowered
    program: Program

    def __init__(self, graph: Graph, report: Report) -> None:
        self.graph, self.report = graph, report
        self.kernels: list[Callable[..., Any]] = []
        report.text_before = str(graph)

    @property
    def has_checks(self) -> bool:
        """Whether kernels read or write by indices that must be in range."""
        return any(isinstance(s, KernelStep) and s.checks for s in self.lowered.steps)


def compile_fx(gm: torch.fx.GraphModule, weights: Mapping[int, str], options: Options, *, inputs: Mapping[int, str] | None = None,
               values: Mapping[int, torch.Tensor] | None = None, label: str = "model",
               progress: Progress | None = None) -> CompiledGraph | LibraryGraph:  # fmt: skip
    """Compile a functional aten graph; what the IR cannot hold runs through library kernels as a whole, and is reported.

    Args:
        weights: placeholder index -> name of the frozen weight that it is.
        inputs: placeholder index -> name of the user's argument that it is.
        values: placeholder index -> the weight itself, as far as it is at hand: what its elements are may make it smaller.
    """
    try:
        captured = capture_fx(gm, weights=weights, inputs=inputs, name=re.sub(r"\W+", "_", label).strip("_") or "main")
    except Uncapturable as error:
        return fallback_graph(gm, error.reason, str(error.loc or ""), options, label=label)
    eager = eager_peak(gm)
    del gm  # the caller's, if it kept no other reference: what is made from here on comes to lie where it lay
    mark(captured, values or {})
    compiled = compile_captured(captured, options, label=label, progress=progress)
    compiled.report.memory["eager"] = eager
    return compiled


def optimize(graph: Graph, target: Target, options: Options, report: Report) -> None:
    """Run the pipeline on a graph in place, and report on it."""
    start = time.perf_counter()
    products = bool(options.quantize or options.precision) and has_products(graph)
    ctx = PassContext(target=target, owns_weights=options.own_weights, fuel=Fuel(options.fuel, options.skip_rewrites))
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


def build_kernels(units: Sequence[_Unit], keys: Iterable[str], target: Target, provider: KernelProvider,
                  options: Options, progress: Progress | None) -> None:  # fmt: skip
    """One loaded kernel a KernelStep; equal workloads share one. A step whose kernel cannot be built becomes a library call."""
    wanted = dict.fromkeys(key for u in units for key in _kernel_users(u.lowered))
    if not wanted:
        return
    cache_dir = options.kernels_dir
    built = provider.load_or_build(list(wanted), target, cache_dir, options.workers, progress)
    artifacts = dict(zip(wanted, built, strict=True))
    if not any(isinstance(a, BuildError) for a in built):
        for model in keys:
            provider.remember(cache_dir, model)
    for unit in units:
        for key, users in _kernel_users(unit.lowered).items():
            artifact = artifacts[key]
            if isinstance(artifact, BuildError):
                unit.report.notes.append(f"a kernel could not be built; please report this: {artifact}")
            else:
                unit.report.kernels.append(_kernel_info(users, artifact))
        for i, s in enumerate(unit.lowered.steps):
            if isinstance(s, KernelStep):
                artifact = artifacts[s.workload, s.schedule]
                if isinstance(artifact, BuildError):
                    unit.lowered.steps[i] = LibraryStep(s.node, f"its kernel could not be built: {first_line(artifact)}")
                else:
                    unit.kernels.append(artifact.kernel)


def _kernel_users(lowered: Lowered) -> dict[tuple[Workload, Schedule], list[KernelStep]]:
    users: dict[tuple[Workload, Schedule], list[KernelStep]] = {}
    for s in lowered.steps:
        if isinstance(s, KernelStep):
            users.setdefault((s.workload, s.schedule), []).append(s)
    return users


def _kernel_info(users: Sequence[KernelStep], artifact: Any) -> KernelInfo:
    body = users[0].node.body
    assert body is not None
    locs = tuple(dict.fromkeys(str(n.loc) for n in body if n.loc))
    ops = tuple(n.op.name for n in body if n.op.name != "constant")
    return KernelInfo(artifact.name, users[0].backend, users[0].workload.kind, len(users), artifact.cache, users[0].schedule.to_json(),
                      locs, ops, str(artifact.path), users[0].tuned)  # fmt: skip


def report_fallbacks(report: Report, lowered: Lowered, options: Options) -> None:
    """List the library calls. Raises FallbackError under ``strict`` for one that was not asked for."""
    report.fallbacks = [_fallback(s) for s in lowered.steps if isinstance(s, LibraryStep) and s.node.op.name != "constant"]
    if options.strict and report.unasked_fallbacks:
        raise FallbackError(_strict_message(report))


def _fallback(step: LibraryStep) -> Fallback:
    node = step.node
    operands = ", ".join(str(v.type) for v in node.operands)
    results = ", ".join(str(r.type) for r in node.results)
    return Fallback(operation_name(node), f"({operands}) -> {results}", step.reason, str(node.loc or ""), step.asked)


def operation_name(node: Node) -> str:
    """What to call a node in reports: the ATen operator, the ops of a fused region, or the IR op."""
    if node.op.name == "aten":
        return str(node.attrs["target"])
    if node.body is not None:
        return " + ".join(dict.fromkeys(n.op.name for n in node.body if n.op.name != "constant"))
    return node.op.name


def _strict_message(report: Report) -> str:
    count = len(report.unasked_fallbacks)
    lines = [f"{report.name}: strict is on, and {counted(count, 'operation')} {'has' if count == 1 else 'have'} no kernel:"]
    lines += [f"  {f.op} {f.types}: {f.reason}" + (f"  [{f.loc}]" if f.loc else "") for f in report.unasked_fallbacks[:8]]
    if len(report.unasked_fallbacks) > 8:
        lines.append(f"  ... and {len(report.unasked_fallbacks) - 8} more")
    return "\n".join(lines)


def _memory(graph: Graph, lowered: Lowered, program: Program) -> dict[str, int | None]:
    outputs = [v.type.nbytes() for v in graph.outputs]
    weights = [v.type.nbytes() for v in graph.inputs if v.weight]
    staged = [v.type.nbytes() for v in lowered.boundary]
    return {
        "planned": program.plan.peak if program.plan else 0,
        "unplanned": program.plan.total if program.plan else 0,
        "weights": sum(int(b) for b in weights) if dims.is_static(weights) else None,
        "staged": sum(int(b) for b in staged),
        "outputs": sum(int(b) for b in outputs) if dims.is_static(outputs) else None,
    }


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


def fallback_graph(gm: torch.fx.GraphModule, reason: str, loc: str, options: Options, *, label: str = "model") -> LibraryGraph:
    """Run a whole graph through library kernels, as it could not be captured; reported, and an error under ``strict``."""
    fallback = Fallback(WHOLE, "", reason, loc, options.backend == "eager")
    report = Report(options.name or label, "library kernels", fallbacks=[fallback])
    if options.strict and report.unasked_fallbacks:
        raise FallbackError(_strict_message(report))
    if options.records:
        not_recorded(report, f"the graph runs through library kernels as a whole: {reason}")
    record(report)
    return LibraryGraph(gm, report)

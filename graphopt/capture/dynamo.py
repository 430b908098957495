"""The ``torch.compile`` backend: Dynamo's graph goes through AOTAutograd to functional aten, is captured, and compiled.

Inference graphs treat parameters, buffers and module attributes as frozen weights, watched for changes on every call. Training
graphs (forward and, when it is first needed, backward) take them as ordinary inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import _disable_current_modes

from graphopt.asked import NOT_FROZEN, in_training, say
from graphopt.capture.decompositions import DECOMPOSITIONS
from graphopt.capture.identity import Unknown, graph_text
from graphopt.capture.source import class_name, clean_name
from graphopt.capture.training import train_attention
from graphopt.compiled import CompiledGraph, LibraryGraph
from graphopt.compiler import compile_fx, compile_prepared
from graphopt.devices import prestart
from graphopt.errors import UsageError
from graphopt.exact import exact_weights
from graphopt.garbage import uncollected
from graphopt.graphed import not_recorded
from graphopt.kept import NAME as KEPT
from graphopt.kept import keep, key_of, take
from graphopt.options import Options
from graphopt.pages import Pages
from graphopt.passes.layout.weights_in_place import ROWS
from graphopt.prepared import Prepared
from graphopt.remarks import Remark

_LOOKUPS = (torch.nn.functional.embedding, torch.embedding)
_IN_PLACE = ("setitem", "iadd", "isub", "imul", "itruediv")  # of the operator module
Compiled = Callable[[list[Any]], Any]


def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None,
            options: Mapping[str, Any] | None = None) -> Callable[..., Any]:  # fmt: skip
    """Entry point of ``torch.compile(..., backend="graphopt", mode=..., options={...})``."""
    chosen = Options.make(mode, options)
    if chosen.own_weights:
        raise UsageError("own_weights=True needs graphopt.compile(model, args): torch.compile keeps the weights and hands them in")
    static = frozen_inputs(gm, example_inputs) if chosen.freeze else {}
    trains = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)
    pages = prestart(chosen, example_inputs, [] if trains else [example_inputs[i] for i in multiplied(gm, static)])
    label = graph_label(gm)
    names = input_names(gm)
    exact = set() if trains else exact_weights({i: example_inputs[i] for i in static if not is_written(gm, i)})
    with _disable_current_modes():
        said = train_attention(gm, chosen) if trains else []

    in_turn = replace(chosen, cuda_graphs=False)  # for training

    def trained(gm: torch.fx.GraphModule, part: str, inputs: Mapping[int, str] | None = None) -> CompiledGraph | LibraryGraph:
        compiled = compile_graph(gm, in_turn, f"{label} ({part})", {}, inputs)
        if chosen.records:
            not_recorded(compiled.report, "in training, parameters and what the backward reads would be copied at each call")
        return compiled

    def forward(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        compiled = trained(gm, "forward", inner_names(gm, names))
        compiled.report.remarks[:0] = said
        if static:
            compiled.report.notes.append(NOT_FROZEN)
        say(compiled.report, in_training(chosen))
        return compiled

    def backward(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        return _undisturbed(trained(gm, "backward"), "compiled by graphopt")

    def trace(inference: Any) -> Callable[..., Any]:
        with functorch_config.patch(unlift_effect_tokens=True):
            compiled: Callable[..., Any] = aot_module_simplified(
                gm, list(example_inputs), fw_compiler=forward, bw_compiler=backward, inference_compiler=inference,
                decompositions=dict(DECOMPOSITIONS), partition_fn=min_cut_rematerialization_partition, keep_inference_input_mutations=True,
            )  # fmt: skip
        return compiled

    folder = None if trains or torch.compiler.config.force_disable_caches else chosen.graphs_dir
    with uncollected():
        compiled = Inference(gm, example_inputs, chosen, folder, static, names, exact, label, pages).compiled(trace)
    return _undisturbed(compiled, "compiled by graphopt")


class Inference:
    """A Dynamo graph without gradients on its way: traced and prepared, or taken from those that were before.

    Args:
        folder: of graphs that were prepared before; None to prepare this one whatever there is.
        static: arguments that are frozen weights, and their names.
        names: the user's names of arguments.
        exact: weights of f32 that are bf16 in truth.
        pages: where packed weights shall lie.
    """

    def __init__(self, gm: torch.fx.GraphModule, examples: Sequence[Any], options: Options, folder: Path | None,
                 static: Mapping[int, str], names: Mapping[int, str], exact: Collection[int], label: str,
                 pages: Pages) -> None:  # fmt: skip
        self.options, self.folder, self.label, self.pages = options, folder, label, pages
        self.static, self.names, self.exact = static, names, exact
        self.count = len(examples)
        self.direct: Callable[..., Any] | None = None  # where AOTAutograd adds nothing to calls
        self.key, self.why_not = "", ""
        if folder is not None:
            try:
                text = graph_text(gm, examples, static, names)
                self.key = key_of(text, exact, examples[0].device, options, label)
            except Unknown as why:
                self.why_not = str(why)

    def compiled(self, trace: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
        """What Dynamo calls.

        Args:
            trace: has AOTAutograd trace the graph and hand it to a compiler, and returns what calls its result.
        """
        kept = take(self.folder, self.key) if self.folder is not None and self.key else None
        if kept is None:
            around = trace(self.compile)
            return around if self.direct is None else self.direct
        with _disable_current_modes():
            compiled = compile_prepared(kept.prepared, self.options, label=self.label)
        compiled.stage_into(self.pages)
        return called_directly(compiled, kept.versions)

    def compile(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        """AOTAutograd's compiler."""
        weights = inner_weights(gm, self.static)
        exact = {i for i, o in enumerate(inner_origins(gm)) if i in weights and o in self.exact}
        versions = plain_calls(gm, self.count) if self.key else None
        if self.key and versions is None:
            self.why_not = "arguments or results share memory, or AOTAutograd changes them"

        def keep_it(prepared: Prepared) -> None:
            if self.folder is not None and versions is not None:
                self.why_not = keep(self.folder, self.key, prepared, versions)

        compiled = compile_graph(gm, self.options, self.label, weights, inner_names(gm, self.names), exact, keep_it)
        compiled.stage_into(self.pages)
        if self.why_not:
            compiled.report.remarks.append(Remark("analysis", KEPT, KEPT, f"traced and prepared anew each time: {self.why_not}"))
        if versions is not None and isinstance(compiled, CompiledGraph):
            self.direct = called_directly(compiled, versions)
        return compiled


def plain_calls(gm: torch.fx.GraphModule, count: int) -> tuple[int, ...] | None:
    """Whether a call needs nothing of AOTAutograd's but that it raises version counters: of the arguments at these positions; None if
    it needs more: arguments or results that are views, tensors made of tensors, effects.

    Args:
        gm: what it traced.
        count: the arguments of Dynamo's graph.
    """
    context = torch._guards.TracingContext.try_get()
    meta = context.fw_metadata if context is not None else None
    results = [(type(d).__name__, getattr(d, "idx", None)) for d in gm.graph.output_node().meta.get("desc") or ()]
    if meta is None or [_origin(n) for n in gm.graph.find_nodes(op="placeholder")] != list(range(count)):
        return None
    if results != [("PlainAOTOutput", i) for i in range(len(results))]:
        return None
    around = (meta.num_mutated_inp_runtime_indices, meta.num_outputs_aliased, meta.num_intermediate_bases, meta.tokens,
              meta.dynamic_outputs, meta.is_rng_op_functionalized, meta.grad_enabled_mutation is not None)  # fmt: skip
    return None if any(around) else tuple(meta.mutated_graph_handled_indices_seen_by_autograd)


def called_directly(compiled: CompiledGraph, versions: Sequence[int]) -> Callable[..., Any]:
    """What Dynamo calls where calls are plain, and not under autocast, which AOTAutograd would turn off."""

    def run(*args: Any) -> list[Any]:
        if versions:
            torch.autograd.graph.increment_version([args[i] for i in versions])
        return compiled(list(args))

    return run


def compile_graph(gm: torch.fx.GraphModule, options: Options, label: str, weights: Mapping[int, str],
                  inputs: Mapping[int, str] | None = None, exact: Collection[int] = (),
                  keep: Callable[[Prepared], None] | None = None) -> CompiledGraph | LibraryGraph:  # fmt: skip
    """Compile outside of the tracer's modes: under its fake tensors, checking a pass by value would compute nothing."""
    with _disable_current_modes():
        return compile_fx(gm, weights, options, inputs=inputs, exact=exact, label=label, keep=keep)


def frozen_inputs(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, str]:
    """Index and name of the Dynamo inputs that are parameters, buffers or tensor attributes of modules."""
    found = {}
    for i, (node, example) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)):
        marks = node.meta.get("tensor_dict") or {}
        if isinstance(example, torch.nn.Parameter) or (isinstance(example, torch.Tensor) and marks.get("_dynamo_static_input_type")):
            source = getattr(node, "_dynamo_source", None)
            found[i] = clean_name(source.name if source is not None else node.name)
    return found


def multiplied(gm: torch.fx.GraphModule, inputs: Iterable[int]) -> list[int]:
    """Those of Dynamo's inputs that may be packed: matrices and filters that are not only looked up, or read in place by few rows."""
    nodes = gm.graph.find_nodes(op="placeholder")
    shapes = {i: getattr(nodes[i].meta.get("example_value"), "ndim", 0) for i in inputs}
    return [i for i, rank in shapes.items() if rank >= 2 and any(_may_pack(user) for user in nodes[i].users)]


def _may_pack(user: torch.fx.Node) -> bool:
    if user.target is not torch.nn.functional.linear:
        return user.target not in _LOOKUPS
    made = user.meta.get("example_value")
    if not isinstance(made, torch.Tensor) or not all(isinstance(d, int) for d in made.shape):
        return True
    return prod(made.shape[:-1]) > ROWS


def is_written(gm: torch.fx.GraphModule, i: int) -> bool:
    """Whether an operation is in place on one of Dynamo's inputs; one on a view of it is not seen."""
    node = gm.graph.find_nodes(op="placeholder")[i]
    users = [user for user in node.users if user.args[:1] == (node,)]
    names = [str(user.target if user.op == "call_method" else getattr(user.target, "__name__", "")) for user in users]
    return any(name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) for name in names)


def input_names(gm: torch.fx.GraphModule) -> dict[int, str]:
    """Index and name, as the user's code has it, of the Dynamo inputs."""
    sources = [getattr(node, "_dynamo_source", None) for node in gm.graph.find_nodes(op="placeholder")]
    return {i: clean_name(source.name).removeprefix("L.") for i, source in enumerate(sources) if source is not None}


def _undisturbed(compiled: Any, reason: str) -> Callable[..., Any]:
    """Keep Dynamo from looking into what was compiled."""
    wrapped = torch._dynamo.disable(compiled, reason=reason)  # type: ignore[no-untyped-call]
    wrapped._boxed_call = getattr(compiled, "_boxed_call", False)  # the wrapper hides it from AOTAutograd
    return wrapped  # type: ignore[no-any-return]


def inner_weights(gm: torch.fx.GraphModule, static: Mapping[int, str]) -> dict[int, str]:
    """The same for AOTAutograd's placeholders, which may be reordered; what the graph itself updates is no weight."""
    placeholders, origins = gm.graph.find_nodes(op="placeholder"), inner_origins(gm)
    updated = [n.args[0] for n in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)]
    return {i: static[o] for i, (n, o) in enumerate(zip(placeholders, origins)) if o is not None and o in static and n not in updated}


def inner_origins(gm: torch.fx.GraphModule) -> list[int | None]:
    """Which Dynamo input each of AOTAutograd's placeholders is."""
    origins = [_origin(n) for n in gm.graph.find_nodes(op="placeholder")]
    if not any(o is not None for o in origins):  # a PyTorch that does not describe its placeholders: same order if same number
        return list(range(len(origins)))
    return origins


def inner_names(gm: torch.fx.GraphModule, names: Mapping[int, str]) -> dict[int, str]:
    """The user's names of AOTAutograd's placeholders, where they are arguments of the user's."""
    origins = [_origin(n) for n in gm.graph.find_nodes(op="placeholder")]
    return {i: names[o] for i, o in enumerate(origins) if o is not None and o in names}


def _origin(node: torch.fx.Node) -> int | None:
    """Which Dynamo input a placeholder is; None for one made up by AOTAutograd (the common base of overlapping inputs)."""
    description = node.meta.get("desc")
    return description.idx if type(description).__name__ == "PlainAOTInput" else None  # type: ignore[union-attr]


def graph_label(gm: torch.fx.GraphModule) -> str:
    """A name for reports: the outermost module's class, else the function that the graph comes from."""
    for node in gm.graph.nodes:
        for _, kind in (node.meta.get("nn_module_stack") or {}).values():
            return class_name(kind)
        found = re.search(r'File "[^"]+", line \d+, in (\S+)', node.meta.get("stack_trace") or "")
        if found and node.op == "call_function":
            return found.group(1)
    return "graph"

"""Times in a ledger: both models are compiled and profiled in turns, and a kernel's time put beside the weights it multiplies by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from graphopt.capture.captured import TensorArgument
from graphopt.compiled import CompiledGraph
from graphopt.ir.graph import Graph, Node, Value, is_view
from graphopt.ledger import Entry, Ledger
from graphopt.lower import KernelStep
from graphopt.model import CompiledModel, compile
from graphopt.profile import CallCost, Profile

RUNS = 20  # of each model, in turns of a few
_TURNS = 4


def measure_times(model: nn.Module, result: nn.Module, entries: Mapping[str, Entry], ledger: Ledger, args: Sequence[Any],
                  kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> None:  # fmt: skip
    """Time both models' kernels in turns, and put times beside the weights that they multiply by."""
    compiled = [compile(m, args, kwargs, **options) for m in (model, result)]
    if not all(isinstance(c._compiled, CompiledGraph) for c in compiled):
        return  # library calls as a whole: there are no kernels to time
    profiles: list[list[Profile]] = [[], []]
    for _ in range(_TURNS):
        for c, found in zip(compiled, profiles, strict=True):
            found.append(c.profile(*args, runs=RUNS // _TURNS, **kwargs))
    ledger.float_seconds, ledger.seconds = (min(p.seconds for p in found) for found in profiles)
    before, after = (_by_weights(c, found, entries) for c, found in zip(compiled, profiles, strict=True))
    for names in families([*before, *after]):
        old = [c for n, calls in before.items() if set(n) <= set(names) for c in calls]
        new = [c for n, calls in after.items() if set(n) <= set(names) for c in calls]
        members = [entries[n] for n in names if n in entries]
        if not old or not new or not any(e.quantized for e in members):
            continue
        kernels = dict.fromkeys(_kernel(call) for call, _ in new)
        for e in members:
            e.kernel, e.together = ", ".join(kernels), tuple(m.name for m in members)
            e.seconds, e.float_seconds = sum(s for _, s in new), sum(s for _, s in old)
            e.bytes_read = sum(call.bytes for call, _ in new)


def _by_weights(compiled: CompiledModel, profiles: Sequence[Profile],
                entries: Mapping[str, Entry]) -> dict[tuple[str, ...], list[tuple[CallCost, float]]]:  # fmt: skip
    """Names of modules -> the calls that multiply by their weights, and their times: the least of what several profiles say."""
    graph = compiled._compiled
    if not isinstance(graph, CompiledGraph):
        return {}
    given = compiled._exported.weights
    names = {a.input: given[i] for i, a in enumerate(graph.captured.arguments) if isinstance(a, TensorArgument) and i in given}
    out: dict[tuple[str, ...], list[tuple[CallCost, float]]] = {}
    places = {call.step.node: i for i, call in enumerate(profiles[0].calls) if call.step is not None}
    for i, call in enumerate(profiles[0].calls):
        if call.step is None or call.kind not in ("matmul", "conv", "library"):
            continue
        found = dict.fromkeys(names[v.index] for v in _weights_behind(call.step.node.operands) if v.index in names)
        modules = tuple(dict.fromkeys(_module(n, entries) for n in found if n.rpartition(".")[2] in ("weight", "integers")))
        if not modules:
            continue
        for k in (i, *(places.pop(n) for n in _scales_before(call.step.node) if n in places)):
            out.setdefault(modules, []).append((profiles[0].calls[k], min(p.calls[k].seconds for p in profiles)))
    return out


def _scales_before(node: Node) -> list[Node]:
    """The kernels that make the scale of an image for the one that rounds it: its largest magnitude, and products with other scales."""
    out: list[Node] = []
    for n in dict.fromkeys(v.producer for v in node.operands):
        if n is None or n.op.name != "fusion" or not isinstance(n.body, Graph):
            continue
        body = [m for m in n.body.nodes() if not is_view(m)]
        if any(m.op.name == "max" and m.operands[0].defined_by("abs") for m in body):
            out.append(n)
        elif all(m.op.name == "mul" for m in body) and (before := _scales_before(n)):
            out += [n, *before]
    return out


def _module(name: str, entries: Mapping[str, Entry]) -> str:
    """The linear layer that a weight belongs to; of a layer that was split into parts, that layer."""
    module = name.rpartition(".")[0]
    whole = re.sub(r"\.parts\.\d+$", "", module)
    return whole if whole in entries else module


def _weights_behind(values: Iterable[Value]) -> list[Value]:
    """The inputs that staged values are made from; nothing of what is computed at each call."""
    found: dict[Value, None] = {}
    for v in values:
        stack, mine, whole = [v], dict[Value, None](), True
        while stack and whole:
            u = stack.pop()
            if u.producer is not None:
                whole = u.producer.op.name != "fusion"
                stack += u.producer.operands
            elif u.weight:
                mine[u] = None
            else:
                whole = False
        found |= mine if whole else {}
    return list(found)


def families(keys: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Sets of names that have none in common, put together from sets that have."""
    out: list[dict[str, None]] = []
    for key in keys:
        touching = [s for s in out if any(n in s for n in key)]
        merged = dict.fromkeys(n for s in touching for n in s) | dict.fromkeys(key)
        out = [s for s in out if s not in touching] + [merged]
    return [tuple(s) for s in out]


def _kernel(call: CallCost) -> str:
    return f"{call.step.schedule.template}" if isinstance(call.step, KernelStep) else "library"

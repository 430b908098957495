"""From an optimized graph to steps: kernels for fusion regions, library calls for the rest, views for free.

Nothing is built here. Each step knows its values; :mod:`graphopt.program` gives the values memory and writes the program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.base import Backend
from graphopt.bounds import IndexCheck, index_checks
from graphopt.ir import dims
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.interpreter import resolve_aten
from graphopt.ir.ops import Trait
from graphopt.ir.stage import staged_values
from graphopt.ir.types import TensorType
from graphopt.target import Target


@dataclass
class KernelStep:
    """Launch a generated kernel. ``symbols`` are passed behind the tensors, in this order.

    ``in_place``: the operand in whose memory the result lies, if any. ``tuned``: where the schedule is from, in words.
    """

    node: Node
    workload: Workload
    schedule: Schedule
    backend: str
    symbols: list[str]
    checks: list[IndexCheck] = field(default_factory=list)
    in_place: int | None = None
    tuned: str = "default schedule"


@dataclass
class LibraryStep:
    """Call PyTorch. ``asked``: the options asked for it, or it is no computation worth a kernel, or it is as fast as none.

    ``instead``: what this is a part of, which the library computes faster than a kernel.
    """

    node: Node
    reason: str
    asked: bool = False
    instead: Workload | None = None


@dataclass
class ViewStep:
    """Make a view: no data moves where the layout allows it."""

    node: Node


Step = KernelStep | LibraryStep | ViewStep

VIEW_OPS = ("reshape", "transpose", "broadcast_to", "slice")


@dataclass
class Lowered:
    """The steps of a program.

    Attributes:
        staged: nodes that depend on weights alone, in order; run when weights change.
        boundary: staged values that steps or outputs use.
        in_place: output -> the input whose memory it is in after the run.
    """

    graph: Graph
    staged: list[Node]
    boundary: list[Value]
    steps: list[Step]
    in_place: dict[int, int] = field(default_factory=dict)


def lower(graph: Graph, target: Target, backend: Backend | None, why_none: str = "", asked: bool = False,
          library: Mapping[Node, KernelStep] | None = None) -> Lowered:  # fmt: skip
    """Choose a kernel or a library call for every node.

    Args:
        library: nodes that are left to the library by choice, and the step that they take the place of.
        backend: who generates kernels; None for library calls only.
        why_none: the reason to report where there is no backend.
        asked: whether library calls are what the options ask for.
    """
    staged = staged_values(graph)
    staged_nodes: list[Node] = []
    steps: list[Step] = []
    for node in graph.nodes():
        if staged.node(node):
            staged_nodes.append(node)
        else:
            instead = (library or {}).get(node)
            if instead is None:
                steps.append(_step(node, target, backend, why_none, asked))
            else:
                step = _step(node, target, None, instead.tuned, asked=True)
                steps.append(replace(step, instead=instead.workload) if isinstance(step, LibraryStep) else step)
    boundary: dict[Value, None] = {}
    for node in [*(s.node for s in steps), graph.ret]:
        for v in node.operands:
            if v in staged and not v.is_input:
                boundary[v] = None
    return Lowered(graph, _needed(staged_nodes, boundary), list(boundary), steps)


def _needed(nodes: Sequence[Node], wanted: dict[Value, None]) -> list[Node]:
    """The nodes that the wanted values depend on."""
    needed: dict[Value, None] = dict(wanted)
    out = []
    for node in reversed(nodes):
        if any(r in needed for r in node.results):
            out.append(node)
            needed.update(dict.fromkeys(node.operands))
    return out[::-1]


def _step(node: Node, target: Target, backend: Backend | None, why_none: str, asked: bool) -> Step:
    if node.op.name in VIEW_OPS:
        return ViewStep(node)
    if node.op.name == "constant":
        return LibraryStep(node, "a scalar constant", asked=True)
    if backend is None:
        return LibraryStep(node, why_none, asked)
    if node.op.name == "aten":
        dtypes = ", ".join(dict.fromkeys(str(v.dtype) for v in node.operands))
        return LibraryStep(node, f"{node.attrs['target']} {f'of {dtypes} ' if dtypes else ''}has no lowering", asked)
    if node.body is None:
        return LibraryStep(node, f"{node.op.name} has no kernel template yet", asked)
    body = plain_layouts(node.body)
    workload = Workload.of(body, node.attrs["kind"])
    templates = backend.templates(workload, target)
    if not templates:
        return LibraryStep(node, backend.reason(workload, target), asked)
    checks = index_checks(body)
    if checks is None:
        return LibraryStep(node, "an index that can be neither proven in range nor checked beforehand", asked)
    schedule = templates[0].space(workload, target).default()
    return KernelStep(node, workload, schedule, backend.name, sorted(body.symbols), checks)


def plain_layouts(body: Graph) -> Graph:
    """The body with symbolic strides dropped: such inputs are made contiguous before the call."""
    if all(v.type.strides is None or dims.is_static(v.type.strides) for v in body.inputs):
        return body
    body = body.clone()
    for v in body.inputs:
        if v.type.strides is not None and not dims.is_static(v.type.strides):
            v.type = v.type.logical
    return body


def kernel_operand_types(step: KernelStep) -> list[TensorType]:
    """The layouts that a kernel expects of its operands."""
    return [v.type for v in step.workload.graph.inputs]


def may_alias(node: Node) -> bool:
    """Whether a library call may return memory of its operands."""
    if node.op.name == "aten":
        returns = resolve_aten(node.attrs["target"])._schema.returns
        return any(r.alias_info is not None for r in returns)
    return node.op.has(Trait.VIEW) or node.op.name in ("cast", "fusion")

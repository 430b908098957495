"""Regions that are PyTorch's by choice: the tuner found its kernels to be faster, in turns with the best of ours.

Such a region is dissolved: each of its operations is a call of the library, and what depends on weights alone, such as undoing how they
were packed, is computed once, with everything else that does.
"""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.autotune.library_kernel import TEMPLATE
from graphopt.backends.base import Backend
from graphopt.in_place import update_in_place
from graphopt.ir.graph import Graph, Node, Value, copy_nodes
from graphopt.lower import KernelStep, Lowered, lower
from graphopt.target import Target


def take_library(lowered: Lowered, mutated: Mapping[int, int], target: Target, backend: Backend) -> Lowered:
    """The program with library calls where a step's schedule says so; the same one if none does. The graph is changed in place.

    Args:
        mutated: see :func:`~graphopt.in_place.update_in_place`.
    """
    kernels = {s.node: s for s in lowered.steps if isinstance(s, KernelStep)}
    left = [s for s in kernels.values() if s.schedule.template == TEMPLATE]
    if not left:
        return lowered
    library = {node: step for step in left for node in _dissolve(lowered.graph, step.node)}
    out = lower(lowered.graph, target, backend, library=library)
    update_in_place(out, mutated, target, backend)
    for s in out.steps:
        if isinstance(s, KernelStep):
            s.schedule, s.tuned = kernels[s.node].schedule, kernels[s.node].tuned
    return out


def _dissolve(graph: Graph, node: Node) -> list[Node]:
    """Put the operations of a region in its place."""
    body = node.body
    assert body is not None
    mapping: dict[Value, Value] = dict(zip(body.inputs, node.operands, strict=True))
    copy_nodes(body.nodes(), mapping, graph, node)
    for old, new in zip(node.results, body.outputs, strict=True):
        graph.replace(old, mapping[new])
    new_nodes = [mapping[r].producer for n in body.nodes() for r in n.results[:1]]
    graph.erase(node)
    return [n for n in new_nodes if n is not None]

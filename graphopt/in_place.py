"""Updates in place: an argument that the caller wants changed is written by the kernel that updates it, and copied nowhere.

Functional graphs say ``new = put(cache, index, value)`` and then copy all of ``new`` over ``cache``, the argument. Where nothing
reads the old contents after the update, the update may be written into the argument's own memory: a key-value cache of a
thousand tokens costs one token's writes then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphopt.autotune.space import Workload
from graphopt.backends.base import Backend
from graphopt.ir.graph import Graph, Value
from graphopt.lower import KernelStep, LibraryStep, Lowered, ViewStep, may_alias
from graphopt.target import Target


def update_in_place(lowered: Lowered, mutated: Mapping[int, int], target: Target, backend: Backend | None) -> None:
    """Turn steps of the kind ``scatter`` into ``update`` steps, whose result lies in their operand's memory.

    Args:
        mutated: graph output -> the graph input that it is copied into after the run. What a caller gets as a result of its own
            must not be among them.
        backend: whose default schedules for an update in place are taken: another way may be the best one where nothing is copied.
    """
    for output, source in mutated.items():
        chain = _chain(lowered, lowered.graph.outputs[output], lowered.graph.inputs[source])
        if chain and lowered.graph.output_strides[output] is None:
            for step, operand in chain:
                assert backend is not None
                step.workload = Workload.of(step.workload.graph, "update")
                step.schedule = backend.templates(step.workload, target)[0].space(step.workload, target).default()
                step.in_place = operand
            lowered.in_place[output] = source


def _chain(lowered: Lowered, new: Value, old: Value) -> list[tuple[KernelStep, int]]:
    """The updates that lead from the old value to the new one, with the operand that each writes; empty if not all can be in place."""
    if old.type.strides is not None:
        return []
    steps = {r: (i, s) for i, s in enumerate(lowered.steps) for r in s.node.results}
    found: list[tuple[KernelStep, int]] = []
    value = new
    while value is not old:
        if value not in steps:
            return []
        i, step = steps[value]
        if isinstance(step, ViewStep) and step.node.op.name == "reshape":
            value = step.node.operands[0]
            continue
        if not isinstance(step, KernelStep) or step.workload.kind != "scatter":
            return []
        operand = updated_operand(step.workload.graph)
        if operand is None or _read_later(lowered, step.node.operands[operand], i):
            return []
        found.append((step, operand))
        value = step.node.operands[operand]
    return found


def updated_operand(body: Graph) -> int | None:
    """The input of a region that its update starts from, if nothing else of the region reads it."""
    root = body.outputs[0].producer
    if root is None or body.output_strides[0] is not None:
        return None
    value = root.operands[0]
    while value.has_one_use and value.producer is not None and value.producer.op.name == "reshape":
        value = value.producer.operands[0]
    return value.index if value.is_input and value.has_one_use and value.type.strides is None else None


def _read_later(lowered: Lowered, old: Value, at: int) -> bool:
    """Whether the memory of a value is read after a step, by a later step or by the caller, or by the step itself through a view."""
    same = {_origin(lowered.steps, old): None}
    for i, step in enumerate(lowered.steps):
        reads = any(v in same for v in step.node.operands)
        if reads and (i > at or (i == at and any(v in same and v is not old for v in step.node.operands))):
            return True
        if reads and (isinstance(step, ViewStep) or (isinstance(step, LibraryStep) and may_alias(step.node))):
            same.update(dict.fromkeys(step.node.results))
    return any(v in same for v in lowered.graph.outputs)


def _origin(steps: Sequence[object], value: Value) -> Value:
    """The value that a view is made of."""
    views = {s.node.result: s.node.operands[0] for s in steps if isinstance(s, ViewStep)}
    while value in views:
        value = views[value]
    return value

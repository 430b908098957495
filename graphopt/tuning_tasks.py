"""What can be tuned of a model: its different workloads, what share of its time each has, and how far from the limits it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from graphopt.autotune.measure import Subject
from graphopt.autotune.space import Rule, Workload
from graphopt.autotune.tasks import Task
from graphopt.errors import GraphoptError, first_line
from graphopt.ir import Trait, dims, types
from graphopt.ir.graph import Value
from graphopt.ir.stage import staged_values
from graphopt.lower import KernelStep
from graphopt.profile import Profile
from graphopt.target import HALVES_PRODUCTS, THIRDS_PRODUCTS, Target
from graphopt.trials import CPU, cannot_be_tried, case_maker
from graphopt.tuning import spaces_of

MOST_BETWEEN = 256 << 20  # bytes over which weights are rotated at most
WORTH = 0.01  # share of the models' time from which on it is measured what PyTorch takes for a task

LeastSeconds = Callable[[float, float, int], float]
"""(floating-point operations, bytes from memory, whether products may be summed from thirds) -> seconds that the machine needs at least."""


@dataclass
class _Use:
    """A workload in a model, and the calls of it."""

    step: KernelStep
    sizes: dict[str, int]
    weights: tuple[int, ...]
    weight_bytes: int
    name: str = ""
    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0


@dataclass
class Tasks:
    """What can be tuned of some models.

    Attributes:
        tasks: the dearest first.
        share: of the models' time, by task.
        seconds: of a run of each model, with default schedules.
        left_out: (what, why) of calls that are not tuned.
        estimated: nothing was measured: times are what :func:`graphopt.max_autotune.estimate` makes of the work that there is.
    """

    tasks: list[Task] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    estimated: bool = False


def tasks_of(profiles: Sequence[Profile], target: Target, least: LeastSeconds | None = None,
             library: Callable[[Subject], float] | None = None, device: torch.device = CPU) -> Tasks:  # fmt: skip
    """The tasks of models that were profiled with default schedules.

    Args:
        least: what the machine can do; None if that was not measured.
        library: times PyTorch's kernels for the same; asked for tasks with a hundredth of the models' time, or more.
        device: where f64 references are computed.
    """
    found = Tasks()
    uses: dict[Workload, _Use] = {}
    between = 0
    for profile in profiles:
        assert profile.graph is not None
        found.seconds.append(profile.seconds)
        staged, sizes = staged_values(profile.graph), profile.sizes
        values: dict[Value, None] = {}
        for call in profile.calls:
            if not isinstance(call.step, KernelStep):
                why = call.step.reason if call.step else ""
                found.left_out.append((call.what, "a library call" + (f": {why}" if why else "")))
                continue
            values.update(dict.fromkeys((*call.step.node.operands, *call.step.node.results)))
            use = uses.setdefault(call.step.workload, _use(call.step, staged, sizes))
            use.name, use.calls, use.flops, use.bytes = call.what, use.calls + 1, call.flops, call.bytes
            use.seconds += call.seconds
        between += sum(_bytes(v, sizes) for v in values)
    total = sum(found.seconds)
    cold = between > 4 * target.cores * target.cache[1]
    for w, use in sorted(uses.items(), key=lambda item: -item[1].seconds):
        if why := cannot_be_tried(w) or _fixed(w, target):
            found.left_out.append((use.name, why))
            continue
        one = use.seconds / use.calls
        limited = use.flops if _by_multiply_adds(use.step) else 0  # the limit is that of f32
        share = use.seconds / total if total else 0.0
        read = min(use.weight_bytes, use.bytes) if cold else 0  # of a table, the rows that are taken
        floor = least(limited, read, _tile_products(w, target)) if least else 0.0
        try:
            make_case = case_maker(w, use.sizes, device)
        except GraphoptError as error:
            found.left_out.append((use.name, first_line(error)))
            continue
        subject = Subject(w, make_case, use.weights, min(between, MOST_BETWEEN), use.sizes, floor)
        eager = library(subject) if library and share >= WORTH else 0.0
        found.tasks.append(Task(subject, use.name, use.step.schedule, use.calls, one, eager, use.flops, read))
        found.share.append(share)
    return found


def _by_multiply_adds(step: KernelStep) -> bool:
    """Whether products are of f32: those of integers and of halves are several times as fast where there are instructions for them."""
    return all(n.operands[0].dtype == types.f32 for n in step.workload.graph.nodes() if n.op.has(Trait.CONTRACTION))


def _tile_products(w: Workload, target: Target) -> int:
    """How many products of narrower numbers, for which there are faster instructions, a kernel may make one of f32 of; 0 if none."""
    split = [s.template for s in spaces_of(w, target) for rules in s.rules.values() if Rule.SPLIT_NUMBERS in rules]
    return 0 if not split else HALVES_PRODUCTS if "halves" in split else THIRDS_PRODUCTS


def _use(step: KernelStep, staged: Any, sizes: Mapping[str, int]) -> _Use:
    operands = step.node.operands
    weights = tuple(i for i, v in enumerate(operands) if v in staged and i != step.in_place)
    values = {new: sizes[old] for new, old in zip(sorted(step.workload.graph.symbols), step.symbols, strict=True)}
    return _Use(step, values, weights, sum(_bytes(operands[i], sizes) for i in weights))


def _bytes(v: Value, sizes: Mapping[str, int]) -> int:
    return prod(d if isinstance(d, int) else dims.evaluate(d, sizes) for d in v.shape) * v.dtype.itemsize


def _fixed(w: Workload, target: Target) -> str:
    """Why there is nothing to choose for a workload; empty if there is."""
    spaces = spaces_of(w, target)
    return "" if sum(prod(len(p.choices) for p in s.params) * len(s.sketches) for s in spaces) > 1 else "there is one schedule only"

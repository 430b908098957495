"""What a kernel template is: which regions it takes, its search space, and the emitter behind it. Needs no tvm until ``emit``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from graphopt.autotune.space import LoopNest, Param, Schedule, SearchSpace, Workload
from graphopt.backends.base import KernelSource
from graphopt.backends.tvm.rules import RULES
from graphopt.ir.graph import Graph
from graphopt.ir.ops import Trait
from graphopt.ir.work import flops
from graphopt.target import Target


def entry_name(w: Workload, s: Schedule) -> str:
    """Entry point of a kernel: a C identifier, unique by workload and schedule."""
    digest = hashlib.sha256(f"{w.kind}\n{w.text}\n{s.to_json()}".encode()).hexdigest()[:16]
    kind = "".join(c if c.isalnum() else "_" for c in w.kind)
    return f"{kind}_{digest}"


def lanes_of(graph: Graph, t: Target) -> int:
    """Elements a vector: by the widest float, or the widest result."""
    values = [*graph.inputs, *(r for n in graph.nodes() for r in n.results)]
    wide = any(v.dtype.is_float and v.dtype.bits == 64 for v in values) or any(v.dtype.bits == 64 for v in graph.outputs)
    return max(1, t.lanes(8 if wide else 4))


@dataclass(frozen=True)
class Template:
    """A kernel family of the backend.

    Attributes:
        name: as in ``Schedule.template``.
        takes: why a region is not for this template, or None if it is. Looks at the IR only.
        params: the knobs for a workload.
        write: (workload, schedule, target) -> the emitted :class:`~graphopt.backends.tvm.code.Code`; imports tvm.
        spaces_of: (workload, target) -> the spaces of a template with several sketches; that of the default first.
        nest: (workload, target) -> the loops of a schedule, for a cost model.
    """

    name: str
    takes: Callable[[Workload, Target], str | None]
    params: Callable[[Workload, Target], tuple[Param, ...]]
    write: Callable[[Workload, Schedule, Target], Any]
    spaces_of: Callable[[Workload, Target], tuple[SearchSpace, ...]] | None = None
    nest: Callable[[Workload, Target], Callable[[Schedule], LoopNest]] | None = None

    def space(self, w: Workload, t: Target) -> SearchSpace:
        """The space whose default needs no tuning."""
        return self.spaces(w, t)[0]

    def spaces(self, w: Workload, t: Target) -> tuple[SearchSpace, ...]:
        """All schedules, the space of the default first."""
        if self.spaces_of is not None:
            found = self.spaces_of(w, t)
        else:
            found = (SearchSpace(self.name, params=self.params(w, t), nest=self.nest and self.nest(w, t)),)
        if t.cores > 1 and is_large(w):
            found = tuple(replace(space, params=tuple(_shared(p) for p in space.params)) for space in found)
        return tuple(replace(space, rules={name: RULES.get((self.name, name), ()) for name in space.sketches}) for space in found)

    def emit(self, w: Workload, s: Schedule, t: Target) -> KernelSource:
        """The kernel as a TensorIR function; its text is TVMScript."""
        name = entry_name(w, s)
        function = self.write(w, s, t).function(name)
        return KernelSource(name, "tvmscript", function.script(), function)


_LARGE_PRODUCT, _LARGE_RESULT = 1 << 26, 1 << 20  # operations, and elements, for which several threads are always worth their launch


def is_large(w: Workload) -> bool:
    """Whether one thread would take tens of microseconds and more, on any processor: then nobody has to try whether it is faster.

    A region with symbolic sizes may be small, and so may be what an update in place changes of a large result.
    """
    if w.kind == "update":
        return False
    work = [flops(n) for n in w.graph.nodes() if n.op.has(Trait.CONTRACTION)]
    if any(isinstance(n, int) and n >= _LARGE_PRODUCT for n in work):
        return True
    written = [v.type.numel for v in w.graph.outputs]
    return any(isinstance(n, int) and n >= _LARGE_RESULT for n in written)


def _shared(p: Param) -> Param:
    """The knob without the choice of one thread."""
    return replace(p, choices=(True,)) if p.name == "parallel" and p.choices[0] is True else p


def loops_of(name: str) -> Callable[[Workload, Target], Callable[[Schedule], LoopNest]]:
    """The loops of a template, by the name of the function that tells them."""

    def of(w: Workload, t: Target) -> Callable[[Schedule], LoopNest]:
        from graphopt.backends.tvm import loopnests

        return getattr(loopnests, name)(w.graph, t)

    return of

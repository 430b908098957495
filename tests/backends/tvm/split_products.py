"""What the tests of products from parts share: schedules to try, and a kernel as a function."""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir import Graph, dims
from graphopt.target import Target


def default(w: Workload, t: Target, template: str) -> Schedule:
    """The default schedule of the preferred template, which must be the one of that name."""
    first = TvmBackend().templates(w, t)[0]
    assert first.name == template
    return first.space(w, t).default()


def schedules(w: Workload, t: Target, template: str) -> list[Schedule]:
    """The default, and one other choice of each knob."""
    first = default(w, t, template)
    space = TvmBackend().templates(w, t)[0].space(w, t)
    out = [first]
    for p in space.params:
        others = (Schedule.make(template, "default", **{**dict(first.knobs), p.name: c}) for c in p.choices[1:])
        out += [s for s in others if space.rejection(s) is None][:1]
    return out


def runner(graph: Graph, kernel: Callable[..., None]) -> Callable[..., list[torch.Tensor]]:
    """From inputs, and symbolic sizes, to the one output, whose memory held something else before."""

    def run(inputs, sizes=None):
        shape = [d if isinstance(d, int) else dims.evaluate(d, sizes) for d in graph.outputs[0].shape]
        out = torch.full(shape, 77.0)
        kernel(*inputs, out, *(sizes or {}).values())
        return [out]

    return run

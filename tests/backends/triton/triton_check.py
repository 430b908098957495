"""Running regions under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.triton.backend import TritonBackend
from graphopt.backends.triton.build import load_source
from graphopt.backends.triton.template import Template
from graphopt.ir.graph import Graph
from graphopt.ir.interpreter import evaluate
from graphopt.target import Target
from graphopt.testing.kernels import Run

SM_90 = Target.from_name("cuda:sm_90:4")  # few processors: small sizes are cut into tiles as large as those of large ones, and go quickly


def templates(graph: Graph, kind: str, target: Target = SM_90) -> tuple[Workload, Sequence[Template]]:
    """The workload of a region, and the templates that take it."""
    w, backend = Workload.of(graph, kind), TritonBackend()
    found = backend.templates(w, target)
    assert found, f"{backend.reason(w, target)}\n{graph}"
    return w, found


def runner(graph: Graph, kind: str, schedule: Schedule | None = None, target: Target = SM_90) -> Run:
    """A region as a function from inputs to freshly allocated outputs, under the interpreter; the default schedule unless one is given."""
    w, found = templates(graph, kind, target)
    template = found[0] if schedule is None else next(t for t in found if t.name == schedule.template)
    source = template.emit(w, schedule or template.space(w, target).default(), target)
    kernel = load_source(source, interpret=True)

    def run(inputs: Sequence[torch.Tensor], bindings: dict[str, int] | None = None) -> list[torch.Tensor]:
        expected = evaluate(graph, inputs, bindings=bindings)
        outputs = [
            (torch.empty(e.shape, dtype=e.dtype) if s is None else torch.empty_strided(e.shape, s, dtype=e.dtype)).fill_(1)
            for e, s in zip(expected, graph.output_strides, strict=True)
        ]
        if all(o.numel() for o in outputs):
            try:
                kernel(*inputs, *outputs, *(v for _, v in sorted((bindings or {}).items())))
            except Exception as error:
                raise AssertionError(f"{type(error).__name__}: {error}\n{source.text}") from error
        return outputs

    return run

"""Building kernels once for a whole module of tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.backends.tvm.build import KernelBuilder, load_kernel
from graphopt.errors import BuildError
from graphopt.ir.graph import Graph
from graphopt.ir.interpreter import evaluate
from graphopt.target import Target, detect

pytest.importorskip("tvm_ffi")
Run = Callable[[Sequence[torch.Tensor], dict[str, int] | None], list[torch.Tensor]]


@pytest.fixture(scope="session")
def builder() -> KernelBuilder:
    return KernelBuilder()


@pytest.fixture(scope="session")
def kernels_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="session")
def compile_points(builder: KernelBuilder, kernels_dir: Path) -> Callable[[Sequence[tuple[Graph, Workload, Schedule]]], list[Run]]:
    """Build regions by schedules, all at once; each becomes a function from inputs to freshly allocated outputs."""

    def compile_points(points: Sequence[tuple[Graph, Workload, Schedule]], target: Target | None = None) -> list[Run]:
        jobs = [(w, s) for _, w, s in points]
        paths = builder.build_many(jobs, target or detect(), kernels_dir, errors="return")
        broken = [p for p in paths if isinstance(p, BuildError)]
        assert not broken, "\n\n".join(str(b)[:700] for b in broken[:12])
        return [_runner(graph, load_kernel(path, w, s)) for (graph, w, s), path in zip(points, paths, strict=True)]

    return compile_points


@pytest.fixture(scope="session")
def compile_all(compile_points: Any) -> Callable[[Sequence[tuple[Graph, str]]], list[Run]]:
    """Build many regions at once by their default schedules; each becomes a function from inputs to freshly allocated outputs."""

    def compile_all(regions: Sequence[tuple[Graph, str]], template: int = 0, target: Target | None = None) -> list[Run]:
        backend, target = TvmBackend(), target or detect()
        points = []
        for graph, kind in regions:
            w = Workload.of(graph, kind)
            templates = backend.templates(w, target)
            assert templates, f"{backend.reason(w, target)}\n{graph}"
            points.append((graph, w, templates[min(template, len(templates) - 1)].space(w, target).default()))
        return compile_points(points, target)  # type: ignore[no-any-return]

    return compile_all


def _runner(graph: Graph, kernel: Any) -> Run:
    def run(inputs: Sequence[torch.Tensor], bindings: dict[str, int] | None = None) -> list[torch.Tensor]:
        expected = evaluate(graph, inputs, bindings=bindings)
        outputs = [
            torch.full(e.shape, 77, dtype=e.dtype) if e.dtype != torch.bool else torch.ones(e.shape, dtype=e.dtype) for e in expected
        ]
        if all(o.numel() for o in outputs):
            kernel(*inputs, *outputs, *(v for _, v in sorted((bindings or {}).items())))
        return outputs

    return run

"""Building kernels once for a whole module of tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.autotune.space import Workload
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
def compile_all(builder: KernelBuilder, kernels_dir: Path) -> Callable[[Sequence[tuple[Graph, str]]], list[Run]]:
    """Build many regions at once; each becomes a function from inputs to freshly allocated outputs."""

    def compile_all(regions: Sequence[tuple[Graph, str]], template: int = 0, target: Target | None = None) -> list[Run]:
        backend, target = TvmBackend(), target or detect()
        jobs: list[Any] = []
        for graph, kind in regions:
            w = Workload.of(graph, kind)
            templates = backend.templates(w, target)
            assert templates, f"{backend.reason(w, target)}\n{graph}"
            jobs.append((w, templates[min(template, len(templates) - 1)].space(w, target).default()))
        paths = builder.build_many(jobs, target, kernels_dir, errors="return")
        broken = [p for p in paths if isinstance(p, BuildError)]
        assert not broken, "\n\n".join(str(b)[:700] for b in broken[:12])
        runs: list[Run] = []
        for (graph, _), (w, s), path in zip(regions, jobs, paths, strict=True):
            runs.append(_runner(graph, load_kernel(path, w, s)))
        return runs

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

"""Updates by index: every update and dtype, repeated positions, every axis, in place, symbolic sizes."""

from __future__ import annotations

import pytest
import torch
from tvm_check import check

from graphopt.autotune.space import Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.backends.tvm.build import load_kernel
from graphopt.ir.interpreter import evaluate
from graphopt.ir.opset.scatter import UPDATES
from graphopt.ir.text import parse_graph
from graphopt.target import detect

SHAPES = ((9,), (6, 70), (70, 6), (3, 8, 21), (2, 3, 5, 33))
DTYPES = ("f32", "f64", "f16", "bf16", "i64", "i32", "u8", "b1")


def put(dtype: str, shape: tuple[int, ...], index: tuple[int, ...], axis: int, update: str) -> str:
    source = (*shape[:axis], *index, *shape[axis + 1 :])
    x, i, s = (", ".join(map(str, n)) for n in (shape, index, source))
    return (f"graph @g(%x: {dtype}[{x}], %i: i64[{i}], %s: {dtype}[{s}]) -> {dtype}[{x}] {{\n"
            f" %0: {dtype}[{x}] = put(%x, %i, %s) {{axis = {axis}, update = \"{update}\"}}\n return %0\n}}")  # fmt: skip


def scatter(dtype: str, shape: tuple[int, ...], source: tuple[int, ...], axis: int, update: str) -> str:
    x, s = (", ".join(map(str, n)) for n in (shape, source))
    return (f"graph @g(%x: {dtype}[{x}], %i: i64[{s}], %s: {dtype}[{s}]) -> {dtype}[{x}] {{\n"
            f" %0: {dtype}[{x}] = scatter(%x, %i, %s) {{axis = {axis}, update = \"{update}\"}}\n return %0\n}}")  # fmt: skip


def numbers(graph, seed: int, **bindings: int) -> list[torch.Tensor]:
    """Few positions, so that they repeat; sources are small whole numbers, so that half precision adds them exactly."""
    generator = torch.Generator().manual_seed(seed)
    axis = next(n for n in graph.nodes()).attrs["axis"]
    out = []
    for v in graph.inputs:
        shape = [bindings[str(d)] if not isinstance(d, int) else d for d in v.shape]
        if v.hint == "i":
            size = graph.inputs[0].shape[axis]
            out.append(torch.randint(0, bindings.get(str(size), size), shape, generator=generator))
        else:
            out.append(torch.randint(0, 2 if v.dtype.is_bool else 4, shape, generator=generator).to(v.dtype.torch))
    return out


@pytest.mark.parametrize("update", UPDATES)
def test_put(compile_all, update: str) -> None:
    cases = [("f32", s, i, a) for s in SHAPES for a in range(len(s)) for i in ((), (4,), (3, 5))]
    cases += [(d, (6, 70), (9,), a) for d in DTYPES for a in (0, 1) if d != "b1" or update in ("set", "add")]
    graphs = [parse_graph(put(*case, update)) for case in cases]
    for seed, (graph, run) in enumerate(zip(graphs, compile_all([(g, "scatter") for g in graphs]), strict=True)):
        check(graph, run, numbers(graph, seed))


@pytest.mark.parametrize("update", UPDATES)
def test_scatter(compile_all, update: str) -> None:
    """The index is shorter than the tensor in other axes, and longer or shorter in its own."""
    cases = [
        ("f32", s, tuple(n + 3 if k == a else max(1, n - shorter) for k, n in enumerate(s)), a)
        for s in SHAPES
        for a in range(len(s))
        for shorter in (0, 2)
    ]
    cases += [(d, (6, 70), (5, 60), a) for d in DTYPES for a in (0, 1) if d != "b1" or update in ("set", "add")]
    graphs = [parse_graph(scatter(*case, update)) for case in cases]
    for seed, (graph, run) in enumerate(zip(graphs, compile_all([(g, "scatter") for g in graphs]), strict=True)):
        check(graph, run, numbers(graph, seed))


def test_large_updates_run_in_parallel_and_give_the_same_bits(compile_all) -> None:
    graphs = [parse_graph(t) for t in (put("f32", (50, 3000), (400,), 0, "add"), scatter("f32", (300, 400), (300, 900), 1, "add"))]
    for graph, run in zip(graphs, compile_all([(g, "scatter") for g in graphs]), strict=True):
        inputs = numbers(graph, 0)
        inputs[2] = torch.randn(inputs[2].shape)
        first = run(inputs, None)[0]
        check(graph, run, inputs, factor=4.0)
        assert all(torch.equal(first, run(inputs, None)[0]) for _ in range(5))


def test_work_before_the_update(compile_all) -> None:
    graph = parse_graph(
        'graph @g(%x: f32[8, 40], %i: i64[5], %s: f32[5, 40]) -> f32[8, 40] {\n %0: f32[8, 40] = neg(%x)\n %1: f32[5, 40] = exp(%s)\n'
        ' %2: f32[8, 40] = put(%0, %i, %1) {axis = 0, update = "add"}\n return %2\n}'
    )
    (run,) = compile_all([(graph, "scatter")])
    inputs = [torch.randn(8, 40), torch.tensor([3, 3, 0, 7, 3]), torch.randn(5, 40)]
    check(graph, run, inputs, factor=4.0)


def test_symbolic_sizes(compile_all) -> None:
    texts = [
        "graph @g(%x: f32[N, C], %i: i64[M], %s: f32[M, C]) -> f32[N, C]\nwhere 1 <= N, 1 <= M, 1 <= C {\n"
        f' %0: f32[N, C] = put(%x, %i, %s) {{axis = 0, update = "{update}"}}\n return %0\n}}'
        for update in ("set", "add")
    ]
    texts.append(
        "graph @g(%x: f32[C, N], %i: i64[C, M], %s: f32[C, M]) -> f32[C, N]\nwhere 1 <= N, 1 <= M, 1 <= C {\n"
        ' %0: f32[C, N] = scatter(%x, %i, %s) {axis = 1, update = "add"}\n return %0\n}'
    )
    graphs = [parse_graph(t) for t in texts]
    for graph, run in zip(graphs, compile_all([(g, "scatter") for g in graphs]), strict=True):
        for n, m, c in ((1, 1, 1), (5, 9, 70), (40, 3, 16), (7, 7, 1300)):
            bindings = {"N": n, "M": m, "C": c}
            check(graph, run, numbers(graph, n, **bindings), bindings)


def test_in_place(builder, kernels_dir) -> None:
    """A region of the kind ``update`` writes the operand's own memory, and only where the index says."""
    graph = parse_graph(put("f32", (2, 3, 50, 8), (2,), 2, "set"))
    w, target = Workload.of(graph, "update"), detect()
    s = TvmBackend().templates(w, target)[0].space(w, target).default()
    (path,) = builder.build_many([(w, s)], target, kernels_dir)
    kernel = load_kernel(path, w, s)
    x, i, source = torch.randn(2, 3, 50, 8), torch.tensor([7, 31]), torch.randn(2, 3, 2, 8)
    (expected,) = evaluate(graph, [x, i, source])
    kernel(x, i, source, x)
    assert torch.equal(x, expected)

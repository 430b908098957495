"""Products with a weight of bf16 on AMX tiles: first factors of bf16, f32 and 8 bits, in shapes that fill no tile."""

from __future__ import annotations

import pytest
import torch
from tvm_check import check

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.backends.tvm.bf16form import refusal
from graphopt.ir import Builder, DType, Graph, TensorType, dims, types
from graphopt.ir.interpreter import evaluate
from graphopt.passes.layout import pairs
from graphopt.target import Target, detect

M = dims.symbol("M")
needs_amx = pytest.mark.skipif(detect().bf16_products != "amx", reason="no AMX tiles here")


def region(rows: tuple, k: int, n: int, x: DType = types.f32, *, cast: bool = False, acc: bool = True, products: int = 1,
           epilogue: bool = False) -> Graph:  # fmt: skip
    """``rows x k`` of a dtype times packed weights of ``k x n``; ``cast``: given in f32, and rounded on the way."""
    g = Graph("body")
    b = Builder(g)
    for d in rows:
        if not isinstance(d, int):
            g.symbols[d.name] = dims.Range(1, None)
    left = g.add_input(TensorType(types.f32 if cast else x, (*rows, k)), "x")
    left = b.cast(left, x)
    sample = Graph("sample")
    packed = pairs.pack(Builder(sample), sample.add_input(TensorType(types.bf16, (k, n))), False)

    def product() -> object:
        w = pairs.unpack(b, g.add_input(packed.type.logical, "w"), k, n)
        return b.create("matmul", [left, w], {"acc": types.f32 if acc else None})

    ys = [product() for _ in range(products)]
    y = ys[0] if products == 1 else b.mul(b.silu(ys[0]), ys[1])
    if epilogue:
        y = b.gelu(b.add(y, g.add_input(TensorType(y.dtype, (n,)), "b")))
        y = b.cast(b.add(y, g.add_input(y.type, "r")), types.bf16)
    g.set_outputs([y])
    return g


CASES = {
    **{f"{m} rows": region((m,), 96, 64) for m in (9, 16, 17, 32, 33, 70)},
    **{f"{m} rows of bf16": region((m,), 96, 64, types.bf16) for m in (1, 2, 15, 33)},
    "bf16, rounded once": region((20,), 64, 96, types.bf16, acc=False),
    "rounded on the way": region((37,), 96, 64, types.bf16, cast=True, epilogue=True),
    "a depth that fills no step": region((20,), 75, 40),
    "a depth that fills no step, bf16": region((20,), 75, 40, types.bf16, cast=True),
    "ragged columns": region((20,), 64, 75, epilogue=True),
    "deep, in blocks": region((40,), 2500, 64),
    "several groups of rows": region((600,), 64, 64),
    "a batch": region((2, 3, 7), 96, 96, epilogue=True),
    "two products": region((50,), 192, 75, products=2),
    "two products of bf16": region((50,), 192, 75, types.bf16, products=2, epilogue=True),
    "any rows": region((M,), 96, 33, epilogue=True),
    "any rows of a batch, bf16": region((2, M), 75, 33, types.bf16, cast=True, epilogue=True),
}  # fmt: skip


def bindings(graph: Graph) -> list[dict[str, int]]:
    return [{"M": m} for m in (1, 15, 70)] if graph.symbols else [{}]


def values(graph: Graph, **sizes: int) -> list[torch.Tensor]:
    """Random inputs; behind a packed weight's last row and column are zeros."""
    generator, out = torch.Generator().manual_seed(0), []
    for v in graph.inputs:
        x = torch.randn([d if isinstance(d, int) else dims.evaluate(d, sizes) for d in v.shape], generator=generator)
        out.append(x.to(v.dtype.torch))
    product = next(n for n in graph.nodes() if n.name == "matmul")
    k, n = (int(d) for d in product.operands[1].shape)
    for x in out:
        if x.dim() == 4 and x.shape[-1] == 2:
            rows = (2 * torch.arange(x.shape[1])[:, None] + torch.arange(2)).reshape(1, -1, 1, 2)
            columns = (32 * torch.arange(x.shape[0])[:, None] + torch.arange(32)).reshape(-1, 1, 32, 1)
            x[((rows >= k) | (columns >= n)).expand_as(x)] = 0
    return out


def kernels(builder, folder, graphs, **change: object):
    """(graph, what runs its kernel), for each."""
    from graphopt.backends.tvm.build import load_kernel

    t, todo = detect(), []
    for graph in graphs:
        w = Workload.of(graph, "matmul")
        template = TvmBackend().templates(w, t)[0]
        assert template.name == "bf16", graph
        s = template.space(w, t).default()
        todo.append((w, Schedule(s.template, s.sketch, tuple((k, change.get(k, v)) for k, v in s.knobs))))
    for graph, (w, s), path in zip(graphs, todo, builder.build_many(todo, t, folder), strict=True):
        kernel = load_kernel(path, w, s)

        def run(inputs, sizes=None, graph=graph, kernel=kernel):
            shape = [d if isinstance(d, int) else dims.evaluate(d, sizes) for d in graph.outputs[0].shape]
            out = torch.full(shape, 77.0, dtype=graph.outputs[0].dtype.torch)
            kernel(*inputs, out, *(sizes or {}).values())
            return [out]

        yield graph, run


@needs_amx
@pytest.mark.parametrize("change", [
    {}, {"rows": 8}, {"group": 1, "panels": 1}, {"block": 64, "beside": False}, {"ahead": False, "parallel": False},
], ids=str)  # fmt: skip
def test_against_f64(builder, kernels_dir, change: dict) -> None:
    graphs = list(CASES.values()) if not change else [CASES["two products"], CASES["deep, in blocks"], CASES["any rows"]]
    for graph, run in kernels(builder, kernels_dir, graphs, **change):
        for sizes in bindings(graph):
            check(graph, run, values(graph, **sizes), sizes)


@needs_amx
def test_nothing_is_lost_of_f32(builder, kernels_dir) -> None:
    """A weight of bf16 is exact: the error is that of a sum of f32, where rounding the first factor would cost 2e-3."""
    ((graph, run),) = kernels(builder, kernels_dir, [region((64,), 768, 64)])
    inputs = values(graph)
    (true,), (got,) = evaluate(graph, inputs, wide=True), run(inputs)
    assert float((got.double() - true).norm() / true.norm()) < 2e-7


@needs_amx
@pytest.mark.parametrize("dtype", [types.f32, types.bf16])
def test_infinities_and_nan(builder, kernels_dir, dtype: DType) -> None:
    ((graph, run),) = kernels(builder, kernels_dir, [region((20,), 64, 40, dtype)])
    inputs = values(graph)
    inputs[0][3, 5], inputs[0][4, 7], inputs[0][6, 9], inputs[0][8, 1] = float("inf"), float("-inf"), float("nan"), 3e38
    if dtype == types.f32:
        inputs[0].view(torch.int32)[7, 2] = 0x7F800001  # a nan by its last bit
    inputs[1].view(-1, 64)[9:12] = 0.0
    (got,), (own,) = run(inputs), evaluate(graph, inputs)
    assert torch.equal(got.isnan(), own.isnan()) and torch.equal(got.isinf(), own.isinf())


def test_what_is_refused() -> None:
    amx = Target.from_name("cpu:sapphirerapids")
    assert refusal(region((20,), 64, 64), amx) is None
    assert "no AMX" in refusal(region((20,), 64, 64), Target.from_name("cpu:znver4"))
    assert "a product of f16" in refusal(region((20,), 64, 64, types.f16), amx)

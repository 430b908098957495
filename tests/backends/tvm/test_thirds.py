"""Products of f32 from thirds in bf16, on AMX tiles: as exact as f32, in every shape that fills no tile."""

from __future__ import annotations

import pytest
import torch
from split_products import default, runner, schedules
from tvm_check import check

from graphopt.autotune.space import Workload
from graphopt.backends.forms.support import materialized
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir import Builder, Graph, TensorType, dims, types
from graphopt.passes.layout import pack_weights
from graphopt.target import Target, detect

M = dims.symbol("M")
SAPPHIRE = Target.from_name("cpu:sapphirerapids:2")


def region(rows: tuple, k: int, n: int, *, prologue: bool = False, epilogue: bool = False, products: int = 1) -> Graph:
    """``rows x k`` times one or two packed weights of ``k x n``."""
    g = Graph("body")
    b = Builder(g)
    for d in rows:
        if not isinstance(d, int):
            g.symbols[d.name] = dims.Range(24, None)
    x = g.add_input(TensorType(types.f32, (*rows, k)), "x")
    x = b.gelu(x) if prologue else x
    sample = Graph("sample")
    packed = pack_weights.pack(Builder(sample), sample.add_input(TensorType(types.f32, (k, n))), False, 32)
    ys = [b.matmul(x, pack_weights.unpack(b, g.add_input(packed.type.logical, "w"), n)) for _ in range(products)]
    y = b.mul(b.silu(ys[0]), ys[1]) if products == 2 else ys[0]
    if epilogue:
        y = b.gelu(b.add(y, g.add_input(TensorType(types.f32, (n,)), "b")))
        y = b.add(y, g.add_input(y.type, "r"))
    g.set_outputs([y])
    return g


CASES = {
    **{f"{m} rows": region((m,), 96, 64) for m in (24, 31, 32, 33, 64, 100)},
    "one step": region((40,), 32, 40),
    "ragged columns": region((40,), 64, 75),
    "deep, in chunks": region((128,), 3072, 96),
    "several groups of rows": region((600,), 64, 64),
    "batch": region((3, 10), 64, 64, epilogue=True),
    "batch of one": region((1, 128), 256, 96, epilogue=True),
    "prologue": region((33,), 160, 96, prologue=True, epilogue=True),
    "two products": region((50,), 384, 160, products=2, epilogue=True),
    "two products, deep": region((128,), 2048, 64, products=2),
    "any rows": region((M,), 192, 96, epilogue=True),
    "any rows, odd": region((2, M), 96, 33, prologue=True),
}  # fmt: skip


def bindings(graph: Graph) -> list[dict[str, int]]:
    return [{"M": m} for m in (24, 32, 70, 300)] if graph.symbols else [{}]


def values(graph: Graph, **sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [[d if isinstance(d, int) else dims.evaluate(d, sizes) for d in v.shape] for v in graph.inputs]
    return [torch.randn(s, generator=generator) for s in shapes]


@pytest.fixture(scope="module")
def target() -> Target:
    t = detect()
    if not t.f32_thirds:
        pytest.skip("this processor has no AMX")
    return t


def test_products(builder, kernels_dir, target: Target) -> None:
    from graphopt.backends.tvm.build import load_kernel

    jobs = [(g, w, s) for g in CASES.values() for w in (Workload.of(g, "matmul"),) for s in schedules(w, target, "thirds")]
    paths = builder.build_many([(w, s) for _, w, s in jobs], target, kernels_dir)
    for (graph, w, s), path in zip(jobs, paths, strict=True):
        for sizes in bindings(graph):
            check(graph, runner(graph, load_kernel(path, w, s)), values(graph, **sizes), sizes)


def test_infinite_and_large_and_small_values(builder, kernels_dir, target: Target) -> None:
    """What eager gives for infinities, nan, and values near both ends of the range."""
    from graphopt.backends.tvm.build import load_kernel

    graph = region((32,), 64, 32)
    w = Workload.of(graph, "matmul")
    s = default(w, target, "thirds")
    run = runner(graph, load_kernel(builder.build_many([(w, s)], target, kernels_dir)[0], w, s))
    x, packed = values(graph)
    x, packed = x.abs() + 0.1, packed.abs() + 0.1
    x[0, 3], x[1, 5], x[2, 7], x[3] = float("inf"), float("-inf"), float("nan"), torch.finfo(torch.float32).max / 64
    x[4], x[5] = 1e-30, -torch.finfo(torch.float32).max
    packed[0, 9, 4], packed[0, 10, 5] = float("inf"), float("nan")
    packed[0, :, 6] = 0.5
    packed[0, :, 7] = 0.0
    want = x.double() @ packed[0].double()
    got = run([x, packed])[0]
    eager = x @ packed[0]
    assert torch.equal(got.isnan(), eager.isnan())
    assert torch.equal(got.isinf(), eager.isinf())
    fine = want.isfinite() & eager.isfinite()
    assert ((got.double() - want)[fine].abs() <= 1e-6 * want[fine].abs()).all()


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
@pytest.mark.parametrize("positive", [False, True])
def test_the_error_is_no_larger_than_that_of_a_sum_in_f32(builder, kernels_dir, target: Target, scale: float, positive: bool) -> None:
    from graphopt.backends.tvm.build import load_kernel

    graph = region((64,), 768, 96)
    w = Workload.of(graph, "matmul")
    s = default(w, target, "thirds")
    run = runner(graph, load_kernel(builder.build_many([(w, s)], target, kernels_dir)[0], w, s))
    x, packed = (t * scale for t in values(graph))
    x, packed = (x.abs(), packed.abs()) if positive else (x, packed)
    weight = packed.transpose(0, 1).reshape(768, 96)
    want = x.double() @ weight.double()
    one_by_one = torch.zeros(64, 96)
    for k in range(768):
        one_by_one += x[:, k, None] * weight[k]

    def error(y: torch.Tensor) -> float:
        return float((y.double() - want).norm() / want.norm())

    (got,) = run([x, packed])
    assert error(got) <= error(one_by_one)
    if positive:  # what is left out is of either sign: 4e-8 of every sum would be lost if all thirds had the number's
        assert abs(float((got.double() - want).sum() / want.sum())) < 2e-8


@pytest.mark.parametrize("rows", [128, M])
def test_machine_code(rows: object) -> None:
    """The six products of a step are 24 multiplications of tiles, and no more loads of tiles than there must be."""
    pytest.importorskip("tvm")
    from assembly import assembly, count, hot_loop

    w = Workload.of(region((rows,), 768, 96), "matmul")
    loop = hot_loop(assembly(w, SAPPHIRE), "tdpbf16ps")
    steps = count(loop, "tdpbf16ps") // 24
    assert steps and count(loop, "tdpbf16ps") == 24 * steps and count(loop, "tileloadd") == 14 * steps, "\n".join(loop)


def test_other_products_and_targets_take_another_template() -> None:
    def names(graph: Graph, t: str) -> str:
        return TvmBackend().templates(Workload.of(graph, "matmul"), Target.from_name(f"cpu:{t}"))[0].name

    many, few = region((64,), 64, 64), region((8,), 64, 64)
    assert [names(many, t) for t in ("sapphirerapids", "znver4", "x86-64-v4", "neoverse-v1")] == ["thirds", "tile", "tile", "tile"]
    assert names(few, "sapphirerapids") == "tile"
    assert names(region((64,), 50, 64), "sapphirerapids") == "tile"


def test_one_packing_for_pass_and_kernel() -> None:
    from graphopt.backends.tvm import thirdform

    assert (thirdform.COLUMNS, thirdform.STEP) == (pack_weights.COLUMNS, pack_weights.DEPTH)
    graph = region((32,), 64, 40)
    (node,) = materialized(graph)
    assert thirdform.packed_panels(node.operands[1]) is graph.inputs[1]
    assert thirdform.packed_panels(node.operands[0]) is None

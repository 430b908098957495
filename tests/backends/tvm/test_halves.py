"""Products of f32 from halves in f16, on AMX tiles: as exact as f32, in every shape that fills no tile."""

from __future__ import annotations

import pytest
import torch
from split_products import default, runner, schedules
from tvm_check import check

from graphopt.autotune.space import Workload
from graphopt.backends.forms.support import materialized
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.hidden import hidden
from graphopt.ir import Builder, Graph, TensorType, dims, types
from graphopt.ir.interpreter import evaluate
from graphopt.passes.layout import halves
from graphopt.target import Target, detect

M = dims.symbol("M")
GRANITE = Target.from_name("cpu:graniterapids:2")


def packing(k: int, n: int, products: int = 1) -> Graph:
    """From weights to what the kernel reads: shares, then halves and units of each."""
    g = Graph("packing")
    b = Builder(g)
    share, made = halves.pack(b, [(g.add_input(TensorType(types.f32, (k, n))), False) for _ in range(products)])
    g.set_outputs([share, *(v for pair in made for v in pair)])
    return g


def packed(*weights: torch.Tensor) -> list[torch.Tensor]:
    """What the kernel reads of weights."""
    return [x.contiguous() for x in evaluate(packing(*weights[0].shape, len(weights)), list(weights))]


def region(rows: tuple, k: int, n: int, *, prologue: bool = False, epilogue: bool = False, products: int = 1) -> Graph:
    """``rows x k`` times one or two packed weights of ``k x n``."""
    g = Graph("body")
    b = Builder(g)
    for d in rows:
        if not isinstance(d, int):
            g.symbols[d.name] = dims.Range(1, None)
    x = g.add_input(TensorType(types.f32, (*rows, k)), "x")
    x = b.gelu(x) if prologue else x
    share, *forms = [g.add_input(v.type.logical, "w") for v in packing(k, n, products).outputs]
    ys = [b.matmul(x, halves.unpack(b, [*forms[2 * i : 2 * i + 2], share], n)) for i in range(products)]
    y = b.mul(b.silu(ys[0]), ys[1]) if products == 2 else ys[0]
    if epilogue:
        y = b.gelu(b.add(y, g.add_input(TensorType(types.f32, (n,)), "b")))
        y = b.add(y, g.add_input(y.type, "r"))
    g.set_outputs([y])
    return g


CASES = {
    **{f"{m} rows": region((m,), 96, 64) for m in (2, 15, 16, 17, 31, 32, 33, 64, 100)},
    "one step": region((40,), 32, 40),
    "ragged columns": region((40,), 64, 75),
    "deep, in chunks": region((128,), 6144, 96),
    "several groups of rows": region((600,), 64, 64),
    "batch": region((3, 10), 64, 64, epilogue=True),
    "batch of one": region((1, 128), 256, 96, epilogue=True),
    "prologue": region((33,), 160, 96, prologue=True, epilogue=True),
    "two products": region((50,), 384, 160, products=2, epilogue=True),
    "two products, deep": region((128,), 6144, 64, products=2),
    "any rows": region((M,), 192, 96, epilogue=True),
    "any rows, odd": region((2, M), 96, 33, prologue=True),
}  # fmt: skip


def bindings(graph: Graph) -> list[dict[str, int]]:
    return [{"M": m} for m in (1, 24, 70, 300)] if graph.symbols else [{}]


def values(graph: Graph, **sizes: int) -> list[torch.Tensor]:
    """Random inputs; packed weights are ones that were random before."""
    generator = torch.Generator().manual_seed(0)
    weights = [v for v in graph.inputs if v.dtype == types.f16]
    k, n = 32 * int(weights[0].shape[1]), 32 * int(weights[0].shape[0])
    forms = iter(packed(*(torch.randn(k, n, generator=generator) for _ in weights)))
    shapes = [[d if isinstance(d, int) else dims.evaluate(d, sizes) for d in v.shape] for v in graph.inputs]
    return [next(forms) if v.hint == "w" else torch.randn(s, generator=generator) for v, s in zip(graph.inputs, shapes, strict=True)]


@pytest.fixture(scope="module")
def fp16_tiles() -> None:
    if not detect().f32_halves and "amx_fp16" not in hidden(detect()):
        pytest.skip("this processor has no AMX-FP16")


def test_products(builder, kernels_dir, fp16_tiles) -> None:
    from graphopt.backends.tvm.build import load_kernel

    jobs = [(g, w, s) for g in CASES.values() for w in (Workload.of(g, "matmul"),) for s in schedules(w, GRANITE, "halves")]
    paths = builder.build_many([(w, s) for _, w, s in jobs], GRANITE, kernels_dir)
    for (graph, w, s), path in zip(jobs, paths, strict=True):
        for sizes in bindings(graph):
            check(graph, runner(graph, load_kernel(path, w, s)), values(graph, **sizes), sizes)


def one(builder, kernels_dir, graph: Graph):
    from graphopt.backends.tvm.build import load_kernel

    w = Workload.of(graph, "matmul")
    s = default(w, GRANITE, "halves")
    return runner(graph, load_kernel(builder.build_many([(w, s)], GRANITE, kernels_dir)[0], w, s))


def test_infinite_and_large_and_small_values(builder, kernels_dir, fp16_tiles) -> None:
    """What eager gives for infinities, nan, and values near both ends of the range."""
    run = one(builder, kernels_dir, region((32,), 64, 32))
    generator = torch.Generator().manual_seed(0)
    x, w = torch.rand(32, 64, generator=generator) + 0.1, torch.rand(64, 32, generator=generator) + 0.1
    x[0, 3], x[1, 5], x[2, 7], x[3] = float("inf"), float("-inf"), float("nan"), torch.finfo(torch.float32).max / 64
    x[4], x[5] = 1e-30, -torch.finfo(torch.float32).max
    w[9, 4], w[10, 5] = float("inf"), float("nan")
    w[:, 6], w[:, 7], w[:, 8] = 0.5, 0.0, 1e-20
    want, eager = x.double() @ w.double(), x @ w
    got = run([x, *packed(w)])[0]
    assert torch.equal(got.isnan(), eager.isnan())
    assert torch.equal(got.isinf(), eager.isinf())
    fine = want.isfinite() & eager.isfinite() & (want.abs() > 1e-35)
    assert ((got.double() - want)[fine].abs() <= 1e-6 * want[fine].abs()).all()


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
@pytest.mark.parametrize("form", [
    "normal", "positive", "outliers", "time", "masked", "spread", "a giant row that meets nothing", "a giant feature that meets one column",
])
def test_the_error_is_no_larger_than_that_of_a_sum_in_f32(builder, kernels_dir, fp16_tiles, scale: float, form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 768, generator=generator) * scale, torch.randn(768, 96, generator=generator) * scale
    if form == "positive":
        x, w = x.abs(), w.abs()
    if form == "outliers":  # a channel that is ten thousand times as large, and multiplied by next to nothing
        x[:, 5] *= 1e4
        w[5] *= 1e-4
    if form == "time":  # seconds since 1970
        x[:, 5], w[5] = 1.6e9 * scale, 1e-9 * scale
    if form == "masked":
        x[:, 5], w[5] = torch.finfo(torch.float32).min, 0.0
    if form == "spread":
        spread = torch.logspace(-6, 6, 768)
        x, w = x * spread, w / spread[:, None]
    if form == "a giant row that meets nothing":
        x[:, 5], w[5] = 0.0, 1e9 * scale
    if form == "a giant feature that meets one column":
        x[:, 5], w[5, 1:] = -1e9 * scale, 0.0
    want = x.double() @ w.double()
    one_by_one = torch.zeros(64, 96)
    for k in range(768):
        one_by_one += x[:, k, None] * w[k]

    def error(y: torch.Tensor) -> float:
        return float(((y.double() - want).norm(dim=0) / want.norm(dim=0)).max())

    (got,) = one(builder, kernels_dir, region((64,), 768, 96))([x, *packed(w)])
    assert error(got) <= error(one_by_one)
    if form == "positive":
        assert abs(float((got.double() - want).sum() / want.sum())) < 4e-8


@pytest.mark.parametrize("rows", [128, M])
def test_machine_code(rows: object) -> None:
    """The three products of a step are 12 multiplications of tiles, and no more loads of tiles than there must be."""
    pytest.importorskip("tvm")
    from assembly import assembly, count, hot_loop

    w = Workload.of(region((rows,), 768, 96), "matmul")
    loop = hot_loop(assembly(w, GRANITE), "tdpfp16ps")
    steps = count(loop, "tdpfp16ps") // 12
    assert steps and count(loop, "tdpfp16ps") == 12 * steps and count(loop, "tileloadd") == 8 * steps, "\n".join(loop)


def test_other_products_and_targets_take_another_template() -> None:
    def names(graph: Graph, t: str) -> str:
        return TvmBackend().templates(Workload.of(graph, "matmul"), Target.from_name(f"cpu:{t}"))[0].name

    assert names(region((64,), 64, 64), "graniterapids") == "halves"
    assert names(region((64,), 64, 64), "sapphirerapids") == "tile"  # it reads both halves, and multiplies f32


def test_one_packing_for_pass_and_kernel() -> None:
    from graphopt.backends.tvm import halfform, thirdform

    assert (thirdform.COLUMNS, thirdform.STEP, thirdform.TILE) == (halves.COLUMNS, halves.DEPTH, halves.TILE)
    graph = region((32,), 64, 40)
    (node,) = materialized(graph)
    _, share, *halves_and_units = graph.inputs
    assert halfform.packed_halves(node.operands[1]) == (*halves_and_units, share)
    assert halfform.packed_halves(node.operands[0]) is None


def test_what_is_large_and_small_at_once(builder, kernels_dir, fp16_tiles) -> None:
    """Units whose product leaves the range, of results that do not."""
    run = one(builder, kernels_dir, region((32,), 64, 32))
    for x, w in ((2.0**78, 2.0**-100), (2.0**-62, 2.0**-62), (2.0**-100, 2.0**100)):
        got = run([torch.full((32, 64), x), *packed(torch.full((64, 32), w))])[0]
        assert torch.equal(got, torch.full((32, 32), 64 * x * w))
    x, w = torch.zeros(32, 64), torch.zeros(64, 32)
    x[:, 0], x[:, 1], w[2], w[1] = 2.0**78, 2.0**51, 2.0**78, 2.0**51
    assert torch.equal(run([x, *packed(w)])[0], torch.full((32, 32), 2.0**102))


def test_halves_are_close_to_the_weight() -> None:
    """Within 2**-22 of an element, and half of the smallest f16 in units and shares."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 40, generator=generator) * torch.logspace(-30, 30, 40) * torch.logspace(0, -12, 64)[:, None]
    g = Graph("both")
    b = Builder(g)
    share, ((both, unit),) = halves.pack(b, [(g.add_input(TensorType(types.f32, (64, 40))), False)])
    g.set_outputs([halves.unpack(b, [both, unit, share], 40), share, unit])
    got, shares, units = evaluate(g, [w])
    step = 2.0**-25 * shares.double()[:, None] * units.double()[:40]
    assert ((got.double() - w.double()).abs() <= 2.0**-22 * w.abs().double() + step).all()
    assert ((got.double() - w.double()).abs() <= 2.0**-21 * w.abs().double()).all()  # shares follow the rows: nothing is small here

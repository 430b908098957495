"""Products of bf16 with weights in pairs by dot instructions, every shape that fills no tile; on AMX tiles: test_bf16.py."""

from __future__ import annotations

import pytest
import torch
from tvm_check import check

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir import Builder, Graph, TensorType, dims, types
from graphopt.passes.layout import pairs
from graphopt.target import Target, detect

M = dims.symbol("M")


def region(rows: tuple, k: int, n: int, prologue: bool = False, epilogue: bool = False, acc: bool = False, products: int = 1) -> Graph:
    """``rows x k`` times a packed weight of ``k x n``."""
    g = Graph("body")
    b = Builder(g)
    for d in rows:
        if not isinstance(d, int):
            g.symbols[d.name] = dims.Range(1, None)
    x = g.add_input(TensorType(types.bf16, (*rows, k)), "x")
    sample = Graph("sample")
    packed = pairs.pack(Builder(sample), sample.add_input(TensorType(types.bf16, (k, n))), False)
    left = b.relu(x) if prologue else x

    def product() -> object:
        w = pairs.unpack(b, g.add_input(packed.type.logical, "w"), k, n)
        return b.create("matmul", [left, w], {"acc": types.f32 if acc else None})

    ys = [product() for _ in range(products)]
    y = ys[0] if products == 1 else b.mul(b.silu(ys[0]), ys[1])
    if epilogue:
        y = b.gelu(b.add(y, g.add_input(TensorType(y.dtype, (n,)), "b")))
        y = b.add(y, g.add_input(y.type, "r"))
    g.set_outputs([y])
    return g


CASES = {
    **{f"{m} rows": region((m,), 96, 64) for m in (1, 2, 5, 16, 17, 32, 33, 64, 100)},
    "odd depth": region((7,), 95, 64),
    "depth between": region((40,), 50, 40),
    "ragged columns": region((20,), 64, 75),
    "deep": region((32,), 2048, 32),
    "batch": region((3, 10), 64, 64, epilogue=True),
    "batch of one": region((1, 128), 256, 96, epilogue=True),
    "prologue": region((9,), 64, 96, prologue=True, epilogue=True),
    "a sum that stays": region((9,), 64, 96, acc=True, epilogue=True),
    "two products": region((30,), 96, 75, acc=True, products=2),
    "any rows": region((M,), 64, 96, epilogue=True),
    "any rows, odd": region((2, M), 77, 33, prologue=True),
}  # fmt: skip


def bindings(graph: Graph) -> list[dict[str, int]]:
    return [{"M": m} for m in (1, 15, 32, 70)] if graph.symbols else [{}]


def values(graph: Graph, **sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [[d if isinstance(d, int) else dims.evaluate(d, sizes) for d in v.shape] for v in graph.inputs]
    return [torch.randn(s, generator=generator).to(v.dtype.torch) for s, v in zip(shapes, graph.inputs, strict=True)]


def schedule(w: Workload, t: Target) -> Schedule:
    without = Target("cpu", t.arch, features=tuple(f for f in t.features if not f.startswith("amx")), cores=t.cores)
    template = TvmBackend().templates(w, without)[0]
    assert template.name == "pairs"
    return template.space(w, without).default()


def test_products(builder, kernels_dir) -> None:
    from graphopt.backends.tvm.build import load_kernel

    t = detect()
    if not t.has("avx512_bf16"):
        pytest.skip("this processor has no dot instructions for bf16")
    jobs = [(w := Workload.of(g, "matmul"), schedule(w, t)) for g in CASES.values()]
    for graph, (w, s), path in zip(CASES.values(), jobs, builder.build_many(jobs, t, kernels_dir), strict=True):
        kernel = load_kernel(path, w, s)

        def run(inputs, sizes=None, graph=graph, kernel=kernel):
            shape = [d if isinstance(d, int) else dims.evaluate(d, sizes) for d in graph.outputs[0].shape]
            out = torch.full(shape, 77.0, dtype=graph.outputs[0].dtype.torch)
            kernel(*inputs, out, *(sizes or {}).values())
            return [out]

        for sizes in bindings(graph):
            check(graph, run, values(graph, **sizes), sizes)


@pytest.mark.parametrize(("name", "rows", "instruction", "often"), [
    ("znver4", 96, r"vdpbf16ps\s.*%zmm", 24), ("znver4", M, r"vdpbf16ps\s.*%zmm", 16),
    ("sapphirerapids", 96, "tdpbf16ps", 4), ("sapphirerapids", M, "tdpbf16ps", 4),  # template bf16
])  # fmt: skip
def test_machine_code(name: str, rows: object, instruction: str, often: int) -> None:
    """All sums of a tile stay in registers; pointers may not, of rows of unknown number or in the loop around one of tiles."""
    pytest.importorskip("tvm")
    from assembly import assembly, count, hot_loop, stack_accesses

    loop = hot_loop(assembly(Workload.of(region((rows,), 4096, 128), "matmul"), Target.from_name(f"cpu:{name}:2")), instruction)
    spilled = [line for line in stack_accesses(loop) if (rows == 96 and instruction != "tdpbf16ps") or "mm" in line]
    assert count(loop, instruction) in (often, 4 * often, 8 * often) and not spilled, "\n".join(loop)


def test_one_packing_for_pass_and_kernel() -> None:
    from graphopt.backends.tvm import pairform

    assert pairform.COLUMNS == pairs.COLUMNS
    graph = region((8,), 70, 40)
    (product,) = [n for n in graph.nodes() if n.op.name == "matmul"]
    assert pairform.packed_pairs(product.operands[1]) is graph.inputs[1]
    assert pairform.packed_pairs(product.operands[0]) is None


def test_other_targets_take_another_template() -> None:
    w = Workload.of(region((8,), 64, 64), "matmul")
    names = {t: TvmBackend().templates(w, Target.from_name(f"cpu:{t}"))[0].name for t in ("znver4", "x86-64-v4", "neoverse-v1")}
    assert names == {"znver4": "pairs", "x86-64-v4": "tile", "neoverse-v1": "tile"}

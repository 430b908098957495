"""Products of 8-bit integers: bit for bit what integer arithmetic gives, by every engine, in shapes that fill no tile."""

from __future__ import annotations

import pytest
import torch
from tvm_check import check

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm import int8form
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir import Builder, Graph, TensorType, dims, types
from graphopt.ir.interpreter import evaluate
from graphopt.passes.layout import fours
from graphopt.target import Target, detect

M = dims.symbol("M")


def region(rows: tuple, k: int, n: int, *, dynamic: bool = True, integers: bool = False, epilogue: bool = False, products: int = 1,
           relu: bool = False) -> Graph:  # fmt: skip
    """``rows x k``, f32 or i8, times packed weights of ``k x n``: the sums themselves (``integers``), or floats made of them."""
    g = Graph("body")
    b = Builder(g)
    for d in rows:
        if not isinstance(d, int):
            g.symbols[d.name] = dims.Range(1, None)
    x = g.add_input(TensorType(types.f32 if dynamic else types.i8, (*rows, k)), "x")
    q = x
    if dynamic:
        x = b.relu(x) if relu else x
        most = b.create("max", [b.abs(x)], {"axes": (len(rows),), "keepdims": True})
        scale = b.maximum(b.mul(most, 1 / 127), 1e-30)
        q = b.create("quantize", [x, scale], {"dtype": types.i8, "bits": 8})
    sample = Graph("sample")
    packed = fours.pack(Builder(sample), sample.add_input(TensorType(types.i8, (k, n))), False)

    def product() -> object:
        w = fours.unpack(b, g.add_input(packed.type.logical, "w"), k, n)
        return b.create("matmul", [q, w], {"acc": types.i32})

    ys = [product() for _ in range(products)]
    if not integers:
        scales = [b.mul(scale, s) if dynamic else s for s in (g.add_input(TensorType(types.f32, (1, n)), "s") for _ in ys)]
        ys = [b.create("dequantize", [y, s]) for y, s in zip(ys, scales, strict=True)]
    y = ys[0]
    if products == 2:
        y = b.add(ys[0], ys[1]) if integers else b.mul(b.silu(ys[0]), ys[1])
    if epilogue:
        y = b.gelu(b.add(y, g.add_input(TensorType(types.f32, (n,)), "b")))
    g.set_outputs([y])
    return g


EXACT = {
    **{f"{m} rows": region((m,), 128, 64, integers=True) for m in (1, 2, 15, 16, 17, 32, 33, 70)},
    "one step": region((5,), 64, 32, integers=True),
    "a depth that fills no step": region((20,), 75, 40, integers=True),
    "a depth below a vector": region((20,), 19, 33, integers=True),
    "deep, in blocks": region((40,), 2500, 64, integers=True),
    "several groups of rows": region((600,), 64, 64, integers=True),
    "a batch": region((2, 3, 7), 96, 96, integers=True),
    "two products": region((50,), 192, 75, integers=True, products=2),
    "i8 as it is": region((37,), 200, 96, dynamic=False, integers=True),
    "work before it": region((37,), 200, 96, integers=True, relu=True),
    "any rows": region((M,), 192, 96, integers=True),
    "any rows of a batch": region((2, M), 75, 33, integers=True),
}  # fmt: skip
FLOATS = {
    "a row": region((1,), 160, 160, epilogue=True),
    "a row of a batch": region((1, 1), 96, 130, products=2),
    "an epilogue": region((33,), 160, 96, epilogue=True),
    "two products that meet": region((50,), 192, 75, products=2),
    "given integers": region((9,), 128, 64, dynamic=False, epilogue=True),
    "any rows": region((M,), 96, 33, epilogue=True),
}  # fmt: skip


def weight(graph: Graph, generator: torch.Generator) -> torch.Tensor:
    """A packed weight: behind its last row and column are zeros."""
    k, n = next(v.operands[1].shape for v in graph.nodes() if v.op.name == "matmul")
    sample = Graph("sample")
    sample.set_outputs([fours.pack(Builder(sample), sample.add_input(TensorType(types.i8, (k, n))), False)])
    return evaluate(sample, [torch.randint(-128, 128, (k, n), generator=generator).to(torch.int8)])[0].contiguous()


def values(graph: Graph, **sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for v in graph.inputs:
        if v.type.rank == 4 and v.shape[2:] == (32, 4):
            out.append(weight(graph, generator))
            continue
        shape = [d if isinstance(d, int) else dims.evaluate(d, sizes) for d in v.shape]
        x = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
        out.append(x if v.dtype == types.i8 else torch.randn(shape, generator=generator))
    if graph.inputs[0].dtype == types.f32 and len(out[0]) > 1:
        out[0][-1] = 0.0  # a row without a scale
    return out


def bindings(graph: Graph) -> list[dict[str, int]]:
    return [{"M": m} for m in (1, 16, 70, 300)] if graph.symbols else [{}]


def jobs(graphs: dict[str, Graph], t: Target, **change: object) -> list[tuple[Workload, Schedule]]:
    out = []
    for graph in graphs.values():
        w = Workload.of(graph, "matmul")
        template = TvmBackend().templates(w, t)[0]
        assert template.name == "int8", graph
        s = template.space(w, t).default()
        out.append((w, Schedule(s.template, s.sketch, tuple((k, change.get(k, v)) for k, v in s.knobs))))
    return out


def kernels(builder, folder, todo: list[tuple[Workload, Schedule]]):
    from graphopt.backends.tvm.build import load_kernel

    for (w, s), path in zip(todo, builder.build_many(todo, detect(), folder), strict=True):
        kernel = load_kernel(path, w, s)

        def run(inputs, sizes=None, graph=w.graph, kernel=kernel):
            shape = [d if isinstance(d, int) else dims.evaluate(d, sizes) for d in graph.outputs[0].shape]
            out = torch.full(shape, 77, dtype=graph.outputs[0].dtype.torch)
            kernel(*inputs, out, *(sizes or {}).values())
            return [out]

        yield w.graph, run


def same_bits(builder, folder, todo: list[tuple[Workload, Schedule]]) -> None:
    for graph, run in kernels(builder, folder, todo):
        for sizes in bindings(graph):
            inputs = values(graph, **sizes)
            got, want = run(inputs, sizes)[0], evaluate(graph, inputs, bindings=sizes)[0]
            assert torch.equal(got, want), f"{graph}\n{sizes}\n{(got != want).nonzero()[:5]}"


def test_sums_are_exact(builder, kernels_dir) -> None:
    same_bits(builder, kernels_dir, jobs(EXACT, detect()))


@pytest.mark.parametrize("change", [
    {"engine": "vnni", "rows": 6}, {"engine": "mul", "rows": 3}, {"engine": "mul", "rows": 2, "lanes": 4},
    {"block": 64, "group": 1, "panels": 1}, {"ahead": False, "parallel": False, "rows": 5},
    {"beside": False},
])  # fmt: skip
def test_every_engine_and_knob(builder, kernels_dir, change: dict[str, object]) -> None:
    if change.get("engine", "mul") not in next(p.choices for p in int8form.params(EXACT["one step"], detect()) if p.name == "engine"):
        pytest.skip("this processor has no such instructions")
    names = ("2 rows", "33 rows", "a depth that fills no step", "two products", "any rows", "i8 as it is")
    same_bits(builder, kernels_dir, jobs({n: EXACT[n] for n in names}, detect(), **change))


def test_floats_made_of_the_sums(builder, kernels_dir) -> None:
    for graph, run in kernels(builder, kernels_dir, jobs(FLOATS, detect())):
        for sizes in bindings(graph):
            check(graph, run, values(graph, **sizes), sizes, factor=4.0)


@pytest.mark.parametrize(("name", "instruction"), [("neoverse-n1", "sdot"), ("znver4", "vpdpbusd")])
def test_instructions_of_other_targets(name: str, instruction: str) -> None:
    """Sums stay in registers."""
    pytest.importorskip("tvm")
    from assembly import assembly, count, hot_loop, stack_accesses

    loop = hot_loop(assembly(Workload.of(region((64,), 256, 128, integers=True), "matmul"), Target.from_name(f"cpu:{name}:2")), instruction)
    assert count(loop, instruction) >= 16 and not stack_accesses(loop), "\n".join(loop)

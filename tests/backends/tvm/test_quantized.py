"""Products with weights of small integers: every width of integer, with zero points and without, every shape that fills no panel."""

from __future__ import annotations

import re

import pytest
import torch
from tvm_check import check

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm import quantform
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir import Builder, Graph, TensorType, dims, types
from graphopt.passes.quantization.pack_quantized import unpacked
from graphopt.target import Target, detect

M = dims.symbol("M")


def region(rows: tuple, k: int, n: int, bits: int, group: int = 0, zeros: bool = False, epilogue: bool = False, twin: bool = False,
           nr: int = 64, floats: types.DType | None = None) -> Graph:  # fmt: skip
    """``rows x k`` times a packed weight of ``k x n``; ``twin``: two of them, multiplied."""
    g = Graph("body")
    b = Builder(g)
    for d in rows:
        if not isinstance(d, int):
            g.symbols[d.name] = dims.Range(1, None)
    x = g.add_input(TensorType(types.f32, (*rows, k)), "x")
    left = b.relu(x) if epilogue else x

    def product() -> object:
        per, panels = 32 // bits if bits < 8 else 1, -(-n // nr)
        groups = -(-k // group) if group else 1
        depth = -(-(groups * group if group else k) // per) * per
        dtype = floats or (types.u8 if zeros else types.i8)
        q = g.add_input(TensorType(types.i32 if bits < 8 else dtype, (panels, depth // per, nr)), "q")
        s = g.add_input(TensorType(types.f32, (panels, groups, nr)), "s")
        z = [g.add_input(TensorType(types.u8, (panels, groups, nr)), "z")] if zeros else []
        return b.matmul(left, unpacked(b, [q, s, *z], dtype, bits, k, n))

    y = product()
    if twin:
        y = b.mul(b.silu(y), product())
    if epilogue:
        y = b.gelu(b.add(y, g.add_input(TensorType(types.f32, (n,)), "b")))
    g.set_outputs([y])
    return g


def values(graph: Graph, **sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for v in graph.inputs:
        shape = [d if isinstance(d, int) else dims.evaluate(d, sizes) for d in v.shape]
        if v.dtype == types.i32:
            x = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int32)
        elif v.dtype.is_integer:
            low, high = (-128, 128) if v.dtype == types.i8 else (0, 4 if v.hint == "z" else 256)
            x = torch.randint(low, high, shape, generator=generator).to(v.dtype.torch)
        else:
            x = torch.randn(shape, generator=generator).to(v.dtype.torch)
        out.append(x)
    return out


FEW = {
    "a row": region((1,), 256, 128, 8),
    "8 rows": region((8,), 256, 128, 8),
    "3 rows, ragged": region((3,), 301, 75, 8, epilogue=True),
    "8 bits in groups": region((2,), 256, 70, 8, 64),
    "8 bits, zeros": region((1, 1), 200, 64, 8, 32, zeros=True),
    "4 bits": region((1,), 256, 128, 4, 64),
    "4 bits, one scale a column": region((2,), 301, 128, 4),
    "4 bits, last group not full": region((5,), 300, 75, 4, 64, epilogue=True),
    "4 bits, zeros": region((4,), 256, 100, 4, 128, zeros=True),
    "2 bits": region((1,), 192, 64, 2, 64),
    "2 bits, zeros": region((7,), 192, 64, 2, 32, zeros=True, epilogue=True),
    "a row with zeros": region((1,), 300, 100, 4, 128, zeros=True, epilogue=True),
    "a row of 2 bits with zeros": region((1,), 192, 64, 2, 32, zeros=True),
    "a row of 2 bits, one scale a column": region((1,), 1030, 64, 2),
    "twins": region((1, 1), 128, 96, 4, 64, twin=True),
    "twins of 8 bits": region((6,), 128, 96, 8, zeros=True, twin=True),
}  # fmt: skip
MANY = {
    "9 rows": region((9,), 256, 128, 8),
    "50 rows of 4 bits": region((50,), 300, 75, 4, 64, epilogue=True),
    "2 bits, zeros": region((20,), 192, 64, 2, 32, zeros=True),
    "any rows": region((M,), 128, 96, 4, 64, epilogue=True),
    "any rows, zeros": region((2, M), 100, 33, 8, zeros=True),
    "batch of twins": region((3, 1), 128, 96, 4, 64, twin=True),
}  # fmt: skip


TILES = {
    "9 rows": region((9,), 256, 128, 8),
    "50 rows, columns that fill no panel": region((50,), 192, 75, 8, epilogue=True),
    "several groups of row tiles": region((300,), 64, 192, 8),
    "any batch of 9 rows": region((M, 9), 128, 96, 8, epilogue=True),
    "a batch of twins": region((2, 3, 20), 128, 96, 8, twin=True),
}  # fmt: skip


def run_all(builder, kernels_dir, jobs: list[tuple[Workload, Schedule]]) -> None:
    from graphopt.backends.tvm.build import load_kernel

    for (w, s), path in zip(jobs, builder.build_many(jobs, detect(), kernels_dir), strict=True):
        kernel, graph = load_kernel(path, w, s), w.graph

        def run(inputs, sizes=None, graph=graph, kernel=kernel):
            shape = [d if isinstance(d, int) else dims.evaluate(d, sizes) for d in graph.outputs[0].shape]
            out = torch.full(shape, 77.0)
            kernel(*inputs, out, *(sizes or {}).values())
            return [out]

        for sizes in [{"M": m} for m in (1, 7, 40)] if graph.symbols else [{}]:
            check(graph, run, values(graph, **sizes), sizes, factor=4.0)


def default(graph: Graph, name: str, first: bool = True) -> tuple[Workload, Schedule]:
    w, t = Workload.of(graph, "matmul"), detect()
    template, *others = TvmBackend().templates(w, t)
    template = template if first else next(x for x in (template, *others) if x.name == name)
    assert template.name == name, graph
    return w, template.space(w, t).default()


def test_few_rows(builder, kernels_dir) -> None:
    run_all(builder, kernels_dir, [default(g, "quantized") for g in FEW.values()])


@pytest.mark.parametrize("name", ["4 bits", "a row with zeros", "a row of 2 bits, one scale a column"])
def test_one_row_of_any_numbers(builder, kernels_dir, name: str) -> None:
    """Outliers, rows that are small or nothing, and numbers that are none: as floats have it."""
    from graphopt.backends.tvm.build import load_kernel

    w, s = default(FEW[name], "quantized")
    (path,) = builder.build_many([(w, s)], detect(), kernels_dir)
    kernel = load_kernel(path, w, s)

    def run(inputs, _=None):
        out = torch.full([int(d) for d in w.graph.outputs[0].shape], 77.0)
        kernel(*inputs, out)
        return [out]

    infinities = () if "zeros" in name else ("inf", "-inf")  # sums of a group, less its zero points' share, are nan there
    for change in ("outliers", "1e-25", "1e-33", "0", "nan", *infinities):
        x, *rest = values(w.graph)
        if change == "outliers":
            x[:, ::50] *= 1e4
        elif change in ("1e-25", "1e-33", "0"):
            x *= float(change)
        else:
            x[0, 70] = float(change)
        check(w.graph, run, [x, *rest], factor=4.0)
    (product,) = [n for n in w.graph.nodes() if n.op.name == "matmul"]
    form = quantform.quantized(product.operands[1])
    assert form is not None
    for large in (30.0, 300.0, 1e4, 1e6, 1e12):  # where weights are zero: no digits of the others go with it
        for outliers in ([0], [0, form.per_word, 3 * form.per_word]):
            x, q, *rest = values(w.graph)
            x[:, outliers] = large
            zero = 1 << (form.bits - 1) if form.zeros is not None else 0
            for k in outliers:
                q[:, k // form.per_word] &= ~((1 << form.bits) - 1)
                q[:, k // form.per_word] |= zero
            if form.zeros is not None:
                rest[1].fill_(zero)
            check(w.graph, run, [x, q, *rest], factor=4.0)


def test_many_rows(builder, kernels_dir) -> None:
    run_all(builder, kernels_dir, [default(g, "tile", first=False) for g in MANY.values()])


@pytest.mark.skipif(detect().int8_products != "amx", reason="needs AMX tiles")
def test_many_rows_on_tiles(builder, kernels_dir) -> None:
    jobs = [default(g, "quantized-tiles") for g in TILES.values()]
    w, s = jobs[2]
    jobs += [(w, Schedule(s.template, s.sketch, tuple((k, c.get(k, v)) for k, v in s.knobs))) for c in (
        {"group": 2, "panels": 1}, {"group": 16, "panels": 8, "parallel": False})]  # fmt: skip
    run_all(builder, kernels_dir, jobs)


@pytest.mark.skipif(detect().int8_products != "amx", reason="needs AMX tiles")
def test_rows_of_any_numbers_on_tiles(builder, kernels_dir) -> None:
    """Rows with outliers, small ones, zeros, and numbers that are none, side by side: each as floats have it."""
    from graphopt.backends.tvm.build import load_kernel

    w, s = default(TILES["9 rows"], "quantized-tiles")
    (path,) = builder.build_many([(w, s)], detect(), kernels_dir)
    kernel = load_kernel(path, w, s)
    x, *rest = values(w.graph)
    x[0, ::50] *= 1e4
    x[1] *= 0.0
    x[2, 7], x[3, 9], x[4, 200] = float("nan"), float("inf"), float("-inf")

    def run(inputs, _=None):
        out = torch.full([int(d) for d in w.graph.outputs[0].shape], 77.0)
        kernel(*inputs, out)
        return [out]

    check(w.graph, run, [x, *rest], factor=4.0)
    x, *rest = values(w.graph)
    for small in (1e-20, 1e-33):
        check(w.graph, run, [x * small, *rest], factor=4.0)
    outliers = [0, 60, 61, 200]  # where weights are zero: no digits of the others go with them
    rest[0][:, outliers] = 0
    for row, large in enumerate((30.0, 300.0, 1e3, 1e4, 1e6, 1e12)):
        x[row, outliers] = large
    check(w.graph, run, [x, *rest], factor=4.0)


REFUSED = {
    "8-bit integers with a scale a column": region((50,), 256, 128, 4, 64),
    "no multiple of 64": region((50,), 200, 128, 8),
    "8 rows or fewer": region((M,), 256, 128, 8),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_tiles_do_not_take(reason: str) -> None:
    t = Target("cpu", "x86_64", features=("amx_int8", "amx_tile", "avx512f"), cores=2)
    assert reason in str(quantform.tiles_refusal(REFUSED[reason], t))
    assert "no AMX tiles" in str(quantform.tiles_refusal(TILES["9 rows"], Target.from_name("cpu:znver4:2")))


def test_every_knob(builder, kernels_dir) -> None:
    """Without a table (processors that have none), other vectors at once, nothing fetched ahead."""
    jobs = []
    for name in ("4 bits, zeros", "2 bits", "3 rows, ragged", "2 bits, zeros", "a row with zeros"):
        w, s = default(FEW[name], "quantized")
        for change in ({"table": False, "dots": False}, {"vectors": 1, "ahead": 0}, {"unroll": 16, "parallel": False}):
            jobs.append((w, Schedule(s.template, s.sketch, tuple((k, change.get(k, v)) for k, v in s.knobs))))
    run_all(builder, kernels_dir, jobs)


@pytest.mark.parametrize(("rows", "bits", "often"), [(1, 4, 32), (1, 8, 16), (4, 4, 128), (8, 4, 128)])
def test_sums_stay_in_registers(rows: int, bits: int, often: int) -> None:
    pytest.importorskip("tvm")
    from assembly import assembly, count, hot_loop, stack_accesses

    graph = region((rows,), 1024, 128, bits, 64 if bits == 4 else 0)
    loop = hot_loop(assembly(Workload.of(graph, "matmul"), Target.from_name("cpu:sapphirerapids:2")), "vfmadd")
    assert count(loop, "vfmadd") == often and not stack_accesses(loop), "\n".join(loop)
    assert count(loop, r"vperm(ps|d)\b") == (0 if bits == 8 else 32 if rows < 8 else 16), "\n".join(loop)
    assert not [line for line in loop if re.search(r"%zmm\d+, .*\(", line)], "\n".join(loop)


@pytest.mark.parametrize("bits", [4, 2])
def test_sums_of_bytes_stay_in_registers(bits: int) -> None:
    pytest.importorskip("tvm")
    from assembly import assembly, count, hot_loop, stack_accesses

    graph = region((1,), 1024, 128, bits, 64)
    loop = hot_loop(assembly(Workload.of(graph, "matmul"), Target.from_name("cpu:sapphirerapids:2")), "vpdpbusd")
    assert count(loop, "vpdpbusd") >= 64 and not stack_accesses(loop), "\n".join(loop)


def test_one_packing_for_pass_and_kernel() -> None:
    graph = FEW["4 bits, last group not full"]
    (product,) = [n for n in graph.nodes() if n.op.name == "matmul"]
    form = quantform.quantized(product.operands[1])
    assert form is not None and (form.bits, form.groups, form.group, form.depth, form.signed) == (4, 5, 64, 320, True)
    assert (form.integers, form.scales, form.zeros) == (graph.inputs[1], graph.inputs[2], None)
    assert quantform.quantized(product.operands[0]) is None


def test_other_targets() -> None:
    w = Workload.of(region((1,), 128, 128, 4, 64, nr=32), "matmul")
    for name, table in (("x86-64-v3", False), ("znver4", True), ("neoverse-n1", False)):
        t = Target.from_name(f"cpu:{name}:2")
        template = TvmBackend().templates(w, t)[0]
        assert template.name == "quantized" and template.space(w, t).default()["table"] is (table and 32 % 16 == 0)

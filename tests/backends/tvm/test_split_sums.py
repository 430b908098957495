"""Few results of many terms: reductions whose first axis is divided (factored), products whose depth is (split-depth)."""

from __future__ import annotations

from random import Random

import pytest
import torch
from tvm_check import check, values

from graphopt.autotune.sketch import Sketch, sketches_of
from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.backends.tvm.build import load_kernel
from graphopt.ir.graph import Graph
from graphopt.ir.text import parse_graph
from graphopt.target import Target, detect

REDUCTIONS = {
    "all": "(%x: f32[70000]) -> f32[] {\n %0: f32[] = sum(%x) {axes = [0]}\n return %0\n}",
    "squares": "(%x: f32[1, 129, 300]) -> f32[1] {\n %0: f32[1, 129, 300] = mul(%x, %x)\n %1: f32[1] = sum(%0) {axes = [1, 2]}\n"
    " %2: f32[1] = sqrt(%1)\n return %2\n}",
    "rows": "(%x: f32[3, 4099]) -> f32[3] {\n %0: f32[3] = mean(%x) {axes = [1]}\n return %0\n}",
    "columns": "(%x: f32[5000, 70]) -> f32[70] {\n %0: f32[70] = sum(%x) {axes = [0]}\n return %0\n}",
    "columns of products": "(%x: f32[4100, 20], %y: f32[4100, 20]) -> f32[20] {\n %0: f32[4100, 20] = mul(%x, %y)\n"
    " %1: f32[20] = mean(%0) {axes = [0]}\n return %1\n}",
    "few columns": "(%x: f32[5001, 3]) -> f32[3] {\n %0: f32[3] = sum(%x) {axes = [0]}\n return %0\n}",
    "both ends": "(%x: f32[90, 33, 80]) -> f32[33] {\n %0: f32[33] = sum(%x) {axes = [0, 2]}\n return %0\n}",
    "outer and middle": "(%x: f32[70, 80, 17]) -> f32[17] {\n %0: f32[17] = max(%x) {axes = [0, 1]}\n return %0\n}",
    "transposed": "(%x: f32[64, 4200]) -> f32[64] {\n %0: f32[4200, 64] = transpose(%x) {perm = [1, 0]}\n"
    " %1: f32[64] = sum(%0) {axes = [0]}\n return %1\n}",
    "f64": "(%x: f64[4100, 5]) -> f64[5] {\n %0: f64[4100, 5] = mul(%x, %x)\n %1: f64[5] = sum(%0) {axes = [0]}\n return %1\n}",
    "bf16 squares": "(%x: bf16[4097]) -> bf16[] {\n %0: bf16[4097] = mul(%x, %x)\n %1: bf16[] = sum(%0) {axes = [0]}\n return %1\n}",
    "integers": "(%x: i32[9000]) -> i32[] {\n %0: i32[] = sum(%x) {axes = [0]}\n return %0\n}",
    "any": "(%x: b1[8200]) -> b1[] {\n %0: b1[] = any(%x) {axes = [0]}\n return %0\n}",
    "variance": "(%x: f32[1, 40000]) -> f32[1] {\n %0: f32[1] = var(%x) {axes = [1]}\n return %0\n}",
}  # fmt: skip
PRODUCTS = {
    "plain": "(%x: f32[16, 3000], %y: f32[3000, 16]) -> f32[16, 16] {\n %0: f32[16, 16] = matmul(%x, %y)\n return %0\n}",
    "ragged": "(%x: f32[13, 1100], %y: f32[1100, 21], %b: f32[21]) -> f32[13, 21] {\n %0: f32[13, 21] = matmul(%x, %y)\n"
    " %1: f32[13, 21] = add(%0, %b)\n %2: f32[13, 21] = relu(%1)\n return %2\n}",
    "second transposed": "(%x: f32[20, 1283], %y: f32[9, 1283]) -> f32[20, 9] {\n %0: f32[1283, 9] = transpose(%y) {perm = [1, 0]}\n"
    " %1: f32[20, 9] = matmul(%x, %0)\n return %1\n}",
    "first transposed": "(%x: f32[1500, 12], %y: f32[1500, 32]) -> f32[12, 32] {\n %0: f32[12, 1500] = transpose(%x) {perm = [1, 0]}\n"
    " %1: f32[12, 32] = matmul(%0, %y)\n return %1\n}",
    "one row of dots": "(%x: f32[1, 5003], %y: f32[17, 5003]) -> f32[1, 17] {\n %0: f32[5003, 17] = transpose(%y) {perm = [1, 0]}\n"
    " %1: f32[1, 17] = matmul(%x, %0)\n return %1\n}",
    "batches": "(%x: f32[2, 5, 1200], %y: f32[2, 1200, 7]) -> f32[2, 5, 7] {\n %0: f32[2, 5, 7] = matmul(%x, %y)\n return %0\n}",
    "two products": "(%x: f32[4, 1300], %y: f32[1300, 40], %z: f32[1300, 40]) -> f32[4, 40] {\n %0: f32[4, 40] = matmul(%x, %y)\n"
    " %1: f32[4, 40] = matmul(%x, %z)\n %2: f32[4, 40] = mul(%0, %1)\n return %2\n}",
    "packed": "(%x: f32[6, 1536], %w: f32[1, 1536, 48]) -> f32[6, 40] {\n %0: f32[1536, 1, 48] = transpose(%w) {perm = [1, 0, 2]}\n"
    " %1: f32[1536, 48] = reshape(%0) {shape = [1536, 48]}\n %2: f32[1536, 40] = slice(%1) {axis = 1, stop = 40}\n"
    " %3: f32[6, 40] = matmul(%x, %2)\n return %3\n}",
    "integers as floats": "(%x: f32[5, 1400], %w: i8[1400, 24], %s: f32[24]) -> f32[5, 24] {\n"
    " %0: f32[1400, 24] = dequantize(%w, %s)\n %1: f32[5, 24] = matmul(%x, %0)\n return %1\n}",
    "f64": "(%x: f64[3, 2050], %y: f64[2050, 5]) -> f64[3, 5] {\n %0: f64[3, 5] = matmul(%x, %y)\n return %0\n}",
    "bf16": "(%x: bf16[16, 2048], %y: bf16[2048, 16]) -> bf16[16, 16] {\n %0: bf16[16, 16] = matmul(%x, %y)\n return %0\n}",
}  # fmt: skip


def _regions() -> dict[str, tuple[Graph, str, str]]:
    out = {f"{k}": (parse_graph(f"graph @g{text}"), "reduction", "factored") for k, text in REDUCTIONS.items()}
    return out | {f"product, {k}": (parse_graph(f"graph @g{text}"), "matmul", "split-depth") for k, text in PRODUCTS.items()}


def _sketches(graph: Graph, kind: str, target: Target) -> list[Sketch]:
    w = Workload.of(graph, kind)
    return [k for t in TvmBackend().templates(w, target) for k in sketches_of(t.spaces(w, target))]


def _inputs(graph: Graph, kind: str) -> list[torch.Tensor]:
    """Random numbers; those of reductions are not negative, as no order of summation has an advantage where sums do not cancel."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for v, x in zip(graph.inputs, values(graph), strict=True):
        if not v.dtype.is_float:
            x = torch.randint(-9, 9, x.shape, generator=generator).to(v.dtype.torch)
        out.append(x.abs() if kind == "reduction" and v.dtype.is_float else x)
    return out


def test_a_reduced_axis_of_one_element(compile_all) -> None:
    """It is no loop at all, beside lanes of results and along them."""
    texts = ("(%x: f32[1, 17]) -> f32[1, 17] {\n %0: f32[1, 17] = min(%x) {axes = [0], keepdims = true}\n return %0\n}",
             "(%x: f32[9, 1, 40]) -> f32[9, 40] {\n %0: f32[9, 1, 40] = mul(%x, %x)\n %1: f32[9, 40] = sum(%0) {axes = [1]}\n return %1\n}",
             "(%x: f32[17, 1]) -> f32[17] {\n %0: f32[17] = sum(%x) {axes = [1]}\n return %0\n}")  # fmt: skip
    graphs = [parse_graph(f"graph @g{text}") for text in texts]
    for graph, run in zip(graphs, compile_all([(g, "reduction") for g in graphs]), strict=True):
        check(graph, run, values(graph))


def test_sums_in_pieces_are_right(compile_points) -> None:
    """The default of each sketch, and points that chance picks."""
    target, rng = detect(), Random(0)
    jobs = []
    for graph, kind, sketch in _regions().values():
        (split,) = (k for k in _sketches(graph, kind, target) if k.name == sketch)
        points = (s for s in (split.random(rng) for _ in range(1000)) if split.space.rejection(s) is None)
        for s in (split.default(), next(points), next(points)):
            jobs.append((graph, Workload.of(graph, kind), s))
    for (graph, w, _), run in zip(jobs, compile_points(jobs), strict=True):
        inputs = _inputs(graph, w.kind)
        run(inputs)  # scratch holds the first call's sums then
        check(graph, run, inputs, {}, factor=4.0)


@pytest.mark.parametrize("shape", [(1, 4096), (64, 4096), (4096, 16)], ids=["few rows", "rows", "columns"])
def test_a_product_that_is_summed_is_rounded_once(compile_all, shape) -> None:
    """Two terms of each sum, in one accumulator: -(1 + 2**-11), and (1 + 2**-12)**2, which is no f32. What is left is 2**-24."""
    axis = int(shape[1] == 4096)
    kept = shape[1 - axis]
    text = ",".join(str(d) for d in shape)
    graph = parse_graph(f"graph @g(%x: f32[{text}], %y: f32[{text}]) -> f32[{kept}] {{\n %0: f32[{text}] = mul(%x, %y)\n"
                        f" %1: f32[{kept}] = sum(%0) {{axes = [{axis}]}}\n return %1\n}}")  # fmt: skip
    x, y = torch.zeros(shape), torch.zeros(shape)
    x.select(axis, 0).fill_(-1.0)
    y.select(axis, 0).fill_(1.0 + 2.0**-11)
    second = 2048 if axis else 1  # lanes go along rows; down columns a block is 256 rows
    x.select(axis, second).fill_(1.0 + 2.0**-12)
    y.select(axis, second).fill_(1.0 + 2.0**-12)
    if detect().arch == "x86_64" and "fma" not in detect().features:
        pytest.skip("no instruction that multiplies and adds")
    (run,) = compile_all([(graph, "reduction")])
    assert torch.equal(run([x, y], None)[0], torch.full([kept], 2.0**-24))


LONG = {
    "the inner axis is long": ("(%x: f32[2, 3, 20000, 33]) -> f32[3, 33] {\n %0: f32[3, 33] = mean(%x) {axes = [0, 2]}", {}),
    "both axes fill a block": ("(%x: f32[301, 2, 100, 17]) -> f32[2, 17] {\n %0: f32[2, 17] = mean(%x) {axes = [0, 2]}", {}),
    "three axes": ("(%x: f32[30, 2, 300, 3, 7, 20]) -> f32[2, 3, 20] {\n %0: f32[2, 3, 20] = sum(%x) {axes = [0, 2, 4]}", {}),
    "symbolic": ("(%x: f32[B, 2, H, 17]) -> f32[2, 17] where 1 <= B, 1 <= H {\n %0: f32[2, 17] = sum(%x) {axes = [0, 2]}",
                 {"B": 3, "H": 20001}),
}  # fmt: skip


def test_the_error_of_a_sum_down_columns_does_not_grow_with_its_length(compile_all) -> None:
    """Whichever of the reduced axes is the long one. The terms are not negative: the error of one f32 accumulator is many times eager's."""
    graphs = [parse_graph(f"graph @g{text}\n return %0\n}}") for text, _ in LONG.values()]
    runs = compile_all([(g, "reduction") for g in graphs])
    for graph, run, (_, bindings) in zip(graphs, runs, LONG.values(), strict=True):
        check(graph, run, [x.abs() for x in values(graph, **bindings)], bindings)


def test_products_of_many_factors_near_one(compile_all) -> None:
    """In pieces of one row, along rows, and down columns: products held in f32 are several times as wrong as eager's."""
    cases = (("(%x: f32[1048576]) -> f32[] {\n %0: f32[] = prod(%x) {axes = [0]}", 1e-4),
             ("(%x: f32[3, 300000]) -> f32[3] {\n %0: f32[3] = prod(%x) {axes = [1]}", 1e-4),
             ("(%x: f32[90000, 5]) -> f32[5] {\n %0: f32[5] = prod(%x) {axes = [0]}", 1e-4),
             ("(%x: bf16[300, 20]) -> bf16[20] {\n %0: bf16[20] = prod(%x) {axes = [0]}", 0.1))  # fmt: skip
    graphs = [parse_graph(f"graph @g{text}\n return %0\n}}") for text, _ in cases]
    runs = compile_all([(g, "reduction") for g in graphs])
    for graph, run, (_, spread) in zip(graphs, runs, cases, strict=True):
        check(graph, run, [(1 + spread * values(graph)[0].double()).to(graph.inputs[0].dtype.torch)])


def test_sums_down_columns_run_in_parallel_where_threads_pay() -> None:
    """Device-free: in pieces where there are fewer tiles of columns than threads, else tile by tile; small ones on one thread."""
    target = Target.from_name("cpu:graniterapids:2")

    def kernel(shape: tuple[int, int], **knobs: bool) -> tuple[bool, bool]:
        """Whether the kernel has a parallel loop, and whether it has partial results."""
        rows, columns = shape
        text = f"(%x: f32[{rows}, {columns}]) -> f32[{columns}] {{\n %0: f32[{columns}] = sum(%x) {{axes = [0]}}\n return %0\n}}"
        w = Workload.of(parse_graph(f"graph @g{text}"), "reduction")
        template = TvmBackend().templates(w, target)[0]
        space = template.space(w, target)
        source = template.emit(w, Schedule.make(space.template, **{**dict(space.default().knobs), **knobs}), target)
        return "T.parallel(" in source.text, "partial" in source.text

    assert [kernel(shape) for shape in ((3000, 64), (8000, 64), (32000, 64), (33000, 64))] == [(True, True)] * 4
    assert [kernel(shape) for shape in ((16000, 128), (1000, 128), (500, 1024))] == [(True, False)] * 3
    assert [kernel(shape) for shape in ((1000, 64), (200, 128), (9, 40))] == [(False, False)] * 3
    assert not kernel((32000, 64), parallel=False)[0]


@pytest.mark.parametrize("name", ["cpu:graniterapids:2", "cpu:x86-64-v3:8", "cpu:aarch64:4"])
def test_who_gets_a_split_sketch(name: str) -> None:
    """Device-free: where results alone are tasks enough, or sums are short, nothing is divided."""
    target = Target.from_name(name)
    for graph, kind, sketch in _regions().values():
        assert sketch in [k.name for k in _sketches(graph, kind, target)]
    never = {
        "many results": ("(%x: f32[900, 5000]) -> f32[900] {\n %0: f32[900] = sum(%x) {axes = [1]}\n return %0\n}", "reduction"),
        "short sums": ("(%x: f32[7, 900]) -> f32[7] {\n %0: f32[7] = sum(%x) {axes = [1]}\n return %0\n}", "reduction"),
        "argmax": ("(%x: f32[70000]) -> i64[] {\n %0: i64[] = argmax(%x) {axis = 0}\n return %0\n}", "reduction"),
        "symbolic": ("(%x: f32[N]) -> f32[] where 1 <= N {\n %0: f32[] = sum(%x) {axes = [0]}\n return %0\n}", "reduction"),
        "many tiles": ("(%x: f32[512, 2000], %y: f32[2000, 512]) -> f32[512, 512] {\n %0: f32[512, 512] = matmul(%x, %y)\n"
                       " return %0\n}", "matmul"),
        "shallow": ("(%x: f32[16, 512], %y: f32[512, 16]) -> f32[16, 16] {\n %0: f32[16, 16] = matmul(%x, %y)\n return %0\n}", "matmul"),
        "symbolic rows": ("(%x: f32[N, 9000], %y: f32[9000, 16]) -> f32[N, 16] where 1 <= N {\n %0: f32[N, 16] = matmul(%x, %y)\n"
                          " return %0\n}", "matmul"),
    }  # fmt: skip
    for case, (text, kind) in never.items():
        names = [k.name for k in _sketches(parse_graph(f"graph @g{text}"), kind, target)]
        assert not {"factored", "split-depth"} & set(names), case


COPIED = {
    "ragged": "(%x: f32[45, 301], %y: f32[301, 70], %b: f32[70]) -> f32[45, 70] {\n %0: f32[45, 70] = matmul(%x, %y)\n"
    " %1: f32[45, 70] = add(%0, %b)\n return %1\n}",
    "two products of batches": "(%x: f32[2, 20, 200], %y: f32[200, 40], %z: f32[200, 40]) -> f32[2, 20, 40] {\n"
    " %0: f32[2, 20, 40] = matmul(%x, %y)\n %1: f32[2, 20, 40] = matmul(%x, %z)\n %2: f32[2, 20, 40] = mul(%0, %1)\n return %2\n}",
    "bf16": "(%x: bf16[33, 144], %y: bf16[144, 50]) -> bf16[33, 50] {\n %0: bf16[33, 50] = matmul(%x, %y)\n return %0\n}",
}  # fmt: skip


def test_copied_panels_are_right(builder, kernels_dir) -> None:
    target, jobs = detect(), []
    for text in COPIED.values():
        graph = parse_graph(f"graph @g{text}")
        for sketch in _sketches(graph, "matmul", target):
            if sketch.space.template == "tile":
                jobs.append((Workload.of(graph, "matmul"), sketch.make({**dict(sketch.default().knobs), "copy": True})))
    assert len(jobs) == 4 * len(COPIED)
    for (w, s), path in zip(jobs, builder.build_many(jobs, target, kernels_dir), strict=True):
        kernel = load_kernel(path, w, s)

        def run(inputs, _, w=w, kernel=kernel) -> list[torch.Tensor]:
            out = [torch.full([int(d) for d in v.shape], float("nan"), dtype=v.dtype.torch) for v in w.graph.outputs]
            kernel(*inputs, *out)
            return out

        check(w.graph, run, values(w.graph), {}, factor=4.0)


def test_which_panels_are_copied_without_tuning() -> None:
    """Device-free: large ones that several row tiles use; there is no choice where they are packed, or not in columns."""
    target = Target.from_name("cpu:graniterapids:2")

    def copies(text: str) -> tuple[bool, ...]:
        space = _sketches(parse_graph(f"graph @g{text}"), "matmul", target)[0].space
        return next((p.choices for p in space.params if p.name == "copy"), ())  # type: ignore[return-value]

    assert copies("(%x: f32[512, 4096], %y: f32[4096, 768]) -> f32[512, 768] {\n %0: f32[512, 768] = matmul(%x, %y)\n return %0\n}")[0]
    assert copies("(%x: f32[512, 128], %y: f32[128, 768]) -> f32[512, 768] {\n %0: f32[512, 768] = matmul(%x, %y)\n return %0\n}") == (
        False, True)  # fmt: skip
    assert copies("(%x: f32[4, 4096], %y: f32[4096, 768]) -> f32[4, 768] {\n %0: f32[4, 768] = matmul(%x, %y)\n return %0\n}") == ()
    assert copies(PRODUCTS["second transposed"]) == copies(PRODUCTS["packed"]) == ()


def test_a_long_product_of_few_tiles_is_split_without_tuning() -> None:
    """Device-free: 16 x 16 of 100000 terms is one task otherwise; of 1024 terms it is not worth it."""
    target = Target.from_name("cpu:graniterapids:2")

    def default(depth: int) -> str:
        text = f"(%x: f32[16, {depth}], %y: f32[{depth}, 16]) -> f32[16, 16] {{\n %0: f32[16, 16] = matmul(%x, %y)\n return %0\n}}"
        return _sketches(parse_graph(f"graph @g{text}"), "matmul", target)[0].name

    assert (default(100000), default(1024)) == ("split-depth", "default")

"""Every pointwise op against torch, over dtypes and special values; views; broadcasting; symbolic sizes."""

from __future__ import annotations

import pytest
import torch
from tvm_check import check

from graphopt.autotune.space import Workload
from graphopt.backends.forms.support import refusal
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.backends.tvm.build import load_kernel
from graphopt.errors import TypeInferenceError
from graphopt.ir import dims, types
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph
from graphopt.ir.interpreter import evaluate
from graphopt.ir.ops import OPS, Trait
from graphopt.ir.text import parse_graph
from graphopt.ir.types import DType, TensorType
from graphopt.target import detect

DTYPES = (types.f32, types.f64, types.f16, types.bf16, types.i64, types.i32, types.i8, types.u8, types.b1)
SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0,
           1e-40, -1e-40, 1e-30, 88.5, -88.0,
           104.0, -104.0, 1e4, -1e4, 0.62, 0.93, 2**-20, 7.0, 20.5, -3.5]  # fmt: skip
# what another rounding of the same formula may differ by, in units of the last place of f32 or f64
ULPS = {"default": 4}
CANCELS = {"gelu": 4.0}  # the formula adds numbers of this size, in eager too


def values(dtype: DType, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_bool:
        return torch.rand(n, generator=generator) < 0.5
    if dtype.is_float:
        special = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype.torch)
        order = torch.randperm(len(SPECIAL), generator=generator) if seed else torch.arange(len(SPECIAL))
        return torch.cat([special[order], (torch.randn(n - len(SPECIAL), generator=generator) * 3).to(dtype.torch)])
    info = torch.iinfo(dtype.torch)
    edge = torch.tensor([info.min, info.max, 0, 1, 2, max(info.min, -1)], dtype=dtype.torch)
    return torch.cat([edge, torch.randint(max(info.min, -50), 50, (n - 6,), generator=generator, dtype=dtype.torch)])


def one_op(name: str, dtype: DType) -> Graph | None:
    """A graph of one op at a dtype, or None if the op does not take it."""
    graph = Graph("g")
    operands = [graph.add_input(TensorType(dtype, (75,)), f"x{k}") for k in range(OPS[name].arity[0])]
    if name == "where":
        graph = Graph("g")
        operands = [graph.add_input(TensorType(t, (75,))) for t in (types.b1, dtype, dtype)]
    try:
        result = Builder(graph).create(name, operands, {})
    except TypeInferenceError:
        return None
    graph.set_outputs([result])
    if refusal(graph, detect()) is not None:
        return None
    return graph


CASES = [(n, d) for n, o in OPS.items() if o.has(Trait.POINTWISE) and n not in ("cast", "quantize") for d in DTYPES]


def test_every_op_at_every_dtype(compile_all) -> None:
    """Special values included: nan, infinities, signed zeros, denormals, extreme integers."""
    graphs, inputs = [], []
    for name, dtype in CASES:
        graph = one_op(name, dtype)
        if graph is None:
            continue
        xs = [values(v.dtype, 75, k) for k, v in enumerate(graph.inputs)]
        try:
            evaluate(graph, xs)
        except RuntimeError:  # torch itself does not have the op at this dtype
            continue
        graphs.append((name, dtype, graph))
        inputs.append(xs)
    assert len(graphs) > 250
    runs = compile_all([(g, "pointwise") for _, _, g in graphs])
    failed = []
    for (name, dtype, graph), run, xs in zip(graphs, runs, inputs, strict=True):
        (got,), (own,), (true,) = run(xs, None), evaluate(graph, xs), evaluate(graph, xs, wide=True)
        if not agree(name, dtype, got, own, true):
            bad = ~torch.isclose(got.double(), own.double(), rtol=1e-6, atol=0, equal_nan=True)
            failed.append(
                f"{name} {dtype}: at {[x[bad][:4].tolist() for x in xs]} got {got[bad][:4].tolist()} torch {own[bad][:4].tolist()}"
            )
    assert not failed, "\n".join(failed)


def agree(name: str, dtype: DType, got: torch.Tensor, own: torch.Tensor, true: torch.Tensor) -> bool:
    if not got.dtype.is_floating_point:
        return torch.equal(got, own)
    # where torch's vector code gives nan for a value that is defined (gelu(inf), fmod of denormals), the true value is right
    target = torch.where(own.isnan() & ~true.isnan(), true.to(own.dtype), own)
    if not torch.equal(torch.isnan(got), torch.isnan(target)):
        return False
    finite = torch.isfinite(target) & torch.isfinite(got)
    if not torch.equal(torch.where(finite | target.isnan(), 0, got), torch.where(finite | target.isnan(), 0, target)):
        return False
    unit = torch.finfo(got.dtype).eps * true.abs().clamp_min(CANCELS.get(name, torch.finfo(got.dtype).tiny))
    ulps = ULPS["default"] if dtype.bits > 16 else 1
    allowed = torch.maximum(ulps * unit, 2 * (own.double() - true).abs().nan_to_num())
    return bool(((got.double() - true).abs() <= allowed)[finite].all())


def test_bounds_pass_nan_and_the_sign_of_zero(compile_all) -> None:
    x, pairs = torch.tensor(SPECIAL), [(0.0, 6.0), (-0.0, 0.0), (-1.0, float("inf")), (float("nan"), 1.0)]
    graphs = [parse_graph(f"""graph @g(%x: f32[{len(SPECIAL)}]) -> f32[{len(SPECIAL)}] {{
      %0: f32[] = constant() {{value = {low}}}
      %1: f32[] = constant() {{value = {high}}}
      %2: f32[{len(SPECIAL)}] = maximum(%0, %x)
      %3: f32[{len(SPECIAL)}] = minimum(%2, %1)
      return %3
    }}""") for low, high in pairs]  # fmt: skip
    for (low, high), run in zip(pairs, compile_all([(g, "pointwise") for g in graphs]), strict=True):
        (got,), wanted = run([x], None), x.clamp(low, high)
        assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(), wanted.nan_to_num())
        if low == low:
            assert torch.equal(got.signbit(), wanted.signbit()), (low, high)


def test_casts(compile_all) -> None:
    """Every pair of dtypes; floats that no integer holds are left out for narrow integers, where C has no answer."""
    graphs = []
    for a in DTYPES:
        for b in DTYPES:
            graph = Graph("g")
            x = graph.add_input(TensorType(a, (75,)))
            graph.set_outputs([Builder(graph).create("cast", [x], {"dtype": b})])
            graphs.append((a, b, graph))
    runs = compile_all([(g, "pointwise") for *_, g in graphs])
    for (a, b, graph), run in zip(graphs, runs, strict=True):
        x = values(a, 75, 0)
        if a.is_float and b.kind in "iu":
            x = torch.nan_to_num(x, 0.0, 100.0, 0.0 if b.kind == "u" else -100.0).clamp(0 if b.kind == "u" else -100, 100)
        (got,), (own,) = run([x], None), evaluate(graph, [x])
        assert torch.equal(got.nan_to_num(7.0), own.nan_to_num(7.0)), f"{a} -> {b}: {x[got != own]} {got[got != own]} {own[got != own]}"


BODIES = {
    "broadcast": ("(%x: f32[4, 1, 6], %y: f32[5, 1], %z: f32[]) -> f32[4, 5, 6]",
                  "%0: f32[4, 5, 6] = add(%x, %y)\n %1: f32[4, 5, 6] = mul(%0, %z)\n return %1"),
    "strided": ("(%x: f32[6, 40; 1, 6], %y: f32[40; 2]) -> f32[6, 40]", "%0: f32[6, 40] = add(%x, %y)\n return %0"),
    "views": ("(%x: f32[2, 6, 20]) -> f32[20, 3, 4]",
              "%0: f32[12, 20] = reshape(%x) {shape = [12, 20]}\n %1: f32[20, 12] = transpose(%0) {perm = [1, 0]}\n"
              "%2: f32[20, 12] = flip(%1) {axes = [0]}\n %3: f32[20, 3, 4] = reshape(%2) {shape = [20, 3, 4]}\n return %3"),
    "slice": ("(%x: f32[10, 33]) -> f32[5, 16]",
              "%0: f32[5, 33] = slice(%x) {axis = 0, start = 1, stop = 10, step = 2}\n"
              "%1: f32[5, 16] = slice(%0) {axis = 1, start = 3, stop = 19}\n return %1"),
    "concat": ("(%x: f32[3, 5], %y: f32[3, 1], %z: f32[3, 30]) -> f32[3, 36]",
               "%0: f32[3, 36] = concat(%x, %y, %z) {axis = 1}\n return %0"),
    "pad": ("(%x: f32[3, 5]) -> f32[6, 20]", "%0: f32[6, 20] = pad(%x) {low = [1, 7], high = [2, 8], value = 2.5}\n return %0"),
    "take": ("(%x: f32[10, 24], %i: i64[3, 2]) -> f32[3, 2, 24]", "%0: f32[3, 2, 24] = take(%x, %i)\n return %0"),
    "gather": ("(%x: f32[10, 24], %i: i64[10, 4]) -> f32[10, 4]", "%0: f32[10, 4] = gather(%x, %i) {axis = 1}\n return %0"),
    "iota": ("(%x: f32[4, 20]) -> b1[4, 20]",
             "%0: i64[20] = iota() {size = 20, start = 3, step = 2}\n %1: f32[20] = cast(%0) {dtype = f32}\n"
             "%2: b1[4, 20] = gt(%1, %x)\n return %2"),
    "scalar": ("(%x: f32[]) -> f32[]", "%0: f32[] = exp(%x)\n return %0"),
    "two outputs": ("(%x: f32[7, 33]) -> (f32[7, 33], i64[33, 7])",
                    "%0: f32[7, 33] = exp(%x)\n"
                    " %1: f32[33, 7] = transpose(%x) {perm = [1, 0]}\n %2: i64[33, 7] = cast(%1) {dtype = i64}\n return %0, %2"),
    "output strides": ("(%x: f32[7, 33]) -> f32[7, 33; 1, 7]", "%0: f32[7, 33] = neg(%x)\n return %0"),
}  # fmt: skip


def body(name: str) -> Graph:
    signature, lines = BODIES[name]
    return parse_graph(f"graph @g{signature} {{\n{lines}\n}}")


def inputs_for(graph: Graph, seed: int = 0, **bindings: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for v in graph.inputs:
        shape = [d if isinstance(d, int) else dims.evaluate(d, bindings) for d in v.shape]
        if v.dtype.is_integer:
            out.append(torch.randint(0, 10, shape, generator=generator).to(v.dtype.torch))
            continue
        x = torch.randn(shape, generator=generator).to(v.dtype.torch)
        if v.type.strides is not None:
            strides = [int(s) for s in v.type.strides]
            x = torch.empty_strided(shape, strides, dtype=x.dtype).copy_(x)
        out.append(x)
    return out


def test_views_and_layouts(compile_all) -> None:
    graphs = [body(n) for n in BODIES]
    for name, graph, run in zip(BODIES, graphs, compile_all([(g, "pointwise") for g in graphs]), strict=True):
        if name != "output strides":
            check(graph, run, inputs_for(graph))


def test_output_strides(compile_all, builder, kernels_dir) -> None:
    graph = body("output strides")
    w = Workload.of(graph, "pointwise")
    s = TvmBackend().templates(w, detect())[0].space(w, detect()).default()
    kernel = load_kernel(builder.build_many([(w, s)], detect(), kernels_dir)[0], w, s)
    x, out = torch.randn(7, 33), torch.empty_strided((7, 33), (1, 7))
    kernel(x, out)
    assert torch.equal(out, -x)


def test_offset_views_and_threads(compile_all) -> None:
    """Storage offsets that no vector alignment fits; results are the same from several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    graph = parse_graph("graph @g(%x: f32[300000]) -> f32[300000] {\n %0: f32[300000] = exp(%x)\n return %0\n}")
    (run,) = compile_all([(graph, "pointwise")])
    x = torch.randn(300_003)[3:]
    expected = run([x], None)[0]
    check(graph, run, [x])
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(r[0], expected) for r in pool.map(lambda _: run([x], None), range(20)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(run([x], None)[0], expected)
    finally:
        torch.set_num_threads(before)


def test_symbolic_sizes(compile_all) -> None:
    """One kernel, many sizes, among them 1 and sizes below a vector."""
    graph = parse_graph(
        "graph @g(%x: f32[B, S, 8], %y: f32[S, 8]) -> f32[B, 8*S]\nwhere 1 <= B, 1 <= S <= 4096 {\n"
        " %0: f32[B, S, 8] = add(%x, %y)\n %1: f32[B, S, 8] = tanh(%0)\n %2: f32[B, 8*S] = reshape(%1) {shape = [B, 8*S]}\n return %2\n}"
    )
    (run,) = compile_all([(graph, "pointwise")])
    for b, s in ((1, 1), (2, 3), (5, 17), (3, 1000), (1, 4096)):
        check(graph, run, [torch.randn(b, s, 8), torch.randn(s, 8)], {"B": b, "S": s})


def test_products_round_before_sums(compile_all) -> None:
    """No contraction to fma: a chain of ops has eager's bits."""
    graph = parse_graph(
        "graph @g(%x: f32[1000], %y: f32[1000], %z: f32[1000]) -> f32[1000] {\n %0: f32[1000] = mul(%x, %y)\n"
        " %1: f32[1000] = add(%0, %z)\n %2: f32[1000] = mul(%1, %x)\n %3: f32[1000] = sub(%2, %0)\n return %3\n}"
    )
    (run,) = compile_all([(graph, "pointwise")])
    xs = [torch.randn(1000) for _ in range(3)]
    assert torch.equal(run(xs, None)[0], evaluate(graph, xs)[0])


@pytest.mark.parametrize("text, words", [
    ("(%x: c64[4]) -> c64[4] {\n %0: c64[4] = neg(%x)\n return %0\n}", "c64"),
    ("(%x: i64[4], %y: i64[4]) -> i64[4] {\n %0: i64[4] = floor_div(%x, %y)\n return %0\n}", "floor_div"),
    ("(%x: f32[4]) -> f32[4] {\n %0: f32[4] = aten(%x) {target = \"aten.msort.default\", args = [$0]}\n return %0\n}", "aten"),
])  # fmt: skip
def test_reasons_name_what_is_in_the_way(text: str, words: str) -> None:
    reason = refusal(parse_graph("graph @g" + text), detect())
    assert reason is not None and words in reason


def test_roundings_to_bf16(compile_all) -> None:
    """Every kind of nan stays one, and halves round to even; a chain of roundings compiles in seconds."""
    patterns = [0x7F800001, 0x7FFFFFFF, -1, 0x7F80FFFF, 0x7F7FFFFF, 0x7F800000, 0x3F808000, 0x3F818000, 0x00018000, -0x00FF8000]
    bits = torch.tensor(patterns * 4, dtype=torch.int32)
    cast = parse_graph("graph @g(%x: f32[40]) -> bf16[40] {\n %0: bf16[40] = cast(%x) {dtype = bf16}\n return %0\n}")
    chain = parse_graph("graph @g(%x: bf16[40], %y: bf16[40]) -> bf16[40] {\n %0: bf16[40] = add(%x, %y)\n %1: bf16[40] = gelu(%0)\n"
                        " %2: bf16[40] = add(%1, %y)\n return %2\n}")  # fmt: skip
    narrow, chained = compile_all([(cast, "pointwise"), (chain, "pointwise")])
    x = bits.view(torch.float32)
    got, expected = narrow([x])[0], x.to(torch.bfloat16)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(), expected.nan_to_num())
    a = torch.randn(40).bfloat16()
    a[0] = float("nan")
    check(chain, chained, [a, torch.randn(40).bfloat16()])

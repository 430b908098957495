"""Kernels under Triton's interpreter, against f64 with eager's error as the yardstick; sizes that divide nothing."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_check import SM_90, runner, templates

from graphopt.autotune.space import Schedule, SearchSpace, Workload
from graphopt.backends.triton.backend import TritonBackend
from graphopt.ir import dims, types
from graphopt.ir.graph import Graph
from graphopt.ir.interpreter import evaluate
from graphopt.ir.text import parse_graph
from graphopt.sampling import random_inputs
from graphopt.testing.kernels import check
from graphopt.testing.random_regions import random_region

POINTWISE = {
    "broadcast": "(%x: f32[7, 33], %y: f32[33]) -> f32[7, 33] {\n %0: f32[7, 33] = tanh(%x)\n %1: f32[7, 33] = mul(%0, %y)\n return %1\n}",
    "transposed": "(%x: f32[40, 70], %y: f32[70, 40]) -> f32[70, 40] {\n %0: f32[70, 40] = transpose(%x) {perm = [1, 0]}\n"
    " %1: f32[70, 40] = add(%0, %y)\n return %1\n}",
    "embedding": "(%t: f32[50, 20], %i: i64[2, 9]) -> f32[2, 9, 20] {\n %0: f32[2, 9, 20] = take(%t, %i) {axis = 0}\n"
    " %1: f32[2, 9, 20] = gelu(%0)\n return %1\n}",
    "strides": "(%x: f32[6, 10; 1, 6], %y: f32[6, 10; 20, 2]) -> f32[6, 10; 1, 6] {\n %0: f32[6, 10] = sub(%x, %y)\n return %0\n}",
    "bf16": "(%x: bf16[300], %y: bf16[300]) -> bf16[300] {\n %0: bf16[300] = mul(%x, %y)\n %1: bf16[300] = gelu(%0)\n return %1\n}",
    "rotated": "(%x: f32[B, 8], %c: f32[B, 8]) -> f32[B, 8]\nwhere 1 <= B {\n %0: f32[B, 4] = slice(%x) {axis = 1, start = 4, stop = 8}\n"
    " %1: f32[B, 4] = neg(%0)\n %2: f32[B, 4] = slice(%x) {axis = 1, stop = 4}\n %3: f32[B, 8] = concat(%1, %2) {axis = 1}\n"
    " %4: f32[B, 8] = mul(%3, %c)\n return %4\n}",
}
REDUCTIONS = {
    f"{op} {axes}": f"(%x: f32[9, 37, 20]) -> {dtype}[{shape}] {{\n %0: {dtype}[{shape}] = {op}(%x) {{axes = [{axes}]}}\n return %0\n}}"
    for op, dtype in (("sum", "f32"), ("mean", "f32"), ("max", "f32"), ("prod", "f32"), ("any", "b1"), ("all", "b1"))
    for axes, shape in (("0, 1, 2", ""), ("2", "9, 37"), ("1", "9, 20"), ("0, 2", "37"))
    if op != "prod" or axes == "2"  # of other reductions than the common ones, the interpreter makes a loop over the elements
}
REDUCTIONS |= {
    "argmax": "(%x: f32[9, 37]) -> i64[9] {\n %0: i64[9] = argmax(%x) {axis = 1}\n return %0\n}",
    "argmin": "(%x: f32[9, 37]) -> i64[37] {\n %0: i64[37] = argmin(%x) {axis = 0}\n return %0\n}",
    "integers": "(%x: i64[80, 40]) -> i64[80] {\n %0: i64[80] = sum(%x) {axes = [1]}\n return %0\n}",
    "long": "(%x: f32[30000]) -> f32[] {\n %0: f32[] = sum(%x) {axes = [0]}\n return %0\n}",
}
ROWS = {
    "softmax": "(%x: f32[5, 7, C]) -> f32[5, 7, C] {\n %0: f32[5, 7, C] = softmax(%x) {axis = 2}\n return %0\n}",
    "log_softmax": "(%x: f32[5, 7, C]) -> f32[5, 7, C] {\n %0: f32[5, 7, C] = log_softmax(%x) {axis = 2}\n return %0\n}",
    "layer_norm": "(%x: f32[5, 7, C], %r: f32[5, 7, C], %w: f32[C], %b: f32[C]) -> f32[5, 7, C] {\n %0: f32[5, 7, C] = add(%x, %r)\n"
    " %1: f32[5, 7, C] = layer_norm(%0, %w, %b)\n return %1\n}",
    "rms_norm": "(%x: bf16[5, 7, C], %w: bf16[C]) -> bf16[5, 7, C] {\n %0: bf16[5, 7, C] = rms_norm(%x, %w)\n return %0\n}",
    "var": "(%x: f32[5, 7, C]) -> f32[5, 7] {\n %0: f32[5, 7] = var(%x) {axes = [2]}\n return %0\n}",
    "rows of any number": "(%x: f32[B, C]) -> f32[B, C]\nwhere 1 <= B {\n %0: f32[B, C] = softmax(%x) {axis = 1}\n return %0\n}",
}
PRODUCTS = {
    "plain": "(%x: f32[13, 40], %y: f32[40, 50]) -> f32[13, 50] {\n %0: f32[13, 50] = matmul(%x, %y)\n return %0\n}",
    "linear": "(%x: f32[B, 37], %w: f32[70, 37], %b: f32[70]) -> f32[B, 70]\nwhere 1 <= B {\n"
    " %t: f32[37, 70] = transpose(%w) {perm = [1, 0]}\n"
    " %0: f32[B, 70] = matmul(%x, %t)\n %1: f32[B, 70] = add(%0, %b)\n %2: f32[B, 70] = gelu(%1)\n return %2\n}",
    "batches": "(%x: f32[2, 3, 9, 64], %y: f32[2, 1, 33, 64]) -> f32[2, 3, 9, 33] {\n"
    " %t: f32[2, 1, 64, 33] = transpose(%y) {perm = [0, 1, 3, 2]}\n"
    " %0: f32[2, 3, 9, 33] = matmul(%x, %t)\n return %0\n}",
    "prologue": "(%x: bf16[2, 9, 40], %y: bf16[40, 33]) -> bf16[2, 9, 33] {\n %0: bf16[2, 9, 40] = exp(%x)\n"
    " %1: bf16[2, 9, 33] = matmul(%0, %y)\n return %1\n}",
    "gate": "(%x: f32[9, 40], %y: f32[40, 33], %z: f32[40, 33]) -> f32[9, 33] {\n"
    " %0: f32[9, 33] = matmul(%x, %y)\n %1: f32[9, 33] = silu(%0)\n"
    " %2: f32[9, 33] = matmul(%x, %z)\n %3: f32[9, 33] = mul(%1, %2)\n return %3\n}",
    "vector": "(%x: f16[1, 300], %y: f16[64, 300]) -> f16[1, 64] {\n %t: f16[300, 64] = transpose(%y) {perm = [1, 0]}\n"
    " %0: f16[1, 64] = matmul(%x, %t)\n return %0\n}",
    "vector of integers": "(%x: i8[1, 100], %w: i8[70, 100], %s: f32[70]) -> f32[1, 70] {\n"
    " %0: i8[100, 70] = transpose(%w) {perm = [1, 0]}\n %1: i32[1, 70] = matmul(%x, %0) {acc = i32}\n"
    " %2: f32[1, 70] = dequantize(%1, %s)\n return %2\n}",
    "vectors": "(%x: f32[3, 1, 37], %y: f32[3, 37, 50], %b: f32[50]) -> f32[3, 1, 50] {\n"
    " %0: f32[3, 1, 50] = matmul(%x, %y)\n %1: f32[3, 1, 50] = add(%0, %b)\n %2: f32[3, 1, 50] = gelu(%1)\n return %2\n}",
    "gate of a vector": "(%x: bf16[1, 1, 40], %y: bf16[40, 33], %z: bf16[40, 33]) -> bf16[1, 1, 33] {\n"
    " %e: bf16[1, 1, 40] = exp(%x)\n %0: bf16[1, 1, 33] = matmul(%e, %y)\n %1: bf16[1, 1, 33] = silu(%0)\n"
    " %2: bf16[1, 1, 33] = matmul(%e, %z)\n %3: bf16[1, 1, 33] = mul(%1, %2)\n return %3\n}",
    "integers": "(%x: i8[13, 100], %w: i8[70, 100], %s: f32[13, 1], %t: f32[70]) -> f32[13, 70] {\n"
    " %0: i8[100, 70] = transpose(%w) {perm = [1, 0]}\n %1: i32[13, 70] = matmul(%x, %0) {acc = i32}\n"
    " %2: f32[13, 70] = mul(%s, %t)\n %3: f32[13, 70] = dequantize(%1, %2)\n return %3\n}",
    "integers alone": "(%x: i8[13, 100], %w: i8[100, 70]) -> i32[13, 70] {\n %0: i32[13, 70] = matmul(%x, %w) {acc = i32}\n return %0\n}",
    "f64": "(%x: f64[9, 30], %y: f64[30, 20]) -> f64[9, 20] {\n %0: f64[9, 20] = matmul(%x, %y)\n return %0\n}",
}
_FAMILIES = {"pointwise": POINTWISE, "reduction": REDUCTIONS, "rowwise": ROWS, "matmul": PRODUCTS}
CASES = {f"{kind}: {name}": (kind, text.replace("C]", "127]")) for kind, group in _FAMILIES.items() for name, text in group.items()}


def judge(kind: str, text: str, schedule: Schedule | None = None, seed: int = 0) -> None:
    graph = parse_graph("graph @g" + text)
    bindings = dict.fromkeys(graph.symbols, 11)
    check(graph, runner(graph, kind, schedule), random_inputs(graph, bindings, seed), bindings, factor=4.0, slack=2)


@pytest.mark.parametrize("name", CASES)
def test_default_schedules(name: str) -> None:
    judge(*CASES[name])


def sample(space: SearchSpace, r: random.Random) -> Schedule | None:
    """A schedule of the space, drawn alike from all knobs; None if it breaks a constraint."""
    knobs = {p.name: r.choice(p.choices) for p in space.params}
    s = Schedule.make(space.template, r.choice(space.sketches), **knobs)
    return s if space.rejection(s) is None else None


def draws(graph: Graph, kind: str, count: int) -> list[Schedule]:
    """Some schedules of every structure of a region's kernels; the same each time."""
    w, found = templates(graph, kind)
    r, out = random.Random(w.key), list[Schedule]()
    for space in [s for t in found for s in t.spaces(w, SM_90)]:
        drawn = [s for s in (sample(space, r) for _ in range(8 * count)) if s is not None][:count]
        assert drawn, f"no schedule of {space} holds"
        out += drawn
    return out


def sweep(name: str, count: int) -> None:
    kind, text = CASES[name]
    for s in draws(parse_graph("graph @g" + text), kind, count):
        judge(kind, text, s)


@pytest.mark.parametrize("name", ["pointwise: transposed", "reduction: mean 1", "rowwise: layer_norm", "matmul: linear", "matmul: gate"])
def test_sampled_schedules(name: str) -> None:
    sweep(name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_sampled_schedules(name: str) -> None:
    sweep(name, 12)


@pytest.mark.parametrize("columns", [1, 3, 16, 768])
def test_rows_of_any_length(columns: int) -> None:
    for name in ("softmax", "layer_norm"):
        judge("rowwise", ROWS[name].replace("C", str(columns)))


@pytest.mark.parametrize("dtype", ["f8e4m3", "f8e5m2"])
def test_all_floats_of_8_bits(dtype: str) -> None:
    text = f"graph @g(%x: {dtype}[256], %s: f32[1]) -> f32[256] {{\n %0: f32[256] = dequantize(%x, %s)\n return %0\n}}"
    graph = parse_graph(text)
    codes = torch.arange(256, dtype=torch.uint8).view(graph.inputs[0].dtype.torch)
    (got,) = runner(graph, "pointwise")([codes, torch.tensor([0.5])], None)
    torch.testing.assert_close(got, codes.float() * 0.5, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [types.f8e4m3, types.f8e5m2], ids=str)
def test_rounding_to_8_bits(dtype: types.DType) -> None:
    """Every number, what lies halfway to the next, a little below and above that, and what has no place: bit for bit the interpreter's."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype.torch).float()
    finite = numbers[numbers.isfinite()].sort().values
    half = (finite[1:] + finite[:-1]) / 2
    near = [finite, half, torch.nextafter(half, half + 1), torch.nextafter(half, half - 1), finite * 1.03, finite * 0.96]
    odd = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e30, -1e30, 1e-40, -1e-30, 500.0, 470.0, 60000.0]
    x = torch.cat([*near, torch.tensor(odd)])
    x = torch.cat([x, torch.randn(8 * 320 - len(x), generator=torch.Generator().manual_seed(0))]).reshape(8, 320)
    s = torch.tensor([[1.0]] * 5 + [[0.37], [4.0], [1.0]])
    graph = parse_graph(f"graph @g(%x: f32[8, 320], %s: f32[8, 1]) -> ({dtype}[320, 8], f32[320, 8]) {{\n"
                        f" %0: {dtype}[8, 320] = quantize(%x, %s) {{dtype = {dtype}, bits = 8}}\n"
                        f" %1: {dtype}[320, 8] = transpose(%0) {{perm = [1, 0]}}\n"
                        f" %2: f32[320, 8] = cast(%1) {{dtype = f32}}\n return %1, %2\n}}")  # fmt: skip
    (bits, value), (want, number) = runner(graph, "pointwise")([x, s], None), evaluate(graph, [x, s])
    nan = want.float().isnan()
    assert torch.equal(bits.float().isnan(), nan) and torch.equal(bits.view(torch.uint8)[~nan], want.view(torch.uint8)[~nan])
    torch.testing.assert_close(value, number, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["pointwise", "rowwise"])
def test_views_and_rows_of_8_bits(kind: str) -> None:
    """Floats of 8 bits that are moved, and rows that are rounded by a scale of their own; any number of rows."""
    moved = ("graph @g(%x: f8e4m3[B, 6]) -> f8e4m3[6, B]\nwhere 1 <= B {\n %0: f8e4m3[6, B] = transpose(%x) {perm = [1, 0]}\n return %0\n}")
    rows = ("graph @g(%x: bf16[B, 37]) -> (f8e5m2[B, 37], bf16[B, 1])\nwhere 1 <= B {\n %0: bf16[B, 37] = abs(%x)\n"
            " %1: bf16[B, 1] = max(%0) {axes = [1], keepdims = true}\n"
            " %2: f8e5m2[B, 37] = quantize(%x, %1) {dtype = f8e5m2, bits = 8}\n return %2, %1\n}")  # fmt: skip
    graph = parse_graph(moved if kind == "pointwise" else rows)
    for n in (1, 9, 40):
        shape = [n if d == dims.symbol("B") else int(d) for d in graph.inputs[0].shape]
        x = torch.randn(shape, generator=torch.Generator().manual_seed(n)).to(graph.inputs[0].dtype.torch)
        got, want = runner(graph, kind)([x], {"B": n}), evaluate(graph, [x], bindings={"B": n})
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.float(), w.float(), rtol=0 if kind == "pointwise" else 0.25, atol=0)


def test_what_is_not_computed_of_8_bits() -> None:
    w = Workload.of(parse_graph("graph @g(%x: f8e4m3[9]) -> f8e4m3[9] {\n %0: f8e4m3[9] = neg(%x)\n return %0\n}"), "pointwise")
    assert not TritonBackend().templates(w, SM_90) and TritonBackend().reason(w, SM_90) == "neg of 8-bit floats"


def test_a_nan_comes_through() -> None:
    for op in ("max", "min"):
        graph = parse_graph(f"graph @g(%x: f32[5, 37]) -> f32[5] {{\n %0: f32[5] = {op}(%x) {{axes = [1]}}\n return %0\n}}")
        x = torch.randn(5, 37, generator=torch.Generator().manual_seed(0))
        x[2, 7] = float("nan")
        check(graph, runner(graph, "reduction"), [x])
    graph = parse_graph("graph @g" + REDUCTIONS["argmax"])
    x = torch.randn(9, 37, generator=torch.Generator().manual_seed(0))
    x[2, 7], x[2, 9] = float("nan"), float("inf")
    check(graph, runner(graph, "reduction"), [x])


@settings(max_examples=24, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_random_regions(seed: int) -> None:
    graph, kind = random_region(random.Random(seed))
    check(graph, runner(graph, kind), random_inputs(graph, {}, seed), factor=4.0, slack=2)


@pytest.mark.slow
def test_many_random_regions() -> None:
    for seed in range(400):
        graph, kind = random_region(random.Random(seed))
        check(graph, runner(graph, kind), random_inputs(graph, {}, seed), factor=4.0, slack=2)

"""Every default schedule compiles for every target: nothing spilled, shared memory enough, products on the matrix units."""

from __future__ import annotations

import pytest
from test_triton_kernels import CASES
from triton_check import templates

from graphopt.accelerators import ACCELERATORS
from graphopt.backends.triton.offline import compile_offline
from graphopt.ir import types
from graphopt.ir.graph import Graph
from graphopt.ir.text import parse_graph
from graphopt.target import Target

TARGETS = [f"{a.kind}:{name}" for name, a in ACCELERATORS.items()]
VENDOR = ("asin", "acos", "atan", "asinh", "acosh", "atanh", "erfc")
LARGE = {
    "rowwise: layer norm": "(%x: f16[4096, 1024], %w: f16[1024], %b: f16[1024]) -> f16[4096, 1024] {\n"
    " %0: f16[4096, 1024] = layer_norm(%x, %w, %b)\n return %0\n}",
    "rowwise: long softmax": "(%x: f32[64, 50257]) -> f32[64, 50257] {\n %0: f32[64, 50257] = softmax(%x) {axis = 1}\n return %0\n}",
    "reduction: image": "(%x: f32[8, 49, 2048]) -> f32[8, 2048] {\n %0: f32[8, 2048] = mean(%x) {axes = [1]}\n return %0\n}",
    "pointwise: transposed": "(%x: f16[32, 128, 12, 64]) -> f16[32, 12, 64, 128] {\n"
    " %0: f16[32, 12, 64, 128] = transpose(%x) {perm = [0, 2, 3, 1]}\n %1: f16[32, 12, 64, 128] = gelu(%0)\n return %1\n}",
    "pointwise: functions of the vendor": "(%x: f32[100], %y: f32[100]) -> f32[100] {\n %0: f32[100] = atan2(%x, %y)\n"
    + "".join(f" %{k + 1}: f32[100] = {op}(%{k})\n" for k, op in enumerate(VENDOR)) + f" return %{len(VENDOR)}\n}}",
    "matmul: linear": "(%x: bf16[B, 1024], %w: bf16[4096, 1024], %b: bf16[4096]) -> bf16[B, 4096]\nwhere 1 <= B <= 65536 {\n"
    " %t: bf16[1024, 4096] = transpose(%w) {perm = [1, 0]}\n %0: bf16[B, 4096] = matmul(%x, %t)\n %1: bf16[B, 4096] = add(%0, %b)\n"
    " %2: bf16[B, 4096] = gelu(%1)\n return %2\n}",
    "matmul: gate": "(%x: f16[512, 768], %y: f16[768, 2048], %z: f16[768, 2048]) -> f16[512, 2048] {\n"
    " %0: f16[512, 2048] = matmul(%x, %y)\n %1: f16[512, 2048] = silu(%0)\n %2: f16[512, 2048] = matmul(%x, %z)\n"
    " %3: f16[512, 2048] = mul(%1, %2)\n return %3\n}",
    "matmul: one row": "(%x: bf16[1, 1, 4096], %w: bf16[11008, 4096], %v: bf16[11008, 4096]) -> bf16[1, 1, 11008] {\n"
    " %a: bf16[4096, 11008] = transpose(%w) {perm = [1, 0]}\n %b: bf16[4096, 11008] = transpose(%v) {perm = [1, 0]}\n"
    " %0: bf16[1, 1, 11008] = matmul(%x, %a)\n %1: bf16[1, 1, 11008] = silu(%0)\n %2: bf16[1, 1, 11008] = matmul(%x, %b)\n"
    " %3: bf16[1, 1, 11008] = mul(%1, %2)\n return %3\n}",
    "matmul: one row of 4-bit integers": "(%x: f16[1, 4096], %w: i32[4096, 512], %s: f32[4096, 64, 1]) -> f16[1, 4096] {\n"
    " %0: i8[4096, 4096] = unpack_bits(%w) {axis = 1, bits = 4, dtype = i8}\n %1: i8[4096, 64, 64] = reshape(%0) {shape = [4096, 64, 64]}\n"
    " %2: f32[4096, 64, 64] = dequantize(%1, %s)\n %3: f32[4096, 4096] = reshape(%2) {shape = [4096, 4096]}\n"
    " %4: f32[4096, 4096] = transpose(%3) {perm = [1, 0]}\n %x1: f32[1, 4096] = cast(%x) {dtype = f32}\n"
    " %5: f32[1, 4096] = matmul(%x1, %4)\n %6: f16[1, 4096] = cast(%5) {dtype = f16}\n return %6\n}",
    "matmul: integers": "(%x: i8[B, 1024], %w: i8[4096, 1024], %s: f32[B, 1], %t: f32[4096]) -> f32[B, 4096]\nwhere 1 <= B <= 65536 {\n"
    " %0: i8[1024, 4096] = transpose(%w) {perm = [1, 0]}\n %1: i32[B, 4096] = matmul(%x, %0) {acc = i32}\n"
    " %2: f32[B, 4096] = mul(%s, %t)\n %3: f32[B, 4096] = dequantize(%1, %2)\n return %3\n}",
    "pointwise: to 8-bit floats": "(%x: bf16[4096, 1024], %s: bf16[4096, 1]) -> f8e4m3[4096, 1024] {\n"
    " %0: f8e4m3[4096, 1024] = quantize(%x, %s) {dtype = f8e4m3, bits = 8}\n return %0\n}",
    "rowwise: to 8-bit floats": "(%x: f32[4096, 1024]) -> (f8e5m2[4096, 1024], f32[4096, 1]) {\n %0: f32[4096, 1024] = abs(%x)\n"
    " %1: f32[4096, 1] = max(%0) {axes = [1], keepdims = true}\n"
    " %2: f8e5m2[4096, 1024] = quantize(%x, %1) {dtype = f8e5m2, bits = 8}\n return %2, %1\n}",
    "matmul: few tiles": "(%x: bf16[250, 16384], %w: bf16[192, 16384], %b: bf16[192]) -> bf16[250, 192] {\n"
    " %t: bf16[16384, 192] = transpose(%w) {perm = [1, 0]}\n %0: bf16[250, 192] = matmul(%x, %t)\n %1: bf16[250, 192] = add(%0, %b)\n"
    " %2: bf16[250, 192] = gelu(%1)\n return %2\n}",
    "matmul: batches": "(%x: f16[12, 128, 64], %y: f16[12, 64, 128]) -> f16[12, 128, 128] {\n"
    " %0: f16[12, 128, 128] = matmul(%x, %y)\n return %0\n}",
}


def judge(graph: Graph, kind: str, target: str, units: tuple[str, ...] = ()) -> None:
    """Compile the default schedule, and read what came of it. ``units``: others that may multiply."""
    t = Target.from_name(target)
    w, (template, *_) = templates(graph, kind, t)
    c = compile_offline(template.emit(w, template.space(w, t).default(), t), t)
    assert c.spills == 0 and 0 < c.registers <= 512
    assert c.shared <= t.shared_memory
    multiplies = template.name in ("matmul", "attention", "conv")
    if multiplies and graph.inputs[0].dtype in (types.f16, types.bf16, types.i8):
        assert any(map(c.uses, (t.matrix_unit, *units))), f"no {t.matrix_unit} in\n{c.assembly[:2000]}"


def parsed(text: str) -> Graph:
    return parse_graph("graph @g" + text)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["rowwise: layer norm", "matmul: linear", "matmul: few tiles", "pointwise: functions of the vendor",
                                  "pointwise: to 8-bit floats", "rowwise: to 8-bit floats"])  # fmt: skip
def test_large_kernels(name: str, target: str) -> None:
    judge(parsed(LARGE[name]), name.partition(":")[0], target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LARGE)
def test_all_large_kernels(name: str, target: str) -> None:
    judge(parsed(LARGE[name]), name.partition(":")[0], target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_small_kernels(name: str, target: str) -> None:
    kind, text = CASES[name]
    judge(parsed(text), kind, target, ("mma",) if target in ("cuda:sm_90", "cuda:sm_100") else ())  # wgmma takes 64 rows and more


@pytest.mark.parametrize("name", ["reduction: all 0, 2", "reduction: any 0, 2"])
def test_truth_values_take_no_stack(name: str) -> None:
    """Their least and greatest would: vectors of bits, of which LLVM keeps a byte there."""
    judge(parsed(CASES[name][1]), "reduction", "cuda:sm_90")

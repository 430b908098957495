"""Reductions, row kernels and products: error against f64 with eager's own as the yardstick; sizes that divide nothing."""

from __future__ import annotations

import pytest
import torch
from tvm_check import check

from graphopt.ir import dims
from graphopt.ir.text import parse_graph

REDUCTIONS = {
    f"{op} {axes}": f"graph @g(%x: f32[9, 37, 50]) -> {dtype}[{shape}] {{\n"
    f" %0: {dtype}[{shape}] = {op}(%x) {{axes = [{axes}]}}\n return %0\n}}"
    for op, dtype in (("sum", "f32"), ("mean", "f32"), ("max", "f32"), ("min", "f32"), ("prod", "f32"), ("any", "b1"), ("all", "b1"))
    for axes, shape in (("0, 1, 2", ""), ("2", "9, 37"), ("1", "9, 50"), ("0", "37, 50"), ("0, 2", "37"), ("0, 1", "50"), ("1, 2", "9"))
}
REDUCTIONS |= {
    "argmax": "graph @g(%x: f32[9, 37]) -> i64[9] {\n %0: i64[9] = argmax(%x) {axis = 1}\n return %0\n}",
    "argmin": "graph @g(%x: f32[9, 37]) -> i64[37] {\n %0: i64[37] = argmin(%x) {axis = 0}\n return %0\n}",
    "long": "graph @g(%x: f32[300000]) -> f32[] {\n %0: f32[] = sum(%x) {axes = [0]}\n return %0\n}",
    "tall": "graph @g(%x: f32[5000, 40]) -> f32[40] {\n %0: f32[40] = sum(%x) {axes = [0]}\n return %0\n}",
    "epilogue": "graph @g(%x: f32[80, 40]) -> f32[80, 1] {\n %0: f32[80, 40] = mul(%x, %x)\n"
    " %1: f32[80, 1] = mean(%0) {axes = [1], keepdims = true}\n %2: f32[80, 1] = rsqrt(%1)\n return %2\n}",
    "integers": "graph @g(%x: i64[80, 40]) -> i64[80] {\n %0: i64[80] = sum(%x) {axes = [1]}\n return %0\n}",
}
ROWS = {
    "softmax": "(%x: f32[5, 7, C]) -> f32[5, 7, C] {\n %0: f32[5, 7, C] = softmax(%x) {axis = 2}\n return %0\n}",
    "log_softmax": "(%x: f32[5, 7, C]) -> f32[5, 7, C] {\n %0: f32[5, 7, C] = log_softmax(%x) {axis = 2}\n return %0\n}",
    "layer_norm": "(%x: f32[5, 7, C], %r: f32[5, 7, C], %w: f32[C], %b: f32[C]) -> f32[5, 7, C] {\n %0: f32[5, 7, C] = add(%x, %r)\n"
    " %1: f32[5, 7, C] = layer_norm(%0, %w, %b)\n return %1\n}",
    "rms_norm": "(%x: f32[5, 7, C], %w: f32[C]) -> f32[5, 7, C] {\n %0: f32[5, 7, C] = rms_norm(%x, %w)\n return %0\n}",
    "var": "(%x: f32[5, 7, C]) -> f32[5, 7] {\n %0: f32[5, 7] = var(%x) {axes = [2]}\n return %0\n}",
}


def inputs(graph, **bindings):
    generator = torch.Generator().manual_seed(0)
    shapes = [([d if isinstance(d, int) else dims.evaluate(d, bindings) for d in v.shape], v.dtype.torch) for v in graph.inputs]
    return [
        torch.randn(s, generator=generator).to(t) if t.is_floating_point else torch.randint(-99, 99, s, generator=generator)
        for s, t in shapes
    ]


def test_reductions(compile_all) -> None:
    graphs = [parse_graph(t) for t in REDUCTIONS.values()]
    for graph, run in zip(graphs, compile_all([(g, "reduction") for g in graphs]), strict=True):
        check(graph, run, inputs(graph), factor=4.0)


@pytest.mark.parametrize("template", [0, 1])
def test_rows_of_any_length(compile_all, template: int) -> None:
    graphs = [parse_graph("graph @g" + t.replace("C", str(c))) for t in ROWS.values() for c in (3, 16, 127, 768)]
    for graph, run in zip(graphs, compile_all([(g, "rowwise") for g in graphs], template), strict=True):
        check(graph, run, inputs(graph), factor=4.0)


@pytest.mark.parametrize("space", [(1, 1), (3, 5), (8, 16), (31, 33)])
def test_rows_in_runs(compile_all, space: tuple[int, int]) -> None:
    """A group norm: in a row, scale and shift, and what is added before, change from channel to channel."""
    h, w = space
    text = f"""graph @g(%x: f32[B, 12, {h}, {w}], %t: f32[B, 12, 1, 1], %s: f32[12], %b: f32[12]) -> f32[B, 4, 3, {h}, {w}] where 1 <= B {{
      %0: f32[B, 12, {h}, {w}] = add(%x, %t)
      %1: f32[B, 4, 3, {h}, {w}] = reshape(%0) {{shape = [B, 4, 3, {h}, {w}]}}
      %2: f32[B, 4, 3, {h}, {w}] = layer_norm(%1) {{axes = 3}}
      %3: f32[4, 3, 1, 1] = reshape(%s) {{shape = [4, 3, 1, 1]}}
      %4: f32[B, 4, 3, {h}, {w}] = mul(%2, %3)
      %5: f32[4, 3, 1, 1] = reshape(%b) {{shape = [4, 3, 1, 1]}}
      %6: f32[B, 4, 3, {h}, {w}] = add(%4, %5)
      return %6
    }}"""
    symbolic = parse_graph(text)
    static = parse_graph(text.replace("[B,", "[2,").replace(" where 1 <= B", ""))
    for graph, run in zip((symbolic, static), compile_all([(g, "rowwise") for g in (symbolic, static)]), strict=True):
        for bindings in ({"B": 1}, {"B": 3}) if graph is symbolic else ({},):
            check(graph, run, inputs(graph, **bindings), bindings or None, factor=4.0)


def test_masked_rows_hold_no_denormals(compile_all) -> None:
    """A softmax is zero where it is tiny: neither exp(-100) nor what is left of it after the division; nan and inf stay."""
    graph = parse_graph("graph @g" + ROWS["softmax"].replace("C", "49"))
    (run,) = compile_all([(graph, "rowwise")])
    x = inputs(graph)[0]
    x[..., ::3] -= 100.0
    x[..., 1::3] -= 85.0
    x[0, 1, 7], x[1, 2, 40], x[2, 3], x[3, 4, :] = float("nan"), float("-inf"), float("-inf"), 3e38
    x[4, 5, 48] = float("inf")
    check(graph, run, [x], factor=4.0)
    (found,) = run([x], None)
    assert not bool(((found > 0) & (found < torch.finfo(torch.float32).tiny)).any())


def test_symbolic_rows(compile_all) -> None:
    graph = parse_graph(
        "graph @g(%x: f32[B, S, S]) -> f32[B, S, S]\nwhere 1 <= B, 1 <= S {\n %0: f32[B, S, S] = softmax(%x) {axis = 2}\n return %0\n}"
    )
    (run,) = compile_all([(graph, "rowwise")])
    for b, s in ((1, 1), (2, 5), (3, 67), (1, 130)):
        check(graph, run, inputs(graph, B=b, S=s), {"B": b, "S": s}, factor=4.0)


def test_products(compile_all) -> None:
    forms = [f"(%x: {d}[{m}, {k}], %y: {d}[{k}, {n}]) -> {d}[{m}, {n}] {{\n %0: {d}[{m}, {n}] = matmul(%x, %y)\n return %0\n}}"
             for d in ("f32", "f64", "bf16", "f16") for m, k, n in ((1, 300, 100), (13, 17, 5), (64, 600, 48), (9, 1, 70))]  # fmt: skip
    forms.append("(%x: f32[2, 3, 9, 20], %y: f32[3, 33, 20], %b: f32[33]) -> f32[2, 3, 9, 33] {\n"
                 " %t: f32[3, 20, 33] = transpose(%y) {perm = [0, 2, 1]}\n %0: f32[2, 3, 9, 33] = matmul(%x, %t)\n"
                 " %1: f32[2, 3, 9, 33] = add(%0, %b)\n %2: f32[2, 3, 9, 33] = gelu(%1)\n return %2\n}")  # fmt: skip
    # the second factor transposed: few rows are dot products, many rows use copied panels; sizes that fill no tile
    forms += [
        f"(%x: {d}[2, {m}, {k}], %y: {d}[2, {n}, {k}]) -> {d}[2, {m}, {n}] {{\n"
        f" %t: {d}[2, {k}, {n}] = transpose(%y) {{perm = [0, 2, 1]}}\n %0: {d}[2, {m}, {n}] = matmul(%x, %t)\n return %0\n}}"
        for d, sizes in {
            "f32": ((1, 100, 70), (1, 64, 5), (3, 131, 49), (8, 64, 64), (9, 40, 33), (33, 21, 100), (70, 300, 7)),
            "f64": ((1, 90, 20), (30, 30, 30)),
            "bf16": ((1, 200, 40), (20, 64, 40)),
            "f16": ((5, 70, 3),),
        }.items()
        for m, k, n in sizes
    ]
    # functions without a vector form on either side
    forms += [
        f"(%x: f64[{m}, 40], %y: f64[30, 40]) -> f64[{m}, 30] {{\n %0: f64[{m}, 40] = {f}(%x)\n %1: f64[30, 40] = {g}(%y)\n"
        f" %2: f64[40, 30] = transpose(%1) {{perm = [1, 0]}}\n %3: f64[{m}, 30] = matmul(%0, %2)\n return %3\n}}"
        for m in (1, 20)
        for f, g in (("tanh", "relu"), ("relu", "tanh"))
    ]
    forms.append("(%x: f64[9, 40], %y: f64[40, 30]) -> f64[9, 30] {\n %0: f64[40, 30] = erf(%y)\n"
                 " %1: f64[9, 30] = matmul(%x, %0)\n return %1\n}")  # fmt: skip
    graphs = [parse_graph("graph @g" + t) for t in forms]
    for graph, run in zip(graphs, compile_all([(g, "matmul") for g in graphs]), strict=True):
        check(graph, run, inputs(graph), factor=4.0)


def test_two_products_that_meet(compile_all) -> None:
    """A gate, plain and transposed factors, sums of one block and of several, tiles that are cut off."""
    graphs = [
        parse_graph(f"""graph @g(%x: {d}[M, {k}], %a: {d}[{k}, {n}], %b: {d}[{n}, {k}]) -> {d}[M, {n}] where 1 <= M {{
          %t: {d}[{k}, {n}] = transpose(%b) {{perm = [1, 0]}}
          %0: {d}[M, {n}] = matmul(%x, %a)
          %1: {d}[M, {n}] = silu(%0)
          %2: {d}[M, {n}] = matmul(%x, %t)
          %3: {d}[M, {n}] = mul(%1, %2)
          return %3
        }}""")
        for d in ("f32", "bf16")
        for k, n in ((40, 96), (300, 50), (70, 5))
    ]
    for graph, run in zip(graphs, compile_all([(g, "matmul") for g in graphs]), strict=True):
        for m in (1, 9, 33):
            check(graph, run, inputs(graph, M=m), {"M": m}, factor=4.0)


def test_symbolic_product(compile_all) -> None:
    graph = parse_graph(
        "graph @g(%x: f32[M, 70], %y: f32[70, 50]) -> f32[M, 50]\nwhere 1 <= M {\n %0: f32[M, 50] = matmul(%x, %y)\n return %0\n}"
    )
    (run,) = compile_all([(graph, "matmul")])
    for m in (1, 7, 8, 65):
        check(graph, run, inputs(graph, M=m), {"M": m}, factor=4.0)


def test_symbolic_depth_and_columns(compile_all) -> None:
    graph = parse_graph(
        "graph @g(%x: f32[3, M, K], %y: f32[3, N, K]) -> f32[3, M, N]\nwhere 1 <= M, 1 <= N, 1 <= K {\n"
        " %t: f32[3, K, N] = transpose(%y) {perm = [0, 2, 1]}\n %0: f32[3, M, N] = matmul(%x, %t)\n return %0\n}"
    )
    (run,) = compile_all([(graph, "matmul")])
    for m, k, n in ((1, 1, 1), (5, 40, 100), (20, 16, 48), (9, 300, 17)):
        bindings = {"M": m, "K": k, "N": n}
        check(graph, run, inputs(graph, **bindings), bindings, factor=4.0)

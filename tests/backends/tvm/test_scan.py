"""Scans along any axis: every dtype, odd sizes, epilogues, symbolic sizes; f64 is the judge, eager's own error the yardstick."""

from __future__ import annotations

import pytest
import torch
from tvm_check import check

from graphopt.ir.opset.scan import ARG_SCANS
from graphopt.ir.text import parse_graph

SHAPES = ((7,), (3, 50), (37, 5), (5, 19, 33), (2, 3, 4, 40), (1, 1), (9, 1, 70))
DTYPES = {
    "cumsum": ("f32", "f64", "f16", "bf16", "i64", "i32", "i8", "u8"), "cumprod": ("f32", "f64", "bf16", "i64"),
    "cummax": ("f32", "f64", "bf16", "i32", "u8", "b1"), "cummin": ("f32", "f16", "i64"),
    "argcummax": ("f32", "bf16", "i64", "b1"), "argcummin": ("f32", "f64", "u8"), "logcumsumexp": ("f32", "f64", "bf16"),
}  # fmt: skip


def text(op: str, dtype: str, shape: tuple[int, ...], axis: int) -> str:
    sizes, out = ", ".join(map(str, shape)), "i64" if op in ARG_SCANS else dtype
    return f"graph @g(%x: {dtype}[{sizes}]) -> {out}[{sizes}] {{\n %0: {out}[{sizes}] = {op}(%x) {{axis = {axis}}}\n return %0\n}}"


def numbers(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 4, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("op", DTYPES)
def test_every_axis_and_dtype(compile_all, op: str) -> None:
    """Equal elements abound among the integers, so that places of extremes are seen to be the last ones."""
    cases = [(d, s, a) for d in DTYPES[op] for s in (SHAPES if d == "f32" else SHAPES[1:4]) for a in range(len(s))]
    graphs = [parse_graph(text(op, *case)) for case in cases]
    for seed, (graph, run) in enumerate(zip(graphs, compile_all([(g, "scan") for g in graphs]), strict=True)):
        (x,) = graph.inputs
        check(graph, run, [numbers(x.dtype.torch, tuple(map(int, x.shape)), seed)])


@pytest.mark.parametrize("op", ["cumsum", "cummax", "argcummax", "logcumsumexp"])
def test_values_that_are_not_finite(compile_all, op: str) -> None:
    graphs = [parse_graph(text(op, "f32", (4, 40), axis)) for axis in (0, 1)]
    x = numbers(torch.float32, (4, 40), 0)
    x[0, 5], x[1, 7], x[2, 0], x[3, 3] = float("nan"), float("inf"), float("-inf"), float("-inf")
    x[2, 9], x[0, 30] = float("inf"), float("nan")
    for graph, run in zip(graphs, compile_all([(g, "scan") for g in graphs]), strict=True):
        check(graph, run, [x])


def test_a_long_sum_keeps_its_precision(compile_all) -> None:
    graphs = [parse_graph(text("cumsum", "f32", shape, axis)) for shape, axis in (((200000,), 0), ((50000, 3), 0))]
    for graph, run in zip(graphs, compile_all([(g, "scan") for g in graphs]), strict=True):
        x = torch.rand(tuple(map(int, graph.inputs[0].shape))) + 1
        (got,) = run([x], None)
        true = x.double().cumsum(0)
        assert float(((got - true).abs() / true).max()) < 1.2e-7


def test_integers_wrap_around(compile_all) -> None:
    graph = parse_graph(text("cumsum", "i32", (3, 40), 1))
    (run,) = compile_all([(graph, "scan")])
    check(graph, run, [torch.full((3, 40), 2**30, dtype=torch.int32)])


def test_pointwise_work_before_and_after(compile_all) -> None:
    graph = parse_graph(
        "graph @g(%x: f32[6, 40], %w: f32[6, 40]) -> f32[6, 40] {\n %0: f32[6, 40] = exp(%x)\n %1: f32[6, 40] = cumsum(%0) {axis = 1}\n"
        " %2: f32[6, 40] = log(%1)\n %3: f32[6, 40] = mul(%2, %w)\n return %3\n}"
    )
    (run,) = compile_all([(graph, "scan")])
    check(graph, run, [numbers(torch.float32, (6, 40), 1), numbers(torch.float32, (6, 40), 2)], factor=4.0)


def test_symbolic_sizes(compile_all) -> None:
    graphs = [
        parse_graph(
            f"graph @g(%x: f32[B, N]) -> f32[B, N]\nwhere 1 <= B, 1 <= N {{\n %0: f32[B, N] = {op}(%x) {{axis = {axis}}}\n return %0\n}}"
        )
        for op in ("cumsum", "cummin")
        for axis in (0, 1)
    ]
    for graph, run in zip(graphs, compile_all([(g, "scan") for g in graphs]), strict=True):
        for b, n in ((1, 1), (3, 70), (8, 64), (19, 5), (40, 130)):
            check(graph, run, [numbers(torch.float32, (b, n), b)], {"B": b, "N": n})

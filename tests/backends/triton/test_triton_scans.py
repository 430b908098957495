"""Scans under Triton's interpreter: every op, axis and dtype, carried from block to block; compiled for every target."""

from __future__ import annotations

import pytest
import torch
from test_scan import DTYPES, numbers, text
from test_triton_offline import TARGETS, judge
from triton_check import runner

from graphopt.autotune.space import Schedule
from graphopt.ir.text import parse_graph
from graphopt.testing.kernels import check

BLOCKS = Schedule.make("scan", "blocks", rows=4, columns=16, warps=1)


@pytest.mark.parametrize("op", DTYPES)
def test_every_axis_and_dtype(op: str) -> None:
    """Three blocks and a part; equal elements abound among the integers, so that places of extremes are seen to be the last ones."""
    cases = [(d, s, a) for d in DTYPES[op] for s in ((5, 53), (2, 19, 3)) for a in range(len(s)) if d == "f32" or s[a] == 53]
    for seed, case in enumerate([*cases, ("f32", (1, 1), 0), ("f32", (7,), 0)]):
        graph = parse_graph(text(op, *case))
        (x,) = graph.inputs
        given = numbers(x.dtype.torch, tuple(map(int, x.shape)), seed)
        check(graph, runner(graph, "scan", BLOCKS), [given], factor=4.0, slack=32.0)


@pytest.mark.parametrize("op", ["cumsum", "cummax", "cummin", "argcummax", "argcummin", "logcumsumexp"])
def test_values_that_are_not_finite(op: str) -> None:
    x = numbers(torch.float32, (4, 40), 0)
    x[0, 5], x[1, 7], x[2, 0], x[3, 3] = float("nan"), float("inf"), float("-inf"), float("-inf")
    x[2, 9], x[0, 30] = float("inf"), float("nan")
    for axis in (0, 1):
        graph = parse_graph(text(op, "f32", (4, 40), axis))
        check(graph, runner(graph, "scan", BLOCKS), [x], factor=4.0, slack=32.0)


def test_the_error_of_a_sum_does_not_grow_with_its_blocks() -> None:
    graph = parse_graph(text("cumsum", "f32", (30000,), 0))
    x = torch.rand(30000, generator=torch.Generator().manual_seed(0)) + 1
    (got,) = runner(graph, "scan", Schedule.make("scan", "blocks", rows=1, columns=128, warps=1))([x], None)
    true = x.double().cumsum(0)
    assert float(((got - true).abs() / true).max()) < 2e-6


def test_integers_wrap_around() -> None:
    graph = parse_graph(text("cumsum", "i32", (3, 40), 1))
    check(graph, runner(graph, "scan", BLOCKS), [torch.full((3, 40), 2**30, dtype=torch.int32)])


def test_pointwise_work_before_and_after() -> None:
    graph = parse_graph(
        "graph @g(%x: f32[6, 40], %w: f32[40]) -> f32[6, 40] {\n %0: f32[6, 40] = exp(%x)\n %1: f32[6, 40] = cumsum(%0) {axis = 1}\n"
        " %2: f32[6, 40] = log(%1)\n %3: f32[6, 40] = mul(%2, %w)\n return %3\n}"
    )
    given = [numbers(torch.float32, (6, 40), 1), numbers(torch.float32, (40,), 2)]
    check(graph, runner(graph, "scan"), given, factor=4.0, slack=8.0)


@pytest.mark.parametrize("axis", [0, 1])
def test_symbolic_sizes(axis: int) -> None:
    where = "where 1 <= B, 1 <= N"
    graph = parse_graph(f"graph @g(%x: f32[B, N]) -> f32[B, N]\n{where} {{\n %0: f32[B, N] = cumsum(%x) {{axis = {axis}}}\n return %0\n}}")
    run = runner(graph, "scan", BLOCKS)
    for b, n in ((1, 1), (3, 70), (19, 5)):
        check(graph, run, [numbers(torch.float32, (b, n), b)], {"B": b, "N": n}, factor=4.0, slack=32.0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", DTYPES)
def test_machine_code(op: str, target: str) -> None:
    judge(parse_graph(text(op, "f32", (300, 5000), 1)), "scan", target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", DTYPES)
def test_machine_code_of_other_axes_and_types(op: str, target: str) -> None:
    """But of logarithms in f64 across rows, which take 8 bytes of the stack on sm_80 and sm_89."""
    for dtype in [d for d in DTYPES[op] if (op, d) != ("logcumsumexp", "f64")]:
        for axis in (1, 2):
            judge(parse_graph(text(op, dtype, (64, 500, 700), axis)), "scan", target)

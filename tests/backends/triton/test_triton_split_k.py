"""Products whose depth several programs share: right in every form, the same bits each time, and by default only where it is long."""

from __future__ import annotations

import pytest
import torch
from test_triton_kernels import PRODUCTS, judge
from triton_check import runner, templates

from graphopt.autotune.space import Schedule
from graphopt.ir.graph import Graph
from graphopt.ir.text import parse_graph
from graphopt.sampling import random_inputs
from graphopt.target import Target

DEEP = {
    "linear, f16": "(%x: f16[B, 333], %w: f16[70, 333], %b: f16[70]) -> f16[B, 70]\nwhere 1 <= B {\n"
    " %e: f16[B, 333] = tanh(%x)\n %t: f16[333, 70] = transpose(%w) {perm = [1, 0]}\n"
    " %0: f16[B, 70] = matmul(%e, %t)\n %1: f16[B, 70] = add(%0, %b)\n %2: f16[B, 70] = gelu(%1)\n return %2\n}",
    "residual, bf16": "(%x: bf16[2, 9, 200], %w: bf16[200, 33], %r: bf16[2, 9, 33]) -> bf16[2, 9, 33] {\n"
    " %0: bf16[2, 9, 33] = matmul(%x, %w)\n %1: bf16[2, 9, 33] = add(%0, %r)\n return %1\n}",
    "any depth": "(%x: f32[B, 13, H], %y: f32[B, H, 20]) -> f32[B, 13, 20]\nwhere 1 <= B, 1 <= H {\n"
    " %0: f32[B, 13, 20] = matmul(%x, %y)\n return %0\n}",
    "another layout": "(%x: f32[13, 100; 1, 13], %y: f32[100, 20]) -> f32[13, 20; 1, 13] {\n"
    " %0: f32[13, 20] = matmul(%x, %y)\n return %0\n}",
    "one number": "(%x: f32[1, 100], %y: f32[100, 1]) -> f32[1, 1] {\n %0: f32[1, 1] = matmul(%x, %y)\n return %0\n}",
}
CASES = {**PRODUCTS, **DEEP}
TILES = {"m": 16, "n": 16, "group": 4, "warps": 2, "stages": 2, "reads": "pointers", "stores": 0, "specialized": False}
LONG = "graph @g(%x: bf16[{m}, {k}], %w: bf16[{k}, {n}]) -> bf16[{m}, {n}]{where} {{\n %0: bf16[{m}, {n}] = matmul(%x, %w)\n return %0\n}}"


def divided(graph: Graph, pieces: int, name: str) -> Schedule:
    """A schedule of so many pieces; blocks of 16 or 32 of the depth, so that even a short one has several."""
    if name == "gemv":
        return Schedule.make("gemv", "lanes", n=16, k=32, warps=1, pieces=pieces)
    return Schedule.make("matmul", "tiled", **TILES, k=16 if graph.inputs[0].dtype.itemsize > 1 else 32, pieces=pieces)


@pytest.mark.parametrize("name", CASES)
def test_pieces_of_the_depth(name: str) -> None:
    graph = parse_graph("graph @g" + CASES[name])
    for template in templates(graph, "matmul")[1]:
        judge("matmul", CASES[name], divided(graph, 2 if template.name == "gemv" else 4, template.name))


def test_the_bits_are_the_same_each_time() -> None:
    graph = parse_graph("graph @g" + DEEP["residual, bf16"])
    run, inputs = runner(graph, "matmul", divided(graph, 8, "matmul")), random_inputs(graph, {}, 0)
    (first,), (second,) = run(inputs, None), run(inputs, None)
    assert torch.equal(first.view(torch.int16), second.view(torch.int16))


def test_an_empty_piece_is_not_in_the_space() -> None:
    graph = parse_graph("graph @g" + DEEP["residual, bf16"])
    w, (template, *_) = templates(graph, "matmul")
    space = template.space(w, Target.from_name("cuda:sm_90"))
    tried = Schedule.make("matmul", "tiled", **{**TILES, "group": 8}, k=128, pieces=4)
    assert "a piece would be empty" in str(space.rejection(tried))
    assert space.rejection(Schedule.make("matmul", "tiled", **{**TILES, "group": 8}, k=128, pieces=2)) is None


@pytest.mark.parametrize(("sizes", "pieces"), [
    ((256, 256, 16384), 8),  # 16 tiles of 64 x 64 for 132 processors
    ((64, 4096, 8192), 2),
    ((4096, 4096, 16384), 1),  # tiles for all of them
    ((256, 256, 1024), 1),  # too short
    (("B", 256, 16384), 1),  # any number of rows: taken for many
    ((256, 256, "B"), 1),  # a depth that is not known
    ((1, 16, 1 << 17), 32),  # one row
    ((1, 4096, 4096), 1),
])  # fmt: skip
def test_defaults(sizes: tuple[int | str, ...], pieces: int) -> None:
    m, n, k = sizes
    graph = parse_graph(LONG.format(m=m, n=n, k=k, where="" if "B" not in sizes else "\nwhere 1 <= B"))
    t = Target.from_name("cuda:sm_90")
    w, (template, *_) = templates(graph, "matmul", t)
    space = template.space(w, t)
    assert space.check(space.default())["pieces"] == pieces

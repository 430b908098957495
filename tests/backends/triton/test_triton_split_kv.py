"""Attention whose keys several programs share: every attribute of the op, the same bits each time, and by default where queries are few."""

from __future__ import annotations

import pytest
import torch
from attention_graphs import attention, inputs
from test_flash import CASES
from test_triton_offline import TARGETS, judge
from triton_check import runner, templates

from graphopt.autotune.space import Schedule
from graphopt.ir.graph import Graph
from graphopt.target import Target
from graphopt.testing.kernels import check

SIZES = ((1, 70), (33, 150))
DECODING = attention(1, 8192, 128, heads=8, shared=2, dtype="bf16", attrs=", causal = true, offset = 8191")


def divided(pieces: int) -> Schedule:
    """Blocks of 16 keys, so that even a few give each piece some."""
    return Schedule.make("attention", "flash", m=16, n=16, heads=1, warps=2, stages=1, pieces=pieces, reads="pointers")


@pytest.mark.parametrize("name", CASES)
def test_pieces_of_the_keys(name: str) -> None:
    """Four pieces, of which some see no key where a window or few keys leave none."""
    graph = CASES[name]
    run = runner(graph, "attention", divided(4))
    for sizes in [dict(zip("MN", s, strict=True)) for s in SIZES] if graph.symbols else [{}]:
        check(graph, run, inputs(graph, **sizes), sizes or None, factor=4.0)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(("m", "attrs"), [(1, ""), (3, ", causal = true, offset = 197"), (1, ", window = 20, offset = 90")])
def test_few_queries(dtype: str, m: int, attrs: str) -> None:
    graph = attention(m, 201, 24, heads=6, shared=2, attrs=attrs, dtype=dtype)
    check(graph, runner(graph, "attention", divided(8)), inputs(graph), factor=4.0)


def test_numbers_that_are_none() -> None:
    """A nan or an infinite score reaches its own row only, through any piece."""
    graph = CASES["odd"]
    q, k, v = inputs(graph)
    q[0, 0, 3, 2], q[0, 1, 66, 0], k[0, 1, 100, 5] = float("nan"), float("inf"), float("nan")
    check(graph, runner(graph, "attention", divided(4)), [q, k, v], factor=4.0)


def test_the_bits_are_the_same_each_time() -> None:
    graph = attention(2, 201, 24, heads=3, dtype="bf16")
    run, given = runner(graph, "attention", divided(8)), inputs(graph)
    (first,), (second,) = run(given, None), run(given, None)
    assert torch.equal(first.view(torch.int16), second.view(torch.int16))


@pytest.mark.parametrize(("graph", "pieces"), [
    (DECODING, 64),  # 2 programs for 132 processors
    (attention(1, "N", 128, heads=8, dtype="bf16", where=" where 1 <= N <= 8192"), 16),  # taken for as many as there may be
    (attention(1, 256, 64, heads=8, dtype="bf16"), 1),  # too few keys
    (attention(1, 8192, 128, heads=8, dtype="bf16", attrs=", window = 128, offset = 8191"), 1),  # too few are seen
    (attention(4096, 4096, 64, heads=8, dtype="bf16"), 1),  # programs enough
])  # fmt: skip
def test_defaults(graph: Graph, pieces: int) -> None:
    t = Target.from_name("cuda:sm_90")
    w, (template, *_) = templates(graph, "attention", t)
    space = template.space(w, t)
    assert space.check(space.default())["pieces"] == pieces


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("graph", [DECODING, attention(128, 8192, 128, heads=1, dtype="f16")], ids=["one query", "one head"])
def test_machine_code(graph: Graph, target: str) -> None:
    judge(graph, "attention", target, ("mma",))  # sixteen rows are too few for wgmma and tcgen05

"""Convolutions and pooling under Triton's interpreter, and convolutions compiled for every target."""

from __future__ import annotations

import re

import pytest
from test_conv import CASES as CONVOLUTIONS
from test_conv import conv
from test_pool import CASES as POOLS
from test_pool import kind_of
from test_triton_kernels import draws
from test_triton_offline import TARGETS, judge
from triton_check import SM_90, runner

from graphopt.autotune.space import Workload
from graphopt.backends.triton.backend import TritonBackend
from graphopt.ir import types
from graphopt.ir.graph import Graph
from graphopt.testing.kernels import check, sizes, values

LONG_POOL = re.compile("any size|large|volume")
LONG = ("image of any size", "depthwise 7x7", "depthwise of any size", "depthwise strided, any size", "depthwise, padded, of any size")
IN_POOLS = {name: g for name, g in POOLS.items() if "argmax" not in kind_of(g) and not (g.symbols and "adaptive" in name)}


def against_f64(graph: Graph, kind: str, nan: bool = False) -> None:
    run = runner(graph, kind)
    for bindings in sizes(graph):
        check(graph, run, values(graph, nan=nan, **bindings), bindings, factor=4.0, slack=2)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in CONVOLUTIONS])
def test_convolutions(name: str) -> None:
    against_f64(CONVOLUTIONS[name], "conv")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if LONG_POOL.search(n) else n for n in IN_POOLS])
def test_pools(name: str) -> None:
    against_f64(IN_POOLS[name], kind_of(IN_POOLS[name]))
    against_f64(IN_POOLS[name], kind_of(IN_POOLS[name]), nan=True)


@pytest.mark.parametrize("name", ["3x3", "depthwise, small image", "grouped"])
def test_sampled_schedules(name: str) -> None:
    graph = CONVOLUTIONS[name]
    for s in draws(graph, "conv", 2):
        check(graph, runner(graph, "conv", s), values(graph), None, factor=4.0, slack=2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("argmax", "there is no family of kernels for argmax_pool regions"),
        ("adaptive avg of any size", "adaptive windows of unknown size"),
    ],
)
def test_what_has_no_template_says_so(name: str, reason: str) -> None:
    w = Workload.of(POOLS[name], kind_of(POOLS[name]))
    assert not TritonBackend().templates(w, SM_90)
    assert TritonBackend().reason(w, SM_90) == reason


LARGE = {
    "3x3": conv((8, 56, 56, 64), (3, 3, 64, 64), padding=1, dtype=types.f16, epilogue=True),
    "1x1": conv((8, 28, 28, 256), (1, 1, 256, 512), dtype=types.bf16),
    "first layer": conv((8, 224, 224, 3), (7, 7, 3, 64), stride=2, padding=3, dtype=types.f16),
    "f32": conv((8, 28, 28, 128), (3, 3, 128, 128), padding=1),
    "grouped": conv((8, 28, 28, 256), (3, 3, 64, 256), padding=1, groups=4, dtype=types.f16),
}


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(target: str) -> None:
    judge(LARGE["3x3"], "conv", target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LARGE)
def test_all_machine_code(name: str, target: str) -> None:
    judge(LARGE[name], "conv", target)

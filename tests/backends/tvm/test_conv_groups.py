"""Convolutions in narrow groups: vectors that hold the channels of several groups, at every edge, and groups that just fill one."""

from __future__ import annotations

import pytest
import torch
from test_conv import conv, template_of
from tvm_check import B, H, check, sizes, values

import graphopt
from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir import Graph, types
from graphopt.target import Target, detect

NAME = "conv-groups"
CASES: dict[str, Graph] = {
    "groups of four": conv((2, 9, 21, 32), (3, 3, 4, 32), padding=1, groups=8, epilogue=True, residual=True),
    "groups of eight": conv((1, 5, 14, 24), (3, 3, 8, 24), padding=1, groups=3, epilogue=True),  # the last vector overlaps another
    "groups of sixteen": conv((1, 5, 14, 48), (3, 3, 16, 48), stride=2, padding=1, groups=3),
    "groups of two, strided and dilated": conv((1, 11, 23, 16), (3, 3, 2, 16), stride=2, padding=2, dilation=2, groups=8),
    "groups of four, wide kernel": conv((1, 3, 60, 16), (1, 20, 4, 16), groups=4),
    "groups of four, line": conv((2, 40, 20), (5, 4, 20), padding=3, groups=5),
    "groups of four, volume": conv((1, 4, 5, 9, 16), (3, 3, 3, 4, 16), padding=1, groups=4),
    "groups of four, any size": conv((B, H, H, 20), (3, 3, 4, 20), stride=2, padding=1, groups=5, epilogue=True),
    "groups of four, channels first": conv((1, 9, 10, 16), (3, 3, 4, 16), padding=1, groups=4, seen=(0, 2, 3, 1)),
    "groups of four, padded": conv((1, 14, 13, 20), (3, 3, 4, 20), stride=2, pad=(0, 1), groups=5),
    "groups of four, f64": conv((1, 8, 13, 24), (3, 3, 4, 24), padding=1, groups=6, dtype=types.f64),
    "groups of four, f16": conv((1, 8, 13, 24), (3, 3, 4, 24), padding=1, groups=6, dtype=types.f16, acc=types.f32),
    "four filters of two channels": conv((1, 8, 13, 16), (3, 3, 2, 32), padding=1, groups=8),
    "eight filters of a channel": conv((1, 8, 13, 6), (3, 3, 1, 48), padding=1, groups=6),
}  # fmt: skip


def test_convolutions(compile_all) -> None:
    for graph, run in zip(CASES.values(), compile_all([(g, "conv") for g in CASES.values()]), strict=True):
        for bindings in sizes(graph):
            check(graph, run, values(graph, **bindings), bindings)


@pytest.mark.parametrize("name", ["groups of four", "groups of eight", "groups of four, any size"])
def test_every_schedule_is_right(name: str, compile_points) -> None:
    graph, target = CASES[name], detect()
    w = Workload.of(graph, "conv")
    template = next((t for t in TvmBackend().templates(w, target) if t.name == NAME), None)
    if template is None:
        pytest.skip(f"vectors of {target.lanes(4)} floats do not hold these groups")
    points = []
    for space in template.spaces(w, target):
        default = dict(space.default().knobs)
        turned = [{**default, p.name: c} for p in space.params for c in p.choices]
        names = [c.holds for c in space.constraints]
        points += [Schedule.make(NAME, sketch, **k) for sketch in space.sketches for k in turned if all(holds(k) for holds in names)]
    assert len(points) > 8
    for run in compile_points([(graph, w, s) for s in points]):
        for bindings in sizes(graph):
            check(graph, run, values(graph, **bindings), bindings)


WIDE, HALF = Target("cpu", "x86_64", features=("avx512f", "fma")), Target("cpu", "x86_64", features=("avx2", "fma"))


@pytest.mark.parametrize(
    ("channels", "groups", "inner", "wide", "half"),
    [
        (32, 8, 4, True, True),
        (32, 4, 8, True, True),
        (32, 2, 16, True, False),  # wider than a vector of AVX2
        (36, 6, 6, False, False),  # lanes are not divided by six
        (8, 4, 2, False, True),  # too few channels for a vector of AVX-512
        (64, 2, 32, False, False),
        (16, 1, 16, False, False),
        (32, 32, 1, False, False),  # depthwise
    ],
)
def test_which_convolutions(channels: int, groups: int, inner: int, wide: bool, half: bool) -> None:
    graph = conv((1, 8, 8, channels), (3, 3, inner, channels), padding=1, groups=groups)
    for target, wanted in ((WIDE, wide), (HALF, half)):
        assert (template_of(graph, target) == NAME) is wanted
    assert not Target("cuda", "sm_90").conv_by_groups(groups, inner, channels // groups)


def test_a_packed_weight_is_for_another_template() -> None:
    graph = conv((1, 8, 8, 32), (3, 3, 4, 32), padding=1, groups=8, nr=16)
    assert template_of(graph, WIDE) == "conv"


def test_a_module_keeps_its_weight_as_it_is() -> None:
    """The weight moves out of the region with its channels last, and is not put into panels; the kernel is right in a chain."""
    torch.manual_seed(0)
    m = torch.nn.Sequential(
        torch.nn.Conv2d(8, 32, 1), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3, 2, 1, groups=8), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3, padding=1, groups=8), torch.nn.Conv2d(64, 8, 1),
    ).eval()  # fmt: skip
    x = torch.randn(2, 8, 15, 13)
    with torch.no_grad():
        compiled = graphopt.compile(m, (x,))
        got, want, exact = compiled(x), m(x), m.double()(x.double())
    assert (got - exact).abs().max() <= 4 * (want - exact).abs().max()
    used = [k.schedule for k in compiled.report.kernels]
    assert sum(NAME in s for s in used) == sum(detect().conv_by_groups(8, 4, filters) for filters in (4, 8)), used

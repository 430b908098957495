"""Convolutions of few filters, with vectors along the channels: every window, edges of the image, rests of lines and of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_conv import conv, template_of
from tvm_check import B, H, check, sizes, values

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.forms.convform import ConvForm, conv_of
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir import Builder, Graph, TensorType, dims, types
from graphopt.ir.interpreter import evaluate
from graphopt.target import Target, detect

NAME = "conv-channels"


def by_filter(x: Sequence[Any], filters: int, kernel: Sequence[int], stride: int = 1, padding: int = 0, dilation: int = 1,
              dtype: types.DType = types.f32) -> Graph:  # fmt: skip
    """A region whose weight lies filter by filter, as pack-filters leaves it, with a bias, an activation and a residual."""
    g = Graph("body")
    b, n = Builder(g), len(kernel)
    for s in x:
        if not isinstance(s, int):
            g.symbols[s.name] = dims.Range(1, None)
    image = g.add_input(TensorType(dtype, tuple(x)), "x")
    w = b.transpose(g.add_input(TensorType(dtype, (filters, *kernel, x[-1])), "w"), perm=(*range(1, n + 2), 0))
    y = b.conv(image, w, stride=(stride,) * n, padding=(padding,) * n, dilation=(dilation,) * n, channels_last=True)
    y = b.gelu(b.add(y, g.add_input(TensorType(dtype, (filters,)), "b")))
    g.set_outputs([b.add(y, g.add_input(y.type, "r"))])
    return g


CASES: dict[str, Graph] = {
    "3x3": conv((2, 9, 11, 32), (3, 3, 32, 3), padding=1, epilogue=True),
    "3x3 by filter": by_filter((2, 13, 14, 64), 3, (3, 3), padding=1),
    "1x1": conv((1, 7, 7, 128), (1, 1, 128, 1), epilogue=True, residual=True),
    "1x1 by filter": by_filter((3, 6, 9, 48), 2, (1, 1)),
    "1x1 with zeros around": conv((1, 5, 6, 16), (1, 1, 16, 3), padding=1),
    "9x9": conv((1, 17, 19, 16), (9, 9, 16, 3), padding=4),
    "9x9 of a small image": conv((2, 4, 5, 16), (9, 9, 16, 2), padding=4, epilogue=True),
    "no zeros": conv((1, 12, 12, 32), (3, 3, 32, 4)),
    "strided": conv((2, 15, 14, 32), (3, 3, 32, 3), stride=2, padding=1, residual=True),
    "stride 3": conv((1, 20, 23, 16), (2, 5, 16, 3), stride=3, padding=2),
    "dilated": conv((1, 13, 15, 16), (3, 3, 16, 3), padding=2, dilation=2),
    "strided, dilated": by_filter((2, 16, 15, 16), 4, (3, 2), stride=3, padding=3, dilation=3),
    "more zeros than taps": conv((1, 6, 5, 32), (3, 3, 32, 3), padding=5, epilogue=True),
    "zeros on one side": conv((2, 9, 8, 32), (3, 3, 32, 3), stride=2, pad=(0, 1)),
    "padded twice": conv((1, 9, 8, 32), (3, 3, 32, 3), padding=1, pad=(1, 2), epilogue=True),
    "padded by ones": conv((1, 9, 8, 32), (3, 3, 32, 3), pad=(1, 1), fill=1.0),
    "channels first": conv((2, 9, 11, 32), (3, 3, 32, 3), padding=1, epilogue=True, seen=(0, 2, 3, 1)),
    "channels first, squares of pixels and channels": conv((2, 9, 37, 40), (3, 3, 40, 3), padding=1, seen=(0, 2, 3, 1)),
    "channels first, f64": conv((1, 5, 21, 19), (3, 3, 19, 3), padding=1, dtype=types.f64, seen=(0, 2, 3, 1)),
    "channels first, a volume": conv((1, 3, 4, 17, 33), (1, 3, 3, 33, 2), padding=1, seen=(0, 2, 3, 4, 1)),
    "half a vector left": conv((1, 9, 9, 24), (3, 3, 24, 3), padding=1),
    "channels left": conv((1, 9, 10, 21), (3, 3, 21, 3), padding=1, residual=True),
    "channels left, dilated": by_filter((1, 9, 12, 37), 2, (3, 3), padding=2, dilation=2),
    "a line": conv((2, 700, 16), (5, 16, 3), stride=2, padding=2),
    "a long line": by_filter((1, 1500, 32), 1, (7,), padding=3),
    "a volume": conv((1, 5, 6, 7, 16), (3, 3, 3, 16, 2), padding=1, residual=True),
    "f64": conv((1, 7, 7, 20), (3, 3, 20, 3), padding=1, dtype=types.f64, epilogue=True),
    "f64 by filter": by_filter((1, 9, 8, 16), 3, (3, 3), padding=1, dtype=types.f64),
    "bf16": conv((1, 7, 7, 24), (3, 3, 24, 3), padding=1, dtype=types.bf16),
    "f16": conv((1, 7, 9, 32), (3, 3, 32, 3), padding=1, dtype=types.f16),
    "f16 summed in f32": conv((B, 6, 7, 16), (3, 3, 16, 3), padding=1, dtype=types.f16, acc=types.f32),
    "batch of any size": by_filter((B, 9, 10, 32), 3, (3, 3), padding=1),
    "image of any size": by_filter((B, H, H, 32), 3, (3, 3), padding=1),
    "image of any size, strided": conv((B, H, H, 16), (3, 3, 16, 3), stride=2, padding=1, residual=True),
    "image of any size, wide window": by_filter((1, H, H, 16), 2, (7, 7), padding=3),
    "image of any size, channels first": conv((B, H, H, 16), (3, 3, 16, 3), padding=1, seen=(0, 2, 3, 1)),
    "one image of any size, channels first": conv((1, H, H, 35), (3, 3, 35, 3), stride=2, padding=1, seen=(0, 2, 3, 1)),
    "image of any size, channels left": by_filter((B, H, H, 19), 2, (3, 3), padding=2, dilation=2),
    "any size in place": conv((B, H, H, 16), (1, 1, 16, 1), epilogue=True),
}  # fmt: skip


def test_convolutions(compile_all) -> None:
    assert {template_of(g) for g in CASES.values()} == {NAME}
    for graph, run in zip(CASES.values(), compile_all([(g, "conv") for g in CASES.values()]), strict=True):
        for bindings in sizes(graph):
            check(graph, run, values(graph, **bindings), bindings)


@pytest.mark.parametrize("name", ["3x3 by filter", "channels left", "image of any size"])
def test_every_schedule_is_right(name: str, compile_points) -> None:
    graph, target = CASES[name], detect()
    w = Workload.of(graph, "conv")
    space = next(t for t in TvmBackend().templates(w, target) if t.name == NAME).space(w, target)
    default = dict(space.default().knobs)
    points = [Schedule.make(NAME, "default", **{**default, p.name: c}) for p in space.params for c in p.choices[1:]]
    points.append(Schedule.make(NAME, "default", **{**default, "pixels": 5}))  # lines in pieces that are all edge, or nearly
    assert len(points) > 8
    for run in compile_points([(graph, w, s) for s in points]):
        for bindings in sizes(graph):
            check(graph, run, values(graph, **bindings), bindings)


def test_other_templates_stay_candidates(compile_all) -> None:
    """The one with vectors along the filters reads a weight that lies filter by filter, too."""
    graph = CASES["3x3 by filter"]
    names = [t.name for t in TvmBackend().templates(Workload.of(graph, "conv"), detect())]
    assert names[:1] == [NAME] and "conv" in names
    (run,) = compile_all([(graph, "conv")], template=names.index("conv"))
    check(graph, run, values(graph))


def test_what_is_outside_of_the_image_is_not_read(compile_points) -> None:
    """A nan, or an infinity, is seen by the pixels that read it and by no others."""
    graph = conv((2, 13, 14, 64), (3, 3, 64, 3), padding=1)
    inputs = values(graph)
    inputs[0][0, 0, 13, 63], inputs[0][1, 0, 0, 0], inputs[0][1, 12, 13, 5] = float("nan"), float("inf"), float("nan")
    w = Workload.of(graph, "conv")
    space = TvmBackend().templates(w, detect())[0].space(w, detect())
    (run,) = compile_points([(graph, w, space.default())])
    (got,), (want,) = run(inputs, None), evaluate(graph, inputs, wide=True)
    assert torch.equal(got.isnan(), want.isnan()) and 0 < got.isnan().sum() < 60
    check(graph, run, inputs)


def test_the_weight_is_seen() -> None:
    seen, plain = conv_of(CASES["3x3 by filter"]), conv_of(CASES["3x3"])
    assert isinstance(seen, ConvForm) and seen.by_filter is seen.node.operands[1].producer.operands[0]  # type: ignore[union-attr]
    assert isinstance(plain, ConvForm) and plain.by_filter is None


def test_other_convolutions_keep_vectors_along_the_filters() -> None:
    assert template_of(conv((1, 12, 12, 64), (3, 3, 64, 32))) != NAME  # many filters
    assert template_of(conv((1, 12, 12, 8), (3, 3, 8, 3)), Target.from_name("cpu:x86-64-v4")) == "conv"  # few channels
    assert template_of(conv((1, 12, 12, 64), (3, 3, 32, 4), groups=2)) == "conv"  # groups
    assert template_of(conv((1, 12, 12, 64), (3, 3, 64, 3), nr=4)) == "conv"  # packed for something else


@pytest.mark.parametrize("target", ["x86-64-v4", "x86-64-v3", "neoverse-n1"])
def test_tiles_fit_the_registers(target: str) -> None:
    t = Target.from_name(f"cpu:{target}")
    for filters in (1, 2, 3):
        graph = conv((1, 56, 56, 64), (3, 3, 64, filters))
        w = Workload.of(graph, "conv")
        template = next(x for x in TvmBackend().templates(w, t) if x.name == NAME)
        rows = next(p for p in template.space(w, t).params if p.name == "rows").choices
        assert all(int(r) * filters + filters + 1 <= t.vector_registers for r in rows) and max(rows) > 1

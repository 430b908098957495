"""A convolution and the depthwise one behind it in one kernel: error against f64, strips and bands that divide nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tvm_check import check, values

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.forms.convpair import KIND, ConvPair, pair_of, strips
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir import Builder, Graph, TensorType, types
from graphopt.passes.layout.pack_filters import pack, unpack
from graphopt.target import Target, detect


def pair(x: Sequence[int], w: Sequence[int], nr: int = 16, stride: int = 1, padding: int = 0, second: Sequence[int] = (3, 3), step: int = 1,
         around: int = 1, pad: tuple[int, int] = (0, 0), dilation: int = 1, seen: Sequence[int] = (),
         end: str = "minimum") -> Graph:  # fmt: skip
    """A region with a convolution of ``w`` and a depthwise one of the window ``second``, pointwise work behind each.

    Args:
        seen: x is a transposed input.
        step, around, pad, dilation: strides, padding, a pad node's sides and dilation of the second convolution.
        end: the last op behind both.
    """
    g = Graph("body")
    b, filters = Builder(g), w[-1]
    shape = list(x)
    for i, p in enumerate(seen):
        shape[p] = x[i]
    image = g.add_input(TensorType(types.f32, tuple(shape)), "x")
    if seen:
        image = b.transpose(image, perm=tuple(seen))
    sample = Graph("sample")
    packed = pack(Builder(sample), sample.add_input(TensorType(types.f32, tuple(w))), 1, nr)
    weight = unpack(b, g.add_input(packed.type.logical, "w"), 1, tuple(w))
    y = b.conv(image, weight, stride=(stride,) * 2, padding=(padding,) * 2, dilation=(1, 1), groups=1, channels_last=True)
    y = b.create(end, [b.add(y, g.add_input(TensorType(types.f32, (filters,)), "b")), b.constant(0.5, types.f32)], {})
    if any(pad):
        y = b.pad(y, low=(0, pad[0], pad[0], 0), high=(0, pad[1], pad[1], 0), value=0.0)
    v = g.add_input(TensorType(types.f32, (*second, 1, filters)), "v")
    y = b.conv(y, v, stride=(step,) * 2, padding=(around,) * 2, dilation=(dilation,) * 2, groups=filters, channels_last=True)
    g.set_outputs([b.create(end, [b.add(y, g.add_input(y.type, "r")), b.constant(0.5, types.f32)], {})])
    return g


CASES: dict[str, Graph] = {
    "expansion": pair((2, 13, 15, 8), (1, 1, 8, 48)),
    "strided": pair((1, 14, 17, 8), (1, 1, 8, 48), nr=48, step=2, around=0, pad=(0, 1)),
    "wide": pair((1, 5, 131, 4), (1, 1, 4, 64), nr=64, step=2),
    "padded twice": pair((1, 9, 8, 5), (1, 1, 5, 32), nr=32, pad=(1, 0), second=(5, 5)),
    "photograph": pair((1, 37, 41, 3), (3, 3, 3, 32), nr=32, stride=2, padding=1, seen=(0, 2, 3, 1)),
    "photographs, channels last": pair((2, 16, 15, 3), (7, 7, 3, 16), stride=2, padding=3),
    "3x3 in place": pair((1, 12, 11, 6), (3, 3, 6, 16), second=(3, 3), around=0),
    "tall window": pair((1, 11, 12, 4), (1, 1, 4, 16), second=(5, 1), around=0, step=3),
    "dilated": pair((1, 13, 14, 4), (1, 1, 4, 16), dilation=2, around=2),
    "one pixel": pair((3, 1, 1, 20), (1, 1, 20, 32)),
    "no vectors": pair((1, 6, 7, 4), (1, 1, 4, 16), end="atan2"),
}  # fmt: skip


def test_pairs(compile_all) -> None:
    for graph, run in zip(CASES.values(), compile_all([(g, KIND) for g in CASES.values()]), strict=True):
        check(graph, run, values(graph))


def test_every_schedule_is_right(builder, kernels_dir) -> None:
    from graphopt.backends.tvm.build import load_kernel

    graph = pair((2, 21, 47, 12), (1, 1, 12, 64), nr=32, step=2)
    w, target = Workload.of(graph, KIND), detect()
    (template,) = TvmBackend().templates(w, target)
    space = template.space(w, target)
    default = dict(space.default().knobs)
    schedules = [Schedule.make("conv-pair", **{**default, p.name: c}) for p in space.params for c in p.choices[1:4]]
    for schedule, path in zip(schedules, builder.build_many([(w, s) for s in schedules], target, kernels_dir), strict=True):
        kernel = load_kernel(path, w, schedule)

        def run(inputs: Sequence[torch.Tensor], bindings: dict[str, int] | None = None, kernel: Any = kernel) -> list[torch.Tensor]:
            out = torch.full(graph.outputs[0].shape, 77.0)
            kernel(*inputs, out)
            return [out]

        check(graph, run, values(graph))


def test_the_ring_stays_in_the_nearest_cache() -> None:
    form = pair_of(pair((1, 112, 112, 16), (1, 1, 16, 96), nr=48, step=2, around=0, pad=(0, 1)))
    assert isinstance(form, ConvPair)
    for size in (32 << 10, 48 << 10):
        strip = strips(form, 48, Target("cpu", "x86_64", cache=(size, 1 << 20, 0)))[0]
        ring = 4 * 48 * 3 * form.columns_of(strip)
        assert ring <= size // 2 and strip * 2 > size // 2 // (4 * 48 * 3) - 24, (size, strip)


@pytest.mark.parametrize(
    ("reason", "graph"),
    [
        ("whole panels", pair((1, 8, 8, 8), (1, 1, 8, 24))),
        ("would be copied", pair((1, 8, 8, 8), (3, 3, 8, 16), padding=1)),
        ("beside the image", pair((1, 8, 8, 8), (1, 1, 8, 16), around=3)),
    ],
)
def test_what_is_refused(reason: str, graph: Graph) -> None:
    w = Workload.of(graph, KIND)
    assert not TvmBackend().templates(w, detect()) and reason in TvmBackend().reason(w, detect())

"""Convolutions of f32 from thirds in bf16, on AMX tiles: as exact as f32, for every window, and where their images lie for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from tvm_check import check, values

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.forms.convform import ConvForm, conv_of
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.backends.tvm.convthirdform import planes_of
from graphopt.ir import Builder, Graph, TensorType, Value, types
from graphopt.ir.interpreter import evaluate
from graphopt.passes.layout.pack_filters import pack, unpack
from graphopt.target import Target, detect

SAPPHIRE = Target.from_name("cpu:sapphirerapids:2")


def conv(x: Sequence[int], filters: int, kernel: Sequence[int] = (1, 1), *, stride: int = 1, padding: int | None = None, dilation: int = 1,
         epilogue: bool = False, seen: Sequence[int] = (), around: tuple[int, int] = (0, 0), nr: int = 32) -> Graph:  # fmt: skip
    """A region with one channels-last convolution of a packed weight. ``seen``: x is a transposed input; ``around``: zeros around it."""
    g = Graph("body")
    b = Builder(g)
    if seen:
        source = [0] * len(x)
        for i, p in enumerate(seen):
            source[p] = x[i]
        image: Value = b.transpose(g.add_input(TensorType(types.f32, tuple(source)), "x"), perm=tuple(seen))
    else:
        image = g.add_input(TensorType(types.f32, tuple(x)), "x")
    if any(around):
        sides = [(0, *[n] * len(kernel), 0) for n in around]
        image = b.pad(image, low=sides[0], high=sides[1], value=0.0)
    shape, sample = (*kernel, x[-1], filters), Graph("sample")
    packed = pack(Builder(sample), sample.add_input(TensorType(types.f32, shape)), 1, nr)
    w = unpack(b, g.add_input(packed.type.logical, "w"), 1, shape)
    pads = tuple(k // 2 for k in kernel) if padding is None else (padding,) * len(kernel)
    rank = len(kernel)
    y = b.conv(image, w, stride=(stride,) * rank, padding=pads, dilation=(dilation,) * rank, channels_last=True)
    if epilogue:
        y = b.add(y, g.add_input(TensorType(types.f32, (filters,)), "b"))
        y = b.relu(b.add(y, g.add_input(y.type, "r")))
    g.set_outputs([y])
    return g


CASES = {
    "1x1": conv((1, 12, 13, 64), 96, epilogue=True),
    "1x1, strided": conv((1, 25, 24, 96), 128, stride=2, epilogue=True),
    "1x1 with zeros around": conv((1, 12, 12, 32), 96, padding=1),
    "long sums": conv((1, 12, 12, 1024), 96),
    "3x3": conv((1, 14, 13, 64), 64, (3, 3), epilogue=True),
    "3x3, several images": conv((3, 7, 8, 32), 32, (3, 3), epilogue=True),
    "3x3, strided": conv((2, 15, 14, 32), 64, (3, 3), stride=2, epilogue=True),
    "3x3, stride 3": conv((1, 20, 23, 32), 32, (3, 3), stride=3, padding=0),
    "3x3, dilated": conv((1, 11, 12, 32), 32, (3, 3), dilation=2, padding=2),
    "more zeros than taps": conv((1, 6, 5, 32), 32, (3, 3), padding=3, epilogue=True),
    "no zeros": conv((1, 12, 12, 32), 32, (3, 3), padding=0),
    "a padded image": conv((1, 9, 9, 32), 32, (3, 3), padding=0, around=(0, 3)),
    "patches": conv((1, 28, 28, 48), 96, (2, 2), stride=2, padding=0),
    "a wide window": conv((1, 16, 16, 16), 32, (5, 7), epilogue=True),
    "channels that fill no step": conv((1, 13, 11, 24), 104, epilogue=True),
    "filters that fill no vector": conv((1, 12, 12, 40), 24, (3, 3), epilogue=True),
    "one axis": conv((2, 150, 32), 64, (3,), epilogue=True),
    "three axes": conv((1, 5, 6, 7, 16), 32, (3, 3, 3), epilogue=True),
    "channels first": conv((1, 12, 11, 32), 96, seen=(0, 2, 3, 1), epilogue=True),
    "many pixels": conv((1, 40, 40, 32), 96, epilogue=True),
}  # fmt: skip


def form_of(graph: Graph) -> ConvForm:
    form = conv_of(graph)
    assert isinstance(form, ConvForm)
    return form


@pytest.mark.parametrize("name", CASES)
def test_planes_hold_what_every_tap_reads(name: str) -> None:
    """The convolution, computed place by place from the planes of one channel."""
    form = form_of(CASES[name])
    planes, rank = planes_of(form), len(form.kernel)
    images, length = int(form.x.shape[0]), prod(planes.pitch)
    x = torch.arange(1.0, 1 + images * prod(planes.size), dtype=torch.float64).reshape(images, *planes.size)
    flat = torch.zeros(len(planes.phases), planes.flats + planes.reach, dtype=torch.float64)
    for place in range(flat.shape[1]):
        n, *at = (int(i) for i in torch.unravel_index(torch.tensor(place), (images + 2, *planes.pitch)))
        for k, phase in enumerate(planes.phases):
            source = [i * s + r - p for i, s, r, p in zip(at, planes.stride, phase, planes.low, strict=True)]
            if n < images and all(0 <= i < m for i, m in zip(source, planes.size, strict=True)):
                flat[k, place] = x[(n, *source)]
    weight = torch.arange(1.0, 1 + prod(form.kernel), dtype=torch.float64)
    sums = sum(w * flat[k, d : d + planes.flats] for w, (k, d) in zip(weight, planes.moves, strict=True))
    got = torch.zeros(images * length, dtype=torch.float64)
    got[: planes.flats] = sums
    inside = tuple(slice(n) for n in planes.out)
    padded = torch.nn.functional.pad(x, [n for p, q in zip(form.low[::-1], form.high[::-1], strict=True) for n in (p, q)])
    want = torch.zeros(images, *planes.out, dtype=torch.float64)
    for tap, w in zip(product(*(range(k) for k in form.kernel)), weight, strict=True):
        windows = (slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, form.dilation, planes.out, form.stride, strict=True))
        want += w * padded[(slice(None), *windows)]
    assert rank == len(planes.out) and torch.equal(got.reshape(images, *planes.pitch)[(slice(None), *inside)], want)


@pytest.fixture(scope="module")
def target() -> Target:
    t = detect()
    if not t.f32_thirds:
        pytest.skip("this processor has no AMX")
    return t


def schedules(w: Workload, t: Target, others: bool = True) -> list[Schedule]:
    """The default, and one other choice of each knob."""
    template = TvmBackend().templates(w, t)[0]
    assert template.name == "conv-thirds"
    space = template.space(w, t)
    first = space.default()
    out = [first]
    for p in space.params if others else ():
        found = (Schedule.make("conv-thirds", "default", **{**dict(first.knobs), p.name: c}) for c in p.choices[1:])
        out += [s for s in found if space.rejection(s) is None][:1]
    return out


def runner(graph: Graph, kernel: Any) -> Callable[..., list[torch.Tensor]]:
    def run(inputs: Sequence[torch.Tensor], bindings: dict[str, int] | None = None) -> list[torch.Tensor]:
        out = torch.full([int(d) for d in graph.outputs[0].shape], 77.0)
        kernel(*inputs, out)
        return [out]

    return run


def test_convolutions(builder, kernels_dir, target: Target) -> None:
    from graphopt.backends.tvm.build import load_kernel

    thorough = ("3x3, strided",)
    jobs = [(g, w, s) for name, g in CASES.items() for w in (Workload.of(g, "conv"),) for s in schedules(w, target, name in thorough)]
    paths = builder.build_many([(w, s) for _, w, s in jobs], target, kernels_dir)
    for (graph, w, s), path in zip(jobs, paths, strict=True):
        check(graph, runner(graph, load_kernel(path, w, s)), values(graph))


def test_the_error_is_no_larger_than_eagers(builder, kernels_dir, target: Target) -> None:
    from graphopt.backends.tvm.build import load_kernel

    graph = conv((1, 14, 14, 256), 64, (3, 3))
    w = Workload.of(graph, "conv")
    (s,) = schedules(w, target, others=False)
    inputs = values(graph)
    (got,) = runner(graph, load_kernel(builder.build_many([(w, s)], target, kernels_dir)[0], w, s))(inputs)
    (want,), (eager,) = (evaluate(graph, inputs, wide=wide) for wide in (True, False))
    assert (got.double() - want).norm() <= (eager.double() - want).norm()


def test_infinite_and_undefined_values(builder, kernels_dir, target: Target) -> None:
    """An infinity, or a nan, is seen where its pixel is read, as f32 has it; zeros around the image are not multiplied."""
    from graphopt.backends.tvm.build import load_kernel

    graph = conv((1, 12, 12, 32), 32, (3, 3))
    w = Workload.of(graph, "conv")
    (s,) = schedules(w, target, others=False)
    x, packed = values(graph)
    x, packed = x.abs() + 0.1, packed.abs() + 0.1
    x[0, 0, 0, 3], x[0, 5, 5, 7], x[0, 9, 11, 0] = float("inf"), float("nan"), float("-inf")
    (got,) = runner(graph, load_kernel(builder.build_many([(w, s)], target, kernels_dir)[0], w, s))([x, packed])
    (want,) = evaluate(graph, [x, packed], wide=True)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    fine = want.isfinite()
    assert 0 < fine.sum() < fine.numel() and ((got.double() - want)[fine].abs() <= 1e-6 * want[fine].abs()).all()


def test_machine_code() -> None:
    """Tiles multiply, and halves of words are put together by one instruction for two vectors."""
    pytest.importorskip("tvm")
    from assembly import assembly, count

    lines = assembly(Workload.of(CASES["3x3"], "conv"), SAPPHIRE).splitlines()
    assert count(lines, "tdpbf16ps") >= 48 and count(lines, "vpermt2w") >= 3 and not count(lines, "vpmovdw")


def test_other_convolutions_and_targets_take_another_template() -> None:
    def name(graph: Graph, target: str = "sapphirerapids") -> str:
        return TvmBackend().templates(Workload.of(graph, "conv"), Target.from_name(f"cpu:{target}"))[0].name

    graph = CASES["3x3"]
    assert [name(graph, t) for t in ("sapphirerapids", "znver4", "x86-64-v4", "neoverse-v1")] == ["conv-thirds", "conv", "conv", "conv"]
    assert name(conv((1, 12, 12, 64), 32)) == "conv"  # few filters
    assert name(conv((1, 7, 7, 64), 96)) == "conv"  # few pixels
    assert name(conv((1, 12, 12, 20), 96)) == "conv"  # channels that are no eights
    assert name(conv((1, 12, 12, 64), 96, nr=48)) == "conv"  # packed for something else

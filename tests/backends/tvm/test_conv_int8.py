"""Convolutions of 8-bit integers: bit for bit what integer arithmetic gives, by every engine, in shapes that fill no tile."""

from __future__ import annotations

import random

import pytest
import torch

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.forms.convform import ConvForm, conv_of
from graphopt.backends.tvm import convint8form
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir import Builder, Graph, TensorType, dims, types
from graphopt.ir.interpreter import evaluate
from graphopt.passes.layout import filter_fours
from graphopt.target import Target, detect

N = dims.symbol("N")


def region(image: tuple, kernel: tuple[int, ...], filters: int, *, stride: int = 1, padding: int | tuple = 0, dilation: int = 1,
           what: str = "sums", given: bool = False) -> Graph:  # fmt: skip
    """Images ``[N, *S, C]``, f32 that is rounded or (``given``) i8, with a packed weight.

    Args:
        what: becomes of the sums: ``sums`` themselves, ``floats``, with a bias, relu and a residual, or ``integers`` again.
    """
    g = Graph("body")
    b = Builder(g)
    n = len(kernel)
    if not isinstance(image[0], int):
        g.symbols[image[0].name] = dims.Range(1, None)
    x = g.add_input(TensorType(types.i8 if given else types.f32, image), "x")
    if not given:
        x = b.create("quantize", [x, g.add_input(TensorType(types.f32, ()), "s")], {"dtype": types.i8, "bits": 8})
    attrs = {"stride": (stride,) * n, "dilation": (dilation,) * n, "channels_last": True, "acc": types.i32}
    attrs["padding"] = (padding,) * n if isinstance(padding, int) else padding
    shape = (*kernel, image[-1], filters)
    sample = Graph("sample")
    plain = sample.add_input(TensorType(types.i8, shape))
    conv = Builder(sample).create("conv", [sample.add_input(TensorType(types.i8, (1, *image[1:]))), plain], attrs)
    lines, run = filter_fours.runs_of(conv.producer)
    packed = filter_fours.pack(Builder(sample), plain, lines, run)
    w = filter_fours.unpack(b, g.add_input(packed.type.logical, "w"), lines, run, shape)
    y = b.create("conv", [x, w], attrs)
    if what != "sums":
        y = b.create("dequantize", [y, g.add_input(TensorType(types.f32, (*[1] * (n + 1), filters)), "scales")])
        y = b.add(y, g.add_input(TensorType(types.f32, (filters,)), "bias"))
        y = b.relu(b.add(y, g.add_input(y.type, "residual")))
    if what == "integers":
        y = b.create("quantize", [y, g.add_input(TensorType(types.f32, ()), "s")], {"dtype": types.i8, "bits": 8})
    g.set_outputs([y])
    return g


EXACT = {
    "one pixel": region((1, 1, 1, 64), (1, 1), 32),
    "1x1": region((1, 9, 7, 64), (1, 1), 32),
    "1x1, in place": region((1, 8, 8, 128), (1, 1), 64, given=True),
    "1x1, in place, images": region((2, 8, 4, 64), (1, 1), 40, given=True),
    "1x1, strided": region((1, 9, 8, 64), (1, 1), 48, stride=2),
    "1x1, channels that fill no step": region((1, 6, 5, 20), (1, 1), 33),
    "3x3": region((1, 7, 9, 64), (3, 3), 32, padding=1),
    "3x3, no padding": region((1, 7, 9, 128), (3, 3), 32),
    "3x3, strided": region((1, 9, 8, 64), (3, 3), 70, stride=2, padding=1),
    "3x3, few channels": region((1, 8, 8, 3), (3, 3), 16, padding=1),
    "3x3, few channels, strided": region((1, 9, 7, 40), (3, 3), 17, stride=2, padding=1),
    "3x3, dilated": region((1, 12, 11, 64), (3, 3), 16, dilation=2, padding=2),
    "3x3, dilated, few channels": region((1, 12, 11, 24), (3, 3), 16, dilation=2, padding=2),
    "7x7 of a stem": region((1, 20, 22, 3), (7, 7), 64, stride=2, padding=3),
    "wider padding than a line": region((1, 2, 2, 64), (5, 5), 16, padding=4),
    "a stride beyond the window": region((1, 11, 13, 32), (2, 2), 16, stride=3),
    "deep, in blocks": region((1, 6, 6, 512), (3, 3), 64, padding=1),
    "many pixels": region((1, 40, 40, 64), (3, 3), 64, padding=1),
    "several images": region((3, 7, 6, 64), (3, 3), 48, padding=1, given=True),
    "any number of images": region((N, 7, 6, 72), (3, 3), 48, padding=1),
    "along one axis": region((2, 19, 64), (3,), 32, padding=1),
    "along one axis, few channels": region((2, 19, 6), (5,), 32, stride=2, padding=2),
    "along three axes": region((1, 5, 4, 6, 16), (3, 3, 3), 24, padding=(1, 0, 1)),
    "along three axes, strided": region((2, 5, 4, 6, 64), (3, 2, 3), 24, stride=2, padding=(1, 0, 1)),
}  # fmt: skip
FLOATS = {
    "1x1": region((1, 9, 7, 64), (1, 1), 32, what="floats"),
    "3x3": region((1, 9, 7, 64), (3, 3), 40, padding=1, what="floats"),
    "3x3, any number of images": region((N, 5, 7, 64), (3, 3), 32, padding=1, what="floats"),
    "one pixel": region((1, 1, 1, 64), (1, 1), 32, what="floats"),
    "one pixel of several images": region((3, 4, 4, 64), (4, 4), 40, what="floats"),
    "one line": region((2, 1, 7, 64), (3, 3), 32, padding=1, what="floats"),
    "one column, strided": region((1, 7, 2, 64), (2, 2), 32, stride=2, what="floats"),
    "one filter": region((1, 5, 3, 64), (3, 3), 1, padding=1, what="floats"),
    "1x1, integers again": region((1, 9, 7, 64), (1, 1), 32, what="integers", given=True),
    "one pixel, integers again": region((2, 1, 1, 64), (1, 1), 40, what="integers", given=True),
    "3x3, integers again": region((2, 9, 7, 64), (3, 3), 27, padding=1, what="integers", given=True),
}  # fmt: skip


def weight(conv, generator: torch.Generator) -> torch.Tensor:
    """A packed weight: behind its runs and its last filter are zeros."""
    shape = conv.operands[1].shape
    sample = Graph("sample")
    sample.set_outputs([filter_fours.pack(Builder(sample), sample.add_input(TensorType(types.i8, shape)), *filter_fours.runs_of(conv))])
    return evaluate(sample, [torch.randint(-128, 128, shape, generator=generator).to(torch.int8)])[0].contiguous()


def values(graph: Graph, **sizes: int) -> list[torch.Tensor]:
    generator, out = torch.Generator().manual_seed(0), []
    (conv,) = [n for n in graph.nodes() if n.op.name == "conv"]
    for v in graph.inputs:
        shape = [d if isinstance(d, int) else dims.evaluate(d, sizes) for d in v.shape]
        if v.type.rank == 4 and v.shape[2:] == (32, 4) and v.dtype == types.i8:
            out.append(weight(conv, generator))
        elif v.dtype == types.i8:
            out.append(torch.randint(-128, 128, shape, generator=generator).to(torch.int8))
        elif v.type.rank == 0:
            out.append(torch.tensor(0.02))
        else:
            out.append(torch.randn(shape, generator=generator) * (1e-4 if v.hint == "scales" else 1.0))
    return out


def jobs(graphs: dict[str, Graph], t: Target, **change: object) -> list[tuple[Workload, Schedule]]:
    out = []
    for graph in graphs.values():
        w = Workload.of(graph, "conv")
        template = TvmBackend().templates(w, t)[0]
        assert template.name == "conv-int8", graph
        s = template.space(w, t).default()
        out.append((w, Schedule(s.template, s.sketch, tuple((k, change.get(k, v)) for k, v in s.knobs))))
    return out


def compare(builder, folder, todo: list[tuple[Workload, Schedule]], error: float = 0.0, halves: bool = False) -> None:
    """Args:
        error: relative and absolute, of floats.
        halves: integers may be one off where what was rounded lay beside a half: under one in a hundred.
    """
    from graphopt.backends.tvm.build import load_kernel

    for (w, s), path in zip(todo, builder.build_many(todo, detect(), folder), strict=True):
        kernel, graph = load_kernel(path, w, s), w.graph
        for sizes in [{"N": 1}, {"N": 3}] if graph.symbols else [{}]:
            inputs = values(graph, **sizes)
            shape = [d if isinstance(d, int) else dims.evaluate(d, sizes) for d in graph.outputs[0].shape]
            got = torch.full(shape, 77, dtype=graph.outputs[0].dtype.torch)
            kernel(*inputs, got, *sizes.values())
            (want,) = evaluate(graph, inputs, bindings=sizes)
            close = torch.allclose(got.double(), want.double(), rtol=error, atol=1 if halves else error)
            if halves:
                close = close and float((got == want).double().mean()) > 0.99
            assert close, f"{graph}\n{s}\n{sizes}\n{(got != want).nonzero()[:5]}"


def test_sums_are_exact(builder, kernels_dir) -> None:
    compare(builder, kernels_dir, jobs(EXACT, detect()))


def test_floats_and_integers_of_the_sums(builder, kernels_dir) -> None:
    compare(builder, kernels_dir, jobs({k: g for k, g in FLOATS.items() if "again" not in k}, detect()), 1e-6)
    compare(builder, kernels_dir, jobs({k: g for k, g in FLOATS.items() if "again" in k}, detect()), halves=True)


SOME = {k: EXACT[k] for k in ("1x1, in place", "3x3, strided", "3x3, dilated, few channels", "7x7 of a stem", "deep, in blocks",
                              "any number of images", "along three axes")}  # fmt: skip


@pytest.mark.parametrize("change", [
    {"engine": "vnni", "rows": 6}, {"engine": "vnni", "rows": 1, "lanes": 8}, {"engine": "mul", "rows": 3},
    {"engine": "mul", "rows": 2, "lanes": 4},
    {"block": 2, "group": 1, "panels": 1}, {"ahead": False, "parallel": False, "rows": 5}, {"block": 5, "group": 3, "rows": 8},
])  # fmt: skip
def test_every_engine_and_knob(builder, kernels_dir, change: dict[str, object]) -> None:
    if change.get("engine", "mul") not in next(p.choices for p in convint8form.params(EXACT["1x1"], detect()) if p.name == "engine"):
        pytest.skip("the processor has no such instructions")
    compare(builder, kernels_dir, jobs(SOME, detect(), **change))


def draw(seed: int) -> tuple[str, Graph]:
    """A random convolution, and the call that makes it again."""
    pick = random.Random(seed)
    n = pick.choice((1, 2, 2, 2, 3))
    kernel = tuple(pick.choice((1, 2, 3, 5)) for _ in range(n))
    dilation, stride = pick.choice((1, 1, 2)), pick.choice((1, 1, 2, 3))
    image = (pick.choice((1, 2)), *((k - 1) * dilation + pick.randint(1, 9) for k in kernel), pick.choice((1, 3, 17, 32, 64, 96, 128, 192)))
    padding = tuple(pick.randint(0, k) for k in kernel)
    call = (f"region({image}, {kernel}, {pick.choice((1, 16, 31, 40, 64))}, stride={stride}, padding={padding}, dilation={dilation}, "
            f"given={pick.random() < 0.5})")  # fmt: skip
    return call, eval(call)


def test_random_convolutions(builder, kernels_dir) -> None:
    drawn = dict(draw(seed) for seed in range(16))
    todo = jobs(drawn, detect())
    for call, one in zip(drawn, todo, strict=True):
        try:
            compare(builder, kernels_dir, [one])
        except AssertionError as error:
            raise AssertionError(f"{call}\n{error}") from error


@pytest.mark.parametrize(("name", "count"), [("3x3", 2), ("any number of images", 1)])
def test_planes_say_where_taps_read(name: str, count: int) -> None:
    """Against the definition: the pixel under each tap of each result, by the planes' own index arithmetic."""
    form = conv_of(EXACT[name], integers=True)
    assert isinstance(form, ConvForm)
    planes = convint8form.planes_of(form)
    height, width = planes.size
    for oy in range(planes.out[0]):
        for ox in range(planes.out[1]):
            for tap in range(9):
                y, x = oy + tap // 3 - 1, ox + tap % 3 - 1
                moves = planes.moves[tap if planes.blocked else tap // 3]
                place = oy * planes.pitch[1] + ox + moves[1] + (0 if planes.blocked else tap % 3)
                line, column = divmod(place, planes.pitch[1])
                inside = 0 <= y < height and 0 <= x < width
                assert ((line - 1, column - 1) == (y, x)) if inside else not (0 <= line - 1 < height and 0 <= column - 1 < width)


def test_what_it_does_not_take() -> None:
    H = dims.symbol("H")
    g = Graph("body")
    g.symbols["H"] = dims.Range(1, None)
    b = Builder(g)
    attrs = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "channels_last": True, "acc": types.i32}
    w = filter_fours.unpack(b, g.add_input(TensorType(types.i8, (1, 16, 32, 4)), "w"), 1, 64, (1, 1, 64, 32))
    g.set_outputs([b.create("conv", [g.add_input(TensorType(types.i8, (1, H, 7, 64)), "x"), w], attrs)])
    assert convint8form.refusal(g) == "the image is of unknown size"
    assert TvmBackend().reason(Workload.of(g, "conv"), detect())
    g = Graph("body")
    b = Builder(g)
    x, w = g.add_input(TensorType(types.i8, (1, 5, 7, 64)), "x"), g.add_input(TensorType(types.i8, (1, 1, 64, 32)), "w")
    g.set_outputs([b.create("conv", [x, w], attrs)])
    assert convint8form.refusal(g) == "the weight is not packed in fours"
    g = Graph("body")
    x, w = g.add_input(TensorType(types.i8, (1, 5, 7, 64)), "x"), g.add_input(TensorType(types.i8, (1, 1, 64, 32)), "w")
    g.set_outputs([Builder(g).create("conv", [x, w], {k: v for k, v in attrs.items() if k != "acc"})])
    assert convint8form.refusal(g) == "a convolution of i8"


@pytest.mark.parametrize(("name", "instruction"), [("neoverse-n1", "sdot"), ("znver4", "vpdpbusd")])
def test_instructions_of_other_targets(name: str, instruction: str) -> None:
    """Sums stay in registers."""
    pytest.importorskip("tvm")
    from assembly import assembly, count, hot_loop, stack_accesses

    graph = region((1, 14, 14, 128), (3, 3), 64, padding=1, given=True)
    loop = hot_loop(assembly(Workload.of(graph, "conv"), Target.from_name(f"cpu:{name}:2")), instruction)
    assert count(loop, instruction) >= 16 and not stack_accesses(loop), "\n".join(loop)

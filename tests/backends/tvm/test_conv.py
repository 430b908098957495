"""Convolutions: error against f64 with eager's own as the yardstick; sizes that divide nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tvm_check import B, H, check, sizes, values

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.forms.convform import ConvForm, busiest, conv_of, tile_rows, tiles_a_task
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.backends.tvm.loopnests import conv_loops
from graphopt.ir import Builder, Graph, TensorType, Value, dims, types
from graphopt.passes.layout.pack_filters import pack, unpack
from graphopt.target import Target, detect


def conv(x: Sequence[Any], w: Sequence[int], stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1, nr: int = 0,
         dtype: types.DType = types.f32, epilogue: bool = False, residual: bool = False, seen: Sequence[int] = (),
         pad: tuple[int, int] = (0, 0), fill: float = 0.0, acc: types.DType | None = None) -> Graph:  # fmt: skip
    """A region with one channels-last convolution; ``nr``: its weight is packed so; ``seen``: x is a transposed input; ``acc``: what
    halves are summed in, with a bias of it, before the result is rounded."""
    g = Graph("body")
    b, n = Builder(g), len(x) - 2
    for s in x:
        if not isinstance(s, int):
            g.symbols[s.name] = dims.Range(1, None)
    if seen:
        source = [x[0]] * len(x)
        for i, p in enumerate(seen):
            source[p] = x[i]
        image: Value = b.transpose(g.add_input(TensorType(dtype, tuple(source)), "x"), perm=tuple(seen))
    else:
        image = g.add_input(TensorType(dtype, tuple(x)), "x")
    if any(pad):
        low, high = ((0, *[side] * n, 0) for side in pad)
        image = b.pad(image, low=low, high=high, value=fill)
    if nr:
        sample = Graph("sample")
        packed = pack(Builder(sample), sample.add_input(TensorType(dtype, tuple(w))), groups, nr)
        weight = unpack(b, g.add_input(packed.type.logical, "w"), groups, tuple(w))
    else:
        weight = g.add_input(TensorType(dtype, tuple(w)), "w")
    window = {"stride": (stride,) * n, "padding": (padding,) * n, "dilation": (dilation,) * n}
    y = b.conv(image, weight, **window, groups=groups, channels_last=True, acc=acc)
    if acc is not None:
        y = b.cast(b.add(y, g.add_input(TensorType(acc, (w[-1],)), "b")), dtype)
    if epilogue:
        y = b.gelu(b.add(y, g.add_input(TensorType(dtype, (w[-1],)), "b")))
    if residual:
        y = b.relu(b.add(y, g.add_input(y.type, "r")))
    g.set_outputs([y])
    return g


def template_of(graph: Graph, target: Target | None = None) -> str:
    """The template that is taken first."""
    return TvmBackend().templates(Workload.of(graph, "conv"), target or detect())[0].name


CASES: dict[str, Graph] = {
    "3x3": conv((2, 9, 11, 5), (3, 3, 5, 20), padding=1, epilogue=True),
    "3x3 packed": conv((1, 14, 14, 32), (3, 3, 32, 70), padding=1, nr=48, epilogue=True, residual=True),
    "f16 summed in f32": conv((B, 6, 7, 9), (3, 3, 9, 20), padding=1, dtype=types.f16, acc=types.f32),
    "bf16 summed in f32": conv((2, 9, 9, 6), (3, 3, 3, 10), stride=2, groups=2, dtype=types.bf16, acc=types.f32),
    "f16 depthwise summed in f32": conv((2, 9, 9, 12), (3, 3, 1, 12), padding=1, groups=12, dtype=types.f16, acc=types.f32),
    "1x1": conv((3, 7, 7, 40), (1, 1, 40, 64), nr=64, epilogue=True, residual=True),
    "1x1 strided": conv((1, 9, 9, 40), (1, 1, 40, 33), stride=2, nr=48),
    "first layer": conv((1, 37, 41, 3), (7, 7, 3, 24), stride=2, padding=3, nr=32, epilogue=True, seen=(0, 2, 3, 1)),
    "first layer, two channels": conv((2, 9, 33, 2), (3, 3, 2, 24), padding=1, nr=32, seen=(0, 2, 3, 1)),
    "first layer, one channel": conv((2, 9, 33, 1), (5, 3, 1, 24), padding=1, nr=32, seen=(0, 2, 3, 1)),
    "first layer, 15 channels": conv((1, 5, 19, 15), (3, 3, 15, 24), padding=1, nr=32, seen=(0, 2, 3, 1)),
    "first layer, f64": conv((1, 5, 19, 3), (3, 3, 3, 24), padding=1, dtype=types.f64, seen=(0, 2, 3, 1)),
    "first layer, narrow": conv((1, 9, 5, 3), (3, 3, 3, 24), padding=1, nr=32, seen=(0, 2, 3, 1)),
    "first layer, any size": conv((B, H, H, 3), (3, 3, 3, 24), padding=1, nr=32, seen=(0, 2, 3, 1)),
    "patches": conv((2, 32, 32, 3), (8, 8, 3, 40), stride=8, nr=48, seen=(0, 2, 3, 1)),
    "many channels first": conv((2, 9, 37, 20), (3, 3, 20, 20), padding=1, nr=32, seen=(0, 2, 3, 1)),
    "dilated": conv((1, 13, 15, 6), (3, 3, 6, 10), padding=2, dilation=2),
    "strided, dilated": conv((2, 16, 15, 7), (3, 2, 7, 17), stride=3, padding=1, dilation=3),
    "long": conv((1, 5, 6, 700), (3, 3, 700, 18), padding=1, nr=32),
    "grouped": conv((2, 8, 9, 12), (3, 3, 4, 15), padding=1, groups=3, epilogue=True),
    "grouped, packed": conv((1, 8, 8, 64), (3, 3, 32, 72), padding=1, groups=2, nr=48),
    "one channel": conv((1, 8, 8, 1), (3, 3, 1, 1), padding=1),
    "line": conv((2, 50, 13), (5, 13, 21), stride=2, padding=2, nr=32),
    "volume": conv((1, 5, 6, 7, 4), (3, 3, 3, 4, 18), padding=1, nr=32, residual=True),
    "f64": conv((1, 7, 7, 5), (3, 3, 5, 9), padding=1, dtype=types.f64),
    "bf16": conv((1, 7, 7, 24), (3, 3, 24, 16), padding=1, dtype=types.bf16),
    "f16": conv((1, 7, 7, 24), (1, 1, 24, 16), dtype=types.f16),
    "batch of any size": conv((B, 9, 9, 6), (3, 3, 6, 20), padding=1, nr=32, epilogue=True),
    "image of any size": conv((B, H, H, 6), (3, 3, 6, 20), stride=2, padding=1, nr=32, residual=True),
    "any size in place": conv((B, H, H, 6), (1, 1, 6, 20), nr=32),
    "depthwise": conv((2, 13, 15, 40), (3, 3, 1, 40), padding=1, groups=40, epilogue=True),
    "depthwise strided": conv((1, 16, 23, 24), (3, 3, 1, 24), stride=2, padding=1, groups=24),
    "depthwise dilated": conv((1, 20, 31, 17), (3, 3, 1, 17), padding=2, dilation=2, groups=17),
    "depthwise, taps far apart": conv((1, 9, 41, 16), (3, 3, 1, 16), padding=12, dilation=12, groups=16),
    "depthwise strided, ends cut": conv((1, 9, 21, 16), (5, 5, 1, 16), stride=2, padding=2, groups=16),
    "depthwise, nothing cut": conv((1, 5, 19, 16), (3, 3, 1, 16), groups=16),
    "depthwise, tiles outside": conv((1, 5, 12, 16), (1, 2, 1, 16), padding=20, groups=16),
    "depthwise 7x7": conv((1, 7, 30, 16), (7, 7, 1, 16), padding=3, groups=16, residual=True),
    "depthwise, small image": conv((1, 3, 2, 8), (7, 7, 1, 8), padding=3, groups=8),
    "depthwise line": conv((2, 40, 10), (4, 1, 10), padding=3, groups=10),
    "depthwise volume": conv((1, 5, 6, 12, 8), (3, 3, 3, 1, 8), padding=1, groups=8),
    "depthwise, wide kernel": conv((1, 4, 60, 8), (1, 20, 1, 8), groups=8),
    "depthwise of any size": conv((B, H, H, 20), (3, 3, 1, 20), padding=1, groups=20, epilogue=True),
    "depthwise strided, any size": conv((B, H, H, 20), (5, 5, 1, 20), stride=2, padding=2, groups=20),
    "padded": conv((2, 9, 8, 5), (3, 3, 5, 20), stride=2, pad=(0, 1), nr=32),
    "padded twice": conv((1, 9, 8, 5), (3, 3, 5, 20), padding=1, pad=(1, 2), epilogue=True),
    "padded by ones": conv((1, 9, 8, 5), (3, 3, 5, 20), pad=(1, 1), fill=1.0),
    "depthwise, padded": conv((1, 14, 13, 20), (3, 3, 1, 20), stride=2, pad=(0, 1), groups=20),
    "depthwise, padded twice": conv((1, 14, 13, 20), (3, 3, 1, 20), padding=1, pad=(2, 1), groups=20),
    "depthwise, padded by ones": conv((1, 14, 13, 20), (3, 3, 1, 20), pad=(2, 1), groups=20, fill=1.0),
    "depthwise, padded, of any size": conv((B, H, H, 20), (3, 3, 1, 20), stride=2, pad=(0, 1), groups=20),
    "two filters a channel": conv((1, 9, 9, 6), (3, 3, 1, 12), padding=1, groups=6),
}  # fmt: skip


def test_convolutions(compile_all) -> None:
    for graph, run in zip(CASES.values(), compile_all([(g, "conv") for g in CASES.values()]), strict=True):
        for bindings in sizes(graph):
            check(graph, run, values(graph, **bindings), bindings)


def test_depthwise_by_the_general_template(compile_all) -> None:
    graphs = [g for name, g in CASES.items() if name in ("depthwise", "depthwise of any size")]
    for graph, run in zip(graphs, compile_all([(g, "conv") for g in graphs], template=1), strict=True):
        for bindings in sizes(graph):
            check(graph, run, values(graph, **bindings), bindings)


def test_every_schedule_of_a_convolution_is_right(builder, kernels_dir) -> None:
    from graphopt.backends.tvm.build import load_kernel

    graph = CASES["3x3 packed"]
    w, target = Workload.of(graph, "conv"), detect()
    space = TvmBackend().templates(w, target)[0].space(w, target)
    default = dict(space.default().knobs)
    schedules = [Schedule.make("conv", **{**default, p.name: c}) for p in space.params for c in p.choices[1:4]]
    paths = builder.build_many([(w, s) for s in schedules], target, kernels_dir)

    for schedule, path in zip(schedules, paths, strict=True):
        kernel = load_kernel(path, w, schedule)

        def run(inputs: Sequence[torch.Tensor], bindings: dict[str, int] | None = None, kernel: Any = kernel) -> list[torch.Tensor]:
            out = torch.full(graph.outputs[0].shape, 77.0)
            kernel(*inputs, out)
            return [out]

        check(graph, run, values(graph))


def test_what_is_packed_is_seen() -> None:
    packed, plain = conv_of(CASES["3x3 packed"]), conv_of(CASES["3x3"])
    assert isinstance(packed, ConvForm) and packed.packed is not None
    assert isinstance(plain, ConvForm) and plain.packed is None


TWO = 2 * detect().lanes(4)  # filters of two vectors
LINES = {
    "batch of any size": (conv((B, 7, 9, 6), (3, 3, 6, TWO), padding=1, nr=TWO, epilogue=True, residual=True), 5),
    "height of any size": (conv((B, H, 9, 6), (3, 3, 6, 20), padding=1, nr=TWO), 5),
    "in blocks": (conv((1, 3, 9, 700), (3, 3, 700, TWO), padding=1, nr=TWO), 5),
    "grouped": (conv((2, 4, 9, 12), (3, 3, 4, 15), padding=1, groups=3), 5),
    "line": (conv((2, 50, 13), (5, 13, 21), stride=2, padding=2, nr=TWO), 6),
    "volume": (conv((1, 3, 4, 9, 4), (3, 3, 3, 4, 18), padding=1, nr=TWO, residual=True), 5),
    "padded, strided": (conv((1, 5, 17, 3), (3, 3, 3, TWO), stride=2, pad=(0, 1), nr=TWO), 5),
}  # fmt: skip


def test_the_last_tile_of_a_line_overlaps_the_one_before(compile_points) -> None:
    points = []
    for graph, rows in LINES.values():
        w, form, t = Workload.of(graph, "conv"), conv_of(graph), detect()
        template = next(x for x in TvmBackend().templates(w, t) if x.name == "conv")
        knobs = dict(template.space(w, t).default().knobs)
        assert isinstance(form, ConvForm)
        assert form.tiles_across(rows, knobs["columns"] // knobs["lanes"]) > 0 and int(form.node.result.shape[-2]) % rows
        points += [(graph, w, Schedule.make("conv", **{**knobs, "rows": rows, "fetch": fetch})) for fetch in (False, True)]
    for (graph, *_), run in zip(points, compile_points(points), strict=True):
        for bindings in sizes(graph):
            check(graph, run, values(graph, **bindings), bindings)


def test_where_a_tile_is_a_piece_of_a_line() -> None:
    def across(x: Sequence[Any], w: Sequence[int], rows: int, vectors: int = 2, **window: int) -> int:
        form = conv_of(conv(x, w, **window))
        assert isinstance(form, ConvForm)
        assert form.tiles(rows, vectors, 1 << 12) >= (1 << 12) / rows
        return form.tiles_across(rows, vectors)

    assert across((1, 28, 28, 64), (3, 3, 64, 32), 14, padding=1) == 2
    assert across((B, H, 28, 64), (3, 3, 64, 32), 14, padding=1) == 2
    assert across((1, 224, 224, 3), (3, 3, 3, 64), 6, 4, padding=1) == 38  # four pixels of a line are computed twice: it pays
    assert across((1, 28, 28, 64), (3, 3, 64, 64), 6, 4, padding=1) == 0  # long sums: it does not
    assert across((1, 7, 7, 64), (3, 3, 64, 32), 14, padding=1) == 0  # a tile is longer than a line
    assert across((1, 28, 28, 64), (1, 1, 64, 32), 14) == 0  # neighbours in the image, whatever the lines are
    assert across((1, 28, H, 64), (3, 3, 64, 32), 14, padding=1) == 0


def test_loops_of_unknown_sizes_waste_little() -> None:
    w, t = Workload.of(LINES["batch of any size"][0], "conv"), detect()
    template = next(x for x in TvmBackend().templates(w, t) if x.name == "conv")
    (space,) = template.spaces(w, t)
    default = dict(space.default().knobs)
    loops = conv_loops(w.graph, t)
    for rows in (1, 4, 8, 9):
        assert loops(Schedule.make("conv", **{**default, "rows": rows})).waste < 2


def test_one_channel_leaves_registers_for_what_neighbours_share() -> None:
    one, dilated = (conv_of(conv((1, 9, 30, 1), (3, 3, 1, 32), padding=d, dilation=d)) for d in (1, 2))
    assert isinstance(one, ConvForm) and isinstance(dilated, ConvForm)
    target = Target("cpu", "x86_64", features=("avx512f",))
    assert max(tile_rows(one, 2, target)) == 9 and max(tile_rows(dilated, 2, target)) == 14


@pytest.mark.parametrize("features, registers", [(("avx512f",), 32), (("avx2",), 16)])
def test_tiles_fit_the_registers(features: tuple[str, ...], registers: int) -> None:
    target = Target("cpu", "x86_64", features=features)
    form = conv_of(CASES["3x3"])
    assert isinstance(form, ConvForm)
    for columns in (1, 5, 8, 16, 24, 48, 64, 100, 1000):
        width = target.panel_width(columns, 4)
        vectors = max(1, width // target.lanes(4))
        assert all(rows * vectors + vectors + 1 <= registers for rows in tile_rows(form, vectors, target))
        assert width & (width - 1) == 0 or width % target.lanes(4) == 0


def test_other_convolutions_are_refused_in_words() -> None:
    g = Graph("body")
    b = Builder(g)
    x, w = g.add_input(TensorType(types.f32, (1, 3, 8, 8))), g.add_input(TensorType(types.f32, (4, 3, 3, 3)))
    g.set_outputs([b.conv(x, w, stride=(1, 1), padding=(1, 1), dilation=(1, 1))])
    workload = Workload.of(g, "conv")
    assert not TvmBackend().templates(workload, detect())
    assert "before the spatial axes" in TvmBackend().reason(workload, detect())


class Net(torch.nn.Module):
    """What a convolutional network may hold."""

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.stem = nn.Sequential(nn.Conv2d(3, 20, 7, 2, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.grouped, self.depthwise = nn.Conv2d(20, 40, 3, padding=1, groups=4), nn.Conv2d(40, 40, 5, padding=2, groups=40)
        self.dilated, self.gate, self.head = nn.Conv2d(40, 40, 3, padding=2, dilation=2), nn.Conv2d(40, 40, 1), nn.Linear(40, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.silu(self.grouped(self.stem(x)))
        y = torch.nn.functional.hardswish(self.depthwise(torch.nn.functional.pad(x, (0, 1, 0, 1))))[:, :, :-1, :-1]
        x = x + self.dilated(y)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(torch.cat([x, y], 1)[:, 20:60].mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_network_needs_no_library(dynamic: bool, tmp_path) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    compiled = torch.compile(net, backend="graphopt", dynamic=dynamic, options={"strict": True, "cache_dir": str(tmp_path)})
    with torch.no_grad():
        for shape in [(2, 3, 50, 50), (3, 3, 33, 33)][: 1 + dynamic]:
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)


def test_one_image_of_unknown_size() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 7, stride=2, padding=3), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3)).eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend="graphopt", dynamic=True, options={"strict": True})
        for size in (21, 34):
            x = torch.randn(1, 3, size, size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_tasks_are_shared_evenly() -> None:
    assert tiles_a_task(56, 4, 12, 8) == 12  # five pieces: four of twelve tiles, one of eight
    assert tiles_a_task(4, 4, 12, 2) == 4  # few tasks wanted: a panel is read once for all its tiles
    uneven, even = (busiest(56, 4, n, 8, "pixels", 2) for n in (12, 8))
    assert even == pytest.approx(1 + 0.25 * 28 / 224)  # of 28 tasks each costs a quarter of a tile by itself
    assert uneven == pytest.approx((120 + 0.25 * 10) / 112)  # ten tasks each, but the short ones are all with one thread
    w, t = Workload.of(conv((1, 56, 56, 64), (3, 3, 16, 128), stride=2, padding=1, groups=4), "conv"), detect()
    template = next(x for x in TvmBackend().templates(w, t) if x.name == "conv")
    chosen = template.space(w, t).default()
    tiles = next(p for p in template.space(w, t).params if p.name == "tiles").choices
    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    count = form.tiles(chosen["rows"], chosen["columns"] // chosen["lanes"], 28 * 28)
    share = {n: busiest(count, 4 * -(-32 // chosen["columns"]), n, chosen["tasks"], chosen["split"], t.cores) for n in tiles}
    assert share[chosen["tiles"]] <= 1.03 * min(share.values())

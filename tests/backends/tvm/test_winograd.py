"""3x3 convolutions by Winograd's transform: error against f64 with eager's own as the yardstick, edges, every schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tvm_check import check

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.forms.convform import ConvForm, conv_of, winograd_shares
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir import Builder, Graph, TensorType, Value, types
from graphopt.ir.interpreter import evaluate
from graphopt.passes.layout.winograd import SQUARES, restore, transform
from graphopt.sampling import random_inputs
from graphopt.target import Target, detect
from graphopt.trials import make_case


def conv(x: Sequence[int], filters: int, padding: tuple[int, int] = (1, 1), nr: int = 32, bias: bool = False, residual: bool = False,
         seen: Sequence[int] = (), pad: tuple[int, int] = (0, 0)) -> Graph:  # fmt: skip
    """A region with one channels-last convolution whose weight is transformed; ``seen``: x is a transposed input."""
    g = Graph("body")
    b = Builder(g)
    if seen:
        source = [0] * 4
        for i, p in enumerate(seen):
            source[p] = x[i]
        image: Value = b.transpose(g.add_input(TensorType(types.f32, tuple(source)), "x"), perm=tuple(seen))
    else:
        image = g.add_input(TensorType(types.f32, tuple(x)), "x")
    if any(pad):
        image = b.pad(image, low=(0, pad[0], pad[0], 0), high=(0, pad[1], pad[1], 0), value=0.0)
    u = g.add_input(TensorType(types.f32, (filters // nr, 16, x[-1], nr)), "u")
    y = b.conv(image, restore(b, u), stride=(1, 1), padding=padding, dilation=(1, 1), channels_last=True)
    if bias:
        y = b.gelu(b.add(y, g.add_input(TensorType(types.f32, (filters,)), "b")))
    if residual:
        y = b.relu(b.add(y, g.add_input(y.type, "r")))
    g.set_outputs([y])
    return g


def values(graph: Graph, seed: int = 0) -> list[torch.Tensor]:
    """Random inputs; the transformed weight is one of a random weight."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for v in graph.inputs:
        if v.hint != "u":
            out.append(torch.randn([int(d) for d in v.shape], generator=generator))
            continue
        panels, _, channels, nr = (int(d) for d in v.shape)
        g = Graph("weight")
        g.set_outputs([transform(Builder(g), g.add_input(TensorType(types.f32, (3, 3, channels, panels * nr))), nr)])
        out += evaluate(g, [torch.randn(3, 3, channels, panels * nr, generator=generator) / channels**0.5])
    return [t.contiguous() for t in out]


CASES = {
    "even": conv((1, 14, 12, 32), 64, bias=True),
    "odd": conv((1, 7, 9, 48), 32, bias=True, residual=True),
    "several images": conv((3, 10, 7, 32), 32, residual=True),
    "no padding": conv((1, 12, 13, 32), 32, padding=(0, 0)),
    "more padding": conv((1, 6, 5, 32), 32, padding=(2, 3), bias=True),
    "a padded image": conv((1, 9, 9, 32), 32, padding=(0, 0), pad=(0, 3)),
    "channels first": conv((1, 12, 10, 32), 32, seen=(0, 2, 3, 1), residual=True),
    "long sums": conv((1, 8, 8, 608), 32),
    "many channels": conv((1, 14, 14, 256), 256, bias=True),
    "one square": conv((1, 2, 2, 32), 32),
    "one pixel": conv((1, 1, 1, 32), 32),
    "panels that are no vectors": conv((1, 5, 6, 7), 9, nr=3, bias=True),
}  # fmt: skip


def factor(graph: Graph) -> float:
    """Of eager's error that is allowed; the largest of a few results' errors says less about the others."""
    n, height, width, _ = (int(d) for d in graph.outputs[0].shape)
    return 2.0 if n * -(-height // 2) * -(-width // 2) >= SQUARES else 4.0


def test_convolutions(compile_all) -> None:
    for graph, run in zip(CASES.values(), compile_all([(g, "conv") for g in CASES.values()]), strict=True):
        for seed in range(3):
            check(graph, run, values(graph, seed), factor=factor(graph))


def test_every_schedule_is_right(builder, kernels_dir) -> None:
    from graphopt.backends.tvm.build import load_kernel

    target = detect()
    for graph in (CASES["odd"], CASES["several images"]):
        w = Workload.of(graph, "conv")
        template = TvmBackend().templates(w, target)[0]
        assert template.name == "winograd"
        space = template.space(w, target)
        default = dict(space.default().knobs)
        schedules = [Schedule.make("winograd", **{**default, p.name: c}) for p in space.params for c in p.choices[1:]]
        schedules += [Schedule.make("winograd", **{**default, "share": (5, lines, 1)}) for lines in (1, 3, 4)]  # cut off at the end
        paths = builder.build_many([(w, s) for s in schedules], target, kernels_dir)
        for schedule, path in zip(schedules, paths, strict=True):
            kernel = load_kernel(path, w, schedule)

            def run(inputs: Sequence[torch.Tensor], bindings: dict[str, int] | None = None, kernel: Any = kernel) -> list[torch.Tensor]:
                out = torch.full(graph.outputs[0].shape, 77.0)  # noqa: B023
                kernel(*inputs, out)
                return [out]

            check(graph, run, values(graph), factor=factor(graph))


@pytest.mark.parametrize("features, registers", [(("avx512f",), 32), (("avx2",), 16)])
def test_tiles_fit_the_registers(features: tuple[str, ...], registers: int) -> None:
    for cores in (1, 2, 64):
        target = Target("cpu", "x86_64", features=features, cores=cores)
        form = conv_of(CASES["many channels"])
        assert isinstance(form, ConvForm) and form.transformed is not None
        vectors = form.transformed.shape[-1] // target.lanes(4)  # type: ignore[operator]
        for rows, lines, groups in winograd_shares(form, target):
            assert rows * vectors + vectors + 1 <= max(registers, 2 * vectors + 1) and lines <= 7 and 8 % groups == 0


def test_more_cores_get_more_tasks() -> None:
    form = conv_of(CASES["many channels"])
    assert isinstance(form, ConvForm)
    tasks = []
    for cores in (1, 4, 16):
        _, lines, groups = winograd_shares(form, Target("cpu", "x86_64", features=("avx512f",), cores=cores))[0]
        tasks.append(-(-7 // lines) * groups)
    assert tasks == sorted(tasks) and tasks[-1] >= 16


def test_a_model_computes_so(tmp_path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.BatchNorm2d(64), torch.nn.ReLU(),
                                torch.nn.Conv2d(64, 32, 3, padding=1)).eval()  # fmt: skip
    x = torch.randn(2, 64, 15, 12)
    with torch.no_grad():
        compiled = torch.compile(model, backend="graphopt", options={"strict": True, "cache_dir": str(tmp_path)})
        y, own = compiled(x), model(x)
        true = model.double()(x.double())
    assert (y - true).abs().max() <= 2 * (own - true).abs().max()
    import graphopt

    assert sum("winograd-filters" in str(r) for r in graphopt.reports()[-1].remarks) >= 2


def test_the_tuner_tries_it_on_the_transform_of_a_weight() -> None:
    """Of random numbers in the weight's place, the kernel would make something else than the region."""
    w = Workload.of(conv((1, 8, 8, 32), 32, bias=True), "conv")
    case = make_case(w, {}, seed=0)
    form = conv_of(w.graph)
    assert isinstance(form, ConvForm) and form.transformed is not None
    u = case.inputs[form.transformed.index]
    g = Graph("again")
    g.set_outputs([transform(Builder(g), restore(Builder(g), g.add_input(form.transformed.type)), int(u.shape[-1]))])
    (again,) = evaluate(g, [u])
    torch.testing.assert_close(again, u, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(random_inputs(w.graph, {}, 0)[form.transformed.index], u)

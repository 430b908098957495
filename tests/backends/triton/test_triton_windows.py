"""Convolutions and pooling under Triton's interpreter, and convolutions compiled for every target."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_conv import CASES as CONVOLUTIONS
from test_conv import conv
from test_pool import CASES as POOLS
from test_pool import B, H, kind_of, pool
from test_triton_kernels import draws
from test_triton_offline import TARGETS, judge
from torch import nn
from triton_check import SM_90, runner

import graphopt
from graphopt.autotune.space import Workload
from graphopt.backends.triton.backend import TritonBackend
from graphopt.backends.triton.matmul import UNSIGNED
from graphopt.ir import Builder, TensorType, dims, types
from graphopt.ir.graph import Graph
from graphopt.testing.kernels import check, sizes, values

LONG_POOL = re.compile("any size|large|volume")
LONG = ("image of any size", "depthwise 7x7", "depthwise of any size", "depthwise strided, any size", "depthwise, padded, of any size")
ADAPTIVE = {
    "max of any size, first": pool("adaptive_max_pool", (B, 3, H, H), size=(4, 3), last=False),
    "argmax of any size": pool("adaptive_argmax_pool", (B, H, H, 5), size=(2, 5)),
    "avg to any size": pool("adaptive_avg_pool", (B, H, H, 5), size=(dims.floordiv(dims.add(H, 1), 2), 4)),
    "max to any size": pool("adaptive_max_pool", (H, 13, 9, 5), size=(dims.floordiv(dims.add(H, 2), 3), H)),
    "of a line": pool("adaptive_max_pool", (2, H, 5), size=(7,), relu=True),
}


def against_f64(graph: Graph, kind: str, nan: bool = False) -> None:
    run = runner(graph, kind)
    for bindings in sizes(graph):
        check(graph, run, values(graph, nan=nan, **bindings), bindings, factor=4.0, slack=2)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in CONVOLUTIONS])
def test_convolutions(name: str) -> None:
    against_f64(CONVOLUTIONS[name], "conv")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if LONG_POOL.search(n) else n for n in POOLS])
def test_pools(name: str) -> None:
    graph = POOLS[name]
    against_f64(graph, kind_of(graph))
    if "argmax" not in kind_of(graph) or "H" not in graph.symbols:
        against_f64(graph, kind_of(graph), nan=True)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_pools_of_any_size(name: str) -> None:
    graph = ADAPTIVE[name]
    run = runner(graph, kind_of(graph))
    for b, h in ((1, 7), (3, 10), (2, 16)):
        bindings = {s: n for s, n in (("B", b), ("H", h)) if s in graph.symbols}
        check(graph, run, values(graph, **bindings), bindings, factor=4.0, slack=2)


def of_integers(x: tuple[int | dims.Dim, ...], w: tuple[int, ...], stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1,
                dtype: types.DType = types.i8, what: str = "sums") -> Graph:  # fmt: skip
    """A convolution of 8-bit integers; ``what`` becomes of the sums: ``sums`` themselves, ``floats`` with a bias, or ``integers`` again."""
    g, n = Graph("body"), len(x) - 2
    b = Builder(g)
    if not isinstance(x[0], int):
        g.symbols["B"] = dims.Range(1, None)
    image, weight = g.add_input(TensorType(dtype, x), "x"), g.add_input(TensorType(dtype, w), "w")
    y = b.create("conv", [image, weight], {"stride": (stride,) * n, "padding": (padding,) * n, "dilation": (dilation,) * n,
                                           "groups": groups, "channels_last": True, "acc": types.i32})  # fmt: skip
    if what != "sums":
        y = b.dequantize(y, g.add_input(TensorType(types.f32, (*[1] * (n + 1), w[-1])), "s"))
        y = b.relu(b.add(y, g.add_input(TensorType(types.f32, (w[-1],)), "b")))
    if what == "integers":
        y = b.create("quantize", [y, g.add_input(TensorType(types.f32, ()), "t")], {"dtype": types.i8, "bits": 8})
    g.set_outputs([y])
    return g


INTEGERS = {
    "3x3": of_integers((2, 9, 7, 40), (3, 3, 40, 33), padding=1),
    "few channels, strided": of_integers((1, 13, 12, 3), (7, 7, 3, 20), stride=2, padding=3),
    "1x1 to floats": of_integers((2, 5, 6, 64), (1, 1, 64, 48), what="floats"),
    "dilated, integers again": of_integers((1, 12, 11, 20), (3, 3, 20, 16), dilation=2, padding=2, what="integers"),
    "grouped": of_integers((2, 8, 9, 12), (3, 3, 4, 15), padding=1, groups=3),
    "line": of_integers((2, 30, 13), (5, 13, 21), stride=2, padding=2),
    "volume": of_integers((1, 5, 4, 6, 16), (3, 2, 3, 16, 9), padding=1),
    "depthwise": of_integers((2, 13, 15, 20), (3, 3, 1, 20), padding=1, groups=20, what="floats"),
    "depthwise, unsigned": of_integers((2, 9, 8, 20), (3, 3, 1, 20), padding=1, groups=20, dtype=types.u8),
    "any number of images": of_integers((B, 7, 6, 24), (3, 3, 24, 20), padding=1, what="floats"),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_convolutions_of_integers(name: str) -> None:
    """The same sums, bit for bit; of largest magnitudes, too."""
    graph = INTEGERS[name]
    run, r = runner(graph, "conv"), torch.Generator().manual_seed(0)
    for bindings in [{"B": 1}, {"B": 3}] if graph.symbols else [{}]:
        given = []
        for v in graph.inputs:
            shape = [bindings.get(str(d), d) for d in v.shape]
            low, high = (0, 256) if v.dtype == types.u8 else (-128, 128)
            given.append(torch.randint(low, high, shape, generator=r).to(v.dtype.torch) if v.dtype.is_integer
                         else torch.rand(shape, generator=r) * 1e-3 + 1e-4)  # fmt: skip
        check(graph, run, given, bindings, factor=4.0, slack=2)


def test_sampled_schedules_of_integers() -> None:
    graph = INTEGERS["3x3"]
    r = torch.Generator().manual_seed(0)
    given = [torch.randint(-128, 128, [int(d) for d in v.shape], generator=r).to(torch.int8) for v in graph.inputs]
    for s in draws(graph, "conv", 2):
        check(graph, runner(graph, "conv", s), given)


def test_a_quantized_network() -> None:
    """``int8-dynamic`` multiplies integers, convolutions included; what is left to rounding is that of the CPU's kernels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2, padding=1)).eval()
    x = torch.randn(2, 3, 12, 13)
    made = graphopt.quantize(model, (x,), scheme="int8-dynamic", least=1, measure=False)
    with torch.no_grad():
        c = graphopt.compile(made, (x,), backend="triton", target="cuda:sm_90:4", strict=True)
        torch.testing.assert_close(c(x), graphopt.compile(made, (x,), strict=True)(x))
    products = [text for k in c.report.kernels if " conv(" in (text := Path(k.path).read_text())]
    assert len(products) == 2 and all("acc = i32" in text for text in products)


@pytest.mark.parametrize("dtype", [types.f32, types.bf16, types.i32, types.u8], ids=str)
@pytest.mark.parametrize("name", ["sliding", "first", "adaptive"])
def test_places_of_equal_elements(name: str, dtype: types.DType) -> None:
    """The first of the greatest ones, of a window of nothing but -inf its first element; the last of several nans."""
    graph = {
        "sliding": pool("argmax_pool", (2, 9, 8, 5), 3, 2, 1, dtype=dtype),
        "first": pool("argmax_pool", (2, 5, 9, 8), 3, 2, 1, dilation=2, last=False, dtype=dtype),
        "adaptive": pool("adaptive_argmax_pool", (2, 9, 8, 5), size=(4, 3), dtype=dtype),
    }[name]
    x = torch.randint(0, 3, [int(d) for d in graph.inputs[0].shape], generator=torch.Generator().manual_seed(0)).to(dtype.torch)
    if dtype.is_float:
        x[0], x[1].view(-1)[::7] = float("-inf"), float("nan")
    check(graph, runner(graph, kind_of(graph)), [x])


def test_places_in_a_model() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, at = F.max_pool2d(x, 3, 2, 1, return_indices=True)
        z, low = F.adaptive_max_pool2d(x, (4, 3), return_indices=True)
        return y, at, z, low, x.flatten(2).gather(2, at.flatten(2))

    x = torch.randn(2, 3, 13, 14, generator=torch.Generator().manual_seed(0))
    options = {"backend": "triton", "target": "cuda:sm_90:4", "strict": True}
    with torch.no_grad():
        for got, want in zip(torch.compile(fn, backend="graphopt", options=options)(x), fn(x), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["3x3", "depthwise, small image", "grouped"])
def test_sampled_schedules(name: str) -> None:
    graph = CONVOLUTIONS[name]
    for s in draws(graph, "conv", 2):
        check(graph, runner(graph, "conv", s), values(graph), None, factor=4.0, slack=2)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (pool("argmax_pool", (2, 0, 8, 5), 1), "a window without elements"),
        (of_integers((2, 8, 8, 5), (3, 3, 5, 16), dtype=types.u8), UNSIGNED),
    ],
)
def test_what_has_no_template_says_so(graph: Graph, reason: str) -> None:
    w = Workload.of(graph, kind_of(graph))
    assert not TritonBackend().templates(w, SM_90)
    assert TritonBackend().reason(w, SM_90) == reason


LARGE = {
    "3x3": conv((8, 56, 56, 64), (3, 3, 64, 64), padding=1, dtype=types.f16, epilogue=True),
    "1x1": conv((8, 28, 28, 256), (1, 1, 256, 512), dtype=types.bf16),
    "first layer": conv((8, 224, 224, 3), (7, 7, 3, 64), stride=2, padding=3, dtype=types.f16),
    "f32": conv((8, 28, 28, 128), (3, 3, 128, 128), padding=1),
    "grouped": conv((8, 28, 28, 256), (3, 3, 64, 256), padding=1, groups=4, dtype=types.f16),
    "integers": of_integers((8, 56, 56, 64), (3, 3, 64, 64), padding=1, what="floats"),
    "integers, few channels": of_integers((8, 224, 224, 3), (7, 7, 3, 64), stride=2, padding=3),
    "integers, deep": of_integers((8, 14, 14, 512), (3, 3, 512, 512), padding=1, what="integers"),
}


PLACES = {
    "sliding": pool("argmax_pool", (8, 112, 112, 64), 3, 2, 1, dtype=types.f16),
    "first": pool("argmax_pool", (8, 64, 112, 112), 3, 2, 1, last=False),
    "adaptive": pool("adaptive_argmax_pool", (8, 56, 56, 64), size=(7, 7)),
    "adaptive, of any size": pool("adaptive_avg_pool", (B, H, H, 512), size=(7, 7), dtype=types.bf16),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["3x3", "integers"])
def test_machine_code(name: str, target: str) -> None:
    judge(LARGE[name], "conv", target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PLACES)
def test_machine_code_of_pools(name: str, target: str) -> None:
    judge(PLACES[name], kind_of(PLACES[name]), target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LARGE)
def test_all_machine_code(name: str, target: str) -> None:
    judge(LARGE[name], "conv", target)

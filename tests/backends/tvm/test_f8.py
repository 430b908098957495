"""Floats of 8 bits: every one of them, as numbers in kernels, and as weights."""

from __future__ import annotations

import pytest
import torch
from casts_to_f8 import F8, SOURCES, assert_as_eager, cast
from test_quantized import default, region, run_all

from graphopt.ir import evaluate, types
from graphopt.ir.text import parse_graph

CODES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [types.f8e4m3, types.f8e5m2], ids=str)
def test_every_number(compile_all, dtype: types.DType) -> None:
    """Zeros with signs, denormals, infinities and nans included; bit for bit the interpreter's."""
    graph = parse_graph(f"graph @g(%q: {dtype}[16, 16], %s: f32[1, 16]) -> f32[16, 16] {{\n"
                        f" %0: f32[16, 16] = dequantize(%q, %s)\n return %0\n}}")  # fmt: skip
    (run,) = compile_all([(graph, "pointwise")])
    q, s = CODES.view(dtype.torch).reshape(16, 16), torch.tensor([[1.0, 0.37, 3e-38, 2e30] * 4])
    (found,), (want,) = run([q, s], None), evaluate(graph, [q, s])
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(found)[~found.isnan()], torch.signbit(want)[~want.isnan()])


@pytest.mark.parametrize("dtype", [types.f8e4m3, types.f8e5m2], ids=str)
@pytest.mark.parametrize("rows", [1, 20])
def test_every_number_as_a_weight(compile_all, dtype: types.DType, rows: int) -> None:
    """A unit row picks out each number; one that is none makes its column none."""
    graph = region((rows,), 256, 64, 8, floats=dtype)
    (run,) = compile_all([(graph, "matmul")])
    finite = torch.where(CODES.view(dtype.torch).float().isfinite(), CODES, 0)
    codes = torch.stack([finite.roll(j) for j in range(64)], 1)
    s = torch.ones(1, 1, 64)
    for k in (0, 77, 255):
        x = torch.zeros(rows, 256)
        x[:, k] = 1.0
        (y,) = run([x, codes.view(dtype.torch).unsqueeze(0), s], None)
        assert torch.equal(y, codes[k].view(dtype.torch).float().expand(rows, 64))
    codes[5, 3] = 0xFF
    (y,) = run([torch.zeros(rows, 256), codes.view(dtype.torch).unsqueeze(0), s], None)
    assert y.isnan().sum() == rows and bool(y[:, 3].isnan().all())


def test_products(builder, kernels_dir) -> None:
    few = [region((1,), 256, 128, 8, floats=types.f8e4m3), region((3,), 301, 75, 8, epilogue=True, floats=types.f8e5m2),
           region((2,), 256, 70, 8, 64, floats=types.f8e4m3)]  # fmt: skip
    run_all(builder, kernels_dir, [default(g, "quantized") for g in few])
    run_all(builder, kernels_dir, [default(region((20,), 300, 75, 8, floats=t), "tile") for t in (types.f8e4m3, types.f8e5m2)])


@pytest.mark.parametrize("dtype", [types.f8e4m3, types.f8e5m2], ids=str)
def test_rounding(compile_all, dtype: types.DType) -> None:
    """Every number, what lies halfway to the next, a little below and above that, and what has no place: bit for bit the interpreter's."""
    graph = parse_graph(f"graph @g(%x: f32[8, 320], %s: f32[8, 1]) -> f32[8, 320] {{\n"
                        f" %0: {dtype}[8, 320] = quantize(%x, %s) {{dtype = {dtype}, bits = 8}}\n"
                        f" %1: f32[8, 320] = cast(%0) {{dtype = f32}}\n return %1\n}}")  # fmt: skip
    (run,) = compile_all([(graph, "pointwise")])
    numbers = CODES.view(dtype.torch).float()
    finite = numbers[numbers.isfinite()].sort().values
    half = (finite[1:] + finite[:-1]) / 2
    near = [finite, half, torch.nextafter(half, half + 1), torch.nextafter(half, half - 1), finite * 1.03, finite * 0.96]
    odd = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e30, -1e30, 1e-40, -1e-30, 500.0, 470.0, 60000.0])
    x = torch.cat([*near, odd])
    x = torch.cat([x, torch.randn(8 * 320 - len(x), generator=torch.Generator().manual_seed(0))]).reshape(8, 320)
    s = torch.tensor([[1.0]] * 5 + [[0.37], [4.0], [1.0]])
    (found,), (want,) = run([x, s], None), evaluate(graph, [x, s])
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(found)[~found.isnan()], torch.signbit(want)[~want.isnan()])


def test_casts_as_eager(compile_all) -> None:
    pairs = [(source, to) for to in F8 for source in SOURCES if source != str(to)]
    for (source, to), run in zip(pairs, compile_all([(cast(*pair), "pointwise") for pair in pairs]), strict=True):
        assert_as_eager(source, to, run([SOURCES[source]], None))

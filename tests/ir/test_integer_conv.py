"""conv of 8-bit integers, summed in 32 bits: exact, against sums of Python's integers."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import TypeInferenceError
from graphopt.ir import Builder, Graph, TensorType, evaluate, parse_graph, print_graph, types

ATTRS = {"stride": (2,), "padding": (1,), "dilation": (1,), "acc": types.i32}


def conv(dtype: types.DType = types.i8, last: bool = False, acc: types.DType = types.i32) -> Graph:
    g = Graph("g")
    x, w = ((1, 7, 3), (3, 3, 2)) if last else ((1, 3, 7), (2, 3, 3))
    operands = [g.add_input(TensorType(dtype, shape)) for shape in (x, w)]
    g.set_outputs([Builder(g).create("conv", operands, {**ATTRS, "channels_last": last, "acc": acc})])
    return g


@pytest.mark.parametrize("dtype", [types.i8, types.u8])
def test_sums_are_exact(dtype: types.DType) -> None:
    low, high = (-128, 128) if dtype == types.i8 else (0, 256)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(low, high, shape, generator=generator).to(dtype.torch) for shape in ((1, 3, 7), (2, 3, 3)))
    x[0, :, 2:5], w[1] = low or 255, low or 255
    want = [[sum(int(x[0, c, 2 * i + t - 1]) * int(w[o, c, t]) for c in range(3) for t in range(3) if 0 <= 2 * i + t - 1 < 7)
             for i in range(4)] for o in range(2)]  # fmt: skip
    (got,) = evaluate(conv(dtype), [x, w])
    assert got.dtype == torch.int32 and got.tolist() == [want]
    (last,) = evaluate(conv(dtype, last=True), [x.movedim(1, -1), w.permute(2, 1, 0)])
    assert torch.equal(last, got.movedim(1, -1))


def test_text() -> None:
    text = print_graph(conv())
    assert "dilation = [1], acc = i32}" in text and print_graph(parse_graph(text)) == text


@pytest.mark.parametrize(("dtype", "acc"), [(types.f32, types.i32), (types.i8, types.f32), (types.i32, types.i32)])
def test_other_sums_are_refused(dtype: types.DType, acc: types.DType) -> None:
    with pytest.raises(TypeInferenceError, match="only products of i8 or u8 are"):
        conv(dtype, acc=acc)

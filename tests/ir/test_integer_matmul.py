"""matmul of 8-bit integers, summed in 32 bits: exact, wrapping around; what it refuses."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import TypeInferenceError
from graphopt.ir import Builder, Graph, TensorType, evaluate, parse_graph, print_graph, types


def graph(dtype: types.DType, k: int) -> Graph:
    g = Graph("g")
    a, b = g.add_input(TensorType(dtype, (3, k))), g.add_input(TensorType(dtype, (k, 5)))
    g.set_outputs([Builder(g).create("matmul", [a, b], {"acc": types.i32})])
    return g


@pytest.mark.parametrize("dtype", [types.i8, types.u8])
@pytest.mark.parametrize("wide", [False, True])
def test_sums_are_exact(dtype: types.DType, wide: bool) -> None:
    low, high = (-128, 128) if dtype == types.i8 else (0, 256)
    a, b = (torch.randint(low, high, s).to(dtype.torch) for s in ((3, 1000), (1000, 5)))
    (y,) = evaluate(graph(dtype, 1000), [a, b], wide=wide)
    assert y.dtype == torch.int32 and torch.equal(y, a.int() @ b.int())


def test_sums_wrap_around() -> None:
    k = 70_000
    a, b = torch.full((3, k), 255, dtype=torch.uint8), torch.full((k, 5), 255, dtype=torch.uint8)
    (y,) = evaluate(graph(types.u8, k), [a, b])
    assert torch.equal(y, torch.full((3, 5), (k * 255 * 255 + 2**31) % 2**32 - 2**31, dtype=torch.int32))


def test_text() -> None:
    g = graph(types.i8, 4)
    assert "matmul(%arg0, %arg1) {acc = i32}" in print_graph(g) and print_graph(parse_graph(print_graph(g))) == print_graph(g)


@pytest.mark.parametrize(("dtype", "acc"), [(types.f32, types.i32), (types.i8, types.f32), (types.i32, types.i32)])
def test_other_sums_are_refused(dtype: types.DType, acc: types.DType) -> None:
    g = Graph("g")
    a, b = g.add_input(TensorType(dtype, (3, 4))), g.add_input(TensorType(dtype, (4, 5)))
    with pytest.raises(TypeInferenceError, match="summed in"):
        Builder(g).create("matmul", [a, b], {"acc": acc})

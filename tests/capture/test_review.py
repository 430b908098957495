"""Faults that a review found: each case once gave another value, or another exception, than eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import graphopt
from graphopt.guards import InputError

pytest.importorskip("tvm_ffi")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def same(fn: Callable[..., Any], *args: Any) -> None:
    torch.testing.assert_close(torch.compile(fn, backend="graphopt")(*args), fn(*args), equal_nan=True)


def test_an_index_that_a_slice_leaves_out_may_be_out_of_range() -> None:
    rows = torch.randn(8, 4)
    same(lambda x, i: torch.nn.functional.embedding(i[:2], x) * 2, rows, torch.tensor([0, 1, 999]))
    same(lambda x, i: x[i[:2]] + 1, rows, torch.tensor([0, -1, 999]))
    with pytest.raises(IndexError):
        torch.compile(lambda x, i: x[i[:2]] + 1, backend="graphopt")(rows, torch.tensor([0, 99, 1]))


def test_an_index_that_wrapped_around_is_not_read_by() -> None:
    fn = torch.compile(lambda x, i: torch.index_select(x, 0, i.to(torch.int8).long()) + 1, backend="graphopt")
    with pytest.raises(IndexError):
        fn(torch.zeros(300, 2), torch.tensor([200]))


def test_a_lazily_negated_input() -> None:
    x = torch.randn(4, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    same(lambda x: x * 2 + 1, x)


def test_rounding_by_a_large_constant() -> None:
    same(lambda x: (x + 12582912.0) - 12582912.0, torch.randn(64))


class Square(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x))


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_weight_seen_in_other_strides(backend: str) -> None:
    model, x = Square().eval(), torch.randn(16, 32)
    compiled = graphopt.compile(model, (x,), backend=backend)
    compiled(x)
    model.fc.weight.data = model.fc.weight.data.t()
    torch.testing.assert_close(compiled(x), model(x))


class Add(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * 2 + y


class FirstTwo(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x[:2] * 2 + y[:2]


def test_sizes_that_disagree_are_refused() -> None:
    b = torch.export.Dim("B", min=2, max=8)
    compiled = graphopt.compile(Add(), (torch.ones(4, 3), torch.ones(4, 3)), dynamic_shapes={"x": {0: b}, "y": {0: b}})
    for n in (1, 2, 8):
        assert torch.equal(compiled(torch.ones(n, 3), torch.ones(n, 3)), torch.full((n, 3), 3.0))
    for m, n in ((5, 3), (3, 5), (5, 1), (9, 9)):  # once read memory that is not y's
        with pytest.raises(InputError, match="do not fit"):
            compiled(torch.ones(m, 3), torch.ones(n, 3))


def test_a_size_below_what_a_slice_needs_is_refused() -> None:
    b = torch.export.Dim("B")
    compiled = graphopt.compile(FirstTwo(), (torch.ones(4, 3), torch.ones(4, 3)), dynamic_shapes={"x": {0: b}, "y": {0: b}})
    assert compiled(torch.ones(2, 3), torch.ones(2, 3)).shape == (2, 3)
    with pytest.raises(InputError, match="do not fit"):
        compiled(torch.ones(1, 3), torch.ones(1, 3))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_subtracting_one_from_integers(dtype: torch.dtype) -> None:
    same(lambda x: x - 1, torch.tensor([5, 0, -3, 2**31 - 1, -(2**31)], dtype=dtype))

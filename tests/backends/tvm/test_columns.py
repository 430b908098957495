"""Softmax over the channels of an image, and along any axis that is not the last one, by strips of neighbouring columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphopt

pytestmark = pytest.mark.tvm
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check(fn: Callable[..., torch.Tensor], *xs: torch.Tensor, kinds: tuple[str, ...] = ("rowwise",), **options: Any) -> None:
    """One kernel each of ``kinds``; errors to fp64 like eager's, nan where eager has it."""
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="graphopt", options={"strict": True, **options}, dynamic=True if len(xs) > 1 else None)
    for x in xs:
        with torch.no_grad():
            got, want, exact = compiled(x), fn(x), fn(x.double())
        assert got.stride() == want.stride()
        assert torch.equal(got.isnan(), want.isnan())
        error, eager = ((y.double() - exact).nan_to_num().abs().max() for y in (got, want))
        assert error <= 2 * eager + 1e-6 * exact.nan_to_num(0, 0, 0).abs().max()
    assert tuple(k.kind for k in graphopt.reports()[-1].kernels) == kinds


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 21, 9, 11), (3, 5, 17), (2, 300, 33), (1, 1, 40), (2, 7, 16)])
def test_channels(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape) * 3).to(dtype)
    check(lambda x: torch.softmax(x, 1), x)
    check(lambda x: torch.log_softmax(x, 1), x)


def test_nan_and_infinities() -> None:
    x = torch.randn(2, 21, 9, 11)
    x[0, 3, 2, 2], x[1, :, 1, 1], x[1, 4, 2, 1] = float("nan"), float("-inf"), float("inf")
    check(lambda x: torch.softmax(x, 1), x)
    check(lambda x: torch.log_softmax(x, 1), x)


def test_what_is_around_it_and_other_layouts() -> None:
    check(lambda x: torch.softmax(x * 0.3 + 1, -2) * 2.5, torch.randn(2, 4, 19, 33))
    check(lambda x: torch.softmax(x.masked_fill(x > 1, -1e9), 0), torch.randn(37, 129))
    check(lambda x: torch.softmax(x[:, 2:, 1:], 1), torch.randn(2, 24, 91))
    check(lambda x: torch.softmax(x.transpose(1, 2), 1), torch.randn(2, 24, 91))
    check(lambda x: torch.softmax(x, 1), torch.randn(2, 24, 9, 11).to(memory_format=torch.channels_last))


def test_symbolic_sizes() -> None:
    """Fewer columns than a strip, too, and columns longer than an f32 sum takes at a time."""
    images = [torch.randn(s) for s in ((2, 5, 6, 7), (3, 9, 21, 23), (1, 300, 4, 4))]
    check(lambda x: torch.log_softmax(x, 1), *images, hot_sizes="none")
    lines = [torch.randn(s) for s in ((2, 300, 129), (3, 400, 3), (1, 2, 200))]
    check(lambda x: torch.softmax(x, 1) * 2, *lines, hot_sizes="none")


def test_long_columns_are_summed_in_blocks() -> None:
    x = torch.zeros(1, 16_003, 16)
    check(lambda x: torch.softmax(x, 1), x)

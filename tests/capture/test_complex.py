"""Complex numbers between two views, the squared error of two tensors, and gated linear units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from graphopt import reports
from tests.capture.helpers import check

TOKENS, HEADS, PAIRS = 6, 3, 4
X = torch.randn(2, TOKENS, HEADS, 2 * PAIRS, generator=torch.Generator().manual_seed(0))
ANGLES = torch.randn(TOKENS, PAIRS, generator=torch.Generator().manual_seed(1))


def as_complex(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


def rotated(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(as_complex(x) * table[None, :, None]).flatten(3)


PAIRWISE: list[Callable[[torch.Tensor, torch.Tensor], Any]] = [
    lambda x, a: rotated(x, torch.polar(torch.ones_like(a), a)),
    lambda x, a: rotated(x, torch.polar(torch.ones_like(a), a) * 1.5),
    lambda x, a: rotated(x, torch.complex(a, a.neg())),
    lambda x, a: rotated(x, torch.polar(a, a) * (0.5 - 2j)),
    lambda x, a: rotated(x.transpose(1, 2).contiguous().transpose(1, 2), torch.polar(a, a)),
    lambda x, a: torch.view_as_real(as_complex(x).transpose(1, 2)[:, :, 1:] * as_complex(x)[:, :1].transpose(1, 2)),
    lambda x, a: torch.view_as_real(torch.complex(a, a)[:, None] * as_complex(x)),
]


VIEWED, POLAR, COMPLEX, READ = (f"aten.{name}.default" for name in ("view_as_complex_copy", "polar", "complex", "view_as_real_copy"))
WRITTEN = [(POLAR, VIEWED), (POLAR, VIEWED), (COMPLEX, VIEWED), (POLAR, VIEWED), (POLAR, VIEWED), (VIEWED,), (COMPLEX, VIEWED)]


def left() -> list[str]:
    """ATen operators that are called."""
    return [f.op for r in reports() for f in r.fallbacks if f.op.startswith("aten.")]


@pytest.mark.parametrize("fn, written", list(zip(PAIRWISE, WRITTEN, strict=True)), ids=range(len(PAIRWISE)))
def test_pairs_of_real_numbers(fn: Callable[[torch.Tensor, torch.Tensor], Any], written: tuple[str, ...]) -> None:
    """What makes complex numbers stands in the captured graph, and nobody reads it."""
    infinite = X.index_fill(3, torch.tensor([1]), float("inf"))  # times a number with both parts: nan where eager has it
    for x, angles in ((X, ANGLES), (X.double(), ANGLES.double()), (infinite, ANGLES)):
        check(fn, x, angles, library=written)
        assert not left()


def test_a_table_of_complex_numbers_is_viewed_once() -> None:
    check(rotated, X, torch.polar(torch.ones_like(ANGLES), ANGLES), library=(VIEWED, READ))
    assert left() == [READ]


def test_what_begins_as_complex_is_left_to_the_library() -> None:
    check(lambda z: torch.view_as_real(z * z), torch.complex(ANGLES, ANGLES), library=(READ,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gated_linear_units(dtype: torch.dtype) -> None:
    for dim in (-1, 0):
        check(lambda x, dim=dim: F.glu(x, dim), X.to(dtype))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_squared_error(reduction: str) -> None:
    for x, y in ((X, X.flip(0)), (X[0, 0, 0, 0], X[1, 0, 0, 0]), (X[:0], X[:0])):
        check(lambda x, y: F.mse_loss(x, y, reduction=reduction), x, y)

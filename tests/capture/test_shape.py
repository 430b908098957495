"""Operators that move elements, on awkward sizes and layouts; creation and indexing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.capture.helpers import check, compiled

MOVES: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x[1:, ::2] * 1,
    lambda x: x[:, -2:].neg(),
    lambda x: x[5:].neg(),
    lambda x: x[0].neg(),
    lambda x: x.flip(0, 1),
    lambda x: x.roll(2, 1) + x.roll((1, -1), (0, 1)) + x.roll(3),
    lambda x: torch.cat([x, x[:1].double()], 0),
    lambda x: torch.cat([torch.empty(0), x], 0),
    lambda x: torch.stack([x, x + 1], 1),
    lambda x: F.pad(x, (1, -1, 0, 2), value=3.0),
    lambda x: x.repeat(2, 1, 3),
    lambda x: [p + 1 for p in x.split([1, 2])] + [p + 1 for p in x.chunk(3, 1)] + [p + 1 for p in x.unbind(0)],
    lambda x: x.tril(1) + x.triu(-1),
    lambda x: x.expand(2, *x.shape).permute(2, 0, 1).reshape(-1) + 1,
    lambda x: torch.slice_scatter(x, x[:2] * 2, 0, 1, 3),
    lambda x: torch.select_scatter(x, x[0] * 2, 0, -1),
    lambda x: (torch.zeros_like(x), x.new_ones(2), torch.full((2, 2), 7), torch.eye(3), torch.arange(2, 9, 3), torch.arange(5.0)),
    lambda x: x.unsqueeze(1).squeeze(1).flatten().neg(),
]


@pytest.mark.parametrize("fn", MOVES, ids=range(len(MOVES)))
def test_moves(fn: Callable[[torch.Tensor], Any]) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    for given in (x, x.t().contiguous().t()):
        check(fn, given, **({"library": ("aten.arange.default",)} if fn is MOVES[16] else {}))


def test_zero_sizes_and_scalars() -> None:
    check(lambda x: (x + 1, x.sum(), x.reshape(0, 2), torch.cat([x, x])), torch.empty(0, 4))
    check(lambda x: (x + 1, x.sum(), x.mean(), x.reshape(1, 1), x.expand(2), x.max()), torch.tensor(3.0))


def test_indexing() -> None:
    x, i = torch.arange(12.0).reshape(3, 4), torch.tensor([[0, -1], [2, 1]])
    check(lambda x, i: (x[i], x[:, i], torch.gather(x, 1, i.abs())), x, i)
    check(lambda x, i: (F.embedding(i, x), x.index_select(1, i[0])), x, i.abs())
    check(lambda x, i: x[i, i], x, i)
    check(lambda x: x[torch.arange(3)[:, None, None], torch.arange(2)[None, None, :]], x)


def test_an_index_outside_raises_eagers_error() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    for fn in (lambda x, i: x[i], lambda x, i: F.embedding(i, x), lambda x, i: x.index_select(0, i)):
        with pytest.raises(IndexError):
            compiled(fn)(x, torch.tensor([1, 3]))


def test_dropped_copies_do_not_change_what_library_calls_see() -> None:
    """embedding_bag reads its indices' memory: it must be given the contiguous copy that was traced."""

    def fn(w: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(i, w, torch.tensor([0, 3]), mode="sum")

    check(fn, torch.randn(10, 5), torch.arange(10)[::2], library=("aten._embedding_bag_forward_only.default",))


def test_bits_are_read_in_the_traced_layout() -> None:
    calls = ("aten.view_copy.dtype",)
    check(lambda x: (x.view(torch.int32) + 1, (x + 1).t().contiguous().view(torch.int16)), torch.randn(3, 4), library=calls)

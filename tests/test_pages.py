"""Large pages: tensors side by side, copies where they are needed, memory that goes with the last tensor."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from graphopt import pages
from graphopt.pages import CHUNK, LARGE, PAGE, Pages, uninitialized

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large pages are asked for on Linux")


def test_what_is_contiguous_or_small_is_left_to_torch() -> None:
    own = Pages()
    whole, small = torch.zeros(1024, 1024), torch.randn(8, 4).t()
    assert own.contiguous(whole) is whole
    assert torch.equal(own.contiguous(small), small) and own._chunk is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_large_copy_is_row_major_and_stands_alone(dtype: torch.dtype) -> None:
    own = Pages()
    x = torch.randint(-9, 9, (1024, 1000)).to(dtype).t()
    a, b = own.contiguous(x), own.contiguous(x)
    assert torch.equal(a, x) and a.is_contiguous() and a.data_ptr() % 64 == 0 == b.data_ptr() % 64
    assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()
    b.zero_()
    assert torch.equal(a, x)
    del own, b
    gc.collect()
    assert torch.equal(a, x)  # the chunk lives as long as one of its tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_stack_of_turned_matrices(dtype: torch.dtype) -> None:
    stack = torch.randint(-9, 9, (5, 48, 1100)).to(dtype)
    for x in (stack.permute(0, 2, 1), stack[::2].permute(0, 2, 1), stack[:, :, :1000].permute(0, 2, 1)):
        own = Pages()
        a = own.contiguous(x)
        assert torch.equal(a, x) and a.is_contiguous() and (own._chunk is not None) == (x.numel() * x.itemsize >= LARGE)


def test_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "CHUNK", LARGE)
    own = Pages()
    a = own.empty(torch.Size([2 * LARGE]), torch.uint8)
    b = own.empty(torch.Size([LARGE]), torch.uint8)
    a.fill_(1), b.fill_(2)
    assert int(a.sum()) == 2 * LARGE and CHUNK > LARGE


def test_an_arena_begins_at_a_large_page() -> None:
    a, small = uninitialized(PAGE // 2 + 1), uninitialized(PAGE // 2 - 1)
    assert a.data_ptr() % PAGE == 0 and a.shape == (PAGE // 2 + 1,) and small.shape == (PAGE // 2 - 1,)
    part = a[64:128].view(torch.float32)
    a.zero_(), part.fill_(1)
    del a
    gc.collect()
    assert part.sum() == 16

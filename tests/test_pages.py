"""Large pages: tensors side by side, copies where they are needed, memory that goes with the last tensor."""

from __future__ import annotations

import ctypes
import gc
import mmap
import time

import pytest
import torch

from graphopt import pages
from graphopt.capture.dynamo import input_names, multiplied
from graphopt.pages import CHUNK, LARGE, PAGE, Pages, Reused, uninitialized

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


def test_only_matrices_that_torch_turns_by_blocks_are_copied_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, of: copies.append(of.dim()) or copy(to, of))
    for shape, copied in (((100, 60, 60), [2] * 100), ((100, 60, 59), [3])):
        x = torch.randn(shape).permute(0, 2, 1)
        copies.clear()
        assert torch.equal(Pages().contiguous(x), x) and copies == copied


def test_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "CHUNK", LARGE)
    own = Pages()
    a = own.empty(torch.Size([2 * LARGE]), torch.uint8)
    b = own.empty(torch.Size([LARGE]), torch.uint8)
    a.fill_(1), b.fill_(2)
    assert int(a.sum()) == 2 * LARGE and CHUNK > LARGE


def test_what_is_touched_ahead_holds_what_is_written_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[int] = []
    write = ctypes.memset

    def slow(at: int, value: int, count: int) -> None:
        time.sleep(2e-3)  # as long as a host may take for a page
        touched.append(at)
        write(at, value, count)

    monkeypatch.setattr(ctypes, "memset", slow)
    own = Pages(ahead=32 * PAGE)
    assert own._ahead is not None and own._chunk is not None
    threads, chunk = own._ahead.threads, ctypes.addressof(ctypes.c_char.from_buffer(own._chunk))
    made = []
    for i in range(1, 12):
        made.append(own.empty(torch.Size([3 * PAGE]), torch.uint8).fill_(i))
        time.sleep(2e-3)
    assert {int(x.min()) for x in made} == set(range(1, 11)) | {11} and all(int(x.max()) == i for i, x in enumerate(made, 1))
    within = [x for x in made if chunk <= x.data_ptr() < chunk + 32 * PAGE]
    assert len(within) == 10 and all(x.data_ptr() == chunk + i * 3 * PAGE for i, x in enumerate(within))
    assert own._ahead is None and not any(t.is_alive() for t in threads), "what does not fit ends it"
    assert touched and len(set(touched)) == len(touched)


def test_what_was_touched_for_nothing_is_given_back() -> None:
    own = Pages(ahead=32 * PAGE)
    assert own._ahead is not None and own._chunk is not None
    threads, chunk = own._ahead.threads, own._chunk
    kept = own.empty(torch.Size([PAGE]), torch.uint8).fill_(7)
    last = ctypes.c_char.from_buffer(chunk, 31 * PAGE)
    for thread in threads:
        thread.join()
    last.value = b"x"
    own.end()
    own.end()
    assert last.value == b"\0" and int(kept.sum()) == 7 * PAGE, "fresh memory there, and what was handed out as it was"
    assert own.empty(torch.Size([PAGE]), torch.uint8).data_ptr() != kept.data_ptr() + PAGE


def test_touching_ends_with_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "memset", lambda *_: time.sleep(1e-3))
    own = Pages(ahead=1 << 29)
    assert own._ahead is not None
    threads = own._ahead.threads
    del own
    gc.collect()
    for thread in threads:
        thread.join(5)
    assert not any(t.is_alive() for t in threads)


def test_little_memory_is_not_touched_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Pages(ahead=pages.AHEAD[0] - 1)._ahead is None
    monkeypatch.setattr(pages, "available_memory", lambda: 1 << 26)
    assert Pages(ahead=1 << 30)._ahead is None, "an eighth of what is available at most"


def test_an_arena_begins_at_a_large_page() -> None:
    a, small = uninitialized(PAGE // 2 + 1), uninitialized(PAGE // 2 - 1)
    assert a.data_ptr() % PAGE == 0 and a.shape == (PAGE // 2 + 1,) and small.shape == (PAGE // 2 - 1,)
    part = a[64:128].view(torch.float32)
    a.zero_(), part.fill_(1)
    del a
    gc.collect()
    assert part.sum() == 16


def test_memory_of_results_is_taken_again_when_nothing_refers_to_it() -> None:
    own = Reused()
    shape, strides = (1024, 1024), (1, 1024)
    a = own.empty_strided(shape, strides, torch.float32)
    b = own.empty_strided(shape, strides, torch.float32)
    assert a.shape == shape and a.stride() == strides and not a._is_view() and a.data_ptr() % PAGE == 0 and a.data_ptr() != b.data_ptr()
    a.fill_(1), b.fill_(2)
    part, place = a[3], a.data_ptr()
    del a
    c = own.empty_strided(shape, strides, torch.float32).fill_(3)
    assert part.sum() == 1024 and c.data_ptr() not in (place, b.data_ptr())  # a part keeps the whole
    del part
    gc.collect()
    other = own.empty_strided((1024, 512), (512, 1), torch.bfloat16)  # another size
    assert other.data_ptr() != place
    d = own.empty_strided((1 << 19,), (1,), torch.float64)
    assert d.data_ptr() == place and float(b.sum()) == 2 << 20 and float(c.sum()) == 3 << 20
    del own
    gc.collect()
    d.fill_(4)
    assert float(b.sum()) == 2 << 20 and float(d.sum()) == 4 << 19  # tensors outlive who gave them their memory


def test_few_blocks_are_kept() -> None:
    own = Reused()
    many = [own.empty_strided((PAGE,), (1,), torch.uint8) for _ in range(5)]
    assert len({x.data_ptr() for x in many}) == 5
    del many
    gc.collect()
    assert [len(spare) for spare in own._spare.values()] == [Reused.SPARE] and not own._lent


def test_a_result_may_be_written_to_where_gradients_are_wanted() -> None:
    with torch.no_grad():
        x = Reused().empty_strided((PAGE // 4,), (1,), torch.float32).zero_()
    w = torch.ones((), requires_grad=True)
    x.add_(w)
    x.sum().backward()
    assert w.grad == PAGE // 4


@pytest.mark.parametrize(("rows", "dynamic", "expected"), [(1, False, ["conv"]), (5, False, ["conv", "fc"]), (5, True, ["conv", "fc"])])
def test_memory_is_got_ready_for_what_may_be_packed(rows: int, dynamic: bool, expected: list[str]) -> None:
    """Filters, and matrices that many rows are multiplied with; not an embedding, nor what few rows read in place."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv, self.fc = torch.nn.Embedding(9, 8), torch.nn.Conv1d(8, 8, 1), torch.nn.Linear(8, 6)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(self.table(tokens).mT).mT)

    found: list[list[str]] = []

    def look(gm: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        names = input_names(gm)
        found.append(sorted({names[i].split(".")[-2] for i in multiplied(gm, names)}))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Model(), backend=look, dynamic=dynamic)(torch.zeros(1, rows, dtype=torch.long))
    assert found == [expected]

"""Key-value caches: an argument that is updated by index is written in place where nothing reads what was there, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphopt
from graphopt import clear_reports, reports
from graphopt.in_place import _read_later
from graphopt.ir import Node, parse_graph
from graphopt.lower import LibraryStep, Lowered, ViewStep
from tests.opinfo.harness import copied, difference

pytest.importorskip("tvm_ffi")


def run(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """Compare one call with eager, arguments included; the kinds of the kernels that were made."""
    torch._dynamo.reset()
    clear_reports()
    mine, plain = copied(args), copied(args)
    with torch.no_grad():
        want, got = fn(*plain), torch.compile(fn, backend="graphopt", **kwargs)(*mine)
    text = difference(want, got) or difference(plain, mine)
    assert not text, text
    assert not reports()[-1].unasked_fallbacks, reports()[-1].unasked_fallbacks
    return [k.kind for k in reports()[-1].kernels]


CACHE = (1, 3, 16, 8)


def test_index_copy() -> None:
    def step(cache: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(2, at, k)
        return (cache * 2).sum(2)

    assert "update" in run(step, torch.randn(CACHE), torch.tensor([5]), torch.randn(1, 3, 1, 8))


def test_by_brackets() -> None:
    def step(cache: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> None:
        cache[:, :, at] = k

    assert run(step, torch.randn(CACHE), torch.tensor([5, -1]), torch.randn(1, 3, 2, 8)) == ["update"]


def test_two_indices_see_the_cache_through_a_reshape() -> None:
    def step(cache: torch.Tensor, row: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> None:
        cache[row, at] = k

    assert run(step, torch.randn(4, 16, 8), torch.tensor([0, 3]), torch.tensor([5, 2]), torch.randn(2, 8)) == ["update"]


def test_a_slice() -> None:
    def step(cache: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        cache[:, :, 4:6] = k
        return cache + 1

    assert "update" in run(step, torch.randn(CACHE), torch.randn(1, 3, 2, 8))


def test_two_updates_of_one_cache() -> None:
    def step(cache: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> None:
        cache.index_copy_(2, at, k)
        cache.index_add_(2, at, k)

    assert run(step, torch.randn(CACHE), torch.tensor([5]), torch.randn(1, 3, 1, 8)) == ["update", "update"]


def test_what_was_there_before_is_read_afterwards() -> None:
    def step(cache: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        old = cache * 2
        cache.index_copy_(2, at, k)
        return old.sum(2) + cache.sum(2)

    run(step, torch.randn(CACHE), torch.tensor([5]), torch.randn(1, 3, 1, 8))


def test_an_update_that_reads_what_it_updates() -> None:
    def step(cache: torch.Tensor, at: torch.Tensor) -> None:
        cache.index_copy_(0, at, cache[:3] + 1)

    assert "update" not in run(step, torch.randn(6, 70), torch.tensor([2, 1, 0]))


def test_a_result_of_its_own_is_not_the_argument() -> None:
    def step(cache: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        new = cache.index_copy(2, at, k)
        cache.copy_(new)
        return new

    cache, at, k = torch.randn(CACHE), torch.tensor([5]), torch.randn(1, 3, 1, 8)
    run(step, cache, at, k)
    with torch.no_grad():
        result = torch.compile(step, backend="graphopt")(cache, at, k)
    result.zero_()
    assert torch.equal(cache[:, :, at], k)


def test_another_layout() -> None:
    def step(cache: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> None:
        cache.index_copy_(2, at, k)

    run(step, torch.randn(1, 16, 3, 8).transpose(1, 2), torch.tensor([5]), torch.randn(1, 3, 1, 8))


def test_any_length() -> None:
    def step(cache: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(1, at, k)
        return cache.sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="graphopt", dynamic=True)
    for n, m in ((16, 2), (33, 5), (7, 7)):
        cache, at, k = torch.randn(3, n, 8), torch.randperm(n)[:m], torch.randn(3, m, 8)
        mine = cache.clone()
        with torch.no_grad():
            want, got = step(cache, at, k), compiled(mine, at, k)
        torch.testing.assert_close(got, want)
        assert torch.equal(mine, cache)


def test_an_index_out_of_range_leaves_the_cache_alone() -> None:
    def step(cache: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> None:
        cache.index_copy_(2, at, k)

    cache, k = torch.randn(CACHE), torch.randn(1, 3, 1, 8)
    before = cache.clone()
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="graphopt")
    with torch.no_grad():
        for bad in (16, -1):
            with pytest.raises(IndexError):
                compiled(cache, torch.tensor([bad]), k)
    assert torch.equal(cache, before)


def test_a_profile_leaves_the_cache_alone() -> None:
    class Step(torch.nn.Module):
        def forward(self, cache: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            cache.index_copy_(2, at, k)
            return cache.sum(2)

    cache, at, k = torch.randn(CACHE), torch.tensor([5]), torch.randn(1, 3, 1, 8)
    before = cache.clone()
    compiled = graphopt.compile(Step(), (cache, at, k))
    assert torch.equal(cache, before)
    assert "update" in [c.kind for c in compiled.profile(cache, at, k, runs=1).calls]
    assert torch.equal(cache, before)
    torch.testing.assert_close(compiled(cache, at, k), Step()(before, at, k))
    assert torch.equal(cache, before)


def test_a_result_that_is_the_cache() -> None:
    """As docs/runtime.md has it: the argument itself under torch.compile, a copy of it after export."""

    class Step(torch.nn.Module):
        def forward(self, cache: torch.Tensor, at: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return cache.index_copy_(2, at, k)

    args = torch.randn(CACHE), torch.tensor([5]), torch.randn(1, 3, 1, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.compile(Step(), backend="graphopt")(*args) is args[0]
        result = graphopt.compile(Step(), args)(*args)
    assert result is not args[0]
    assert torch.equal(result, args[0])


def test_what_the_update_itself_reads_through_a_view_of_the_cache() -> None:
    graph = parse_graph("""graph @m(%c: f32[8, 4], %i: i64[4], %k: f32[4, 4]) -> (f32[8, 4], f32[8, 4]) {
  %v: f32[4, 4] = slice(%c) {axis = 0, start = 2, stop = 6}
  %a: f32[8, 4] = put(%c, %i, %v) {axis = 0, update = "set"}
  %b: f32[8, 4] = put(%c, %i, %k) {axis = 0, update = "set"}
  return %a, %b
}""")
    view, overlapping, apart = graph.nodes()

    def read(update: Node) -> bool:
        return _read_later(Lowered(graph, [], [], [ViewStep(view), LibraryStep(update, "")]), graph.inputs[0], 1)

    assert read(overlapping)
    assert not read(apart)

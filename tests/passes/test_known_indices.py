"""known-indices: what a known index selects is read as slices; and which indices stay."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.ir import parse_graph
from graphopt.passes.simplify import KnownIndices
from graphopt.passes.simplify.known_indices import cut
from graphopt.rewrite import PassContext
from graphopt.target import Target
from graphopt.testing import check_pass

REFLECTED = """graph @g(%x: f32[B, 6]) -> f32[B, 11]
where 1 <= B {
  %i: i64[11] = iota() {size = 11, start = -2}
  %last: i64[] = constant() {value = 5, dtype = i64}
  %0: i64[11] = abs(%i)
  %1: i64[11] = sub(%last, %0)
  %2: i64[11] = abs(%1)
  %3: i64[11] = sub(%last, %2)
  %4: f32[B, 11] = take(%x, %3) {axis = -1, clip = true}
  return %4
}"""
CLIPPED = """graph @g(%x: f32[3, B]) -> f32[7, B]
where 1 <= B {
  %i: i64[7] = iota() {size = 7, start = -2}
  %0: f32[7, B] = take(%x, %i) {axis = 0, clip = true}
  return %0
}"""


def test_reflections_and_borders() -> None:
    check_pass(KnownIndices(), REFLECTED, """graph @g(%x: f32[B, 6]) -> f32[B, 11]
    where 1 <= B {
      %0: f32[B, 3] = slice(%x) {axis = 1, start = 0, stop = 3}
      %1: f32[B, 3] = flip(%0) {axes = [1]}
      %2: f32[B, 5] = slice(%x) {axis = 1, start = 1, stop = 6}
      %3: f32[B, 3] = slice(%x) {axis = 1, start = 2, stop = 5}
      %4: f32[B, 3] = flip(%3) {axes = [1]}
      %5: f32[B, 11] = concat(%1, %2, %4) {axis = 1}
      return %5
    }""")  # fmt: skip
    check_pass(KnownIndices(), CLIPPED, """graph @g(%x: f32[3, B]) -> f32[7, B]
    where 1 <= B {
      %0: f32[1, B] = slice(%x) {axis = 0, start = 0, stop = 1}
      %1: f32[3, B] = broadcast_to(%0) {shape = [3, B]}
      %2: f32[2, B] = slice(%x) {axis = 0, start = 1, stop = 3}
      %3: f32[1, B] = slice(%x) {axis = 0, start = 2, stop = 3}
      %4: f32[2, B] = broadcast_to(%3) {shape = [2, B]}
      %5: f32[7, B] = concat(%1, %2, %4) {axis = 0}
      return %5
    }""")  # fmt: skip


@pytest.mark.parametrize(
    "why, before",
    [
        ("it is out of bounds, which is an error", CLIPPED.replace("clip = true", "clip = false")),
        ("it depends on an input", CLIPPED.replace("B]) ->", "B], %n: i64[7]) ->").replace("take(%x, %i)", "take(%x, %n)")),
        ("the axis is of unknown size", CLIPPED.replace("%x: f32[3, B]", "%x: f32[B, B]")),
        ("it is a number that only a run knows", CLIPPED.replace("start = -2", "start = B")),
        ("it moves whole rows", CLIPPED.replace(", B]", ", 64]").replace("where 1 <= B ", "").replace("\n    where 1 <= B", "")),
        ("it goes more ways than there should be loops", CLIPPED.replace("-2}", "-2, step = 3}").replace("f32[3,", "f32[30,")),
    ],
)  # fmt: skip
def test_what_stays(why: str, before: str) -> None:
    check_pass(KnownIndices(), before, fires=False)


def test_gpus_look_it_up() -> None:
    g = parse_graph(REFLECTED)
    assert not KnownIndices().run(g, PassContext(target=Target.from_name("cuda:sm_90")))


def test_stretches() -> None:
    assert cut([2, 1, 0, 1, 2, 1]) == [[2, 1, 0], [1, 2], [1]]
    assert cut([0, 0, 0, 1, 2, 2]) == [[0, 0, 0], [1, 2], [2]]
    assert cut([5]) == [[5]] and cut([0, 2, 4]) == [[0], [2], [4]]


@pytest.mark.tvm
@pytest.mark.parametrize("mode", ["replicate", "reflect"])
def test_three_axes_are_padded_by_one_kernel(mode: str) -> None:
    """Rows of 64 elements and more are taken as they are; shorter ones, and the last axis, in parts."""
    for shape in ((1, 3, 4, 5, 64), (2, 3, 7, 9, 11)):
        x = torch.randn(shape)
        torch._dynamo.reset()
        got = torch.compile(lambda x: torch.nn.functional.pad(x, (2, 1, 1, 3, 2, 1), mode=mode), backend="graphopt")(x)
        assert torch.equal(got, torch.nn.functional.pad(x, (2, 1, 1, 3, 2, 1), mode=mode))
        if shape[-1] == 64:
            assert len(graphopt.reports()[-1].kernels) == 1

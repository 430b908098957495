"""Indices out of range that nobody waits for: when they are raised, that they are raised once, and what is said."""

from __future__ import annotations

import gc

import pytest
import torch

import graphopt
from graphopt.bounds import index_checks
from graphopt.index_flags import Checked, IndexFlags
from graphopt.ir import parse_graph

CPU = torch.device("cpu")
CHECKS = [Checked("take", "model.py:3", IndexError), Checked("scatter", "", RuntimeError)]


def look(index: torch.Tensor, found: torch.Tensor, row: int, low: int, high: int) -> None:
    assert index.is_contiguous()
    bad = [i for i in index.flatten().tolist() if not low <= i < high]
    if bad:
        found[row : row + 4] = torch.tensor([1, bad[0], low, high])
        found[0] = 1


def test_one_that_is_done_is_raised_by_its_own_call() -> None:
    flags = IndexFlags(look, CHECKS, CPU, late=False)
    check = flags.checking(look)
    for ok in ([0, 4], [-5, 2], []):
        check(torch.tensor(ok), -5, 5, 0)
        flags.fetch()
        flags.raise_found()
    check(torch.tensor([[1, 2], [5, 3]]).t(), -5, 5, 0)
    with pytest.raises(IndexError, match=r"^index out of range in take \(model.py:3\): 5 is not within -5 .. 4$"):
        flags.raise_found()
    flags.raise_found()  # once
    check(torch.tensor([7]), 0, 7, 1)
    with pytest.raises(RuntimeError, match=r"^index out of range in scatter: 7 is not within 0 .. 6$"):
        flags.raise_found()


def test_one_that_is_late_is_raised_by_a_call_that_sees_it() -> None:
    flags = IndexFlags(look, CHECKS, CPU, late=True)
    check = flags.checking(look)
    check(torch.tensor([9]), 0, 5, 0)
    flags.raise_found()  # the copy is behind the kernel: nothing has come yet
    flags.fetch()
    with pytest.raises(IndexError, match=r"9 is not within 0 .. 4; found in an earlier call"):
        flags.raise_found()
    flags.fetch()
    flags.raise_found()


def test_who_waits_is_told() -> None:
    flags = IndexFlags(look, CHECKS, CPU, late=True)
    graphopt.check_indices()
    flags.checking(look)(torch.tensor([9]), 0, 5, 0)
    with pytest.raises(IndexError, match="9 is not within"):
        graphopt.check_indices()
    graphopt.check_indices()


def test_an_axis_without_elements_has_no_index() -> None:
    flags = IndexFlags(look, CHECKS, CPU, late=True)
    flags.checking(look)(torch.tensor([], dtype=torch.int64), 0, 0, 0)
    with pytest.raises(IndexError, match="an axis without elements"):
        flags.checking(look)(torch.tensor([0]), 0, 0, 0)


def test_what_nobody_came_to_raise_is_a_warning() -> None:
    flags = IndexFlags(look, CHECKS, CPU, late=True)
    flags.checking(look)(torch.tensor([9]), 0, 5, 0)
    flags.fetch()
    with pytest.warns(UserWarning, match="9 is not within 0 .. 4; no later call was there to raise it"):
        del flags
        gc.collect()


def test_a_check_names_the_operation_and_one_index_is_looked_at_once() -> None:
    checks = index_checks(parse_graph("""graph @g(%x: f32[5, 4], %y: f32[5], %i: i64[3]) -> (f32[3, 4], f32[3]) {
      %0: f32[3, 4] = take(%x, %i)
      %1: f32[3] = take(%y, %i)
      return %0, %1
    }"""))
    assert checks is not None and len(checks) == 1 and checks[0].node is not None and checks[0].node.op.name == "take"

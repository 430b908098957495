"""Taking turns: order, an early end for the hopeless, and as many pairs as the floor asks for, however many are timed together."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from graphopt.autotune.turns import CANDIDATE, INCUMBENT, LEAST_PAIRS, PROBED_PAIRS, Disturbed, calls_of_a_slice, take_turns


class Clock:
    """Kernels that always take as long; what was asked for."""

    def __init__(self, candidate: float, incumbent: float) -> None:
        self.seconds = {CANDIDATE: candidate, INCUMBENT: incumbent}
        self.asked: list[list[int]] = []

    def __call__(self, turns: Sequence[int]) -> list[float]:
        self.asked.append(list(turns))
        return [self.seconds[which] for which in turns]


@pytest.mark.parametrize("together", [1, 64])
def test_pairs_alternate_until_the_floor_is_reached(together: int) -> None:
    clock = Clock(1e-4, 1e-4)
    candidate, incumbent = take_turns(clock, 10, 0.02, 1.15, alone=False, together=together, waited=float)
    assert len(candidate) == len(incumbent) == 10  # of 2 ms each
    turns = [which for asked in clock.asked for which in asked]
    assert turns == [INCUMBENT, CANDIDATE, CANDIDATE, INCUMBENT] * 5
    assert len(clock.asked) == (10 if together == 1 else 2)


@pytest.mark.parametrize("together", [1, 64])
def test_a_hopeless_one_is_given_up(together: int) -> None:
    assert len(take_turns(Clock(2e-4, 1e-4), 10, 1.0, 1.15, alone=False, together=together, waited=float)[0]) == PROBED_PAIRS
    assert len(take_turns(Clock(9e-4, 1e-4), 10, 1.0, 1.15, alone=False, waited=float)[0]) == 1


def test_a_long_one_is_timed_a_few_times_and_one_alone_has_no_pairs() -> None:
    assert len(take_turns(Clock(0.03, 0.03), 1, 0.02, 1.15, alone=False, together=64, waited=float)[0]) == LEAST_PAIRS - 1
    candidate, incumbent = take_turns(Clock(1e-3, 0.0), 1, 0.02, 1.15, alone=True, waited=float)
    assert (len(candidate), incumbent) == (20, [])


def test_pairs_in_which_a_thread_waited_for_a_processor_do_not_count() -> None:
    """Threads that share a processor by turns of milliseconds: a serial candidate feels nothing of it, and must not win by it."""
    waited = 0.0
    asked = 0

    def timed(turns: Sequence[int]) -> list[float]:
        nonlocal waited, asked
        asked += 1
        if asked in (1, 2, 5):
            waited += 4e-3
            return [2e-5 if which == CANDIDATE else 8e-4 for which in turns]
        return [2e-5 if which == CANDIDATE else 1e-5 for which in turns]

    candidate, incumbent = take_turns(timed, 10, 0.02, 10.0, alone=False, waited=lambda: waited)
    assert set(candidate) == {2e-5} and set(incumbent) == {1e-5} and len(candidate) == asked - 3


@pytest.mark.parametrize(("delay", "quiet", "alone", "counts"), [
    (4e-3, 0, True, False), (4e-3, 2, True, False), (4e-3, 3, False, True), (5e-4, 0, True, True), (1e-3, 0, False, False)])  # fmt: skip
def test_where_threads_wait_all_the_time(delay: float, quiet: int, alone: bool, counts: bool) -> None:
    """Three quiet times are enough; what is timed alone may be disturbed by little; else nobody knows how long it takes."""
    waited, asked = 0.0, 0

    def timed(turns: Sequence[int]) -> list[float]:
        nonlocal waited, asked
        asked += 1
        if asked <= quiet:
            return [1e-3] * len(turns)
        waited += delay
        return [2e-3] * len(turns)

    def race() -> list[float]:
        return take_turns(timed, 1, 0.02, 1.15, alone=alone, waited=lambda: waited)[0]

    if counts:
        assert set(race()) == {1e-3 if quiet else 2e-3}
    else:
        with pytest.raises(Disturbed) as told:
            race()
        assert f"in {asked - quiet} of the {asked} times" in str(told.value)


def test_calls_of_a_slice() -> None:
    assert calls_of_a_slice([1e-5, 2e-5], 3e-4) == 30
    assert calls_of_a_slice([1e-5, 1e-3], 3e-4) == 3  # of the slow one no more than ten times as long
    assert calls_of_a_slice([1.0], 3e-4) == 1
    assert calls_of_a_slice([0.0], 3e-4) == 1024

"""Taking turns: how long a candidate and the incumbent are timed side by side, and when one is given up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from graphopt.run_delay import Undisturbed, run_delay

LEAST_PAIRS = 5
PROBED_PAIRS = 3  # after so many pairs a hopeless candidate is given up
DROPPED, DROPPED_ALONE = 5.0, 50.0  # floors of disturbed pairs that are dropped at most; what is timed alone is what all others are told in
CANDIDATE, INCUMBENT = 0, 1


def take_turns(timed: Callable[[Sequence[int]], Sequence[float]], calls: int, floor: float, hopeless: float, *, alone: bool,
               together: int = 1, waited: Callable[[], float] = run_delay) -> tuple[list[float], list[float]]:  # fmt: skip
    """Time a candidate in turns with the incumbent: A B, B A, A B ... Pairs in which a thread waited for a processor are dropped.

    Args:
        timed: whose turns (``CANDIDATE``, ``INCUMBENT``) -> seconds of a call in each.
        calls: of a turn.
        floor, hopeless: see :class:`~graphopt.autotune.measure.Timing`.
        alone: there is no incumbent.
        together: pairs at most that are timed before anything is decided.
        waited: seconds that threads which run them have waited for processors so far.

    Returns:
        The candidate's times and the incumbent's, pair by pair.
    """
    times: tuple[list[float], list[float]] = ([], [])
    total, pairs = 0.0, 0
    undisturbed = Undisturbed(floor * (DROPPED_ALONE if alone else DROPPED), waited)
    while pairs < PROBED_PAIRS or (pairs < LEAST_PAIRS and total < 10 * floor) or total < floor:
        left = PROBED_PAIRS - pairs if pairs < PROBED_PAIRS else math.ceil((floor - total) * pairs / max(total, 1e-9))
        turns: list[int] = []
        for pair in range(pairs, pairs + max(1, min(together, left))):
            turns += [CANDIDATE] if alone else [CANDIDATE, INCUMBENT] if pair % 2 else [INCUMBENT, CANDIDATE]
        taken = timed(turns)
        if not undisturbed.counts(sum(taken) * calls):
            continue
        for which, seconds in zip(turns, taken, strict=True):
            times[which].append(seconds)
            total += seconds * calls
        pairs = len(times[CANDIDATE])
        if not alone and pairs >= PROBED_PAIRS and min(times[0]) > hopeless * sorted(times[1])[pairs // 2]:
            break
        if not alone and min(times[0]) > 4 * hopeless * max(times[1]):
            break
    return times


def calls_of_a_slice(times: Sequence[float], seconds: float) -> int:
    """Calls between two readings of the clock, of kernels of which a call takes so long: few of a pair of which one takes long."""
    wanted, most = seconds / max(min(times), 1e-9), 10 * seconds / max(*times, 1e-9)
    return max(1, min(1024, round(min(wanted, most))))

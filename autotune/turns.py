"""Taking turns: how long a candidate and the incumbent are timed side by side, and when one is given up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from graphopt.run_delay import Undisturbed, run_delay

LEAST_PAIRS = 5
PROBED_PAIRS = 3  # after so many pairs a hopeless candidate is given up
PATIENCE, PATIENCE_ALONE = 0.5, 2.0  # seconds of disturbed pairs; what is timed alone is what all others are told in
LEAST_DISTURBED = 10  # pairs
CANDIDATE, INCUMBENT = 0, 1


class Disturbed(Exception):
    """Threads waited for processors nearly all the time: nobody knows how long a kernel takes."""


def take_turns(timed: Callable[[Sequence[int]], Sequence[float]], calls: int, floor: float, hopeless: float, *, alone: bool,
               tolerable: float = 0.3, together: int = 1,
               waited: Callable[[], float] = run_delay) -> tuple[list[float], list[float]]:  # fmt: skip
    """Time a candidate in turns with the incumbent: A B, B A, A B ... Pairs in which a thread waited for a processor do not count.

    Args:
        timed: whose turns (``CANDIDATE``, ``INCUMBENT``) -> seconds of a call in each.
        calls: of a turn.
        floor, hopeless, tolerable: see :class:`~graphopt.autotune.measure.Timing`.
        alone: there is no incumbent.
        together: pairs at most that are timed before anything is decided.
        waited: seconds that threads which run them have waited for processors so far.

    Returns:
        The candidate's times and the incumbent's, pair by pair.

    Raises:
        Disturbed: too few pairs count.
    """
    groups = Undisturbed[list[tuple[int, float]]](PATIENCE_ALONE if alone else PATIENCE, waited)
    times: tuple[list[float], list[float]] = ([], [])
    total, pairs, quiet = 0.0, 0, 0
    while pairs < PROBED_PAIRS or (pairs < LEAST_PAIRS and total < 10 * floor) or total < floor:
        left = PROBED_PAIRS - pairs if pairs < PROBED_PAIRS else math.ceil((floor - total) * pairs / max(total, 1e-9))
        turns: list[int] = []
        for pair in range(pairs, pairs + max(1, min(together, left))):
            turns += [CANDIDATE] if alone else [CANDIDATE, INCUMBENT] if pair % 2 else [INCUMBENT, CANDIDATE]
        group = list(zip(turns, timed(turns), strict=True))
        groups.add(sum(seconds for _, seconds in group) * calls, group)
        if len(groups.quiet) == quiet:
            if groups.hopeless and len(groups.rest) >= LEAST_DISTURBED:
                return times if pairs >= PROBED_PAIRS else _tolerable(groups, tolerable if alone or tolerable >= 1.0 else 0.0)
            continue
        quiet += 1
        for which, seconds in group:
            times[which].append(seconds)
            total += seconds * calls
        pairs = len(times[CANDIDATE])
        if not alone and pairs >= PROBED_PAIRS and min(times[0]) > hopeless * sorted(times[1])[pairs // 2]:
            break
        if not alone and min(times[0]) > 4 * hopeless * max(times[1]):
            break
    return times


def _tolerable(groups: Undisturbed[list[tuple[int, float]]], most: float) -> tuple[list[float], list[float]]:
    """The pairs that were disturbed by little, with those that were not at all. Raises Disturbed."""
    little = [group for share, group in groups.rest if share <= most]
    found = [turn for group in (*groups.quiet, *little) for turn in group]
    times = [s for which, s in found if which == CANDIDATE], [s for which, s in found if which == INCUMBENT]
    if len(times[CANDIDATE]) < PROBED_PAIRS:
        tried = len(groups.rest) + len(groups.quiet)
        raise Disturbed(f"threads waited for processors in {len(groups.rest)} of the {tried} times that it was timed")
    return times


def calls_of_a_slice(times: Sequence[float], seconds: float) -> int:
    """Calls between two readings of the clock, of kernels of which a call takes so long: few of a pair of which one takes long."""
    wanted, most = seconds / max(min(times), 1e-9), 10 * seconds / max(*times, 1e-9)
    return max(1, min(1024, round(min(wanted, most))))

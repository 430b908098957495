"""Similar workloads: the same operations on the same types and ranks, of other sizes.

What was found for one is worth trying first on another: nothing more is claimed. The structure of a workload is its text with
all numbers blanked that stand for sizes: those in types, and in attributes that repeat sizes (``shape = [8, 96]``, ``stop = 96``).
Numbers that say what is computed (axes, permutations, strides of a convolution) stay.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

from graphopt.autotune.space import Workload

_SIZED = re.compile(r"\b(?:[a-z]+\d+\w*\[[^\]]*\]|(?:shape|sizes|size|start|stop|pads|low|high) = (?:\[[^\]]*\]|\d+)|where [^{]*)")
_NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")


def structure(w: Workload) -> str:
    """The text without its sizes, headed by the kind."""
    return f"{w.kind}\n" + _SIZED.sub(lambda m: _NUMBER.sub("#", m[0]), w.text)


@lru_cache(maxsize=4096)
def sizes(w: Workload) -> tuple[int, ...]:
    """The numbers that ``structure`` blanks, in order."""
    return tuple(int(n) for m in _SIZED.finditer(w.text) for n in _NUMBER.findall(m[0]))


def distance(a: Workload, b: Workload) -> float:
    """How far apart the sizes of two workloads of one structure are: the sum of |log2 of their ratios|; 0 for equal ones."""
    return math.fsum(abs(math.log2(max(x, 1) / max(y, 1))) for x, y in zip(sizes(a), sizes(b), strict=True))

"""How tests time kernels: the machine is busy with other tests, and what is tested is not how fast anything is."""

from __future__ import annotations

from typing import Any

from graphopt.autotune.measure import Timing


def timing(**changed: Any) -> Timing:
    """Timing that takes whatever it gets, however long threads waited for processors."""
    return Timing(**{"slowed": 1e9, "tolerable": 1e9, **changed})

"""Resident memory of this process, as Linux counts it: now, and the highest since the count was reset. 0 elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def settle() -> int:
    """Give back what is free, and return the resident bytes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """Count the peak from now on. Where that cannot be done the peak is that of the whole process."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def peak() -> int:
    """Highest resident bytes since :func:`reset_peak`."""
    return _status("VmHWM")


def _status(key: str) -> int:
    try:
        line = next(x for x in STATUS.read_text().splitlines() if x.startswith(f"{key}:"))
        return int(line.split()[1]) << 10
    except (OSError, ValueError, StopIteration):
        return 0

"""The OpenMP that PyTorch runs on: its library, and the processors that this process may use.

With ``OMP_PROC_BIND`` set, libgomp binds the thread that loads it to the first place. From then on that thread's mask names one
processor, and so do those of the processes that it starts, while OpenMP's threads have them all: whoever asks for the mask is misled.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch


def find_libgomp() -> str | None:
    """The libgomp that torch runs on: the one mapped into this process, else the one torch ships."""
    try:
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if "libgomp" in path and path.startswith("/"):
                return path
    except OSError:
        pass
    for file in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        return str(file)
    return None


@cache
def usable_processors() -> frozenset[int]:
    """Numbers of the processors that this process may use, as the system counts them, whatever its threads are bound to."""
    if not hasattr(os, "sched_getaffinity"):
        return frozenset(range(os.cpu_count() or 1))
    return frozenset(os.sched_getaffinity(0)) | _places()


def unbound() -> str:
    """The first statements of a Python process that is to have all of them."""
    if not hasattr(os, "sched_setaffinity"):
        return ""
    return f"import os; os.sched_setaffinity(0, {sorted(usable_processors())}); "


def _places() -> frozenset[int]:
    """The processors of OpenMP's places; none where threads are not bound."""
    path = find_libgomp()
    if path is None:
        return frozenset()
    library = ctypes.CDLL(path)
    found = set[int]()
    for place in range(library.omp_get_num_places()):
        numbers = (ctypes.c_int * library.omp_get_place_num_procs(place))()
        library.omp_get_place_proc_ids(place, numbers)
        found.update(numbers)
    return frozenset(found)

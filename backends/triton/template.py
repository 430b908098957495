"""What a kernel template is, and what the spaces of several have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.autotune.space import Constraint, Param, Schedule, SearchSpace, Workload
from graphopt.backends.base import KernelSource
from graphopt.backends.triton.code import Code, Launch
from graphopt.backends.triton.matmul import LEAST
from graphopt.ir import dims
from graphopt.target import Target

LANES = 8  # elements that one thread holds of a tile, at most, by default
PIECES = (1, 2, 4, 8, 16, 32, 64, 128)  # of a product's depth


@dataclass(frozen=True)
class Template:
    """A kernel family of the backend.

    Attributes:
        name: as in ``Schedule.template``.
        takes: why a region is not for this template, or None if it is.
        spaces_of: the schedules by structure; that of the default first.
        write: (workload, schedule, target) -> the lines of the kernel, and its launch.
    """

    name: str
    takes: Callable[[Workload, Target], str | None]
    spaces_of: Callable[[Workload, Target], tuple[SearchSpace, ...]]
    write: Callable[[Workload, Schedule, Target], tuple[Code, Launch]]

    def space(self, w: Workload, t: Target) -> SearchSpace:
        """The space whose default needs no tuning."""
        return self.spaces(w, t)[0]

    def spaces(self, w: Workload, t: Target) -> tuple[SearchSpace, ...]:
        """All schedules, the space of the default first."""
        return self.spaces_of(w, t)

    def emit(self, w: Workload, s: Schedule, t: Target) -> KernelSource:
        """The kernel as a file of Python. Pure: needs neither a device nor triton."""
        code, launch = self.write(w, s, t)
        return code.source(entry_name(w, s, t), w, s, t, launch)


def entry_name(w: Workload, s: Schedule, t: Target) -> str:
    """Name of a kernel, unique by workload, schedule and target."""
    digest = hashlib.sha256(f"{w.kind}\n{w.text}\n{s.to_json()}\n{t.fingerprint}".encode()).hexdigest()[:16]
    return f"{w.kind}_{digest}"


def first(default: int, choices: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys((default, *choices)))


def largest(n: dims.Dim, otherwise: int) -> int:
    return n if isinstance(n, int) else otherwise


def lanes_fit(t: Target) -> Constraint:
    most = 64  # registers of a thread that one value may take

    def holds(k: Mapping[str, Any]) -> bool:
        return bool(k["rows"] * k["columns"] <= most * t.warp * k["warps"])

    return Constraint(f"more than {most} elements a thread", holds)


def pieces_of(programs: int, nbytes: int, piece: int, t: Target) -> int:
    """Pieces of a depth of so many bytes by default: as many as give each processor a program, where half of them or more have none.

    A depth of eight pieces is taken to be long enough for a second kernel to pay.
    """
    if 2 * programs > t.cores or nbytes < 8 * piece:
        return 1
    return max(n for n in PIECES if n * programs <= t.cores and n * piece <= nbytes)


def divide(default: int, depth: dims.Dim, block: str = "k") -> tuple[Param, Constraint]:
    """The knob that divides a depth, or keys, in blocks of a size that is the knob ``block``; and that no piece is empty."""
    size = largest(depth, 1 << 30)

    def full(s: Mapping[str, Any]) -> bool:
        return bool((s["pieces"] - 1) * s[block] < size)

    choices = tuple(n for n in PIECES if (n - 1) * LEAST < size)
    return Param("pieces", first(default, choices), "tile"), Constraint("a piece would be empty", full)


READS = Param("reads", ("pointers", "descriptors"))


def readable(t: Target, what: str, lies_so: Callable[[], bool]) -> tuple[Constraint, ...]:
    """When tiles cannot be read by descriptor.

    Args:
        what: would be.
        lies_so: whether some of it lies in memory as descriptors need it.
    """
    if not t.has("tma"):
        why = f"{t.arch} copies no tiles by descriptor"
    elif not lies_so():
        why = f"no {what} in memory in rows of whole 16 bytes"
    else:
        return ()
    return (Constraint(why, lambda s: s["reads"] == "pointers"),)

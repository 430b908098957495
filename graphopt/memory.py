"""The buffer plan: which intermediate results share memory.

Greedy by size: the largest buffer first, each at the lowest offset where it meets no buffer that lives at the same time.
Reference: Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", arXiv:2001.03288.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True)
class Lifetime:
    """A buffer of a size in bytes that is written at step ``start`` and read for the last time at step ``end``."""

    size: int
    start: int
    end: int


@dataclass(frozen=True)
class Plan:
    """Offsets in bytes, one a buffer, in an arena of ``peak`` bytes; ``total`` is what it would be without sharing."""

    offsets: tuple[int, ...]
    peak: int
    total: int


def plan(lifetimes: Sequence[Lifetime]) -> Plan:
    """Place buffers so that no two that live at the same time overlap."""
    offsets = [0] * len(lifetimes)
    placed: list[tuple[int, int, Lifetime]] = []  # (offset, end offset, lifetime), sorted by offset
    peak = 0
    for i in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].size, i)):
        life, size = lifetimes[i], _aligned(lifetimes[i].size)
        at = 0
        for low, high, other in placed:
            if other.start > life.end or life.start > other.end:
                continue
            if low - at >= size:
                break
            at = max(at, high)
        offsets[i] = at
        peak = max(peak, at + size)
        placed.append((at, at + size, life))
        placed.sort(key=lambda p: p[0])
    return Plan(tuple(offsets), peak, sum(_aligned(b.size) for b in lifetimes))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

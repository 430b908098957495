"""The kernel that looks for an index out of range, and leaves word of it in memory: nobody waits for it."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit(do_not_specialize=["row", "count", "low", "high"])  # type: ignore[untyped-decorator]
def _look(index, found, row, count, low, high, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(index + i, mask=i < count, other=0).to(tl.int64)
    bad = (i < count) & ((x < low) | (x >= high))
    if tl.max(bad.to(tl.int32), 0) > 0:
        tl.store(found + row + 1, tl.max(tl.where(bad, x, -0x7FFFFFFFFFFFFFFF), 0))
        tl.store(found + row + 2, low)
        tl.store(found + row + 3, high)
        tl.store(found + row, 1)
        tl.store(found, 1)


def launch(index: Any, found: Any, row: int, low: int, high: int) -> None:
    """Look through an index.

    Args:
        index: integers, of any shape, row-major.
        found: i64; ``found[0]`` and ``found[row]`` become 1 where an index is not within ``low .. high - 1``, and the next three one of
            those, ``low`` and ``high``.
    """
    count = index.numel()
    _look[(triton.cdiv(count, _BLOCK),)](index, found, row, count, low, high, BLOCK=_BLOCK, num_warps=4)

"""The machine's limits, measured by kernels of our own: multiply-adds a second, of f32 and on tiles, and bytes read from memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from graphopt.errors import GraphoptError
from graphopt.pages import Pages, available_memory
from graphopt.run_delay import Undisturbed
from graphopt.target import THIRDS_PRODUCTS, Target, detect

MEMORY_BYTES = 1 << 30  # far beyond the last-level cache, where memory allows
STEPS = 1 << 16
TILE_STEPS = 1 << 10


@dataclass(frozen=True)
class Limits:
    """What the machine can do with a number of threads.

    Attributes:
        flops: f32 floating-point operations a second, a multiply-add being two.
        bytes: bytes a second read from memory.
        buffer: bytes of the buffer that was read.
        tiles: bf16 floating-point operations a second on AMX tiles; 0 where there are none.
        disturbed: threads waited for processors all the time: the limits are higher.
    """

    flops: float
    bytes: float
    threads: int
    buffer: int
    tiles: float = 0.0
    disturbed: bool = False

    def least_seconds(self, flops: float, read: float, products: int = 0) -> float:
        """No run can be faster: its arithmetic at full speed, or its bytes, whichever takes longer.

        Args:
            products: of tiles that one of f32 may be summed from, six of thirds or three of halves; 0 if it may not.
        """
        return max(flops / self._peak(products), read / self.bytes)

    def _peak(self, products: int) -> float:
        """f32 floating-point operations a second, if each may be summed from so many products of tiles."""
        return max(self.flops, self.tiles / products if products else 0.0)

    @property
    def by_thirds(self) -> float:
        """f32 floating-point operations a second of products that may be summed from thirds on tiles."""
        return self._peak(THIRDS_PRODUCTS)

    @staticmethod
    def middle(found: Sequence[Limits]) -> Limits:
        """The medians of several measurements of the same machine."""
        flops, read, tiles = (median(getattr(f, name) for f in found) for name in ("flops", "bytes", "tiles"))
        return Limits(flops, read, found[0].threads, found[0].buffer, tiles)

    def best(self, other: Limits) -> Limits:
        """The higher of two measurements of the same machine."""
        return Limits(max(self.flops, other.flops), max(self.bytes, other.bytes), self.threads, self.buffer,
                      max(self.tiles, other.tiles), self.disturbed and other.disturbed)  # fmt: skip


class LimitMeter:
    """Builds the kernels once, and measures as often as it is asked.

    Raises:
        GraphoptError: the kernels cannot be built here (no TVM, or an unknown processor).
    """

    def __init__(self, threads: int) -> None:
        try:
            from graphopt.backends.tvm import peaks
            from graphopt.backends.tvm.build import build_in_process
        except ImportError as error:
            raise GraphoptError(f"the machine's limits are measured by TVM kernels: {error}") from error
        target = detect()
        self.threads, self.buffer = threads, buffer_bytes(target, available_memory())
        lanes, chains = target.lanes(4), peaks.fma_chains(target)
        self._flops = 2.0 * peaks.TASKS * STEPS * chains * lanes
        self._fma = build_in_process(peaks.multiply_add(target, STEPS), target)
        self._tiles = build_in_process(peaks.multiply_tiles(TILE_STEPS), target) if target.f32_thirds else None
        self._tile_flops = float(peaks.TASKS * TILE_STEPS * 4 * peaks.TILE_FLOPS)
        self._read = build_in_process(peaks.read(target, self.buffer // 4), target)
        self._constants = torch.cat([torch.full((lanes,), 0.999), torch.full((lanes,), 0.001)])
        self._out = torch.empty(peaks.TASKS * max(chains * lanes, 8 * lanes, peaks.TILES_OUT))
        self._tile_input = torch.ones(peaks.TILE_INPUT)
        self._memory: dict[bool, torch.Tensor] = {}

    def measure(self, seconds: float = 0.5, large: bool = True) -> Limits:
        """The best run of each kernel in some seconds: a limit is what was reached once.

        Args:
            large: memory is read that lies in large pages, as packed weights do; else as PyTorch's tensors lie.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            fma, quiet = best_seconds(lambda: self._fma(self._constants, self._out), seconds)
            tiles = best_seconds(partial(self._tiles, self._tile_input, self._out), seconds)[0] if self._tiles else math.inf
            memory = self._memory.get(large)
            if memory is None:
                size = torch.Size([self.buffer // 4])
                memory = self._memory[large] = (Pages().empty(size, torch.float32) if large else torch.empty(size)).fill_(1.0)
            read, quiet_too = best_seconds(lambda: self._read(memory, self._out), seconds)
        finally:
            torch.set_num_threads(before)
        return Limits(self._flops / fma, self.buffer / read, self.threads, self.buffer, self._tile_flops / tiles, not (quiet and quiet_too))


def best_seconds(run: Callable[[], object], seconds: float) -> tuple[float, bool]:
    """Seconds of the fastest of the runs that fit into some seconds, and of three at least, after one that warms up; and whether no thread
    waited for a processor in it."""
    run()
    times = Undisturbed[float](3 * seconds)
    while (len(times.quiet) < 3 or sum(times.quiet) < seconds) and not times.hopeless:
        start = time.perf_counter()
        run()
        took = time.perf_counter() - start
        times.add(took, took)
    return min(times.best()), bool(times.quiet)


def buffer_bytes(target: Target, available: int) -> int:
    """Size of the buffer that is read: four last-level caches and at least a quarter GiB, but no more than memory allows."""
    wanted = max(MEMORY_BYTES, min(4 * target.cache[2], 4 << 30))
    whole = 1 << 22  # equal parts of whole vectors for every task
    return max(whole, min(wanted, available // 4) // whole * whole)

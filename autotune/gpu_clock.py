"""The clock of a GPU: what work takes on its stream, each time with a cold second-level cache.

A launch returns long before the work is done, so it is timed by events on the stream, as the GPU passes them. Before each, more bytes
are written than the cache holds: work finds it cold, and while that write runs, the host has the time for a launch from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

LEAST_FLUSH = 256 << 20  # bytes: some tenth of a millisecond, for the host to launch a kernel or two from Python


class GpuClock:
    """Times work on one GPU, on the current stream. Making one does not touch the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None

    def get_ready(self) -> torch.Tensor:
        """Take the memory that is written before each call."""
        if self._flush is None:
            self._flush = torch.empty(self._flush_bytes(), dtype=torch.uint8, device=self.device)
        return self._flush

    def time(self, calls: Iterable[Callable[[], object]]) -> list[float]:
        """Seconds of each call. They may all be on their way before the first is done."""
        flush = self.get_ready()
        marks = []
        for call in calls:
            flush.zero_()
            start = self._mark()
            call()
            marks.append((start, self._mark()))
        self.wait()
        return [start.elapsed_time(end) / 1e3 for start, end in marks]

    def wait(self) -> None:
        """Until all is done. Raises what went wrong on the GPU meanwhile."""
        torch.cuda.synchronize(self.device)

    def _flush_bytes(self) -> int:
        return max(LEAST_FLUSH, 4 * int(torch.cuda.get_device_properties(self.device).L2_cache_size))

    def _mark(self) -> Any:
        """A moment on the stream; ``elapsed_time`` between two is in milliseconds."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

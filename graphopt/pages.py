"""Memory in large pages, for what is used from end to end in every run: packed weights, the arena of intermediate results, large results.

With pages of 4 KiB, the processor translates an address for every 64 cache lines that it streams, and the hardware prefetcher
stops at every border; with pages of 2 MiB, neither matters. Linux gives such pages to memory that asks for them, if
``/sys/kernel/mm/transparent_hugepage/enabled`` is ``madvise`` or ``always``; elsewhere this is ordinary memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from graphopt.openmp import usable_processors

LARGE = 1 << 18  # bytes: smaller tensors are not worth a place of their own
PAGE = 1 << 21  # bytes of a large page
LARGE_RESULT = 1 << 23  # bytes: from here on filling fresh memory is no slower in large pages, which take 3 us more to get
CHUNK = 1 << 26  # bytes of addresses asked for at a time; memory is taken as it is written
BLOCKED = 3600  # elements of a matrix from which on PyTorch turns it by blocks
THREADS = 4  # that touch memory ahead, at most
AHEAD = 1 << 24, 1 << 30  # bytes: less is not worth a thread, and so much at most is touched ahead
_ALIGNMENT = 64
_HAVE = hasattr(mmap, "MADV_HUGEPAGE")  # Linux


class Pages:
    """Hands out tensors side by side in large pages. Their memory is given back when the last tensor of a chunk is gone.

    Args:
        ahead: bytes that will be asked for, as far as can be told: threads have the system find and clear pages for them while this
            one does something else. A page that is touched first when something is packed into it costs several times what packing
            does, most of all in a virtual machine, whose host has to find one, too.
    """

    def __init__(self, ahead: int = 0) -> None:
        self._chunk: mmap.mmap | None = None
        self._next = 0
        self._ahead: _Ahead | None = None
        ahead = min(ahead, AHEAD[1], available_memory() // 8)
        if ahead >= AHEAD[0] and _HAVE:
            self._chunk = _mapped(-(-ahead // PAGE) * PAGE)
            self._ahead = _Ahead(self._chunk)
            weakref.finalize(self, self._ahead.ended.set)

    def end(self) -> None:
        """Nothing more will be asked for: give back what was touched ahead for nothing."""
        if self._ahead is None or self._chunk is None:
            return
        self._ahead.ended.set()
        for thread in self._ahead.threads:
            thread.join()
        self._ahead = None
        unused = -(-self._next // PAGE) * PAGE
        if unused < len(self._chunk):
            self._chunk.madvise(mmap.MADV_DONTNEED, unused)
        self._chunk, self._next = None, 0

    def contiguous(self, x: torch.Tensor) -> torch.Tensor:
        """A row-major tensor of the same elements: ``x`` itself if it is one already, else a copy, in large pages if it is large."""
        nbytes = x.numel() * x.element_size()
        if x.is_contiguous() or nbytes < LARGE or not _HAVE or x.device.type != "cpu":
            return x.contiguous()
        out = self.empty(x.shape, x.dtype)
        if x.dim() == 3 and x.stride()[1:] == (1, x.shape[1]) and x.shape[1] * x.shape[2] >= BLOCKED:
            for to, of in zip(out, x, strict=True):  # PyTorch turns one matrix by blocks, and more of them element by element
                to.copy_(of)
            return out
        return out.copy_(x)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized row-major tensor on the CPU."""
        count = shape.numel()
        nbytes = count * dtype.itemsize
        if self._chunk is None or self._next + nbytes > len(self._chunk):
            self.end()
            self._chunk, self._next = _mapped(max(nbytes, CHUNK)), 0
        at, self._next = self._next, -(-(self._next + nbytes) // _ALIGNMENT) * _ALIGNMENT
        if self._ahead is not None:
            self._ahead.leave(self._next)
        return torch.frombuffer(self._chunk, dtype=dtype, count=count, offset=at).view(shape)


class _Ahead:
    """Memory whose pages threads have the system find and clear, page after page, as far as nobody else writes there.

    By writing, not by ``MADV_POPULATE_WRITE``: so nobody but the writer waits for a page, and not every thread of the process that gets
    or returns memory. By a thread a processor: 400 MiB that a virtual machine's host had to find took one 1.28 s and two 0.65.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self.ended = threading.Event()
        count = min(len(usable_processors()), THREADS)
        self._free_from = 0  # bytes: what lies before is in use
        self._at = [0] * count  # where each thread is
        self._locks = [threading.Lock() for _ in range(count)]  # held while a page is touched
        self.threads = [threading.Thread(target=self._touch, args=(memory, i), name="graphopt pages", daemon=True) for i in range(count)]
        for thread in self.threads:
            thread.start()

    def leave(self, end: int) -> None:
        """Touch nothing before ``end`` any more; returns when nothing there is being touched."""
        self._free_from = end
        for at, lock in zip(self._at, self._locks, strict=True):
            if at < end:
                with lock:
                    pass

    def _touch(self, memory: mmap.mmap, i: int) -> None:
        """Each thread takes every so many pages."""
        start, count = ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(self._at)
        for at in range(-start % PAGE + i * PAGE, len(memory), count * PAGE):
            if self.ended.is_set():
                return
            with self._locks[i]:
                self._at[i] = at
                if at >= self._free_from:
                    ctypes.memset(start + at, 0, 1)


def available_memory() -> int:
    """Bytes of memory that can be had without swapping; a modest guess where it cannot be read."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return 2 << 30


def uninitialized(nbytes: int) -> torch.Tensor:
    """So many bytes on the CPU; from the border of a large page on, if they fill half of one: side by side in physical memory, too, they
    do not compete for the same places of a cache."""
    if nbytes < PAGE // 2 or not _HAVE:
        return torch.empty(nbytes, dtype=torch.uint8)
    memory = torch.frombuffer(_mapped(nbytes + PAGE), dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE
    return memory[start : start + nbytes]


def _mapped(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory would not get large pages
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Reused:
    """Memory for large results, taken again when the tensors that had it are gone.

    What the C library gives for a result, it returns to the system as soon as that is freed, if it is larger than 32 MiB: the
    next call pays for each of its pages again. Smaller blocks stay, but a small object that comes to lie in one makes it too small for
    the next result, and a process keeps two or three.
    """

    SPARE = 2  # blocks of a size that are kept while no tensor has them

    def __init__(self) -> None:
        self._spare: defaultdict[int, deque[torch.Tensor]] = defaultdict(lambda: deque(maxlen=self.SPARE))
        self._lent: dict[int, weakref.ref[memoryview]] = {}

    def empty_strided(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor on the CPU; its elements fill its memory in some order."""
        nbytes = prod(shape) * dtype.itemsize
        spare = self._spare[nbytes]
        try:
            memory = spare.pop()
        except IndexError:
            memory = uninitialized(nbytes)
        view = memoryview(memory.numpy())
        key = id(view)

        def back(_: object) -> None:
            self._lent.pop(key, None)
            spare.append(memory)

        self._lent[key] = weakref.ref(view, back)
        storage = torch.frombuffer(view, dtype=torch.uint8).untyped_storage()  # refers to the view as long as any tensor is in it
        return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)  # no view of another tensor, which autograd would remember

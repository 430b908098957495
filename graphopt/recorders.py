"""What records the launches of a call and makes them again in one go: a CUDA graph, and its like for CPU tensors.

A recording is of addresses: what was read and written when it was made is read and written at each replay. While it is made nothing
is computed, and nothing may wait for the device.

For CPU tensors, where Triton's kernels are interpreted, operators and kernels are written down and called again over the same memory. It
is no faster; it shows without a GPU what a CUDA graph would do to the memory that it was given.

Reference: torch.cuda.CUDAGraph, and "CUDA Graphs" in PyTorch's notes on CUDA semantics.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from graphopt.errors import GraphoptError

Run = Callable[[], list[torch.Tensor]]
Kernel = Callable[..., Any]


class CannotRecord(GraphoptError):
    """A call does what cannot be recorded."""


class Recording(Protocol):
    """A call that can be made again.

    Attributes:
        outputs: what the call returned; the same memory at every replay.
        nbytes: memory that the recording alone holds, its outputs and intermediate results.
    """

    outputs: list[torch.Tensor]
    nbytes: int

    def replay(self) -> None:
        """Make the call again, over the memory that it was recorded with."""


class Recorder(Protocol):
    """Makes recordings of one program, one at a time."""

    def kernel(self, call: Kernel) -> Kernel:
        """What a call that is to be recorded calls in the place of a kernel."""

    def record(self, run: Run, written: Sequence[torch.Tensor]) -> Recording:
        """Record a call, which computes nothing.

        Args:
            written: tensors that the call writes besides what it allocates.

        Raises:
            Exception: it cannot be recorded; nothing was written.
        """

    def why_not_now(self) -> str | None:
        """Why a call of this moment cannot be replayed; None if it can."""

    def in_order(self, static: Iterable[torch.Tensor], streams: set[Any]) -> None:
        """See to it that what comes next on the current stream waits for earlier replays, which use the same memory.

        Args:
            static: memory that is written before the replay; it is not to be given to others while that goes on.
            streams: those that this was arranged for; added to.
        """


# --- CUDA graphs (and HIP's, under the same name in PyTorch) ---------------------------------------------------------------------


class CudaRecorder:
    """Captures CUDA graphs on a device. They share one pool of memory, as no two of them run at once and results are copied out of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None  # to capture on
        self._last: torch.cuda.Stream | None = None  # that was replayed on
        self._pool: Any = None
        self._alive: weakref.WeakSet[_CudaRecording] = weakref.WeakSet()

    def kernel(self, call: Kernel) -> Kernel:
        return call

    def record(self, run: Run, written: Sequence[torch.Tensor]) -> Recording:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        if not self._alive:  # the pool of graphs that are all gone cannot be used again
            self._pool = torch.cuda.graph_pool_handle()
        before = _pool_bytes(self._pool)
        graph = torch.cuda.CUDAGraph()
        # PyTorch leaves the stream of a capture that fails the current one: the outer context does not.
        # Only this thread may not allocate outside of the pool meanwhile, others may: "thread_local".
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            torch._C._cuda_clearCublasWorkspaces()  # one that lies in a pool must not be used by calls outside of it, nor outlive it
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    outputs = run()
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        recording = _CudaRecording(graph, outputs, _pool_bytes(self._pool) - before)
        self._alive.add(recording)
        return recording

    def why_not_now(self) -> str | None:
        return "the caller records a CUDA graph of its own" if torch.cuda.is_current_stream_capturing() else None

    def in_order(self, static: Iterable[torch.Tensor], streams: set[Any]) -> None:
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and stream != self._last:
            stream.wait_stream(self._last)
        if stream not in streams:
            streams.add(stream)
            for x in static:
                x.record_stream(stream)
        self._last = stream


class _CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: list[torch.Tensor], nbytes: int) -> None:
        self._graph, self.outputs, self.nbytes = graph, outputs, nbytes

    def replay(self) -> None:
        self._graph.replay()


def _pool_bytes(pool: Any) -> int:
    """Memory of the device that a pool of PyTorch's allocator has taken."""
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return sum(s["total_size"] for s in segments if tuple(s.get("segment_pool_id", ())) == tuple(pool))


# --- CPU tensors -----------------------------------------------------------------------------------------------------------------


class CpuRecorder:
    """Writes down the operators and kernels of a call on CPU tensors, and makes them again over the same memory."""

    def __init__(self) -> None:
        self._steps: list[_Step] | None = None  # of the recording that goes on

    def kernel(self, call: Kernel) -> Kernel:
        def recorded(*args: Any) -> None:
            with _disable_current_modes():  # what the interpreter does to compute is no step of the program
                call(*args)
            if self._steps is not None:
                self._steps.append((call, args, {}, None))

        return recorded

    def record(self, run: Run, written: Sequence[torch.Tensor]) -> Recording:
        before, state = [x.clone() for x in written], torch.get_rng_state()
        steps: list[_Step] = []
        self._steps = steps
        try:
            with _Steps(steps):  # as results are needed to go on with, it does compute: and is undone
                outputs = run()
        finally:
            self._steps = None
            torch.set_rng_state(state)
            for x, old in zip(written, before, strict=True):
                x.copy_(old)
        return _CpuRecording(steps, outputs)

    def why_not_now(self) -> str | None:
        return None

    def in_order(self, static: Iterable[torch.Tensor], streams: set[Any]) -> None:
        """All is done in order anyway."""


_Step = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]  # what is called, with what, and what it returned
_WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class _Steps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes operators down. Raises CannotRecord for one that would wait for a device, as the capture of a CUDA graph does."""

    def __init__(self, steps: list[_Step]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(tag in func.tags for tag in _WAITS):
            raise CannotRecord(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        self._steps.append((func, args, kwargs or {}, out))
        return out


class _CpuRecording:
    def __init__(self, steps: list[_Step], outputs: list[torch.Tensor]) -> None:
        self._steps, self.outputs = steps, outputs
        given: dict[int, None] = {}
        made = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in outputs}
        for _, args, kwargs, out in steps:
            given.update(dict.fromkeys(p for x in _tensors((args, kwargs)) if (p := x.untyped_storage().data_ptr()) not in made))
            made.update({p: x.untyped_storage().nbytes() for x in _tensors(out) if (p := x.untyped_storage().data_ptr()) not in given})
        self.nbytes = sum(made.values())

    def replay(self) -> None:
        with torch.inference_mode():  # where tensors may be written that were recorded there
            for call, args, kwargs, before in self._steps:
                for old, new in zip(_tensors(before), _tensors(call(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():  # no view of what it was given
                        old.copy_(new)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]

"""The process in which a GPU's kernels are checked and timed, by the protocol of :mod:`graphopt.autotune.runner_process`.

The supervisor never touches the GPU: a context does not survive a fork, so each child makes its own. A fault of a kernel on the GPU
spoils the context for all that comes after it; the child says so, and another one takes its place.

What the tuner shares lies in the host's memory. It is copied to the GPU as it is, poison and guards included, and what the kernel left
there is copied back: so the gate is that of a processor. Inputs are writable on a GPU; they are compared afterwards.

All memory of the GPU is taken when a case is loaded: where there is none, that is no candidate's fault.

How they are timed: :mod:`graphopt.autotune.gpu_clock`.
"""

from __future__ import annotations

import gc
import importlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

import torch

from graphopt.autotune.arena import Place, map_memory
from graphopt.autotune.gpu_clock import GpuClock
from graphopt.autotune.runner_process import Bench, Kernel, Load, Spoilt, copy_results, supervise


class GpuBench(Bench):
    """One case in the memory of a GPU.

    Args:
        device: as PyTorch names it.
    """

    watched = False  # a kernel of a GPU holds no memory of this process
    waited = staticmethod(float)  # the GPU's own clock does not run while the host waits

    def __init__(self, load: Load, device: str) -> None:
        super().__init__(load)
        self.device = torch.device(device)
        self.clock = GpuClock(self.device)

    def case(self, **request: Any) -> dict[str, Any]:
        with self._sound():
            self._drop()
            answer = super().case(**{**request, "between": 0})  # each call finds the cache cold: weights need no copies
            self._sets = self.arguments()  # takes the memory
            self._calls = cycle(self._sets)
            self.clock.get_ready()
        return answer

    def _drop(self) -> None:
        """Give back the memory of the case before, and its kernels, too: the module of one is a cycle, and nothing is collected by
        itself in this process."""
        self.inputs, self.outputs, self.kernels, self._own, self._sets, self._calls = [], [], {}, [], [], iter(())
        self._results: list[torch.Tensor] = []
        self._given = self._shared = self._copy = torch.empty(0, dtype=torch.uint8)
        gc.collect()
        torch.cuda.empty_cache()  # the tuner needs room, too

    def memory(self, request: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The inputs and outputs of a case, in a copy of the shared memory."""
        self._select()
        self._given, self._shared = map_memory(request)
        self._end_of_inputs: int = request["writable"]
        self._copy = torch.empty(request["size"], dtype=torch.uint8, device=self.device)
        self._copy.copy_(self._shared)
        places = [[Place.from_json(p) for p in request[kind]] for kind in ("inputs", "outputs")]
        self._results = [p.tensor(self._shared) for p in places[1]]
        inputs, outputs = ([p.tensor(self._copy) for p in kind] for kind in places)
        return inputs, outputs

    def check(self, which: Sequence[str]) -> dict[str, Any]:
        end = self._end_of_inputs
        with self._sound():
            self._copy[end:].copy_(self._shared[end:])
            start = time.perf_counter()
            super().check(which)
            self.clock.wait()
            answer = {"seconds": time.perf_counter() - start}
            if not torch.equal(self._copy[:end].cpu(), self._given[:end]):
                self._copy[:end].copy_(self._given[:end])
                raise RuntimeError("it wrote to an input")
            self._shared[end:].copy_(self._copy[end:])
        return answer

    def race(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        end = self._end_of_inputs
        with self._sound():
            self._copy[end:].copy_(self._shared[end:])
            answer = super().race(*args, **kwargs)
            for shared, x in zip(self._results, self.outputs, strict=True):
                copy_results(shared, x)
        return answer

    def _timed(self, kernel: Kernel, calls: int) -> float:
        return calls * median(self.clock.time(partial(kernel, *next(self._calls)) for _ in range(calls)))

    @contextmanager
    def _sound(self) -> Iterator[None]:
        """Tell what a kernel raises from a fault of the GPU, after which nothing runs in this process any more."""
        try:
            yield
        except Exception as error:
            try:
                self.clock.wait()
            except Exception:
                raise Spoilt(f"{type(error).__name__}: {error}") from error
            raise

    def _select(self) -> None:
        torch.cuda.set_device(self.device)


class InterpretedBench(Bench):
    """One case for a GPU's kernels that are interpreted, on tensors of the CPU. Times are of the interpreter, and say nothing of a GPU."""

    watched = False  # what the interpreter leaves behind is not the kernel's

    def check(self, which: Sequence[str]) -> dict[str, Any]:
        gc.collect()  # which does not happen by itself in this process
        return super().check(which)


def main(arguments: str) -> None:
    """Be the supervisor. ``arguments``: ``loader`` (``module:function``: what loads a kernel) and ``device``, as JSON."""
    how = json.loads(arguments)
    module, _, name = how["loader"].partition(":")

    def get_ready() -> Bench:
        load = getattr(importlib.import_module(module), name)
        return InterpretedBench(load) if how["device"] == "cpu" else GpuBench(load, how["device"])

    supervise(get_ready)

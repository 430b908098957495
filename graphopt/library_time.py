"""What a workload takes through PyTorch's own kernels: a call for each of its operations, as eager would make them.

What depends on weights alone is computed before, and not timed (:class:`~graphopt.autotune.library_kernel.LibraryKernel`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from graphopt.autotune.gpu_clock import GpuClock
from graphopt.autotune.library_kernel import LibraryKernel
from graphopt.autotune.measure import Subject
from graphopt.ir.interpreter import bind_symbols
from graphopt.run_delay import Undisturbed
from graphopt.sampling import random_inputs
from graphopt.trials import CPU

LONG = 0.25  # seconds of a call that is timed once
LEAST_CALLS = 8
PATIENCE = 5.0  # times as long, where threads wait for processors

def library_seconds(subject: Subject, seconds: float = 0.1, device: torch.device = CPU) -> float:
    """Median seconds of a call; weights are as cold as where kernels are timed, the rest lies where it lay the call before.

    On a GPU, everything is cold, as it is for the kernels that the tuner times there. 0 if there is not the room.

    Args:
        seconds: of calls that are timed.
    """
    try:
        return _seconds(subject, seconds, device)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # as a processor's allocator says
            return 0.0
        raise
    finally:
        if device.type != "cpu":
            torch.cuda.empty_cache()  # the process that runs candidates needs the room


def _seconds(subject: Subject, seconds: float, device: torch.device) -> float:
    graph = subject.workload.graph
    kernel = LibraryKernel(graph, subject.weights, device)
    with torch.no_grad():
        inputs = [x.to(device) for x in random_inputs(graph, subject.sizes, 0)]
        bound = bind_symbols(graph, [x.shape for x in inputs], subject.sizes)
        size = sum(inputs[i].nbytes for i in subject.weights)
        copies = max(1, min(4096, -(-subject.between // size))) if size and device.type == "cpu" else 1
        rest = [*graph.outputs, *(bound[s] for s in sorted(graph.symbols))]  # in the places of outputs, which are not written
        calls = [[*(_copy(x) if i in subject.weights else x for i, x in enumerate(inputs)), *rest] for _ in range(copies)]
        for args in calls:
            kernel.prepare(args)
        if device.type != "cpu":
            return _on_gpu(lambda: kernel.compute(*calls[0]), GpuClock(device), seconds)
        times, n = Undisturbed[float](PATIENCE * seconds), 0
        while (len(times.quiet) < LEAST_CALLS or sum(times.quiet) < seconds) and not times.hopeless:
            start = time.perf_counter()
            kernel.compute(*calls[n % copies])
            took = time.perf_counter() - start
            n += 1
            times.add(took, took)
            if took > LONG and times.quiet:
                break
    return median(times.quiet[1:] or times.best())  # the first one warms up


def _on_gpu(run: Callable[[], object], clock: GpuClock, seconds: float) -> float:
    """Median seconds of a call."""
    (first,) = clock.time([run, run])[1:]  # the first one loads kernels, and the library chooses among them
    return median(clock.time([run] * max(LEAST_CALLS, min(1000, round(seconds / first)))))


def _copy(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)

"""A process that runs one system on one model, and answers requests: JSON, a line each, on the pipes it was started with.

Requests, in this order: ``prepare`` (build the model, compile or load it, run it once, compare with the reference), ``run``
(some timed calls), ``memory``. Processes of their own answer ``reference`` (an f64 run), ``convert`` and ``limits``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils import _pytree as pytree

import graphopt
from graphopt.bench import memory, work
from graphopt.bench.limits import LimitMeter
from graphopt.bench.loading import load
from graphopt.bench.system import Job, Prepared, SystemFailure, in_a_line
from graphopt.bench.systems import system as system_of
from graphopt.ir import parse_graph


class Worker:
    """Keeps a prepared model between requests."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.prepared: Prepared | None = None
        self.baseline = 0
        self.meter: LimitMeter | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a request is answered with; exceptions are the caller's."""
        what = request.pop("do")
        with torch.no_grad():
            return getattr(self, what)(**request)  # type: ignore[no-any-return]

    def reference(self, model: str, file: str) -> dict[str, Any]:
        """Write the results of an f64 run to a file."""
        module, args, kwargs = _load(model)
        wide = [_wide(x) for x in (args, kwargs)]
        torch.save(tensors(module.double()(*wide[0], **wide[1])), file)
        return {}

    def convert(self, system: str, model: str, threads: int, folder: str) -> dict[str, Any]:
        """Write the file that the system runs from; seconds, and notes."""
        torch.set_num_threads(threads)
        chosen, job = system_of(system), Job(*_load(model), threads, Path(folder))
        assert chosen.convert is not None
        chosen.load()
        start = time.perf_counter()
        notes = chosen.convert(job)
        return {"seconds": time.perf_counter() - start, "notes": notes}

    def prepare(self, system: str, model: str, threads: int, folder: str, cache_dir: str, reference: str) -> dict[str, Any]:
        """Compile or load: seconds, error against the reference, peak of memory, the work counted in the graph."""
        torch.set_num_threads(threads)
        chosen = system_of(system)
        chosen.load()
        module, args, kwargs = _load(model)
        self.job = Job(module, args, kwargs, threads, Path(folder), Path(cache_dir) if cache_dir else None)
        del module
        self.baseline = memory.settle()
        memory.reset_peak()
        start = time.perf_counter()
        self.prepared = chosen.prepare(self.job)
        seconds = time.perf_counter() - start
        peak = memory.peak() - self.baseline
        found = tensors(self.prepared.run())
        error = errors(found, torch.load(reference)) if reference else None
        del found
        if not self.prepared.keeps_module:
            self.job.module = torch.nn.Module()
        return {"seconds": seconds, "capture_seconds": self.prepared.capture_seconds, "error": error, "compile_peak": peak,
                "notes": self.prepared.notes, "work": counted() if chosen.is_graphopt else None}  # fmt: skip

    def run(self, calls: int, untimed: int = 1) -> dict[str, Any]:
        """Seconds of some calls, after some that are not timed."""
        assert self.prepared is not None
        run = self.prepared.run
        gc.disable()
        for _ in range(untimed):
            run()
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        gc.enable()
        return {"seconds": times}

    def memory(self, calls: int = 3) -> dict[str, Any]:
        """Peak of resident memory over some calls, above the baseline; and all of it."""
        assert self.prepared is not None
        memory.settle()
        memory.reset_peak()
        for _ in range(calls):
            self.prepared.run()
        return {"peak": memory.peak() - self.baseline, "all": memory.peak()}

    def limits(self, threads: int, slice_seconds: float = 0.5) -> dict[str, Any]:
        """Multiply-adds and bytes a second of this machine, the best run of each in some seconds."""
        self.meter = self.meter or LimitMeter(threads)
        return vars(self.meter.measure(slice_seconds))


def _load(model: str) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model in evaluation mode, with its example inputs: the same ones in every process, whatever they are drawn from."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    module, args, kwargs = load(model)
    if isinstance(module, Path):
        raise SystemFailure("an exported program cannot be given to the other systems; name a factory")
    return module.eval(), args, kwargs


def _wide(x: Any) -> Any:
    return pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, x)


def tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, as copies, in order; arrays count as tensors."""
    leaves = pytree.tree_leaves(result)
    return [torch.as_tensor(x).detach().clone() for x in leaves if isinstance(x, torch.Tensor) or type(x).__module__ == "numpy"]


def errors(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """The largest difference to the reference, relative to its largest element; of several results the worst; infinite if one is no number.

    Raises:
        SystemFailure: the results are not of the reference's shapes.
    """
    if [x.shape for x in found] != [x.shape for x in reference]:
        raise SystemFailure(f"results of shapes {[tuple(x.shape) for x in found]}, not {[tuple(x.shape) for x in reference]}")
    worst = 0.0
    for a, b in zip(found, reference, strict=True):
        if b.numel():
            scale = float(b.double().abs().max())
            error = float((a.double() - b.double()).abs().max()) / (scale or 1.0)
            worst = max(worst, error if error == error else math.inf)
    return worst


def counted() -> dict[str, int] | None:
    """The work of all graphs that graphopt compiled in this process; None if one has unknown sizes or was not captured."""
    found = [work.count(parse_graph(r.text_before)) if r.text_before else None for r in graphopt.reports()]
    if not found or any(w is None for w in found):
        return None
    return vars(sum((w for w in found if w is not None), work.Work(0, 0)))


# --- the process -------------------------------------------------------------------------------------------------------


def _requests(file: Any) -> Iterator[dict[str, Any]]:
    for line in file:
        yield json.loads(line)


def main() -> None:
    """Answer until the pipe is closed. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _die_with_parent()
    worker = Worker()
    for request in _requests(sys.stdin):
        try:
            answer = worker.answer(request)
        except BaseException as error:  # whatever a system does, the others must go on
            answer = {"failed": str(error) if isinstance(error, SystemFailure) else in_a_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _die_with_parent() -> None:
    """Linux: be killed when the parent dies, even if that is killed itself."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


if __name__ == "__main__":
    main()

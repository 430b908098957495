"""The process in which candidates run: JSON lines in, JSON lines out. Started by :mod:`graphopt.autotune.runner`.

It is two: a supervisor that has imported what is needed and never runs a kernel, and a child forked from it that does. When a kernel
kills the child, the supervisor says so and forks another one in milliseconds; nothing is imported again.

Requests to the child, which a :class:`Bench` answers:

- ``case``: the shared memory, which inputs are weights, and how many threads.
- ``check``: load a kernel, and call it once on the shared memory. Answer: seconds of the call.
- ``race``: time a kernel in turns with another one, or alone. Answer: the times, growth of memory, and its last results in the
  shared memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from graphopt.autotune.arena import map_shared
from graphopt.autotune.library_kernel import SUFFIX, LibraryKernel, load_library_kernel
from graphopt.autotune.records import Status
from graphopt.autotune.turns import Disturbed, calls_of_a_slice, take_turns
from graphopt.errors import RemoteError
from graphopt.openmp import usable_processors
from graphopt.run_delay import Undisturbed, run_delay

Kernel = Callable[..., Any]
Load = Callable[[Path, str], Kernel]
MAX_COPIES = 4096
_SIGKILL, _PDEATHSIG = 9, 1
_INPUT_ENDED = 96  # exit status of a child that was not killed by a kernel


class Spoilt(Exception):
    """After what a kernel did nothing can run in this process any more, though it lives."""


class Bench:
    """One case, and memory of its own to time kernels on.

    Attributes:
        watched: whether a kernel may leak memory of this process.
        waited: seconds that threads have waited for processors so far, as far as it matters.
    """

    watched = True
    waited: Callable[[], float] = staticmethod(run_delay)

    def __init__(self, load: Load) -> None:
        self.load = load

    def case(self, **request: Any) -> dict[str, Any]:
        """Take what :attr:`Arena.description` gives, and ``threads``, ``weights``, ``between``."""
        torch.set_num_threads(request["threads"])
        if request["threads"] > len(usable_processors()):
            self.waited = float  # those threads wait for each other all the time
        self.inputs, self.outputs = self.memory(request)
        self.sizes: list[int] = request["sizes"]
        self.in_place: int | None = request["in_place"]
        self.kernels: dict[tuple[str, str], Kernel] = {}
        self._weights: list[int] = request["weights"]
        self._between: int = request["between"]
        self._sets: list[list[Any]] = []
        self._calls: Iterator[list[Any]] = iter(())
        self._own: list[torch.Tensor] = []
        return {}

    def memory(self, request: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Where the inputs and outputs of a case lie."""
        return map_shared(request)

    def kernel(self, which: Sequence[str]) -> Kernel:
        """A kernel by file and name, loaded once."""
        path, entry = which
        if (path, entry) not in self.kernels:
            if path.endswith(SUFFIX):
                self.kernels[path, entry] = load_library_kernel(Path(path), self._weights, self.inputs[0].device)
            else:
                self.kernels[path, entry] = self.load(Path(path), entry)
            _die_at_once()
        return self.kernels[path, entry]

    def check(self, which: Sequence[str]) -> dict[str, Any]:
        """Call a kernel once, on the shared memory."""
        kernel = self.kernel(which)
        inputs = list(self.inputs)
        if self.in_place is not None:
            self.outputs[0].copy_(inputs[self.in_place])
            inputs[self.in_place] = self.outputs[0]
        start = time.perf_counter()
        kernel(*inputs, *self.outputs, *self.sizes)
        return {"seconds": time.perf_counter() - start}

    def arguments(self) -> list[list[Any]]:
        """Arguments of the calls that are timed, in turns: weights from one copy after the other, the rest from the same place.

        The memory is ordinary memory of this process: pages of shared memory are mapped differently, which a kernel that reads
        much of it feels.
        """
        rest = [None if i in self._weights else _copy(x) for i, x in enumerate(self.inputs)]
        if self.in_place is not None:
            self._own = [rest[self.in_place]]  # type: ignore[list-item]
        else:
            self._own = [_empty_like(x) for x in self.outputs]
        size = sum(self.inputs[i].nbytes for i in self._weights)
        copies = min(MAX_COPIES, max(1, -(-self._between // size))) if size else 1
        sets = []
        for _ in range(copies):
            operands = [_copy(self.inputs[i]) if x is None else x for i, x in enumerate(rest)]
            sets.append([*operands, *self._own, *self.sizes])
        return sets

    def race(self, candidate: Sequence[str], incumbent: Sequence[str] | None, floor: float, slice: float, hopeless: float, leak: int,
             tolerable: float) -> dict[str, Any]:  # fmt: skip
        """Time a kernel in turns with the incumbent, or alone."""
        if not self._sets:
            self._sets = self.arguments()
            self._calls = cycle(self._sets)
        judged = self.kernel(candidate)
        new, old = self._to_be_timed(judged), self._to_be_timed(self.kernel(incumbent)) if incumbent else None
        calls = self._slice_length(new, old, slice)
        before = _resident()

        def timed(turns: Sequence[int]) -> list[float]:
            return [self._timed((new, old)[which], calls) / calls for which in turns]  # type: ignore[arg-type]

        candidate_times, incumbent_times = take_turns(timed, calls, floor, hopeless, alone=old is None, tolerable=tolerable,
                                                      waited=self.waited)  # fmt: skip
        answer: dict[str, Any] = {"candidate": candidate_times, "incumbent": incumbent_times, "calls": calls}
        if self.watched and _resident() - before > leak:
            answer["leaked"] = self._growth(new, max(len(candidate_times) * calls, 16), leak)
        if self.in_place is None:
            for x, own in zip(self.outputs, self._own, strict=True):
                copy_results(own, x)  # the tuner's poison: what an earlier call left there must not be judged
            self._timed(judged, 1)
            for x, own in zip(self.outputs, self._own, strict=True):
                copy_results(x, own)
        return answer

    def _to_be_timed(self, kernel: Kernel) -> Kernel:
        """What is timed of a kernel: of PyTorch's not the copy of their results, which a program does not make."""
        if not isinstance(kernel, LibraryKernel):
            return kernel
        for args in self._sets:
            kernel.prepare(args)
        return kernel.compute

    def _slice_length(self, new: Kernel, old: Kernel | None, seconds: float) -> int:
        """Calls between two readings of the clock: few of a pair of which one takes long. Each kernel is warm afterwards."""
        probes = Undisturbed[list[float]](100 * seconds, self.waited)
        while not probes.quiet and not probes.hopeless:
            taken = [[self._timed(k, n) / n for n in (1, 2)] for k in (new, old) if k is not None]
            probes.add(sum(map(sum, taken)), [min(t) for t in taken])
        return calls_of_a_slice(probes.best()[0], seconds)

    def _timed(self, kernel: Kernel, calls: int) -> float:
        arguments = [next(self._calls) for _ in range(calls)]
        start = time.perf_counter()
        for a in arguments:
            kernel(*a)
        return time.perf_counter() - start

    def _growth(self, kernel: Kernel, calls: int, leak: int) -> float:
        """Bytes a call by which resident memory grows, after it was seen to grow once; 0 if it does not any more."""
        before, end, done = _resident(), time.perf_counter() + 0.5, 0
        while done < calls and (done < 8 or time.perf_counter() < end):
            self._timed(kernel, 1)
            done += 1
        grown = _resident() - before
        return grown / done if grown > leak // 4 else 0.0


def _die_at_once() -> None:
    """Undo what libraries do about a process that crashes: to print where it was takes them seconds, and nobody reads it."""
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT):
        signal.signal(number, signal.SIG_DFL)


def _copy(x: torch.Tensor) -> torch.Tensor:
    return _empty_like(x).copy_(x)


def copy_results(to: torch.Tensor, x: torch.Tensor) -> None:
    """Copy an output of a kernel as it lies in memory: of a bool that was not written, PyTorch would make a proper one."""
    if x.dtype == torch.bool:
        to, x = to.view(torch.uint8), x.view(torch.uint8)
    to.copy_(x)


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _resident() -> int:
    """Bytes of resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- the processes -----------------------------------------------------------------------------------------------------


def serve(bench: Any, requests: Iterator[dict[str, Any]], reply: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests until there are none: each by the method of the bench that it names."""
    for request in requests:
        what, number = request.pop("do"), request.pop("id")
        try:
            answer: dict[str, Any] = getattr(bench, what)(**request)
        except RemoteError as error:
            answer = {"lost": str(error)}
        except Spoilt as error:
            answer = {"spoilt": str(error)}
        except Disturbed as error:
            answer = {"failed": str(error), "status": Status.DISTURBED.value}
        except Exception as error:  # what a kernel raises is an answer, too
            answer = {"failed": f"{type(error).__name__}: {error}"}
        reply({"id": number, **answer})


def main(loader: str) -> None:
    """Be the supervisor of kernels that run here.

    Args:
        loader: ``module:function`` of what loads a kernel: (file, name) -> kernel.
    """
    module, _, name = loader.partition(":")
    supervise(lambda: Bench(getattr(importlib.import_module(module), name)))


def supervise(get_ready: Callable[[], Any]) -> None:
    """Be the supervisor.

    Args:
        get_ready: imports what is needed, and makes the bench, of which every child has its own copy.
    """
    _die_with_parent()
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever a kernel prints must not mix with the answers
    bench = get_ready()

    def reply(answer: dict[str, Any]) -> None:
        os.write(replies, json.dumps(answer).encode() + b"\n")

    while True:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)  # a group of its own, with all that it starts
            _die_with_parent()
            gc.disable()  # collecting takes longer than many a trial
            reply({"ready": os.getpid()})
            serve(bench, _lines(), reply)
            os._exit(_INPUT_ENDED)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # until it is waited for, its number is no other's
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == _INPUT_ENDED:
            return
        reply({"died": code})


def _lines() -> Iterator[dict[str, Any]]:
    """Requests, read byte by byte as they come: what a child leaves unread is its successor's."""
    rest = b""
    while True:
        data = os.read(0, 1 << 16)  # one request at a time is on its way
        if not data:
            return
        rest += data
        while b"\n" in rest:
            line, rest = rest.split(b"\n", 1)
            yield json.loads(line)


def _die_with_parent() -> None:
    """Linux: be killed when the parent dies, even if that is killed itself."""
    try:
        ctypes.CDLL(None).prctl(_PDEATHSIG, _SIGKILL)
    except (OSError, AttributeError):
        return


if __name__ == "__main__":
    main(sys.argv[1])

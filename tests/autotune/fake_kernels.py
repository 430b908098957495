"""A test backend: kernels in Python for one workload, x + y, some of them as bad as kernels can be. Loaded in the runner's process."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from graphopt.autotune.measure import Built, Case, Output, Subject, Verdict
from graphopt.autotune.space import Param, Schedule, SearchSpace, Workload

LOADER = "tests.autotune.fake_kernels:load"
SIZE = 64
_LEAKED: list[bytearray] = []
_CALLS: list[None] = []


def good(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    torch.add(x, y, out=out)


def slow(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    _wait(1e-3)
    torch.add(x, y, out=out)


def slower(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    _wait(20e-3)  # longer than what another process takes the processor for
    torch.add(x, y, out=out)


def lasting(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    time.sleep(0.3)
    torch.add(x, y, out=out)


def wrong(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    torch.sub(x, y, out=out)


def unwritten(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    torch.add(x[:-1], y[:-1], out=out[:-1])


def outside(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    torch.add(x, y, out=out)
    ctypes.memset(out.data_ptr() + out.nbytes + 8, 0, 1)


def changes_inputs(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    x += y
    out.copy_(x)


def crashes(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    ctypes.string_at(0)


def aborts(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    os.abort()


def exits(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    os._exit(0)


def kills_the_supervisor(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def never_ends(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    while True:
        time.sleep(0.1)


def raises(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    raise RuntimeError("no such tile")


def leaks(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    torch.add(x, y, out=out)
    _LEAKED.append(bytearray(b"x" * (64 << 10)))


def wrong_later(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    torch.add(x, y, out=out)
    _LEAKED.append(bytearray())
    if len(_LEAKED) > 8:
        out[0] += 1


def unwritten_later(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    if not _CALLS:
        torch.add(x, y, out=out)
    _CALLS.append(None)


def wrong_elsewhere(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    torch.add(x[:SIZE], y[:SIZE], out=out[:SIZE])


def _wait(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


_ALL = (slow, good, slower, lasting, wrong, unwritten, outside, changes_inputs, crashes, aborts, exits, kills_the_supervisor, never_ends,
        raises, leaks, wrong_later, unwritten_later, wrong_elsewhere)  # fmt: skip
KERNELS = {f.__name__: f for f in _ALL}
BAD = {
    "wrong": "wrong", "unwritten": "wrong", "outside": "wrong", "changes_inputs": "crashed", "crashes": "crashed", "aborts": "crashed",
    "exits": "crashed", "never_ends": "timed-out", "raises": "crashed", "leaks": "leaked", "wrong_later": "wrong",
    "unwritten_later": "wrong",
}  # fmt: skip


def load(path: Path, name: str) -> Callable[..., Any]:
    return KERNELS[name]


# --- the other side ----------------------------------------------------------------------------------------------------

WORKLOAD = Workload("pointwise", f"""graph @g(%arg0: f32[{SIZE}], %arg1: f32[{SIZE}]) -> f32[{SIZE}] {{
  %0: f32[{SIZE}] = add(%arg0, %arg1)
  return %0
}}
""")  # fmt: skip


def schedule(kernel: str, n: int = 0) -> Schedule:
    return Schedule.make("fake", kernel=kernel, n=n)


def built(kernel: str, n: int = 0) -> Built:
    return Built(schedule(kernel, n), "nowhere", kernel)


def space(*kernels: str, n: int = 1) -> SearchSpace:
    return SearchSpace("fake", params=(Param("kernel", kernels), Param("n", tuple(range(n)))))


class FakeBuilder:
    """Builds nothing; ``slow_build`` takes its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.built: list[Schedule] = []

    def build(self, w: Workload, schedules: Sequence[Schedule]) -> list[Built]:
        time.sleep(self.seconds)
        self.built += schedules
        return [Built(s, "nowhere", s["kernel"]) for s in schedules]


def case(seed: int, size: int = SIZE) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    true = x.double() + y.double()

    def judge(results: Sequence[torch.Tensor]) -> Verdict:
        error = float((results[0].double() - true).abs().max())
        return Verdict(error, "" if error < 1e-6 else f"relative error {error:.1e}")

    return Case((x, y), (Output((size,), (1,), torch.float32),), judge)


def subject() -> Subject:
    return Subject(WORKLOAD, case, weights=(1,), between=1 << 16)


def symbolic_subject() -> Subject:
    """The same at any size, of which ``SIZE`` is the one that is timed."""
    return replace(subject(), case=lambda seed: case(seed, SIZE + seed % 2 * (1 + seed)), sizes={"n": SIZE})

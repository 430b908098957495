"""The bench of a GPU, in the memory of the host: what it copies, compares and times, and what it says when the device is spoilt."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from graphopt.autotune.arena import Arena
from graphopt.autotune.gpu_bench import GpuBench
from graphopt.autotune.gpu_clock import GpuClock
from graphopt.autotune.records import Status
from graphopt.autotune.runner import ProcessRunner
from graphopt.autotune.runner_process import Spoilt, serve
from tests.autotune.busy import timing
from tests.autotune.fake_kernels import KERNELS, built, case, subject

HOW = {"threads": 1, "weights": [1], "between": 1 << 16}
RACE = {"candidate": ("", "good"), "incumbent": None, "floor": 0.0, "slice": 1e-9, "hopeless": 2.0, "leak": 0, "tolerable": 1e9}


class HostClock(GpuClock):
    """Counts what was done before each kernel; each takes 2 ms."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.done: list[str] = []
        self.broken = False

    def wait(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def dirty(self) -> None:
        assert self._flush is not None
        self._flush.fill_(1)

    def _flush_bytes(self) -> int:
        return 1024

    def _mark(self) -> Any:
        assert self._flush is not None
        self.done.append(f"mark {int(self._flush.sum())}")
        return SimpleNamespace(elapsed_time=lambda other: 2.0)


class HostBench(GpuBench):
    """The same without a GPU: its memory is the host's."""

    clock: HostClock

    def __init__(self, kernels: dict[str, Callable[..., Any]]) -> None:
        super().__init__(lambda path, entry: kernels[entry], "cpu")
        self.clock = HostClock()

    def _select(self) -> None:
        pass


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(case(0))
    yield arena
    arena.close()


def bench(arena: Arena, **more: Callable[..., Any]) -> HostBench:
    made = HostBench({**KERNELS, **more})
    made.case(**arena.description, **HOW)
    arena.poison()  # after the case was sent, as the tuner does
    return made


def test_results_come_back_and_are_judged_where_the_tuner_looks(arena: Arena) -> None:
    bench(arena).check(("", "good"))
    assert not arena.damage() and not arena.case.judge(arena.results()).reason


def test_a_kernel_that_does_nothing_leaves_the_poison_of_the_moment(arena: Arena) -> None:
    bench(arena, nothing=lambda *args: None).check(("", "nothing"))
    assert arena.results()[0].isnan().all() and arena.case.judge(arena.results()).reason


def test_what_a_timed_call_left_is_not_judged_as_the_last_ones(arena: Arena) -> None:
    calls: list[None] = []

    def once(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
        if not calls:
            torch.add(x, y, out=out)
        calls.append(None)

    bench(arena, once=once).race(**{**RACE, "candidate": ("", "once")})
    assert arena.results()[0].isnan().all()


def test_a_write_outside_of_the_outputs_is_seen(arena: Arena) -> None:
    bench(arena).check(("", "outside"))
    assert "behind output 0, 8 bytes away" in arena.damage()


def test_a_write_to_an_input_is_seen_and_undone(arena: Arena) -> None:
    made = bench(arena)
    with pytest.raises(RuntimeError, match="wrote to an input"):
        made.check(("", "changes_inputs"))
    made.check(("", "good"))
    assert not arena.case.judge(arena.results()).reason


def test_the_cache_is_flushed_before_each_call_that_is_timed(arena: Arena) -> None:
    made = bench(arena)

    def dirty(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
        made.clock.dirty()
        made.clock.done.append("kernel")
        torch.add(x, y, out=out)

    made.kernels["", "good"] = dirty
    answer = made.race(**RACE)
    timed = made.clock.done
    assert timed[:6] == ["mark 0", "kernel", "mark 1024"] * 2, "each kernel stands between two marks, behind a flush"
    assert len(timed) == 3 * timed.count("kernel")
    assert answer["candidate"] == pytest.approx([2e-3] * len(answer["candidate"])) and answer["incumbent"] == []
    assert not arena.case.judge(arena.results()).reason, "the last results were handed over"


def test_weights_are_not_copied_as_every_call_finds_the_cache_cold(arena: Arena) -> None:
    seen: set[int] = set()
    made = bench(arena, seen=lambda x, y, out: seen.add(y.data_ptr()))
    made.race(**{**RACE, "candidate": ("", "seen")})
    assert len(seen) == 1


def test_a_fault_of_the_device_spoils_the_process_and_what_a_kernel_raises_does_not(arena: Arena) -> None:
    made = bench(arena)

    def faults(*args: object) -> None:
        made.clock.broken = True

    made.kernels["", "faults"] = faults
    answers: list[dict[str, Any]] = []
    serve(made, iter([{"id": i, "do": "check", "which": ("", k)} for i, k in enumerate(("raises", "good", "faults"))]), answers.append)
    assert [sorted(set(a) - {"id"}) for a in answers] == [["failed"], ["seconds"], ["spoilt"]]
    assert "illegal memory access" in answers[2]["spoilt"]


def test_the_memory_of_a_gpu_is_taken_with_the_case_before_a_candidate_runs(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench(arena)
    monkeypatch.setattr(torch, "empty", None)
    monkeypatch.setattr(torch, "empty_strided", None)
    assert made.race(**RACE)["candidate"]


def test_the_kernels_of_the_case_before_are_collected(arena: Arena) -> None:
    made = bench(arena)
    seen: list[weakref.ref[ModuleType]] = []

    def load(path: Path, name: str) -> Callable[..., Any]:
        module = ModuleType("kernel")
        exec("def launch(*args):\n    pass", module.__dict__)  # which refers to the module's names, and these to it
        seen.append(weakref.ref(module))
        module.__dict__["module"] = module
        return module.launch  # type: ignore[no-any-return]

    made.load = load
    gc.disable()
    try:
        made.check(("", "any"))
        assert seen[0]() is not None
        made.case(**arena.description, **HOW)
        assert seen[0]() is None
    finally:
        gc.enable()


def load(path: Path, name: str) -> Callable[..., Any]:
    """Kernels for a process of its own; one of them spoils it."""

    def spoils(*args: object) -> None:
        raise Spoilt("an illegal memory access")

    return spoils if name == "spoils" else KERNELS[name]


def test_a_spoilt_process_gives_way_to_another_and_only_its_candidate_is_blamed() -> None:
    runner = ProcessRunner("tests.autotune.test_gpu_bench:load", threads=1, timing=timing(floor=0.004, recheck=0.008, patience=3.0))
    try:
        first, bad, last = runner.measure(subject(), [built("slow"), built("spoils"), built("good")], None)
    finally:
        runner.close()
    assert (bad.measured.status, bad.measured.reason) == (Status.CRASHED, "an illegal memory access")
    assert first.measured.ok and last.measured.ok and last.won

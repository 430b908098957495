"""The runner: a bad candidate costs only itself, whatever it does; a good one is timed against the incumbent."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.autotune.arena import Arena
from graphopt.autotune.measure import Case, Incumbent, Output, Race, Trial, Verdict
from graphopt.autotune.records import Status
from graphopt.autotune.runner import ProcessRunner, RunnerProcess
from graphopt.autotune.runner_process import Bench, supervise
from graphopt.errors import WorkerError
from tests.autotune.busy import timing
from tests.autotune.fake_kernels import BAD, LOADER, built, load, subject, symbolic_subject

QUICK = timing(floor=0.004, recheck=0.008, patience=3.0)


@pytest.fixture(scope="module")
def runner() -> Iterator[ProcessRunner]:
    runner = ProcessRunner(LOADER, threads=1, timing=QUICK)
    yield runner
    runner.close()


def measure(runner: ProcessRunner, *kernels: str, incumbent: Incumbent | None = None) -> list[Trial]:
    return list(runner.measure(subject(), [built(k) for k in kernels], incumbent))


def test_the_first_that_is_right_is_the_incumbent_and_a_faster_one_takes_its_place(runner: ProcessRunner) -> None:
    wrong, slow, slower, good = measure(runner, "wrong", "slow", "slower", "good")
    assert [t.won for t in (wrong, slow, slower, good)] == [False, True, False, True]
    assert slow.measured.seconds is not None and slow.measured.seconds > 0.9e-3 and slow.measured.gain is None
    assert slower.measured.gain is not None and slower.measured.gain < 0.7
    assert good.measured.gain is not None and good.measured.gain > 5
    assert good.measured.seconds is not None and good.measured.seconds == pytest.approx(slow.measured.seconds / good.measured.gain)
    assert good.measured.error is not None and 0 <= good.measured.error < 1e-6


def test_nobody_wins_against_an_incumbent_that_something_else_slows_down() -> None:
    runner = ProcessRunner(LOADER, threads=1, timing=replace(QUICK, slowed=3.0))
    try:
        (good,) = measure(runner, "good", incumbent=Incumbent(built("slow"), 1e-5))  # which takes a hundred times as long now
    finally:
        runner.close()
    assert good.measured.status.value == "disturbed" and not good.won and "times as long as it does" in good.measured.reason


@pytest.mark.parametrize(("kernel", "status"), BAD.items())
def test_a_bad_candidate_is_found_and_the_next_one_is_measured(runner: ProcessRunner, kernel: str, status: str) -> None:
    bad, good = measure(runner, kernel, "good", incumbent=Incumbent(built("slow"), 1e-3))
    assert (bad.measured.status.value, bad.won) == (status, False)
    assert bad.measured.reason
    assert good.won and good.measured.ok


@pytest.mark.parametrize(
    ("kernel", "words"),
    [("crashes", "SIGSEGV"), ("aborts", "SIGABRT"), ("never_ends", "no answer for 3 s"), ("raises", "no such tile"),
     ("exits", "exit status 0"), ("outside", "behind output 0, 8 bytes away"), ("changes_inputs", "SIGSEGV"),
     ("unwritten", "relative error nan")],
)  # fmt: skip
def test_the_reason_says_what_happened(runner: ProcessRunner, kernel: str, words: str) -> None:
    assert words in measure(runner, kernel)[0].measured.reason


def test_the_first_that_is_right_has_the_time_that_its_calls_take() -> None:
    """A race without an incumbent is seven calls at least, and the seconds for the first one were meant for one."""
    runner = ProcessRunner(LOADER, threads=1, timing=replace(QUICK, patience=1.0))
    try:
        (trial,) = measure(runner, "lasting")
    finally:
        runner.close()
    assert trial.won, trial.measured


def test_a_winner_that_is_faster_than_the_machine_is_not_believed(runner: ProcessRunner) -> None:
    first, second = runner.measure(replace(subject(), least=1.0), [built("slow"), built("good")], None)
    assert first.won and first.measured.status is Status.OK  # there is nothing yet that it is faster than
    assert not second.won and second.measured.status is Status.INCREDIBLE and "limits" in second.measured.reason


def test_one_that_is_wrong_at_other_sizes_never_wins(runner: ProcessRunner) -> None:
    kernels = ["wrong_elsewhere", "slower", "wrong_elsewhere", "slow", "wrong_elsewhere", "good"]
    trials = list(runner.measure(symbolic_subject(), [built(k) for k in kernels], None))
    assert [t.measured.status.value for t in trials] == ["wrong", "ok"] * 3
    assert [t.won for t in trials] == [False, True] * 3


def test_one_that_is_not_faster_is_not_given_a_smaller_time(runner: ProcessRunner) -> None:
    same = measure(runner, "slow", incumbent=Incumbent(built("slow"), 1e-3))[0]
    assert not same.won
    assert same.measured.seconds is not None and same.measured.seconds >= 1e-3
    assert same.measured.gain is not None and same.measured.gain <= 1


def test_a_candidate_that_could_not_be_built_is_not_run(runner: ProcessRunner) -> None:
    trial = next(runner.measure(subject(), [replace(built("good"), failure="out of registers")], None))
    assert (trial.measured.status, trial.measured.reason, trial.won) == (Status.BUILD_FAILED, "out of registers", False)


def test_a_case_is_sent_once_for_candidates_that_fail(runner: ProcessRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = RunnerProcess.ask
    monkeypatch.setattr(RunnerProcess, "ask", lambda p, request, seconds: asked.append(request["do"]) or ask(p, request, seconds))
    failed = replace(built("good"), failure="out of registers")
    trials = list(runner.measure(subject(), [built("slow"), failed, built("raises"), built("wrong"), built("good")], None))
    assert [t.measured.status.value for t in trials] == ["ok", "build-failed", "crashed", "wrong", "ok"]
    assert asked.count("case") == 3  # the first, and the winner's: another one, and the first again


@pytest.mark.parametrize("kernel", ["leaks", "outside"])
def test_what_a_candidate_does_to_the_process_is_not_the_next_ones(runner: ProcessRunner, kernel: str) -> None:
    measure(runner, "good")
    assert runner._process is not None
    child = runner._process._child
    bad, good = measure(runner, kernel, "slow")
    assert not bad.measured.ok and good.measured.ok
    assert runner._process._child != child and gone(child)


def test_if_even_the_supervisor_dies_another_is_started() -> None:
    runner = ProcessRunner(LOADER, threads=1, timing=QUICK)
    try:
        first, second = measure(runner, "kills_the_supervisor", "good")
        assert first.measured.status is Status.CRASHED and "watches over it" in first.measured.reason
        assert second.measured.ok
        assert runner._process is not None
        os.kill(runner._process._process.pid, 9)
        assert gone(runner._process._child)
        assert measure(runner, "good")[0].measured.ok, "before it ran, so it is not to blame"
    finally:
        runner.close()


class Crowded(Bench):
    """Has no room for a case as long as a file says so, which each try shortens by a byte."""

    def __init__(self, file: str) -> None:
        super().__init__(load)
        self.file = Path(file)

    def case(self, **request: Any) -> dict[str, Any]:
        if left := self.file.stat().st_size:
            os.truncate(self.file, left - 1)
            raise torch.OutOfMemoryError("CUDA out of memory.\nIts second line.")
        return super().case(**request)


class Assembling(Bench):
    """Starts another process for each candidate, and waits for it; the answer to its number is in a file."""

    def __init__(self, file: str) -> None:
        super().__init__(load)
        self.file = Path(file)

    def build(self) -> dict[str, Any]:
        process = subprocess.Popen(["sleep", "600"])
        self.file.write_text(str(process.pid))
        process.wait()
        return {}


def main(arguments: str) -> None:
    """Be the supervisor of one of these."""
    name, file = arguments.split(" ", 1)
    supervise(lambda: {"crowded": Crowded, "assembling": Assembling}[name](file))


@pytest.mark.parametrize("times", [1, 2])
def test_no_candidate_is_blamed_if_there_is_no_room_for_a_case(times: int, tmp_path: Path) -> None:
    file = tmp_path / "left"
    file.write_text("x" * times)
    runner = ProcessRunner(f"crowded {file}", threads=1, timing=QUICK, module=__name__)
    try:
        if times == 1:  # a fresh process has the room
            assert [t.measured.ok for t in measure(runner, "slow", "good")] == [True, True]
        else:
            with pytest.raises(WorkerError, match=r"MiB of a kernel's inputs and outputs: OutOfMemoryError: CUDA out of memory\.$"):
                measure(runner, "slow")
    finally:
        runner.close()


def answerless(process: RunnerProcess, seconds: float) -> None:
    with suppress(Exception):
        process.ask({"do": "build"}, seconds)


@pytest.mark.parametrize("how", ["no answer", "closed", "died"])
def test_what_a_child_started_ends_with_it(how: str, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    process = RunnerProcess(f"assembling {file}", __name__, "builds candidates")
    try:
        process.ready()
        seconds = 3.0 if how == "no answer" else 60.0
        asked = threading.Thread(target=answerless, args=(process, seconds), daemon=True)
        asked.start()
        assert until(lambda: file.exists() and file.read_text() != "")
        if how == "died":
            os.kill(process._child, signal.SIGSEGV)
        if how != "closed":
            asked.join()
    finally:
        process.close()
    assert gone(int(file.read_text()))


def test_a_process_that_does_not_start_says_what_it_is_for() -> None:
    process = RunnerProcess("", "graphopt.nowhere", "builds candidates")
    try:
        with pytest.raises(WorkerError, match=r"the process that builds candidates is gone: .*graphopt\.nowhere"):
            process.ready()
    finally:
        process.close()


def test_closing_leaves_no_process() -> None:
    runner = ProcessRunner(LOADER, threads=1, timing=QUICK)
    measure(runner, "good")
    assert runner._process is not None
    pids = runner._process._process.pid, runner._process._child
    runner.close()
    assert all(gone(pid) for pid in pids)


def until(happened: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether something happens in some seconds."""
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.01)
    return happened()


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether a process ends in some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


# --- the rule, and the memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidate", "incumbent", "won"),
    [
        ((9, 9, 9, 9), (10, 10, 10, 10), True),
        ((10, 10, 10, 10), (10, 10, 10, 10), False),
        ((9.95, 9.95, 9.95, 9.95), (10, 10, 10, 10), False),  # within the margin
        ((9, 9, 50, 9), (10, 10, 10, 10), True),  # one disturbance
        ((5, 5, 11, 11), (10, 10, 10, 10), False),  # faster in half of the pairs
        ((9, 18, 36, 72), (10, 20, 40, 80), True),  # the machine slows down under both
    ],
)
def test_who_wins(candidate: tuple[float, ...], incumbent: tuple[float, ...], won: bool) -> None:
    assert Race(candidate, incumbent).won(0.01) is won


@pytest.mark.parametrize("strides", [(3, 1), (1, 2)])
def test_bools_that_were_not_written_stay_what_no_bool_is(strides: tuple[int, int]) -> None:
    output = Output((2, 3), strides, torch.bool)
    arena = Arena(Case((), (output,), lambda results: Verdict(0.0)))
    bench = Bench(lambda path, entry: lambda out: None)
    try:
        bench.case(**arena.description, weights=[], between=0, threads=1)
        arena.poison()
        bench.race(("", "nothing"), None, 0.0, 1e-9, 2.0, 1 << 30, 1e9)
        assert bool((arena.results()[0].view(torch.uint8) > 1).all())
    finally:
        arena.close()


def test_the_arena_finds_writes_around_an_output_of_any_layout() -> None:
    outputs = (Output((3, 5), (1, 3), torch.float64), Output((7,), (1,), torch.bool))
    arena = Arena(Case((torch.arange(6.0).reshape(2, 3).t(),), outputs, lambda results: Verdict(0.0)))
    try:
        arena.poison()
        first, second = arena.results()
        assert bool(first.isnan().all()) and not arena.damage()
        assert first.stride() == (1, 3)
        first.zero_()
        second.fill_(True)
        assert not arena.damage()
        arena._memory[arena.outputs[0].offset - 3] = 0
        assert arena.damage() == "it wrote to memory before output 0, 3 bytes away"
    finally:
        arena.close()

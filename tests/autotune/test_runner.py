"""The runner: a bad candidate costs only itself, whatever it does; a good one is timed against the incumbent."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graphopt.autotune.arena import Arena
from graphopt.autotune.measure import Case, Incumbent, Output, Race, Timing, Trial, Verdict
from graphopt.autotune.records import Status
from graphopt.autotune.runner import ProcessRunner, RunnerProcess
from tests.autotune.fake_kernels import BAD, LOADER, built, subject

QUICK = Timing(floor=0.004, recheck=0.008, patience=3.0)


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


def test_a_winner_that_is_faster_than_the_machine_is_not_believed(runner: ProcessRunner) -> None:
    first, second = runner.measure(replace(subject(), least=1.0), [built("slow"), built("good")], None)
    assert first.won and first.measured.status is Status.OK  # there is nothing yet that it is faster than
    assert not second.won and second.measured.status is Status.INCREDIBLE and "limits" in second.measured.reason


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
    trials = list(runner.measure(subject(), [built("slow"), failed, built("raises"), built("leaks"), built("wrong"), built("good")], None))
    assert [t.measured.status.value for t in trials] == ["ok", "build-failed", "crashed", "leaked", "wrong", "ok"]
    assert asked.count("case") == 3  # the first, and the winner's: another one, and the first again


def test_if_even_the_supervisor_dies_another_is_started() -> None:
    runner = ProcessRunner(LOADER, threads=1, timing=QUICK)
    try:
        assert measure(runner, "good")[0].measured.ok
        assert runner._process is not None
        os.kill(runner._process._process.pid, 9)
        assert gone(runner._process._child)
        first, second = measure(runner, "good", "good")
        assert first.measured.status is Status.CRASHED
        assert second.measured.ok
    finally:
        runner.close()


def test_closing_leaves_no_process() -> None:
    runner = ProcessRunner(LOADER, threads=1, timing=QUICK)
    measure(runner, "good")
    assert runner._process is not None
    pids = runner._process._process.pid, runner._process._child
    runner.close()
    assert all(gone(pid) for pid in pids)


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

"""Another machine, on loopback: it is described as it is, and a candidate that is bad in any way costs only itself."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from graphopt.autotune.arena import Arena
from graphopt.autotune.database import Database
from graphopt.autotune.measure import Built, Incumbent, Trial
from graphopt.autotune.records import Status
from graphopt.autotune.runner import RunnerProcess
from graphopt.cli.main import app
from graphopt.cli.tune import _again
from graphopt.errors import DeviceError, RemoteError, UsageError
from graphopt.remote import MOST_LOST, Address, RemoteRunner
from graphopt.remote_bench import RemoteBench
from graphopt.target import Target, detect
from graphopt.tuned import device_key
from graphopt.tuning import check_device
from tests import rpc_check
from tests.autotune.busy import timing
from tests.autotune.fake_kernels import SIZE, schedule, subject

KEY, KEPT = "loop", "kept"  # of a server that each test borrows for itself, and of one that ``runner`` keeps
MODEL = """
import torch

def make():
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU()), (torch.randn(4, 32),)
"""
QUICK = timing(floor=0.002, recheck=0.004, patience=1.0)

# kernels of x, y and out, 64 elements of f32 each
KERNELS = """target triple = "TRIPLE"
@calls = internal global i64 0
declare ptr @malloc(i64)
declare ptr @memset(ptr, i32, i64)
declare void @_exit(i32)
define internal ptr @data(ptr %args, i64 %i) {
  %twice = mul i64 %i, 2
  %next = add i64 %twice, 1
  %at = getelementptr ptr, ptr %args, i64 %next
  %tensor = load ptr, ptr %at
  %data = load ptr, ptr %tensor
  ret ptr %data
}
define internal void @add(ptr %args, i64 %n, float %more) {
entry:
  %x = call ptr @data(ptr %args, i64 0)
  %y = call ptr @data(ptr %args, i64 1)
  %out = call ptr @data(ptr %args, i64 2)
  br label %body
body:
  %i = phi i64 [0, %entry], [%next, %body]
  %xp = getelementptr float, ptr %x, i64 %i
  %yp = getelementptr float, ptr %y, i64 %i
  %op = getelementptr float, ptr %out, i64 %i
  %a = load float, ptr %xp
  %b = load float, ptr %yp
  %s = fadd float %a, %b
  %t = fadd float %s, %more
  store float %t, ptr %op
  %next = add i64 %i, 1
  %done = icmp eq i64 %next, %n
  br i1 %done, label %over, label %body
over:
  ret void
}
define i32 @__tvm_ffi_good(ptr %self, ptr %args, i32 %n, ptr %result) {
  call void @add(ptr %args, i64 64, float 0.0)
  ret i32 0
}
define i32 @__tvm_ffi_slow(ptr %self, ptr %args, i32 %n, ptr %result) {
entry:
  br label %body
body:
  %i = phi i64 [0, %entry], [%next, %body]
  call void @add(ptr %args, i64 64, float 0.0)
  %next = add i64 %i, 1
  %done = icmp eq i64 %next, 100
  br i1 %done, label %over, label %body
over:
  ret i32 0
}
define i32 @__tvm_ffi_wrong(ptr %self, ptr %args, i32 %n, ptr %result) {
  call void @add(ptr %args, i64 64, float 1.0)
  ret i32 0
}
define i32 @__tvm_ffi_unwritten(ptr %self, ptr %args, i32 %n, ptr %result) {
  call void @add(ptr %args, i64 63, float 0.0)
  ret i32 0
}
define i32 @__tvm_ffi_outside(ptr %self, ptr %args, i32 %n, ptr %result) {
  call void @add(ptr %args, i64 64, float 0.0)
  %out = call ptr @data(ptr %args, i64 2)
  %behind = getelementptr i8, ptr %out, i64 264
  store i8 0, ptr %behind
  ret i32 0
}
define i32 @__tvm_ffi_changes_inputs(ptr %self, ptr %args, i32 %n, ptr %result) {
  call void @add(ptr %args, i64 64, float 0.0)
  %x = call ptr @data(ptr %args, i64 0)
  store float 0.0, ptr %x
  ret i32 0
}
define i32 @__tvm_ffi_crashes(ptr %self, ptr %args, i32 %n, ptr %result) {
  %nowhere = inttoptr i64 8 to ptr
  store volatile i8 0, ptr %nowhere
  ret i32 0
}
define i32 @__tvm_ffi_exits(ptr %self, ptr %args, i32 %n, ptr %result) {
  call void @_exit(i32 0)
  ret i32 0
}
define i32 @__tvm_ffi_fails(ptr %self, ptr %args, i32 %n, ptr %result) {
  ret i32 -1
}
define i32 @__tvm_ffi_never_ends(ptr %self, ptr %args, i32 %n, ptr %result) {
entry:
  br label %body
body:
  store volatile i64 1, ptr @calls
  br label %body
}
define i32 @__tvm_ffi_leaks(ptr %self, ptr %args, i32 %n, ptr %result) {
  call void @add(ptr %args, i64 64, float 0.0)
  %m = call ptr @malloc(i64 65536)
  %f = call ptr @memset(ptr %m, i32 1, i64 65536)
  ret i32 0
}
define i32 @__tvm_ffi_wrong_later(ptr %self, ptr %args, i32 %n, ptr %result) {
  %before = load i64, ptr @calls
  %now = add i64 %before, 1
  store i64 %now, ptr @calls
  %late = icmp sgt i64 %now, 8
  %more = select i1 %late, float 1.0, float 0.0
  call void @add(ptr %args, i64 64, float %more)
  ret i32 0
}
"""
BAD = {
    "wrong": (Status.WRONG, "error"), "unwritten": (Status.WRONG, "nan"), "outside": (Status.WRONG, "behind output 0, 8 bytes away"),
    "changes_inputs": (Status.CRASHED, "SIGSEGV"), "crashes": (Status.CRASHED, "SIGSEGV"), "exits": (Status.CRASHED, "exit status 0"),
    "fails": (Status.CRASHED, "returned an error"), "never_ends": (Status.TIMED_OUT, "did not end within 1 s"),
    "leaks": (Status.LEAKED, "resident memory grows"), "wrong_later": (Status.WRONG, "error"),
    "absent": (Status.CRASHED, "has no kernel absent"),
}  # fmt: skip

MISSING = [p for p in rpc_check.NEEDS if importlib.util.find_spec(p) is None]
pytestmark = [pytest.mark.tvm, pytest.mark.skipif(bool(MISSING), reason=rpc_check.WHY_NOT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from graphopt.backends.tvm.gomp import build_ir

    assert SIZE == 64  # as in KERNELS
    folder = tmp_path_factory.mktemp("rpc")
    assert build_ir(KERNELS, folder / "kernels.so", detect())
    return folder


@pytest.fixture(scope="module")
def tracker(folder: Path) -> Iterator[int]:
    try:
        rpc_check.free_port()
    except OSError as error:
        pytest.skip(f"no sockets here: {error}")
    with rpc_check.tracker(folder) as port:
        yield port


@pytest.fixture(scope="module")
def server(folder: Path, tracker: int) -> Iterator[int]:
    """The tracker, which has a server."""
    with rpc_check.server(folder, tracker, KEY):
        yield tracker


@pytest.fixture(scope="module")
def runner(folder: Path, tracker: int) -> Iterator[RemoteRunner]:
    runner = RemoteRunner(Address(rpc_check.HOST, tracker, KEPT), 1, QUICK)
    with rpc_check.server(folder, tracker, KEPT):
        try:
            runner.connect()
            yield runner
        finally:
            runner.close()


@pytest.fixture(scope="module")
def small_machine() -> Target:
    """What servers run on: this machine, with one of its processors."""
    if detect().cores < 2:
        pytest.skip("the other machine cannot be told from this one, which has one core")
    return replace(detect(), cores=1)


def built(folder: Path, kernel: str) -> Built:
    return Built(schedule(kernel), str(folder / "kernels.so"), kernel)


def measure(runner: RemoteRunner, folder: Path, *kernels: str, incumbent: Incumbent | None = None) -> list[Trial]:
    return list(runner.measure(subject(), [built(folder, k) for k in kernels], incumbent))


# --- the command -------------------------------------------------------------------------------------------------------


def tune(tracker: str, key: str, folder: Path, *args: str) -> Result:
    (folder / "model.py").write_text(MODEL)
    common = ["--rpc", tracker, "--key", key, "--budget", "60s", "--db", str(folder / "t.db")]
    return CliRunner().invoke(app, ["tune", f"{folder / 'model.py'}:make", *common, *args])


def test_a_model_is_tuned_for_the_other_machine(server: int, small_machine: Target, tmp_path: Path) -> None:
    done = tune(f"{rpc_check.HOST}:{server}", KEY, tmp_path, "--trials", "3")
    assert done.exit_code == 0, done.stderr
    records = Database(tmp_path / "t.db").records()
    assert len(records) == 3 and all(r.measured.ok for r in records)
    assert {(r.target, r.device, r.threads) for r in records} == {(small_machine.fingerprint, str(small_machine), 1)}
    assert small_machine.fingerprint != device_key(detect()), "this machine has another processor for itself"
    assert "the models were not run" in done.stdout and "graphopt db import" in done.stdout


def test_what_cannot_be_loaded_there_is_told_and_the_server_goes_on(server: int, tmp_path: Path) -> None:
    for arch in ("x86_64", "aarch64"):
        (tmp_path / f"agent-{arch}.so").write_text("built for another machine")
    for _ in range(2):
        with pytest.raises(RemoteError, match=r"nothing that is built here can be loaded there; .*: .*; .*: "):
            RemoteBench(rpc_check.HOST, server, KEY, str(tmp_path), 1, patience=5.0).connect()


# --- the runner --------------------------------------------------------------------------------------------------------


def test_it_is_described_as_it_describes_itself(runner: RemoteRunner, small_machine: Target) -> None:
    assert runner.connect().target == small_machine


def test_the_first_that_is_right_is_the_incumbent_and_a_faster_one_takes_its_place(runner: RemoteRunner, folder: Path) -> None:
    wrong, slow, good, again = measure(runner, folder, "wrong", "slow", "good", "slow")
    assert [t.won for t in (wrong, slow, good, again)] == [False, True, True, False]
    assert slow.measured.seconds is not None and good.measured.gain is not None and good.measured.gain > 5
    assert good.measured.seconds == pytest.approx(slow.measured.seconds / good.measured.gain)
    assert good.measured.error is not None and 0 <= good.measured.error < 1e-6


@pytest.mark.parametrize(("kernel", "status", "words"), [(k, *v) for k, v in BAD.items()])
def test_a_bad_candidate_is_found_and_the_next_one_is_measured(
    runner: RemoteRunner, folder: Path, kernel: str, status: Status, words: str
) -> None:
    bad, good = measure(runner, folder, kernel, "good", incumbent=Incumbent(built(folder, "slow"), 1e-3))
    assert (bad.measured.status, bad.won) == (status, False)
    assert words in bad.measured.reason
    assert good.won and good.measured.ok


# --- memory of the other machine ---------------------------------------------------------------------------------------


@pytest.fixture
def bench(folder: Path, server: int) -> Iterator[RemoteBench]:
    """A session of this process."""
    bench = RemoteBench(rpc_check.HOST, server, KEY, str(folder), 1, patience=30.0)
    bench.connect()
    yield bench
    bench._case = bench._session = None  # it ends


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(subject().case(0))
    yield arena
    arena.close()


def send(bench: RemoteBench, arena: Arena) -> None:
    bench.case(**arena.description, weights=[], between=0, threads=1)


@pytest.mark.parametrize("page", [4 << 10, 16 << 10, 64 << 10])
def test_inputs_are_read_only_to_their_end_on_pages_of_any_size(bench: RemoteBench, arena: Arena, page: int) -> None:
    assert arena.writable % (16 << 10), "the inputs end on a large page by themselves"
    assert bench._session is not None
    bench._session.page = page
    send(bench, arena)
    assert bench._case is not None
    end = bench._case._image + arena.writable
    maps = [line.split()[:2] for line in bench._session.text("/proc/self/maps").splitlines()]
    assert [how for where, how in maps if where.endswith(f"-{end:x}")] == ["r--s"]


def test_a_machine_without_memory_costs_the_candidate_and_keeps_the_session(
    bench: RemoteBench, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.backends.tvm.rpc import Refused

    session = bench._session
    mapped, unmapped = [], []
    assert session is not None
    map_memory, unmap = session.map, session.unmap

    def first_only(size: int, shared: bool = False) -> int:
        if mapped:
            return map_memory(1 << 60)
        mapped.append(map_memory(size, shared))
        return mapped[-1]

    def noted(address: int, size: int) -> None:
        unmapped.append(address)
        unmap(address, size)

    monkeypatch.setattr(session, "map", first_only)
    monkeypatch.setattr(session, "unmap", noted)
    with pytest.raises(Refused, match="there is no memory for"):
        send(bench, arena)
    assert unmapped == mapped
    monkeypatch.undo()
    send(bench, arena)
    assert bench._session is session


# --- a server that is lost, or not there -------------------------------------------------------------------------------


def losing(runner: RemoteRunner, monkeypatch: pytest.MonkeyPatch, what: str, times: int) -> list[str]:
    """The session ends in the next requests for something; the requests that are made from now on."""
    asked: list[str] = []
    ask = RunnerProcess.ask

    def lost(process: RunnerProcess, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        asked.append(request["do"])
        if request["do"] == what and asked.count(what) <= times:
            process.ready()
            os.kill(process._child, signal.SIGKILL)  # with it the connection ends
        return ask(process, request, seconds)

    monkeypatch.setattr(RunnerProcess, "ask", lost)
    return asked


@pytest.mark.parametrize(("what", "times"), [("case", 2), ("check", 1), ("race", 1)])
def test_a_candidate_whose_session_is_lost_is_tried_again(
    runner: RemoteRunner, folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, times: int
) -> None:
    asked = losing(runner, monkeypatch, what, times)
    assert measure(runner, folder, "good")[0].measured.ok
    assert asked.count("case") == 1 + times


def test_one_that_is_lost_twice_is_lost_and_the_next_one_has_a_new_session(
    runner: RemoteRunner, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(runner, monkeypatch, "check", 2)
    lost, good = measure(runner, folder, "slow", "slow")
    assert lost.measured.status is Status.LOST and f"'{KEPT}'" in lost.measured.reason
    assert good.measured.ok


def test_a_case_is_sent_once_for_candidates_that_fail(runner: RemoteRunner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = losing(runner, monkeypatch, "", 0)
    kernels = [built(folder, k) for k in ("good", "crashes", "good", "fails", "leaks", "good")]
    kernels[2] = replace(kernels[2], failure="out of registers")
    trials = list(runner.measure(subject(), kernels, None))
    assert [t.measured.status.value for t in trials] == ["ok", "crashed", "build-failed", "crashed", "leaked", "ok"]
    assert asked.count("case") == 1


def test_a_server_that_is_gone_ends_the_tuner(folder: Path, tracker: int) -> None:
    key = "fragile"
    runner = RemoteRunner(Address(rpc_check.HOST, tracker, key), 1, QUICK, patience=0.5)
    runner.start()
    try:
        with rpc_check.server(folder, tracker, key):
            runner.connect()
            trials = runner.measure(subject(), [built(folder, "good"), built(folder, "good")], None)
            assert next(trials).measured.ok
        with pytest.raises(RemoteError, match=f"'{key}' of the tracker at {rpc_check.HOST}:{tracker} was lost {MOST_LOST} times"):
            next(trials)
    finally:
        runner.close()


def test_a_key_must_stand_for_machines_that_are_the_same(runner: RemoteRunner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_machine", "another")
    with pytest.raises(RemoteError, match="another machine than the one before"):
        measure(runner, folder, "good")


def test_no_tracker_no_server(tracker: int, server: int, tmp_path: Path) -> None:
    nowhere = rpc_check.free_port()
    done = tune(f"{rpc_check.HOST}:{nowhere}", "k", tmp_path)
    assert done.exit_code == 13
    assert f"no tracker answers at {rpc_check.HOST}:{nowhere}" in done.stderr and "'k'" in done.stderr
    with pytest.raises(RemoteError, match=f"has no server with key 'lop'; it has .*'{KEY}'"):
        RemoteBench(rpc_check.HOST, tracker, "lop", str(tmp_path), 1, patience=0.1).connect()


@pytest.mark.parametrize(
    ("tracker", "key", "words"),
    [("nowhere", "k", "HOST:PORT"), ("h:0", "k", "HOST:PORT"), ("h:99999", "k", "HOST:PORT"), ("h:9190", None, "needs --key")],
)
def test_addresses_that_are_none(tracker: str, key: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Address.parse(tracker, key)


def test_addresses() -> None:
    again = _again(["m"], "cpu", None, 0, None, None, None, None, Address("rack", 9190, "k"), False, 600.0)
    assert "--rpc rack:9190 --key k" in again and "--threads" not in again
    assert Address.parse("rack:9190", "k") == Address("rack", 9190, "k")
    assert Address.parse("[::1]:9190", "k") == Address("::1", 9190, "k")


def test_what_was_measured_on_another_machine_is_known_by_both() -> None:
    old, machine = Target.from_name("cpu:x86-64-v3"), Target.from_name("cpu:znver4:8")
    assert device_key(machine, machine) == machine.fingerprint
    assert len({device_key(old, machine), device_key(old), old.fingerprint, machine.fingerprint}) == 4
    with pytest.raises(DeviceError, match="on the other machine: this processor has no"):
        check_device("cpu:znver4", Target.from_name("cpu:x86-64-v3"))
    assert check_device("cpu", machine) is machine

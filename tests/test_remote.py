"""Another machine, on loopback: it is described as it is, and a candidate that is bad in any way costs only itself."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from graphopt.autotune.database import Database
from graphopt.autotune.measure import Built, Incumbent, Timing, Trial
from graphopt.autotune.records import Status
from graphopt.cli.main import app
from graphopt.cli.tune import _again
from graphopt.errors import DeviceError, RemoteError, UsageError
from graphopt.remote import MOST_LOST, Address, RemoteRunner
from graphopt.remote_bench import RemoteBench
from graphopt.target import Target, detect
from graphopt.tuned import device_key
from graphopt.tuning import check_device
from tests import rpc_check
from tests.autotune.fake_kernels import SIZE, schedule, subject

KEY = "loop"
MODEL = """
import torch

def make():
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU()), (torch.randn(4, 32),)
"""
QUICK = Timing(floor=0.002, recheck=0.004, patience=1.0)

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
def runner(server: int) -> Iterator[RemoteRunner]:
    runner = RemoteRunner(Address(rpc_check.HOST, server, KEY), 1, QUICK)
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


# --- the command; first, while nothing else of this file has borrowed the server ---------------------------------------


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
    remote = runner.connect()
    assert remote.target == small_machine
    assert remote.threads == 1


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


# --- a server that is lost, or not there -------------------------------------------------------------------------------


def test_a_lost_session_costs_a_candidate_and_the_next_one_has_a_new_session(runner: RemoteRunner, folder: Path) -> None:
    assert measure(runner, folder, "good")[0].measured.ok
    assert runner._process is not None
    os.kill(runner._process._child, signal.SIGKILL)  # with it the connection ends
    lost, good = measure(runner, folder, "slow", "slow")
    assert lost.measured.status is Status.LOST and f"'{KEY}'" in lost.measured.reason
    assert good.measured.ok


def test_a_server_that_is_gone_ends_the_tuner(folder: Path, tracker: int) -> None:
    key = "fragile"
    runner = RemoteRunner(Address(rpc_check.HOST, tracker, key), 1, QUICK, patience=0.5)
    runner.start()
    try:
        with rpc_check.server(folder, tracker, key):
            runner.connect()
            trials = runner.measure(subject(), [built(folder, "good") for _ in range(1 + MOST_LOST)], None)
            assert next(trials).measured.ok
        for _ in range(MOST_LOST - 1):
            assert next(trials).measured.status is Status.LOST
        with pytest.raises(RemoteError, match=f"'{key}' of the tracker at {rpc_check.HOST}:{tracker} was lost {MOST_LOST} times"):
            next(trials)
    finally:
        runner.close()


def test_a_key_must_stand_for_machines_that_are_the_same(runner: RemoteRunner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_machine", "another")
    with pytest.raises(RemoteError, match="another machine than the one before"):
        measure(runner, folder, "good")


def test_no_tracker_no_server(tracker: int, runner: RemoteRunner, tmp_path: Path) -> None:
    nowhere = rpc_check.free_port()
    done = tune(f"{rpc_check.HOST}:{nowhere}", "k", tmp_path)
    assert done.exit_code == 13
    assert f"no tracker answers at {rpc_check.HOST}:{nowhere}" in done.stderr and "'k'" in done.stderr
    with pytest.raises(RemoteError, match=f"has no server with key 'lop'; it has '{KEY}'"):
        RemoteBench(rpc_check.HOST, tracker, "lop", str(tmp_path), 1, patience=0.1).connect()


@pytest.mark.parametrize(
    ("tracker", "key", "words"),
    [("nowhere", "k", "HOST:PORT"), ("h:0", "k", "HOST:PORT"), ("h:99999", "k", "HOST:PORT"), ("h:9190", None, "needs --key")],
)
def test_addresses_that_are_none(tracker: str, key: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Address.parse(tracker, key)


def test_addresses() -> None:
    again = _again(["m"], "cpu", "10m", None, 0, None, None, None, Address("rack", 9190, "k"))
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

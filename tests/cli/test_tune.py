"""``graphopt tune``: wrong requests are named at once; a tiny model is really tuned, and a run is gone on with."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from graphopt.autotune.database import Database
from graphopt.autotune.records import TuningRecord
from graphopt.backends.tvm.build import KernelBuilder
from graphopt.child_process import start_python
from graphopt.cli.main import app
from graphopt.cli.tune import duration
from graphopt.devices import choose_target
from graphopt.errors import BuildError, DiskFullError, UsageError
from graphopt.options import Options
from graphopt.target import Target, detect
from graphopt.tuned import device_key
from graphopt.tuning_tvm import TvmCandidates

MODEL = """
import torch

def make():
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)), (torch.randn(4, 32),)
"""


def tune(*args: str) -> Result:
    return CliRunner().invoke(app, ["tune", *args])


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("0.5s", 0.5), ("1m30s", 90)])
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "ten", "10x", "5m!", "0s", "-3s", "m"])
def test_no_durations(text: str) -> None:
    with pytest.raises(UsageError, match="--budget"):
        duration(text)


@pytest.mark.parametrize(
    ("args", "status", "word"),
    [
        ((), 2, "which model?"),
        (("brt",), 2, "bert"),
        (("mlp", "--budget", "soon"), 2, "no duration"),
        (("mlp", "--budget", "20"), 2, "write 20s, 20m or 1h30m"),
        (("mlp", "--plot", "/"), 2, "is a folder; write /out.png"),
        (("mlp", "--device", "gpu"), 10, "a GPU is called cuda"),
        (("mlp", "--trials", "0"), 2, "trials"),
        (("mlp", "--device", "cpu:zmver5"), 10, "znver5"),
        (("mlp", "--device", "cuda:sm_90"), 10, "timed on the GPU itself: --device cuda, where it is"),
        (("mlp", "--interpret"), 2, "'cpu' is a processor"),
        (("mlp", "--device", "cuda", "--interpret"), 10, "unknown target 'cuda'"),
        (("mlp", "--device", "cuda:sm_90", "--interpret", "--rpc", "localhost:9190", "--key", "k"), 2, "--interpret runs kernels here"),
        (("nowhere.py:make",), 2, "there is no file nowhere.py"),
    ],
)
def test_wrong_requests(args: tuple[str, ...], status: int, word: str, tmp_path: Path) -> None:
    done = tune(*args, "--cache-dir", str(tmp_path))
    assert done.exit_code == status
    assert word in done.stderr


def test_a_file_that_is_no_database_is_told_before_anything_is_done(tmp_path: Path) -> None:
    file = tmp_path / "notes.db"
    file.write_text("nothing of the kind\n" * 100)
    done = tune("mlp", "--db", str(file))
    assert done.exit_code == 2
    assert "notes.db" in done.stderr
    assert file.read_text().startswith("nothing of the kind")


def test_a_damaged_database_is_kept_aside(tmp_path: Path) -> None:
    file = tmp_path / "tuning.db"
    file.write_bytes(b"SQLite format 3\0" + b"rubbish" * 1000)
    before = file.read_bytes()
    done = tune("mlp", "--cache-dir", str(tmp_path))
    assert done.exit_code == 9
    (aside,) = tmp_path.glob("tuning.db.damaged-*")
    assert "damaged" in done.stderr and str(aside) in done.stderr
    assert aside.read_bytes() == before and not file.exists()


def test_a_database_that_may_not_be_read_is_out_of_reach(tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.write_text("")
    done = tune("mlp", "--db", str(folder / "tuning.db"))
    assert done.exit_code == 9
    assert "cannot be read" in done.stderr


def test_a_database_that_may_not_be_written_is_told_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr("graphopt.cli.tune_sessions.load", lambda name: pytest.fail("it was compiled"))
    done = tune("mlp", "--db", str(tmp_path / "new" / "tuning.db"))
    assert done.exit_code == 9
    assert f"cannot be written: nothing may be written to {tmp_path}" in done.stderr and not list(tmp_path.iterdir())


@pytest.fixture
def small(tmp_path: Path) -> tuple[str, ...]:
    """Arguments for a small model, and a folder of its own."""
    pytest.importorskip("tvm_ffi")
    (tmp_path / "model.py").write_text(MODEL)
    return f"{tmp_path}/model.py:make", "--threads", "1", "--cache-dir", str(tmp_path / "cache"), "--budget", "60s"


def fails_after(n: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the database take n records, and then raise."""
    add, taken = Database.add, itertools.count()

    def add_or_fail(self: Database, records: Iterable[TuningRecord]) -> int:
        if next(taken) >= n:
            raise error
        return add(self, records)

    monkeypatch.setattr(Database, "add", add_or_fail)


@pytest.mark.tvm
def test_a_full_disk_ends_it_and_keeps_what_there_was_room_for(small: tuple[str, ...], tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    fails_after(2, DiskFullError("tuning database: the disk is full"), monkeypatch)
    done = tune(*small)
    assert done.exit_code == 11, done.stderr
    assert "disk is full" in done.stderr and "2 trials of this run are kept" in done.stderr and "--resume" in done.stderr
    assert [r.trial for r in Database(tmp_path / "cache" / "tuning.db").records()] == [1, 2]


@pytest.mark.tvm
def test_ctrl_c_keeps_all_and_says_how_to_go_on(small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_after(3, KeyboardInterrupt(), monkeypatch)
    done = tune(*small, "--trials", "5")
    assert done.exit_code == 130, done.stderr
    assert "3 trials made, and kept in" in done.stderr
    again = shlex.split(done.stderr.splitlines()[-1])
    assert again[:2] == ["graphopt", "tune"] and again[-1] == "--resume"
    assert 1 <= duration(again[again.index("--budget") + 1]) <= 60
    monkeypatch.undo()
    rest = tune(*again[2:])
    assert rest.exit_code == 0, rest.stderr
    assert "which has made 3 trials" in rest.stderr and "2 trials in" in rest.stdout
    assert [r.trial for r in Database(tmp_path / "cache" / "tuning.db").records()] == [1, 2, 3, 4, 5]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    done = tune("mlp", "--device", "cuda", "--cache-dir", str(tmp_path))
    assert done.exit_code == 10
    assert "there is no such GPU here" in done.stderr and "--interpret" in done.stderr


def test_kernels_of_a_gpu_are_tuned_interpreted(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "model.py").write_text(MODEL)
    common = (f"{tmp_path}/model.py:make", "--device", "cuda:sm_90:4", "--interpret", "--cache-dir", str(tmp_path / "cache"))
    done = tune(*common, "--trials", "2")
    assert done.exit_code == 0, done.stderr
    assert "say nothing of a GPU" in done.stderr
    assert "2 records in" in done.stdout and "count for interpreted models alone" in done.stdout
    rest = tune(*common, "--trials", "3", "--resume")
    assert "which has made 2 trials" in rest.stderr, rest.stderr
    records = Database(tmp_path / "cache" / "tuning.db").records()
    assert [r.trial for r in records] == [1, 2, 3]
    assert all(r.device.startswith("cuda:sm_90 interpreted on cpu") and r.threads == 1 for r in records)


def test_records_are_of_the_device_as_the_models_file_left_it(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "model.py").write_text(MODEL + "\ntorch.set_float32_matmul_precision('high')\n")
    before = torch.get_float32_matmul_precision()
    try:
        done = tune(f"{tmp_path}/model.py:make", "--device", "cuda:sm_90:4", "--interpret", "--trials", "1", "--cache-dir", str(tmp_path))
        assert torch.get_float32_matmul_precision() == "high"
        used = choose_target(torch.device("cpu"), Options(backend="triton", target="cuda:sm_90:4"))
    finally:
        torch.set_float32_matmul_precision(before)
    assert done.exit_code == 0, done.stderr
    assert "tf32" in used.features
    assert {r.target for r in Database(tmp_path / "tuning.db").records()} == {device_key(used, detect())}


def test_ctrl_c_before_the_first_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphopt.cli.tune_sessions.load", load)
    done = tune("mlp", "--cache-dir", str(tmp_path))
    assert done.exit_code == 130
    assert "interrupted before the first trial; nothing was tuned" in done.stderr
    assert not list(tmp_path.iterdir())


def test_more_threads_than_there_are_cores_are_told_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphopt.cli.tune_sessions.load", load)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4096)
    done = tune("mlp", "--threads", "4096", "--cache-dir", str(tmp_path))
    assert "4096 threads are more than" in done.stderr


@pytest.mark.tvm
def test_ctrl_c_while_the_models_are_measured_says_how_to_do_that_again(small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphopt.cli.tune_sessions._measured", measure)
    done = tune(*small, "--trials", "2")
    assert done.exit_code == 130, done.stderr
    assert "2 trials made, and kept in" in done.stderr and "slower in a model were not looked for" in done.stderr
    again = shlex.split(done.stderr.splitlines()[-1])
    assert again[-1] == "--resume"
    monkeypatch.undo()
    rest = tune(*again[2:])
    assert rest.exit_code == 0, rest.stderr
    assert "which has made 2 trials" in rest.stderr
    assert "runs in turns" in rest.stdout or "nothing changes" in rest.stdout, "the models were measured"


@pytest.mark.tvm
def test_a_second_ctrl_c_while_the_run_is_closed_says_what_was_kept(small: tuple[str, ...], tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def save_model(self: Database, name: str, data: bytes) -> None:
        raise KeyboardInterrupt

    fails_after(3, KeyboardInterrupt(), monkeypatch)
    monkeypatch.setattr(Database, "save_model", save_model)
    done = tune(*small, "--trials", "5")
    assert done.exit_code == 130, done.stderr
    assert "3 trials made, and kept in" in done.stderr and done.stderr.splitlines()[-1].endswith("--resume")


@pytest.mark.tvm
def test_a_picture_that_cannot_be_written_hides_nothing(small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")

    def no_room(*args: object) -> None:
        raise UsageError("--plot out.png cannot be written: No space left on device")

    monkeypatch.setattr("graphopt.cli.tune.plot", no_room)
    done = tune(*small, "--trials", "1", "--plot", str(tmp_path / "out.png"))
    assert done.exit_code == 2 and "No space left" in done.stderr
    assert "runs in turns" in done.stdout or "nothing changes" in done.stdout, "the models were measured before"
    fails_after(1, KeyboardInterrupt(), monkeypatch)
    done = tune(*small, "--trials", "5", "--plot", str(tmp_path / "out.png"))
    assert done.exit_code == 130 and "No space left" in done.stderr and "--resume" in done.stderr


@pytest.mark.tvm
def test_a_runner_that_cannot_start_blames_no_candidate(small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.tuning_tvm.LOADER", "graphopt.nowhere:load")
    done = tune(*small)
    assert done.exit_code == 12, done.stderr
    assert "the process that runs candidates" in done.stderr
    assert not Database(tmp_path / "cache" / "tuning.db").records()


@pytest.mark.tvm
def test_a_builder_that_cannot_start_blames_no_candidate(small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unable(TvmCandidates):
        def __init__(self, target: Target, workers: int) -> None:  # the model was compiled before
            broken = partial(start_python, "raise ImportError('no tvm here')")
            monkeypatch.setattr("graphopt.backends.tvm.build.start_python", lambda program, errors: broken(errors))
            super().__init__(target, workers)

    monkeypatch.setattr("graphopt.tuning_tvm.TvmCandidates", Unable)
    done = tune(*small)
    assert done.exit_code == 12, done.stderr
    assert "no process that builds kernels can be started" in done.stderr and "no tvm here" in done.stderr
    assert not Database(tmp_path / "cache" / "tuning.db").records()


@pytest.mark.tvm
def test_a_folder_without_room_blames_no_candidate(small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: KernelBuilder, w: object, schedules: Sequence[object], *rest: object) -> list[BuildError]:
        return [BuildError("could not be linked:\nOSError: [Errno 28] No space left on device: 'k.so'\nstopped")] * len(schedules)

    monkeypatch.setattr(KernelBuilder, "build_together", no_room)
    done = tune(*small)
    assert done.exit_code == 11, done.stderr
    assert "TMPDIR" in done.stderr
    assert not Database(tmp_path / "cache" / "tuning.db").records()


@pytest.mark.tvm
def test_an_exported_program_is_measured_on_the_inputs_that_it_was_exported_with(tmp_path: Path) -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
            y = super().forward(x)
            return y if scale is None else y * scale

    sizes = {"x": {0: torch.export.Dim("rows", min=2, max=64)}, "scale": None}
    program = torch.export.export(Scaled(32, 64).eval(), (torch.randn(4, 32),), {"scale": torch.ones(64)}, dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "scaled.pt2")
    done = tune(str(tmp_path / "scaled.pt2"), "--plan", "--threads", "1", "--cache-dir", str(tmp_path))
    assert done.exit_code == 0, done.stderr
    assert "matmul 4x32 * 32x64" in done.stdout
    program._example_inputs = None
    torch.export.save(program, tmp_path / "bare.pt2")
    done = tune(str(tmp_path / "bare.pt2"), "--cache-dir", str(tmp_path))
    assert done.exit_code == 2 and "has no example inputs" in done.stderr


UNCAPTURED = """
class Sparse(torch.nn.Module):
    def forward(self, x):
        return x.nonzero()

class Branch(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def sparse():
    return Sparse(), (torch.randn(4, 32),)

def branch():
    return Branch(), (torch.randn(4, 32),)
"""


@pytest.mark.tvm
def test_a_model_that_cannot_be_captured_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(MODEL + UNCAPTURED)
    common = ("--plan", "--threads", "1", "--cache-dir", str(tmp_path / "cache"))
    done = tune(f"{file}:sparse", f"{file}:branch", f"{file}:make", *common)
    assert done.exit_code == 0, done.stderr
    assert "matmul" in done.stdout
    assert "sparse is left out: the model runs through library kernels as a whole: " in done.stderr and "data-dependent" in done.stderr
    assert "branch is left out: Branch could not be exported" in done.stderr
    done = tune(f"{file}:sparse", *common)
    assert done.exit_code == 0, "the same as a model with nothing to tune"
    assert "sparse is left out" in done.stderr and "there is nothing to tune" in done.stdout
    done = tune(f"{file}:sparse", f"{file}:branch", *common)
    assert done.exit_code == 6 and "Branch could not be exported" in done.stderr


def test_interpreted_and_on_a_gpu_the_same_models_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "model.py").write_text(MODEL + UNCAPTURED)
    done = tune(f"{tmp_path}/model.py:sparse", "--device", "cuda:sm_90:4", "--interpret", "--plan", "--cache-dir", str(tmp_path / "cache"))
    assert done.exit_code == 0, done.stderr
    assert "sparse is left out" in done.stderr and "there is nothing to tune" in done.stdout


@pytest.mark.tvm
def test_a_model_is_planned_tuned_and_gone_on_with(tmp_path: Path) -> None:
    pytest.importorskip("tvm_ffi")
    (tmp_path / "model.py").write_text(MODEL)
    common = (f"{tmp_path}/model.py:make", "--threads", "1", "--cache-dir", str(tmp_path / "cache"))
    plan = tune(*common, "--plan")
    assert plan.exit_code == 0, plan.stderr
    assert "matmul" in plan.stdout and "roofline" in plan.stdout
    file = tmp_path / "cache" / "tuning.db"
    assert not Database(file).records()
    first = tune(*common, "--budget", "60s", "--trials", "4")
    assert first.exit_code == 0, first.stderr
    assert "4 trials" in first.stdout
    assert "runs in turns" in first.stdout or "nothing changes" in first.stdout
    second = tune(*common, "--budget", "60s", "--trials", "6", "--resume")
    assert second.exit_code == 0, second.stderr
    assert "2 trials" in second.stdout
    records = Database(file).records()
    assert [r.trial for r in records] == [1, 2, 3, 4, 5, 6]
    assert len({r.run for r in records}) == 1
    assert len({(r.workload.key, r.schedule) for r in records}) == 6
    assert all(r.measured.ok for r in records)

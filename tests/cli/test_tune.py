"""``graphopt tune``: wrong requests are named at once; a tiny model is really tuned, and a run is gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from graphopt.autotune.database import Database
from graphopt.cli.main import app
from graphopt.cli.tune import duration
from graphopt.errors import UsageError

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
    ("args", "word"),
    [
        ((), "which model?"),
        (("brt",), "bert"),
        (("mlp", "--budget", "soon"), "no duration"),
        (("mlp", "--device", "cpu:zmver5"), "znver5"),
        (("mlp", "--device", "cuda:sm_90"), "only processors are tuned"),
        (("nowhere.py:make",), "there is no file nowhere.py"),
    ],
)
def test_wrong_requests(args: tuple[str, ...], word: str, tmp_path: Path) -> None:
    done = tune(*args, "--cache-dir", str(tmp_path))
    assert done.exit_code == 2
    assert word in done.stderr


def test_a_file_that_is_no_database_is_told_before_anything_is_done(tmp_path: Path) -> None:
    file = tmp_path / "notes.db"
    file.write_text("nothing of the kind\n" * 100)
    done = tune("mlp", "--db", str(file))
    assert done.exit_code in (2, 9)
    assert "notes.db" in done.stderr
    assert file.read_text().startswith("nothing of the kind")


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
    assert "4 trials" in first.stdout and "runs in turns" in first.stdout
    second = tune(*common, "--budget", "60s", "--trials", "6", "--resume")
    assert second.exit_code == 0, second.stderr
    assert "2 trials" in second.stdout
    records = Database(file).records()
    assert [r.trial for r in records] == [1, 2, 3, 4, 5, 6]
    assert len({r.run for r in records}) == 1
    assert len({(r.workload.key, r.schedule) for r in records}) == 6
    assert all(r.measured.ok for r in records)

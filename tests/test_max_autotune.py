"""``mode="max-autotune"``: a compilation tunes its kernels, says so, and does not do it twice."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.autotune.database import Database
from graphopt.autotune.tuner import Budget
from graphopt.errors import UsageError
from graphopt.options import TUNE_SECONDS, Options
from graphopt.report import Report
from graphopt.tuning import Run

X = torch.randn(4, 32)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).eval()


def compiled(tmp_path: Path, **options: Any) -> Report:
    """Compile, check the values, and return the report."""
    net = model()
    found = graphopt.compile(net, (X,), cache_dir=tmp_path / "cache", **options)
    torch.testing.assert_close(found(X), net(X))
    report: Report = found.report
    return report


def told(report: Report) -> str:
    return next((n for n in report.notes if n.startswith("max-autotune")), "")


@pytest.mark.parametrize(
    ("given", "seconds"),
    [({}, 0.0), ({"mode": "max-autotune"}, TUNE_SECONDS), ({"mode": "max-autotune-no-cudagraphs"}, TUNE_SECONDS),
     ({"mode": "max-autotune", "tune_budget": 5}, 5.0), ({"tune_budget": 0.5}, 0.5), ({"mode": "max-autotune", "tune_budget": 0}, 0.0)],
)  # fmt: skip
def test_for_how_long(given: dict[str, Any], seconds: float) -> None:
    assert Options.make(None, given).tune_seconds == seconds


@pytest.mark.parametrize("value", [-1, "10s", True, float("inf"), float("nan")])
def test_a_budget_that_is_no_number_of_seconds(value: object) -> None:
    with pytest.raises(UsageError, match="tune_budget"):
        Options.make("max-autotune", {"tune_budget": value})


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight trials instead of some seconds, four a round: what is tested must not depend on how busy the machine is."""
    monkeypatch.setattr("graphopt.max_autotune.Budget", lambda seconds: Budget(trials=8))
    monkeypatch.setattr("graphopt.max_autotune.Run", partial(Run, batch=4))


@pytest.mark.tvm
@pytest.mark.usefixtures("eight")
def test_it_tunes_uses_what_it_found_and_reports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = compiled(tmp_path, tune_budget=8)
    line = "graphopt: max-autotune tunes 2 kernels for 8 s; Ctrl-C ends the compilation, and what was tried is kept\n"
    assert capsys.readouterr().err.count(line) == 1
    assert "8 trials of 2 kernels" in told(report)
    assert report.seconds["tune"] > 0
    assert len(report.tuning) == 2 and all(t.trials == 4 and t.default and t.best and t.best <= t.default for t in report.tuning)
    records = Database(tmp_path / "cache" / "tuning.db").records()
    assert len(records) == 8
    assert all("measured" in k.tuned for k in report.kernels), "each comes from the database"
    assert "tuned now" in report.summary() and report.to_json()["tuning"][0]["trials"] == 4


@pytest.mark.tvm
@pytest.mark.usefixtures("eight")
def test_kernels_that_were_tuned_enough_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    compiled(tmp_path, mode="max-autotune")
    before = Database(tmp_path / "cache" / "tuning.db").records()
    monkeypatch.setattr("graphopt.max_autotune.ENOUGH", 4)
    capsys.readouterr()
    second = compiled(tmp_path, mode="max-autotune")
    assert "max-autotune" not in capsys.readouterr().err
    assert told(second) == "max-autotune: nothing to tune that was not tuned before"
    assert not second.tuning and "tune" in second.seconds
    assert Database(tmp_path / "cache" / "tuning.db").records() == before


@pytest.mark.tvm
@pytest.mark.usefixtures("eight")
def test_it_goes_on_where_an_earlier_compilation_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    compiled(tmp_path, mode="max-autotune")
    monkeypatch.setattr("graphopt.max_autotune.Budget", lambda seconds: Budget(trials=12))
    capsys.readouterr()
    seen: list[str] = []
    compiled(tmp_path, mode="max-autotune", progress=lambda stage, *_: seen.append(stage))
    assert "tune" in seen and "max-autotune" not in capsys.readouterr().err, "who is told does not need to be told twice"
    records = Database(tmp_path / "cache" / "tuning.db").records()
    assert [r.trial for r in records] == list(range(1, 13))
    assert len({(r.workload.key, r.schedule) for r in records}) == 12, "nothing is tried twice"


@pytest.mark.tvm
def test_without_a_database_nothing_is_tuned(tmp_path: Path) -> None:
    report = compiled(tmp_path, mode="max-autotune", tuning_db=None)
    assert "tuning_db=None" in told(report) and not report.tuning


@pytest.mark.tvm
def test_a_database_that_may_not_be_written_is_told_before_anything_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.autotune.database.unwritable", lambda file: "it may not be written to")
    monkeypatch.setattr("graphopt.max_autotune.tune", lambda *args, **kwargs: pytest.fail("it was tuned"))
    report = compiled(tmp_path, mode="max-autotune")
    assert "tuning.db cannot be written: it may not be written to" in told(report)
    assert report.seconds["tune"] > 0, "what it cost is told, though nothing came of it"


@pytest.mark.tvm
def test_a_damaged_database_is_kept_aside_and_does_not_stop_a_compilation(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "tuning.db"
    file.parent.mkdir()
    file.write_bytes(b"SQLite format 3\0" + b"rubbish" * 1000)
    report = compiled(tmp_path, mode="max-autotune")
    assert "damaged" in told(report) and "it was kept as" in told(report)
    assert list(file.parent.glob("tuning.db.damaged-*"))


@pytest.mark.tvm
@pytest.mark.usefixtures("eight")
def test_through_torch_compile_with_symbolic_sizes(tmp_path: Path) -> None:
    net = model()
    graphopt.clear_reports()
    torch._dynamo.reset()
    options = {"tune_budget": 6, "cache_dir": tmp_path / "cache"}
    found = torch.compile(net, backend="graphopt", dynamic=True, options=options)
    with torch.no_grad():
        for rows in (4, 7):
            x = torch.randn(rows, 32)
            torch.testing.assert_close(found(x), net(x))
    (report,) = graphopt.reports()
    assert sum(t.trials for t in report.tuning) == 8


@pytest.mark.tvm
def test_ctrl_c_ends_the_compilation_and_keeps_what_was_tried(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "tune" and Database(tmp_path / "cache" / "tuning.db").records():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled(tmp_path, tune_budget=60, progress=interrupt)
    assert Database(tmp_path / "cache" / "tuning.db").records()

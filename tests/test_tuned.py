"""Every compilation asks the tuning database, and says what it took from it."""

from __future__ import annotations

import json
import sqlite3
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.autotune.database import Database
from graphopt.autotune.library_kernel import library_space
from graphopt.autotune.records import Measured, Status, TuningRecord
from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.errors import UsageError
from graphopt.ir.text import parse_graph
from graphopt.options import Options
from graphopt.report import Report
from graphopt.target import Target, detect
from graphopt.tuned import device_key
from tests.test_tuning import Net as TwoLayers

pytestmark = pytest.mark.tvm

X = torch.randn(33, 70)
WHEN = "2026-01-31T12:00:00Z"


class Net(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x) * 2 + x


def compiled(tmp_path: Path, **options: Any) -> Report:
    """Compile, check the values, and return the report."""
    model = graphopt.compile(Net(), (X,), **{"cache_dir": tmp_path / "kernels", "tuning_db": tmp_path / "t.db", **options})
    torch.testing.assert_close(model(X), Net()(X))
    report: Report = model.report
    return report


def workload_of(report: Report) -> Workload:
    """The only kernel's workload."""
    (node,) = [n for n in parse_graph(report.text_after) if n.op.name == "fusion"]
    assert node.body is not None
    return Workload.of(node.body, node.attrs["kind"])


@pytest.fixture
def tuning(tmp_path: Path) -> tuple[TuningRecord, Schedule]:
    """A record of a schedule that is not the default one, and the default one."""
    report = compiled(tmp_path, tuning_db=None)
    w = workload_of(report)
    space = TvmBackend().templates(w, detect())[0].space(w, detect())
    default = space.default()
    knobs = dict(default.knobs)
    other = next(p for p in space.params if p.name == "unroll")
    tuned = Schedule.make(default.template, default.sketch, **{**knobs, "unroll": other.choices[1]})
    measured = Measured(Status.OK, 1e-6, 0.01, 0.5, 1.5)
    threads, versions = torch.get_num_threads(), TvmBackend().versions()
    record = TuningRecord(w, device_key(detect()), str(detect()), threads, tuned, measured, versions, "run", 1, WHEN)
    return record, default


def schedule(report: Report) -> Schedule:
    return Schedule.from_json(report.kernels[0].schedule)


def remarks(report: Report) -> list[tuple[str, str]]:
    return [(r.kind, r.message) for r in report.remarks if r.rule == "tuned-schedule"]


def test_the_best_record_is_used_and_the_report_says_so(tmp_path: Path, tuning: tuple[TuningRecord, Schedule]) -> None:
    record, default = tuning
    before = compiled(tmp_path)
    assert not (tmp_path / "t.db").exists(), "to look does not make a database"
    assert schedule(before) == default and before.kernels[0].tuned == "default schedule" and remarks(before) == []

    slower = replace(record, schedule=default, measured=Measured(Status.OK, 1.31e-6), trial=0)
    Database(tmp_path / "t.db").add([slower, record])
    after = compiled(tmp_path)
    assert schedule(after) == record.schedule != default
    assert after.kernels[0].name != before.kernels[0].name and after.key != before.key
    assert after.kernels[0].tuned == "tuned: 1.31x over the default schedule, measured 2026-01-31"
    assert remarks(after) == [("passed", after.kernels[0].tuned)]
    assert ["fusion(%x)" in r.node for r in after.remarks if r.rule == "tuned-schedule"] == [True]
    assert "1 kernel (1 tuned)" in after.summary() and "tuned: 1.31x" in after.summary()
    assert after.to_json()["kernels"][0]["tuned"] == after.kernels[0].tuned

    again = compiled(tmp_path)
    assert again.key == after.key and again.kernels_built == 0
    assert compiled(tmp_path, tuning_db=None).key == before.key


def test_in_torch_compile_and_by_default_beside_the_kernels(tmp_path: Path, tuning: tuple[TuningRecord, Schedule]) -> None:
    record, _ = tuning
    Database(tmp_path / "kernels" / "tuning.db").add([record])
    f = torch.compile(Net(), backend="graphopt", options={"cache_dir": str(tmp_path / "kernels")})
    torch.testing.assert_close(f(X), Net()(X))
    report = graphopt.reports()[-1]
    assert schedule(report) == record.schedule and report.kernels[0].tuned == "tuned: measured 2026-01-31"


def test_the_default_schedule_may_be_the_best_that_was_found(tmp_path: Path, tuning: tuple[TuningRecord, Schedule]) -> None:
    record, default = tuning
    before = compiled(tmp_path)
    Database(tmp_path / "t.db").add([replace(record, schedule=default)])
    report = compiled(tmp_path)
    assert remarks(report) == [("analysis", "default schedule, the best that was found, measured 2026-01-31")]
    assert report.key == before.key and not report.kernels[0].is_tuned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": Schedule.make("nest", lanes=16, unroll=99, chunk=4096, parallel=True)},
         "the best record, of 2026-01-31, is not used: unroll = 99 is not among (4, 1, 2, 8)"),
        ({"schedule": Schedule.make("gone", unroll=2)},
         "the best record, of 2026-01-31, is not used: no template 'gone' takes this region"),
        ({"target": "0" * 16, "device": "cpu:x86_64 (another, 64 cores)"},
         "tuned 2026-01-31 on another device (cpu:x86_64 (another, 64 cores)): not used here"),
        ({"threads": 77}, f"tuned 2026-01-31 for 77 threads, this process has {torch.get_num_threads()}: not used"),
        ({"versions": (("backend source", "old"), *(v for v in TvmBackend().versions() if v[0] != "backend source"))},
         "tuned 2026-01-31 for another version (backend source): not used until it is measured again"),
    ],
)  # fmt: skip
def test_what_does_not_hold_here_is_not_used_and_a_remark_says_why(tmp_path: Path, tuning: tuple[TuningRecord, Schedule],
                                                                   change: dict[str, Any], message: str) -> None:  # fmt: skip
    record, default = tuning
    Database(tmp_path / "t.db").add([replace(record, **change)])
    report = compiled(tmp_path)
    assert schedule(report) == default and not report.kernels[0].is_tuned
    assert remarks(report) == [("missed", message)]


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.OK])
def test_a_candidate_that_failed_is_not_used(tmp_path: Path, tuning: tuple[TuningRecord, Schedule], status: Status) -> None:
    record, default = tuning
    Database(tmp_path / "t.db").add([replace(record, measured=Measured(status, reason="it failed"))])
    assert schedule(compiled(tmp_path)) == default


def test_a_damaged_database_is_a_note_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    db = tmp_path / "kernels" / "tuning.db"
    db.write_bytes(b"?" * 5000)
    report = compiled(tmp_path, tuning_db="auto")
    assert any(f"tuning database {db} is damaged" in n and "default schedules are used" in n for n in report.notes)
    assert db.read_bytes() == b"?" * 5000


def test_a_newer_database_is_a_note_unless_it_was_named(tmp_path: Path, tuning: tuple[TuningRecord, Schedule]) -> None:
    path = tmp_path / "kernels" / "tuning.db"
    Database(path).add([tuning[0]])
    c = sqlite3.connect(path)
    c.execute("PRAGMA user_version = 9")
    c.close()
    assert any("newer graphopt" in n for n in compiled(tmp_path, tuning_db="auto").notes)
    with pytest.raises(UsageError, match="newer graphopt"):
        compiled(tmp_path, tuning_db=path)


def test_a_database_that_the_user_named_and_that_is_not_there(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"tuning_db: there is no file .*missing\.db; default schedules are used"):
        assert any("missing.db" in n for n in compiled(tmp_path, tuning_db=tmp_path / "missing.db").notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not any("tuning_db" in n for n in compiled(tmp_path, tuning_db="auto").notes)


@pytest.mark.parametrize("value", [3, "", True])
def test_a_wrong_option(value: object) -> None:
    with pytest.raises(UsageError, match="option tuning_db="):
        Options.make(options={"tuning_db": value})


def test_where_the_database_is(tmp_path: Path) -> None:
    assert Options(cache_dir=tmp_path).tuning_path == tmp_path / "tuning.db"
    assert Options(tuning_db=None, cache_dir=tmp_path).tuning_path is None
    assert Options.make(options={"tuning_db": "~/x.db"}).tuning_path == Path.home() / "x.db"


def test_timings_are_of_kernels_for_a_target_on_this_machine() -> None:
    baseline = Target.from_name("cpu:x86-64-v3")
    assert device_key(detect()) == detect().fingerprint
    assert device_key(baseline) not in (baseline.fingerprint, detect().fingerprint)
    assert json.dumps(device_key(baseline)) == json.dumps(device_key(Target.from_name("cpu:x86-64-v3")))


# --- PyTorch's kernels, where they won ----------------------------------------------------------------------------------


def library_record(w: Workload, **change: Any) -> TuningRecord:
    space = library_space(w)
    assert space is not None
    measured = Measured(Status.OK, 1e-6, 0.01, 0.5, 1.5)
    record = TuningRecord(w, device_key(detect()), str(detect()), torch.get_num_threads(), space.default(), measured,
                          TvmBackend().versions(), "run", 2, WHEN)  # fmt: skip
    return replace(record, **change)


@pytest.mark.parametrize("dynamic", [False, True])
def test_where_pytorchs_kernels_won_they_are_called_and_the_report_says_so(tmp_path: Path, dynamic: bool) -> None:
    def run(**options: Any) -> tuple[Report, torch.Tensor, torch.Tensor]:
        given = {"cache_dir": str(tmp_path / "kernels"), "strict": True, "verify": "each-pass", **options}
        torch._dynamo.reset()
        model = TwoLayers().eval()
        compiled = torch.compile(model, backend="graphopt", dynamic=dynamic, options=given)
        x = torch.randn(4, 48)
        with torch.no_grad():
            got = compiled(x)
            return graphopt.reports()[-1], got, model(x)

    before, _, _ = run(tuning_db=None)
    bodies = [n.body for n in parse_graph(before.text_after) if n.op.name == "fusion" and n.attrs["kind"] == "matmul"]
    first, second = (Workload.of(b, "matmul") for b in bodies if b is not None)
    Database(tmp_path / "t.db").add([library_record(first)])
    after, got, wanted = run(tuning_db=str(tmp_path / "t.db"))
    torch.testing.assert_close(got, wanted)
    assert len(after.kernels) == len(before.kernels) - 1 and after.key != before.key
    why = "PyTorch's kernels, as tuned: measured 2026-01-31"
    assert {f.reason for f in after.fallbacks} == {why} and all(f.asked for f in after.fallbacks)
    assert "matmul" in {f.op for f in after.fallbacks} and remarks(after) == [("passed", why)]
    Database(tmp_path / "t.db").add([library_record(second)])
    both, got, wanted = run(tuning_db=str(tmp_path / "t.db"))
    torch.testing.assert_close(got, wanted)
    assert [f.op for f in both.fallbacks].count("matmul") == 2


def test_pytorchs_kernels_of_another_version_do_not_count(tmp_path: Path) -> None:
    options = {"cache_dir": tmp_path / "kernels"}
    before = graphopt.compile(TwoLayers().eval(), (torch.randn(4, 48),), tuning_db=None, **options).report
    bodies = [n.body for n in parse_graph(before.text_after) if n.op.name == "fusion"]
    w = Workload.of(bodies[0], "matmul")  # type: ignore[arg-type]
    older = tuple((name, "1.0" if name == "torch" else version) for name, version in TvmBackend().versions())
    Database(tmp_path / "t.db").add([library_record(w, versions=older)])
    after = graphopt.compile(TwoLayers().eval(), (torch.randn(4, 48),), tuning_db=tmp_path / "t.db", **options).report
    assert not after.fallbacks and after.key == before.key
    ((kind, message),) = remarks(after)
    assert kind == "missed" and "for another version (torch)" in message

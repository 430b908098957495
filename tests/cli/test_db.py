"""``graphopt db``: what there is, and records that travel from one database to another and stay what they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from graphopt.autotune.database import Database
from graphopt.autotune.records import Status
from graphopt.autotune.space import Workload
from graphopt.cli.main import app
from tests.autotune.db_check import OLD, record

RECORDS = [record(1, 9e-6), record(2, 5e-6, 1.8), record(3, status=Status.CRASHED), record(4, 7e-6, 0.7), record(5, 3e-6, rows=16),
           record(6, 2e-6, versions=OLD)]  # fmt: skip


def db(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["db", *map(str, args)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    Database(tmp_path / "tuning.db").add(RECORDS)
    return tmp_path / "tuning.db"


def test_ls_has_a_line_for_each_group(file: Path) -> None:
    done = db("ls", "--db", file)
    assert done.exit_code == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "relu -> " in line]
    assert len(lines) == 3
    (line,) = [x for x in lines if " 4 " in x]
    assert "8x64" in line and "5.0" in line and "1.80x" in line
    assert "6 trials in" in done.stdout


def test_show_tells_the_best_and_what_failed(file: Path) -> None:
    key = record(1).workload.key
    done = db("show", key[:6], "--db", file)
    assert done.exit_code == 0, done.stderr
    assert "relu(%arg0)" in done.stdout and "3 ok, 1 crashed" in done.stdout and "1 x a reason" in done.stdout
    assert f"used: {record(2).schedule.to_json()} 1.80x" in done.stdout


def test_a_key_that_is_unknown_or_ambiguous(file: Path) -> None:
    done = db("show", "zz", "--db", file)
    assert done.exit_code == 2 and "there is none" in done.stderr
    done = db("show", "", "--db", file)
    assert done.exit_code == 2 and "which of these?" in done.stderr


def test_what_another_version_made_is_shown_though_this_one_cannot_read_it(file: Path) -> None:
    w = record(1).workload
    other = replace(record(7, versions=OLD), workload=Workload(w.kind, w.text.replace("relu(", "frobnicate(")), when="")
    Database(file).add([other])
    done = db("ls", "--db", file)
    assert done.exit_code == 0, done.stderr
    (line,) = [x for x in done.stdout.splitlines() if x.startswith(other.workload.key[:8])]
    assert f"{w.kind} (of another version)" in line and "relu -> " in done.stdout
    done = db("show", other.workload.key, "--db", file)
    assert done.exit_code == 0, done.stderr
    assert "(of another version)" in done.stdout and "frobnicate(" in done.stdout


def test_an_export_is_stable_and_comes_back(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    Database(other).add(reversed(RECORDS))  # another order of writing
    one, two = db("export", "--db", file), db("export", "--db", other)
    assert one.exit_code == 0 and one.stdout == two.stdout
    lines = one.stdout.splitlines()
    assert len(lines) == 6 and all(list(json.loads(x)) == sorted(json.loads(x)) for x in lines)
    exported = tmp_path / "all.jsonl"
    assert db("export", exported, "--db", file).exit_code == 0
    assert exported.read_text() == one.stdout and [p.name for p in tmp_path.glob(".*")] == []
    new = tmp_path / "new.db"
    assert "6 new records" in db("import", exported, "--db", new).stdout
    assert "0 new records" in db("import", exported, "--db", new).stdout
    assert Database(new).records() == Database(file).records()


def test_the_best_alone_are_exported(file: Path) -> None:
    done = db("export", "--best", "--db", file)
    assert sorted(json.loads(line)["trial"] for line in done.stdout.splitlines()) == [2, 5, 6]
    done = db("export", "--best", "--workload", record(rows=16).workload.key, "--db", file)
    assert [json.loads(line)["trial"] for line in done.stdout.splitlines()] == [5]


def test_a_bad_line_is_named_and_nothing_is_imported(file: Path, tmp_path: Path) -> None:
    lines = [r.to_json() for r in RECORDS[:3]]
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:2], lines[2][:-20]]))
    done = db("import", tmp_path / "bad.jsonl", "--db", tmp_path / "new.db")
    assert done.exit_code == 2
    assert "bad.jsonl:3" in done.stderr and "nothing was imported" in done.stderr
    assert not (tmp_path / "new.db").exists()


def test_databases_are_merged(file: Path, tmp_path: Path) -> None:
    Database(tmp_path / "b.db").add([RECORDS[0], record(9, 1e-6, 3.0, run="run-2")])
    done = db("merge", tmp_path / "b.db", "--db", file)
    assert "1 new record in" in done.stdout and "1 were there already" in done.stdout
    assert len(Database(file).records()) == 7 and len(Database(tmp_path / "b.db").records()) == 2
    assert db("merge", tmp_path / "c.db", "--db", file).exit_code == 2


def test_pruning_says_what_it_does(file: Path) -> None:
    assert db("prune", "--db", file).exit_code == 2
    assert "2 records would be removed of 6" in db("prune", "--keep", "1", "--failed", "--dry-run", "--db", file).stdout
    assert len(Database(file).records()) == 6
    assert "2 records removed of 6" in db("prune", "--keep", "1", "--failed", "--db", file).stdout
    assert sorted(r.trial for r in Database(file).records()) == [1, 2, 5, 6]
    assert "1.80x" in db("ls", "--db", file).stdout, "the gain is still known"
    assert db("prune", "--older", "90 years", "--db", file).exit_code == 2


def test_without_a_database_there_is_nothing_to_see(tmp_path: Path) -> None:
    for command in (["ls"], ["show", "1"], ["export"], ["prune", "--failed"]):
        done = db(*command, "--db", tmp_path / "none.db")
        assert done.exit_code == 2 and "there is no tuning database" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_damaged_database_is_told_and_left_where_it_is(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[4096:] = b"\x5a" * (len(data) - 4096)
    file.write_bytes(data)
    done = db("ls", "--db", file)
    assert done.exit_code == 9 and "damaged" in done.stderr
    assert file.read_bytes() == bytes(data)

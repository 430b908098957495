"""Nothing is lost: many writers at once, writers killed at any moment, files that are damaged, foreign, full or forbidden."""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from db_check import HERE, NOW, record, workload, writers

from graphopt.autotune import DEFAULT_NAME
from graphopt.autotune.database import Database
from graphopt.autotune.records import TuningRecord
from graphopt.autotune.sqlite import Damaged
from graphopt.errors import DatabaseError, UsageError


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database(tmp_path / DEFAULT_NAME)


def acknowledged(read: int, count: int | None = None) -> list[int]:
    """The next ``count`` trials that a writer acknowledges, or all until its end."""
    text = b""
    while count is None or text.count(b"\n") < count:
        byte = os.read(read, 1)
        if not byte:
            break
        text += byte
    return [int(line) for line in text.decode().splitlines()]


def sound(db: Database) -> bool:
    c = sqlite3.connect(db.path)
    try:
        return [row[0] for row in c.execute("PRAGMA integrity_check")] == ["ok"]
    finally:
        c.close()


def as_nobody(action: Callable[[], object]) -> str:
    """What a function says when it runs as a user who may do little: root may write to anything."""
    read, end = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.setuid(65534)
            said = repr(action())
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(end, said.encode())
        os._exit(0)
    os.close(end)
    with os.fdopen(read) as file:
        said = file.read()
    os.waitpid(process, 0)
    return said


# --- many at once, killed ----------------------------------------------------------------------------------------------


def test_several_processes_write_at_once_and_make_the_file_at_once(db: Database) -> None:
    with writers(db.path, [f"run-{i}" for i in range(6)], count=25) as processes:
        for process, read in processes:
            assert acknowledged(read) == list(range(25))
            assert os.waitpid(process, 0)[1] == 0
    assert sorted((r.run, r.trial) for r in db.records()) == [(f"run-{i}", t) for i in range(6) for t in range(25)]
    assert sound(db) and db.best(workload(), HERE, 2, NOW) is not None


def test_a_writer_killed_twenty_times_loses_nothing(db: Database) -> None:
    rng = random.Random(4)
    kept: dict[str, list[int]] = {}
    for i in range(20):
        with writers(db.path, [f"run-{i:02}"]) as [(process, read)]:
            first = acknowledged(read, i % 5)
            time.sleep(rng.uniform(0.0, 0.01))
            os.kill(process, signal.SIGKILL)
            kept[f"run-{i:02}"] = first + acknowledged(read)
        found = db.records()  # each is compared with the hash that was written beside it
        for run, trials in kept.items():
            there = [r.trial for r in found if r.run == run]
            assert there[: len(trials)] == trials, "what was acknowledged is there"
            assert there == list(range(len(there))) and len(there) <= len(trials) + 1, "at most one more, whole, was not yet acknowledged"
        assert not db.path.exists() or sound(db)
    assert sum(map(len, kept.values())) >= 40


@pytest.mark.parametrize("at", [300, 700, 1000])
def test_a_writer_killed_with_half_of_it_on_the_disk(db: Database, at: int) -> None:
    """A transaction of more than SQLite's cache is partly written to the file before it is whole."""
    before = [record(i) for i in range(50)]
    db.add(before)
    size = db.path.stat().st_size

    def dying() -> Iterator[TuningRecord]:
        for i in range(at + 1):
            if i == at:
                os.kill(os.getpid(), signal.SIGKILL)
            r = record(i, run="run-2")
            yield replace(r, measured=replace(r.measured, reason="x" * 9000))

    process = os.fork()
    if process == 0:
        db.add(dying())
        os._exit(1)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert db.path.stat().st_size > 2 * size and db.path.with_name(f"{DEFAULT_NAME}-journal").exists()
    assert Database(db.path).records() == before and sound(db)
    assert db.path.stat().st_size == size


def test_a_reader_waits_for_a_writer_and_says_so_when_it_takes_too_long(db: Database) -> None:
    db.add([record()])
    c = sqlite3.connect(db.path, isolation_level=None)
    c.execute("BEGIN EXCLUSIVE")
    for action in (Database(db.path, timeout=0.05).records, lambda: Database(db.path, timeout=0.05).add([record(1)])):
        with pytest.raises(DatabaseError, match=r"another process has been writing it for over 0.05 s") as caught:
            action()
        assert not isinstance(caught.value, Damaged)
    c.close()
    assert db.records() == [record()]


# --- damaged -----------------------------------------------------------------------------------------------------------


def damage(db: Database, how: str) -> None:
    db.add([record(i) for i in range(200)])
    data = bytearray(db.path.read_bytes())
    if how == "garbage":
        data[:] = b"no database at all\n" * 20
    elif how == "cut off":
        del data[5000:]
    elif how == "zeroed":
        data[:] = bytes(len(data))
    elif how == "torn page":
        data[4096:] = random.Random(0).randbytes(len(data) - 4096)
    elif how == "one letter":
        at = data.rindex(b"run-1")
        data[at : at + 5] = b"run-2"
    elif how == "lost tables":
        c = sqlite3.connect(db.path)
        c.execute("DROP TABLE best")
        c.close()
        return
    db.path.write_bytes(data)


@pytest.mark.parametrize("how", ["garbage", "cut off", "zeroed", "torn page", "one letter", "lost tables"])
def test_a_damaged_file_is_named_and_kept_aside(db: Database, how: str) -> None:
    damage(db, how)
    contents = db.path.read_bytes()
    with pytest.raises(Damaged, match="is damaged") as caught:
        db.records()
        db.best(workload(), HERE, 2, NOW)
    assert db.path.read_bytes() == contents, "to read it changes nothing"
    aside = caught.value.set_aside()
    assert aside is not None and aside.read_bytes() == contents and not db.path.exists()
    assert str(aside) in str(caught.value)
    db.add([record()])
    assert db.records() == [record()]
    assert caught.value.set_aside() is None and db.records() == [record()], "a new file is not taken for the damaged one"


def test_the_journal_of_a_damaged_file_goes_with_it(db: Database) -> None:
    db.add([record()])
    db.path.write_bytes(b"?" * 4096)
    with pytest.raises(Damaged) as caught:
        db.records()
    db.path.with_name(f"{DEFAULT_NAME}-journal").write_bytes(b"journal")
    aside = caught.value.set_aside()
    assert aside is not None and aside.with_name(f"{aside.name}-journal").read_bytes() == b"journal"
    assert [p for p in db.path.parent.iterdir() if not p.name.startswith(aside.name)] == []


# --- not ours ----------------------------------------------------------------------------------------------------------


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "model.pt"
    other.write_bytes(b"PK weights of great value" * 100)
    foreign = tmp_path / "other.db"
    c = sqlite3.connect(foreign)
    c.execute("CREATE TABLE records (id INTEGER)")
    c.commit()
    c.close()
    cases = ((other, "is not a tuning database"), (foreign, "an SQLite file of something else"), (tmp_path, "is a folder"))
    for path, message in cases:
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(UsageError, match=message):
            Database(path).records()
        with pytest.raises(UsageError, match=message):
            Database(path).add([record()])
        assert before is None or path.read_bytes() == before


def test_a_newer_schema_is_refused(db: Database) -> None:
    db.add([record()])
    c = sqlite3.connect(db.path)
    c.execute("PRAGMA user_version = 99")
    c.close()
    for action in (db.records, lambda: db.add([record(1)])):
        with pytest.raises(UsageError, match=r"newer graphopt \(schema 99; this one knows 1\)"):
            action()


# --- no room, no right -------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_no_earlier_record(db: Database) -> None:
    """The limit on the size of files stands for the disk: writes fail in the same way."""
    db.add([record(i) for i in range(20)])
    before = db.records()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (db.path.stat().st_size, hard))
    try:
        with pytest.raises(DatabaseError, match=r"tuning database .* (full|I/O)") as caught:
            db.add([record(i) for i in range(20, 2000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not isinstance(caught.value, Damaged)
    assert db.records() == before and sound(db)
    assert db.add([record(20)]) == 1


def test_a_full_disk_is_called_that(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    db.add([record()])

    class Full(sqlite3.Connection):
        def execute(self, statement: str, *rest: object) -> sqlite3.Cursor:
            cursor = super().execute(statement, *rest)  # type: ignore[arg-type]
            if statement.startswith("BEGIN"):
                super().execute("PRAGMA max_page_count = 1")  # SQLite takes the present size, if that is more
            return cursor

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **named: connect(*args, **named, factory=Full))
    with pytest.raises(DatabaseError, match="the disk is full; the records of this call were not kept, all earlier ones are"):
        db.add([record(i) for i in range(1, 500)])
    monkeypatch.undo()
    assert db.records() == [record()]


@pytest.mark.skipif(os.getuid() != 0, reason="takes another user's place")
@pytest.mark.parametrize(
    ("file", "folder", "reads", "writes"),
    [
        (0o444, 0o555, "1", "may not be written"),  # read-only
        (0o644, 0o755, "1", "may not be written"),  # another user's
        (0o000, 0o555, "cannot be opened", "cannot be opened"),
        (0o644, 0o000, "cannot be read: Permission denied", "cannot be read: Permission denied"),
    ],
)
def test_files_that_may_not_be_read_or_written(tmp_path: Path, file: int, folder: int, reads: str, writes: str) -> None:
    for parent in tmp_path.parents:
        if parent.name.startswith(("pytest-", "popen-")):
            parent.chmod(0o755)  # pytest makes them for their owner alone
    tmp_path.chmod(0o755)
    (tmp_path / "d").mkdir()
    db = Database(tmp_path / "d" / "t.db", timeout=1)
    db.add([record()])
    db.path.chmod(file)
    db.path.parent.chmod(folder)
    assert reads in as_nobody(lambda: len(db.records()))
    said = as_nobody(lambda: db.add([record(1)]))
    assert said.startswith("DatabaseError: tuning database") and writes in said
    db.path.parent.chmod(0o755)
    assert db.records() == [record()]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    db = Database(tmp_path / "file" / "t.db")
    with pytest.raises(DatabaseError, match=r"cannot be (read|made): Not a directory"):
        db.records()
    with pytest.raises(DatabaseError, match=r"cannot be (read|made): Not a directory"):
        db.add([record()])

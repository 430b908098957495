"""The file under the tuning database: opening it, one transaction at a time, and every fault of it in words.

Each transaction opens the file, and closes it after: nothing is held between trials, forks and threads need no care, and a file
that was moved away is noticed. A rollback journal, not a write-ahead log: it works on network file systems, where home
directories often are, needs no switch of modes that two new processes could collide in, and leaves one file that may be copied.
It costs half a millisecond more a transaction, where a trial takes tenths of a second.
A process that is killed within a transaction leaves its journal, and whoever opens the file next undoes what was half done.

Reference: "How To Corrupt An SQLite Database File" and "Atomic Commit In SQLite" (sqlite.org).
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from pathlib import Path

from graphopt.autotune import DEFAULT_NAME
from graphopt.errors import DatabaseError, DiskFullError, UsageError

APPLICATION = 0x67_6F_74_64  # "gotd": tells the file(1) command, and this code, whose file it is
VERSION = 1  # of the schema

SCHEMA = """
CREATE TABLE workloads (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, text TEXT NOT NULL, structure TEXT NOT NULL);
CREATE INDEX workloads_alike ON workloads (structure);
CREATE TABLE records (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, workload INTEGER NOT NULL REFERENCES workloads,
  target TEXT NOT NULL, device TEXT NOT NULL, threads INTEGER NOT NULL, versions TEXT NOT NULL, schedule TEXT NOT NULL,
  status TEXT NOT NULL, seconds REAL, spread REAL, error REAL, gain REAL, reason TEXT NOT NULL,
  build_seconds REAL NOT NULL, trial_seconds REAL NOT NULL, run TEXT NOT NULL, trial INTEGER NOT NULL, at TEXT NOT NULL);
CREATE INDEX records_of ON records (workload, target, threads, versions, schedule);
CREATE TABLE best (
  workload INTEGER NOT NULL, target TEXT NOT NULL, threads INTEGER NOT NULL, versions TEXT NOT NULL,
  record INTEGER NOT NULL REFERENCES records, PRIMARY KEY (workload, target, threads, versions)) WITHOUT ROWID;
CREATE TABLE models (name TEXT PRIMARY KEY, data BLOB NOT NULL, at TEXT NOT NULL);
"""


class File:
    """An SQLite file at a path. Making this object touches nothing.

    Args:
        timeout: seconds to wait for other processes that write.
    """

    def __init__(self, path: Path, timeout: float = 30.0) -> None:
        self.path, self.timeout = Path(path), timeout

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection | None]:
        """A transaction that sees one state of the file; None if there is no file, or nothing in it yet.

        Raises:
            UsageError: it is no tuning database, or one of a newer graphopt.
            DatabaseError: it is damaged or cannot be read.
        """
        inode = self._inode()
        if not inode:
            yield None
            return
        with self._connection("rw", inode) as c:  # SQLite falls back to reading alone where it may not write
            c.execute("BEGIN")
            yield c if self._check(c) else None
            c.execute("COMMIT")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is whole on the disk when this returns, or leaves no trace. The file is made if there is none.

        Raises:
            UsageError, DatabaseError: as for ``reading``, and where the file cannot be written, or the disk is full.
        """
        inode = self._inode()
        if not inode:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DatabaseError(f"tuning database {self.path} cannot be made: {error.strerror}") from error
        with self._connection("rwc", inode) as c:
            c.execute("PRAGMA auto_vacuum = FULL")  # takes effect in a new file only
            c.execute("BEGIN IMMEDIATE")
            try:
                if not self._check(c):
                    for statement in SCHEMA.split(";\n"):
                        c.execute(statement)
                    c.execute(f"PRAGMA application_id = {APPLICATION}")
                    c.execute(f"PRAGMA user_version = {VERSION}")
                yield c
                c.execute("COMMIT")
            except BaseException:
                if c.in_transaction:
                    c.execute("ROLLBACK")
                raise

    def damaged(self, why: str) -> Damaged:
        """The error to raise for contents that make no sense."""
        return Damaged(self.path, why, self._inode())

    def _inode(self) -> int:
        """Which file lies at the path; 0 for none, or an empty one."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise DatabaseError(f"tuning database {self.path} cannot be read: {error.strerror}") from error
        if self.path.is_dir():
            raise UsageError(f"tuning database {self.path} is a folder; a file is needed, such as {self.path / DEFAULT_NAME}")
        return found.st_ino if found.st_size else 0

    @contextmanager
    def _connection(self, mode: str, inode: int) -> Iterator[sqlite3.Connection]:
        try:
            uri = f"{self.path.absolute().as_uri()}?mode={mode}"
            with closing(sqlite3.connect(uri, uri=True, timeout=self.timeout, isolation_level=None)) as c:
                yield c
        except sqlite3.Error as error:
            raise self._explained(error, inode) from error

    def _check(self, c: sqlite3.Connection) -> bool:
        """Whether the schema is there. Raises UsageError if the file is of something else, or of a newer graphopt."""
        application, version, tables = (c.execute(q).fetchone()[0] for q in (
            "PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master"))  # fmt: skip
        if application == 0 and version == 0 and tables == 0:
            return False
        if application != APPLICATION:
            raise UsageError(f"{self.path} is an SQLite file of something else, not a tuning database; it was left as it is")
        if version > VERSION:
            raise UsageError(f"tuning database {self.path} was made by a newer graphopt (schema {version}; this one knows {VERSION}): "
                             "update graphopt, or choose another file")  # fmt: skip
        return True

    def _explained(self, error: sqlite3.Error, inode: int) -> DatabaseError | UsageError:
        """What SQLite complains about, in words."""
        text = str(error)
        if "not a database" in text and not self._ours():
            return UsageError(f"{self.path} is not a tuning database; it was left as it is")
        if "malformed" in text or "not a database" in text or "no such" in text:
            return Damaged(self.path, text, inode)
        if "full" in text or ("I/O" in text and self._no_room()):
            return DiskFullError(f"tuning database {self.path}: the disk is full; the records of this call were not kept, all earlier ones "
                                 f"are ({text})")  # fmt: skip
        reasons = {
            "locked": f"another process has been writing it for over {self.timeout:g} s",
            "readonly": "it may not be written",
            "unable to open": "it cannot be opened; is its folder there, and may it be read and written?",
        }
        why = next((reason for word, reason in reasons.items() if word in text), "")
        return DatabaseError(f"tuning database {self.path}: {why or text}" + (f" ({text})" if why else ""))

    def _no_room(self) -> bool:
        """Whether the disk has less room left than a transaction may take."""
        try:
            return shutil.disk_usage(self.path.parent).free < 1 << 16
        except OSError:
            return False

    def _ours(self) -> bool:
        """Whether a file that SQLite cannot read was a tuning database: by its header, or because it lies in the usual place."""
        if self.path.name == DEFAULT_NAME:
            return True
        try:
            with self.path.open("rb") as file:
                header = file.read(72)
        except OSError:
            return False
        return int.from_bytes(header[68:72], "big") == APPLICATION


class Damaged(DatabaseError):
    """The file is a tuning database, but its contents make no sense."""

    def __init__(self, path: Path, why: str, inode: int) -> None:
        super().__init__(f"tuning database {path} is damaged ({why})")
        self.path, self.inode = path, inode

    def set_aside(self) -> Path | None:
        """Rename the damaged file, so that a new one can be begun, and say so in this error. Nothing is ever deleted.

        Returns:
            Its new place; None if it could not be renamed, or has been.
        """
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%f")
        aside = self.path.with_name(f"{self.path.name}.damaged-{stamp}")
        try:
            if self.path.stat().st_ino != self.inode:
                return None  # another process did it, and has begun a new one
            os.rename(self.path, aside)
        except OSError as error:
            self.args = (f"{self.args[0]}; it could not be set aside: {error.strerror}",)
            return None
        journal = self.path.with_name(f"{self.path.name}-journal")
        if journal.exists():  # belongs to the damaged file, and must not be applied to a new one
            os.rename(journal, aside.with_name(f"{aside.name}-journal"))
        self.args = (f"{self.args[0]}; it was kept as {aside}, and a new one is begun at the next run",)
        return aside

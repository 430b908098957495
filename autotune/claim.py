"""A tuning run belongs to one process at a time: gains of two that add to it at once are against incumbents of their own."""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
from pathlib import Path
from typing import IO


class Claim:
    """This process's claim to a run, which ends with the process at the latest. Processes of one machine see each other's."""

    def __init__(self, run: str) -> None:
        self._path = _path(run)
        self._file = _locked(self._path)

    def close(self) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None


def going_on(run: str) -> bool:
    """Whether a process, this one included, adds to a run."""
    path = _path(run)
    if not path.exists():
        return False
    file = _locked(path)
    if file is None:
        return True
    file.close()
    return False


def _path(run: str) -> Path:
    return Path(tempfile.gettempdir(), f"graphopt-run-{run}.lock")


def _locked(path: Path) -> IO[bytes] | None:
    """The file, locked; None if somebody else has it."""
    with contextlib.suppress(OSError):
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise
        return file
    return None

"""What the tuner asks of a backend, and the folder in which candidates are built."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from graphopt.autotune.measure import Builder, Timing
from graphopt.autotune.runner import ProcessRunner
from graphopt.backends.base import Backend
from graphopt.errors import DiskFullError

PREFIX = "graphopt-tune-"  # of folders; then the process, by which those of killed tuners are known


class CandidateBuilder(Builder, Protocol):
    """Builds candidates into a folder of its own, which goes away with it."""

    def close(self) -> None:
        """End its processes and remove the folder."""


class TuningBackend(Protocol):
    """A backend as the tuner sees it, for one target on one machine. Making one starts nothing and imports no optional package."""

    @property
    def backend(self) -> Backend:
        """Whose templates have the search spaces, and whose versions records hold for."""

    def builder(self, workers: int) -> CandidateBuilder:
        """Who builds candidates, in so many processes; 0 for one a core."""

    def runner(self, threads: int, timing: Timing | None, seed: int) -> ProcessRunner:
        """Who checks and times them, away from this process; None for how the backend's kernels are timed best."""


def new_folder() -> Path:
    """A folder for the candidates of this process. Folders that killed processes left are removed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))


def blame_no_candidate(failures: Iterable[str], folder: Path) -> None:
    """Raise DiskFullError if the folder's disk is full, which is no candidate's fault.

    Args:
        failures: all that was said of each; which line of it speaks of the disk is not known.
    """
    if any(os.strerror(errno.ENOSPC) in text for text in failures):
        raise DiskFullError(f"there is no room for candidates: the disk of {folder} is full; TMPDIR chooses another one")

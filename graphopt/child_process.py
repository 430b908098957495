"""Python processes of this one's own: those that build kernels, and those that run candidates."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import IO

from graphopt.errors import WorkerError
from graphopt.openmp import unbound


def start_python(program: str, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a process that imports from where this one does and has all its processors, in a session of its own: Ctrl-C is for the
    process that waits for the answers.

    Args:
        program: Python statements, in one line.
        errors: takes what it writes to stderr; stdin and stdout are pipes.

    Raises:
        WorkerError: the system has none to give.
    """
    path = json.dumps([p for p in sys.path if p])
    command = [sys.executable, "-c", f"{unbound()}import sys; sys.path[:] = {path}; {program}"]
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
    except OSError as error:
        raise WorkerError(f"no process can be started: {error.strerror}") from error

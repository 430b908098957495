"""The other end of a worker: starts the process, sends requests, waits for answers, and sees to its end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from graphopt.bench.system import SystemFailure


class Session:
    """A worker process. ``with Session(env) as s: s.ask("run", calls=3)``.

    Args:
        environment: of the process, whole.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "graphopt.bench.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env=dict(environment),
        )  # fmt: skip
        self._rest = b""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def ask(self, what: str, seconds: float = 900.0, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            SystemFailure: the worker says why it could not do it, died, or gave no answer in ``seconds``.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):  # it died, or was ended as it gave no answer
            raise SystemFailure(self._last_words()) from None
        answer: dict[str, Any] = json.loads(self._line(time.monotonic() + seconds, seconds))
        if "failed" in answer:
            raise SystemFailure(answer["failed"])
        return answer

    def _line(self, end: float, seconds: float) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                self.close()
                raise SystemFailure(f"no answer for {seconds:.0f} s")
            data = os.read(fd, 1 << 16)
            if not data:
                raise SystemFailure(self._last_words())
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        status = self._process.wait()
        if self._errors.closed:
            return "the process was ended: it had given no answer"
        self._errors.seek(0)
        lines = [x for x in self._errors.read().decode(errors="replace").splitlines() if x.strip()]
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"the process died ({how})" + (f": {lines[-1].strip()[:160]}" if lines else "")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

"""Measuring candidates on another machine, by the rules by which they are measured on this one.

The machine is lent by a tracker of TVM's RPC. A process of this machine has the session with it (:mod:`graphopt.remote_bench`), and
stands where the process that runs candidates stands otherwise: everything else of :class:`~graphopt.autotune.runner.ProcessRunner` is
the same.

A candidate whose session ends, or whose server gives no answer, is tried once more in a new session. If that is lost, too, it may be its
doing: it is written down as ``lost``, and the next one is tried. While a case is sent no kernel runs, so that is tried again as often as
sessions may be lost: after several that were lost one after the other, the tuner gives up.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from typing import Any

from graphopt.autotune.measure import Built, Incumbent, Timing, Trial
from graphopt.autotune.records import Status
from graphopt.autotune.runner import START, Failed, Gone, ProcessRunner, TaskSession
from graphopt.candidates import PREFIX
from graphopt.errors import RemoteError, UsageError
from graphopt.target import Target

MOST_LOST = 3  # sessions one after the other
TRIES = 2  # of a candidate whose kernel was running when the session was lost
GRACE = 120.0  # seconds for what is sent, beyond those that a candidate has
RUNS = 4  # of a candidate in a race: processes on the other machine, each with the time that a race may take here
PATIENCE = 60.0  # seconds to wait until a server is free


@dataclass(frozen=True)
class Address:
    """A tracker of TVM's RPC, and the key under which it lends servers."""

    host: str
    port: int
    key: str

    def __str__(self) -> str:
        return f"server {self.key!r} of the tracker at {self.host}:{self.port}"

    @staticmethod
    def parse(tracker: str, key: str | None) -> Address:
        """From ``HOST:PORT`` and a key. Raises UsageError."""
        found = re.fullmatch(r"(.+):(\d{1,5})", tracker)
        if found is None or not 0 < int(found[2]) < 1 << 16:
            raise UsageError(f"--rpc {tracker!r} is no address of a tracker; write HOST:PORT, for instance 192.168.0.7:9190")
        if not key:
            raise UsageError(f"--rpc {tracker} needs --key: that of the server (python -m tvm.exec.rpc_server ... --key KEY)")
        return Address(found[1].strip("[]"), int(found[2]), key)


@dataclass(frozen=True)
class Remote:
    """What a server said of its machine: its processor, the threads that kernels will use, and the pool that they are of."""

    target: Target
    threads: int
    pool: str


class RemoteRunner(ProcessRunner):
    """Measures candidates on another machine.

    Args:
        threads: that each kernel may use; None for as many as the machine has cores.
        patience: seconds to wait until a server is free.
    """

    def __init__(self, address: Address, threads: int | None = None, timing: Timing | None = None, seed: int = 0,
                 patience: float = PATIENCE) -> None:  # fmt: skip
        self.address = address
        self._folder = tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-")
        super().__init__(json.dumps({"host": address.host, "port": address.port, "key": address.key, "folder": self._folder.name,
                                     "threads": threads or 0, "patience": patience}), threads or 0, timing, seed,
                         "graphopt.remote_bench")  # fmt: skip
        self._lost = 0
        self._machine = ""  # its fingerprint

    def connect(self) -> Remote:
        """Borrow a server, and ask what it is. Raises RemoteError if there is none."""
        self.ready()
        assert self._process is not None
        try:
            answer = self._process.ask({"do": "connect"}, START)
        except Failed as failure:
            raise RemoteError(failure.reason if failure.status is Status.LOST else f"{self.address}: {failure.reason}") from failure
        data = answer["target"]
        target = Target(**{**data, "features": tuple(data["features"]), "cache": tuple(data["cache"])})
        self.threads, self._machine = answer["threads"], target.fingerprint
        return Remote(target, self.threads, answer["pool"])

    def close(self) -> None:
        super().close()
        self._folder.cleanup()

    def _trial(self, session: TaskSession, built: Built, incumbent: Incumbent | None) -> Trial:
        running = 0
        for last in (False,) * (MOST_LOST - 1) + (True,):
            try:
                return super()._trial(session, built, incumbent)
            except Gone:
                running += session.loaded is not None  # else a case was being sent
                if last or running == TRIES:
                    raise
                session.loaded = None
        raise AssertionError

    def _send_case(self, request: dict[str, Any]) -> None:
        self._ask(request, START)  # :meth:`_trial` tries it again

    def _renew(self) -> None:
        """Nothing: each run of a candidate has a process of its own there."""

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        if request["do"] != "case":
            request, seconds = {**request, "seconds": seconds}, RUNS * seconds  # who is there ends what takes too long
        try:
            answer = super()._ask(request, seconds + GRACE)
        except Gone as failure:
            self._lost += 1
            reason = failure.reason if failure.status is Status.LOST else f"{self.address}: {failure.reason}"
            if self._lost >= MOST_LOST:
                raise RemoteError(f"{self.address} was lost {self._lost} times, one after the other. At last: {reason}") from failure
            raise Gone(Status.LOST, reason) from failure
        except Failed:
            self._lost = 0
            raise
        if request["do"] != "case":
            self._lost = 0
        elif answer["machine"] != self._machine:
            raise RemoteError(f"{self.address} is another machine than the one before: a key must stand for machines that are the same")
        return answer

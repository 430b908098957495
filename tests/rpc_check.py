"""TVM's RPC on loopback for tests: a tracker and servers as subprocesses, which end with the test however that ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HOST = "127.0.0.1"
START = 120.0  # seconds for a process to take connections
ONE_PROCESSOR = """
import os, runpy, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
NEEDS = ("tornado", "cloudpickle")
WHY_NOT = "TVM's RPC is not installed: pip install 'apache-tvm[rpc]'"


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def process(*args: str, log: Path, pinned: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """A program of TVM with all that it starts: one process group, of which nothing is left; on one processor if ``pinned``."""
    with log.open("wb") as out:
        program = [sys.executable, *(["-c", ONE_PROCESSOR] if pinned else ["-m"]), *args]
        started = subprocess.Popen(program, stdout=out, stderr=out, start_new_session=True)
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


@contextlib.contextmanager
def tracker(folder: Path) -> Iterator[int]:
    """A tracker; its port."""
    port = free_port()
    with process("tvm.exec.rpc_tracker", "--host", HOST, "--port", str(port), "--port-end", str(port + 1), log=folder / "tracker.log"):
        end = time.monotonic() + START
        while socket.socket().connect_ex((HOST, port)) and time.monotonic() < end:
            time.sleep(0.05)
        yield port


@contextlib.contextmanager
def server(folder: Path, tracker: int, key: str) -> Iterator[None]:
    """A server of a tracker, on one processor."""
    port, log = free_port(), folder / f"{key}.log"
    with process("tvm.exec.rpc_server", "--host", HOST, "--port", str(port), "--port-end", str(port + 1), "--tracker", f"{HOST}:{tracker}",
                 "--key", key, log=log, pinned=True) as started:  # fmt: skip
        end = time.monotonic() + START
        while time.monotonic() < end and started.poll() is None and not registered(tracker, key):
            time.sleep(0.05)
        assert registered(tracker, key), log.read_text()
        yield


def registered(tracker: int, key: str) -> bool:
    """Whether a tracker has a server that is free."""
    from tvm import rpc

    queues = rpc.connect_tracker(HOST, tracker).summary()["queue_info"]
    return bool(queues.get(key, {}).get("free", 0))

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
PROGRAM = """
import ctypes, os, runpy, signal, subprocess, sys

def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)

class Popen(subprocess.Popen):
    def __init__(self, *args, **named):
        super().__init__(*args, preexec_fn=die_with_parent, **named)

die_with_parent()  # however that ends, and so do the programs that are started here
subprocess.Popen = Popen
if sys.argv[1] == "pinned":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # as whoever starts a server may have it
sys.argv = sys.argv[2:]
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
        program = [sys.executable, "-c", PROGRAM, "pinned" if pinned else "", *args]
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
    port, log = free_port(), folder / "tracker.log"
    with process("tvm.exec.rpc_tracker", "--host", HOST, "--port", str(port), "--port-end", str(port + 1), log=log) as started:
        end = time.monotonic() + START
        while time.monotonic() < end and started.poll() is None and not listens(port):
            time.sleep(0.05)
        assert listens(port), log.read_text()
        yield port


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex((HOST, port)) == 0


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

"""A session with a server of TVM's RPC on another machine: its memory, its libraries, what it is, and runs of kernels there.

The server needs TVM's runtime and Linux, nothing of graphopt: what runs the candidates is sent there first (:mod:`agent`), and so is the
glue that launches parallel loops in OpenMP (:mod:`gomp`), where the server finds a libgomp. The server lends its machine to
one session at a time, so nothing else of the tracker's runs there meanwhile.
"""

from __future__ import annotations

import math
import signal
import socket
import struct
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm.rpc

from graphopt.backends.tvm.agent import DONE, KERNEL_FAILED, KILOBYTES, SECONDS, SLICE_WORDS, build_agent
from graphopt.backends.tvm.gomp import build_launcher
from graphopt.errors import BuildError, RemoteError, first_line
from graphopt.target import AMX_REQUEST, SVE_GET_LENGTH, SVE_LENGTH_MASK, Target, describe, detect

ARCHITECTURES = ("x86_64", "aarch64")
CONNECT = 5.0  # seconds for a tracker to take a connection
CHUNK = 16 << 20  # bytes that are sent at a time
MOST_SLICES = 512  # of one run
PAGE = 1 << 16  # a multiple of any processor's page size
_READ, _WRITE, _SHARED, _PRIVATE, _ANONYMOUS = 1, 2, 1, 2, 0x20  # of mmap
_NOW, _NOLOAD, _GLOBAL = 2, 4, 0x100  # of dlopen
_FILE, _MOST_PARTS = 1 << 20, 64  # bytes of a file that are read at a time, and how often
_MASK = 1024  # bytes of a set of processors
DEFAULT = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGALRM, signal.SIGCHLD)
"""Signals that do there what they do by themselves.

To tell where a process crashed takes libraries seconds, and nobody reads it. And whoever started the server may have had the last two
ignored: candidates that do not end would not be stopped, and those that ended could not be waited for.
"""
RPC_TRACKER_MAGIC = tvm.rpc.base.RPC_TRACKER_MAGIC


@dataclass(frozen=True)
class Slice:
    """Calls that are timed together.

    Attributes:
        kernel: its address there.
        rows, count: address of rows of arguments, and how many there are; calls take one after the other, from ``first`` on.
    """

    kernel: int
    rows: int
    count: int
    first: int
    calls: int


@dataclass(frozen=True)
class Timed:
    """What came of a slice: seconds of all its calls, and the most memory that the process has had until its end, in bytes."""

    seconds: float
    resident: int


class Died(Exception):
    """The process that ran the slices did not come to their end; ``timed_out``: it was stopped."""

    def __init__(self, reason: str, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.timed_out = timed_out


class Refused(Exception):
    """The machine is there, and cannot do what it was asked to: it has no memory for it, or no process."""


class Session:
    """A server that was lent.

    Args:
        host, port: of the tracker; ``key``: under which it lends the server.
        folder: where the libraries that are sent may be built; they stay there for the next session.
        threads: that kernels may use; 0 for all cores.
        seconds: to wait until a server is free.

    Attributes:
        page: bytes of a page of memory there.
        pool: ``libgomp`` or ``tvm``: where parallel loops run.

    Raises:
        RemoteError: here and in all methods: there is no such server, or it is gone.
        Refused: here and in methods that ask for memory: there is none.
    """

    arch: str
    _c: Any
    _run: Any

    def __init__(self, host: str, port: int, key: str, folder: Path, threads: int = 0, seconds: float = 30.0) -> None:
        self.address = f"server {key!r} of the tracker at {host}:{port}"
        self._remote = _request(host, port, key, seconds)
        self._addresses: dict[str, int] = {}
        self._libraries: dict[str, tuple[int, Any]] = {}  # with the module that holds it
        self._kernels: dict[tuple[str, str], int] = {}
        self._get_agent(folder)
        for number in DEFAULT:
            self.c("signal", number, 0)
        self.page = self.number("getpagesize")
        self._slices = self.map(MOST_SLICES * SLICE_WORDS * 8, shared=True)
        self.target = describe(_There(self))
        self.threads = threads or self.target.cores
        self.pool = self._get_pool(folder)

    def _over(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """What a call over the network gives; ``what`` it means if it fails."""
        try:
            return function(*args)
        except Exception as error:  # TVM raises what it happens to meet
            raise RemoteError(f"{self.address}: {what}: {first_line(error)}") from error

    # --- what is sent there ------------------------------------------------------------------------------------------------

    def _get_agent(self, folder: Path) -> None:
        """Load the agent. Which processor it must be built for is found by trying: a library for another one cannot be loaded."""
        reasons = []
        for arch in sorted(ARCHITECTURES, key=lambda a: a != detect().arch):
            file = folder / f"agent-{arch}.so"
            try:
                if not file.exists() and not build_agent(file, Target("cpu", arch)):
                    reasons.append(f"{arch}: no linker for it is here")
                    continue
                self._over("no file could be sent", self._remote.upload, str(file))
                module = self._remote.load_module(file.name)
                self._c, self._run, self.arch = module["graphopt_c"], module["graphopt_run"], arch
                self._addresses["dlsym"] = self._c(0)
                self._agent = module
                return
            except (RemoteError, BuildError):
                raise
            except Exception as error:  # of TVM's loader there
                reasons.append(f"{arch}: {first_line(error)}")
        raise RemoteError(f"{self.address}: nothing that is built here can be loaded there; {'; '.join(reasons)}")

    def _get_pool(self, folder: Path) -> str:
        """Prepare whatever runs parallel loops, without starting a thread: processes are forked from this one."""
        glue = build_launcher(folder, Target("cpu", self.arch))
        ffi = self.c("dlopen", "libtvm_ffi.so", _NOW | _NOLOAD)
        register = self.c("dlsym", ffi, "TVMFFIEnvModRegisterContextSymbol") if ffi else 0
        if glue is not None and register and self.c("dlopen", "libgomp.so.1", _NOW | _GLOBAL):
            library = self.c("dlopen", self.upload(glue), _NOW)
            launch = self.c("dlsym", library, "graphopt_parallel_launch") if library else 0
            if launch and self._call(register, "__TVMBackendParallelLaunch", launch) == 0:
                self.c("omp_set_num_threads", self.threads)
                return "libgomp"
        self.c("setenv", "TVM_NUM_THREADS", str(self.threads), 1)
        return "tvm"

    def upload(self, file: Path) -> str:
        """Send a file; its path there."""
        self._over(f"{file.name} could not be sent", self._remote.upload, str(file))
        return str(self._over("the session ended", self._remote.get_function("tvm.rpc.server.workpath"), file.name))

    def load(self, file: Path, entry: str) -> int:
        """The address of a kernel of a built file, which is sent if it was not before.

        Raises:
            BuildError: it cannot be loaded there.
        """
        if (str(file), entry) not in self._kernels:
            address = self.c("dlsym", self._library(file), f"__tvm_ffi_{entry}")
            if not address:
                raise BuildError(f"{file.name} has no kernel {entry}")
            self._kernels[str(file), entry] = address
        return self._kernels[str(file), entry]

    def _library(self, file: Path) -> int:
        """The handle of a library, which is sent once: to write to a file that is mapped kills who has mapped it."""
        if str(file) not in self._libraries:
            path = self.upload(file)
            try:
                module = self._remote.load_module(file.name)  # TVM fills in what kernels call
            except Exception as error:
                self.c("getpid")  # whether anybody is there at all
                raise BuildError(f"it could not be loaded on the other machine: {first_line(error)}") from error
            self._libraries[str(file)] = self.c("dlopen", path, _NOW | _NOLOAD), module
        return self._libraries[str(file)][0]

    # --- functions of C, and memory ----------------------------------------------------------------------------------------

    def c(self, name: str, *args: Any) -> int:
        """Call a function of C there; integers, strings, and tensors there. What it returns, as a signed integer of 64 bits."""
        if name not in self._addresses:
            address = self._call(self._addresses["dlsym"], 0, name)
            if not address:
                raise RemoteError(f"{self.address}: there is no function {name} there; is it Linux?")
            self._addresses[name] = address
        return self._call(self._addresses[name], *args)

    def _call(self, address: int, *args: Any) -> int:
        return int(self._over("the session ended", self._c, address, *args))

    def number(self, name: str, *args: Any) -> int:
        """The same for a function that returns ``int``: the upper half of the register is anything."""
        return ((self.c(name, *args) + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)

    def map(self, size: int, shared: bool = False) -> int:
        """The address of new memory, whole pages of zeros; if ``shared``, what forked processes write there is seen."""
        address = self.c("mmap", 0, size, _READ | _WRITE, _ANONYMOUS | (_SHARED if shared else _PRIVATE), -1, 0)
        if address == -1:  # MAP_FAILED
            raise Refused(f"there is no memory for {size / (1 << 20):.3g} MB on {self.address}")
        return address

    def unmap(self, address: int, size: int) -> None:
        self.c("munmap", address, size)

    def make_read_only(self, address: int, size: int) -> None:
        """From now on, whoever writes to these pages dies."""
        if size and self.number("mprotect", address, size, _READ):
            raise Refused(f"memory could not be protected on {self.address}")

    def write(self, address: int, data: np.ndarray[Any, Any]) -> None:
        """Copy bytes there."""
        flat = data.reshape(-1).view(np.uint8)
        for at in range(0, flat.size, CHUNK):
            part = np.ascontiguousarray(flat[at : at + CHUNK])
            there = self._bytes(part.size)
            self._over("the session ended", there.copyfrom, part)
            self.c("memcpy", address + at, there, part.size)

    def read(self, address: int, size: int) -> np.ndarray[Any, Any]:
        """Copy bytes from there."""
        parts: list[np.ndarray[Any, Any]] = []
        for at in range(0, size, CHUNK):
            n = min(CHUNK, size - at)
            there = self._bytes(n)
            self.c("memcpy", there, address + at, n)
            parts.append(self._over("the session ended", there.numpy))
        return np.concatenate(parts) if parts else np.empty(0, np.uint8)

    def _bytes(self, size: int) -> Any:
        """A tensor of bytes there: what TVM sends from and to."""
        return self._over("no memory could be had", tvm.runtime.empty, (size,), "uint8", self._remote.cpu(0))

    def repeat(self, address: int, size: int, copies: int) -> None:
        """Copy what lies at an address behind itself, until it is there so many times."""
        done = 1
        while done < copies:
            more = min(done, copies - done)
            self.c("memcpy", address + done * size, address, more * size)
            done += more

    # --- running -------------------------------------------------------------------------------------------------------------

    def run(self, slices: Sequence[Slice], width: int, seconds: float) -> list[Timed]:
        """Run slices in a new process there, one after the other.

        Args:
            width: arguments of a call.
            seconds: after which the process is stopped.

        Raises:
            Died: it did not come to their end.
            Refused: no process could be started.
        """
        assert len(slices) <= MOST_SLICES
        words = np.zeros((len(slices), SLICE_WORDS), np.int64)
        words[:, :5] = [(s.kernel, s.rows, s.count, s.first, s.calls) for s in slices]
        self.write(self._slices, words)
        status = int(self._over("the session ended", self._run, self._slices, len(slices), width, max(1, math.ceil(seconds))))
        if status == -1:
            raise Refused(f"no process could be started on {self.address}")
        words = self.read(self._slices, words.nbytes).view(np.int64).reshape(words.shape)
        if status == 0 and words[:, DONE].all():
            return [Timed(float(w[SECONDS : SECONDS + 1].view(np.float64)[0]), int(w[KILOBYTES]) << 10) for w in words]
        number = status & 0x7F
        if number == signal.SIGALRM:
            raise Died(f"it did not end within {seconds:.2g} s", timed_out=True)
        if number:
            raise Died(f"it was killed by {_signal_name(number)}")
        code = status >> 8
        raise Died("the kernel returned an error" if code == KERNEL_FAILED else f"it ended the process with exit status {code}")

    def text(self, path: str) -> str:
        """The text of a file there; empty if it cannot be read."""
        file = self.number("open", path, 0)
        if file < 0:
            return ""
        buffer = self.map(_FILE)
        parts: list[bytes] = []
        while (n := self.c("read", file, buffer, _FILE)) > 0 and len(parts) < _MOST_PARTS:
            parts.append(self.read(buffer, n).tobytes())
        self.c("close", file)
        self.unmap(buffer, _FILE)
        return b"".join(parts).decode(errors="replace")


class _There:
    """The machine of a session, to be described (:class:`graphopt.target.Machine`)."""

    model = ""

    def __init__(self, session: Session) -> None:
        self._session, self.arch = session, session.arch

    def read(self, path: str) -> str:
        return self._session.text(path)

    def processors(self) -> Collection[int]:
        buffer = self._session.map(PAGE)
        self._session.c("sched_getaffinity", 0, _MASK, buffer)
        bits = np.unpackbits(self._session.read(buffer, _MASK), bitorder="little")
        self._session.unmap(buffer, PAGE)
        return set(np.flatnonzero(bits).tolist())

    def request_amx(self) -> bool:
        return self.arch == "x86_64" and self._session.c("syscall", *AMX_REQUEST) == 0

    def sve_bits(self) -> int:
        got = self._session.number("prctl", SVE_GET_LENGTH, 0, 0, 0, 0)
        return 8 * (got & SVE_LENGTH_MASK) if got > 0 else 0


def _request(host: str, port: int, key: str, seconds: float) -> Any:
    """A server of TVM's, lent by the tracker."""
    where = f"{host}:{port}"
    try:
        with socket.create_connection((host, port), CONNECT) as probe:  # TVM would go on trying for a minute
            probe.sendall(struct.pack("<i", RPC_TRACKER_MAGIC))
            answer = probe.recv(4)
    except OSError as error:
        raise RemoteError(f"no tracker answers at {where} ({error}), to ask it for a server with key {key!r}. To start one there: "
                          f"python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {port}") from error  # fmt: skip
    if answer != struct.pack("<i", RPC_TRACKER_MAGIC):
        raise RemoteError(f"what answers at {where} is no tracker of TVM's RPC")
    try:
        tracker = tvm.rpc.connect_tracker(host, port)
        _wait_for_server(tracker, where, key, seconds)
        return tracker.request(key, max_retry=1)
    except RemoteError:
        raise
    except Exception as error:
        raise RemoteError(f"no server {key!r} could be had from the tracker at {where}: {first_line(error)}") from error


def _wait_for_server(tracker: Any, where: str, key: str, seconds: float) -> None:
    """Return when the tracker has a free server. Raises RemoteError if it knows none, or all stay lent."""
    begin = time.monotonic()
    while True:
        found = tracker.summary()
        if found["queue_info"].get(key, {}).get("free", 0):
            return
        keys = sorted({str(s["key"]).partition(":")[2] for s in found["server_info"]})
        waited = time.monotonic() - begin
        if key not in keys and waited >= min(seconds, CONNECT):
            known = f"it has {', '.join(map(repr, keys))}" if keys else "it has none at all"
            raise RemoteError(f"the tracker at {where} has no server with key {key!r}; {known}. To start one, on the machine to tune for: "
                              f"python -m tvm.exec.rpc_server --tracker {where} --key {key}")  # fmt: skip
        if waited >= seconds:
            raise RemoteError(f"every server {key!r} of the tracker at {where} is lent to others; waited {seconds:.0f} s")
        time.sleep(0.1)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

"""Building kernels in persistent worker processes, side by side.

Workers are plain subprocesses, so they need no guarded main module and may be started from a REPL or a test process. A
worker that dies or hangs costs the kernel it was at, never the others.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.base import KernelSource
from graphopt.backends.tvm.cache import KernelCache
from graphopt.backends.tvm.launch import load
from graphopt.backends.tvm.template import entry_name
from graphopt.backends.tvm.worker import target_to_json
from graphopt.child_process import start_python
from graphopt.errors import BuildError, GraphoptError, WorkerError
from graphopt.target import Target, detect

Progress = Callable[[int, int], None]  # kernels done, kernels in all


class _Worker:
    """One process. Used by one thread at a time."""

    def __init__(self) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self.process = start_python(f"from graphopt.backends.tvm.worker import main; main({os.getpid()})", self.errors)
        self.ready = False
        self._rest = b""

    def request(self, data: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            BuildError: the worker dies, or does not answer in time.
            WorkerError: it does not even start.
        """
        if not self.ready:
            try:
                self._answer(120.0)
            except BuildError as error:
                raise WorkerError(f"no process that builds kernels can be started: {error}") from error
            self.ready = True
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(data).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise BuildError(f"the build process is gone ({self._last_words()})") from error
        return self._answer(seconds)

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        end, fd = time.monotonic() + seconds, self.process.stdout.fileno()
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise BuildError(f"the build process gave no answer for {seconds:.0f} s")
            data = os.read(fd, 1 << 16)
            if not data:
                raise BuildError(f"the build process died ({self._last_words()})")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return dict(json.loads(line))

    def _last_words(self) -> str:
        try:
            status = self.process.wait(1)
        except subprocess.TimeoutExpired:
            return "still running"
        self.errors.seek(0)
        text = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"exit status {status}" + (f": {text[-1]}" if text else "")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            if pipe is not None:
                with contextlib.suppress(OSError):  # half a request, which nobody takes any more
                    pipe.close()


class KernelBuilder:
    """A pool of workers. Safe to use from several threads; ends with the process.

    Args:
        seconds: how long one kernel may take.
    """

    def __init__(self, seconds: float = 120.0) -> None:
        self.seconds = seconds
        self._idle: list[_Worker] = []
        self._all: list[_Worker] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        atexit.register(self.close)

    def prestart(self, workers: int) -> None:
        """Start workers now, so that their imports overlap with other work. Does not wait."""
        with self._lock:
            self._after_fork()
            while len(self._all) < workers:
                worker = _Worker()
                self._all.append(worker)
                self._idle.append(worker)

    def close(self) -> None:
        """Stop all workers, for good: what is being built ends with an error."""
        with self._lock:
            self._after_fork()
            self._closed = True
            for worker in self._all:
                worker.stop()
            self._all, self._idle = [], []

    def _after_fork(self) -> None:
        """In a forked child the workers belong to the parent."""
        if self._pid != os.getpid():
            self._all, self._idle, self._pid = [], [], os.getpid()

    def _take(self) -> _Worker:
        with self._lock:
            self._after_fork()
            if self._closed:
                raise BuildError("the build processes were stopped")
            if self._idle:
                return self._idle.pop()
            worker = _Worker()
            self._all.append(worker)
            return worker

    def _give(self, worker: _Worker, sound: bool) -> None:
        with self._lock:
            if worker not in self._all:
                return
            if sound:
                self._idle.append(worker)
            else:
                self._all.remove(worker)
                worker.stop()

    def build_many(self, jobs: Sequence[tuple[Workload, Schedule]], target: Target, cache_dir: Path, workers: int = 0,
                   progress: Progress | None = None, errors: str = "raise") -> list[Path | BuildError]:  # fmt: skip
        """Build kernels, or find them in the cache.

        Args:
            workers: processes at most; 0 for one a core of this machine.
            progress: called after each kernel, from any thread.
            errors: ``raise`` the first error after all are done, or ``return`` errors in their places.

        Returns:
            The file of each kernel, in order.
        """
        cache = KernelCache(cache_dir)
        found: dict[tuple[Workload, Schedule], Path | BuildError] = {}
        missing: deque[tuple[Workload, Schedule]] = deque()
        for job in dict.fromkeys(jobs):
            path = cache.find(*job, target)
            if path is not None:
                found[job] = path
            else:
                missing.append(job)
        total = len(found) + len(missing)
        if progress:
            progress(len(found), total)
        threads = [
            threading.Thread(target=self._work, args=(missing, target, cache, found, progress, total), daemon=True)
            for _ in range(min(len(missing), workers or max(1, detect().cores)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        results = [found[job] for job in jobs]
        if errors == "raise":
            for result in results:
                if isinstance(result, BuildError):
                    raise result
        return results

    def _work(self, missing: deque[tuple[Workload, Schedule]], target: Target, cache: KernelCache,
              found: dict[tuple[Workload, Schedule], Path | BuildError], progress: Progress | None, total: int) -> None:  # fmt: skip
        while True:
            try:
                job = missing.popleft()
            except IndexError:
                return
            try:
                found[job] = self._build(job, target, cache)
            except Exception as error:  # nothing may be left without an answer
                found[job] = error if isinstance(error, BuildError) else BuildError(f"{type(error).__name__}: {error}")
            if progress:
                progress(len(found), total)

    def _build(self, job: tuple[Workload, Schedule], target: Target, cache: KernelCache) -> Path:
        w, s = job
        request = {"kind": w.kind, "text": w.text, "schedule": s.to_json(), "target": target_to_json(target), "cache": str(cache.directory)}
        worker = self._take()
        sound = False
        try:
            reply = worker.request(request, self.seconds)
            sound = True
        except BuildError as error:
            raise BuildError(f"{error}; it was building {s.to_json()} for the {w.kind} region\n{w.text}") from error
        finally:
            self._give(worker, sound)
        if "error" in reply:
            raise BuildError(f"{reply['error']}\nwhile building {s.to_json()} for the {w.kind} region\n{w.text}\n{reply['trace']}")
        return Path(reply["path"])


    def build_together(self, w: Workload, schedules: Sequence[Schedule], target: Target, folder: Path, workers: int = 0,
                       together: int = 8) -> list[tuple[Path, float] | BuildError]:  # fmt: skip
        """Build candidates of one workload, several in a file, into a folder that belongs to the caller.

        A candidate that kills or stops a build process takes those of its file with it; they are then built one by one.

        Args:
            workers: processes at most; 0 for one a core of this machine.
            together: candidates in a file at most.

        Returns:
            The file of each and its share of the time, in order.

        Raises:
            WorkerError: there is no process to build in, which is no candidate's fault.
        """
        workers = workers or max(1, detect().cores)
        size = max(1, min(together, -(-len(schedules) // workers)))
        parts = deque(range(0, len(schedules), size))
        found: dict[int, list[tuple[Path, float] | BuildError]] = {}
        unable: list[WorkerError] = []

        def work() -> None:
            while True:
                try:
                    at = parts.popleft()
                except IndexError:
                    return
                part = schedules[at : at + size]
                try:
                    found[at] = self._build_part(w, part, target, folder)
                except WorkerError as error:
                    unable.append(error)
                    return
                except Exception as error:  # nothing may be left without an answer
                    found[at] = [BuildError(f"{type(error).__name__}: {error}")] * len(part)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(len(parts), workers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if unable:
            raise unable[0]
        return [one for at in sorted(found) for one in found[at]]

    def _build_part(self, w: Workload, schedules: Sequence[Schedule], target: Target,
                    folder: Path) -> list[tuple[Path, float] | BuildError]:  # fmt: skip
        request = {"kind": w.kind, "text": w.text, "schedules": [s.to_json() for s in schedules], "target": target_to_json(target),
                   "cache": str(folder)}  # fmt: skip
        worker = self._take()
        sound = False
        try:
            reply = worker.request(request, self.seconds)
            sound = True
        except BuildError as error:
            if len(schedules) == 1:
                return [error]
        finally:
            self._give(worker, sound)
        if not sound:
            return [r for s in schedules for r in self._build_part(w, [s], target, folder)]
        if "error" in reply:
            return [BuildError(reply["error"])] * len(schedules)
        share = reply["seconds"] / len(schedules)
        return [(Path(b["path"]), share) if "path" in b else BuildError(b["error"]) for b in reply["built"]]


def load_kernel(path: Path, w: Workload, s: Schedule) -> Any:
    """The built kernel of a workload and schedule, as a callable."""
    return load(path, entry_name(w, s))


def build_in_process(source: KernelSource, target: Target) -> Any:
    """Compile a source here (imports tvm) and load it."""
    from graphopt.backends.tvm.gomp import build_launcher
    from graphopt.backends.tvm.link import link
    from graphopt.backends.tvm.lowering import compile_functions

    directory = Path(tempfile.mkdtemp(prefix="graphopt-"))
    build_launcher(directory)
    objects = directory / f"{source.name}.o"
    try:
        compile_functions({source.name: source.payload}, target).write_to_file(str(objects))
    except RuntimeError as error:
        raise GraphoptError(f"{source.name}: {error}") from error
    linked = link(objects, objects.with_suffix(".so"), target) is not None
    return load(objects.with_suffix(".so") if linked else objects, source.name)

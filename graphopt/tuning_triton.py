"""The Triton backend as the tuner sees it: candidates are compiled ahead for the GPU, and run on it; or are interpreted.

Nothing here needs a GPU before a candidate is timed. What Triton or its assembler refuses, or what asks for more shared memory than a
block may have, was never launched: it is written down as ``build-failed``, with the reason.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace

from graphopt.autotune.measure import Built, Timing
from graphopt.autotune.runner import Failed, ProcessRunner, RunnerProcess
from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.base import Backend
from graphopt.candidates import CandidateBuilder, blame_no_candidate, new_folder
from graphopt.target import Target, detect

LOADER = "graphopt.backends.triton.build:load_candidate"
INTERPRETER = "graphopt.backends.triton.build:load_interpreted"
BENCH = "graphopt.autotune.gpu_bench"
BUILD_SECONDS = 60.0  # of one candidate
MOST_PROCESSES = 16  # of compilers: a round has no more candidates
PATIENCE = BUILD_SECONDS  # for the first call, which loads the binary, and compiles once more where a size is special to Triton
FLOOR, RECHECK = 5e-3, 1.5e-2  # seconds of kernels alone; each call costs a flush, too: of a kernel of 2 us, fifty times as much


class TritonTuning:
    """Tunes kernels of the Triton backend (:class:`~graphopt.candidates.TuningBackend`).

    Args:
        interpret: they run under Triton's interpreter, on tensors of the CPU.
        gpu: PyTorch's number of the GPU that they run on otherwise.
    """

    def __init__(self, target: Target, interpret: bool, gpu: int = 0) -> None:
        self.target, self.interpret, self.gpu = target, interpret, gpu

    @property
    def backend(self) -> Backend:
        from graphopt.backends.triton.backend import TritonBackend  # triton is an optional package

        return TritonBackend()

    def builder(self, workers: int) -> CandidateBuilder:
        return TritonCandidates(self.target, 1 if self.interpret else workers or min(detect().cores, MOST_PROCESSES), self.interpret)

    def runner(self, threads: int, timing: Timing | None, seed: int) -> ProcessRunner:
        how = {"loader": INTERPRETER, "device": "cpu"} if self.interpret else {"loader": LOADER, "device": f"cuda:{self.gpu}"}
        return ProcessRunner(json.dumps(how), threads, timing or Timing(FLOOR, RECHECK, patience=PATIENCE), seed, BENCH)


class TritonCandidates:
    """Writes candidates as files of Python and compiles them, each in a process that it may kill.

    Args:
        workers: processes.
        interpret: nothing is compiled.
    """

    def __init__(self, target: Target, workers: int, interpret: bool) -> None:
        self.target, self._folder = target, new_folder()
        how = json.dumps({"target": asdict(target), "folder": str(self._folder), "interpret": interpret})
        self._processes: list[RunnerProcess] = []
        try:
            for _ in range(workers):
                self._processes.append(RunnerProcess(how, "graphopt.triton_compiler", "builds candidates"))
        except BaseException:
            self.close()
            raise

    def build(self, w: Workload, schedules: Sequence[Schedule]) -> list[Built]:
        """Raises DiskFullError if the folder's disk is full, which is no candidate's fault, and WorkerError if there is no process."""
        wanted, done, errors = deque(enumerate(schedules)), dict[int, Built](), list[Exception]()

        def work(process: RunnerProcess) -> None:
            while not errors:
                try:
                    i, schedule = wanted.popleft()
                except IndexError:
                    return  # another one took the last
                try:
                    done[i] = _built(process, w, schedule)
                except Exception as error:
                    errors.append(error)

        threads = [threading.Thread(target=work, args=(p,), daemon=True) for p in self._processes[: len(schedules)]]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if errors:
            raise errors[0]
        built = [done[i] for i in range(len(schedules))]
        blame_no_candidate([b.failure for b in built], self._folder)
        return [replace(b, failure=_in_short(b.failure)) for b in built]

    def close(self) -> None:
        """End the processes and remove the folder."""
        for p in self._processes:
            p.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _built(process: RunnerProcess, w: Workload, s: Schedule) -> Built:
    try:
        answer = process.ask({"do": "build", "kind": w.kind, "text": w.text, "schedule": s.to_json()}, BUILD_SECONDS)
    except Failed as failure:
        return Built(s, failure=failure.reason)
    return Built(s, answer["path"], answer["entry"], answer["seconds"])


def _in_short(failure: str) -> str:
    """The first line and the last: between what it is about and what is wrong, Triton shows the kernel's text."""
    said = failure.strip().splitlines()
    return " ... ".join(dict.fromkeys(line.strip() for line in (*said[:1], *said[-1:])))

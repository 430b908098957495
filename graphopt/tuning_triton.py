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
from dataclasses import asdict

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
PATIENCE = 30.0  # seconds for the first call, which loads the binary, and compiles once more where a size is special to Triton


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
        return TritonCandidates(self.target, 1 if self.interpret else workers or detect().cores, self.interpret)

    def runner(self, threads: int, timing: Timing | None, seed: int) -> ProcessRunner:
        how = {"loader": INTERPRETER, "device": "cpu"} if self.interpret else {"loader": LOADER, "device": f"cuda:{self.gpu}"}
        return ProcessRunner(json.dumps(how), threads, timing or Timing(patience=PATIENCE), seed, BENCH)


class TritonCandidates:
    """Writes candidates as files of Python and compiles them, each in a process that it may kill.

    Args:
        workers: processes.
        interpret: nothing is compiled.
    """

    def __init__(self, target: Target, workers: int, interpret: bool) -> None:
        self.target, self._folder = target, new_folder()
        how = json.dumps({"target": asdict(target), "folder": str(self._folder), "interpret": interpret})
        self._processes = [RunnerProcess(how, "graphopt.triton_compiler") for _ in range(workers)]

    def build(self, w: Workload, schedules: Sequence[Schedule]) -> list[Built]:
        """Raises DiskFullError if the folder's disk is full, which is no candidate's fault, and WorkerError if there is no process."""
        wanted, done, errors = deque(enumerate(schedules)), dict[int, Built](), list[Exception]()

        def work(process: RunnerProcess) -> None:
            try:
                while wanted and not errors:
                    i, schedule = wanted.popleft()
                    done[i] = _built(process, w, schedule)
            except IndexError:
                return  # another one took the last
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(p,)) for p in self._processes[: len(schedules)]]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if errors:
            raise errors[0]
        built = [done[i] for i in range(len(schedules))]
        blame_no_candidate(built, self._folder)
        return built

    def close(self) -> None:
        """End the processes and remove the folder."""
        for p in self._processes:
            p.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _built(process: RunnerProcess, w: Workload, s: Schedule) -> Built:
    try:
        answer = process.ask({"do": "build", "kind": w.kind, "text": w.text, "schedule": s.to_json()}, BUILD_SECONDS)
    except Failed as failure:
        said = failure.reason.strip().splitlines()  # Triton shows the kernel's text between what it is about and what is wrong
        return Built(s, failure=said[0] if len(said) < 2 else f"{said[0]} ... {said[-1].strip()}")
    return Built(s, answer["path"], answer["entry"], answer["seconds"])

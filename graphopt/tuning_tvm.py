"""The TVM backend as the tuner sees it: candidates are compiled side by side, and run in torch's own threads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from graphopt.autotune.measure import Built, Timing
from graphopt.autotune.runner import ProcessRunner
from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.base import Backend
from graphopt.candidates import CandidateBuilder, blame_no_candidate, new_folder
from graphopt.errors import BuildError, first_line
from graphopt.target import Target, detect

LOADER = "graphopt.backends.tvm.launch:load"
BUILD_SECONDS = 30.0  # of one file of candidates


class TvmTuning:
    """Tunes kernels of the TVM backend (:class:`~graphopt.candidates.TuningBackend`)."""

    def __init__(self, target: Target) -> None:
        self.target = target

    @property
    def backend(self) -> Backend:
        from graphopt.backends.tvm.backend import TvmBackend  # tvm is an optional package

        return TvmBackend()

    def builder(self, workers: int) -> CandidateBuilder:
        return TvmCandidates(self.target, workers)

    def runner(self, threads: int, timing: Timing | None, seed: int) -> ProcessRunner:
        return ProcessRunner(LOADER, threads, timing, seed)


class TvmCandidates:
    """Builds candidates, several in a file."""

    def __init__(self, target: Target, workers: int = 0, together: int = 8) -> None:
        from graphopt.backends.tvm.build import KernelBuilder

        self.target, self.workers, self.together = target, workers, together
        self._folder = new_folder()
        self._builder = KernelBuilder(BUILD_SECONDS)
        self._builder.prestart(workers or detect().cores)

    def build(self, w: Workload, schedules: Sequence[Schedule]) -> list[Built]:
        """Raises DiskFullError if the folder's disk is full, which is no candidate's fault, and WorkerError if there is no process."""
        from graphopt.backends.tvm.template import entry_name

        done = self._builder.build_together(w, schedules, self.target, self._folder, self.workers, self.together)
        blame_no_candidate((str(r) for r in done if isinstance(r, BuildError)), self._folder)
        return [
            Built(s, failure=first_line(r)) if isinstance(r, BuildError) else Built(s, str(r[0]), entry_name(w, s), r[1])
            for s, r in zip(schedules, done, strict=True)
        ]

    def close(self) -> None:
        """End the build processes and remove the folder."""
        self._builder.close()
        shutil.rmtree(self._folder, ignore_errors=True)

"""The process that builds candidates of the Triton backend. Started by :mod:`graphopt.tuning_triton`, a few side by side.

It is two, as those that run candidates are: what kills the compiler is known by its end, and the next candidate finds a fresh child.
"""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

from graphopt.autotune.runner_process import supervise
from graphopt.autotune.space import Schedule, Workload
from graphopt.errors import BuildError
from graphopt.target import Target


class TritonCompiler:
    """Builds candidates for one target into a folder.

    Args:
        target: the fields of a :class:`~graphopt.target.Target`.
        interpret: a candidate is a file of Python; nothing is compiled.
    """

    def __init__(self, target: dict[str, Any], folder: str, interpret: bool) -> None:
        self.target = Target(**{**target, "features": tuple(target["features"]), "cache": tuple(target["cache"])})
        self.folder, self.interpret = Path(folder), interpret

    def build(self, kind: str, text: str, schedule: str) -> dict[str, Any]:
        """The file of a candidate, its entry, and the seconds that it took. Raises BuildError with the reason that there is none."""
        from graphopt.backends.triton.build import keep_binaries, write_source
        from graphopt.backends.triton.offline import compile_for_launch
        from graphopt.backends.triton.templates import TEMPLATES

        start = time.perf_counter()
        gc.collect()  # what the candidate before left behind; it does not happen by itself in this process
        w, s = Workload(kind, text), Schedule.from_json(schedule)
        template = next((t for t in TEMPLATES if t.name == s.template), None)
        if template is None:
            raise BuildError(f"there is no template {s.template!r}")
        source = template.emit(w, s, self.target)
        path = write_source(source, self.folder)
        if not self.interpret:
            keep_binaries(self.folder)
            shared = compile_for_launch(path, source.payload, self.target)
            if shared > self.target.shared_memory:
                raise BuildError(f"it takes {shared} bytes of shared memory, and a block may have {self.target.shared_memory}")
        return {"path": str(path), "entry": source.name, "seconds": time.perf_counter() - start}


def main(arguments: str) -> None:
    """Be the supervisor. ``arguments``: those of :class:`TritonCompiler`, as JSON."""

    def get_ready() -> TritonCompiler:
        from graphopt.backends.triton import offline  # noqa: F401 - before processes are forked, once

        return TritonCompiler(**json.loads(arguments))

    supervise(get_ready)

"""What the compiler asks for: kernels, as files in the kernel cache, loaded.

Each is one readable file of Python. On a GPU it is compiled when it is first called, and Triton keeps the binary; for CPU tensors it is
interpreted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.triton.build import load, write_source
from graphopt.backends.triton.templates import TEMPLATES
from graphopt.backends.versions import source_hash
from graphopt.errors import BuildError, GraphoptError
from graphopt.target import Target


@dataclass(frozen=True)
class LoadedArtifact:
    """A kernel that is ready to run, its file, and whether it was found or made."""

    name: str
    kernel: Callable[..., Any]
    path: Path
    cache: str


@dataclass(frozen=True)
class Provider:
    """Builds kernels for tensors of one kind of device.

    Attributes:
        interpret: those of the CPU, under Triton's interpreter.
    """

    interpret: bool

    def prestart(self, cache_dir: Path, workers: int, model: str = "") -> None:
        """Nothing is started: a source takes milliseconds to write."""

    def remember(self, cache_dir: Path, model: str) -> None:
        """Nothing needs to be remembered."""

    def changed_words(self) -> None:
        """Weights are compared by PyTorch."""

    def native(self) -> None:
        """Each call is made from Python."""

    def index_look(self) -> Callable[..., None]:
        """Looks through an index for one that is out of range, without waiting for what it finds."""
        from graphopt.backends.triton import indices
        from graphopt.backends.triton.interpret import interpreted

        return interpreted(indices) if self.interpret else indices.launch

    def load_or_build(self, jobs: Sequence[tuple[Workload, Schedule]], target: Target, cache_dir: Path, workers: int,
                      progress: Callable[[str, int, int], None] | None) -> list[LoadedArtifact | BuildError]:  # fmt: skip
        """Kernels for jobs, in order; for one that could not be made, the error."""
        out: list[LoadedArtifact | BuildError] = []
        for done, (w, s) in enumerate(jobs, 1):
            try:
                out.append(self._one(w, s, target, cache_dir))
            except GraphoptError as error:
                out.append(error if isinstance(error, BuildError) else BuildError(str(error)))
            if progress:
                progress("build kernels", done, len(jobs))
        return out

    def _one(self, w: Workload, s: Schedule, target: Target, cache_dir: Path) -> LoadedArtifact:
        template = next(p for p in TEMPLATES if p.name == s.template)
        source = template.emit(w, s, target)
        folder = cache_dir / f"triton-{source_hash('triton')}"
        path = folder / f"{source.name}.py"
        found = path.exists() and path.read_text() == source.text
        if not found:
            write_source(source, folder)
        cache = "hit" if found else "built: this kernel was never written here"
        return LoadedArtifact(source.name, load(path, self.interpret), path, cache)

"""What the compiler asks for: loaded kernels, from the disk cache or built now."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.build import KernelBuilder, load_kernel
from graphopt.backends.tvm.cache import KernelCache
from graphopt.backends.tvm.launch import changed_words as changed_words
from graphopt.backends.tvm.launch import native as native
from graphopt.backends.tvm.template import entry_name
from graphopt.backends.versions import source_hash
from graphopt.errors import BuildError
from graphopt.target import Target, detect

_BUILDING = threading.Lock()  # compiling in several threads must not multiply the build processes, nor build a kernel twice
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


@dataclass(frozen=True)
class LoadedArtifact:
    """A kernel that is ready to run, its file, and whether it was found or why it had to be built."""

    name: str
    kernel: Callable[..., Any]
    path: Path
    cache: str


@lru_cache(maxsize=1)
def _builder() -> KernelBuilder:
    return KernelBuilder()


@cache
def writable(cache_dir: Path) -> Path:
    """The folder, made if need be; where that cannot be written, one that lasts as long as the process, with a warning."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir):
            return cache_dir
    except OSError as error:
        folder = tempfile.TemporaryDirectory(prefix="graphopt-")
        _FOLDERS.append(folder)
        warnings.warn(f"kernels cannot be kept in {cache_dir} ({error.strerror}); they are built anew in each process", stacklevel=2)
        return Path(folder.name)


def prestart(cache_dir: Path, workers: int, model: str = "") -> None:
    """Start build processes if kernels will have to be built, so that they get ready while a model is captured and optimized.

    Args:
        model: identity of the captured graph, for which :func:`remember` may have been called; before capture, empty:
            then only an empty cache is reason enough.
    """
    folder = writable(cache_dir)
    expected = not _mark(folder, model).exists() if model else not any(folder.glob("*.json"))
    if expected:
        _builder().prestart(workers or detect().cores)


def remember(cache_dir: Path, model: str) -> None:
    """Note that all kernels of a captured graph are in the cache."""
    mark = _mark(writable(cache_dir), model)
    try:
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
    except OSError:
        pass  # only time is lost


def _mark(folder: Path, model: str) -> Path:
    return folder / "models" / f"{model}-{source_hash('tvm')}"


def index_look() -> None:
    """An index is looked at before a kernel reads by it."""


def load_or_build(jobs: Sequence[tuple[Workload, Schedule]], target: Target, cache_dir: Path, workers: int,
                  progress: Callable[[str, int, int], None] | None) -> list[LoadedArtifact | BuildError]:  # fmt: skip
    """Kernels for jobs, in order; for one that could not be built or loaded, the error."""
    cache_dir = writable(cache_dir)
    with _BUILDING:
        return _load_or_build(jobs, target, cache_dir, workers, progress)


def _load_or_build(jobs: Sequence[tuple[Workload, Schedule]], target: Target, cache_dir: Path, workers: int,
                   progress: Callable[[str, int, int], None] | None) -> list[LoadedArtifact | BuildError]:  # fmt: skip
    cache = KernelCache(cache_dir)
    state = {job: "hit" if cache.find(*job, target) else f"built: {cache.why_missing(*job, target)}" for job in jobs}
    tell = (lambda done, total: progress("build kernels", done, total)) if progress else None
    paths = _builder().build_many(jobs, target, cache_dir, workers, tell, errors="return")
    return [_load(job, path, state[job]) for job, path in zip(jobs, paths, strict=True)]


def _load(job: tuple[Workload, Schedule], path: Path | BuildError, cache: str) -> LoadedArtifact | BuildError:
    if isinstance(path, BuildError):
        return path
    try:
        return LoadedArtifact(entry_name(*job), load_kernel(path, *job), path, cache)
    except BuildError as error:
        return error

"""From a kernel's source to a callable: the file is written where it can be read, loaded, and compiled when it is first called."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from graphopt.backends.base import KernelSource
from graphopt.errors import BuildError
from graphopt.files import write_whole

_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def load_module(path: Path) -> ModuleType:
    """A kernel's file as a module of its own: Triton reads the source of a function from its file."""
    spec = importlib.util.spec_from_file_location(f"graphopt_kernel_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise BuildError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BuildError(f"kernel {path.name} could not be loaded: {type(error).__name__}: {error}") from error
    return module


def load(path: Path, interpret: bool) -> Callable[..., Any]:
    """The kernel of a file: ``kernel(*operands, *outputs, *sizes)``.

    Args:
        interpret: for CPU tensors, under Triton's interpreter; else for those of a GPU, on the current stream.
    """
    module = load_module(path)
    if not interpret:
        return module.launch  # type: ignore[no-any-return]
    from graphopt.backends.triton.interpret import interpreted

    return interpreted(module)


def load_interpreted(path: Path, entry: str) -> Callable[..., Any]:
    """A candidate of the tuner, for CPU tensors."""
    return load(path, interpret=True)


def load_candidate(path: Path, entry: str) -> Callable[..., Any]:
    """A candidate of the tuner, for tensors of a GPU; its machine code lies beside it if it was compiled (:mod:`.offline`)."""
    keep_binaries(path.parent)
    return load(path, interpret=False)


def keep_binaries(folder: Path) -> None:
    """From now on, keep machine code in this folder: that of candidates goes away with them."""
    from triton import knobs

    knobs.cache.dir = str(folder / "binaries")


def write_source(source: KernelSource, folder: Path) -> Path:
    """Write a source where it can be loaded from, in one step, so that no process sees half of it."""
    path = folder / f"{source.name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, source.text.encode())
    return path


def load_source(source: KernelSource, interpret: bool) -> Callable[..., Any]:
    """The kernel of a source, written to a temporary file that lasts as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="graphopt-")
    _FOLDERS.append(folder)
    path = write_source(source, Path(folder.name))
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        return load(path, interpret)
    finally:
        sys.dont_write_bytecode = before

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


def load_source(source: KernelSource, interpret: bool) -> Callable[..., Any]:
    """The kernel of a source, written to a temporary file that lasts as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="graphopt-")
    _FOLDERS.append(folder)
    path = Path(folder.name) / f"{source.name}.py"
    path.write_text(source.text)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        return load(path, interpret)
    finally:
        sys.dont_write_bytecode = before

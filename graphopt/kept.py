"""Graphs that were prepared before: what tracing, passes and lowering made of a graph is kept in a file, and taken up where the same
graph comes again, in this process or in another. Kernels have a cache of their own.

A file's name is the hash of all that decides what is in it: the graph and PyTorch's settings (:mod:`graphopt.capture.identity`), which
weights are exact in a narrower float, the target, the options, the source of graphopt and the versions of what generates kernels. Nothing
in it depends on what weights hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch

import graphopt
from graphopt import autotune, backends, passes
from graphopt.backends.versions import hash_of
from graphopt.capture.identity import Unknown
from graphopt.devices import choose_backend, choose_target
from graphopt.files import write_whole
from graphopt.ir import flat
from graphopt.options import Options
from graphopt.prepared import Prepared

NAME = "kept-graphs"  # in remarks
MOST = 256  # files; the ones that were not used for longest go first
_LOADED = time.time()
_PICKLING = (pickle.PickleError, TypeError, AttributeError, ImportError, LookupError, ValueError, EOFError)
_NOT_DECISIVE = ("cache_dir", "workers", "keep_graphs")  # options


@dataclass
class KeptGraph:
    """A prepared graph, and what else a call needs.

    Attributes:
        versions: positions of the arguments whose version counters autograd expects a call to raise.
    """

    prepared: Prepared
    versions: tuple[int, ...]


def key_of(text: str, exact: Collection[int], device: torch.device, options: Options, label: str) -> str:
    """The name of a graph's file.

    Args:
        text: see :func:`graphopt.capture.identity.graph_text`.
        exact: arguments that are weights of f32 and bf16 in truth.
        label: what reports call the model.

    Raises:
        Unknown: it cannot be said.
    """
    target = choose_target(device, options)
    backend, why_none = choose_backend(target, options)
    chosen = [(f.name, str(getattr(options, f.name))) for f in fields(options) if f.name not in _NOT_DECISIVE]
    generator = why_none if backend is None else (backend.name, backend.versions())
    parts = (sources(), sys.version, target.fingerprint, generator, chosen, label, sorted(exact), text)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@cache
def sources() -> str:
    """Hash of all of graphopt's source.

    Raises:
        Unknown: a file was changed after it may have been loaded.
    """
    folders = [Path(package.__path__[0]) for package in (graphopt, autotune, backends, passes)]
    if any(file.stat().st_mtime > _LOADED for folder in folders for file in folder.rglob("*.py")):
        raise Unknown("graphopt's source was changed since this process began")
    return hash_of(folders)


def take(folder: Path, key: str) -> KeptGraph | None:
    """What was kept under a key; None if nothing was, or if the file is damaged."""
    start = time.perf_counter()
    file = folder / key
    try:
        data = file.read_bytes()
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        kept: KeptGraph = flat.loads(data[32:])
    except (OSError, *_PICKLING):
        return None
    with contextlib.suppress(OSError):  # of a folder that may only be read
        os.utime(file)
    report = kept.prepared.units[0].report
    report.notes.append("passes and lowering: taken from an earlier compilation of the same graph")
    report.seconds = {"taken": time.perf_counter() - start}
    kept.prepared.seconds = report.seconds["taken"]
    return kept


def keep(folder: Path, key: str, prepared: Prepared, versions: tuple[int, ...]) -> str:
    """Keep a prepared graph, before anything else is done with it.

    Returns:
        Why it cannot be kept; empty if it is.
    """
    if prepared.units[0].report.notes:
        return "its report has notes, which would not be said again"
    if prepared.captured.constants:
        return "tensors are part of its program"
    try:
        data = flat.dumps(KeptGraph(prepared, versions))
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / key, hashlib.sha256(data).digest() + data)
    except (OSError, *_PICKLING) as error:
        return f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError):  # another process does it, too
        _prune(folder)
    return ""


def _prune(folder: Path) -> None:
    files = [file for file in folder.iterdir() if not file.name.startswith(".")]  # those are being written
    if len(files) > MOST:
        for file in sorted(files, key=lambda f: f.stat().st_mtime)[:-MOST]:
            file.unlink(missing_ok=True)

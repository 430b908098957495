"""What decides a kernel beside workload, schedule and target: versions of packages, and the source that emits kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

import graphopt.ir


@cache
def package_version(package: str) -> str:
    """The installed version of a package, or that there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@cache
def source_hash(backend: str) -> str:
    """Hash of the code that emits the kernels of a backend: its own, that of ``forms``, and the IR whose expansions it reads."""
    here = Path(__file__).parent
    return hash_of([here / backend, here / "forms", Path(graphopt.ir.__file__).parent])


def hash_of(folders: Iterable[Path]) -> str:
    """Hash of the Python files in folders, names included; 16 hex digits."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]

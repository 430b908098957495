"""What decides a kernel beside workload, schedule and target: versions of packages, and the source that emits kernels."""

from __future__ import annotations

import hashlib
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
    digest, here = hashlib.sha256(), Path(__file__).parent
    for folder in (here / backend, here / "forms", Path(graphopt.ir.__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]

"""What decides a kernel beside workload, schedule and target: versions of packages, and this backend's own source."""

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
def source_hash() -> str:
    """Hash of the code that emits kernels: this backend, and the IR whose expansions it reads."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(graphopt.ir.__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]

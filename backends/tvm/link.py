"""From an object file to a shared object, with whatever linker is there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from graphopt.errors import BuildError
from graphopt.target import Target, detect

_COMMANDS = (("ld", ("-shared",)), ("cc", ("-shared",)), ("gcc", ("-shared",)), ("clang", ("-shared",)))


def linker(target: Target) -> tuple[str, list[str]] | None:
    """(name, command) of the first linker found, or None."""
    prefix = "" if target.arch == detect().arch else f"{target.arch}-linux-gnu-"
    for name, flags in _COMMANDS:
        if (found := shutil.which(prefix + name)) is not None:
            return prefix + name, [found, *flags]
    return None


def link(objects: Path, output: Path, target: Target) -> str | None:
    """Link; returns the linker's name, or None if there is none (the object file can be loaded by full tvm)."""
    found = linker(target)
    if found is None:
        return None
    name, command = found
    done = subprocess.run([*command, "-o", str(output), str(objects)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{name} could not link {objects.name}: {done.stderr.strip()}")
    return name

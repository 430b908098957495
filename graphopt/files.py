"""Files: whether one can be written, asked before something long begins, and writing one whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def unwritable(file: Path) -> str:
    """Why a file can be neither written nor made, in words; empty if it can, as far as that is known before."""
    if file.is_dir():
        return "it is a folder"
    if file.exists() and not os.access(file, os.W_OK):
        return "it may not be written to"
    folder = next((p for p in file.absolute().parents if p.exists()), Path("/"))
    if not folder.is_dir():
        return f"{folder} is no folder"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"nothing may be written to {folder}"


def write_whole(file: Path, data: bytes) -> None:
    """Write a file of a cache in one step, so that no process sees half of it; until then it has a hidden name beside it.

    Raises:
        OSError: it cannot be written; nothing is left of it then.
    """
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as part:
            part.write(data)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

"""Files that will be written at the end of something long: whether they can be is asked at its beginning."""

from __future__ import annotations

import os
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

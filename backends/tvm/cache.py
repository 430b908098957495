"""Built kernels on disk: ``<workload>-<key>.so`` beside ``.json`` (the key's ingredients) and ``.txt`` (the kernel, readable).

The key is a hash over everything that decides the machine code. A miss can say which ingredient differs from the entry
that comes nearest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.llvm_target import llvm_features
from graphopt.backends.versions import package_version, source_hash
from graphopt.files import write_whole
from graphopt.target import Target

FORMAT = "1"
SUFFIXES = (".so", ".o")  # .o: no linker was found when the kernel was built


def ingredients(w: Workload, s: Schedule, t: Target) -> dict[str, str]:
    """Everything that decides a kernel's machine code, by name."""
    return {
        "format": FORMAT,
        "kind": w.kind,
        "workload": w.text,
        "schedule": s.to_json(),
        "target": f"{t} {t.fingerprint}",
        "target features": " ".join(llvm_features(t)),
        **package_versions(),
    }


def package_versions() -> dict[str, str]:
    """The ingredients that are the same for all kernels."""
    return {"tvm": package_version("apache-tvm"), "tvm-ffi": package_version("apache-tvm-ffi"), "backend source": source_hash("tvm")}


def key_of(parts: Mapping[str, str]) -> str:
    """SHA-256 over the ingredients, 24 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class KernelCache:
    """Kernels in one folder. Any number of processes may use it at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)

    def find(self, w: Workload, s: Schedule, t: Target) -> Path | None:
        """The kernel's file if it is there and whole. A damaged entry counts as absent."""
        parts = ingredients(w, s, t)
        stem = self._stem(w, parts)
        try:
            entry = json.loads(stem.with_suffix(".json").read_text())
            file = stem.with_suffix(entry["suffix"])
            if entry["ingredients"] == parts and hashlib.sha256(file.read_bytes()).hexdigest() == entry["sha256"]:
                return file
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None

    def why_missing(self, w: Workload, s: Schedule, t: Target) -> str:
        """What differs from the nearest entry of the same workload, for reports."""
        parts = ingredients(w, s, t)
        best: list[str] | None = None
        for file in sorted(self.directory.glob(f"{w.key}-*.json")):
            try:
                other = json.loads(file.read_text())["ingredients"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            differs = [f"{name} differs" for name in parts if other.get(name) != parts[name]]
            if not differs:
                return "the entry is damaged"
            if best is None or len(differs) < len(best):
                best = differs
        return ", ".join(best) if best else "this workload was never built here"

    def put(self, w: Workload, s: Schedule, t: Target, binary: Path, script: str) -> Path:
        """Take a built file in; what exists is replaced in one step. Returns the file's place."""
        parts = ingredients(w, s, t)
        stem = self._stem(w, parts)
        self.directory.mkdir(parents=True, exist_ok=True)
        data = binary.read_bytes()
        entry = {"ingredients": parts, "sha256": hashlib.sha256(data).hexdigest(), "suffix": binary.suffix}
        file = stem.with_suffix(binary.suffix)
        write_whole(file, data)
        write_whole(stem.with_suffix(".txt"), script.encode())
        write_whole(stem.with_suffix(".json"), json.dumps(entry, indent=1).encode())  # last: it makes the entry valid
        return file

    def _stem(self, w: Workload, parts: Mapping[str, str]) -> Path:
        return self.directory / f"{w.key}-{key_of(parts)}"

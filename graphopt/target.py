"""What a device is: kind, architecture, features, cores, caches, bandwidth. Kernels are chosen for a Target, never for the build machine.

``detect()`` describes this machine; ``Target.parse`` makes one from a name such as ``cpu`` or ``cuda:sm_90``.
"""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from graphopt.errors import UsageError

_VECTOR_BITS = (("avx512f", 512), ("avx2", 256), ("avx", 256), ("sve", 256), ("asimd", 128), ("sse2", 128))


@dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
        kind: ``cpu``, ``cuda`` or ``hip``.
        arch: ``x86_64``, ``aarch64``; ``sm_90``, ``gfx942``.
        model: the marketing name, for reports.
        features: lower-case instruction-set features that kernels may use, sorted (e.g. ``avx512f``, ``avx512_vnni``).
        cores: physical cores that may be used.
        cache: bytes of L1d, L2 (a core) and L3 (shared).
    """

    kind: str
    arch: str
    model: str = ""
    features: tuple[str, ...] = ()
    cores: int = 1
    cache: tuple[int, int, int] = (32 << 10, 512 << 10, 8 << 20)

    @property
    def vector_bits(self) -> int:
        """Width of the widest vector registers."""
        return next((bits for name, bits in _VECTOR_BITS if name in self.features), 128)

    def lanes(self, itemsize: int) -> int:
        """Elements of a size in bytes that one vector register holds."""
        return self.vector_bits // (8 * itemsize)

    @property
    def vector_registers(self) -> int:
        """Vector registers of the instruction set in use."""
        return 32 if self.arch == "aarch64" or self.vector_bits >= 512 else 16

    def panel_width(self, columns: int, itemsize: int) -> int:
        """Columns of a panel of a packed factor: one to four vectors (to three with 16 registers), as waste least.

        Fewer columns than fill a vector are one panel: the power of two that holds them.
        """
        lanes = self.lanes(itemsize)
        if columns <= lanes // 2:
            return 1 << (columns - 1).bit_length()
        choices = (3, 4, 2, 1) if self.vector_registers == 32 else (3, 2, 1)
        return lanes * min(choices, key=lambda v: -(-columns // (v * lanes)) * v)

    def has(self, feature: str) -> bool:
        return feature in self.features

    @property
    def fingerprint(self) -> str:
        """Stable identity: equal for machines on which the same kernel is the best one."""
        text = repr((self.kind, self.arch, self.model, self.features, self.cores, self.cache))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}" + (f" ({self.model}, {self.cores} cores)" if self.kind == "cpu" else "")

    @staticmethod
    def parse(name: str) -> Target:
        """A target from ``cpu`` (this machine's) or ``cuda:sm_90``, ``hip:gfx942``. Raises UsageError."""
        kind, _, arch = name.partition(":")
        if kind == "cpu" and not arch:
            return detect()
        if kind in ("cuda", "hip") and arch:
            return Target(kind, arch)
        raise UsageError(f"unknown device {name!r}; known forms: cpu, cuda:sm_90, hip:gfx942")


@lru_cache(maxsize=1)
def detect() -> Target:
    """This machine's CPU. What cannot be read takes a modest default."""
    arch = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    model, features, cores = _cpuinfo()
    return Target("cpu", arch, model or platform.processor() or arch, features, cores, _caches())


def _cpuinfo() -> tuple[str, tuple[str, ...], int]:
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "", (), len(usable)
    model, features, cores = "", set(), set()
    for block in text.split("\n\n"):
        pairs = dict(line.split(":", 1) for line in block.splitlines() if ":" in line)
        entry = {k.strip(): v.strip() for k, v in pairs.items()}
        if "processor" in entry and entry["processor"].isdigit() and int(entry["processor"]) in usable:
            model = entry.get("model name", model)
            features |= set(entry.get("flags", entry.get("Features", "")).lower().split())
            cores.add((entry.get("physical id", "0"), entry.get("core id", entry["processor"])))
    return model, tuple(sorted(features)), len(cores) or len(usable)


def _caches() -> tuple[int, int, int]:
    sizes = {1: 32 << 10, 2: 512 << 10, 3: 8 << 20}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind = int((index / "level").read_text()), (index / "type").read_text().strip()
            if kind != "Instruction" and level in sizes:
                sizes[level] = int((index / "size").read_text().strip().rstrip("K")) << 10
        except (OSError, ValueError):
            continue
    return sizes[1], sizes[2], sizes[3]

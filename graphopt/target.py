"""What a device is: kind, architecture, features, cores, caches, bandwidth. Kernels are chosen for a Target, never for the build machine.

``detect()`` describes this machine; ``Target.from_name`` makes one from a name such as ``cpu:znver4`` or ``cuda:sm_90``.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from graphopt.accelerators import ACCELERATORS
from graphopt.errors import DeviceError, nearest
from graphopt.openmp import usable_processors
from graphopt.processors import PROCESSORS

THIRDS_PRODUCTS = 6  # of bf16 on AMX tiles, for one of f32
HALVES_PRODUCTS = 3  # of f16, as fast
MATRIX_UNITS = ("mma", "wgmma", "tcgen05", "mfma")
MOST_CACHES = 8  # that Linux may list of a processor
_VECTOR_BITS = (("avx512f", 512), ("avx2", 256), ("avx", 256))  # all others: 128, or as wide as SVE is


@dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
        kind: ``cpu``, ``cuda`` or ``hip``.
        arch: ``x86_64``, ``aarch64``; ``sm_90``, ``gfx942``.
        model: the marketing name, for reports.
        features: lower-case instruction-set features that kernels may use, sorted (e.g. ``avx512f``, ``avx512_vnni``; ``wgmma``, ``tma``).
        cores: physical cores that may be used; a GPU's multiprocessors.
        cache: bytes of L1d, L2 (a core) and L3 (shared); of a GPU: shared memory that a block may have, 0, and L2 (of all).
        sve_bits: width of the SVE registers; 0 without SVE, or where it is not known.
    """

    kind: str
    arch: str
    model: str = ""
    features: tuple[str, ...] = ()
    cores: int = 1
    cache: tuple[int, int, int] = (32 << 10, 512 << 10, 8 << 20)
    sve_bits: int = 0

    @property
    def vector_bits(self) -> int:
        """Width of the widest vector registers. SVE of unknown width counts as NEON, which is always there beside it."""
        return next((bits for name, bits in _VECTOR_BITS if name in self.features), max(128, self.sve_bits))

    def lanes(self, itemsize: int) -> int:
        """Elements of a size in bytes that one vector register holds."""
        return self.vector_bits // (8 * itemsize)

    @property
    def vector_registers(self) -> int:
        """Vector registers of the instruction set in use."""
        return 32 if self.arch == "aarch64" or self.vector_bits >= 512 else 16

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, vectors of columns) of a matrix product's register tile.

        Accumulators enough to hide the latency of the multiply-add, beside the vectors of one factor and an element of the
        other: 8 by 3 of 32 registers, 6 by 2 of 16.
        """
        return (8, 3) if self.vector_registers == 32 else (6, 2)

    def panel_width(self, columns: int, itemsize: int) -> int:
        """Columns of a panel of a packed factor: one to four vectors (to three with 16 registers), as waste least.

        Fewer columns than fill a vector are one panel: the power of two that holds them.
        """
        lanes = self.lanes(itemsize)
        if columns <= lanes // 2:
            return 1 << (columns - 1).bit_length()
        choices = (3, 4, 2, 1) if self.vector_registers == 32 else (2, 3, 1)
        return lanes * min(choices, key=lambda v: -(-columns // (v * lanes)) * v)

    @property
    def pipes(self) -> int:
        """Vector instructions a cycle: cores that are worth vectorizing for have two units that multiply and add."""
        return 2

    @property
    def flops_per_cycle(self) -> int:
        """f32 additions and multiplications of a core a cycle: each unit multiplies and adds a vector."""
        return 2 * self.pipes * self.lanes(4)

    @property
    def memory_rate(self) -> float:
        """Bytes a cycle that a core reads from memory: some 16 cache lines of 64 bytes are under way at a time, for some 256 cycles.

        4 bytes are 14 GB/s at 3.5 GHz; measured with two cores each were 17 on Zen 5, 15 on Granite Rapids.
        """
        return 16 * 64 / 256

    @property
    def balance(self) -> float:
        """Flops for each byte from memory at which a kernel's arithmetic takes as long as its reading: 16 with AVX-512, 4 with NEON."""
        return self.flops_per_cycle / self.memory_rate

    @property
    def bf16_products(self) -> str:
        """How products of bf16 are best summed in f32: ``amx`` (tiles), ``dot`` (pairs, in vectors), or empty: as f32."""
        if self.has("amx_tile") and self.has("amx_bf16"):
            return "amx"
        return "dot" if self.has("avx512_bf16") else ""

    @property
    def int8_products(self) -> str:
        """How products of 8-bit integers are best summed in 32 bits.

        ``amx`` (tiles), ``vnni`` (fours, unsigned by signed), ``sdot`` (fours, signed), or ``mul``: one by one.
        """
        if self.has("amx_tile") and self.has("amx_int8"):
            return "amx"
        if (self.has("avx512_vnni") and self.has("avx512f")) or self.has("avx_vnni"):
            return "vnni"
        return "sdot" if self.arch == "aarch64" and self.has("asimddp") else "mul"

    @property
    def f32_thirds(self) -> bool:
        """Whether products of f32 are best summed from thirds, which are bf16, on AMX tiles."""
        return self.bf16_products == "amx"

    @property
    def f32_halves(self) -> bool:
        """Whether products of f32 with a weight are best summed from halves, which are f16, on AMX tiles."""
        return self.has("amx_tile") and self.has("amx_fp16")

    def conv_in_thirds(self, taps: int, channels: int, filters: int, pixels: int) -> bool:
        """Whether a convolution of one group is best summed from thirds on AMX tiles; ``pixels`` of the result.

        Splitting a pixel's channels costs as much as some 32 of its products: with few filters it does not pay. With few pixels the
        weight, which is read once by any kernel, takes most of the time. The bounds are measured.
        """
        suits = channels % 8 == filters % 8 == 0 and channels >= 16
        many = pixels * min(taps, 4) >= 128 or (filters >= 1024 and pixels >= 32)
        return self.f32_thirds and suits and taps * filters >= 64 and many

    def conv_along_channels(self, taps: int, channels: int, filters: int) -> bool:
        """Whether vectors of a convolution of one group are best laid along the channels of its image rather than along its filters.

        Along few filters they are mostly empty. So many that a tile has one pixel read a vector for each product; and where sums are
        short, adding up their lanes takes as long as they do. The bounds are measured.
        """
        fills = self.kind == "cpu" and channels >= self.lanes(4) > 1
        fits = 3 * filters < self.vector_registers  # the sums of two pixels, and the weight
        return fills and fits and (filters <= 4 or taps * channels >= 8 * filters)

    def conv_by_groups(self, groups: int, channels: int, filters: int, itemsize: int = 4) -> bool:
        """Whether a vector of a convolution holds the filters of several groups, or of one that just fills it.

        A vector of the image's channels is spread over the lanes: as many as divide it.
        """
        lanes = self.lanes(itemsize) if self.kind == "cpu" else 1
        even = 1 < filters <= lanes and filters & (filters - 1) == 0 and channels & (channels - 1) == 0 and channels <= filters
        return even and groups > 1 and groups * filters >= lanes

    def has(self, feature: str) -> bool:
        return feature in self.features

    @property
    def is_gpu(self) -> bool:
        return self.kind in ("cuda", "hip")

    @property
    def warp(self) -> int:
        """Threads of a GPU that run in step."""
        return 64 if self.kind == "hip" else 32

    @property
    def shared_memory(self) -> int:
        """Bytes of a GPU's shared memory that one block may have."""
        return self.cache[0] if self.is_gpu else 0

    @property
    def matrix_unit(self) -> str:
        """A GPU's instructions that multiply tiles: ``mma``, ``wgmma``, ``tcgen05`` or ``mfma``; empty where none are known."""
        return next((f for f in MATRIX_UNITS if f in self.features), "")

    @property
    def fingerprint(self) -> str:
        """Stable identity: equal for machines on which the same kernel is the best one."""
        text = repr((self.kind, self.arch, self.model, self.features, self.cores, self.cache, self.sve_bits))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}" + (f" ({self.model}, {self.cores} cores)" if self.kind == "cpu" else "")

    @staticmethod
    def from_name(name: str) -> Target:
        """A target from ``cpu`` (this machine's), ``cpu:znver4``, ``cpu:znver4:8`` (8 cores), ``cuda:sm_90``,
        ``cuda:sm_90:16`` (a part of one, of 16 multiprocessors), ``hip:gfx942``.

        Raises:
            DeviceError: the name is not known; it lists those that are.
        """
        kind, _, rest = name.partition(":")
        arch, _, cores = rest.partition(":")
        if kind == "cpu" and not arch:
            return detect()
        counted = not cores or (cores.isdigit() and int(cores) > 0)
        if (gpu := ACCELERATORS.get(arch)) and gpu.kind == kind and counted:
            features = tuple(sorted((gpu.matrix, *gpu.features)))
            return Target(kind, arch, gpu.model, features, int(cores or gpu.processors), (gpu.shared << 10, 0, gpu.cache << 10))
        if kind == "cpu" and (processor := PROCESSORS.get(arch)) and counted:
            l1, l2, l3 = processor.cache
            features = tuple(sorted(processor.features))
            return Target("cpu", processor.arch, arch, features, int(cores or 1), (l1 << 10, l2 << 10, l3 << 10), processor.sve_bits)
        gpus = [f"{g.kind}:{a}" for a, g in ACCELERATORS.items()]
        hint = nearest(arch, tuple(PROCESSORS)) if kind == "cpu" else nearest(name, gpus)
        if kind in ("gpu", "rocm", "nvidia", "amd"):
            hint = f" (a GPU is called {'hip' if kind in ('rocm', 'amd') else 'cuda'})"
        known = ", ".join(f"cpu:{p}" for p in PROCESSORS)
        raise DeviceError(f"unknown target {name!r}{hint}; known are cpu, {known}, {', '.join(gpus)} (each with :CORES)")

    def lacks(self, other: Target) -> str:
        """Why kernels for ``other`` cannot run here, in words; empty if they can."""
        if (self.kind, self.arch) != (other.kind, other.arch):
            return f"it is {other.kind}:{other.arch}, this is {self.kind}:{self.arch}"
        missing = [f for f in other.features if f not in self.features]
        if missing:
            return f"this processor has no {', '.join(missing)}"
        return f"its SVE registers have {other.sve_bits} bits, not {self.sve_bits}" if other.sve_bits not in (0, 128, self.sve_bits) else ""


class Machine(Protocol):
    """A machine that can be asked what it is: this one, or another."""

    @property
    def arch(self) -> str:
        """``x86_64``, ``aarch64``."""

    @property
    def model(self) -> str:
        """What it is called, where Linux does not tell."""

    def read(self, path: str) -> str:
        """The text of a file; empty if it cannot be read."""

    def processors(self) -> Collection[int]:
        """Numbers of the logical processors that may be used."""

    def request_amx(self) -> bool:
        """Ask for the AMX tile registers; whether they may be used."""

    def sve_bits(self) -> int:
        """Width of the SVE registers; 0 if it is not known."""


class _Here:
    """This machine."""

    @property
    def arch(self) -> str:
        return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())

    @property
    def model(self) -> str:
        return platform.processor()  # starts a program

    def read(self, path: str) -> str:
        try:
            return Path(path).read_text()
        except (OSError, ValueError):
            return ""

    def processors(self) -> Collection[int]:
        return usable_processors()

    def request_amx(self) -> bool:
        return request_amx()

    def sve_bits(self) -> int:
        return _sve_bits()


@lru_cache(maxsize=1)
def detect() -> Target:
    """This machine's CPU. What cannot be read takes a modest default."""
    return describe(_Here())


def describe(machine: Machine) -> Target:
    """The CPU of a machine. What cannot be read takes a modest default."""
    model, features, cores = _cpuinfo(machine)
    if "amx_tile" in features and not machine.request_amx():
        features = tuple(f for f in features if not f.startswith("amx_"))
    sve = machine.sve_bits() if "sve" in features else 0
    return Target("cpu", machine.arch, model or machine.model or machine.arch, features, cores, _caches(machine), sve)


@cache
def detect_gpu(index: int = 0) -> Target:
    """A GPU of this machine, by PyTorch's number."""
    return gpu_of(torch.cuda.get_device_properties(index), hip=torch.version.hip is not None)


def gpu_of(properties: Any, hip: bool) -> Target:
    """A target from what PyTorch tells of a GPU. One of an architecture that is not in the table has what its family has."""
    arch = properties.gcnArchName.partition(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    known = ACCELERATORS.get(arch)
    family = "mfma" if hip else {9: "wgmma", 10: "tcgen05"}.get(properties.major, "mma" if properties.major >= 8 else "")
    features = (known.matrix, *known.features) if known else (family,) if family else ()
    shared = known.shared << 10 if known else getattr(properties, "shared_memory_per_block_optin", 48 << 10)
    cache = (shared, 0, properties.L2_cache_size)
    return Target("hip" if hip else "cuda", arch, properties.name, tuple(sorted(features)), properties.multi_processor_count, cache)


AMX_REQUEST = (158, 0x1023, 18)  # the system call arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
SVE_GET_LENGTH, SVE_LENGTH_MASK = 51, 0xFFFF  # of prctl; the length is in bytes


def request_amx() -> bool:
    """Ask Linux for the AMX tile registers of this process, and say whether it may use them.

    They are large, so each process must ask for them once, before the first tile instruction; asking again does no harm.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    try:
        return ctypes.CDLL(None).syscall(*AMX_REQUEST) == 0
    except (OSError, AttributeError):
        return False


def _sve_bits() -> int:
    """Width of this process's SVE registers, 0 if Linux does not tell."""
    try:
        got = ctypes.CDLL(None).prctl(SVE_GET_LENGTH, 0, 0, 0, 0)
    except (OSError, AttributeError):
        return 0
    return 8 * (got & SVE_LENGTH_MASK) if got > 0 else 0


def _cpuinfo(machine: Machine) -> tuple[str, tuple[str, ...], int]:
    usable, text = machine.processors(), machine.read("/proc/cpuinfo")
    model, features, cores = "", set(), set()
    for block in text.split("\n\n"):
        pairs = dict(line.split(":", 1) for line in block.splitlines() if ":" in line)
        entry = {k.strip(): v.strip() for k, v in pairs.items()}
        if "processor" in entry and entry["processor"].isdigit() and int(entry["processor"]) in usable:
            model = entry.get("model name", model)
            features |= set(entry.get("flags", entry.get("Features", "")).lower().split())
            cores.add((entry.get("physical id", "0"), entry.get("core id", entry["processor"])))
    return model, tuple(sorted(features)), len(cores) or len(usable)


def _caches(machine: Machine) -> tuple[int, int, int]:
    sizes = {1: 32 << 10, 2: 512 << 10, 3: 8 << 20}
    for index in range(MOST_CACHES):
        folder = f"/sys/devices/system/cpu/cpu0/cache/index{index}"
        level, kind, size = (machine.read(f"{folder}/{name}").strip() for name in ("level", "type", "size"))
        if kind != "Instruction" and level.isdigit() and int(level) in sizes and size.rstrip("K").isdigit():
            sizes[int(level)] = int(size.rstrip("K")) << 10
    return sizes[1], sizes[2], sizes[3]

"""Processors by name: what a kernel may use on each, so that a Target can be had without the machine.

Feature names are those of Linux's /proc/cpuinfo, as in :class:`graphopt.target.Target`. Caches are those of a common
server or laptop with that core; a detected target has the true ones.
"""

from __future__ import annotations

from dataclasses import dataclass

_V1 = ("sse2",)
_V2 = (*_V1, "pni", "ssse3", "sse4_1", "sse4_2", "popcnt")
_V3 = (*_V2, "avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_ICE_LAKE = (*_V4, "avx512_vnni", "avx512ifma", "avx512vbmi", "avx512_vbmi2")
_ZEN4 = (*_ICE_LAKE, "avx512_bf16")
_SAPPHIRE_RAPIDS = (*_ZEN4, "avx_vnni", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
_ARMV8 = ("fp", "asimd")
_ARMV8_2 = (*_ARMV8, "atomics", "fphp", "asimdhp", "asimddp")
_NEOVERSE_V1 = (*_ARMV8_2, "asimdfhm", "bf16", "i8mm", "sve", "svebf16", "svei8mm")


@dataclass(frozen=True)
class Processor:
    """A kind of core.

    Attributes:
        features: of the instruction set.
        cache: KiB of L1d and L2 (a core) and L3 (shared).
        sve_bits: width of the SVE registers; 0 without SVE.
    """

    arch: str
    features: tuple[str, ...]
    cache: tuple[int, int, int]
    sve_bits: int = 0


PROCESSORS = {
    "x86-64": Processor("x86_64", _V1, (32, 256, 8 << 10)),
    "x86-64-v2": Processor("x86_64", _V2, (32, 256, 8 << 10)),
    "x86-64-v3": Processor("x86_64", _V3, (32, 512, 16 << 10)),
    "x86-64-v4": Processor("x86_64", _V4, (32, 1 << 10, 32 << 10)),
    "icelake-server": Processor("x86_64", _ICE_LAKE, (48, 1280, 48 << 10)),
    "sapphirerapids": Processor("x86_64", _SAPPHIRE_RAPIDS, (48, 2 << 10, 60 << 10)),
    "graniterapids": Processor("x86_64", (*_SAPPHIRE_RAPIDS, "amx_fp16"), (48, 2 << 10, 120 << 10)),
    "znver3": Processor("x86_64", _V3, (32, 512, 32 << 10)),
    "znver4": Processor("x86_64", _ZEN4, (32, 1 << 10, 32 << 10)),
    "znver5": Processor("x86_64", (*_ZEN4, "avx_vnni"), (48, 1 << 10, 32 << 10)),
    "aarch64": Processor("aarch64", _ARMV8, (32, 512, 4 << 10)),
    "neoverse-n1": Processor("aarch64", _ARMV8_2, (64, 1 << 10, 32 << 10)),
    "neoverse-v1": Processor("aarch64", _NEOVERSE_V1, (64, 1 << 10, 32 << 10), 256),
    "neoverse-v2": Processor("aarch64", (*_NEOVERSE_V1, "sve2"), (64, 2 << 10, 36 << 10), 128),
    "a64fx": Processor("aarch64", (*_ARMV8_2, "sve"), (64, 8 << 10, 8 << 10), 512),
    "apple-m1": Processor("aarch64", (*_ARMV8_2, "asimdfhm"), (128, 12 << 10, 8 << 10)),
}

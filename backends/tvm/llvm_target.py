"""The LLVM description of a Target: triple, and the features that kernels may use."""

from __future__ import annotations

from typing import Any

from graphopt.target import Target

# /proc/cpuinfo name -> LLVM name, for what the compiler can use
_X86 = {
    "sse2": "sse2", "sse3": "sse3", "pni": "sse3", "ssse3": "ssse3", "sse4_1": "sse4.1", "sse4_2": "sse4.2",
    "popcnt": "popcnt", "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "bmi1": "bmi",
    "bmi2": "bmi2", "abm": "lzcnt", "movbe": "movbe",
    "avx512f": "avx512f", "avx512cd": "avx512cd", "avx512bw": "avx512bw", "avx512dq": "avx512dq", "avx512vl": "avx512vl",
    "avx512_vnni": "avx512vnni", "avx512_bf16": "avx512bf16", "avx512_fp16": "avx512fp16", "avx512vbmi": "avx512vbmi",
    "avx512_vbmi2": "avx512vbmi2", "avx512ifma": "avx512ifma", "avx_vnni": "avxvnni",
    "amx_tile": "amx-tile", "amx_bf16": "amx-bf16", "amx_int8": "amx-int8", "amx_fp16": "amx-fp16",
}  # fmt: skip
_ARM = {
    "fp": "fp-armv8", "asimd": "neon", "asimdhp": "fullfp16", "asimdfhm": "fp16fml", "asimddp": "dotprod", "atomics": "lse",
    "sve": "sve", "sve2": "sve2", "bf16": "bf16", "i8mm": "i8mm",
}  # fmt: skip
_TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}


def llvm_features(target: Target) -> tuple[str, ...]:
    """LLVM feature names, sorted."""
    table = _X86 if target.arch == "x86_64" else _ARM if target.arch == "aarch64" else {}
    found = {table[f] for f in target.features if f in table}
    if "avx512f" in found:
        found.add("evex512")
    return tuple(sorted(found))


def target_description(target: Target) -> dict[str, Any]:
    """What tvm.target.Target takes. The processor is generic; the features say what may be used."""
    mcpu = {"x86_64": "x86-64-v4" if target.has("avx512vl") else "x86-64-v3" if target.has("avx2") else "x86-64", "aarch64": "generic"}
    description: dict[str, Any] = {"kind": "llvm", "mcpu": mcpu.get(target.arch, "generic")}
    if target.arch in _TRIPLES:
        description["mtriple"] = _TRIPLES[target.arch]
    features = llvm_features(target)
    if features:
        description["mattr"] = [f"+{f}" for f in features]
    if target.sve_bits > 128:  # else vectors of a fixed number of elements are cut into those of NEON
        description["cl-opt"] = [f"-aarch64-sve-vector-bits-{end}:uint={target.sve_bits}" for end in ("min", "max")]
    return description

"""``graphopt doctor``: what is installed, what was found on this machine, what is missing and how to get it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from graphopt.errors import counted
from graphopt.hidden import hidden
from graphopt.options import Options
from graphopt.target import Target, detect


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        status: ``ok``; ``warn``: works, but less well; ``missing``: something does not work.
        hint: what to do about it.
    """

    item: str
    status: Literal["ok", "warn", "missing"]
    found: str
    hint: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at this machine: versions, devices, tools, the kernel cache; what is missing, and how to get it.

    \b
    graphopt doctor          a table; the exit status is 1 if something needed is missing
    graphopt doctor --json   the same, for programs
    """
    found = list(examine())
    if as_json:
        typer.echo(json.dumps([asdict(f) for f in found], indent=2))
    else:
        for f in found:
            typer.echo(f"{f.status:8} {f.item:18} {f.found}")
            if f.hint:
                typer.echo(f"{'':27} -> {f.hint}")
    if any(f.status == "missing" for f in found):
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """All findings, the most basic first."""
    old = sys.version_info < (3, 10)
    yield Finding("python", "missing" if old else "ok", platform.python_version(), "Python 3.10 or newer is needed" if old else "")
    yield from _packages()
    yield from _devices()
    yield from _tools()
    yield _threads()
    yield _cache(Options().kernels_dir)


# --- packages ----------------------------------------------------------------------------------------------------------

_LOADED = {"apache-tvm": "tvm", "triton": "triton"}  # packages whose native library may fail to load
_OPTIONAL = {
    "triton": "Triton kernels for GPUs", "transformers": "the demo and the benchmarks", "hypothesis": "graphopt.testing.graphs",
    "onnxruntime": "graphopt bench", "openvino": "graphopt bench", "matplotlib": "graphopt bench --plot",
}  # fmt: skip


def _packages() -> Iterator[Finding]:
    pins = {name: spec for name, spec in _requirements() if name in ("torch", "apache-tvm", "apache-tvm-ffi", *_OPTIONAL)}
    for name in ("torch", "apache-tvm", "apache-tvm-ffi", *_OPTIONAL):
        wanted = f"{name}{pins.get(name, '')}"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            optional = name in _OPTIONAL
            what = f"for {_OPTIONAL[name]}: " if optional else ""
            yield Finding(name, "warn" if optional else "missing", "not installed", f"{what}pip install '{wanted}'")
            continue
        exact = re.fullmatch(r"==([\w.]+)", pins.get(name, ""))
        if exact and exact[1] != version:
            yield Finding(name, "missing", version, f"graphopt is made for {exact[1]}: pip install '{wanted}'")
        elif name in _LOADED and (trouble := _load_trouble(_LOADED[name])):
            status: Literal["warn", "missing"] = "warn" if name in _OPTIONAL else "missing"
            yield Finding(name, status, f"{version}, does not load", f"{trouble}; pip install --force-reinstall '{wanted}'")
        else:
            yield Finding(name, "ok", version)


def _requirements() -> Iterator[tuple[str, str]]:
    """(name, version specifier) of what graphopt needs in a certain version, extras included."""
    try:
        required = metadata.requires("graphopt") or []
    except metadata.PackageNotFoundError:
        required = []
    for line in required:
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;\s]*)", line)
        if match and match[2]:
            yield match[1], match[2]


def _load_trouble(module: str) -> str:
    """The last line of what importing a module in a process of its own complains about, or an empty string."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return "" if done.returncode == 0 else (lines[-1] if lines else f"import {module} ended with status {done.returncode}")


# --- the machine -------------------------------------------------------------------------------------------------------


_FEATURES = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8",
    "avx512_fp16", "amx_fp16", "asimd", "asimdhp", "asimddp", "sve", "sve2", "bf16", "i8mm",
)  # fmt: skip


def _devices() -> Iterator[Finding]:
    target = detect()
    yield Finding("cpu", "ok", f"{target.model or target.arch}, {target.cores} cores, {target.vector_bits}-bit vectors")
    features = [f for f in _FEATURES if target.has(f)]
    yield Finding("cpu features", "ok" if features else "warn", ", ".join(features) or "none known",
                  "" if features else "kernels will use the narrowest vectors")  # fmt: skip
    yield Finding("cpu kernels", "ok", ", ".join(_kernels(target)))
    if "amx_tile" in _flags() and not target.has("amx_tile"):
        yield Finding("cpu tiles", "warn", "AMX is there, but not permitted", "bf16 products use vectors: Linux 5.16 or newer grants tiles")
    if unannounced := hidden(target):
        hint = f"target=\"cpu:graniterapids:{target.cores}\" uses it; a virtual machine may be moved to where it is missing"
        yield Finding("cpu hides", "ok", f"{', '.join(unannounced)}: carried out here, but not announced", hint)
    yield Finding("cpu caches", "ok", ", ".join(f"{n} {size >> 10} KiB" for n, size in zip(("L1d", "L2", "L3"), target.cache, strict=True)))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            yield Finding(f"gpu {i}", "ok", f"{p.name}, {p.total_memory >> 30} GiB")
    else:
        build = "this torch is built without CUDA or ROCm" if not (torch.version.cuda or torch.version.hip) else "torch sees none"
        yield Finding("gpu", "ok", f"none ({build})")


def _kernels(target: Target) -> Iterator[str]:
    """What kernels are made of on a target."""
    rows, vectors = target.tile
    names = {128: "SSE", 256: "AVX2", 512: "AVX-512"}
    name = names[target.vector_bits] if target.arch == "x86_64" else "SVE" if target.sve_bits > 128 else "NEON"
    yield f"{name}, register tile {rows} x {vectors * target.lanes(4)} of f32"
    engine = target.bf16_products
    yield {"amx": "bf16 products by AMX tiles", "dot": "bf16 products by dot instructions", "": "bf16 products in f32"}[engine]


def _flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}


def _tools() -> Iterator[Finding]:
    linkers = [name for name in ("ld", "cc", "gcc", "clang") if shutil.which(name)]
    yield Finding(
        "linker", "ok" if linkers else "warn", ", ".join(linkers) or "none",
        "" if linkers else "kernels are kept as object files, which load more slowly: install binutils or gcc",
    )  # fmt: skip
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    yield Finding("c++ compiler", "ok", compiler or "none (not needed by graphopt; torch's own inductor wants one)")


def _threads() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    limit = os.environ.get("OMP_NUM_THREADS")
    text = f"{threads} torch threads, {usable} processors usable, {detect().cores} cores" + (f", OMP_NUM_THREADS={limit}" if limit else "")
    if threads > usable:
        return Finding("threads", "warn", text, f"more threads than processors: torch.set_num_threads({detect().cores})")
    return Finding("threads", "ok", text)


def _cache(folder: Path) -> Finding:
    if not folder.exists():
        parent = next((p for p in folder.parents if p.exists()), None)
        writable = parent is not None and os.access(parent, os.W_OK)
        hint = "" if writable else "cannot be made: set cache_dir"
        return Finding("kernel cache", "ok" if writable else "warn", f"{folder} (empty)", hint)
    sizes = list(_sizes(folder))
    writable = os.access(folder, os.W_OK)
    text = f"{folder}: {counted(len(sizes), 'file')}, {sum(sizes) / (1 << 20):.1f} MiB"
    return Finding("kernel cache", "ok" if writable else "warn", text, "" if writable else "cannot be written: set cache_dir")


def _sizes(folder: Path) -> Iterator[int]:
    """Bytes of each file below a folder. Other programs may remove some meanwhile: those do not count."""
    for top, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                yield os.path.getsize(os.path.join(top, name))

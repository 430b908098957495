"""Kernels for a GPU that is not there: compiled to its machine code, which is then read.

Triton compiles for any of its targets on any machine. What the assembler allotted (registers, spills, shared memory) and which
instructions it chose tell much of a kernel before it runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphopt.backends.base import KernelSource
from graphopt.backends.triton.build import load_module, write_source
from graphopt.backends.triton.code import Payload
from graphopt.errors import BuildError
from graphopt.target import Target

MATRIX_INSTRUCTIONS = {"mma": r"mma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mfma": r"v_mfma"}


@dataclass(frozen=True)
class Compiled:
    """Machine code, and what it takes of a processor.

    Attributes:
        assembly: PTX or AMD GCN.
        registers: of a thread.
        spills: bytes of a thread's values that did not fit into registers.
        shared: bytes of shared memory of a block.
    """

    assembly: str
    registers: int
    spills: int
    shared: int

    def uses(self, matrix_unit: str) -> bool:
        """Whether tiles are multiplied by these instructions (``Target.matrix_unit``)."""
        return re.search(MATRIX_INSTRUCTIONS[matrix_unit], self.assembly) is not None


def compile_offline(source: KernelSource, t: Target) -> Compiled:
    """Compile a source for a target. Of several kernels: all their code, the most of what each has to itself, and all that they spill.

    Raises:
        BuildError: Triton or its assembler refuses it.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        built = _built(write_source(source, Path(folder)), source.payload, t)
        found = [_read_hip(b) if t.kind == "hip" else _read_cuda(b, Path(folder)) for b in built]
    code, registers, spills, shared = zip(*((c.assembly, c.registers, c.spills, c.shared) for c in found), strict=True)
    return Compiled("\n".join(code), max(registers), sum(spills), max(shared))


def compile_for_launch(path: Path, kernels: Sequence[Payload], t: Target) -> int:
    """Compile a source that was written to a file: Triton keeps the machine code, and finds it when such a kernel is launched.

    Returns:
        Bytes of shared memory of a block, the most of any kernel.

    Raises:
        BuildError: as :func:`compile_offline`.
    """
    return max(b.metadata.shared for b in _built(path, kernels, t))


def _built(path: Path, kernels: Sequence[Payload], t: Target) -> list[Any]:
    """What Triton compiled, kernel by kernel."""
    module = load_module(path)
    return [_compiled(module.__dict__[kernel.name], kernel, t) for kernel in kernels]


def _compiled(function: Any, kernel: Payload, t: Target) -> Any:
    # what a launch tells of each argument, so that it finds this machine code: memory is aligned, and for AMD within 2 GB
    told = [["tt.divisibility", 16], *([["tt.pointer_range", 32]] if t.kind == "hip" else [])]
    kinds = [(k, kind) for k, kind in enumerate(kernel.signature.values()) if not kind.startswith("tensordesc")]
    attributes = {(k,): told if kind.startswith("*") else [] for k, kind in kinds}
    ast = ASTSource(function, dict(kernel.signature), dict(kernel.launch.blocks), attributes)
    options = {"num_warps": kernel.launch.warps, "num_stages": kernel.launch.stages, "enable_fp_fusion": True}
    try:
        return triton.compile(ast, target=_gpu(t), options=options)
    except Exception as error:  # Triton's own errors are of many kinds
        raise BuildError(f"{kernel.name} for {t}: {type(error).__name__}: {error}") from error


def _gpu(t: Target) -> GPUTarget:
    return GPUTarget("hip", t.arch, t.warp) if t.kind == "hip" else GPUTarget("cuda", int(t.arch.removeprefix("sm_")), t.warp)


def _read_cuda(built: Any, folder: Path) -> Compiled:
    binary = folder / "kernel.cubin"
    binary.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    usage = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return Compiled(built.asm["ptx"], usage["REG"], usage["STACK"] + usage["LOCAL"], built.metadata.shared)


def _read_hip(built: Any) -> Compiled:
    text = built.asm["amdgcn"]

    def number(field: str) -> int:
        found = re.search(rf"\.{field}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    # scalars that do not fit go to lanes of vector registers; what goes to memory is in the private segment
    return Compiled(text, number("vgpr_count"), number("private_segment_fixed_size"), built.metadata.shared)

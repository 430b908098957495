"""Running kernels of another architecture: compiled here, linked by a cross compiler with a small driver, run by qemu."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir.graph import Graph
from graphopt.ir.interpreter import evaluate
from graphopt.target import Target

TOOLS = ("aarch64-linux-gnu-gcc", "qemu-aarch64")
DRIVER = Path(__file__).parent / "driver.c"


def missing_tools() -> str:
    """What must be installed before this works, in words; empty if nothing."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"no {' and no '.join(missing)}: apt-get install qemu-user gcc-aarch64-linux-gnu" if missing else ""


def processor(t: Target) -> str:
    """What qemu must be."""
    return f"max,sve{t.sve_bits}=on,sve-max-vq={t.sve_bits // 128}" if t.sve_bits else "max,sve=off"


class EmulatedKernel:
    """A region's kernel for a target, as a function from inputs to outputs."""

    def __init__(self, graph: Graph, kind: str, t: Target, folder: Path, schedule: Schedule | None = None) -> None:
        from graphopt.backends.tvm.lowering import compile_functions

        self.graph, self.target, self.folder = graph, t, folder
        w = Workload.of(graph, kind)
        template = TvmBackend().templates(w, t)[0]
        source = template.emit(w, schedule or template.space(w, t).default(), t)
        objects, self.program = folder / f"{source.name}.o", folder / source.name
        compile_functions({source.name: source.payload}, t).write_to_file(str(objects))
        compiler = [TOOLS[0], "-O1", "-static", f"-DKERNEL=__tvm_ffi_{source.name}", "-o", str(self.program)]
        done = subprocess.run([*compiler, str(DRIVER), str(objects), "-lm"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{graph}\n{done.stderr}"

    def __call__(self, inputs: Sequence[torch.Tensor], bindings: dict[str, int] | None = None) -> list[torch.Tensor]:
        like = evaluate(self.graph, inputs, bindings=bindings)
        sizes = [v for _, v in sorted((bindings or {}).items())]
        parts = [struct.pack("<3q", len(inputs) + len(like), len(like), len(sizes))]
        for x in [*inputs, *like]:
            data = _bytes(torch.zeros_like(x) if any(x is y for y in like) else x)
            parts += [struct.pack("<q", len(data)), data]
        arguments, results = self.program.with_suffix(".in"), self.program.with_suffix(".out")
        arguments.write_bytes(b"".join([*parts, struct.pack(f"<{len(sizes)}q", *sizes)]))
        command = [TOOLS[1], "-cpu", processor(self.target), str(self.program), str(arguments), str(results)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, f"{self.graph}\nstatus {done.returncode}: {done.stderr}"
        data, out, at = results.read_bytes(), [], 0
        for x in like:
            size = x.numel() * x.element_size()
            out.append(torch.frombuffer(bytearray(data[at : at + size]), dtype=x.dtype).view(x.shape))
            at += size
        return out


def _bytes(x: torch.Tensor) -> bytes:
    raw: Any = x.contiguous().view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8)
    return bytes(raw.numpy().tobytes())

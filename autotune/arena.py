"""Memory that the tuner shares with the process that runs candidates: inputs, and outputs between guards.

The tuner writes inputs and poisons outputs; the runner maps the inputs read-only, so that a kernel that writes them dies, and the
outputs writable. What lies around an output is filled with a pattern, and looked at afterwards. The memory has no name in any
file system: it goes with the last process that holds it, however that ends.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.autotune.measure import Case, Output

ALIGNMENT = 4096  # pages: inputs and outputs are mapped differently
GUARD = 4096  # bytes on each side of an output
PATTERN = 0x5A
POISON_FLOAT, POISON_OTHER = 0xFF, 0xA5  # all ones is not-a-number in every floating-point type


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the shared memory: bytes from its start."""

    offset: int
    output: Output

    @property
    def length(self) -> int:
        """Bytes from the first element to the end of the last."""
        if 0 in self.output.shape:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.output.shape, self.output.strides, strict=True))
        return (last + 1) * self.output.dtype.itemsize

    def tensor(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor, in a memory of bytes."""
        flat = memory[self.offset : self.offset + self.length].view(self.output.dtype)
        return flat.as_strided(self.output.shape, self.output.strides)

    def to_json(self) -> dict[str, Any]:
        o = self.output
        return {"offset": self.offset, "shape": o.shape, "strides": o.strides, "dtype": str(o.dtype).removeprefix("torch.")}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Place:
        return Place(data["offset"], Output(tuple(data["shape"]), tuple(data["strides"]), getattr(torch, data["dtype"])))


class Arena:
    """The tuner's end: one case in shared memory."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.inputs, end = _places([Output(tuple(x.shape), x.stride(), x.dtype) for x in case.inputs], 0, 0)
        self.writable = end  # what comes before is mapped read-only by the runner
        self.outputs, self.size = _places(case.outputs, end, GUARD)
        self.file = os.memfd_create("graphopt-tune")
        os.ftruncate(self.file, self.size)
        self._map = mmap.mmap(self.file, self.size)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        for place, x in zip(self.inputs, case.inputs, strict=True):
            place.tensor(self._memory).copy_(x)

    @property
    def description(self) -> dict[str, Any]:
        """What the runner must know."""
        return {
            "file": f"/proc/{os.getpid()}/fd/{self.file}", "size": self.size, "writable": self.writable,
            "inputs": [p.to_json() for p in self.inputs], "outputs": [p.to_json() for p in self.outputs],
            "sizes": list(self.case.sizes), "in_place": self.case.in_place,
        }  # fmt: skip

    def poison(self) -> None:
        """Fill the guards with their pattern, and the outputs with what no kernel should leave there."""
        self._memory[self.writable :] = PATTERN
        for p in self.outputs:
            floats = p.output.dtype.is_floating_point or p.output.dtype.is_complex
            self._memory[p.offset : p.offset + p.length] = POISON_FLOAT if floats else POISON_OTHER

    def results(self) -> list[torch.Tensor]:
        """The outputs, where they lie."""
        return [p.tensor(self._memory) for p in self.outputs]

    def damage(self) -> str:
        """Which guard was written to, in words; empty if none was."""
        at = self.writable
        for i, p in enumerate([*self.outputs, None]):
            end = p.offset if p else self.size
            touched = (self._memory[at:end] != PATTERN).nonzero()
            if touched.numel():
                where = f"before output {i}" if p else f"behind output {len(self.outputs) - 1}"
                return f"it wrote to memory {where}, {counted_bytes(end - at - int(touched[-1]) if p else int(touched[0]))} away"
            at = p.offset + p.length if p else end
        return ""

    def close(self) -> None:
        del self._memory
        with contextlib.suppress(BufferError):  # a tensor still looks at it; it goes with that
            self._map.close()
        os.close(self.file)


def counted_bytes(n: int) -> str:
    return f"{n} byte" if n == 1 else f"{n} bytes"


def _places(tensors: Sequence[Output], start: int, guard: int) -> tuple[list[Place], int]:
    """A place for each, and where the last ends; all on pages of their own."""
    out, at = [], start
    for t in tensors:
        place = Place(_aligned(at + guard), t)
        out.append(place)
        at = place.offset + place.length
    return out, max(_aligned(at + guard), ALIGNMENT)


def _aligned(n: int) -> int:
    return math.ceil(n / ALIGNMENT) * ALIGNMENT


def map_memory(description: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The runner's end: all of the memory, as bytes; read-only, and writable."""
    file = os.open(description["file"], os.O_RDWR)
    try:
        readable = mmap.mmap(file, description["size"], prot=mmap.PROT_READ)
        writable = mmap.mmap(file, description["size"], prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a tensor over read-only memory must not be written
        inputs = torch.frombuffer(readable, dtype=torch.uint8)
    return inputs, torch.frombuffer(writable, dtype=torch.uint8)


def map_shared(description: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same: the inputs, read-only, and the outputs."""
    inputs, outputs = map_memory(description)
    return (
        [Place.from_json(p).tensor(inputs) for p in description["inputs"]],
        [Place.from_json(p).tensor(outputs) for p in description["outputs"]],
    )

"""GPUs by architecture: what templates must know of each, so that a Target can be had without the device.

An architecture stands for its common data-centre part; a detected target has the true numbers of processors and bytes. Rates are those of
the vendors' data sheets, for choices between kernels; none was measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """A kind of GPU.

    Attributes:
        kind: ``cuda`` or ``hip``.
        model: the part that the numbers are of.
        matrix: the instructions that multiply tiles: ``mma`` (of a warp), ``wgmma`` (of four), ``tcgen05`` (of a processor, into its own
            memory) or ``mfma``.
        processors: streaming multiprocessors or compute units.
        shared: KiB of shared memory that one block may have.
        cache: KiB of L2 that all processors share.
        clock: GHz.
        memory: GB/s.
        products: multiply-adds of f16 that the matrix instructions of one processor do a cycle.
        features: further abilities: ``tma`` (copies of tiles by descriptor), ``fp8`` (products of 8-bit floats).
    """

    kind: str
    model: str
    matrix: str
    processors: int
    shared: int
    cache: int
    clock: float
    memory: int
    products: int
    features: tuple[str, ...] = ()


ACCELERATORS = {
    "sm_80": Accelerator("cuda", "A100", "mma", 108, 163, 40 << 10, 1.41, 2039, 1024),
    "sm_89": Accelerator("cuda", "L40S", "mma", 142, 99, 96 << 10, 2.52, 864, 512, ("fp8",)),
    "sm_90": Accelerator("cuda", "H100", "wgmma", 132, 227, 50 << 10, 1.83, 3350, 2048, ("fp8", "tma")),
    "sm_100": Accelerator("cuda", "B200", "tcgen05", 148, 227, 126 << 10, 1.85, 8000, 4096, ("fp8", "tma")),
    "gfx942": Accelerator("hip", "MI300X", "mfma", 304, 64, 4 << 10, 2.1, 5300, 1024, ("fp8",)),
    "gfx950": Accelerator("hip", "MI355X", "mfma", 256, 160, 4 << 10, 2.4, 8000, 2048, ("fp8",)),
}


def accelerator_of(arch: str, matrix: str) -> Accelerator:
    """What an architecture is taken to have; one that is not in the table, what the first with its matrix instructions has."""
    return ACCELERATORS.get(arch) or next(a for a in ACCELERATORS.values() if a.matrix == matrix)

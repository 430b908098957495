"""GPUs by architecture: what templates must know of each, so that a Target can be had without the device.

An architecture stands for its common data-centre part; a detected target has the true numbers of processors and bytes.
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
        features: further abilities: ``tma`` (copies of tiles by descriptor), ``fp8`` (products of 8-bit floats).
    """

    kind: str
    model: str
    matrix: str
    processors: int
    shared: int
    cache: int
    features: tuple[str, ...] = ()


ACCELERATORS = {
    "sm_80": Accelerator("cuda", "A100", "mma", 108, 163, 40 << 10),
    "sm_89": Accelerator("cuda", "L40S", "mma", 142, 99, 96 << 10, ("fp8",)),
    "sm_90": Accelerator("cuda", "H100", "wgmma", 132, 227, 50 << 10, ("fp8", "tma")),
    "sm_100": Accelerator("cuda", "B200", "tcgen05", 148, 227, 126 << 10, ("fp8", "tma")),
    "gfx942": Accelerator("hip", "MI300X", "mfma", 304, 64, 4 << 10, ("fp8",)),
    "gfx950": Accelerator("hip", "MI355X", "mfma", 256, 160, 4 << 10, ("fp8",)),
}

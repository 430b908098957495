"""Numbers to cast to floats of 8 bits, and what PyTorch makes of them."""

from __future__ import annotations

import torch

from graphopt.ir import types
from graphopt.ir.graph import Graph
from graphopt.ir.text import parse_graph

F8 = (types.f8e4m3, types.f8e5m2)
SOURCES = {
    "f16": torch.arange(1 << 16).to(torch.int16).view(torch.float16),  # all of them, infinities and nans included
    "bf16": torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16),
    "f32": ((torch.arange(1 << 16)[:, None] << 16) + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten().to(torch.int32)
    .view(torch.float32),  # all first halves, and what lies near and halfway to the next
    "f64": torch.cat([torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10.0**k for k in range(-9, 9)]),
    "i64": torch.arange(-70000, 70000, 3),
    "i8": torch.arange(-128, 128).to(torch.int8),
    "u8": torch.arange(256).to(torch.uint8),
    "b1": torch.tensor([False, True] * 8),
    "f8e4m3": torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn),
    "f8e5m2": torch.arange(256).to(torch.uint8).view(torch.float8_e5m2),
}  # fmt: skip


def cast(source: str, to: types.DType) -> Graph:
    """A cast to a float of 8 bits, and back to f32."""
    n = len(SOURCES[source])
    return parse_graph(f"graph @g(%x: {source}[{n}]) -> ({to}[{n}], f32[{n}]) {{\n %0: {to}[{n}] = cast(%x) {{dtype = {to}}}\n"
                       f" %1: f32[{n}] = cast(%0) {{dtype = f32}}\n return %0, %1\n}}")  # fmt: skip


def assert_as_eager(source: str, to: types.DType, found: list[torch.Tensor]) -> None:
    """Bit for bit; a nan is a nan, of any sign."""
    bits, back = found
    want = SOURCES[source].to(to.torch)
    nan = want.float().isnan()
    assert torch.equal(bits.float().isnan(), nan) and torch.equal(bits.view(torch.uint8)[~nan], want.view(torch.uint8)[~nan])
    torch.testing.assert_close(back, want.float(), rtol=0, atol=0, equal_nan=True)

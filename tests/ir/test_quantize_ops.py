"""Quantization ops: round trips, packing as a bijection, ranges."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import TypeInferenceError
from graphopt.ir import Builder, Graph, TensorType, evaluate, types


def run(name: str, xs: list[torch.Tensor], **attrs: object) -> torch.Tensor:
    g = Graph("g")
    values = [g.add_input(TensorType(types.DType.of(x.dtype), tuple(x.shape))) for x in xs]
    g.set_outputs([Builder(g).create(name, values, attrs)])
    return evaluate(g, xs)[0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("word", [types.i32, types.u8, types.i8])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_packing_is_a_bijection(bits: int, word: types.DType, axis: int) -> None:
    shape = [3, 5, 7]
    shape[axis] = 2 * word.bits // bits
    for dtype in (types.i8, types.u8):
        low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if dtype.kind == "i" else (0, 1 << bits)
        x = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(bits)).to(dtype.torch)
        packed = run("pack_bits", [x], bits=bits, axis=axis, dtype=word)
        assert packed.dtype == word.torch and packed.numel() * word.bits == x.numel() * bits
        assert torch.equal(run("unpack_bits", [packed], bits=bits, axis=axis, dtype=dtype), x)


def test_every_word_is_a_packing() -> None:
    words = torch.arange(256, dtype=torch.uint8)
    for bits in (1, 2, 4):
        x = run("unpack_bits", [words], bits=bits, axis=0, dtype=types.u8)
        assert torch.equal(run("pack_bits", [x], bits=bits, axis=0, dtype=types.u8), words)


@pytest.mark.parametrize(("bits", "dtype"), [(8, types.i8), (4, types.i8), (4, types.u8), (2, types.u8)])
def test_round_trip(bits: int, dtype: types.DType) -> None:
    """Integers survive; a float moves by half a step at most; what is out of range goes to its end."""
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if dtype.kind == "i" else (0, (1 << bits) - 1)
    q = torch.arange(low, high + 1).to(dtype.torch)
    scale, zero = torch.tensor(0.25), torch.tensor(1, dtype=dtype.torch)
    x = run("dequantize", [q, scale, zero])
    assert torch.equal(x, (q.float() - 1) * 0.25)
    assert torch.equal(run("quantize", [x, scale, zero], dtype=dtype, bits=bits), q)
    moved = run("dequantize", [run("quantize", [x + 0.1, scale, zero], dtype=dtype, bits=bits), scale, zero])
    assert float((moved - x).abs().max()) == 0.0
    far = run("quantize", [torch.tensor([-1e9, 1e9]), scale], dtype=dtype, bits=bits)
    assert far.tolist() == [low, high]


def test_what_is_refused() -> None:
    x, s = torch.randn(3, 4), torch.tensor(1.0)
    for name, xs, attrs in (
        ("quantize", [x, s.double()], {}), ("quantize", [x, s], {"bits": 9}), ("quantize", [x, s], {"dtype": types.i32}),
        ("dequantize", [x.double(), s], {}), ("pack_bits", [x.to(torch.int8)], {"bits": 4, "axis": 0}),
        ("unpack_bits", [x.to(torch.int16)], {"bits": 4}), ("quantize", [x, s, x.to(torch.int8)], {"dtype": types.f8e4m3}),
        ("quantize", [x, s], {"dtype": types.f8e5m2, "bits": 4}), ("dequantize", [x.to(torch.float8_e4m3fn), s, x.to(torch.int8)], {}),
    ):  # fmt: skip
        with pytest.raises(TypeInferenceError, match=name):
            run(name, xs, **attrs)

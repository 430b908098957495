"""f32 functions computed in vectors: right to the last place, at the ends of their ranges too, and no call of the C library."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from assembly import assembly

from graphopt.autotune.space import Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir.graph import Graph
from graphopt.ir.text import parse_graph
from graphopt.target import Target

ONE = ("log", "log2", "log10", "log1p", "softplus", "mish", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh",
       "acosh", "atanh", "erfc")  # fmt: skip
TWO = ("pow", "atan2", "fmod", "remainder", "floor_div")
SOME = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5, 7.0, torch.inf, 1e-45, 1e-38, 3e38, 2.0**24, 2.0**24 - 1, 1 - 2.0**-24, 1 + 2.0**-23])
SOME = torch.cat([SOME, -SOME, torch.tensor([torch.nan])])


def one_op(name: str, n: int) -> Graph:
    inputs = "%x, %y" if name in TWO else "%x"
    shape = f"f32[{n}]"
    typed = ", ".join(f"{i}: {shape}" for i in inputs.split(", "))
    return parse_graph(f"graph @g({typed}) -> {shape} {{\n %0: {shape} = {name}({inputs})\n return %0\n}}")


def any_numbers(n: int) -> torch.Tensor:
    """Of all sizes and both signs."""
    bits = torch.randint(0, 0x7F800000, (n,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return bits.view(torch.float32) * torch.tensor([1.0, -1.0]).repeat(n // 2)


@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_functions_are_computed_in_vectors(name: str) -> None:
    """Device-free: none is called from the C library, an element at a time."""
    w, target = Workload.of(one_op(name, 640), "pointwise"), Target.from_name("cpu:graniterapids:2")
    template = TvmBackend().templates(w, target)[0]
    text = template.emit(w, template.space(w, target).default(), target).text
    assert "T.vectorized(T.int64(16))" in text and "extern" not in text


def test_numbers_in_f64_stay_in_vectors() -> None:
    """AVX2 has no vectors of casts from or to 64-bit integers: none are made, an element at a time."""
    for name in ("pow", "asinh", "sinh", "erfc", "fmod"):
        code = assembly(Workload.of(one_op(name, 640), "pointwise"), Target.from_name("cpu:x86-64-v3:2"))
        assert not re.search("vcvtsi2sd|vcvttsd2si", code), name


def test_angles_of_any_size(compile_all) -> None:
    """Those next to multiples of a quarter turn, and those that are a multiple of a turn apart, are right to the last place."""
    quarters = (torch.arange(1, 2000).double() * (torch.pi / 2)).float()
    x = torch.cat([any_numbers(20000), -quarters, quarters, quarters * 2.0**60, torch.tensor([16367173 * 2.0**72, -0.0])])
    names = ("sin", "cos", "tan")
    for name, run in zip(names, compile_all([(one_op(n, len(x)), "pointwise") for n in names]), strict=True):
        (got,), true = run([x], None), getattr(torch, name)(x.double())
        assert bool(((got.double() - true).abs() <= torch.finfo(torch.float32).eps * true.abs()).all()), name
        assert torch.equal(got.signbit(), true.signbit()), name


def test_powers_as_in_c(compile_all) -> None:
    """Every pair of special values, and results of all sizes to the last place."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([SOME.repeat_interleave(len(SOME)), torch.randn(5000, generator=generator).mul(20).exp(), torch.full((99,), -1.7)])
    y = torch.cat([SOME.repeat(len(SOME)), torch.randn(5000, generator=generator) * 2, torch.arange(-49.0, 50.0)])
    (run,) = compile_all([(one_op("pow", len(x)), "pointwise")])
    (got,), true = run([x, y], None), x.double() ** y.double()
    torch.testing.assert_close(got, true.float(), rtol=2.0**-23, atol=2.0**-149, equal_nan=True)
    known = ~true.isnan()
    assert torch.equal(got[known].signbit(), true[known].signbit())


def test_arcs_and_hyperbolics_to_the_last_place(compile_all) -> None:
    """All sizes, the ends of the ranges, both sides of where formulas change, and the signs of zeros."""
    ends = torch.tensor([0.5, 1.0, 2.0**-12, 10.06, 88.722, 89.41, 9.19, 1.4142135])
    near = torch.cat([torch.nextafter(ends, torch.zeros(())), ends, torch.nextafter(ends, torch.full((), 9e9))])
    ranges = [torch.linspace(*r, 20001) for r in ((-1, 1), (-12, 12), (1, 2))]
    x = torch.cat([SOME, near, -near, any_numbers(10000), *ranges])
    names = ("asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erfc")
    for name, run in zip(names, compile_all([(one_op(n, len(x)), "pointwise") for n in names]), strict=True):
        (got,), true = run([x], None), getattr(torch.special if name == "erfc" else torch, name)(x.double())
        assert_last_place(got, true, name)


def test_angles_of_points(compile_all) -> None:
    """Every pair of special values, and points of all distances and directions."""
    x = torch.cat([SOME.repeat_interleave(len(SOME)), any_numbers(10000), torch.linspace(-3, 3, 10000)])
    y = torch.cat([SOME.repeat(len(SOME)), any_numbers(10000).flip(0), torch.linspace(2, -1, 10000)])
    (run,) = compile_all([(one_op("atan2", len(x)), "pointwise")])
    assert_last_place(run([y, x], None)[0], torch.atan2(y.double(), x.double()), "atan2")


def assert_last_place(got: torch.Tensor, true: torch.Tensor, name: str) -> None:
    """No more than 0.55 units of the last place off, denormal numbers too; and nan, infinities and signs as they are."""
    rounded = true.float()
    same = (got == rounded) | (got.isnan() & rounded.isnan())
    unit = torch.from_numpy(np.spacing(rounded.abs().nan_to_num(1.0, posinf=1.0).numpy())).double()
    near = got.isfinite() & rounded.isfinite() & ((got.double() - true).abs() <= 0.55 * unit)
    assert bool((same | near).all()), (name, got[~(same | near)][:5], true[~(same | near)][:5])
    known = ~true.isnan()
    assert torch.equal(got[known].signbit(), rounded[known].signbit()), name


def test_rests_are_exact(compile_all) -> None:
    """Bit for bit as C's: every pair of special values, quotients of all sizes, and next to whole ones."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(9000, generator=generator)
    whole = y * torch.randint(1, 2**24, (9000,), generator=generator)
    x = torch.cat([SOME.repeat_interleave(len(SOME)), any_numbers(10000), whole, torch.nextafter(whole, torch.zeros(())), whole * 2.0**90])
    y = torch.cat([SOME.repeat(len(SOME)), any_numbers(10000).flip(0), y, y, y])
    runs = dict(zip(TWO[2:], compile_all([(one_op(n, len(x)), "pointwise") for n in TWO[2:]]), strict=True))
    with np.errstate(invalid="ignore"):
        rest = torch.from_numpy(np.fmod(x.numpy(), y.numpy()))
    assert_bits(runs["fmod"]([x, y], None)[0], rest)
    other_side = (rest != 0) & ((rest < 0) != (y < 0))
    assert_bits(runs["remainder"]([x, y], None)[0], torch.where(other_side, rest + y, rest))
    assert_bits(runs["floor_div"]([x, y], None)[0], torch.floor_divide(x, y))


@pytest.mark.parametrize("divisor", [0.3, -7.5, 1e-40, 3e38, 2.0**27, math.inf, 0.0])
def test_rests_of_a_known_divisor_are_exact(compile_all, divisor: float) -> None:
    """Fewer steps are enough for what such a quotient can be."""
    x = torch.cat([SOME, any_numbers(10000), torch.tensor([3.4028235e38, -3.4028235e38])])
    shape = f"f32[{len(x)}]"
    graph = parse_graph(f"graph @g(%x: {shape}) -> {shape} {{\n %0: f32[] = constant() {{value = {divisor!r}}}\n"
                        f" %1: {shape} = fmod(%x, %0)\n return %1\n}}")  # fmt: skip
    (run,) = compile_all([(graph, "pointwise")])
    with np.errstate(invalid="ignore"):
        assert_bits(run([x], None)[0], torch.from_numpy(np.fmod(x.numpy(), np.float32(divisor))))


def assert_bits(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.equal(got.isnan(), wanted.isnan())
    known = ~wanted.isnan()
    assert torch.equal(got[known].view(torch.int32), wanted[known].view(torch.int32))

"""Pointwise operators: PyTorch's promotion, scalars, 0-d tensors and special values."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.capture.helpers import check, compiled

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


def tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    n = torch.Size(shape).numel()
    values = (torch.arange(n) * 7 % 11 - 3).reshape(shape)
    return values.abs().to(dtype) if dtype == torch.uint8 else (values / 2).to(dtype) if dtype.is_floating_point else values.to(dtype)


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(DTYPES, 2)), ids=str)
def test_promotion_of_two_tensors(a: torch.dtype, b: torch.dtype) -> None:
    def fn(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Any:
        return x + y, x * y, x / (y + 1), x < y, x == z, torch.where(x > 0, x, y), y * z, torch.maximum(x, y)

    check(fn, tensor(a, 3, 4), tensor(b, 4), tensor(a))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_promotion_of_scalars(dtype: torch.dtype) -> None:
    def fn(x: torch.Tensor) -> Any:
        return x + 1, x * 2.5, 1 / (x + 2), x > 0.5, x + True, x.clamp(-1, 1), 3 + x, x == 1, x * 0.1

    check(fn, tensor(dtype, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.bool], ids=str)
def test_unary(dtype: torch.dtype) -> None:
    def fn(x: torch.Tensor) -> Any:
        y = x.abs() if x.dtype != torch.bool else x
        return torch.exp(x), torch.sqrt(y), torch.sigmoid(x), torch.tanh(x), torch.erf(x), torch.sin(x), ~(x > 0), torch.log1p(y)

    check(fn, tensor(dtype, 5))


def test_special_values() -> None:
    inf, nan = float("inf"), float("nan")

    def fn(x: torch.Tensor, y: torch.Tensor) -> Any:
        return (
            torch.maximum(x, y), torch.minimum(x, y), torch.fmax(x, y), torch.clamp(x, -1, 1), torch.isnan(x), torch.isinf(x),
            torch.isfinite(x), torch.nan_to_num(x), torch.relu(x), torch.sign(x), x.to(torch.bool), torch.xlogy(x, y), x.remainder(y),
        )  # fmt: skip

    check(fn, torch.tensor([1.0, -inf, inf, nan, -0.0, 2.5]), torch.tensor([nan, 1.0, -2.0, 0.0, 3.0, -1.5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_compositions_round_like_eager(dtype: torch.dtype) -> None:
    def fn(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Any:
        powers = x**2, x**3, x.abs() ** 0.5, x**-1, x**2.5
        return *powers, torch.addcmul(x, y, z), torch.lerp(x, y, 0.3), torch.lerp(x, y, z), torch.add(x, y, alpha=0.1), 2 - x

    torch.manual_seed(1)
    check(fn, *(torch.rand(64).add(0.5).to(dtype) for _ in range(3)))


def test_activations() -> None:
    import torch.nn.functional as F

    def fn(x: torch.Tensor) -> Any:
        return (
            F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), F.mish(x), F.softplus(x), F.elu(x), F.selu(x), F.celu(x, 2.0),
            F.leaky_relu(x), F.hardswish(x), F.hardsigmoid(x), F.hardtanh(x), F.relu6(x), F.logsigmoid(x), F.threshold(x, 0.1, 2.0),
        )  # fmt: skip

    check(fn, torch.linspace(-4, 4, 33))


def test_integer_division_by_a_tensor_stays_a_library_call() -> None:
    """It raises on a zero, which a kernel could only trap on."""

    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x // y

    check(fn, torch.tensor([7, -7]), torch.tensor([2, 2]), library=("aten.floor_divide.default",))
    check(lambda x: (x // 3, x % 3), torch.tensor([7, -7]))


def test_complex() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> Any:
        return x * y + 1j, x.transpose(0, 1), torch.exp(x), x == y

    check(fn, torch.randn(2, 3, dtype=torch.complex64), torch.randn(2, 3, dtype=torch.complex64))


CLAMPS = [lambda x: x.clamp(min=0), lambda x: x.clamp(max=0.0), lambda x: x.clamp_min(0), lambda x: x.clamp(0, 1), lambda x: x.clamp(-1, 0)]


@pytest.mark.parametrize("fn", CLAMPS)
def test_clamping_keeps_the_sign_of_a_zero(fn: Any) -> None:
    x = torch.tensor([-0.0, 0.0, -1.0, 2.0, float("nan")])
    check(fn, x)
    assert torch.equal(torch.signbit(compiled(fn)(x)[:4]), torch.signbit(fn(x)[:4]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64], ids=str)
def test_shifts_by_constants(dtype: torch.dtype) -> None:
    """Divisions and products by powers of two; what leaves the bits of the dtype, or is no constant, stays PyTorch's."""

    def fn(x: torch.Tensor, n: torch.Tensor) -> Any:
        return x >> 0, x >> 4, x << 3, (x << 4) >> 4, torch.bitwise_right_shift(x, 1), x << 6

    def others(x: torch.Tensor, n: torch.Tensor) -> Any:
        return x >> n, x >> (8 * x.element_size() - 1), x << (8 * x.element_size() - 1)

    info = torch.iinfo(dtype)
    x, n = torch.tensor([info.min, info.max, 0, 1, 37, 100, 77 if info.min == 0 else -77], dtype=dtype), torch.tensor(3, dtype=dtype)
    check(fn, x, n)
    check(others, x, n, library=("aten.__lshift__.Scalar", "aten.__rshift__.Scalar", "aten.__rshift__.Tensor"))

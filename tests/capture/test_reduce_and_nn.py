"""Reductions, contractions, normalizations, attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.capture.helpers import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions(dtype: torch.dtype) -> None:
    x = (torch.arange(24) * 5 % 7 - 2).reshape(2, 3, 4).to(dtype)

    def any_dtype(x: torch.Tensor) -> Any:
        return x.sum(), x.sum(1), x.sum((0, 2), keepdim=True), x.any(1), x.all(), x.amax((0, 1)), x.sum(0, dtype=torch.float64), x.cumsum(1)

    check(any_dtype, x)
    if dtype != torch.bool:
        check(lambda x: (x.argmax(), x.argmin(1, keepdim=True), x.max(2), x.min(0).values, x.max(), torch.aminmax(x)), x)
    if dtype.is_floating_point:
        check(lambda x: (x.mean(1), x.var(1), x.std((0, 1), correction=0), torch.var_mean(x, 2), x.norm(dim=1)), x)
        check(lambda x: (x.softmax(1), x.log_softmax(-1)), x)


def test_matrix_products() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> Any:
        many = torch.matmul(x.expand(2, 3, 4), y.expand(2, 4, 5))
        return x @ y, x @ v, v @ v, torch.addmm(b, x, y, beta=0.5, alpha=2), torch.addmm(b * float("nan"), x, y, beta=0), many

    check(fn, torch.randn(3, 4), torch.randn(4, 5), torch.randn(4), torch.randn(3, 5))
    check(lambda x, y: x @ y, torch.arange(6).reshape(2, 3), torch.arange(6).reshape(3, 2))


def test_half_precision_sums_are_rounded_once() -> None:
    x, w, b = (torch.randn(*s, dtype=torch.bfloat16) for s in ((3, 64), (5, 64), (5,)))
    check(F.linear, x, w, b)
    check(lambda x, w, b: torch.addmm(b, x, w.t(), beta=0.5, alpha=2.0), x, w, b)
    check(lambda w, x, b: torch.addmv(b, w, x[0]), w, x, b)
    check(F.linear, x, w)


def test_convolutions() -> None:
    x, w, b = torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 3), torch.randn(6)
    check(lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=(1, 0), dilation=(1, 2), groups=2), x, w, b)
    check(lambda x, w: F.conv1d(x[0, :, :, 0], w[:, :, 0, :2].repeat(1, 2, 1), padding="same"), x, w)
    check(lambda x, w: F.conv2d(x, w, stride=2, padding="valid", groups=2), x, w)
    check(F.conv_transpose2d, x, torch.randn(4, 2, 3, 3))


def test_normalizations() -> None:
    x, w, b = torch.randn(2, 6, 4), torch.randn(6), torch.randn(6)
    check(lambda x, w: F.layer_norm(x, (6, 4), w[:, None].expand(6, 4), None), x, w)
    check(lambda x: F.layer_norm(x, (4,)), x)
    check(lambda x, w, b: F.batch_norm(x, w, b.abs(), w, b), x, w, b)
    check(lambda x, w, b: F.group_norm(x, 3, w, b), x, w, b)
    check(lambda x, w: F.rms_norm(x, (6, 4), None, 1e-5), x, w)


def test_attention() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    mask = torch.rand(2, 1, 5, 7) > 0.4
    mask[0, 0, 1] = False  # a row without keys
    check(F.scaled_dot_product_attention, q, k, v)
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)
    check(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.3), q, k, v, mask)
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), q, k[:, :2], v[:, :2])

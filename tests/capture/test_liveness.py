"""Eager's peak of intermediate results, from the captured graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt.capture.liveness import eager_peak

K = 1000  # an f32 tensor of 250 elements


def peak(f: Callable[..., object], *inputs: torch.Tensor, mode: str = "fake") -> int | None:
    return eager_peak(make_fx(f, tracing_mode=mode)(*inputs))


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x: x.exp(), K),  # the output
        (lambda x: x.exp().sin().cos(), 2 * K),  # a chain: one is read while the next is written
        (lambda x: x.exp() + x.sin(), 3 * K),
        (lambda x: x.view(10, 25).exp().t().sin(), 2 * K),  # views take nothing, of an input or of a result
        (lambda x: (x.exp().view(10, 25)[0], x.sin().sin()), 3 * K),  # a view keeps all that it looks into
        (lambda x: x.view(5, 50), 0),
    ],
)
def test_peaks(f: Callable[..., object], expected: int) -> None:
    assert peak(f, torch.randn(250)) == expected


def test_symbolic_sizes_have_no_figure() -> None:
    assert peak(lambda x: x.exp().sin(), torch.randn(250), mode="symbolic") is None


def test_the_report_compares_the_arena_with_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)).eval()
    report = graphopt.compile(model, (torch.randn(100, 64),), backend="eager").report
    assert report.memory["eager"] == 2 * 100 * 64 * 4
    assert "eager 50.0 KiB" in report.summary(width=200)

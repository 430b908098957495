"""Symbolic sizes: one compilation is right at every size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphopt import reports
from tests.capture.helpers import compiled
from tests.opinfo.harness import difference

CASES: list[tuple[str, Callable[..., Any]]] = [
    ("pointwise", lambda x: (x + 1, x.t() * x.shape[0])),
    ("views", lambda x: (x[1:, :-1].reshape(-1), x.flatten()[2:], x.t()[None])),
    ("halves", lambda x: (x.reshape(2, -1), x.repeat(2, 1).view(4, -1).sum(0))),
    ("joins", lambda x: (torch.cat([x, x[:1]]), F.pad(x, (1, 2)), torch.stack([x, x]).mean(0))),
    ("creation", lambda x: (torch.arange(x.shape[1]), x.new_zeros(x.shape[0] + 1), torch.ones_like(x).tril())),
    ("reductions", lambda x: (x.sum(), x.mean(1), x.softmax(-1), x.amax(0), x.numel())),
    ("matmul", lambda x: (x @ x.t(), F.linear(x.t(), x.t()))),
    ("attention", lambda x: F.scaled_dot_product_attention(*[x.reshape(1, 1, -1, 4)] * 3, is_causal=True)),
    ("library", lambda x: torch.cumprod(x, 0)),
    ("sizes", lambda x: (x.shape[0] * 2, x.sum() / x.shape[1])),
]


@pytest.mark.parametrize(("name", "fn"), CASES, ids=[c[0] for c in CASES])
def test_one_compilation_for_all_sizes(name: str, fn: Callable[..., Any]) -> None:
    run = compiled(fn, dynamic=True)
    with torch.no_grad():
        for rows, columns in ((4, 6), (8, 10), (3, 16), (17, 12)):
            x = torch.randn(rows * 2, columns)
            text = difference(fn(x), run(x))
            assert not text, text
    assert len(reports()) == 1


def test_numbers_as_arguments() -> None:
    def fn(x: torch.Tensor, n: int, f: float) -> Any:
        return x[:n] * n + f, x.new_full((n,), 2.0)

    run = compiled(fn, dynamic=True)
    for n, f in ((3, 0.5), (4, 1.5), (5, -2.0)):
        x = torch.randn(8, 2)
        assert not difference(fn(x, n, f), run(x, n, f))
    assert len(reports()) == 1


class Frames(torch.nn.Module):
    """How much is missing to a whole number of windows, as audio codecs compute it: buffers and a size, but no tensor as argument."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(2))
        self.register_buffer("size", torch.tensor(5))

    def forward(self, n: int) -> torch.Tensor:
        return torch.ceil((n - self.size) / self.step + 1).to(torch.int64) * self.step + self.size - n


def test_a_program_of_weights_and_numbers_only() -> None:
    model = Frames()
    for run in (compiled(model, dynamic=True), compiled(model, dynamic=True, kernels="auto")):
        with torch.no_grad():
            for n in (80, 71, 9):
                assert not difference(model(n), run(n))


def test_strided_windows_of_unknown_number() -> None:
    model = torch.nn.Conv1d(3, 5, 4, stride=2)
    run = compiled(model, dynamic=True)
    with torch.no_grad():
        for n in (20, 33):
            x = torch.randn(2, 3, n)
            torch.testing.assert_close(run(x), model(x))
    assert len(reports()) == 1
    assert "aten(" not in reports()[0].text_before


class Rest(torch.nn.Module):
    """Strided windows in what is left of a buffer: their number decreases as the argument grows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(3, 2, 3, stride=2, padding=1)
        self.register_buffer("signal", torch.randn(1, 3, 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rest = self.signal[..., x.shape[0] :]
        return self.conv(rest.sin()).relu().amax(-1) + F.avg_pool1d(rest, 2).exp().sum() + x.sum()


def test_sizes_that_decrease() -> None:
    model = Rest()
    run = compiled(model, dynamic=True, kernels="auto")
    with torch.no_grad():
        for n in (7, 5, 4, 11, 16):
            x = torch.randn(n)
            torch.testing.assert_close(run(x), model(x))


def test_a_negative_number_as_argument() -> None:
    run = compiled(lambda x, n: x * n + max(n, -7), dynamic=True)
    for n in (5, -5, -9):
        torch.testing.assert_close(run(torch.ones(3), n), torch.ones(3) * n + max(n, -7))


def test_training_with_symbolic_sizes() -> None:
    m = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    run = compiled(m, dynamic=True)
    for n in (5, 9, 2):
        x = torch.randn(n, 4)
        run(x).pow(2).sum().backward()
        got = [p.grad.clone() for p in m.parameters() if p.grad is not None]
        m.zero_grad()
        m(x).pow(2).sum().backward()
        torch.testing.assert_close(got, [p.grad for p in m.parameters()])
        m.zero_grad()
    assert len(reports()) == 2  # forward and backward

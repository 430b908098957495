"""One compilation for all sizes: right at every one, against f64, with eager's own error as the yardstick."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import graphopt
from graphopt.guards import InputError

pytest.importorskip("tvm_ffi")
pytestmark = pytest.mark.tvm
FEW = (2, 3, 8, 16, 17, 33, 67)
EVERY = (*range(1, 71), 95, 127, 128, 129, 255, 257)


class Function(nn.Module):
    """A function of tensors, some of which it owns as weights."""

    def __init__(self, fn: Callable[..., Any], *weights: torch.Tensor) -> None:
        super().__init__()
        self.fn, self.weights = fn, nn.ParameterList(weights)

    def forward(self, *xs: torch.Tensor) -> Any:
        return self.fn(*xs, *self.weights)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def attention(x: torch.Tensor, causal: bool = False) -> torch.Tensor:
    q, k, v = (p.unflatten(-1, (3, 8)).transpose(1, 2) for p in (x, x * 0.5, x - 1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


IMAGE = (None, None, Dim.AUTO, Dim.AUTO)
CASES: dict[str, tuple[nn.Module, Callable[[int], tuple[int, ...]], Any]] = {
    # module, size -> shape of its input, which axes are symbolic
    "linear": (nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 7)), lambda n: (n, 40), (Dim.AUTO, None)),
    "linear of a batch": (nn.Linear(40, 50), lambda n: (max(2, n // 3), n, 40), (Dim.AUTO, Dim.AUTO, None)),
    "depth": (Function(lambda x, y: x.t() @ x + y, randn(5, 5)), lambda n: (n, 5), (Dim.AUTO, None)),
    "gram": (Function(lambda x: x @ x.t()), lambda n: (n, 9), (Dim.AUTO, None)),
    "batched product": (Function(lambda x: torch.relu(x @ x.transpose(1, 2)) @ x), lambda n: (3, n, 12), (None, Dim.AUTO, None)),
    "sums": (Function(lambda x: (x.sum(), x.sum(0), x.mean(1), x.amax((0, 1)))), lambda n: (n, n + 3), (Dim.AUTO, Dim.AUTO)),
    "variance": (Function(lambda x: (x.var(0, correction=0), x.std(1), (x * x).mean(-1))), lambda n: (n + 1, 24), (Dim.AUTO, None)),
    "extremes": (Function(lambda x: (x.argmax(0), x.argmin(1), x.amin(1))), lambda n: (n, 2 * n + 1), (Dim.AUTO, Dim.AUTO)),
    "softmax": (Function(lambda x: (x.softmax(-1), x.log_softmax(0))), lambda n: (n, n + 1), (Dim.AUTO, Dim.AUTO)),
    "layer norm": (nn.Sequential(nn.LayerNorm(48), nn.SiLU()), lambda n: (2, n, 48), (None, Dim.AUTO, None)),
    "norm of a symbolic axis": (Function(lambda x: F.layer_norm(x, x.shape[-1:])), lambda n: (5, n + 1), (None, Dim.AUTO)),
    "attention": (Function(attention), lambda n: (2, n, 24), (None, Dim.AUTO, None)),
    "causal attention": (Function(lambda x: attention(x, True)), lambda n: (1, n, 24), (None, Dim.AUTO, None)),
    "joins": (Function(lambda x: torch.cat([x, x.flip(0), F.pad(x, (0, 0, 1, 2))]).t()), lambda n: (n + 1, 6), (Dim.AUTO, None)),
    "batch of images": (nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 8, 1)), lambda n: (n, 3, 9, 9),
                        (Dim.AUTO, None, None, None)),
    "image sizes": (nn.Sequential(nn.Conv2d(3, 18, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(18, 5, 3, padding=1)),
                    lambda n: (1, 3, n + 5, n + 9), IMAGE),
    "depthwise": (nn.Conv2d(24, 24, 3, padding=1, groups=24), lambda n: (1, 24, n + 3, n + 6), IMAGE),
    "pooling": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Flatten(2)), lambda n: (2, 3, n + 6, n + 8), IMAGE),
    "sequence convolution": (nn.Conv1d(6, 10, 5, padding=2), lambda n: (2, 6, n + 4), (None, None, Dim.AUTO)),
}  # fmt: skip


def compiled(module: nn.Module, shape: tuple[int, ...], axes: Any, **options: Any) -> Any:
    x = randn(*shape)
    spec: Any = (axes,) if not isinstance(module, Function) else ((axes,),)
    return graphopt.compile(module.eval(), (x,), dynamic_shapes=spec, **options)


def judge(module: nn.Module, run: Callable[..., Any], x: torch.Tensor) -> None:
    """Results of eager's shapes and dtypes, and an error against f64 of at most four times eager's own."""
    with torch.no_grad():
        got, own, true = run(x), module(x), copy.deepcopy(module).double()(x.double())
    for a, b, t in zip(*[r if isinstance(r, tuple) else (r,) for r in (got, own, true)], strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride(), (x.shape, a.shape, b.shape)
        if not b.is_floating_point():
            assert torch.equal(a, b), x.shape
            continue
        scale = max(1.0, float(t.abs().max()))  # of the terms that were summed, where they cancel
        limit = 4 * (b.double() - t).abs().max() + 4 * torch.finfo(a.dtype).eps * scale
        error = (a.double() - t).abs().max()
        assert error <= limit, f"input {tuple(x.shape)}: error {error:.2e}, allowed {limit:.2e}"


def sweep(name: str, sizes: tuple[int, ...], **options: Any) -> None:
    module, shape, axes = CASES[name]
    torch.manual_seed(0)
    run = compiled(module, shape(6), axes, **options)
    assert run.report.kernels, "no kernel is tested"
    count = len(graphopt.reports())
    for n in sizes:
        judge(module, run, randn(*shape(n)))
    assert len(graphopt.reports()) == count, "a new size compiled something"
    general, *others = run.report, *run.report.variants
    assert general.runs + sum(v.runs for v in others) == len(sizes) * bool(others)


@pytest.mark.parametrize("name", CASES)
def test_some_sizes(name: str) -> None:
    sweep(name, FEW, hot_sizes="none")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_size(name: str) -> None:
    sweep(name, EVERY)


@pytest.mark.parametrize(("fn", "axes", "least", "said"), [
    (torch.relu, {0: Dim("B", min=1, max=64)}, 1, r"s\d+ <= 64$"),
    (torch.relu, {0: Dim("B", min=5, max=64)}, 5, r"5 <= s\d+ <= 64$"),
    (lambda x: x[:, 1:] * 2, {0: Dim("B", max=64), 1: Dim("S", min=3)}, 1, r"\]\) where s\d+ <= 64, 3 <= s\d+$"),
])  # fmt: skip
def test_sizes_that_are_refused_are_told_what_is_taken(fn: Callable[..., Any], axes: dict[int, Any], least: int, said: str) -> None:
    """Not the range that torch.export traced with, which begins at 2: a call may have one row."""
    model = graphopt.compile(Function(fn), (torch.randn(9, 7),), dynamic_shapes=((axes,),), hot_sizes="none")
    for n in (least, 64):
        x = torch.randn(n, 7)
        torch.testing.assert_close(model(x), fn(x))
    with pytest.raises(InputError, match=said):
        model(torch.randn(65, 7))

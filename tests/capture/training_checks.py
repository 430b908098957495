"""Attentions in training for tests: small inputs, Dynamo's graph after ``train_attention``, and the judgement of gradients against f64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.capture.training import train_attention
from graphopt.options import Options
from graphopt.remarks import Remark

Fn = Callable[..., torch.Tensor]
B, H, M, D = 2, 4, 9, 8


def x(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def qkv(m: int = M, n: int = M, shared: int = H) -> list[torch.Tensor]:
    return [x(B, H, m, D), x(B, shared, n, D, seed=1), x(B, shared, n, D, seed=2)]


def compiled(fn: Fn, said: list[Remark], keep: Callable[[torch.fx.GraphModule], Any] = id, **kwargs: Any) -> Fn:
    """Dynamo's graph after :func:`train_attention`, run as it is: operators of attention by their reference. ``keep`` is given it."""

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        said.extend(train_attention(gm, Options()))
        keep(gm)
        return gm.forward

    torch._dynamo.reset()
    return torch.compile(fn, backend=backend, **kwargs)


def gradients(fn: Fn, inputs: Sequence[torch.Tensor], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The result, and gradients by all floats."""
    given = [t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in inputs]
    y = fn(*given)
    y.backward(x(*y.shape, seed=9).to(dtype))
    return [y.detach(), *(t.grad for t in given if t.grad is not None)]


def judge(got: Sequence[torch.Tensor], fn: Fn, inputs: Sequence[torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    """No error more than four times eager's greatest, both against f64, and a few units in the last place."""
    slack = 8 if dtype == torch.float32 else 1
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
    for mine, own, true in zip(got, gradients(fn, inputs, dtype), gradients(fn, inputs, torch.float64), strict=True):
        limit = 4 * (own - true).abs().max() + slack * torch.finfo(dtype).eps * max(1.0, float(true.abs().max()))
        assert float((mine - true).abs().max()) <= limit, (mine - true).abs().max()

"""The operators that PyTorch chooses for attention on a GPU are the same op of the IR; of fake tensors, as no GPU is needed to trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from graphopt.capture.fx import capture_fx
from graphopt.ir.graph import Graph

FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default
CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default


def captured(fn: Callable[..., Any], shared: int = 4, bias: bool = False) -> Graph:
    with FakeTensorMode() as mode, torch.no_grad():
        shapes = ((2, 4, 16, 8), (2, shared, 24, 8), (2, shared, 24, 8), *([(2, 4, 16, 24)] if bias else []))
        given = [torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in shapes]
        with mode:
            return capture_fx(make_fx(lambda *a: tree_leaves(fn(*a)))(*given), weights={}).graph


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "flash": (lambda q, k, v: FLASH(q, k, v, 0.0, True, scale=0.3)[0], {}, {"causal": True, "scale": 0.3}),
    "flash, shared heads": (lambda q, k, v: FLASH(q, k, v)[0], {"shared": 2}, {"causal": False, "scale": 8**-0.5}),
    "efficient": (lambda q, k, v: EFFICIENT(q, k, v, None, False)[0], {}, {"causal": False}),
    "efficient, a mask": (lambda q, k, v, b: EFFICIENT(q, k, v, b, False, scale=0.3)[0], {"bias": True}, {"scale": 0.3}),
    "cudnn": (lambda q, k, v: CUDNN(q, k, v, None, False, 0.0, True, False)[0], {}, {"causal": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str) -> None:
    fn, given, attrs = CASES[name]
    graph = captured(fn, **given)
    (node,) = [n for n in graph.nodes() if n.name not in ("constant", "cast")]
    assert node.name == "attention" and len(node.operands) == 3 + bool(given.get("bias"))
    assert {k: node.attrs[k] for k in attrs} == pytest.approx(attrs)


@pytest.mark.parametrize("fn", [
    lambda q, k, v: FLASH(q, k, v, 0.1)[0],  # other random numbers than PyTorch's would be drawn
    lambda q, k, v: FLASH(q, k, v)[:2],
    lambda q, k, v: EFFICIENT(q, k, v, None, True)[:2],  # for a backward of PyTorch's
])  # fmt: skip
def test_what_is_left_to_the_library(fn: Callable[..., Any]) -> None:
    assert [n.name for n in captured(fn).nodes()] == ["aten"]

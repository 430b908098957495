"""Pooling: error against f64 with eager's own as the yardstick; nan, windows over the edges, sizes that divide nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tvm_check import B, H, check, sizes, values

from graphopt.ir import Builder, Graph, TensorType, dims, types


def pool(op: str, x: Sequence[Any], kernel: int = 0, stride: int = 1, padding: int = 0, dilation: int = 1, last: bool = True,
         relu: bool = False, dtype: types.DType = types.f32, **attrs: Any) -> Graph:  # fmt: skip
    """A region with one pooling node, and a relu in front of it and behind it."""
    g = Graph("body")
    b, n = Builder(g), len(x) - 2
    for s in x:
        if not isinstance(s, int):
            g.symbols[s.name] = dims.Range(1, None)
    v = g.add_input(TensorType(dtype, tuple(x)), "x")
    if kernel:
        attrs |= {"kernel": (kernel,) * n, "stride": (stride,) * n, "padding": (padding,) * n}
        attrs |= {} if op == "avg_pool" else {"dilation": (dilation,) * n}
    y = b.create(op, [b.relu(v) if relu else v], {**attrs, "channels_last": last})
    g.set_outputs([b.relu(y) if relu else y])
    return g


CASES: dict[str, Graph] = {
    "max": pool("max_pool", (2, 15, 14, 20), 3, 2, 1),
    "max, channels first": pool("max_pool", (2, 5, 15, 14), 3, 2, 1, last=False, relu=True),
    "max, channels first, wide": pool("max_pool", (1, 2, 5, 70), 3, 1, 1, last=False),
    "max dilated": pool("max_pool", (1, 15, 14, 20), 3, 1, 1, dilation=2),
    "max of a line": pool("max_pool", (2, 15, 20), 2, 2),
    "max of a volume": pool("max_pool", (1, 6, 7, 8, 3), 4, 2, 2),
    "max of any size": pool("max_pool", (B, H, H, 7), 3, 2, 1, relu=True),
    "max of any size, first": pool("max_pool", (B, 3, H, H), 3, 2, 1, last=False),
    "max, a window too many": pool("max_pool", (2, 14, 15, 20), 3, 2, 1, size=(8, 8)),
    "max of a large window": pool("max_pool", (1, 17, 15, 20), 9, 2, 4),
    "max of a large dilated window": pool("max_pool", (1, 40, 31, 18), 7, 3, 6, dilation=2),
    "max of a large window, first": pool("max_pool", (1, 3, 17, 15), 9, 2, 4, last=False),
    "max f64": pool("max_pool", (2, 9, 8, 5), 3, 2, 1, dtype=types.f64),
    "max bf16": pool("max_pool", (2, 9, 8, 17), 3, 2, 1, dtype=types.bf16),
    "argmax": pool("argmax_pool", (2, 15, 14, 20), 3, 2, 1),
    "argmax, channels first": pool("argmax_pool", (2, 5, 15, 14), 3, 2, 1, dilation=2, last=False),
    "argmax of any size": pool("argmax_pool", (B, H, H, 17), 2, 2, 1),
    "avg": pool("avg_pool", (2, 15, 14, 20), 3, 2, 1),
    "avg without padding": pool("avg_pool", (2, 15, 14, 20), 3, 1, 0, relu=True),
    "avg that leaves padding out": pool("avg_pool", (2, 15, 14, 20), 3, 2, 1, count_include_pad=False),
    "avg by a number": pool("avg_pool", (2, 15, 14, 20), 2, 2, 1, divisor=3),
    "avg, a window too many": pool("avg_pool", (2, 14, 15, 20), 3, 2, 1, size=(8, 8)),
    "avg, channels first": pool("avg_pool", (2, 3, 15, 40), 3, 1, 1, last=False),
    "avg, channels first, padding left out": pool("avg_pool", (2, 3, 15, 40), 3, 2, 1, last=False, count_include_pad=False),
    "avg of a line, first": pool("avg_pool", (2, 3, 70), 4, 2, 2, last=False),
    "avg of a volume": pool("avg_pool", (1, 6, 7, 8, 3), 2, 2, 1),
    "avg of a large window": pool("avg_pool", (1, 17, 15, 20), 9, 2, 4),
    "avg of a large window, first": pool("avg_pool", (1, 3, 17, 15), 9, 2, 4, last=False, count_include_pad=False),
    "avg of any size": pool("avg_pool", (B, H, H, 20), 3, 2, 1, relu=True),
    "avg of any size, first": pool("avg_pool", (B, 3, H, H), 3, 1, 1, last=False, count_include_pad=False),
    "avg of any size, a window too many": pool("avg_pool", (B, H, H, 6), 2, 2, size=(dims.floordiv(dims.add(H, 1), 2),) * 2),
    "avg f16": pool("avg_pool", (2, 9, 8, 17), 3, 2, 1, dtype=types.f16),
    "adaptive max": pool("adaptive_max_pool", (2, 15, 14, 20), size=(4, 5)),
    "adaptive argmax, first": pool("adaptive_argmax_pool", (2, 3, 15, 14), size=(4, 5), last=False),
    "adaptive avg": pool("adaptive_avg_pool", (2, 15, 14, 20), size=(4, 20), relu=True),
    "adaptive avg, first": pool("adaptive_avg_pool", (2, 3, 15, 14), size=(4, 5), last=False),
    "adaptive avg of any size": pool("adaptive_avg_pool", (B, H, H, 20), size=(3, 5)),
    "adaptive max of a volume": pool("adaptive_max_pool", (1, 5, 6, 7, 4), size=(2, 4, 3)),
}  # fmt: skip


def kind_of(graph: Graph) -> str:
    return next(n.op.name for n in graph.nodes() if n.op.name != "relu")


def test_pools(compile_all) -> None:
    for graph, run in zip(CASES.values(), compile_all([(g, kind_of(g)) for g in CASES.values()]), strict=True):
        for bindings in sizes(graph):
            check(graph, run, values(graph, **bindings), bindings, factor=4.0)  # few terms: an ulp is much of the error
            check(graph, run, [x.round() for x in values(graph, **bindings)], bindings, factor=4.0)
            if "argmax" not in kind_of(graph) or "H" not in bindings:
                check(graph, run, values(graph, nan=True, **bindings), bindings, factor=4.0)


class Pools(torch.nn.Module):
    """All ways to pool, between convolutions and without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(32, 8, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = F.relu(self.stem(x))
        low, index = F.max_pool2d(y, 2, return_indices=True, ceil_mode=True)
        both = torch.cat([F.avg_pool2d(low, 3, 1, 1, count_include_pad=False), F.max_pool2d(low, 3, 1, 1)], 1)
        line = F.avg_pool1d(x.flatten(2), 5, 2, 2)
        return self.head(both), index, F.adaptive_avg_pool2d(both, 3), F.adaptive_max_pool2d(x, (2, 3)), line, F.lp_pool2d(x, 2, 3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_network_needs_no_library(dynamic: bool, tmp_path) -> None:
    torch.manual_seed(0)
    net = Pools().eval()
    compiled = torch.compile(net, backend="graphopt", dynamic=dynamic, options={"strict": True, "cache_dir": str(tmp_path)})
    with torch.no_grad():
        for shape in [(2, 3, 17, 18), (3, 3, 33, 20)][: 1 + dynamic]:
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)

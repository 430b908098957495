"""Transposed convolutions as phases: against PyTorch, over strides, paddings, dilations, groups and unknown sizes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from graphopt.ir import Builder, Graph, TensorType, dims, evaluate, types
from graphopt.passes.layout import ConvLayout
from graphopt.passes.layout.phases import phases_of
from graphopt.testing import check_pass

B, H = dims.symbol("B"), dims.symbol("H")


def transposed(x: tuple[Any, ...], w: tuple[int, ...], stride: int, padding: int = 0, more: int = 0, dilation: int = 1, groups: int = 1,
               frozen: bool = True) -> Graph:  # fmt: skip
    g = Graph("g", {d.name: dims.Range(2, None) for d in x if not isinstance(d, int)})
    b, n = Builder(g), len(x) - 2
    image, weight = g.add_input(TensorType(types.f32, x), "x"), g.add_input(TensorType(types.f32, w), "w", weight=frozen)
    attrs = {"stride": stride, "padding": padding, "output_padding": more, "dilation": dilation}
    g.set_outputs([b.conv_transpose(image, weight, groups=groups, **{k: (v,) * n for k, v in attrs.items()})])
    return g


def kinds(g: Graph) -> list[str]:
    return [n.op.name for n in g.nodes()]


@pytest.mark.parametrize("taps, stride, padding, more, dilation", [
    (2, 2, 0, 0, 1), (4, 2, 1, 0, 1), (3, 2, 1, 1, 1), (3, 1, 1, 0, 1), (5, 3, 2, 2, 1), (1, 2, 0, 1, 1), (3, 2, 2, 1, 2), (3, 3, 0, 0, 2),
    (4, 6, 5, 3, 4), (3, 2, 3, 0, 3), (2, 2, 1, 0, 1),
])  # fmt: skip
def test_every_output_is_made_once_from_the_right_taps(taps: int, stride: int, padding: int, more: int, dilation: int) -> None:
    phases, extra = phases_of(taps, stride, padding, more, dilation)
    for size in (1, 2, 3, 7):
        outputs = (size - 1) * stride - 2 * padding + dilation * (taps - 1) + more + 1
        assert (size + extra) * stride >= outputs > (size + extra - 1) * stride
        for o in range(outputs):
            u, phase = o // stride, phases[o % stride]
            used = {(u - phase.low + j * phase.dilation, phase.first + (phase.taps - 1 - j) * phase.step) for j in range(phase.taps)}
            wanted = {(i, k) for i, k in product(range(-50, 99), range(taps)) if i * stride + k * dilation == o + padding}
            assert used == wanted


@pytest.mark.parametrize("graph", [
    transposed((B, 4, H, H), (4, 6, 2, 2), 2), transposed((B, 4, H, H), (4, 6, 4, 4), 2, 1),
    transposed((2, 4, 5, 6), (4, 3, 3, 3), 2, 1, 1),
    transposed((2, 4, 5, 6), (4, 3, 3, 3), 2, 1, 1, dilation=2, groups=2), transposed((B, 4, H), (4, 1, 5), 3, 2, 1, groups=4),
    transposed((1, 2, 3, 4, 5), (2, 3, 2, 2, 2), 2), transposed((1, 2, 3, 4), (2, 3, 1, 1), 2),
    transposed((1, 2, 6, 7), (2, 3, 3, 3), 1, 2),
], ids=str)  # fmt: skip
def test_phases_give_the_transposed_convolution(graph: Graph) -> None:
    after = check_pass(ConvLayout(), graph)
    assert "conv_transpose" not in kinds(after)


def test_equal_windows_become_one_convolution() -> None:
    assert kinds(check_pass(ConvLayout(), transposed((2, 4, 5, 5), (4, 6, 2, 2), 2))).count("conv") == 1
    assert kinds(check_pass(ConvLayout(), transposed((2, 4, 5, 5), (4, 6, 4, 4), 2, 1))).count("conv") == 4


def test_a_weight_of_unknown_size_keeps_the_layout() -> None:
    graph = transposed((2, 4, 5, 5), (4, H, 2, 2), 2, frozen=False)  # type: ignore[arg-type]
    graph.symbols["H"] = dims.Range(1, None)
    check_pass(ConvLayout(), graph, fires=False, reason="of unknown size")


def test_inference_agrees_with_pytorch() -> None:
    x, w = torch.randn(2, 4, 5, 6), torch.randn(4, 3, 3, 2)
    graph = transposed((2, 4, 5, 6), (4, 3, 3, 2), 3, 1, 2, 2, 2)
    (got,) = evaluate(graph, [x, w])
    want = torch.nn.functional.conv_transpose2d(x, w, None, 3, 1, 2, 2, 2)
    assert torch.equal(got, want) and tuple(got.shape) == graph.outputs[0].shape

"""quantize-convolutions, and what layout, fusion and packing make of it."""

from __future__ import annotations

import pytest
import torch

from graphopt.ir import Graph, evaluate, parse_graph
from graphopt.pass_manager import make_pass, run_passes
from graphopt.passes.fusion.fuse import Fuse
from graphopt.passes.layout.conv_layout import ConvLayout
from graphopt.passes.layout.pack_filters import PackFilters
from graphopt.passes.quantization.quantize_convolutions import QuantizeConvolutions
from graphopt.rewrite import PassContext
from graphopt.target import Target
from graphopt.testing import check_pass

BEFORE = """
graph @g(%x: f32[B, 9, 7, 6], weight %w: f32[3, 3, 6, 32]) -> f32[B, 5, 4, 32]
where 1 <= B {
  %0: f32[B, 5, 4, 32] = conv(%x, %w) {stride = [2, 2], padding = [1, 1], dilation = [1, 1], channels_last = true}
  return %0
}"""
AFTER = """
graph @g(%x: f32[B, 9, 7, 6], weight %w: f32[3, 3, 6, 32]) -> f32[B, 5, 4, 32]
where 1 <= B {
  %0: f32[B, 9, 7, 6] = abs(%x)
  %1: f32[B, 1, 1, 1] = max(%0) {axes = [1, 2, 3], keepdims = true}
  %2: f32[] = constant() {value = 0.007874015748031496}
  %3: f32[B, 1, 1, 1] = mul(%1, %2)
  %4: f32[] = constant() {value = 1.2e-38}
  %5: f32[B, 1, 1, 1] = maximum(%3, %4)
  %6: i8[B, 9, 7, 6] = quantize(%x, %5)
  %7: f32[3, 3, 6, 32] = abs(%w)
  %8: f32[1, 1, 1, 32] = max(%7) {axes = [0, 1, 2], keepdims = true}
  %9: f32[] = constant() {value = 0.007874015748031496}
  %10: f32[1, 1, 1, 32] = mul(%8, %9)
  %11: f32[] = constant() {value = 1.2e-38}
  %12: f32[1, 1, 1, 32] = maximum(%10, %11)
  %13: i8[3, 3, 6, 32] = quantize(%w, %12)
  %14: f32[B, 1, 1, 32] = mul(%5, %12)
  %15: i32[B, 5, 4, 32] = conv(%6, %13) {stride = [2, 2], padding = [1, 1], dilation = [1, 1], channels_last = true, acc = i32}
  %16: f32[B, 5, 4, 32] = dequantize(%15, %14)
  return %16
}"""
PASS = QuantizeConvolutions(least=64)
CPU = PassContext(target=Target.from_name("cpu:sapphirerapids:2"))


def test_both_factors_in_eight_bits() -> None:
    check_pass(PASS, BEFORE, AFTER)


def test_channels_first() -> None:
    text = BEFORE.replace("B, 9, 7, 6", "B, 6, 9, 7").replace("3, 3, 6, 32", "32, 6, 3, 3").replace("B, 5, 4, 32", "B, 32, 5, 4")
    check_pass(PASS, text.replace(", channels_last = true", ""))


def test_half_a_step_of_either_factor() -> None:
    g = check_pass(PASS, BEFORE)
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 9, 7, 6, generator=generator), torch.randn(3, 3, 6, 32, generator=generator)
    x[1] = 0.0
    x[2, 0, 0, 0] = float("inf")
    (y,) = evaluate(g, [x, w])

    def conv(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.conv2d(a.movedim(-1, 1), b.permute(3, 2, 0, 1), None, 2, 1).movedim(1, -1)

    sx, sw = x[:1].abs().amax() / 127 / 2, w.abs().amax((0, 1, 2)) / 127 / 2
    limit = sx * w.abs().sum((0, 1, 2)) + conv(x[:1].abs() + sx, sw.expand(3, 3, 6, 32))
    assert bool(((y[0] - conv(x[:1], w)[0]).abs() <= limit[0] * 1.001 + 1e-6).all())
    assert not y[1].any() and bool(y[2].isnan().all()), "an image of zeros gives zeros, one that is not finite nan"


def test_zeros_are_put_around_integers() -> None:
    g = check_pass(PASS, """
graph @g(%x: f32[1, 9, 7, 6], weight %w: f32[3, 3, 6, 32]) -> f32[1, 10, 5, 32] {
  %0: f32[1, 12, 7, 6] = pad(%x) {low = [0, 1, 0, 0], high = [0, 2, 0, 0], value = 0.0}
  %1: f32[1, 10, 5, 32] = conv(%0, %w) {stride = [1, 1], padding = [0, 0], dilation = [1, 1], channels_last = true}
  return %1
}""")
    assert next(n for n in g.nodes() if n.op.name == "pad").operands[0].producer.op.name == "quantize"


@pytest.mark.parametrize(("change", "reason"), [
    (("f32", "bf16"), "it is of bf16"), (("weight %w", "%w"), ""), (("32]", "8]"), "too few"),
    (("B, 9, 7, 6", "B, H, 7, 6"), "unknown size"),
])  # fmt: skip
def test_what_is_left(change: tuple[str, str], reason: str) -> None:
    text = BEFORE.replace(*change)
    if "H" in change[1]:
        text = text.replace("B, 5, 4", "B, ((H - 1) // 2) + 1, 4").replace("1 <= B", "1 <= B, 3 <= H")
    check_pass(PASS, text, fires=False, reason=reason or None)


GROUPS = """
graph @g(%x: f32[1, 9, 7, 64], weight %w: f32[3, 3, 2, 64]) -> f32[1, 7, 5, 64] {
  %0: f32[1, 7, 5, 64] = conv(%x, %w) {stride = [1, 1], padding = [0, 0], dilation = [1, 1], groups = 32, channels_last = true}
  return %0
}"""


def test_groups_are_left() -> None:
    check_pass(PASS, GROUPS, fires=False, reason="it has 32 groups")


def test_on_a_gpu_an_image_is_rounded_by_a_kernel_of_its_own() -> None:
    """A program there computes a tile, and would round what the others round, too."""
    g, ctx = parse_graph(BEFORE), PassContext(target=Target.from_name("cuda:sm_90"))
    assert PASS.run(g, ctx)
    run_passes(g, [Fuse()], ctx)
    (body,) = [n.body for n in g.nodes() if n.op.name == "fusion" and n.attrs["kind"] == "conv"]
    assert "quantize" not in [n.op.name for n in body.nodes()] and body.inputs[0].dtype.name == "i8"


# Two convolutions as captured with static scales: floats between them are rounded by the first one's kernel, and those that a residual
# reads, too, by the second one's.
CHAIN = """
graph @g(%x: f32[1, 64, 9, 7], weight %a: i8[64, 64, 3, 3], weight %b: i8[64, 64, 1, 1], weight %s: f32[], weight %t: f32[],
         weight %sa: f32[1, 64, 1, 1], weight %sb: f32[1, 64, 1, 1]) -> f32[1, 64, 9, 7] {
  %0: f32[1, 64, 9, 7] = relu(%x)
  %1: i8[1, 64, 9, 7] = quantize(%0, %s) {dtype = i8, bits = 8}
  %2: f32[1, 64, 1, 1] = mul(%s, %sa)
  %3: i32[1, 64, 9, 7] = conv(%1, %a) {stride = [1, 1], padding = [1, 1], dilation = [1, 1], acc = i32}
  %4: f32[1, 64, 9, 7] = dequantize(%3, %2)
  %5: f32[1, 64, 9, 7] = relu(%4)
  %6: i8[1, 64, 9, 7] = quantize(%5, %t) {dtype = i8, bits = 8}
  %7: f32[1, 64, 1, 1] = mul(%t, %sb)
  %8: i32[1, 64, 9, 7] = conv(%6, %b) {stride = [1, 1], padding = [0, 0], dilation = [1, 1], acc = i32}
  %9: f32[1, 64, 9, 7] = dequantize(%8, %7)
  %10: f32[1, 64, 9, 7] = add(%9, %0)
  %11: f32[1, 64, 9, 7] = relu(%10)
  return %11
}"""


def regions(text: str) -> list[Graph]:
    g = parse_graph(text)
    run_passes(g, [ConvLayout(), make_pass("views"), make_pass("dce"), Fuse(), PackFilters()], CPU)
    return [n.body for n in g.nodes() if n.op.name == "fusion" and n.attrs["kind"] == "conv"]


def test_integers_go_from_convolution_to_convolution() -> None:
    first, second = regions(CHAIN)
    assert [str(v.dtype) for v in first.outputs] == ["i8"] and [n.op.name for n in first.nodes()][-1] == "quantize"
    image = next(n for n in second.nodes() if n.op.name == "conv").operands[0]
    assert image.is_input and str(image.dtype) == "i8"
    assert [n.op.name for n in second.nodes()][-2:] == ["add", "relu"], "the residual is added where the sums become floats"


def test_floats_that_are_read_twice_are_rounded_by_each_reader() -> None:
    second = regions(CHAIN.replace("add(%9, %0)", "add(%9, %5)"))[1]
    conv = next(n for n in second.nodes() if n.op.name == "conv")
    assert conv.operands[0].producer.op.name == "quantize" and second.outputs[0].producer.op.name == "relu"


def test_the_weight_is_packed_in_fours() -> None:
    from graphopt.backends.tvm.convint8form import refusal

    for body in regions(CHAIN):
        assert refusal(body) is None, body
        assert any(v.shape[2:] == (32, 4) for v in body.inputs)

"""conv-layout and pack-filters: before and after, what is carried along, and what keeps its layout."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import GraphoptError
from graphopt.ir import Builder, Graph, TensorType, dims, parse_graph, types
from graphopt.ir.interpreter import evaluate
from graphopt.pass_manager import run_passes
from graphopt.passes.fusion import Fuse
from graphopt.passes.layout import ConvLayout, PackFilters
from graphopt.passes.simplify import DeadCode, Views
from graphopt.rewrite import PassContext
from graphopt.target import Target
from graphopt.testing import check_pass

WINDOW = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
B = dims.symbol("B")

BEFORE = """
    graph @g(%x: f32[B, 4, 6, 6], weight %w: f32[8, 4, 3, 3], %b: f32[8]) -> f32[B, 8, 6, 6] where 1 <= B {
      %0: f32[B, 8, 6, 6] = conv(%x, %w) {stride = [1, 1], padding = [1, 1], dilation = [1, 1]}
      %1: f32[8, 1, 1] = reshape(%b) {shape = [8, 1, 1]}
      %2: f32[B, 8, 6, 6] = add(%0, %1)
      return %2
    }"""
AFTER = """
    graph @g(%x: f32[B, 4, 6, 6], weight %w: f32[8, 4, 3, 3], %b: f32[8]) -> f32[B, 8, 6, 6] where 1 <= B {
      %0: f32[3, 3, 4, 8] = transpose(%w) {perm = [2, 3, 1, 0]}
      %1: f32[B, 6, 6, 4] = transpose(%x) {perm = [0, 2, 3, 1]}
      %2: f32[B, 6, 6, 8] = conv(%1, %0) {stride = [1, 1], padding = [1, 1], dilation = [1, 1], channels_last = true}
      %3: f32[8, 1, 1] = reshape(%b) {shape = [8, 1, 1]}
      %4: f32[8] = reshape(%3) {shape = [8]}
      %5: f32[B, 6, 6, 8] = add(%2, %4)
      %6: f32[B, 8, 6, 6] = transpose(%5) {perm = [0, 3, 1, 2]}
      return %6
    }"""


def test_before_and_after() -> None:
    check_pass(ConvLayout(), BEFORE, AFTER)


@pytest.mark.parametrize("reused", [False, True])
def test_zeros_around_an_image_are_put_behind_its_transpose(reused: bool) -> None:
    g = Graph("g")
    b = Builder(g)
    x, w = g.add_input(TensorType(types.f32, (2, 3, 6, 5))), g.add_input(TensorType(types.f32, (8, 3, 3, 3)), weight=True)
    padded = b.pad(x, low=(0, 0, 1, 0), high=(0, 0, 2, 3), value=0.0)
    y = b.conv(padded, w, **WINDOW)
    g.set_outputs([y, padded] if reused else [y])
    (pad,) = [n for n in check_pass(ConvLayout(), g).nodes() if n.op.name == "pad"]
    assert pad.result.shape == ((2, 3, 9, 8) if reused else (2, 9, 8, 3))


def network() -> tuple[Graph, Builder]:
    g = Graph("g", {"B": dims.Range(1, None)})
    return g, Builder(g)


def inputs(g: Graph, *shapes: tuple[object, ...], weight: bool = False) -> list[object]:
    return [g.add_input(TensorType(types.f32, s), "w" if weight else "x", weight and dims.is_static(s)) for s in shapes]  # type: ignore[arg-type]


def test_a_network_runs_with_its_channels_last() -> None:
    g, b = network()
    (x,) = inputs(g, (B, 4, 8, 8))
    w1, w2, w3 = inputs(g, (8, 4, 3, 3), (8, 8, 3, 3), (8, 1, 3, 3), weight=True)
    bias, scale = inputs(g, (8, 1, 1), (1, 8, 1, 1))
    a = b.relu(b.add(b.conv(x, w1, **WINDOW), bias))
    c = b.add(b.mul(b.conv(a, w2, **WINDOW), scale), a)
    c = b.conv(c, w3, groups=8, **WINDOW)
    c = b.max_pool(c, kernel=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1))
    c = b.pad(c, low=(0, 0, 1, 2), high=(0, 0, 0, 1), value=0.0)
    c = b.concat(c, b.maximum(c, 0.5), axis=1)
    c = b.create("slice", [c], {"axis": 1, "stop": 10})
    gate = b.sigmoid(b.mean(c, axes=(2, 3), keepdims=True))
    g.set_outputs([b.mean(b.mul(c, gate), axes=(2, 3), keepdims=False)])
    after = check_pass(ConvLayout(), g)
    run_passes(after, [Views(), DeadCode()], PassContext())
    moved = [n for n in after.nodes() if n.op.name == "transpose" and not n.operands[0].weight and n.results[0].type.rank > 2]
    assert [str(n.operands[0].hint) for n in moved] == ["x"], after  # only the image; neither a result nor anything between
    assert all(n.attrs["channels_last"] for n in after.nodes() if n.op.name in ("conv", "max_pool"))


@pytest.mark.parametrize("axes", [(1,), (2,), (1, 3), (2, 3)])
def test_reductions_keep_the_order_of_axes(axes: tuple[int, ...]) -> None:
    g, b = network()
    (x,), (w,) = inputs(g, (B, 4, 8, 8)), inputs(g, (8, 4, 3, 3), weight=True)
    g.set_outputs([b.sum(b.conv(x, w, **WINDOW), axes=axes, keepdims=False)])
    check_pass(ConvLayout(), g)


def test_one_and_three_axes() -> None:
    for space in ((9,), (5, 6, 7)):
        g, b = network()
        n = len(space)
        (x,), (w,) = inputs(g, (B, 4, *space)), inputs(g, (6, 2, *[3] * n), weight=True)
        y = b.conv(x, w, stride=(2,) * n, padding=(1,) * n, dilation=(1,) * n, groups=2)
        g.set_outputs([b.relu(y)])
        check_pass(ConvLayout(), g)


@pytest.mark.parametrize("weight, reason", [((8, 4, 3, B), "unknown size"), ((8, 4, 3, 3), "")])
def test_weights_of_unknown_size_keep_the_layout(weight: tuple[object, ...], reason: str) -> None:
    g, b = network()
    (x, w) = inputs(g, (B, 4, 8, 8), weight)
    g.set_outputs([b.conv(x, w, **{**WINDOW, "padding": (9, 9)})])
    ctx = PassContext()
    assert ConvLayout().run(g, ctx) is not bool(reason)
    assert bool([r for r in ctx.remarks if r.kind == "missed" and "unknown size" in r.message]) is bool(reason)


def test_what_is_not_behind_a_convolution_stays() -> None:
    g, b = network()
    (x,) = inputs(g, (B, 4, 8, 8))
    g.set_outputs([b.max_pool(b.relu(x), kernel=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(1, 1))])
    assert not ConvLayout().run(g, PassContext())
    assert not ConvLayout().run(parse_graph(BEFORE), PassContext(target=Target("tpu", "v5")))
    assert ConvLayout().run(parse_graph(BEFORE), PassContext(target=Target.from_name("cuda:sm_90")))


# --- fuse and pack-filters -----------------------------------------------------------------------------------------------


def fused(weight: tuple[int, ...], groups: int = 1, frozen: bool = True, dtype: types.DType = types.f32) -> tuple[Graph, PassContext]:
    g, b = network()
    x = g.add_input(TensorType(dtype, (B, weight[1] * groups, 8, 8)), "x")
    w = g.add_input(TensorType(dtype, weight), "w", frozen)
    r = g.add_input(TensorType(dtype, (B, weight[0], 8, 8)), "r")
    g.set_outputs([b.relu(b.add(b.conv(x, w, groups=groups, **WINDOW), r))])
    ctx = PassContext()
    run_passes(g, [ConvLayout(), Views(), DeadCode(), Fuse()], ctx)
    return g, ctx


def test_a_convolution_takes_its_epilogue() -> None:
    g, _ = fused((8, 4, 3, 3))
    (fusion,) = [n for n in g.nodes() if n.op.name == "fusion"]
    assert fusion.attrs["kind"] == "conv"
    assert [n.op.name for n in fusion.body.nodes() if n.op.name != "transpose"] == ["conv", "add", "relu"]  # type: ignore[union-attr]


@pytest.mark.parametrize("reused", [False, True])
def test_a_convolution_takes_the_padding_of_its_image(reused: bool) -> None:
    g, b = network()
    (x,), (w,) = inputs(g, (B, 8, 8, 4)), inputs(g, (3, 3, 4, 8), weight=True)
    padded = b.pad(b.relu(x), low=(0, 0, 1, 0), high=(0, 1, 1, 0), value=0.0)
    g.set_outputs([b.conv(padded, w, channels_last=True, **WINDOW), *([b.exp(padded)] if reused else [])])
    after = check_pass(Fuse(), g)
    bodies = [[m.op.name for m in n.body.nodes()] for n in after.nodes() if n.op.name == "fusion"]  # type: ignore[union-attr]
    assert bodies == ([["relu", "pad"], ["conv"], ["exp"]] if reused else [["relu"], ["pad", "conv"]]), after


@pytest.mark.parametrize(
    "weight, groups, packed", [((7, 4, 3, 3), 1, (3, 36, 3)), ((10, 2, 3, 3), 2, (4, 18, 3)), ((4, 1, 3, 3), 4, (3, 3, 1, 4))]
)
def test_the_packed_form(weight: tuple[int, ...], groups: int, packed: tuple[int, ...]) -> None:
    g, _ = fused(weight, groups)
    after = check_pass(PackFilters(width=3), g)
    (fusion,) = [n for n in after.nodes() if n.op.name == "fusion"]
    assert packed in [v.shape for v in fusion.operands], after
    assert not any(v.weight for v in fusion.operands)


@pytest.mark.parametrize(
    "weight, groups, features, packed",
    [
        pytest.param((3, 4, 3, 3), 1, (), (3, 3, 3, 4), id="few lie one after the other"),  # with vectors along the channels
        pytest.param((8, 2, 3, 3), 4, ("avx2",), (3, 3, 2, 8), id="narrow groups"),  # a vector holds the filters of several
    ],
)
def test_filters_not_in_panels(weight: tuple[int, ...], groups: int, features: tuple[str, ...], packed: tuple[int, ...]) -> None:
    """Their views move out of the region, once."""
    g, _ = fused(weight, groups)
    ctx, before = PassContext(target=Target("cpu", "x86_64", features=features)), g.clone()
    assert PackFilters().run(g, ctx) and not PackFilters().run(g, ctx)
    (fusion,) = [n for n in g.nodes() if n.op.name == "fusion"]
    assert packed in [v.shape for v in fusion.operands] and not any(v.weight for v in fusion.operands), g
    x, w, r = (torch.randn([2 if d == B else int(d) for d in v.shape]) for v in before.inputs)
    (want,), (got,) = (evaluate(graph, [x, w, r], bindings={"B": 2}) for graph in (before, g))
    assert torch.equal(got, want)


@pytest.mark.parametrize("weight, groups", [((20, 4, 3, 3), 1), ((6, 3, 3, 3), 2)])
def test_other_filters_are_packed_in_panels(weight: tuple[int, ...], groups: int) -> None:
    g, _ = fused(weight, groups)
    assert PackFilters().run(g, PassContext(target=Target("cpu", "x86_64")))
    (fusion,) = [n for n in g.nodes() if n.op.name == "fusion"]
    assert [v.type.rank for v in fusion.operands].count(3) == 1, g


def test_what_is_no_weight_is_not_packed() -> None:
    g, _ = fused((8, 4, 3, 3), frozen=False)
    ctx = PassContext()
    assert not PackFilters(width=3).run(g, ctx) and not ctx.remarks
    g, _ = fused((8, 4, 3, 3), dtype=types.f64)
    assert not PackFilters(width=3).run(g, ctx)
    assert "only f32" in ctx.remarks[-1].message
    g, _ = fused((8, 4, 3, 3))
    assert not PackFilters().run(g, PassContext(target=Target("cuda", "sm_90")))
    with pytest.raises(GraphoptError, match="positive"):
        PackFilters(width=0).run(g, PassContext())


def test_an_output_of_one_pixel_keeps_its_rank() -> None:
    check_pass(ConvLayout(), """graph @g(%x: f32[1, 2, 3, 3], weight %w: f32[4, 2, 3, 3], weight %b: f32[4, 1, 1]) -> f32[1, 4, 1, 1] {
      %0: f32[1, 4, 1, 1] = conv(%x, %w) {stride = [1, 1], padding = [0, 0], dilation = [1, 1]}
      %1: f32[1, 4, 1, 1] = add(%0, %b)
      return %1
    }""")


@pytest.mark.parametrize("scale", ["1, 1, 1, 1", ""])
@pytest.mark.parametrize("image", ["1, 64, 1, 1", "1, 4, 1, 3", "1, 1, 4, 3", "1, 1, 1, 1", "B, 64, 1, 1"])
def test_a_rounded_image_keeps_its_rank(image: str, scale: str) -> None:
    """Though it may have the shape of a vector over the channels."""
    n, c, h, w = image.split(", ")
    after = check_pass(ConvLayout(), f"""graph @g(%x: f32[{image}], %s: f32[{scale}], weight %w: i8[8, {c}, 1, 1]) -> i32[{n}, 8, {h}, {w}]
    where 1 <= B {{
      %0: i8[{image}] = quantize(%x, %s) {{dtype = i8, bits = 8}}
      %1: i32[{n}, 8, {h}, {w}] = conv(%0, %w) {{stride = [1, 1], padding = [0, 0], dilation = [1, 1], acc = i32}}
      return %1
    }}""")
    (rounded,) = (n for n in after.nodes() if n.op.name == "quantize")
    assert rounded.operands[0].defined_by("transpose") is not None, after  # in front of it there would be a copy of the image


def test_a_channels_last_pool_of_what_a_conv_gives_stays() -> None:
    check_pass(ConvLayout(), """graph @g(%x: f32[B, 4, 6], weight %w: f32[2, 4, 1]) -> f32[B, 2, 5] where 1 <= B {
      %0: f32[B, 2, 6] = conv(%x, %w) {stride = [1], padding = [0], dilation = [1]}
      %1: f32[B, 1, 6] = max_pool(%0) {kernel = [2], stride = [1], padding = [0], dilation = [1], channels_last = true}
      %2: f32[B, 1, 5] = slice(%1) {axis = 2, stop = 5}
      %3: f32[B, 2, 5] = broadcast_to(%2) {shape = [B, 2, 5]}
      return %3
    }""")


@pytest.mark.parametrize("line", [
    "max_pool(%x) {kernel = [2], stride = [1], padding = [0], dilation = [1], channels_last = true}",  # is what it would become
    "take(%x, %i) {axis = 0}",
])  # fmt: skip
def test_what_declines_to_begin_leaves_no_transpose(line: str) -> None:
    result = "f32[3, 1, 3]" if "pool" in line else "f32[2, 2, 2, 3]"
    check_pass(ConvLayout(), f"""graph @g(%x: f32[3, 2, 3; 6, 1, 2], %i: i64[2, 2]) -> {result} {{
      %0: {result} = {line}
      return %0
    }}""", fires=False)


@pytest.mark.parametrize(("beside", "last"), [(4, True), (64, False)])
def test_the_lesser_part_of_a_concat_is_transposed(beside: int, last: bool) -> None:
    g = parse_graph(f"""graph @g(%x: f32[B, 4, 6, 6], %y: f32[B, {beside}, 6, 6], weight %w: f32[8, 4, 1, 1]) -> f32[B, {beside + 8}, 6, 6]
    where 1 <= B {{
      %0: f32[B, 8, 6, 6] = conv(%x, %w) {{stride = [1, 1], padding = [0, 0], dilation = [1, 1]}}
      %1: f32[B, {beside + 8}, 6, 6] = concat(%0, %y) {{axis = 1}}
      return %1
    }}""")
    run_passes(g, [ConvLayout()], PassContext(target=Target.from_name("cpu:znver5")))
    (concat,) = (n for n in g.nodes() if n.op.name == "concat")
    assert (concat.attrs["axis"] == 3) is last

"""quantize-products, and what fusion and packing make of it."""

from __future__ import annotations

import pytest
import torch

from graphopt.ir import Graph, evaluate, parse_graph
from graphopt.pass_manager import run_passes
from graphopt.passes.fusion.fuse import Fuse
from graphopt.passes.layout.pack_weights import PackWeights
from graphopt.passes.quantization.quantize_products import QuantizeProducts
from graphopt.passes.quantization.scheme import Scheme
from graphopt.rewrite import Numerics, PassContext
from graphopt.target import Target
from graphopt.testing import check_pass

BEFORE = """
graph @g(%x: f32[B, 64], weight %w: f32[64, 32]) -> f32[B, 32]
where 1 <= B {
  %0: f32[B, 32] = matmul(%x, %w)
  return %0
}"""
AFTER = """
graph @g(%x: f32[B, 64], weight %w: f32[64, 32]) -> f32[B, 32]
where 1 <= B {
  %0: f32[B, 64] = abs(%x)
  %1: f32[B, 1] = max(%0) {axes = [1], keepdims = true}
  %2: f32[] = constant() {value = 0.007874015748031496}
  %3: f32[B, 1] = mul(%1, %2)
  %4: f32[] = constant() {value = 1.2e-38}
  %5: f32[B, 1] = maximum(%3, %4)
  %6: i8[B, 64] = quantize(%x, %5) {dtype = i8, bits = 8}
  %7: f32[64, 32] = abs(%w)
  %8: f32[1, 32] = max(%7) {axes = [0], keepdims = true}
  %9: f32[] = constant() {value = 0.007874015748031496}
  %10: f32[1, 32] = mul(%8, %9)
  %11: f32[] = constant() {value = 1.2e-38}
  %12: f32[1, 32] = maximum(%10, %11)
  %13: i8[64, 32] = quantize(%w, %12) {dtype = i8, bits = 8}
  %14: i32[B, 32] = matmul(%6, %13) {acc = i32}
  %15: f32[B, 32] = mul(%5, %12)
  %16: f32[B, 32] = dequantize(%14, %15)
  return %16
}"""
PASS = QuantizeProducts(least=64)


def test_both_factors_in_eight_bits() -> None:
    check_pass(PASS, BEFORE, AFTER)


def test_half_a_step_of_either_factor() -> None:
    g = check_pass(PASS, BEFORE)
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 64, generator=generator), torch.randn(64, 32, generator=generator)
    x[3] = 0.0
    (y,) = evaluate(g, [x, w])
    steps = x.abs().amax(1, keepdim=True) / 127 / 2, w.abs().amax(0, keepdim=True) / 127 / 2
    limit = steps[0] * w.abs().sum(0) + (x.abs() + steps[0]).sum(1, keepdim=True) * steps[1]
    assert bool(((y - x @ w).abs() <= limit * 1.001 + 1e-6).all()) and not y[3].any()


@pytest.mark.parametrize(("change", "reason"), [
    (("f32", "bf16"), "it is of bf16"), (("weight %w", "%w"), ""), (("64", "2"), "too few elements"), (("64", "140000"), "may exceed"),
])  # fmt: skip
def test_what_is_left(change: tuple[str, str], reason: str) -> None:
    check_pass(PASS, BEFORE.replace(*change), fires=False, reason=reason or None)


GATE = """
graph @g(%x: f32[B, 64], weight %a: f32[64, 32], weight %b: f32[64, 32], weight %c: f32[64, 40]) -> (f32[B, 32], f32[B, 40])
where 1 <= B {
  %0: f32[B, 32] = matmul(%x, %a)
  %1: f32[B, 32] = silu(%0)
  %2: f32[B, 32] = matmul(%x, %b)
  %3: f32[B, 32] = mul(%1, %2)
  %4: f32[B, 40] = matmul(%x, %c)
  return %3, %4
}"""


def fused(text: str) -> Graph:
    g = check_pass(PASS, text)
    return check_pass(Fuse(), g, numerics=Numerics.BITWISE)


def test_rows_are_rounded_in_the_kernel_of_each_product() -> None:
    """Two products that meet share one rounding; another one has its own; nothing but staged nodes is left outside."""
    from graphopt.ir.stage import staged_values

    g = fused(GATE)
    regions = [n for n in g.nodes() if n.op.name == "fusion"]
    assert [r.attrs["kind"] for r in regions] == ["matmul", "matmul"]
    names = [[n.op.name for n in r.body.nodes()] for r in regions]
    assert sorted((n.count("matmul"), n.count("quantize"), n.count("max"), n.count("dequantize")) for n in names) == [
        (1, 1, 1, 1), (2, 1, 1, 2)
    ]  # fmt: skip
    staged = staged_values(g)
    assert all(staged.node(n) or n.op.name == "fusion" for n in g.nodes())


def test_on_a_gpu_rows_are_rounded_once_for_all_products() -> None:
    """A program there computes a tile, and would round what the others round, too."""
    g = check_pass(PASS, GATE)
    run_passes(g, [Fuse()], PassContext(target=Target.from_name("cuda:sm_90")))
    regions = [(n.attrs["kind"], [m.op.name for m in n.body.nodes()].count("quantize")) for n in g.nodes() if n.op.name == "fusion"]
    assert sorted(regions) == [("matmul", 0), ("matmul", 0), ("pointwise", 1), ("reduction", 0)]


NORM = """
graph @g(%x: f32[B, 64], weight %w: f32[64, 32], weight %a: f32[32], weight %c: f32[32]) -> f32[B, 32]
where 1 <= B {
  %0: f32[B, 32] = matmul(%x, %w)
  %1: f32[B, 32] = layer_norm(%0, %a, %c) {eps = 1e-05}
  return %1
}"""


def test_a_kernel_of_integers_writes_floats() -> None:
    """What follows reads no sums, and so no scales."""
    kinds = [(n.attrs["kind"], n.result.dtype.name) for n in fused(NORM).nodes() if n.op.name == "fusion"]
    assert kinds == [("matmul", "f32"), ("rowwise", "f32")]


def test_a_kernel_of_integers_writes_floats_also_in_front_of_other_pointwise_work() -> None:
    text = NORM.replace("layer_norm(%0, %a, %c) {eps = 1e-05}", "concat(%0, %1) {axis = 0}").replace(
        "  %1: f32[B, 32] = concat(%0, %1)", "  %1: f32[B, 32] = neg(%0)\n  %2: f32[2*B, 32] = concat(%0, %1)"
    ).replace("return %1", "return %2").replace("-> f32[B, 32]\nwhere", "-> f32[2*B, 32]\nwhere")  # fmt: skip
    kinds = [(n.attrs["kind"], n.result.dtype.name) for n in fused(text).nodes() if n.op.name == "fusion"]
    assert kinds == [("matmul", "f32"), ("pointwise", "f32")]


def test_integers_that_something_else_reads_are_kept_too() -> None:
    text = AFTER.replace("-> f32[B, 32]\n", "-> (f32[B, 32], i8[B, 64])\n").replace("return %16", "return %16, %6")
    g = check_pass(Fuse(), text, numerics=Numerics.BITWISE)
    assert sorted(n.attrs["kind"] for n in g.nodes() if n.op.name == "fusion") == ["matmul", "pointwise", "reduction"]


@pytest.mark.parametrize("sizes", [("64", "32"), ("70", "35")])
def test_weights_are_packed_in_fours(sizes: tuple[str, str]) -> None:
    """Rows and columns that fill no panel, too; bit for bit the same."""
    g = fused(BEFORE.replace("64", sizes[0]).replace("32", sizes[1]).replace("f" + sizes[1], "f32"))
    packed = check_pass(PackWeights(lanes=8), g, numerics=Numerics.BITWISE)
    (region,) = [n for n in packed.nodes() if n.op.name == "fusion"]
    k, n = (int(s) for s in sizes)
    assert (-(-n // 32), -(-k // 64) * 16, 32, 4) in [v.shape for v in region.operands]


def test_the_kernel_knows_the_packed_form() -> None:
    from graphopt.backends.tvm import int8form
    from graphopt.passes.layout import fours
    from graphopt.target import Target

    assert (int8form.COLUMNS, int8form.STEP) == (fours.COLUMNS, fours.DEPTH)
    g = fused(GATE)
    PackWeights(lanes=8).run(g, PassContext())
    for region in (n for n in g.nodes() if n.op.name == "fusion"):
        assert int8form.refusal(region.body, Target.from_name("cpu:znver4")) is None


def test_name_of_the_scheme() -> None:
    assert str(Scheme.parse("int8-dynamic")) == "int8-dynamic" and Scheme.parse("int8-dynamic").activations == "dynamic"
    with pytest.raises(Exception, match="-g64 is for weights alone"):
        Scheme.parse("int8-dynamic-g64")


def in_f8(text: str, dtype: str, most: float) -> str:
    """What the pass writes for floats of 8 bits."""
    text = text.replace("0.007874015748031496", str(1 / most))
    text = text.replace("i8[", f"{dtype}[").replace("dtype = i8", f"dtype = {dtype}")
    product = "  %14: i32[B, 32] = matmul(%6, %13) {acc = i32}\n"
    low = ("  %17: bf16[B, 64] = cast(%6) {dtype = bf16}\n  %18: bf16[64, 32] = cast(%13) {dtype = bf16}\n"
           "  %14: f32[B, 32] = matmul(%17, %18) {acc = f32}\n")  # fmt: skip
    assert product in text
    return text.replace(product, low)


@pytest.mark.parametrize(("dtype", "most"), [("f8e4m3", 448.0), ("f8e5m2", 57344.0)])
def test_floats_of_eight_bits(dtype: str, most: float) -> None:
    the_pass = QuantizeProducts(least=64, storage=dtype)
    g = check_pass(the_pass, BEFORE, in_f8(AFTER, dtype, most))
    check_pass(Fuse(), g, numerics=Numerics.BITWISE)
    on_tiles, in_vectors = g.clone(), g.clone()
    run_passes(on_tiles, [Fuse()], PassContext(target=Target.from_name("cpu:sapphirerapids")))
    (region,) = [n for n in on_tiles.nodes() if n.op.name == "fusion"]
    names = [n.op.name for n in region.body.nodes()]
    assert (names.count("max"), names.count("quantize"), names.count("cast"), names.count("dequantize")) == (1, 1, 1, 1)
    run_passes(in_vectors, [Fuse()], PassContext(target=Target.from_name("cpu:znver4")))  # its kernel takes rows as they are
    regions = [[n.op.name for n in r.body.nodes()] for r in in_vectors.nodes() if r.op.name == "fusion"]
    assert [("quantize" in names, "matmul" in names) for names in regions] == [(False, False), (True, False), (False, True)]
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 64, generator=generator), torch.randn(64, 32, generator=generator)
    (y,) = evaluate(g, [x, w])
    step = 2.0**-4 if dtype == "f8e4m3" else 2.0**-3  # of a number; the least ones are as good as zero
    limit = (2 * step + step * step) * (x.abs() @ w.abs()) + 1e-2
    assert bool(((y - x @ w).abs() <= limit).all()) and float((y - x @ w).norm()) > 0


def test_floats_of_eight_bits_need_products_of_bf16() -> None:
    for name, fires in (("cpu:x86-64-v4", False), ("cpu:znver4", True), ("cpu:sapphirerapids", True)):
        g, ctx = parse_graph(BEFORE), PassContext(target=Target.from_name(name))
        run_passes(g, [QuantizeProducts(least=64, storage="f8e4m3")], ctx)
        assert any(n.op.name == "quantize" for n in g.nodes()) == fires
        assert fires or any("no kernel of this target multiplies f8e4m3" in r.message for r in ctx.remarks)

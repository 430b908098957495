"""quantize-weights and pack-quantized: what they write, what they leave, and that the packed form is the same numbers."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import UsageError
from graphopt.ir import Graph, evaluate, parse_graph
from graphopt.passes.fusion.fuse import Fuse
from graphopt.passes.quantization.pack_quantized import PackQuantized
from graphopt.passes.quantization.quantize_weights import QuantizeWeights
from graphopt.passes.quantization.scheme import Scheme
from graphopt.rewrite import Numerics, PassContext
from graphopt.testing import check_pass

BEFORE = """
graph @g(%x: f32[B, 64], weight %w: f32[32, 64]) -> f32[B, 32]
where 1 <= B {
  %0: f32[64, 32] = transpose(%w) {perm = [1, 0]}
  %1: f32[B, 32] = matmul(%x, %0)
  return %1
}"""
AFTER = """
graph @g(%x: f32[B, 64], weight %w: f32[32, 64]) -> f32[B, 32]
where 1 <= B {
  %0: f32[64, 32] = transpose(%w) {perm = [1, 0]}
  %1: f32[64, 32] = abs(%0)
  %2: f32[1, 32] = max(%1) {axes = [0], keepdims = true}
  %3: f32[] = constant() {value = 0.007874015748031496}
  %4: f32[1, 32] = mul(%2, %3)
  %5: f32[] = constant() {value = 1.2e-38}
  %6: f32[1, 32] = maximum(%4, %5)
  %7: i8[64, 32] = quantize(%0, %6) {dtype = i8, bits = 8}
  %8: f32[64, 32] = dequantize(%7, %6)
  %9: f32[B, 32] = matmul(%x, %8)
  return %9
}"""


def test_a_weight_in_eight_bits() -> None:
    check_pass(QuantizeWeights(least=64), BEFORE, AFTER)


@pytest.mark.parametrize("p", [QuantizeWeights(bits=4, group=32, least=1), QuantizeWeights(bits=2, group=32, zero_points=True, least=1),
                               QuantizeWeights(bits=4, group=64, least=1), QuantizeWeights(bits=4, group=128, least=1)])  # fmt: skip
def test_groups(p: QuantizeWeights) -> None:
    """Half a step of its scale is all that an element moves by, also where the last group is not full."""
    g = check_pass(p, BEFORE.replace("64", "70"))
    w = torch.randn(32, 70, generator=torch.Generator().manual_seed(0))
    (y,) = evaluate(g, [torch.eye(70), w])
    size = -(-70 // p.group) * p.group
    rows = torch.nn.functional.pad(w.t(), (0, 0, 0, size - 70)).unflatten(0, (-1, p.group))
    span = rows.amax(1).clamp_min(0) - rows.amin(1).clamp_max(0) if p.zero_points else rows.abs().amax(1)
    steps = (1 << p.bits) - 1 if p.zero_points else (1 << (p.bits - 1)) - 1
    half = (span / steps / 2).repeat_interleave(p.group, 0)[:70]
    assert bool(((y - w.t()).abs() <= half * (2.0 if p.zero_points else 1.0) + 1e-5).all())


def test_zeros_stay_zeros() -> None:
    g = check_pass(QuantizeWeights(bits=4, group=32, zero_points=True, least=1), BEFORE)
    w = torch.randn(32, 64)
    w[3] = 0
    w[:, 10] = 0
    (y,) = evaluate(g, [torch.eye(64), w])
    assert not y[:, 3].any() and not y[10].any()


@pytest.mark.parametrize(("change", "reason"), [
    (("f32", "bf16"), "it is bf16"), (("weight %w", "%w"), ""), (("64", "2"), "fewer than"),
])  # fmt: skip
def test_what_is_left(change: tuple[str, str], reason: str) -> None:
    check_pass(QuantizeWeights(least=128), BEFORE.replace(*change), fires=False, reason=reason or None)


def test_a_weight_read_twice() -> None:
    """Each product gets a ``dequantize`` of its own, to take into its kernel; the integers are one."""
    text = BEFORE.replace("  return %1", "  %2: f32[B, 32] = relu(%1)\n"
                          "  %4: f32[B, 64] = tanh(%x)\n  %5: f32[B, 32] = matmul(%4, %0)\n"
                          "  %6: f32[B, 32] = add(%2, %5)\n  return %6")  # fmt: skip
    g = check_pass(QuantizeWeights(bits=4, group=32, least=1), text)
    assert [n.op.name for n in g.nodes()].count("dequantize") == 2
    assert [n.op.name for n in g.nodes()].count("quantize") == 1


# --- packing -------------------------------------------------------------------------------------------------------------


def fused(p: QuantizeWeights, before: str = BEFORE) -> Graph:
    g = parse_graph(before)
    p.run(g, PassContext())
    Fuse().run(g, PassContext())
    return g


def test_dequantize_goes_into_the_kernel() -> None:
    g = fused(QuantizeWeights(bits=4, group=32, least=1))
    (region,) = [n for n in g.nodes() if n.op.name == "fusion"]
    assert region.body is not None and region.attrs["kind"] == "matmul"
    assert "dequantize" in [n.op.name for n in region.body.nodes()] and "dequantize" not in [n.op.name for n in g.nodes()]


@pytest.mark.parametrize("p", [QuantizeWeights(least=1), QuantizeWeights(zero_points=True, least=1),
                               QuantizeWeights(bits=4, group=32, least=1), QuantizeWeights(bits=2, group=64, zero_points=True, least=1),
                               QuantizeWeights(bits=4, least=1), QuantizeWeights(bits=8, group=32, least=1)])  # fmt: skip
@pytest.mark.parametrize("sizes", [("64", "32"), ("70", "35")])
def test_packed_form(p: QuantizeWeights, sizes: tuple[str, str]) -> None:
    """Columns and rows that fill no panel, too; bit for bit the same."""
    g = fused(p, BEFORE.replace("64", sizes[0]).replace("32", sizes[1]).replace("f" + sizes[1], "f32"))
    packed = check_pass(PackQuantized(lanes=8), g, numerics=Numerics.BITWISE)
    (region,) = [n for n in packed.nodes() if n.op.name == "fusion"]
    k, n, per = int(sizes[0]), int(sizes[1]), 32 // p.bits if p.bits < 8 else 1
    rows = -(-k // p.group) * p.group if p.group else -(-k // per) * per
    assert next(v for v in region.operands if v.dtype.is_integer).shape == (-(-n // 32), rows // per, 32)


MODEL = """
graph @g(%x: f32[B, 64], weight %q: i8[32, 64], weight %s: f32[32, 1]) -> f32[B, 32]
where 1 <= B {
  %0: f32[32, 64] = dequantize(%q, %s)
  %1: f32[64, 32] = transpose(%0) {perm = [1, 0]}
  %2: f32[B, 32] = matmul(%x, %1)
  return %2
}"""


def test_a_model_that_is_quantized_already() -> None:
    """Rows of its own layout, scales beside them: read through a transpose."""
    g = parse_graph(MODEL)
    Fuse().run(g, PassContext())
    packed = check_pass(PackQuantized(lanes=8), g, numerics=Numerics.BITWISE)
    assert [v.shape for n in packed.nodes() if n.op.name == "fusion" for v in n.operands if v.type.rank == 3] == [(1, 64, 32), (1, 1, 32)]


@pytest.mark.parametrize(("change", "reason"), [
    (("%s: f32[32, 1]", "%s: f32[64]"), "differ from row to row"), (("32", "4"), "do not fill a vector register"),
])  # fmt: skip
def test_what_is_not_packed(change: tuple[str, str], reason: str) -> None:
    g = parse_graph(MODEL.replace(*change).replace("f4[", "f32["))
    Fuse().run(g, PassContext())
    check_pass(PackQuantized(lanes=8), g, fires=False, reason=reason)


def test_dequantized_weights_are_not_kept() -> None:
    from graphopt.ir.stage import staged_values

    g = parse_graph(MODEL)
    assert not [n for n in g.nodes() if staged_values(g).node(n)]


# --- schemes -------------------------------------------------------------------------------------------------------------


def test_names_of_schemes() -> None:
    assert Scheme.parse("int8-weight") == Scheme("int8-weight", 8)
    assert Scheme.parse("int4-weight-g128-zp") == Scheme("int4-weight", 4, 128, True)
    floats = ("fp8-e5m2-weight", "fp8-e4m3-weight-g64")
    for name in ("int8-weight", "int4-weight", "int4-weight-g32", "int4-weight-g128-zp", "int2-weight", *floats):
        assert str(Scheme.parse(name)) == name
    with pytest.raises(UsageError, match="int4-weight"):
        Scheme.parse("int4-weigth")
    with pytest.raises(UsageError, match="not 33"):
        Scheme.parse("int4-weight-g33")

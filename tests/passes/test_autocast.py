"""autocast: what goes low, where casts stand, what is left, and what fusion and packing make of it."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import UsageError
from graphopt.ir import evaluate, parse_graph
from graphopt.options import Options
from graphopt.pass_manager import run_passes
from graphopt.passes.fusion.fuse import Fuse
from graphopt.passes.layout.pack_weights import PackWeights
from graphopt.passes.precision.autocast import Autocast
from graphopt.rewrite import Numerics, PassContext
from graphopt.target import Target
from graphopt.testing import check_pass

BEFORE = """
graph @g(%x: f32[B, 64], weight %w: f32[64, 32], weight %b: f32[32]) -> f32[B, 32]
where 1 <= B {
  %0: f32[B, 32] = matmul(%x, %w)
  %1: f32[B, 32] = add(%0, %b)
  return %1
}"""
AFTER = """
graph @g(%x: f32[B, 64], weight %w: f32[64, 32], weight %b: f32[32]) -> f32[B, 32]
where 1 <= B {
  %0: bf16[B, 64] = cast(%x) {dtype = bf16}
  %1: bf16[64, 32] = cast(%w) {dtype = bf16}
  %2: f32[B, 32] = matmul(%0, %1) {acc = f32}
  %3: f32[B, 32] = add(%2, %b)
  return %3
}"""


def test_a_product_goes_low_and_its_sum_stays() -> None:
    check_pass(Autocast(), BEFORE, AFTER)
    check_pass(Autocast(dtype="f16"), BEFORE, AFTER.replace("bf16", "f16"))


@pytest.mark.parametrize(("change", "reason"), [
    (("weight %w", "%w"), "both factors are computed"), (("64", "4"), "elements, fewer than"), (("f32", "bf16"), None),
    (("f32", "f64"), None),
])  # fmt: skip
def test_what_is_left(change: tuple[str, str], reason: str | None) -> None:
    check_pass(Autocast(), BEFORE.replace(*change), fires=False, reason=reason)


def test_a_target_that_multiplies_no_bf16() -> None:
    for name, fires in (("cpu:znver3", False), ("cpu:znver4", True), ("cpu:sapphirerapids", True)):
        g, ctx = parse_graph(BEFORE), PassContext(target=Target.from_name(name))
        run_passes(g, [Autocast()], ctx)
        assert any(n.op.name == "cast" for n in g.nodes()) == fires
        assert fires or any("no instructions that multiply bf16" in r.message for r in ctx.remarks)


HEADS = """
graph @g(%x: f32[1, S, 64], weight %w: f32[64, 192], weight %o: f32[64, 64]) -> f32[1, S, 64]
where 1 <= S {
  %0: f32[1, S, 192] = matmul(%x, %w)
  %1: f32[1, S, 64] = slice(%0) {axis = 2, start = 0, stop = 64}
  %2: f32[1, S, 4, 16] = reshape(%1) {shape = [1, S, 4, 16]}
  %3: f32[1, 4, S, 16] = transpose(%2) {perm = [0, 2, 1, 3]}
  %4: f32[1, S, 64] = slice(%0) {axis = 2, start = 64, stop = 128}
  %5: f32[1, S, 4, 16] = reshape(%4) {shape = [1, S, 4, 16]}
  %6: f32[1, 4, S, 16] = transpose(%5) {perm = [0, 2, 1, 3]}
  %7: f32[1, S, 64] = slice(%0) {axis = 2, start = 128, stop = 192}
  %8: f32[1, S, 4, 16] = reshape(%7) {shape = [1, S, 4, 16]}
  %9: f32[1, 4, S, 16] = transpose(%8) {perm = [0, 2, 1, 3]}
  %10: f32[1, 4, S, 16] = attention(%3, %6, %9) {scale = 0.25}
  %11: f32[1, S, 4, 16] = transpose(%10) {perm = [0, 2, 1, 3]}
  %12: f32[1, S, 64] = reshape(%11) {shape = [1, S, 64]}
  %13: f32[1, S, 64] = matmul(%12, %o)
  return %13
}"""


def test_no_value_is_rounded_twice_or_widened_to_be_rounded() -> None:
    """Queries, keys and values are rounded where their product is written, the attention's result by the attention."""
    g = check_pass(Autocast(), HEADS)
    casts = [(n.operands[0].dtype.name, n.result.dtype.name) for n in g.nodes() if n.op.name == "cast"]
    assert casts == [("f32", "bf16")] * 4  # x, two weights, and what the attention reads
    fused = check_pass(Fuse(), g, numerics=Numerics.BITWISE)
    kinds = [(n.attrs["kind"], n.result.dtype.name) for n in fused.nodes() if n.op.name == "fusion"]
    assert kinds == [("matmul", "bf16"), ("attention", "bf16"), ("matmul", "f32")]


def test_keys_of_a_cache_stay() -> None:
    text = HEADS.replace("%x: f32[1, S, 64],", "%x: f32[1, S, 64], %c: f32[1, 4, S, 16],").replace("attention(%3, %6,", "attention(%3, %c,")
    g = check_pass(Autocast(), text, reason="read from a cache")
    assert [n.result.dtype.name for n in g.nodes() if n.op.name == "attention"] == ["f32"]


GATE = """
graph @g(%x: f32[B, 64], weight %a: f32[64, 32], weight %c: f32[64, 32], weight %d: f32[32, 64], weight %n: f32[64]) -> f32[B, 64]
where 1 <= B {
  %0: f32[B, 64] = rms_norm(%x, %n) {eps = 1e-05}
  %1: f32[B, 32] = matmul(%0, %a)
  %2: f32[B, 32] = silu(%1)
  %3: f32[B, 32] = matmul(%0, %c)
  %4: f32[B, 32] = mul(%2, %3)
  %5: f32[B, 64] = matmul(%4, %d)
  %6: f32[B, 64] = add(%x, %5)
  return %6
}"""


def test_rounding_joins_the_kernel_before_or_that_of_the_product() -> None:
    g = check_pass(Autocast(least=64), GATE)
    fused = check_pass(Fuse(), g, numerics=Numerics.BITWISE)
    kinds = [(n.attrs["kind"], n.result.dtype.name) for n in fused.nodes() if n.op.name == "fusion"]
    assert kinds == [("rowwise", "f32"), ("matmul", "bf16"), ("matmul", "f32")]
    ctx = PassContext(target=Target.from_name("cpu:sapphirerapids"))
    run_passes(fused, [PackWeights()], ctx)
    ranks = [[v.type.rank for v in n.operands] for n in fused.nodes() if n.op.name == "fusion" and n.attrs["kind"] == "matmul"]
    assert [r.count(4) for r in ranks] == [2, 1]


def test_the_error_is_that_of_rounded_factors() -> None:
    g = check_pass(Autocast(), BEFORE)
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=generator) for s in ((9, 64), (64, 32), (32,)))
    (y,), true = evaluate(g, [x, w, b]), x.double() @ w.double() + b.double()
    with torch.autocast("cpu", torch.bfloat16):
        eager = torch.nn.functional.linear(x, w.t(), b)
    assert (y - true).norm() < (eager.double() - true).norm()


def test_the_option() -> None:
    with pytest.raises(UsageError, match="bf16"):
        Options(precision="bfloat16")

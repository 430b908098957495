"""pack-weights: the packed form, and which weights are left."""

from __future__ import annotations

import pytest
from fusing import assert_same_values, run
from models import bert, llama

from graphopt.errors import UsageError
from graphopt.ir import Graph, parse_graph
from graphopt.pass_manager import run_passes
from graphopt.passes.expand import Expand
from graphopt.passes.fusion import Fuse
from graphopt.passes.layout import PackWeights
from graphopt.rewrite import PassContext
from graphopt.target import Target
from graphopt.testing import check_pass

BEFORE = """
    graph @g(%x: f32[B, 4], weight %w: f32[8, 4], %b: f32[8]) -> f32[B, 8] where 1 <= B {
      %0: f32[B, 8] = fusion(%x, %w, %b) {kind = "matmul"} body (%x: f32[B, 4], %w: f32[8, 4], %b: f32[8]) -> f32[B, 8] where 1 <= B {
        %0: f32[4, 8] = transpose(%w) {perm = [1, 0]}
        %1: f32[B, 8] = matmul(%x, %0)
        %2: f32[B, 8] = add(%1, %b)
        return %2
      }
      return %0
    }"""
AFTER = """
    graph @g(%x: f32[B, 4], weight %w: f32[8, 4], %b: f32[8]) -> f32[B, 8] where 1 <= B {
      %0: f32[4, 8] = transpose(%w) {perm = [1, 0]}
      %1: f32[4, 12] = pad(%0) {low = [0, 0], high = [0, 4]}
      %2: f32[4, 2, 6] = reshape(%1) {shape = [4, 2, 6]}
      %3: f32[2, 4, 6] = transpose(%2) {perm = [1, 0, 2]}
      %4: f32[B, 8] = fusion(%x, %3, %b) {kind = "matmul"} body (%x: f32[B, 4], %w: f32[2, 4, 6], %b: f32[8]) -> f32[B, 8] where 1 <= B {
        %0: f32[4, 2, 6] = transpose(%w) {perm = [1, 0, 2]}
        %1: f32[4, 12] = reshape(%0) {shape = [4, 12]}
        %2: f32[4, 8] = slice(%1) {axis = 1, stop = 8}
        %3: f32[B, 8] = matmul(%x, %2)
        %4: f32[B, 8] = add(%3, %b)
        return %4
      }
      return %4
    }"""


def test_before_and_after() -> None:
    check_pass(PackWeights(lanes=2), BEFORE, AFTER)


def packed(text: str, lanes: int = 2) -> tuple[Graph, list[str]]:
    g = parse_graph(text)
    ctx = run(g, [Fuse(), PackWeights(lanes=lanes)])
    return g, [r.message for r in ctx.remarks if r.kind == "missed" and r.pass_name == "pack-weights"]


def matmul(inputs: str, w: str, result: str, extra: str = "") -> str:
    return f"graph @g({inputs}) -> {result} where 1 <= B {{\n{extra}\n %r: {result} = matmul(%x, {w})\n return %r }}"


def test_a_weight_of_two_matmuls_is_packed_once_and_an_exact_fit_needs_no_padding() -> None:
    g, missed = packed("""
        graph @g(%x: f32[B, 4], %y: f32[B, 4], weight %w: f32[4, 6]) -> (f32[B, 6], f32[B, 6]) where 1 <= B {
          %0: f32[B, 6] = matmul(%x, %w)
          %1: f32[B, 6] = matmul(%y, %w)
          return %0, %1
        }""")
    assert [n.op.name for n in g.nodes()] == ["reshape", "transpose", "fusion", "fusion"] and not missed


def test_a_weight_that_the_epilogue_reads_too_is_kept() -> None:
    g, _ = packed("""
        graph @g(%x: f32[6, 6], weight %w: f32[6, 6]) -> f32[6, 6] {
          %0: f32[6, 6] = transpose(%w) {perm = [1, 0]}
          %1: f32[6, 6] = matmul(%x, %0)
          %2: f32[6, 6] = add(%1, %w)
          %3: f32[6, 6] = add(%2, %0)
          return %3
        }""")
    region = next(n for n in g.nodes() if n.body is not None)
    assert [v.type.rank for v in region.operands].count(3) == 1 and len(region.operands) == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (matmul("%x: f32[B, 4], %w: f32[4, 8]", "%w", "f32[B, 8]"), None),
        (matmul("%x: f16[B, 4], weight %w: f16[4, 8]", "%w", "f16[B, 8]"), "only f32"),
        (matmul("%x: f32[B, 3, 4], weight %w: f32[5, 4, 8]", "%v", "f32[1, 3, 8]",
                "%v: f32[1, 4, 8] = slice(%w) {axis = 0, stop = 1}").replace("f32[B, 3, 4]", "f32[1, 3, 4]"), "batch of matrices"),
        (matmul("%x: f32[B, 4], weight %w: f32[4, 1]", "%w", "f32[B, 1]"), "do not fill a vector register"),
        (matmul("%x: f32[B, 4], weight %w: f32[32]", "%v", "f32[B, 8]", "%v: f32[4, 8] = reshape(%w) {shape = [4, 8]}"), "more views"),
    ],
)  # fmt: skip
def test_declines(text: str, reason: str | None) -> None:
    g, missed = packed(text)
    assert all(n.op.name != "pad" for n in g.nodes())
    assert not missed if reason is None else reason in missed[0]


def test_lanes_come_from_the_target() -> None:
    g = parse_graph(BEFORE)
    run_passes(g, [PackWeights()], PassContext(target=Target("cpu", "x86_64", features=("avx512f",))))
    assert not any(n.op.name == "pad" for n in g.nodes())  # 8 columns do not fill 16 lanes
    run_passes(g, [PackWeights()], PassContext(target=Target("cpu", "x86_64", features=("avx2",))))
    assert next(n for n in g.nodes() if n.body is not None).operands[1].shape == (1, 4, 16)  # two registers of eight
    g = parse_graph(BEFORE)
    assert not run_passes(g, [PackWeights()], ctx := PassContext(target=Target("cuda", "sm_90")))
    assert ctx.remarks[0].kind == "analysis"
    with pytest.raises(UsageError, match="lanes"):
        run_passes(g, [PackWeights(lanes=0)])


@pytest.mark.parametrize("model", [bert, llama])
def test_models(model: object) -> None:
    g = model(2, symbolic=True)  # type: ignore[operator]
    before = g.clone()
    run_passes(g, [Expand(), Fuse(), PackWeights(lanes=4)])
    assert_same_values(before, g)
    weights = sum(v.weight and v.type.rank == 2 for v in g.inputs)
    assert sum(n.op.name == "pad" or n.op.name == "reshape" for n in g.nodes()) >= weights


def test_both_weights_of_a_gate_are_packed() -> None:
    g, missed = packed("""
        graph @g(%x: f32[B, 4], weight %a: f32[8, 4], weight %b: f32[4, 8]) -> f32[B, 8] where 1 <= B {
          %t: f32[4, 8] = transpose(%a) {perm = [1, 0]}
          %0: f32[B, 8] = matmul(%x, %t)
          %1: f32[B, 8] = silu(%0)
          %2: f32[B, 8] = matmul(%x, %b)
          %3: f32[B, 8] = mul(%1, %2)
          return %3
        }""")  # fmt: skip
    (region,) = [n for n in g.nodes() if n.op.name == "fusion"]
    assert not missed and [str(v.type) for v in region.operands if v.type.rank == 3] == ["f32[2, 4, 6]", "f32[2, 4, 6]"]


def half(k: int, n: int) -> Graph:
    return parse_graph(matmul(f"%x: bf16[B, {k}], weight %w: bf16[{k}, {n}]", "%w", f"bf16[B, {n}]"))


@pytest.mark.parametrize("k, n", [(64, 96), (33, 40)])
def test_bf16_is_packed_in_pairs(k: int, n: int) -> None:
    g = half(k, n)
    before = g.clone()
    run_passes(g, [Fuse(), PackWeights()], ctx := PassContext(target=Target.from_name("cpu:sapphirerapids")))
    (region,) = [node for node in g.nodes() if node.body is not None]
    assert region.operands[1].shape == (-(-n // 32), -(-k // 32) * 16, 32, 2)
    assert "in pairs" in next(r.message for r in ctx.remarks if r.pass_name == "pack-weights")
    assert_same_values(before, g)
    assert not run_passes(g, [PackWeights()], PassContext(target=Target.from_name("cpu:sapphirerapids")))  # it has settled


@pytest.mark.parametrize(("target", "k", "n", "reason"), [
    ("x86-64-v4", 64, 96, "dtype bf16"), ("neoverse-v2", 64, 96, "dtype bf16"), ("znver4", 16, 96, "pairs"), ("znver4", 64, 8, "pairs"),
])  # fmt: skip
def test_bf16_stays_where_pairs_do_not_pay(target: str, k: int, n: int, reason: str) -> None:
    g = half(k, n)
    run_passes(g, [Fuse(), PackWeights()], ctx := PassContext(target=Target.from_name(f"cpu:{target}")))
    assert any(reason in r.message for r in ctx.remarks if r.kind == "missed")
    assert all(node.op.name != "reshape" for node in g.nodes())


@pytest.mark.parametrize(("columns", "owned", "width"), [(512, False, 48), (512, True, 32), (768, True, 48), (50257, True, 48)])
def test_panels_are_narrower_where_memory_counts_and_that_pads_less(columns: int, owned: bool, width: int) -> None:
    g = parse_graph(matmul(f"%x: f32[B, 64], weight %w: f32[64, {columns}]", "%w", f"f32[B, {columns}]"))
    ctx = PassContext(target=Target.from_name("cpu:znver4:2"), owns_weights=owned)
    run_passes(g, [Fuse(), PackWeights()], ctx)
    (region,) = (n for n in g.nodes() if n.op.name == "fusion")
    assert width in [v.shape[-1] for v in region.operands]

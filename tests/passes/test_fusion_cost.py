"""The cost model: what it counts, and the choices of fusion that follow from it."""

from __future__ import annotations

import pytest
from fusing import regions

from graphopt.ir import parse_graph
from graphopt.ir.dims import Range, symbol
from graphopt.pass_manager import run_passes
from graphopt.passes.fusion import Fuse
from graphopt.passes.fusion.cost import LARGE, LAUNCH, CostModel, Load, Price
from graphopt.rewrite import PassContext
from graphopt.target import Target
from graphopt.testing import check_pass

WIDE, NARROW = Target.from_name("cpu:znver5:2"), Target.from_name("cpu:neoverse-n1:2")


def fuse(text: str, target: Target | None = WIDE) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Regions, and the reasons of what was declined."""
    g, ctx = parse_graph(text), PassContext(target=target)
    run_passes(g, [Fuse()], ctx)
    return regions(g), [r.message for r in ctx.remarks if r.kind == "missed"]


# --- the model ---------------------------------------------------------------------------------------------------------


def test_balance_follows_from_the_target() -> None:
    assert WIDE.flops_per_cycle == 64 and WIDE.balance == 16
    assert NARROW.flops_per_cycle == 16 and NARROW.balance == 4


def test_sizes_are_looked_at_where_they_are_least_and_largest() -> None:
    model = CostModel(WIDE, {"B": Range(1, 16), "S": Range(2, None)})
    b, s = symbol("B"), symbol("S")
    assert model.amount(7) == (7, 7)
    assert model.amount(3 * b * s) == (6, 3 * 16 * LARGE)


def test_a_kernel_is_as_slow_as_the_slower_of_its_arithmetic_and_its_traffic() -> None:
    assert Load((5.0, 1.0), (3.0, 4.0)).time == (5.0, 4.0)


def test_what_does_not_stay_in_a_cache_moves_slower() -> None:
    g = parse_graph("graph @g(%x: f32[1024], %y: f32[64, 1048576]) -> f32[1024] { return %x }")
    small, large = g.inputs
    model = CostModel(WIDE, {})
    a_kilobyte = [model.traffic([v]).traffic[0] / int(v.type.nbytes()) for v in (small, large)]
    assert a_kilobyte[1] > 4 * a_kilobyte[0]


def test_arithmetic_takes_less_on_wide_vectors_and_functions_of_f64_on_none() -> None:
    g = parse_graph("graph @g(%x: f32[1024], %y: f64[1024]) -> (f32[1024], f64[1024], i64[1024]) {\n"
                    " %0: f32[1024] = sin(%x)\n %1: f64[1024] = sin(%y)\n %2: i64[1024] = iota() {size = 1024}\n"
                    " %3: i64[] = constant() {value = 7, dtype = i64}\n %4: i64[1024] = remainder(%2, %3)\n"
                    " return %0, %1, %4 }")  # fmt: skip
    sin, called, *_, remainder = g.nodes()
    wide, narrow = CostModel(WIDE, {}), CostModel(NARROW, {})
    assert narrow.work(sin).work[0] == 4 * wide.work(sin).work[0]
    assert narrow.work(called).work == wide.work(called).work
    assert wide.work(remainder).work < wide.work(sin).work < wide.work(called).work


@pytest.mark.parametrize(
    ("costs", "saves", "pays"),
    [((1.0, 1.0), (2.0, 2.0), True), ((3.0, 3.0), (2.0, 2.0), False), ((0.0, 9.0), (5.0, 5.0), True), ((0.0, 11.0), (5.0, 5.0), False)],
)
def test_the_choice_is_less_wrong_at_its_worse_end(costs: tuple[float, float], saves: tuple[float, float], pays: bool) -> None:
    assert Price(costs, saves).pays is pays


def test_a_launch_is_saved_at_least() -> None:
    g = parse_graph("graph @g(%x: f32[8]) -> f32[8] {\n %0: f32[8] = exp(%x)\n return %0 }")
    model, (exp,) = CostModel(WIDE, {}), list(g.nodes())
    price, _ = model.join(Load(), exp, 80, (0.0, 0.0))
    assert price.pays and price.saves[0] > LAUNCH


# --- work below a broadcast ----------------------------------------------------------------------------------------------

BROADCAST = """graph @g(%x: f32[{rows}, 1], %y: f32[{rows}, {columns}]) -> f32[{rows}, {columns}] {where} {{
  %0: f32[{rows}, 1] = {op}(%x)
  %1: f32[{rows}, {columns}] = mul(%0, %y)
  return %1
}}"""
TOGETHER, APART = [["exp", "mul"]], [["exp"], ["mul"]]


@pytest.mark.parametrize(
    ("rows", "columns", "where", "expected"),
    [
        (4, 8, "", TOGETHER),  # a launch costs more than computing it eight times
        (4096, 64, "", APART),
        ("B", 8, "where 1 <= B <= 16", TOGETHER),
        ("B", 64, "where 1 <= B", APART),  # a launch is lost where B is small, much more is won where it is large
    ],
)
def test_dear_work_below_a_broadcast(rows: object, columns: int, where: str, expected: list[list[str]]) -> None:
    found, missed = fuse(BROADCAST.format(rows=rows, columns=columns, where=where, op="exp"))
    assert [ops for _, ops in found] == expected
    assert bool(missed) == (expected == APART)


def test_a_remark_has_the_numbers() -> None:
    _, missed = fuse(BROADCAST.format(rows=4096, columns=64, where="", op="exp"))
    (message,) = missed
    assert message.startswith("exp is not fused with its reader: it would recompute exp 64x over 16.0 KB, costs ")
    assert " us, saves " in message


def test_cheap_work_hides_behind_what_waits_for_memory() -> None:
    """Adding costs an instruction, multiplying what streams from memory waits for much longer."""
    found, missed = fuse(BROADCAST.format(rows=16384, columns=2048, where="", op="neg"))
    assert [ops for _, ops in found] == [["neg", "mul"]] and not missed


def test_before_and_after_of_a_broadcast() -> None:
    text = BROADCAST.format(rows="B", columns=8, where="where 1 <= B <= 16", op="exp")
    check_pass(Fuse(), text, """graph @g(%x: f32[B, 1], %y: f32[B, 8]) -> f32[B, 8] where 1 <= B <= 16 {
      %0: f32[B, 8] = fusion(%x, %y) body (%x: f32[B, 1], %y: f32[B, 8]) -> f32[B, 8] where 1 <= B <= 16 {
        %0: f32[B, 1] = exp(%x)
        %1: f32[B, 8] = mul(%0, %y)
        return %1
      }
      return %0
    }""")  # fmt: skip


def test_a_chain_of_cheap_steps_is_cut_where_it_costs_as_much_as_a_cut() -> None:
    """In the cache nothing is waited for: each step below the broadcast is paid for."""
    steps = "\n".join(f"%{i + 1}: f32[512, 1] = {'neg' if i % 2 else 'abs'}(%{i})" for i in range(40))
    found, missed = fuse(f"""graph @g(%x: f32[512, 1], %y: f32[512, 512]) -> f32[512, 512] {{
      %0: f32[512, 1] = neg(%x)
      {steps}
      %a: f32[512, 512] = mul(%40, %y)
      return %a
    }}""")
    assert len(found) == 2 and len(missed) == 1
    assert 2 < len(found[1][1]) < 40


# --- index maps, factors, few rows ---------------------------------------------------------------------------------------

FLIPPED = """graph @g(%x: f32[{n}, 64]) -> f32[{n}, 64] {{
  %0: f32[{n}, 64] = tanh(%x)
  %1: f32[{n}, 64] = flip(%0) {{axes = [1]}}
  %2: f32[{n}, 64] = add(%0, %1)
  return %2
}}"""


def test_dear_work_through_two_index_maps() -> None:
    assert [ops for _, ops in fuse(FLIPPED.format(n=4))[0]] == [["tanh", "flip", "add"]]
    found, missed = fuse(FLIPPED.format(n=4096))
    assert [ops for _, ops in found] == [["tanh"], ["flip", "add"]] and "recompute tanh 2x over 1.0 MB" in missed[0]


FACTOR = """graph @g(%x: f32[{m}, 64], weight %w: f32[64, {n}]) -> f32[{m}, {n}] {{
  %0: f32[{m}, 64] = relu(%x)
  %1: f32[{m}, {n}] = matmul(%0, %w)
  return %1
}}"""


def test_work_before_a_product_is_done_for_each_of_its_tiles() -> None:
    assert fuse(FACTOR.format(m=4, n=10))[0] == [("matmul", ["relu", "matmul"])]
    found, missed = fuse(FACTOR.format(m=512, n=4800))
    assert [kind for kind, _ in found] == ["pointwise", "matmul"] and "recompute relu 100x over 128.0 KB" in missed[0]


def test_what_can_follow_a_product_does_not_precede_the_next_one() -> None:
    """A bias costs nothing in the kernel that it follows; taken by the next one it would save no launch."""
    found, missed = fuse("""graph @g(%x: f32[4, 8], weight %a: f32[8, 8], weight %b: f32[8, 8], weight %c: f32[8]) -> f32[4, 8] {
      %0: f32[4, 8] = matmul(%x, %a)
      %1: f32[4, 8] = add(%0, %c)
      %2: f32[4, 8] = matmul(%1, %b)
      return %2
    }""")
    assert found == [("matmul", ["matmul", "add"]), ("matmul", ["matmul"])]
    assert any("follows matmul without a pass over memory" in m for m in missed)


ROW = """graph @g(%x: f32[{rows}, {columns}]) -> f32[{rows}, {columns}] {{
  %0: f32[{rows}, 1] = sum(%x) {{axes = [1], keepdims = true}}
  %1: f32[{rows}, {columns}] = div(%x, %0)
  return %1
}}"""


def test_few_rows_stay_together_where_a_launch_costs_more_than_a_core() -> None:
    assert [kind for kind, _ in fuse(ROW.format(rows=1, columns=1000))[0]] == ["rowwise"]
    found, missed = fuse(ROW.format(rows=1, columns=1000000))
    assert [kind for kind, _ in found] == ["reduction", "pointwise"] and "too few to spread" in missed[0]
    assert [kind for kind, _ in fuse(ROW.format(rows=64, columns=1000000))[0]] == ["rowwise"]

"""share-packed: a weight that is multiplied and looked up is read from its packed form alone; and what keeps the plain one."""

from __future__ import annotations

from graphopt.ir import parse_graph
from graphopt.passes.fusion import Fuse
from graphopt.passes.layout import PackWeights, SharePacked
from graphopt.rewrite import PassContext
from graphopt.testing import check_pass

PACKED = """
      %0: f32[4, 40] = transpose(%w) {perm = [1, 0]}
      %1: f32[4, 42] = pad(%0) {low = [0, 0], high = [0, 2]}
      %2: f32[4, 7, 6] = reshape(%1) {shape = [4, 7, 6]}
      %3: f32[7, 4, 6] = transpose(%2) {perm = [1, 0, 2]}"""
PRODUCT = """
      %5: f32[B, 40] = fusion(%4, %3) {kind = "matmul"} body (%x: f32[B, 4], %w: f32[7, 4, 6]) -> f32[B, 40] where 1 <= B {
        %0: f32[4, 7, 6] = transpose(%w) {perm = [1, 0, 2]}
        %1: f32[4, 42] = reshape(%0) {shape = [4, 42]}
        %2: f32[4, 40] = slice(%1) {axis = 1, stop = 40}
        %3: f32[B, 40] = matmul(%x, %2)
        return %3
      }
      return %5
    }"""
HEAD = "graph @g(%i: i64[B], weight %w: f32[40, 4]) -> f32[B, 40] where 1 <= B {"
BEFORE = f"""{HEAD}
      %4: f32[B, 4] = fusion(%w, %i) {{kind = "pointwise"}} body (%w: f32[40, 4], %i: i64[B]) -> f32[B, 4] where 1 <= B {{
        %0: f32[B, 4] = take(%w, %i)
        return %0
      }}{PACKED}{PRODUCT}"""
AFTER = f"""{HEAD}{PACKED}
      %4: f32[B, 4] = fusion(%3, %i) {{kind = "pointwise"}} body (%w: f32[7, 4, 6], %i: i64[B]) -> f32[B, 4] where 1 <= B {{
        %0: f32[4, 7, 6] = transpose(%w) {{perm = [1, 0, 2]}}
        %1: f32[4, 42] = reshape(%0) {{shape = [4, 42]}}
        %2: f32[4, 40] = slice(%1) {{axis = 1, stop = 40}}
        %3: f32[40, 4] = transpose(%2) {{perm = [1, 0]}}
        %4: f32[B, 4] = take(%3, %i)
        return %4
      }}{PRODUCT}"""


def test_before_and_after() -> None:
    check_pass(SharePacked(owned=True), BEFORE, AFTER)


def test_nothing_is_shared_where_the_plain_weight_stays_anyway() -> None:
    check_pass(SharePacked(), BEFORE, fires=False)
    assert SharePacked().run(parse_graph(BEFORE), PassContext(owns_weights=True))


def test_a_lookup_of_more_lines_than_the_weight_is_declined() -> None:
    few = BEFORE.replace("[B", "[2").replace(" where 1 <= B", "")
    check_pass(SharePacked(owned=True), few)
    check_pass(SharePacked(owned=True), few.replace("[2", "[3"), fires=False, reason="more than the whole weight")
    some = BEFORE.replace("1 <= B", "3 <= B")
    check_pass(SharePacked(owned=True), some, fires=False, reason="more than the whole weight")


def test_another_reader_keeps_the_plain_weight() -> None:
    g = parse_graph("""
        graph @g(%i: i64[B], %v: f32[40, 4], weight %w: f32[40, 4]) -> (f32[B, 40], f32[40, 4]) where 1 <= B {
          %y: f32[40, 4] = add(%w, %v)
          %x: f32[B, 4] = take(%w, %i)
          %t: f32[4, 40] = transpose(%w) {perm = [1, 0]}
          %r: f32[B, 40] = matmul(%x, %t)
          return %r, %y
        }""")
    ctx = PassContext()
    assert Fuse().run(g, ctx) and PackWeights(lanes=2).run(g, ctx)
    check_pass(SharePacked(owned=True), g, fires=False, reason="stays in memory twice")


def test_a_plain_matrix_and_a_weight_without_another_reader_are_left_in_silence() -> None:
    g = parse_graph(f"{HEAD.replace('%i: i64[B]', '%4: f32[B, 4]')}{PACKED}{PRODUCT}")
    ctx = PassContext()
    assert not SharePacked(owned=True).run(g, ctx) and not ctx.remarks
    crooked = parse_graph(BEFORE.replace("low = [0, 0], high = [0, 2]", "low = [0, 2], high = [0, 0]"))
    assert not SharePacked(owned=True).run(crooked, ctx)


def test_all_that_a_region_reads_of_a_weight_that_it_is_given_twice_must_be_lookups() -> None:
    again = "%1: f32[B, 4] = take(%v, %i)"
    given = BEFORE.replace("fusion(%w, %i)", "fusion(%w, %i, %w)")
    twice = given.replace("%i: i64[B]) -> f32[B, 4]", "%i: i64[B], %v: f32[40, 4]) -> f32[B, 4]")
    lookups = twice.replace("return %0\n", f"{again}\n        %2: f32[B, 4] = add(%0, %1)\n        return %2\n", 1)
    check_pass(SharePacked(owned=True), lookups)
    other = lookups.replace(again, "%1: f32[4] = max(%v) {axes = [0]}")
    check_pass(SharePacked(owned=True), other, fires=False, reason="max reads it, which is no lookup of rows")

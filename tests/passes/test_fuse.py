"""fuse: what comes together, and what must not."""

from __future__ import annotations

import pytest
from fusing import fused, regions, run, unfused

from graphopt.errors import UsageError
from graphopt.ir import parse_graph
from graphopt.pass_manager import run_passes
from graphopt.passes.fusion import Fuse
from graphopt.rewrite import Fuel, PassContext
from graphopt.testing import check_pass

HEAD = "graph @g(%x: f32[B, 4, 8], %y: f32[B, 4, 8], %z: f32[B, 8, 4], weight %w: f32[8, 8], weight %b: f32[8], %i: i64[5])"


def graph(body: str, result: str, returns: str) -> str:
    return f"{HEAD} -> {result} where 1 <= B <= 16 {{\n{body}\n return {returns} }}"


def fuse(body: str, result: str, returns: str) -> tuple[list[tuple[str, list[str]]], list[str]]:
    return fused(graph(body, result, returns), Fuse())


def test_before_and_after() -> None:
    check_pass(Fuse(), """
        graph @g(%x: f32[B, 4]) -> f32[B, 4] where 1 <= B {
          %c: f32[] = constant() {value = 2.0}
          %0: f32[B, 4] = mul(%x, %c)
          %1: f32[B, 4] = tanh(%0)
          return %1
        }""", """
        graph @g(%x: f32[B, 4]) -> f32[B, 4] where 1 <= B {
          %0: f32[B, 4] = fusion(%x) body (%x: f32[B, 4]) -> f32[B, 4] where 1 <= B {
            %c: f32[] = constant() {value = 2.0}
            %0: f32[B, 4] = mul(%x, %c)
            %1: f32[B, 4] = tanh(%0)
            return %1
          }
          return %0
        }""")  # fmt: skip


# --- each kind ---------------------------------------------------------------------------------------------------------


def test_pointwise_through_views_and_movers() -> None:
    found, missed = fuse("""
        %0: f32[B, 4, 8] = exp(%x)
        %1: f32[B, 8, 4] = transpose(%0) {perm = [0, 2, 1]}
        %2: f32[B, 8, 8] = concat(%1, %z) {axis = 2}
        %3: f32[B, 8, 8] = neg(%2)""", "f32[B, 8, 8]", "%3")  # fmt: skip
    assert found == [("pointwise", ["exp", "transpose", "concat", "neg"])] and not missed


def test_embedding() -> None:
    found, _ = fuse("%0: f32[5, 8] = take(%w, %i)\n %1: f32[5, 8] = add(%0, %b)", "f32[5, 8]", "%1")
    assert found == [("pointwise", ["take", "add"])]


@pytest.mark.parametrize("axes, shape", [("[0]", "4, 8"), ("[1]", "B, 8"), ("[2]", "B, 4")])
def test_reduction_with_prologue_and_epilogue(axes: str, shape: str) -> None:
    found, missed = fuse(f"""
        %0: f32[B, 4, 8] = exp(%x)
        %1: f32[{shape}] = sum(%0) {{axes = {axes}}}
        %2: f32[{shape}] = sqrt(%1)""", f"f32[{shape}]", "%2")  # fmt: skip
    assert found == [("reduction", ["exp", "sum", "sqrt"])] and not missed


def test_argmax_is_a_reduction() -> None:
    found, _ = fuse("%0: f32[B, 4, 8] = neg(%x)\n %1: i64[B, 8] = argmax(%0) {axis = 1}", "i64[B, 8]", "%1")
    assert found == [("reduction", ["neg", "argmax"])]


def test_masked_scaled_softmax() -> None:
    found, _ = fuse("""
        %c: f32[] = constant() {value = 0.5}
        %0: f32[B, 4, 8] = mul(%x, %c)
        %1: f32[B, 4, 8] = add(%0, %y)
        %2: f32[B, 4, 8] = softmax(%1) {axis = 2}""", "f32[B, 4, 8]", "%2")  # fmt: skip
    assert found == [("rowwise", ["mul", "add", "softmax"])]


def test_softmax_in_parts_is_one_region() -> None:
    found, missed = fuse("""
        %0: f32[B, 4, 1] = max(%x) {axes = [2], keepdims = true}
        %1: f32[B, 4, 8] = sub(%x, %0)
        %2: f32[B, 4, 8] = exp(%1)
        %3: f32[B, 4, 1] = sum(%2) {axes = [2], keepdims = true}
        %4: f32[B, 4, 8] = div(%2, %3)""", "f32[B, 4, 8]", "%4")  # fmt: skip
    assert found == [("rowwise", ["max", "sub", "exp", "sum", "div"])] and not missed


def test_norm_in_parts_computes_its_statistic_once_a_row() -> None:
    found, _ = fuse("""
        %0: f32[B, 4, 8] = mul(%x, %x)
        %1: f32[B, 4] = mean(%0) {axes = [2]}
        %2: f32[B, 4, 1] = reshape(%1) {shape = [B, 4, 1]}
        %3: f32[B, 4, 1] = rsqrt(%2)
        %4: f32[B, 4, 8] = mul(%x, %3)""", "f32[B, 4, 8]", "%4")  # fmt: skip
    assert found == [("rowwise", ["mul", "mean", "reshape", "rsqrt", "mul"])]


def test_a_number_that_is_computed_joins_rows() -> None:
    """With dynamic shapes an epsilon arrives as a tensor of rank 0."""
    g = parse_graph("""
        graph @g(%x: f32[B, 4], %eps: f64[], %w: f32[4, 4]) -> (f32[B, 4], f32[B, 4]) where 1 <= B {
          %0: f32[] = cast(%eps) {dtype = f32}
          %1: f32[B, 4] = mul(%x, %x)
          %2: f32[B, 1] = mean(%1) {axes = [1], keepdims = true}
          %3: f32[B, 1] = add(%2, %0)
          %4: f32[B, 1] = rsqrt(%3)
          %5: f32[B, 4] = mul(%x, %4)
          %6: f32[] = cast(%eps) {dtype = f32}
          %7: f32[B, 4] = matmul(%5, %w)
          %8: f32[B, 4] = mul(%7, %6)
          return %5, %8
        }""")
    run(g, [Fuse()])
    assert regions(g) == [("rowwise", ["mul", "mean", "cast", "add", "rsqrt", "mul"]), ("matmul", ["matmul", "cast", "mul"])]


def test_residual_layer_norm_and_row_chain() -> None:
    found, _ = fuse("""
        %0: f32[B, 4, 8] = add(%x, %y)
        %1: f32[B, 4, 8] = layer_norm(%0, %b, %b)
        %2: f32[B, 4, 8] = softmax(%1) {axis = 2}""", "f32[B, 4, 8]", "%2")  # fmt: skip
    assert found == [("rowwise", ["add", "layer_norm", "softmax"])]


def test_matmul_with_epilogue_and_views() -> None:
    found, missed = fuse("""
        %0: f32[8, 8] = transpose(%w) {perm = [1, 0]}
        %1: f32[B, 4, 8] = transpose(%z) {perm = [0, 2, 1]}
        %2: f32[B, 4, 8] = matmul(%1, %0)
        %3: f32[B, 4, 8] = add(%2, %b)
        %4: f32[B, 4, 8] = gelu(%3)
        %5: f32[B, 4, 8] = add(%4, %y)
        %6: f16[B, 4, 8] = cast(%5) {dtype = f16}""", "f16[B, 4, 8]", "%6")  # fmt: skip
    assert found == [("matmul", ["transpose", "transpose", "matmul", "add", "gelu", "add", "cast"])] and not missed


# --- copies ------------------------------------------------------------------------------------------------------------


def test_view_and_constant_are_copied_into_each_region_and_kept_for_an_output() -> None:
    g = parse_graph(graph("""
        %c: f32[] = constant() {value = 3.0}
        %0: f32[B, 8, 4] = transpose(%x) {perm = [0, 2, 1]}
        %1: f32[B, 8, 4] = mul(%0, %c)
        %2: f32[B, 8] = sum(%0) {axes = [2]}
        %3: f32[B, 8] = add(%2, %c)""", "(f32[B, 8, 4], f32[B, 8], f32[B, 8, 4])", "%1, %3, %0"))  # fmt: skip
    run(g, [Fuse()])
    assert regions(g) == [("pointwise", ["transpose", "mul"]), ("reduction", ["transpose", "sum", "add"])]
    assert unfused(g) == ["transpose"]


def test_view_of_a_matmul_joins_its_reader_as_an_index_map() -> None:
    found, missed = fuse("""
        %0: f32[B, 4, 4] = matmul(%x, %z)
        %1: f32[B, 4, 4] = transpose(%0) {perm = [0, 2, 1]}
        %2: f32[B, 4, 4] = neg(%1)""", "f32[B, 4, 4]", "%2")  # fmt: skip
    assert found == [("matmul", ["matmul"]), ("pointwise", ["transpose", "neg"])]
    assert missed == ["matmul is not fused with its reader: transpose after it is no pointwise op of its shape"]


def test_staged_values_are_inputs_but_their_views_join() -> None:
    g = parse_graph(graph("""
        %0: f32[8] = exp(%b)
        %1: f32[1, 8] = reshape(%0) {shape = [1, 8]}
        %2: f32[B, 4, 8] = mul(%x, %1)""", "f32[B, 4, 8]", "%2"))  # fmt: skip
    run(g, [Fuse()])
    assert regions(g) == [("pointwise", ["reshape", "mul"])] and unfused(g) == ["exp"]


def test_strides_and_symbols_of_a_body() -> None:
    g = parse_graph("""
        graph @g(%x: f32[B, 4; 1, B], %y: f32[C, 4; 4, 1]) -> (f32[B, 4], f32[C, 4]) where 1 <= B, 1 <= C, 1 <= D {
          %0: f32[B, 4] = neg(%x)
          %1: f32[C, 4] = neg(%y)
          return %0, %1
        }""")
    run(g, [Fuse()])
    first, second = (n.body for n in g.nodes())
    assert first is not None and second is not None
    assert str(first.inputs[0].type) == "f32[B, 4; 1, B]" and list(first.symbols) == ["B"]
    assert str(second.inputs[0].type) == "f32[C, 4]" and list(second.symbols) == ["C"]


# --- must not fuse -----------------------------------------------------------------------------------------------------

DECLINED = {
    "other users": ("""
        %0: f32[B, 4, 8] = exp(%x)
        %1: f32[B, 4, 8] = softmax(%0) {axis = 2}
        %2: f32[B, 8] = sum(%0) {axes = [1]}""", "(f32[B, 4, 8], f32[B, 8])", "%1, %2", 3, "also used by other regions"),
    "an output": ("""
        %0: f32[B, 4, 8] = exp(%x)
        %1: f32[B, 4, 8] = neg(%0)""", "(f32[B, 4, 8], f32[B, 4, 8])", "%0, %1", 2, "stays outside of regions"),
    "prologue of a matmul": ("""
        %0: f32[B, 4, 8] = tanh(%x)
        %1: f32[B, 4, 8] = matmul(%0, %w)""", "f32[B, 4, 8]", "%1", 2, "an operand of the matmul, whose kernel takes no tanh"),
    "prologue below a view": ("""
        %0: f32[B, 8, 4] = tanh(%z)
        %1: f32[B, 4, 8] = transpose(%0) {perm = [0, 2, 1]}
        %2: f32[B, 4, 8] = matmul(%1, %w)""", "f32[B, 4, 8]", "%2", 2, "an operand of the matmul"),
    "two matmuls": ("""
        %0: f32[B, 4, 8] = matmul(%x, %w)
        %1: f32[B, 4, 8] = matmul(%y, %w)
        %2: f32[B, 4, 8] = add(%0, %1)""", "f32[B, 4, 8]", "%2", 2, "it multiplies another matrix"),
    "softmax and matmul": ("""
        %0: f32[B, 4, 8] = softmax(%x) {axis = 2}
        %1: f32[B, 4, 8] = matmul(%0, %w)""", "f32[B, 4, 8]", "%1", 2, "a matmul kernel already"),
    "matmul and softmax": ("""
        %0: f32[B, 4, 8] = matmul(%x, %w)
        %1: f32[B, 4, 8] = softmax(%0) {axis = 2}""", "f32[B, 4, 8]", "%1", 2, "a rowwise kernel already"),
    "rows differ": ("""
        %0: f32[B, 4, 8] = softmax(%x) {axis = 2}
        %1: f32[B] = sum(%0) {axes = [1, 2]}""", "f32[B]", "%1", 2, "not those of the reduction"),
    "reduction over other axes": ("""
        %0: f32[B, 1, 8] = max(%x) {axes = [1], keepdims = true}
        %1: f32[B, 4, 8] = sub(%x, %0)""", "f32[B, 4, 8]", "%1", 2, "does not reduce the trailing axes"),
    "reduction of a reduction": ("""
        %0: f32[B, 4] = sum(%x) {axes = [2]}
        %1: f32[B] = max(%0) {axes = [1]}""", "f32[B]", "%1", 2, "not those of the reduction"),
    "row read along other axes": ("""
        %0: f32[B, 4, 8] = exp(%x)
        %1: f32[B, 8, 4] = transpose(%0) {perm = [0, 2, 1]}
        %2: f32[B, 8, 4] = softmax(%1) {axis = 2}""", "f32[B, 8, 4]", "%2", 2, "neither that of the rows"),
    "a mover in front of a matmul's epilogue": ("""
        %0: f32[B, 4, 8] = matmul(%x, %w)
        %s: f32[B, 4, 4] = slice(%y) {axis = 2, stop = 4}
        %1: f32[B, 4, 8] = pad(%s) {low = [0, 0, 0], high = [0, 0, 4], value = 1.0}
        %2: f32[B, 4, 8] = add(%0, %1)""", "f32[B, 4, 8]", "%2", 2, "does not read through pad"),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLINED)
def test_must_not_fuse(case: str) -> None:
    body, result, returns, kernels, reason = DECLINED[case]
    found, missed = fuse(body, result, returns)
    assert len(found) == kernels
    assert any(reason in m for m in missed), missed


def test_square_rows_are_not_mistaken_for_columns() -> None:
    """A [4] vector broadcast along the columns of [4, 4] has the shape of one element a row, but is none."""
    g = parse_graph("""
        graph @g(%x: f32[4, 4], %v: f32[4]) -> f32[4, 4] {
          %0: f32[4] = neg(%v)
          %1: f32[4, 4] = add(%x, %0)
          %2: f32[4, 4] = softmax(%1) {axis = 1}
          return %2
        }""")
    run(g, [Fuse()])
    assert regions(g) == [("pointwise", ["neg"]), ("rowwise", ["add", "softmax"])]


def test_complex_and_library_calls_stay() -> None:
    g = parse_graph("""
        graph @g(%x: c64[4], %y: f32[4]) -> (c64[4], f32[4], f32[4]) {
          %0: c64[4] = exp(%x)
          %1: f32[4] = neg(%y)
          %2: f32[4] = aten(%1) {target = "aten.tanh.default", args = [$0]}
          %3: f32[4] = aten(%2) {target = "aten.msort.default", args = [$0]}
          %4: f32[4] = neg(%3)
          return %0, %2, %4
        }""")
    run(g, [Fuse()])
    assert unfused(g) == ["exp", "aten", "aten"] and len(regions(g)) == 2


def test_a_scan_takes_the_pointwise_work_around_it() -> None:
    g = parse_graph("""
        graph @g(%x: f32[B, 8], %y: f32[8]) -> f32[B, 8]
        where 1 <= B {
          %0: f32[B, 8] = exp(%x)
          %1: f32[B, 8] = cumsum(%0) {axis = 1}
          %2: f32[B, 8] = mul(%1, %y)
          return %2
        }""")
    run(g, [Fuse()])
    assert regions(g) == [("scan", ["exp", "cumsum", "mul"])]


def test_a_scan_read_by_a_reduction_stands_alone() -> None:
    g = parse_graph("""
        graph @g(%x: f32[4, 8]) -> f32[4] {
          %0: f32[4, 8] = cumsum(%x) {axis = 1}
          %1: f32[4] = sum(%0) {axes = [1]}
          return %1
        }""")
    run(g, [Fuse()])
    assert regions(g) == [("scan", ["cumsum"]), ("reduction", ["sum"])]


def test_an_update_takes_what_it_reads_and_nothing_after() -> None:
    g = parse_graph("""
        graph @g(%x: f32[9, 8], %i: i64[4], %s: f32[4, 8]) -> f32[9, 8] {
          %0: f32[4, 8] = exp(%s)
          %1: i64[4] = wrap_index(%i) {size = 9}
          %2: f32[9, 8] = put(%x, %1, %0) {axis = 0, update = "add"}
          %3: f32[9, 8] = neg(%2)
          return %3
        }""")
    run_passes(g, [Fuse()], ctx := PassContext())
    assert sorted(regions(g)) == [("pointwise", ["neg"]), ("scatter", ["wrap_index", "exp", "put"])]
    assert any("written in the order of the index" in r.message for r in ctx.remarks)


def test_an_index_that_cannot_be_checked_beforehand_is_computed_outside() -> None:
    g = parse_graph("""
        graph @g(%x: f32[9, 8], %i: i64[4]) -> f32[4, 8] {
          %0: i64[4] = mul(%i, %i)
          %1: f32[4, 8] = take(%x, %0)
          return %1
        }""")
    run_passes(g, [Fuse()], ctx := PassContext())
    assert regions(g) == [("pointwise", ["mul"]), ("pointwise", ["take"])]
    assert any("must be checked before" in r.message for r in ctx.remarks)


def test_nothing_moves_across_a_mutation() -> None:
    g = parse_graph("""
        graph @g(%x: f32[4], %y: f32[4]) -> f32[4] {
          %0: f32[4] = neg(%x)
          %1: f32[4] = aten(%x, %y) {target = "aten.add_.Tensor", args = [$0, $1], effect = "mutates"}
          %2: f32[4] = mul(%0, %1)
          return %2
        }""")
    run_passes(g, [Fuse()], ctx := PassContext())
    assert [n.op.name for n in g.nodes()] == ["fusion", "aten", "fusion"]
    assert any("mutates" in r.message for r in ctx.remarks)


def test_limits() -> None:
    text = graph("\n".join(["%0: f32[B, 4, 8] = neg(%x)", *(f"%{i}: f32[B, 4, 8] = neg(%{i - 1})" for i in range(1, 10))]),
                 "f32[B, 4, 8]", "%9")  # fmt: skip
    found, missed = fused(text, Fuse(max_nodes=4))
    assert [len(ops) for _, ops in found] == [2, 4, 4] and "4 nodes, the most allowed" in missed[0]
    three = graph("%0: f32[B, 4, 8] = mul(%x, %y)\n %1: f32[B, 4, 8] = add(%0, %b)", "f32[B, 4, 8]", "%1")
    found, missed = fused(three, Fuse(max_inputs=2))
    assert len(found) == 2 and "over 2 values" in missed[0]
    with pytest.raises(UsageError, match="must be positive"):
        run_passes(parse_graph(text), [Fuse(max_nodes=0)])


def test_index_maps_do_not_multiply() -> None:
    """Each step reads the last one plainly and flipped: without a limit the last value would be computed 2 ** 12 times."""
    lines = ["%a0: f32[B, 4, 8] = neg(%x)"]
    for i in range(12):
        lines += [f"%f{i}: f32[B, 4, 8] = flip(%a{i}) {{axes = [2]}}", f"%a{i + 1}: f32[B, 4, 8] = add(%a{i}, %f{i})"]
    found, missed = fuse("\n".join(lines), "f32[B, 4, 8]", "%a12")
    assert 3 <= len(found) <= 8 and any("different index maps" in m for m in missed)


def test_fuel_leaves_regions_out() -> None:
    text = graph("%0: f32[B, 4, 8] = softmax(%x) {axis = 2}\n %1: f32[B, 4, 8] = matmul(%0, %w)", "f32[B, 4, 8]", "%1")
    g = parse_graph(text)
    run_passes(g, [Fuse()], PassContext(fuel=Fuel(skip=[1])))
    assert [n.op.name for n in g.nodes()] == ["softmax", "fusion"]


def test_remarks_say_what_is_saved() -> None:
    g = parse_graph(graph("%0: f32[B, 4, 8] = exp(%x)\n %1: f32[B, 4, 8] = neg(%0)", "f32[B, 4, 8]", "%1"))
    ctx = run(g, [Fuse()])
    assert [r.message for r in ctx.remarks] == ["pointwise region: exp, neg; saves 1 launch and 256*B bytes of memory traffic"]


# --- weights in another order ------------------------------------------------------------------------------------------

TABLE = """graph @g(%x: f32[B, 3, 4, 4], weight %t: f32[16, 3], weight %w: f32[8, 4]) -> {result} where 1 <= B {{
  %0: f32[16, 3] = exp(%t)
  %1: f32[4, 4, 3] = reshape(%0) {{shape = [4, 4, 3]}}
  %2: f32[3, 4, 4] = transpose(%1) {{perm = [2, 0, 1]}}
  {body}
}}"""


def test_a_staged_transpose_is_done_once() -> None:
    """A bias table is gathered with its heads last; every softmax would read it with strides."""
    g = parse_graph(TABLE.format(result="f32[B, 3, 4, 4]", body="""
        %3: f32[B, 3, 4, 4] = add(%x, %2)
        %4: f32[B, 3, 4, 4] = softmax(%3) {axis = 3}
        return %4"""))  # fmt: skip
    run(g, [Fuse()])
    assert regions(g) == [("rowwise", ["add", "softmax"])] and unfused(g)[-1] == "transpose"


def test_a_transposed_factor_is_read_in_place() -> None:
    """A product's second factor is packed in any order that it has, so its view belongs to the region."""
    g = parse_graph(TABLE.format(result="f32[B, 3, 4, 8]", body="""
        %3: f32[4, 8] = transpose(%w) {perm = [1, 0]}
        %4: f32[B, 3, 4, 8] = matmul(%x, %3)
        %5: f32[B, 3, 4, 8] = relu(%4)
        return %5"""))  # fmt: skip
    run(g, [Fuse()])
    assert regions(g) == [("matmul", ["transpose", "matmul", "relu"])]


def test_attention_of_weights_alone_stays_staged() -> None:
    """Learned queries that attend to one another, as in a decoder's first layer: a region would be computed at each call, and so would all
    that depends on it."""
    g = parse_graph("""
        graph @g(weight %q: f32[1, 4, 20, 16], weight %w: f32[64, 32], %x: f32[1, 20, 32]) -> f32[1, 20, 32] {
          %0: f32[1, 4, 20, 16] = attention(%q, %q, %q) {scale = 0.25}
          %1: f32[1, 20, 4, 16] = transpose(%0) {perm = [0, 2, 1, 3]}
          %2: f32[1, 20, 64] = reshape(%1) {shape = [1, 20, 64]}
          %3: f32[1, 20, 32] = matmul(%2, %w)
          %4: f32[1, 20, 32] = add(%3, %x)
          return %4
        }""")
    run(g, [Fuse()])
    assert regions(g) == [("pointwise", ["add"])] and unfused(g) == ["attention", "transpose", "reshape", "matmul"]


def test_a_number_joins_whoever_reads_it() -> None:
    """A hash of several buckets: the divisor is read through as many index maps as parts are joined, and kernels want to see it."""
    lines, parts = ["%m: i64[] = constant() {value = 7, dtype = i64}"], []
    for i in range(12):
        lines.append(f"%c{i}: i64[] = constant() {{value = {i + 2}, dtype = i64}}")
        lines.append(f"%a{i}: i64[4] = mul(%x, %c{i})")
        lines.append(f"%b{i}: i64[4] = remainder(%a{i}, %m)")
        parts.append(f"%b{i}")
    body = "\n".join([*lines, f"%z: i64[48] = concat({', '.join(parts)}) {{axis = 0}}", "return %z"])
    g = parse_graph(f"graph @g(%x: i64[4]) -> i64[48] {{\n{body}\n}}")
    run(g, [Fuse()])
    assert unfused(g) == []
    ((_, ops),) = regions(g)
    assert ops.count("remainder") == 12 and not any(v.type.rank == 0 for n in g.nodes() for v in n.operands)


def test_a_large_staged_transpose_stays_a_view() -> None:
    g = parse_graph("""graph @g(%x: f32[2048, 1024], weight %w: f32[1024, 2048]) -> f32[2048, 1024] {
      %0: f32[2048, 1024] = transpose(%w) {perm = [1, 0]}
      %1: f32[2048, 1024] = add(%x, %0)
      return %1
    }""")
    run_passes(g, [Fuse()])
    assert regions(g) == [("pointwise", ["transpose", "add"])]


# --- two products that meet --------------------------------------------------------------------------------------------

GATE = """graph @g(%x: f32[B, 4, 8], %y: f32[B, 4, 8], weight %a: f32[8, 6], weight %b: f32[8, 6], weight %c: f32[6, 8]) -> {result}
where 1 <= B {{
  %0: f32[B, 4, 6] = matmul(%x, %a)
  %1: f32[B, 4, 6] = silu(%0)
  %2: f32[B, 4, 6] = matmul({left}, %b)
  {body}
}}"""
MEET = "%3: f32[B, 4, 6] = mul(%1, %2)\n return %3"


def test_a_gate_is_one_kernel() -> None:
    assert fused(GATE.format(left="%x", result="f32[B, 4, 6]", body=MEET), Fuse()) == (
        [("matmul", ["matmul", "silu", "matmul", "mul"])], [])  # fmt: skip


def test_a_gate_with_biases() -> None:
    found, _ = fused("""graph @g(%x: f32[B, 8], weight %a: f32[6, 8], weight %b: f32[8, 6], %p: f32[6], %q: f32[6]) -> f32[B, 6]
    where 1 <= B {
      %t: f32[8, 6] = transpose(%a) {perm = [1, 0]}
      %0: f32[B, 6] = matmul(%x, %t)
      %1: f32[B, 6] = add(%0, %p)
      %2: f32[B, 6] = gelu(%1)
      %3: f32[B, 6] = matmul(%x, %b)
      %4: f32[B, 6] = add(%3, %q)
      %5: f32[B, 6] = mul(%2, %4)
      return %5
    }""", Fuse())  # fmt: skip
    assert found == [("matmul", ["transpose", "matmul", "add", "gelu", "matmul", "add", "mul"])]


@pytest.mark.parametrize(("left", "result", "body", "reason"), [
    ("%y", "f32[B, 4, 6]", MEET, "it multiplies another matrix than the product that it meets"),
    ("%x", "(f32[B, 4, 6], f32[B, 4, 6])", "%3: f32[B, 4, 6] = mul(%1, %2)\n return %3, %0", "its result is also used by something that"),
    ("%x", "f32[B, 4, 8]", "%3: f32[B, 4, 8] = matmul(%2, %c)\n %4: f32[B, 4, 8] = matmul(%1, %c)\n %5: f32[B, 4, 8] = add(%3, %4)\n"
     " return %5", "it multiplies another matrix"),
])  # fmt: skip
def test_products_that_do_not_meet(left: str, result: str, body: str, reason: str) -> None:
    found, missed = fused(GATE.format(left=left, result=result, body=body), Fuse())
    assert all(ops.count("matmul") <= 1 for _, ops in found)
    assert any(reason in m for m in missed), missed


def test_three_products_are_two_kernels() -> None:
    body = "%3: f32[B, 4, 6] = mul(%1, %2)\n %5: f32[8, 6] = transpose(%c) {perm = [1, 0]}\n %6: f32[B, 4, 6] = matmul(%x, %5)\n"
    found, missed = fused(GATE.format(left="%x", result="f32[B, 4, 6]", body=body + " %7: f32[B, 4, 6] = add(%3, %6)\n return %7"), Fuse())
    assert sorted(ops.count("matmul") for _, ops in found) == [1, 2]
    assert any("its reader is a kernel of two products already" in m for m in missed)


def test_batches_of_matrices_do_not_meet() -> None:
    found, missed = fused("""graph @g(%x: f32[2, 4, 8], %a: f32[2, 8, 6], %b: f32[2, 8, 6]) -> f32[2, 4, 6] {
      %0: f32[2, 4, 6] = matmul(%x, %a)
      %1: f32[2, 4, 6] = matmul(%x, %b)
      %2: f32[2, 4, 6] = mul(%0, %1)
      return %2
    }""", Fuse())  # fmt: skip
    assert len(found) == 2 and any("batches of matrices" in m for m in missed)

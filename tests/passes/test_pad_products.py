"""pad-products: rows of whole words where that pays, what computes the left factor grows, and which products are left."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from fusing import assert_same_values, regions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.ir import Graph, parse_graph, structurally_equal, verify
from graphopt.pass_manager import run_passes
from graphopt.passes.fusion import Fuse
from graphopt.passes.layout import PadProducts
from graphopt.passes.layout.wide_loads import WideLoads
from graphopt.passes.pipelines import LEVELS
from graphopt.rewrite import PassContext
from graphopt.target import Target
from graphopt.testing.checks import assert_same_structure

H100 = Target.from_name("cuda:sm_90")
LINEAR = """
graph @g(%x: bf16[B, 37], weight %w: bf16[40, 37], %b: bf16[40]) -> bf16[B, 40] where 1 <= B <= 4096 {
  %0: bf16[37, 40] = transpose(%w) {perm = [1, 0]}
  %1: bf16[B, 40] = matmul(%x, %0)
  %2: bf16[B, 40] = add(%1, %b)
  return %2
}"""
PADDED_LINEAR = """
graph @g(%x: bf16[B, 37], weight %w: bf16[40, 37], %b: bf16[40]) -> bf16[B, 40] where 1 <= B <= 4096 {
  %0: bf16[B, 40] = pad(%x) {low = [0, 0], high = [0, 3]}
  %1: bf16[40, 40] = pad(%w) {low = [0, 0], high = [0, 3]}
  %2: bf16[40, 40] = transpose(%1) {perm = [1, 0]}
  %3: bf16[B, 40] = matmul(%0, %2)
  %4: bf16[B, 40] = add(%3, %b)
  return %4
}"""
COLUMNS = """
graph @g(%x: bf16[B, 40], weight %w: bf16[40, 37]) -> bf16[B, 37] where 1 <= B <= 4096 {
  %0: bf16[B, 37] = matmul(%x, %w)
  %1: bf16[B, 37] = gelu(%0)
  return %1
}"""
PADDED_COLUMNS = """
graph @g(%x: bf16[B, 40], weight %w: bf16[40, 37]) -> bf16[B, 37] where 1 <= B <= 4096 {
  %0: bf16[40, 40] = pad(%w) {low = [0, 0], high = [0, 3]}
  %1: bf16[40, 37] = slice(%0) {axis = 1, stop = 37}
  %2: bf16[B, 37] = matmul(%x, %1)
  %3: bf16[B, 37] = gelu(%2)
  return %3
}"""
MLP = """
graph @g(%x: f16[B, 16], weight %u: f16[16, 37], weight %v: f16[16, 37], weight %b: f16[37], weight %d: f16[37, 24]) -> f16[B, 24]
where 1 <= B <= 4096 {
  %0: f16[B, 37] = matmul(%x, %u)
  %1: f16[B, 37] = ACT(%0)
  %2: f16[B, 37] = matmul(%x, %v)
  %3: f16[B, 37] = add(%2, %b)
  %4: f16[B, 37] = mul(%1, %3)
  %5: f16[B, 24] = matmul(%4, %d)
  return %5
}"""


def padded(text: str, target: Target = H100, always: bool = True) -> tuple[Graph, list[str], list[str]]:
    """The graph afterwards, checked for structure, values, and that a second run changes nothing; messages of passed and missed."""
    g, ctx = parse_graph(text), PassContext(target=target)
    before, p = g.clone(), PadProducts(always=always)
    assert p.run(g, ctx) == (not structurally_equal(g, before))
    verify(g)
    assert_same_values(before, g)
    assert not p.run(g, PassContext(target=target)), f"not settled:\n{g}"
    said = {kind: [r.message for r in ctx.remarks if r.kind == kind] for kind in ("passed", "missed")}
    return g, said["passed"], said["missed"]


def product(m: object, k: int, n: int, dtype: str = "bf16", weight: str = "weight ") -> str:
    where = "" if isinstance(m, int) else " where 1 <= B <= 65536"
    return f"graph @g(%x: {dtype}[{m}, {k}], {weight}%w: {dtype}[{k}, {n}]) -> {dtype}[{m}, {n}]{where} {{\n" \
           f" %0: {dtype}[{m}, {n}] = matmul(%x, %w)\n return %0\n}}"  # fmt: skip


def decided(text: str, target: Target = H100) -> tuple[bool, str]:
    """Whether the pass fires on a graph too large for values, and what it says."""
    g, ctx = parse_graph(text), PassContext(target=target)
    fired = PadProducts().run(g, ctx)
    verify(g)
    return fired, "; ".join(r.message for r in ctx.remarks)


def test_a_depth_before_and_after() -> None:
    g, passed, _ = padded(LINEAR)
    assert_same_structure(g, parse_graph(PADDED_LINEAR))
    (said,) = passed
    assert said.startswith("1 product of depth 37 becomes 40, of whole words: the left factor is copied; it costs")


def test_columns_before_and_after() -> None:
    g, passed, _ = padded(COLUMNS)
    assert_same_structure(g, parse_graph(PADDED_COLUMNS))
    assert passed[0].startswith("a weight's rows of 37 columns lie 40 apart, in whole words: it costs 0 us, saves")


def test_the_slice_joins_the_products_kernel() -> None:
    """One region, as before: the padding of the weight is staged, and its slice is read in the kernel."""
    g = parse_graph(COLUMNS)
    run_passes(g, [PadProducts(always=True), Fuse()], PassContext(target=H100))
    assert regions(g) == [("matmul", ["slice", "matmul", "gelu"])]


def test_pointwise_work_before_a_copy_joins_it() -> None:
    g = parse_graph("""
        graph @g(%x: bf16[B, 37], %y: bf16[B, 37], weight %w: bf16[37, 40]) -> bf16[B, 40] where 1 <= B <= 4096 {
          %0: bf16[B, 37] = mul(%x, %y)
          %1: bf16[B, 37] = gelu(%0)
          %2: bf16[B, 40] = matmul(%1, %w)
          return %2
        }""")
    run_passes(g, [PadProducts(always=True), Fuse()], PassContext(target=H100))
    assert regions(g) == [("pointwise", ["mul", "gelu", "pad"]), ("matmul", ["matmul"])]


def test_what_computes_the_left_factor_grows() -> None:
    """Both products before it, the bias, and the ops between; nothing is copied, and the columns of their weights are whole with it."""
    g, passed, _ = padded(MLP.replace("ACT", "silu"))
    assert len(passed) == 1 and "what computes the left factor grows; it costs 0 us" in passed[0]
    assert [str(n.result.type) for n in g.nodes() if n.op.name in ("matmul", "silu", "add", "mul")] == ["f16[B, 40]"] * 5 + ["f16[B, 24]"]
    assert all(n.operands[0].is_input and n.operands[0].weight for n in g.nodes() if n.op.name == "pad")


@pytest.mark.parametrize("act", ["sigmoid", "cos"])
def test_an_op_that_makes_no_zero_of_zeros_does_not_grow(act: str) -> None:
    _, passed, _ = padded(MLP.replace("ACT", act).replace("mul(%1, %3)", "add(%1, %3)"))
    assert "the left factor is copied" in passed[0]


def test_what_others_read_does_not_grow() -> None:
    text = MLP.replace("ACT", "silu").replace(") -> f16[B, 24]", ") -> (f16[B, 24], f16[B, 37])").replace("return %5", "return %5, %4")
    g, passed, _ = padded(text)
    assert "the left factor is copied" in passed[0] and str(g.outputs[1].type) == "f16[B, 37]"


def test_integers_fill_words_of_sixteen() -> None:
    g, _, _ = padded("""
        graph @g(%x: i8[B, 37], weight %w: i8[40, 37], %s: f32[40]) -> f32[B, 40] where 1 <= B {
          %0: i8[37, 40] = transpose(%w) {perm = [1, 0]}
          %1: i32[B, 40] = matmul(%x, %0) {acc = i32}
          %2: f32[B, 40] = dequantize(%1, %s)
          return %2
        }""")
    assert [str(v.type) for n in g.nodes() if n.op.name == "matmul" for v in n.operands] == ["i8[B, 48]", "i8[48, 40]"]


def test_a_chain_of_products_grows_link_by_link() -> None:
    g, passed, _ = padded("""
        graph @g(%x: f16[B, 3, 11], weight %u: f16[11, 37], weight %v: f16[37, 21], weight %w: f16[21, 16]) -> f16[B, 3, 16] where 1 <= B {
          %0: f16[B, 3, 37] = matmul(%x, %u)
          %1: f16[B, 3, 37] = relu(%0)
          %2: f16[B, 3, 21] = matmul(%1, %v)
          %3: f16[B, 3, 16] = matmul(%2, %w)
          return %3
        }""")
    assert [m.split(" becomes")[0] for m in passed] == ["1 product of depth 11", "1 product of depth 37", "1 product of depth 21"]
    assert [n.result.shape[-1] for n in g.nodes() if n.op.name == "matmul"] == [40, 24, 16]


def test_products_of_one_left_factor_share_its_copy() -> None:
    g, passed, _ = padded("""
        graph @g(%x: f16[B, 37], weight %u: f16[37, 16], weight %v: f16[37, 24]) -> (f16[B, 16], f16[B, 24]) where 1 <= B {
          %0: f16[B, 16] = matmul(%x, %u)
          %1: f16[B, 24] = matmul(%x, %v)
          return %0, %1
        }""")
    assert "2 products of depth 37" in passed[0] and sum(n.op.name == "pad" and n.operands[0].hint == "x" for n in g.nodes()) == 1


@pytest.mark.parametrize(("text", "said"), [
    (product(4096, 4095, 4096), "the left factor is copied"),
    (product("B", 4096, 4095), "rows of 4095 columns lie 4096 apart"),
    (product("B", 4095, 4095, "f16"), "becomes 4096"),
])  # fmt: skip
def test_it_fires_where_that_pays(text: str, said: str) -> None:
    fired, message = decided(text)
    assert fired and said in message and "saves" in message


@pytest.mark.parametrize(("text", "target", "reason"), [
    (product(4096, 4096, 4096), "cuda:sm_90", ""),  # whole words
    (product(4096, 4095, 4095), "cpu:x86-64-v3", ""),
    (product(4095, 4096, 4096), "cuda:sm_90", ""),  # any number of rows
    (product(8, 333, 256), "cuda:sm_90", "1 product of depth 333 stays so, not 336: padding costs"),  # not worth one more kernel
    (product(1, 4096, 4095), "cuda:sm_90", "rows of 4095 columns stay so"),  # one row waits for memory
    (product(4096, 4095, 4096, "f32"), "cuda:sm_90", ""),  # exact f32 is no work for matrix instructions
    (product(4096, 4095, 4096, "f64"), "cuda:sm_90", ""),
    (product(4096, 4095, 4096, weight=""), "cuda:sm_90", "rows of 4095 bf16 fill no words of 16 bytes, but the right"),
])  # fmt: skip
def test_must_not_fire(text: str, target: str, reason: str) -> None:
    fired, message = decided(text, Target.from_name(target))
    assert not fired and (reason in message if reason else not message), message


def test_f32_is_looked_at_where_it_is_multiplied_as_tf32() -> None:
    """Rows of any length are read by 4 bytes at least, as fast as they are multiplied."""
    fired, message = decided(product(4096, 4095, 4096, "f32"), replace(H100, features=(*H100.features, "tf32")))
    assert not fired and "1 product of depth 4095 stays so" in message


def test_a_left_factor_whose_rows_do_not_lie_along_the_depth_stays() -> None:
    fired, message = decided(product(4096, 4095, 4096).replace("%x: bf16[4096, 4095]", "%x: bf16[4096, 4095; 1, 4096]"))
    assert not fired and not message


def test_longer_accesses_are_never_slower() -> None:
    """The model, on every GPU."""
    node = next(iter(parse_graph(product(2048, 1023, 1024)).nodes()))
    for name in ("cuda:sm_80", "cuda:sm_89", "cuda:sm_90", "cuda:sm_100", "hip:gfx942", "hip:gfx950"):
        loads = WideLoads(Target.from_name(name), {})
        times = [loads.product(node, 1024, 1024, row, row)[0] for row in (1023, 1022, 1020, 1024)]
        assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_it_runs_behind_what_changes_a_weights_type() -> None:
    passes = LEVELS[2]
    assert passes.index("narrow-weights") < passes.index("pad-products") == passes.index("fuse") - 1


@st.composite
def chains(draw: st.DrawFn) -> str:
    """Products one after another, with what may stand between them."""
    dtype, sizes = draw(st.sampled_from(["f16", "bf16", "f32"])), draw(st.lists(st.integers(1, 21), min_size=2, max_size=4))
    rows = draw(st.sampled_from(["B", "B, 3", "5"]))
    inputs, lines, x = [f"%x: {dtype}[{rows}, {sizes[0]}]"], list[str](), "x"
    for i, (k, n) in enumerate(pairwise(sizes)):
        kind, right = f"{dtype}[{rows}, {n}]", f"w{i}"
        if draw(st.booleans()):
            inputs.append(f"weight %w{i}: {dtype}[{n}, {k}]")
            lines.append(f"%t{i}: {dtype}[{k}, {n}] = transpose(%w{i}) {{perm = [1, 0]}}")
            right = f"t{i}"
        else:
            inputs.append(f"{draw(st.sampled_from(['weight ', 'weight ', '']))}%w{i}: {dtype}[{k}, {n}]")
        lines.append(f"%m{i}: {kind} = matmul(%{x}, %{right})")
        x = f"m{i}"
        for j, op in enumerate(draw(st.lists(st.sampled_from(["relu", "sigmoid", "tanh", "bias", "twice"]), max_size=2))):
            if op == "bias":
                inputs.append(f"weight %b{i}{j}: {dtype}[{n}]")
            other = {"bias": f", %b{i}{j}", "twice": f", %{x}"}.get(op, "")
            lines.append(f"%p{i}{j}: {kind} = {'add' if other else op}(%{x}{other})")
            x = f"p{i}{j}"
    where = " where 1 <= B <= 64" if "B" in rows else ""
    result = f"{dtype}[{rows}, {sizes[-1]}]"
    body = "\n ".join([*lines, f"return %{x}"])
    return f"graph @g({', '.join(inputs)}) -> {result}{where} {{\n {body}\n}}"


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=chains())
def test_random_chains_compute_the_same(text: str) -> None:
    padded(text)

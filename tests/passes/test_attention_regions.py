"""Attention as one kernel: when it stays whole, what its region takes in before and behind it, and what it does not."""

from __future__ import annotations

import pytest
from fusing import fused, run

from graphopt.ir import parse_graph
from graphopt.passes.attention import RecogniseAttention
from graphopt.passes.expand import Expand
from graphopt.passes.fusion import Fuse
from graphopt.passes.fusion.attention import choose
from graphopt.passes.fusion.cost import CostModel
from graphopt.target import Target

FAST = Target("cpu", "x86_64", features=("avx512f",), cores=2, cache=(48 << 10, 2 << 20, 32 << 20))


def choice(queries: int | str, keys: int | str, heads: int = 8, shared: int = 8, size: int = 64, dtype: str = "f32",
           attrs: str = "") -> tuple[bool, str]:  # fmt: skip
    result = f"{dtype}[1, {heads}, {queries}, {size}]"
    where = " where 1 <= S" if "S" in (queries, keys) else ""
    g = parse_graph(f"""graph @g(%q: {result}, %k: {dtype}[1, {shared}, {keys}, {size}]) -> {result}{where} {{
      %0: {result} = attention(%q, %k, %k) {{scale = 0.1{attrs}}}
      return %0
    }}""")
    (node,) = (n for n in g.nodes() if n.name == "attention")
    found = choose(node, CostModel(FAST, g.symbols))
    return found.whole, found.why


@pytest.mark.parametrize(("queries", "keys", "more"), [
    (128, 128, {}), (2048, 2048, {"attrs": ", causal = true"}), (197, 197, {"heads": 12, "shared": 12}), ("S", "S", {}), (1, 512, {}),
    (1, 8192, {"heads": 16, "shared": 4}), (49, 49, {"size": 32}),
])  # fmt: skip
def test_stays_whole(queries: int | str, keys: int | str, more: dict[str, object]) -> None:
    whole, why = choice(queries, keys, **more)  # type: ignore[arg-type]
    assert whole
    assert "one kernel takes about" in why and "two products and a softmax" in why


def test_narrow_scores_never_leave_the_kernel() -> None:
    whole, why = choice(97, 129, shared=2, dtype="bf16")
    assert whole and "rounded to bf16" in why


def test_is_expanded() -> None:
    assert choice(8, 8, dtype="f64") == (False, "no kernel takes an attention of f64")
    assert choice(17, 17, size=2048, heads=64, shared=64)[0] is False  # few queries leave half of the lanes empty; scores are small


def test_the_choice_is_a_remark() -> None:
    g = parse_graph("""graph @g(%q: f32[2, 30, 8]) -> f32[2, 30, 8] {
      %0: f32[2, 30, 8] = attention(%q, %q, %q) {scale = 0.3}
      return %0
    }""")
    ctx = run(g, [Expand()], FAST)
    (remark,) = [r for r in ctx.remarks if r.kind == "analysis"]
    assert remark.message.startswith("attention stays whole: one kernel takes about")


LAYERS = """graph @g(%x: f32[B, 10, 96]) -> f32[B, 10, 32] where 1 <= B {{
  %y: f32[B, 10, 96] = {before}(%x)
  %a: f32[B, 10, 32] = slice(%y) {{axis = 2, stop = 32}}
  %b: f32[B, 10, 32] = slice(%y) {{axis = 2, start = 32, stop = 64}}
  %c: f32[B, 10, 32] = slice(%y) {{axis = 2, start = 64, stop = 96}}
  %d: f32[B, 10, 4, 8] = reshape(%a) {{shape = [B, 10, 4, 8]}}
  %e: f32[B, 10, 4, 8] = reshape(%b) {{shape = [B, 10, 4, 8]}}
  %f: f32[B, 10, 4, 8] = reshape(%c) {{shape = [B, 10, 4, 8]}}
  %q: f32[B, 4, 10, 8] = transpose(%d) {{perm = [0, 2, 1, 3]}}
  %k: f32[B, 4, 10, 8] = transpose(%e) {{perm = [0, 2, 1, 3]}}
  %v: f32[B, 4, 10, 8] = transpose(%f) {{perm = [0, 2, 1, 3]}}
  %0: f32[B, 4, 10, 8] = attention(%q, %k, %v) {{scale = 0.3}}
  %1: f32[B, 10, 4, 8] = transpose(%0) {{perm = [0, 2, 1, 3]}}
  %2: f32[B, 10, 32] = reshape(%1) {{shape = [B, 10, 32]}}
  %3: f32[B, 10, 32] = {after}(%2)
  return %3
}}"""


def test_views_before_and_behind_are_the_kernels() -> None:
    """What is computed before and behind has kernels of its own; no layout is copied."""
    found, missed = fused(LAYERS.format(before="exp", after="tanh"), Fuse())
    assert [kind for kind, _ in found] == ["pointwise", "attention", "pointwise"]
    assert sorted(found[1][1]) == sorted(["slice"] * 3 + ["reshape"] * 4 + ["transpose"] * 4 + ["attention"])
    assert any("nothing but rows of queries, of keys or of values" in reason for reason in missed)


def test_what_follows_is_a_kernel_of_its_own() -> None:
    found, missed = fused("""graph @g(%q: f32[2, 30, 8]) -> f32[2, 30, 8] {
      %0: f32[2, 30, 8] = attention(%q, %q, %q) {scale = 0.3}
      %1: f32[2, 30, 8] = exp(%0)
      return %1
    }""", Fuse())  # fmt: skip
    assert [kind for kind, _ in found] == ["attention", "pointwise"]
    assert any("writing another layout" in reason for reason in missed)


def test_a_result_with_two_readers_is_written_as_it_is() -> None:
    found, _ = fused("""graph @g(%q: f32[2, 4, 6, 8]) -> (f32[2, 6, 4, 8], f32[2, 4, 6, 8]) {
      %0: f32[2, 4, 6, 8] = attention(%q, %q, %q) {scale = 0.3}
      %1: f32[2, 6, 4, 8] = transpose(%0) {perm = [0, 2, 1, 3]}
      %2: f32[2, 6, 4, 8] = exp(%1)
      return %2, %0
    }""", Fuse())  # fmt: skip
    assert [(kind, [n for n in names if n == "attention"]) for kind, names in found] == [("attention", ["attention"]), ("pointwise", [])]


CACHED = """graph @g(%q: f32[1, 8, 1, 16], %k: i8[1, 2, S, 16], %a: f32[1, 2, S, {last}], %v: i8[1, S, 2, 16], %b: f32[1, S, 2, 1])
    -> f32[1, 8, 1, 16] where 1 <= S {{
  %c: f32[1, 2, S, 16] = cast(%k) {{dtype = f32}}
  %0: f32[1, 2, S, 16] = mul(%c, %a)
  %d: f32[1, S, 2, 16] = cast(%v) {{dtype = f32}}
  %1: f32[1, S, 2, 16] = mul(%d, %b)
  %2: f32[1, 2, S, 16] = transpose(%1) {{perm = [0, 2, 1, 3]}}
  %3: f32[1, 8, 1, 16] = attention(%q, %0, %2) {{scale = 0.3}}
  return %3
}}"""


def test_cached_integers_are_read_by_the_kernel() -> None:
    found, _ = fused(CACHED.format(last=1), RecogniseAttention(), Fuse())
    assert [(kind, sorted(names)) for kind, names in found] == [("attention", ["attention", "dequantize", "dequantize", "transpose"])]


def test_scales_within_a_row_are_not_those_of_a_cache() -> None:
    """Keys whose scales differ within a row are made by a kernel of their own."""
    found, missed = fused(CACHED.format(last=16), RecogniseAttention(), Fuse())
    assert [kind for kind, _ in found] == ["pointwise", "attention"]
    assert "the scales of cached integers differ within a row" in missed
    g = parse_graph(CACHED.format(last=16).replace("attention(%q, %0, %2) {scale = 0.3}", "attention(%q, %2, %2) {scale = 0.3}"))
    ctx = run(g, [RecogniseAttention()])
    assert not [r for r in ctx.remarks if "cached integers" in r.message]  # nothing reads it as keys


def test_pages_are_read_by_the_kernel() -> None:
    """Keys and values of pages that a table names: no copy in order is made of them. Pages within a head's elements would be one."""
    text = """graph @g(%q: f32[2, 4, 1, 8], %k: f32[9, 16, 2, 8], %v: f32[9, 16, 2, 8], %t: i64[2, S]) -> f32[2, 4, 1, 8] where 1 <= S {
      %a: f32[2, S, 16, 2, 8] = take(%k, %t) {axis = 0}
      %b: f32[2, S, 16, 2, 8] = take(%v, %t) {axis = 0}
      %c: f32[2, 16*S, 2, 8] = reshape(%a) {shape = [2, 16*S, 2, 8]}
      %d: f32[2, 16*S, 2, 8] = reshape(%b) {shape = [2, 16*S, 2, 8]}
      %e: f32[2, 2, 16*S, 8] = transpose(%c) {perm = [0, 2, 1, 3]}
      %f: f32[2, 2, 16*S, 8] = transpose(%d) {perm = [0, 2, 1, 3]}
      %0: f32[2, 4, 1, 8] = attention(%q, %e, %f) {scale = 0.3}
      return %0
    }"""
    found, _ = fused(text, Fuse())
    assert [(kind, sorted(names)) for kind, names in found] == [("attention", sorted(["attention", *["take", "reshape", "transpose"] * 2]))]
    of_columns = """graph @g(%q: f32[2, 4, 8], %k: f32[2, 5, 9], %t: i64[8]) -> f32[2, 4, 8] {
      %a: f32[2, 5, 8] = take(%k, %t) {axis = 2}
      %0: f32[2, 4, 8] = attention(%q, %a, %a) {scale = 0.3}
      return %0
    }"""
    found, _ = fused(of_columns, Fuse())
    assert "take" not in found[-1][1]


TRAINING = """graph @g(%x: f32[1, 40, 96], %dout: f32[1, 4, 40, 8]) -> (f32[1, 40, 4, 8], f32[1, 4, 40, 8], f32[1, 4, 40, 8]) {
  %a: f32[1, 40, 32] = slice(%x) {axis = 2, stop = 32}
  %b: f32[1, 40, 4, 8] = reshape(%a) {shape = [1, 40, 4, 8]}
  %q: f32[1, 4, 40, 8] = transpose(%b) {perm = [0, 2, 1, 3]}
  %k: f32[1, 4, 40, 8] = neg(%q)
  %o: f32[1, 4, 40, 8], %l: f32[1, 4, 40] = attention_forward(%q, %k, %q) {scale = 0.3, causal = true}
  %dq: f32[1, 4, 40, 8], %dk: f32[1, 4, 40, 8], %dv: f32[1, 4, 40, 8] =
    attention_backward(%dout, %o, %l, %q, %k, %q) {scale = 0.3, causal = true}
  %t: f32[1, 40, 4, 8] = transpose(%o) {perm = [0, 2, 1, 3]}
  %y: f32[1, 40, 4, 8] = exp(%t)
  %g: f32[1, 4, 40, 8] = add(%dq, %dk)
  return %y, %g, %dv
}"""


@pytest.mark.parametrize("target", [FAST, Target("cuda", "sm_90")], ids=str)
def test_training_stays_whole_with_views_before_it_alone(target: Target) -> None:
    g = parse_graph(TRAINING)
    run(g, [Expand(), Fuse()], target)
    inside = {n.attrs["kind"]: [m.name for m in n.body.nodes()] for n in g.nodes() if n.name == "fusion" and len(n.results) > 1}
    views = ["slice", "reshape", "transpose"]
    assert inside == {name: [*views, name] for name in ("attention_forward", "attention_backward")}


def test_training_is_expanded_where_there_is_no_kernel() -> None:
    g = parse_graph("""graph @g(%q: f32[1, 4, 40, D], %k: f32[1, 4, 40, D]) -> (f32[1, 4, 40, D], f32[1, 4, 40])
    where 1 <= D {
      %o: f32[1, 4, 40, D], %l: f32[1, 4, 40] = attention_forward(%q, %k, %k) {scale = 0.3}
      return %o, %l
    }""")
    ctx = run(g, [Expand()], FAST)
    assert not [n for n in g.nodes() if n.name.startswith("attention")]
    said = [r.message for r in ctx.remarks if "attention" in r.message]
    assert said == ["attention_forward is expanded: no kernel takes heads of unknown size"]


@pytest.mark.parametrize(("target", "reason"), [
    (FAST, ["attention_backward is expanded: no kernel of a CPU gives the gradient of a bias that is of halves"]),
    (Target("cuda", "sm_90"), []),
], ids=str)  # fmt: skip
def test_the_gradient_of_a_bias_of_halves_is_a_gpu_s(target: Target, reason: list[str]) -> None:
    q, lse = "bf16[1, 4, 40, 8]", "f32[1, 4, 40]"
    g = parse_graph(f"""graph @g(%d: {q}, %o: {q}, %l: {lse}, %q: {q}, %b: bf16[4, 40, 40]) -> ({q}, {q}, {q}, bf16[4, 40, 40]) {{
      %0: {q}, %1: {q}, %2: {q}, %3: bf16[4, 40, 40] = attention_backward(%d, %o, %l, %q, %q, %q, %b) {{scale = 0.3, bias_gradient = true}}
      return %0, %1, %2, %3
    }}""")
    ctx = run(g, [Expand()], target)
    assert [r.message for r in ctx.remarks if "attention" in r.message] == reason

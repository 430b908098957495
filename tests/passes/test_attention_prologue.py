"""What an attention's kernel computes when it reads a row, and what it leaves to a kernel before it."""

from __future__ import annotations

import pytest
from fusing import fused

from graphopt.ir import parse_graph
from graphopt.pass_manager import run_passes
from graphopt.passes.fusion import Fuse
from graphopt.rewrite import PassContext
from graphopt.target import Target


def rotated(name: str, heads: int, rows: int | str, size: int, axis: int = 3, dtype: str = "f32") -> str:
    half, full = f"{dtype}[1, {heads}, {rows}, {size // 2}]", f"{dtype}[1, {heads}, {rows}, {size}]"
    return f"""
      %{name}a: {full} = mul(%{name}, %c)
      %{name}b: {half} = slice(%{name}) {{axis = 3, start = {size // 2}, stop = {size}}}
      %{name}d: {half} = neg(%{name}b)
      %{name}e: {half} = slice(%{name}) {{axis = 3, stop = {size // 2}}}
      %{name}f: {full} = concat(%{name}d, %{name}e) {{axis = 3}}
      %{name}g: {full} = mul(%{name}f, %s)
      %{name}r: {full} = add(%{name}a, %{name}g)"""


def layer(rows: int | str = 64, heads: int = 4, shared: int = 4, size: int = 32, result: str = "%0", where: str = "") -> str:
    """Attention of rotated queries and keys; ``result`` are the graph's outputs."""
    q, k = (f"f32[1, {n}, {rows}, {size}]" for n in (heads, shared))
    outputs = {"%0": q, "%0, %kr": f"({q}, {k})"}[result]
    return f"""graph @g(%q: {q}, %k: {k}, %v: {k}, %c: f32[{rows}, {size}], %s: f32[{rows}, {size}]) -> {outputs}{where} {{
      {rotated("q", heads, rows, size)}
      {rotated("k", shared, rows, size)}
      %0: {q} = attention(%qr, %kr, %v) {{scale = 0.2, causal = true}}
      return {result}
    }}"""


def kinds(text: str) -> tuple[list[tuple[str, int]], list[str]]:
    """Regions with the number of joins in each, and what was missed."""
    found, missed = fused(text, Fuse())
    return [(kind, names.count("concat")) for kind, names in found], missed


def test_rotations_are_the_kernels() -> None:
    assert kinds(layer())[0] == [("attention", 2)]


def test_keys_are_rotated_once_where_they_are_read_often() -> None:
    found, missed = kinds(layer(rows=2048, heads=16, shared=2))
    assert found == [("pointwise", 1), ("attention", 1)]
    assert any("each task of the attention would compute it again: it costs" in reason for reason in missed)


def test_rows_by_symbol() -> None:
    """Queries are read once whatever their number is."""
    found, missed = kinds(layer(rows="S", heads=16, shared=2, size=64, where=" where 1 <= S"))
    assert found == [("pointwise", 1), ("attention", 1)]
    assert any("each task of the attention would compute it again" in reason for reason in missed)


def test_keys_that_are_kept_are_written() -> None:
    """A cache wants them as they are."""
    found, missed = kinds(layer(result="%0, %kr"))
    assert found == [("pointwise", 1), ("attention", 1)]
    assert any("its result is also used by something that stays outside of regions" in reason for reason in missed)


def test_few_queries_read_keys_as_they_are() -> None:
    found, missed = kinds(layer(rows=2))
    assert found == [("pointwise", 1), ("attention", 1)]
    assert any("where queries are few" in reason for reason in missed)


def joined(queries: int = 1, result: str = "%0", new: str = "%n", cached: str = "N") -> str:
    """Attention over cached keys and values with new ones behind them."""
    total = f"{cached} + 1" if cached == "N" else str(int(cached) + 1)
    q, k, one = f"f32[1, 8, {queries}, 32]", f"f32[1, 2, {cached}, 32]", "f32[1, 2, 1, 32]"
    outputs = {"%0": q, "%0, %a": f"({q}, f32[1, 2, {total}, 32])"}[result]
    return f"""graph @g(%q: {q}, %k: {k}, %v: {k}, %n: {one}) -> {outputs}{" where 1 <= N" if cached == "N" else ""} {{
      %m: {one} = neg(%n)
      %a: f32[1, 2, {total}, 32] = concat(%k, {new}) {{axis = 2}}
      %b: f32[1, 2, {total}, 32] = concat(%v, %n) {{axis = 2}}
      %0: {q} = attention(%q, %a, %b) {{scale = 0.2}}
      return {result}
    }}"""


@pytest.mark.parametrize("cached", ["64", "N"])
def test_few_queries_read_joined_keys_part_by_part(cached: str) -> None:
    found, _ = fused(joined(cached=cached), Fuse())
    assert found == [("attention", ["concat", "concat", "attention"])]
    found, missed = fused(joined(cached=cached, new="%m"), Fuse())
    assert [kind for kind, _ in found] == ["pointwise", "attention"] and found[1][1] == ["concat", "concat", "attention"]
    assert "keys and values that are joined are read as they are" in " ".join(missed)


def test_what_joined_keys_are_made_of_is_written() -> None:
    """Pages, whose table must not be read behind its end, and integers, whose rows have scales."""
    paged = """graph @g(%q: f32[1, 4, 1, 32], %p: f32[9, 2, 16, 32], %t: i64[1, 6], %n: f32[1, 2, 1, 32]) -> f32[1, 4, 1, 32] {
      %0: f32[1, 6, 2, 16, 32] = take(%p, %t) {axis = 0}
      %1: f32[1, 2, 6, 16, 32] = transpose(%0) {perm = [0, 2, 1, 3, 4]}
      %2: f32[1, 2, 96, 32] = reshape(%1) {shape = [1, 2, 96, 32]}
      %3: f32[1, 2, 97, 32] = concat(%2, %n) {axis = 2}
      %4: f32[1, 4, 1, 32] = attention(%q, %3, %3) {scale = 0.2}
      return %4
    }"""
    small = """graph @g(%q: f32[1, 4, 1, 32], %i: i8[1, 2, 96, 32], %s: f32[1, 2, 96, 1], %n: f32[1, 2, 1, 32]) -> f32[1, 4, 1, 32] {
      %2: f32[1, 2, 96, 32] = dequantize(%i, %s)
      %3: f32[1, 2, 97, 32] = concat(%2, %n) {axis = 2}
      %4: f32[1, 4, 1, 32] = attention(%q, %3, %3) {scale = 0.2}
      return %4
    }"""
    for text, name in ((paged, "take"), (small, "dequantize")):
        found, _ = fused(text, Fuse())
        assert found[-1][0] == "attention" and name not in found[-1][1]


def test_one_head_of_joined_keys_for_many_is_written() -> None:
    found, missed = fused(joined(cached="64").replace("f32[1, 2, ", "f32[1, 1, ").replace("f32[1, 8, 1, 32]", "f32[1, 32, 1, 32]"), Fuse())
    assert found[-1] == ("attention", ["attention"])
    assert any("part by part only where queries are few" in reason for reason in missed)


def test_joined_keys_are_written_for_many_queries_and_other_readers() -> None:
    found, missed = fused(joined(queries=64, cached="64"), Fuse())
    assert found[-1] == ("attention", ["attention"])
    assert any("part by part only where queries are few" in reason for reason in missed)
    found, missed = fused(joined(result="%0, %a", cached="64"), Fuse())
    assert found[-1] == ("attention", ["concat", "attention"])


NORMED = """graph @g(%x: f32[1, 64, 4, 32], %k: f32[1, 4, 64, 32], %w: f32[32]) -> f32[1, 4, 64, 32] {{
  %0: f32[1, 64, 4, 32] = rms_norm(%x, %w) {{{norm}}}
  %1: f32[1, 4, 64, 32] = {view}
  %2: f32[1, 4, 64, 32] = {after}
  %3: f32[1, 4, 64, 32] = attention({operands}) {{scale = 0.2}}
  return %3
}}"""
TURNED = "transpose(%0) {perm = [0, 2, 1, 3]}"


def normed(norm: str = "eps = 0.001", view: str = TURNED, after: str = "mul(%1, %w)", operands: str = "%2, %k, %k") -> str:
    return NORMED.format(norm=norm, view=view, after=after, operands=operands)


def test_a_norm_of_heads_is_the_kernels() -> None:
    found, _ = fused(normed(), Fuse())
    assert [kind for kind, _ in found] == ["attention"]
    found, _ = fused(normed(operands="%k, %2, %k"), Fuse())
    assert [kind for kind, _ in found] == ["attention"]


@pytest.mark.parametrize(("text", "why"), [
    (normed(norm="axes = 2, eps = 0.001").replace("%w: f32[32]", "%w: f32[4, 32]").replace("mul(%1, %w)", "neg(%1)"),
     "it normalizes other rows than heads of whole vectors"),
    (normed(view="reshape(%0) {shape = [1, 4, 64, 32]}", after="flip(%1) {axes = [3]}"), "what is normalized is read through flip"),
    (normed(operands="%2, %2, %k"), "nothing but rows of queries, of keys or of values"),
    (normed(after="sin(%1)"), "computes no sin of f32 on the way"),
    (normed(operands="%k, %k, %k, %2").replace("%2: f32[1, 4, 64, 32] = mul(%1, %w)", "%2: f32[1, 4, 64, 64] = concat(%1, %1) {axis = 3}"),
     "nothing but rows of queries, of keys or of values"),
])  # fmt: skip
def test_what_is_not_the_kernels(text: str, why: str) -> None:
    found, missed = fused(text, Fuse())
    assert [kind for kind, _ in found][-1] == "attention" and "rms_norm" not in found[-1][1]
    assert any(why in reason for reason in missed), missed


def test_rows_that_meet_other_rows() -> None:
    """Heads and tokens exchanged: a row's norm would not be the one of what it is added to."""
    text = normed(after="add(%1, %4)").replace("32, 32]", "32]").replace("64", "4").replace(
        "%2:", "%4: f32[1, 4, 4, 32] = reshape(%0) {shape = [1, 4, 4, 32]}\n  %2:")  # fmt: skip
    found, missed = fused(text, Fuse())
    assert "rms_norm" not in found[-1][1] and any("what is normalized is read by other rows, too" in reason for reason in missed)


def test_what_follows_a_product_stays_with_it() -> None:
    found, _ = fused("""graph @g(%x: f32[4, 64, 48], %w: f32[48, 32], %b: f32[32], %k: f32[4, 64, 32]) -> f32[4, 64, 32] {
      %0: f32[4, 64, 32] = matmul(%x, %w)
      %1: f32[4, 64, 32] = add(%0, %b)
      %2: f32[4, 64, 32] = attention(%1, %k, %k) {scale = 0.2}
      return %2
    }""", Fuse())  # fmt: skip
    assert [(kind, sorted(names)) for kind, names in found] == [("matmul", ["add", "matmul"]), ("attention", ["attention"])]


def test_only_the_kernels_of_cpus_do_it() -> None:
    g = parse_graph(layer())
    run_passes(g, [Fuse()], PassContext(target=Target("cuda", "sm_90")))
    assert [n.attrs["kind"] for n in g.nodes() if n.name == "fusion"].count("attention") == 1
    assert len([n for n in g.nodes() if n.name == "fusion"]) == 3

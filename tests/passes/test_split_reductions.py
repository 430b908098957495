"""split-reductions: a few long rows become parts enough for a GPU's processors; nothing changes elsewhere."""

from __future__ import annotations

import pytest
from fusing import assert_same_values

from graphopt.ir import parse_graph, structurally_equal, verify
from graphopt.passes.layout import SplitReductions
from graphopt.rewrite import PassContext
from graphopt.target import Target

GPU = Target.from_name("cuda:sm_90:8")
BEFORE = """
graph @g(%x: f32[3, 10, 64]) -> f32[3, 1, 1] {
  %0: f32[3, 1, 1] = sum(%x) {axes = [1, 2], keepdims = true}
  return %0
}"""
AFTER = """
graph @g(%x: f32[3, 10, 64]) -> f32[3, 1, 1] {
  %0: f32[3, 2, 5, 64] = reshape(%x) {shape = [3, 2, 5, 64]}
  %1: f32[3, 2] = sum(%0) {axes = [2, 3]}
  %2: f32[3] = sum(%1) {axes = [1]}
  %3: f32[3, 1, 1] = reshape(%2) {shape = [3, 1, 1]}
  return %3
}"""


def split(text: str, target: Target = GPU, least: int = 100) -> tuple[str, PassContext]:
    """The graph afterwards; checked for structure, values, and that a second run changes nothing."""
    g, ctx = parse_graph(text), PassContext(target=target)
    before = g.clone()
    p = SplitReductions(least=least)
    assert p.run(g, ctx) == (not structurally_equal(g, before))
    verify(g)
    assert_same_values(before, g)
    assert not p.run(g, PassContext(target=target))
    return str(g), ctx


def test_before_and_after() -> None:
    """Three rows for eight processors: three parts a row were wanted, two divide an axis."""
    found, ctx = split(BEFORE)
    assert structurally_equal(parse_graph(found), parse_graph(AFTER))
    assert "axis 1 of f32[3, 10, 64] is reduced in 2 parts" in str(ctx.remarks[-1])


@pytest.mark.parametrize("op", ["mean", "max", "min", "prod"])
@pytest.mark.parametrize(("axes", "shape"), [("0", "10, 64"), ("0, 1, 2", ""), ("0, 2", "10")])
def test_any_axes(op: str, axes: str, shape: str) -> None:
    text = f"graph @g(%x: f32[96, 10, 64]) -> f32[{shape}] {{\n %0: f32[{shape}] = {op}(%x) {{axes = [{axes}]}}\n return %0\n}}"
    rows = {"10, 64": 640, "": 1, "10": 10}[shape]
    target = Target.from_name(f"cuda:sm_90:{4 * rows}")
    found, _ = split(text, target, least=8)
    assert found.count(f"= {op}(") == 2


def test_halves_are_summed_in_f32_and_rounded_once() -> None:
    found, _ = split("graph @g(%x: f16[4096]) -> f16[] {\n %0: f16[] = sum(%x) {axes = [0]}\n return %0\n}")
    types = [line.split(":")[1].split(" =")[0] for line in found.splitlines() if " = " in line]
    assert types == [" f32[4096]", " f32[8, 512]", " f32[8]", " f32[]", " f16[]"]


@pytest.mark.parametrize(("target", "least", "change"), [
    (Target("cpu", "x86_64", cores=8), 100, ("", "")),  # a CPU's kernels split long sums themselves
    (Target.from_name("cuda:sm_90:3"), 100, ("", "")),  # rows for all processors
    (GPU, 400, ("", "")),  # parts too short
    (GPU, 100, ("10", "N")),  # sizes that are not known
])  # fmt: skip
def test_must_not_fire(target: Target, least: int, change: tuple[str, str]) -> None:
    text = BEFORE.replace("{\n", "where 1 <= N {\n", 1) if change[1] else BEFORE
    _, ctx = split(text.replace(*change) if change[0] else text, target, least)
    assert not ctx.remarks


def test_a_reshape_of_the_models_own_is_no_sign_of_a_split() -> None:
    found, _ = split("graph @g(%x: f32[64, 64]) -> f32[] {\n %0: f32[64, 8, 8] = reshape(%x) {shape = [64, 8, 8]}\n"
                     " %1: f32[] = sum(%0) {axes = [0, 1, 2]}\n return %1\n}")  # fmt: skip
    assert found.count("sum(") == 2


def test_an_axis_of_prime_length_is_declined() -> None:
    found, ctx = split("graph @g(%x: f32[4099]) -> f32[] {\n %0: f32[] = sum(%x) {axes = [0]}\n return %0\n}")
    assert found.count("sum(") == 1 and "no axis of f32[4099] falls into 2 to 8 parts" in str(ctx.remarks[-1])

"""channel-norms: group norms behind convolutions by the moments of their channels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphopt
from graphopt.ir import parse_graph
from graphopt.passes.layout import ChannelNorms, ConvLayout
from graphopt.rewrite import PassContext
from graphopt.target import Target
from graphopt.testing import check_pass

CONV = "conv(%x, %k) {stride = [1, 1], padding = [1, 1], dilation = [1, 1]}"


def normed(groups: int, affine: int = 2, between: str = "", x: str = "%0", dtype: str = "f32") -> str:
    more = "".join(f", %{name}: {dtype}[6]" for name in "wb"[:affine])
    operands = ", ".join([x, *(f"%{name}" for name in "wb"[:affine])])
    return f"""graph @g(%x: {dtype}[B, 3, H, 5], %k: {dtype}[6, 3, 3, 3]{more}) -> {dtype}[B, 6, H, 5] where 1 <= B, 2 <= H {{
      %0: {dtype}[B, 6, H, 5] = {CONV}
      {between}
      %n: {dtype}[B, 6, H, 5] = group_norm({operands}) {{groups = {groups}}}
      return %n
    }}"""


def test_before_and_after() -> None:
    check_pass(ChannelNorms(), normed(6, affine=1), f"""
    graph @g(%x: f32[B, 3, H, 5], %k: f32[6, 3, 3, 3], %w: f32[6]) -> f32[B, 6, H, 5] where 1 <= B, 2 <= H {{
      %0: f32[B, 6, H, 5] = {CONV}
      %1: f32[B, 6, 1, 1] = mean(%0) {{axes = [2, 3], keepdims = true}}
      %2: f32[B, 6, H, 5] = sub(%1, %0)
      %3: f32[B, 6, H, 5] = mul(%2, %2)
      %4: f32[B, 6, 1, 1] = mean(%3) {{axes = [2, 3], keepdims = true}}
      %5: f32[B, 6, H, 5] = sub(%0, %1)
      %c: f32[] = constant() {{value = 1e-05, dtype = f32}}
      %6: f32[B, 6, 1, 1] = add(%4, %c)
      %7: f32[B, 6, 1, 1] = rsqrt(%6)
      %8: f32[B, 6, H, 5] = mul(%5, %7)
      %9: f32[6, 1, 1] = reshape(%w) {{shape = [6, 1, 1]}}
      %10: f32[B, 6, H, 5] = mul(%8, %9)
      return %10
    }}""")  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("affine", [0, 1, 2])
def test_groups(groups: int, affine: int) -> None:
    check_pass(ChannelNorms(), normed(groups, affine))


def test_behind_pointwise_ops() -> None:
    check_pass(ChannelNorms(), normed(2, between="%r: f32[B, 6, H, 5] = relu(%0)\n%s: f32[B, 6, H, 5] = add(%r, %0)", x="%s"))


def test_what_stays() -> None:
    alone = """graph @g(%x: f32[B, 6, 4, 5]) -> f32[B, 6, 4, 5] where 1 <= B {
      %0: f32[B, 6, 4, 5] = group_norm(%x) {groups = 2}
      return %0
    }"""
    check_pass(ChannelNorms(), alone, fires=False)
    check_pass(ChannelNorms(), normed(2, dtype="bf16"), fires=False, reason="its dtype is bf16")
    assert not ChannelNorms().run(parse_graph(normed(2)), PassContext(target=Target.from_name("cuda:sm_90")))


def test_a_variance_over_space_is_taken_apart_in_the_other_layout() -> None:
    g = check_pass(ConvLayout(), f"""
    graph @g(%x: f32[2, 3, 4, 5], %k: f32[6, 3, 3, 3]) -> f32[2, 6] {{
      %0: f32[2, 6, 4, 5] = {CONV}
      %1: f32[2, 6] = var(%0) {{axes = [2, 3]}}
      return %1
    }}""")  # fmt: skip
    assert "var" not in {n.op.name for n in g.nodes()}


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 16), nn.GroupNorm(16, 16), nn.InstanceNorm2d(16, affine=True), nn.GroupNorm(1, 16)],
                         ids=["groups", "channels", "instance", "one group"])  # fmt: skip
def test_no_norm_goes_by_rows_or_through_a_library(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.SiLU(), nn.Conv2d(16, 8, 1)).eval()
    x = torch.randn(1, 3, 12, 11)
    with torch.no_grad():
        compiled = graphopt.compile(model, (x,), strict=True)
        true = copy.deepcopy(model).double()(x.double())
        torch.testing.assert_close(compiled(x).double(), true, rtol=1e-5, atol=1e-5)
    assert not [k for k in compiled.report.kernels if k.kind == "rowwise" and k.locs and "layer_norm" in k.ops]

"""turn-bias: biases of attention that a model has of its own lie with their queries side by side; others as they were."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fusing import run
from torch import Tensor, nn

import graphopt
from graphopt.ir import parse_graph
from graphopt.passes.layout import TurnBias
from graphopt.testing import check_pass

BEFORE = """
graph @g(%q: f32[2, 3, 20, 8], %k: f32[2, 3, 7, 8], %v: f32[2, 3, 7, 8], weight %b: f32[1, 3, 20, 7]) -> f32[2, 3, 20, 8] {
  %o: f32[2, 3, 20, 8] = fusion(%q, %k, %v, %b) {kind = "attention"} body (%q: f32[2, 3, 20, 8], %k: f32[2, 3, 7, 8], %v: f32[2, 3, 7, 8], %b: f32[1, 3, 20, 7]) -> f32[2, 3, 20, 8] {
    %a: f32[2, 3, 20, 8] = attention(%q, %k, %v, %b) {scale = 0.5}
    return %a
  }
  return %o
}"""  # noqa: E501
AFTER = """
graph @g(%q: f32[2, 3, 20, 8], %k: f32[2, 3, 7, 8], %v: f32[2, 3, 7, 8], weight %b: f32[1, 3, 20, 7]) -> f32[2, 3, 20, 8] {
  %p: f32[1, 3, 32, 7] = pad(%b) {high = [0, 0, 12, 0], low = [0, 0, 0, 0], value = 0.0}
  %t: f32[1, 3, 7, 32] = transpose(%p) {perm = [0, 1, 3, 2]}
  %o: f32[2, 3, 20, 8] = fusion(%q, %k, %v, %t) {kind = "attention"} body (%q: f32[2, 3, 20, 8], %k: f32[2, 3, 7, 8], %v: f32[2, 3, 7, 8], %t: f32[1, 3, 7, 32]) -> f32[2, 3, 20, 8] {
    %r: f32[1, 3, 32, 7] = transpose(%t) {perm = [0, 1, 3, 2]}
    %s: f32[1, 3, 20, 7] = slice(%r) {axis = 2, stop = 20}
    %a: f32[2, 3, 20, 8] = attention(%q, %k, %v, %s) {scale = 0.5}
    return %a
  }
  return %o
}"""  # noqa: E501


def test_before_and_after() -> None:
    check_pass(TurnBias(lanes=16), BEFORE, AFTER)


def test_whole_vectors_are_not_padded() -> None:
    after = AFTER.replace("  %p: f32[1, 3, 32, 7] = pad(%b) {high = [0, 0, 12, 0], low = [0, 0, 0, 0], value = 0.0}\n", "")
    after = after.replace("    %s: f32[1, 3, 20, 7] = slice(%r) {axis = 2, stop = 20}\n", "").replace("%s)", "%r)")
    check_pass(TurnBias(lanes=4), BEFORE, after.replace("transpose(%p)", "transpose(%b)").replace("32", "20").replace("f20", "f32"))


def test_a_symbolic_batch() -> None:
    def many(text: str) -> str:
        return text.replace("[2, 3", "[B, 3").replace(" {\n", " where 1 <= B <= 9 {\n")

    check_pass(TurnBias(lanes=16), many(BEFORE), many(AFTER))


@pytest.mark.parametrize(
    ("why", "before"),
    [
        ("it is an argument", BEFORE.replace("weight ", "")),
        ("there are fewer queries than lanes", BEFORE.replace("20", "12")),
        ("all queries have the same", BEFORE.replace("%b: f32[1, 3, 20, 7]", "%b: f32[1, 3, 1, 7]")),
        ("all keys have the same", BEFORE.replace("%b: f32[1, 3, 20, 7]", "%b: f32[1, 3, 20, 1]")),
        ("it is a mask", BEFORE.replace("%b: f32[1, 3, 20, 7]", "%b: b1[1, 3, 20, 7]")),
        ("the region is no attention", BEFORE.replace('"attention"', '"pointwise"')),
    ],
)
def test_left_as_it_is(why: str, before: str) -> None:
    g = parse_graph(before)
    text = str(g)
    ctx = run(g, [TurnBias(lanes=16)])
    assert str(g) == text, why
    missed = [r.message for r in ctx.remarks if r.kind == "missed"]
    assert (missed == ["the bias is not made of weights alone: it is transposed at each call"]) == (why == "it is an argument")


class Biased(nn.Module):
    """Attention with a bias of its own, which hides some keys."""

    def __init__(self, heads: int, queries: int, keys: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, heads, queries, keys))
        self.bias.data[0, 0, 3, :5] = float("-inf")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)


@pytest.mark.tvm
@torch.no_grad()
@pytest.mark.parametrize(("queries", "keys"), [(128, 128), (49, 49), (100, 33), (70, 90)])
def test_values(queries: int, keys: int) -> None:
    """Queries that fill vectors, or groups of them, and that do not."""
    torch.manual_seed(0)
    model = Biased(3, queries, keys).eval()
    given = [torch.randn(2, 3, n, 64) for n in (queries, keys, keys)]
    made = graphopt.compile(model, given, strict=True)
    want = copy.deepcopy(model).double()(*(x.double() for x in given))
    torch.testing.assert_close(made(*given).double(), want, rtol=2e-5, atol=2e-5)
    assert [r.kind for r in made.report.remarks if r.pass_name == "turn-bias"] == ["passed"]

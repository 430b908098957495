"""linear-attention: products are bracketed so that no pair of tokens is formed, and only where that is less work."""

from __future__ import annotations

import pytest
import torch

from graphopt.ir import parse_graph
from graphopt.passes.attention import LinearAttention
from graphopt.testing import check_pass

HEAD = "graph @g(%q: f32[2, 96, 8], %k: f32[2, 96, 8], %v: f32[2, 96, 8]) -> f32[2, 96, 8] {\n"
BEFORE = HEAD + """
  %a: f32[2, 96, 8] = sigmoid(%q)
  %b: f32[2, 96, 8] = sigmoid(%k)
  %t: f32[2, 8, 96] = transpose(%b) {perm = [0, 2, 1]}
  %s: f32[2, 96, 96] = matmul(%a, %t)
  %r: f32[2, 96, 1] = sum(%s) {axes = [2], keepdims = true}
  %w: f32[2, 96, 96] = div(%s, %r)
  %o: f32[2, 96, 8] = matmul(%w, %v)
  return %o
}"""
AFTER = HEAD + """
  %a: f32[2, 96, 8] = sigmoid(%q)
  %b: f32[2, 96, 8] = sigmoid(%k)
  %t: f32[2, 8, 96] = transpose(%b) {perm = [0, 2, 1]}
  %z: f32[2, 8, 1] = sum(%t) {axes = [2], keepdims = true}
  %r: f32[2, 96, 1] = matmul(%a, %z)
  %h: f32[2, 8, 8] = matmul(%t, %v)
  %p: f32[2, 96, 8] = matmul(%a, %h)
  %o: f32[2, 96, 8] = div(%p, %r)
  return %o
}"""


def test_before_and_after() -> None:
    check_pass(LinearAttention(), BEFORE, AFTER)


def test_without_normaliser_and_with_factors() -> None:
    g = check_pass(LinearAttention(), HEAD + """
      %t: f32[2, 8, 96] = transpose(%k) {perm = [0, 2, 1]}
      %s: f32[2, 96, 96] = matmul(%q, %t)
      %f: f32[] = constant() {value = 0.25}
      %x: f32[2, 96, 96] = mul(%s, %f)
      %r: f32[2, 96] = sum(%s) {axes = [2]}
      %e: f32[2, 96, 1] = reshape(%r) {shape = [2, 96, 1]}
      %n: f32[2, 96, 1] = abs(%e)
      %d: f32[2, 96, 1] = exp(%n)
      %w: f32[2, 96, 96] = div(%x, %d)
      %o: f32[2, 96, 8] = matmul(%w, %v)
      return %o
    }""")  # fmt: skip
    assert not any(r.shape[-2:] == (96, 96) for n in g.nodes() for r in n.results)


def test_scores_times_their_own_sums() -> None:
    g = check_pass(LinearAttention(), """
      graph @g(%q: f32[512, 64], %k: f32[512, 64]) -> f32[512, 1] {
        %t: f32[64, 512] = transpose(%k) {perm = [1, 0]}
        %s: f32[512, 512] = matmul(%q, %t)
        %r: f32[512, 1] = sum(%s) {axes = [1], keepdims = true}
        %o: f32[512, 1] = matmul(%s, %r)
        return %o
      }""")  # fmt: skip
    assert not any(r.shape == (512, 512) for n in g.nodes() for r in n.results)


def test_symbolic_length_and_shared_keys() -> None:
    """All heads of queries over one head of keys; the length is known to no one."""
    g = check_pass(LinearAttention(), """
      graph @g(%q: f32[B, 4, N, 16], %k: f32[B, 1, N, 16], %v: f32[B, 1, N, 12]) -> f32[B, 4, N, 12] where 1 <= B, 1 <= N {
        %t: f32[B, 1, 16, N] = transpose(%k) {perm = [0, 1, 3, 2]}
        %s: f32[B, 4, N, N] = matmul(%q, %t)
        %o: f32[B, 4, N, 12] = matmul(%s, %v)
        return %o
      }""")  # fmt: skip
    assert [tuple(map(str, n.results[0].shape)) for n in g.nodes() if n.name == "matmul"] == [("B", "1", "16", "12"), ("B", "4", "N", "12")]


MASKED = BEFORE.replace("%v: f32[2, 96, 8])", "%v: f32[2, 96, 8], %m: f32[96, 96])").replace(
    "%r: f32", "%y: f32[2, 96, 96] = mul(%s, %m)\n  %r: f32").replace("sum(%s)", "sum(%y)").replace("div(%s,", "div(%y,")  # fmt: skip


@pytest.mark.parametrize(("text", "why"), [
    (MASKED, None),  # causal-linear-attention
    (BEFORE.replace("div(%s, %r)", "div(%s, %r)\n  %l: f32[2, 96] = max(%s) {axes = [2]}").replace("return %o", "return %o, %l")
     .replace("-> f32[2, 96, 8]", "-> (f32[2, 96, 8], f32[2, 96])"), "its scores are also used by max"),
    (BEFORE.replace("f32", "f16"), "a sum over all keys may leave the range of f16"),
    (BEFORE.replace("96", "9"), "the other order is hardly less work"),
    (BEFORE.replace("96", "6"), None),  # more work
    (BEFORE.replace("%w: f32[2, 96, 96] = div(%s, %r)", "%w: f32[2, 96, 96] = softmax(%s) {axis = 2}"), None),
    (AFTER, None),
    ("graph @g(%q: f32[96, 8], %k: f32[8, 96]) -> f32[96, 96] {\n %0: f32[96, 96] = matmul(%q, %k)\n"
     " %1: f32[96, 96] = matmul(%0, %0)\n return %1\n}", None),
])  # fmt: skip
def test_must_not_fire(text: str, why: str | None) -> None:
    check_pass(LinearAttention(), text, fires=False, reason=why)


def test_a_model() -> None:
    """As it is written in PyTorch: no kernel holds all pairs."""
    import graphopt

    class Linear(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
            s = torch.einsum("bhid,bhjd->bhij", q, k)
            return torch.einsum("bhij,bhjd->bhid", s / (s.sum(-1, keepdim=True) + 1e-6), v)

    x = [torch.randn(2, 4, 200, 16, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    compiled = graphopt.compile(Linear(), tuple(x), backend="eager")
    g = parse_graph(compiled.report.text_after)
    shapes = [r.shape for n in g.nodes() for m in [n, *(n.body.nodes() if n.body is not None else ())] for r in m.results]
    assert shapes and not any(list(s).count(200) > 1 for s in shapes)
    torch.testing.assert_close(compiled(*x), Linear()(*x))

"""causal-linear-attention on running sums of outer products, q_n . cumsum(k_n v_n^T): no state is formed for each token."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from test_causal_linear_attention import N, Spelling, inputs, optimised, phi
from torch import Tensor

from graphopt.ir import Graph, dims, evaluate
from graphopt.passes.attention import CausalLinearAttention
from graphopt.testing import check_pass

HEAD = "graph @g(%q: f32[2, 512, 32], %k: f32[2, 512, 32], %v: f32[2, 512, 24]) -> f32[2, 512, 24] {"
BEFORE = HEAD + """
  %a: f32[2, 512, 32, 1] = reshape(%k) {shape = [2, 512, 32, 1]}
  %b: f32[2, 512, 1, 24] = reshape(%v) {shape = [2, 512, 1, 24]}
  %p: f32[2, 512, 32, 24] = mul(%a, %b)
  %s: f32[2, 512, 32, 24] = cumsum(%p) {axis = 1}
  %c: f32[2, 512, 1, 32] = reshape(%q) {shape = [2, 512, 1, 32]}
  %r: f32[2, 512, 1, 24] = matmul(%c, %s)
  %o: f32[2, 512, 24] = reshape(%r) {shape = [2, 512, 24]}
  return %o
}"""
AFTER = HEAD + """
  %a: f32[2, 8, 64, 32] = reshape(%q) {shape = [2, 8, 64, 32]}
  %b: f32[2, 8, 64, 32] = reshape(%k) {shape = [2, 8, 64, 32]}
  %c: f32[2, 8, 64, 24] = reshape(%v) {shape = [2, 8, 64, 24]}
  %t: f32[2, 8, 32, 64] = transpose(%b) {perm = [0, 1, 3, 2]}
  %i: i64[64] = iota() {size = 64}
  %r: i64[64, 1] = reshape(%i) {shape = [64, 1]}
  %m: b1[64, 64] = le(%i, %r)
  %s: f32[2, 8, 64, 64] = matmul(%a, %t)
  %zero: f32[] = constant() {value = 0.0}
  %w: f32[2, 8, 64, 64] = where(%m, %s, %zero)
  %within: f32[2, 8, 64, 24] = matmul(%w, %c)
  %states: f32[2, 8, 32, 24] = matmul(%t, %c)
  %shifted: f32[2, 9, 32, 24] = pad(%states) {low = [0, 1, 0, 0], high = [0, 0, 0, 0]}
  %front: f32[2, 8, 32, 24] = slice(%shifted) {axis = 1, stop = 8}
  %before: f32[2, 8, 32, 24] = cumsum(%front) {axis = 1}
  %far: f32[2, 8, 64, 24] = matmul(%a, %before)
  %both: f32[2, 8, 64, 24] = add(%within, %far)
  %x: f32[2, 512, 24] = reshape(%both) {shape = [2, 512, 24]}
  %y: f32[2, 512, 1, 24] = reshape(%x) {shape = [2, 512, 1, 24]}
  %o: f32[2, 512, 24] = reshape(%y) {shape = [2, 512, 24]}
  return %o
}"""


def _holds_states(g: Graph, length: object, key: int = 32, value: int = 24) -> bool:
    """Whether a value has a number for each row and each pair of a key's and a value's elements."""
    wanted = Counter([length, key, value])
    return any(wanted <= Counter(r.shape) for n in g.nodes() for r in n.results)


def test_before_and_after() -> None:
    check_pass(CausalLinearAttention(), BEFORE, AFTER)


def test_a_sum_of_products() -> None:
    text = BEFORE.replace("%c: f32[2, 512, 1, 32]", "%c: f32[2, 512, 32, 1]").replace("shape = [2, 512, 1, 32]", "shape = [2, 512, 32, 1]")
    text = text.replace("%r:", "%x: f32[2, 512, 32, 24] = mul(%s, %c)\n  %r:")
    text = text.replace("matmul(%c, %s)", "sum(%x) {axes = [2], keepdims = true}")
    assert not _holds_states(check_pass(CausalLinearAttention(), text), 512)


def test_symbolic_length_and_a_step_between() -> None:
    g = check_pass(CausalLinearAttention(), """
      graph @g(%q: f32[B, N, 32], %k: f32[B, N, 32, 1], %v: f32[B, N, 1, 24], %z: f32[B, N, 1, 1]) -> f32[B, N, 24] where 1 <= B, 1 <= N {
        %p: f32[B, N, 32, 24] = matmul(%k, %v)
        %s: f32[B, N, 32, 24] = cumsum(%p) {axis = 1}
        %n: f32[B, N, 32, 24] = mul(%z, %s)
        %f: f32[B*N, 32, 24] = reshape(%n) {shape = [B*N, 32, 24]}
        %c: f32[B*N, 1, 32] = reshape(%q) {shape = [B*N, 1, 32]}
        %r: f32[B*N, 1, 24] = matmul(%c, %f)
        %o: f32[B, N, 24] = reshape(%r) {shape = [B, N, 24]}
        return %o
      }""", bindings=[{"B": 2, "N": n} for n in (1, 63, 64, 65, 200)])  # fmt: skip
    assert not _holds_states(g, dims.symbol("N"))


@pytest.mark.parametrize(("text", "why"), [
    (BEFORE.replace("return %o", "%l: f32[2, 1, 32, 24] = slice(%s) {axis = 1, start = 511, stop = 512}\n  return %o, %l")
     .replace("-> f32[2, 512, 24]", "-> (f32[2, 512, 24], f32[2, 1, 32, 24])"), "its running sums are also used elsewhere"),
    (BEFORE.replace("f32", "f16"), "a sum over all keys may leave the range of f16"),
    (BEFORE.replace("512", "16"), "running sums for each of 16 rows are hardly more work than chunks of them"),
    (BEFORE.replace("%s: f32", "%x: f32[2, 512, 32, 24] = flip(%p) {axes = [1]}\n  %s: f32").replace("cumsum(%p)", "cumsum(%x)"), None),
    (BEFORE.replace("%s: f32", "%x: f32[2, 512, 32, 24] = exp(%p)\n  %s: f32").replace("cumsum(%p)", "cumsum(%x)"), None),
    (BEFORE.replace("cumsum(%p) {axis = 1}", "cumsum(%p) {axis = 2}"), None),
    (BEFORE.replace("cumsum", "cummax"), None),
    (BEFORE.replace("%k: f32[2, 512, 32]", "%k: f32[2, 512, 768]").replace("%a: f32[2, 512, 32, 1] = reshape(%k) {shape = [2, 512, 32, 1]}",
     "%a: f32[2, 512, 32, 24] = reshape(%k) {shape = [2, 512, 32, 24]}"), None),  # as in RWKV: no outer product
    ("""graph @f(%q: f32[2, 512], %k: f32[2, 512], %v: f32[2, 512, 64]) -> f32[2, 64] {
       %a: f32[2, 512, 1] = reshape(%k) {shape = [2, 512, 1]}
       %p: f32[2, 512, 64] = mul(%a, %v)
       %s: f32[2, 512, 64] = cumsum(%p) {axis = 1}
       %c: f32[2, 512, 1] = reshape(%q) {shape = [2, 512, 1]}
       %x: f32[2, 512, 64] = mul(%c, %s)
       %o: f32[2, 64] = sum(%x) {axes = [1]}
       return %o
     }""", None),  # summed over the rows themselves
    ("""graph @f(%q: f32[2, 1, 512], %k: f32[2, 512, 1], %v: f32[2, 512, 64]) -> f32[2, 1, 64] {
       %p: f32[2, 512, 64] = mul(%k, %v)
       %s: f32[2, 512, 64] = cumsum(%p) {axis = 1}
       %o: f32[2, 1, 64] = matmul(%q, %s)
       return %o
     }""", None),
    (AFTER, None),
])  # fmt: skip
def test_must_not_fire(text: str, why: str | None) -> None:
    check_pass(CausalLinearAttention(), text, fires=False, reason=why)


# --- spellings -----------------------------------------------------------------------------------------------------------


def einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in the code of Katharopoulos et al., with its normaliser."""
    q, k = phi(q), phi(k)
    states = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    z = 1 / (torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2)) + 1e-6)
    return torch.einsum("bhnd,bhnde,bhn->bhne", q, states, z)


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = (k[..., None, :] * v[..., None]).cumsum(-3)
    return (states @ q[..., None]).squeeze(-1)


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = phi(q), phi(k)
    states = torch.cumsum(k[..., None] @ v[..., None, :], 2)
    return (q[..., None] * states).sum(-2) / (q * k.cumsum(2)).sum(-1, keepdim=True)


def sequence_major(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    states = torch.einsum("nlhd,nlhm->nlhdm", k, v).cumsum(1)
    return torch.einsum("nlhd,nlhdm->nlhm", q, states).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fn", [einsums, products, summed, sequence_major], ids=lambda f: f.__name__)
def test_a_spelling_is_found(fn: Spelling, dtype: torch.dtype) -> None:
    x = inputs(dtype, size=64)
    new, remarks = optimised(fn, x)
    assert any(r.kind == "passed" for r in remarks) and not _holds_states(new, N, 64, 64), f"{remarks}\n{new}"
    exact = fn(*(t.double() for t in x))
    if dtype == torch.float32:
        torch.testing.assert_close(evaluate(new, x, wide=True)[0], exact, rtol=1e-9, atol=1e-9)
    ours, theirs = ((y.double() - exact).norm() / exact.norm() for y in (evaluate(new, x)[0], fn(*x)))
    assert ours <= 2 * theirs, f"error {ours:.2e}, eager's {theirs:.2e}"

"""Attention in training: found before autograd, its gradients against f64 with eager's own error as the yardstick; and why not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training_checks import B, D, Fn, H, M, compiled, gradients, judge, qkv, x

from graphopt import clear_reports, reports
from graphopt.remarks import Remark


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / D**0.5, -1) @ v


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return torch.softmax((q @ k.transpose(-1, -2) * 0.3).masked_fill(hidden, float("-inf")), -1) @ v


def spelled_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = torch.einsum("bhid,bhjd->bhij", q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return torch.einsum("bhij,bhjd->bihd", e / e.sum(-1, keepdim=True), v)


def window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    s = torch.where((j <= i) & (j > i - 3), q @ k.transpose(-1, -2), float("-inf"))
    return F.softmax(s, dim=-1) @ v


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.softmax(2.0 * torch.tanh(q @ k.transpose(-1, -2) / 2.0), dim=-1) @ v


def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return causal(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def projected(y: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A layer: one product for queries, keys and values, heads of it, and a product behind."""
    q, k, v = (y @ w).view(B, M, 3, H, D).permute(2, 0, 3, 1, 4)
    return causal(q, k, v).transpose(1, 2).reshape(B, M, H * D) @ out


def transposed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The result is ``[D, M]`` in memory, which the view needs."""
    return (v.transpose(-1, -2) @ torch.softmax(q @ k.transpose(-1, -2), -1).transpose(-1, -2)).view(B, H * D, M)


def blind(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def linear(y: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Heads of linear layers, whose results are views of products of two axes."""
    q, k, v = (F.linear(y, w * s, b).view(B, M, H, D).transpose(1, 2) for s in (1.0, 0.5, 2.0))
    return causal(q, k, v).transpose(1, 2).reshape(B, M, H * D)


def learned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) + b, -1) @ v


def of_distance(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """A bias for each head and distance, causal: as T5 has."""
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    s = q @ k.transpose(-1, -2) + F.embedding(i - j + k.shape[-2], table).permute(2, 0, 1)[None]
    return torch.softmax(s.masked_fill(j > i, float("-inf")), -1) @ v


def capped_and_biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.softmax(2.0 * torch.tanh(q @ k.transpose(-1, -2) / 2.0) + b * 0.5, -1) @ v


def sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2)
    column = s.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v


CASES: dict[str, tuple[Fn, Sequence[torch.Tensor]]] = {
    "naive": (naive, qkv()),
    "cross": (naive, qkv(n=13)),
    "causal": (causal, qkv()),
    "spelled out": (spelled_out, qkv()),
    "window": (window, qkv()),
    "soft cap": (capped, qkv()),
    "shared heads": (repeated, qkv(shared=2)),
    "keys of one batch": (naive, [x(B, H, M, D), x(1, H, M, D), x(1, H, M, D, seed=1)]),
    "library": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2), qkv()),
    "library, by position": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True), qkv()),
    "library, shared heads": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), qkv(shared=2)),
    "library, a mask": (blind, [*qkv(), (torch.arange(M) < 6)[None]]),
    "library, a row that sees nothing": (blind, [*qkv(), (x(M, M) < 0.5) & (torch.arange(M)[:, None] != 4)]),
    "a bias without a gradient": (lambda q, k, v, b: torch.softmax(q @ k.transpose(-1, -2) + (b != 0) * 0.3, -1) @ v, [*qkv(), x(M, M)]),
    "a learned bias": (learned, [*qkv(), x(1, H, M, M)]),
    "a learned bias of batches": (learned, [*qkv(n=13), x(B, 1, M, 13)]),
    "a learned bias of pairs": (learned, [*qkv(), x(M, M)]),
    "a learned bias of keys": (learned, [*qkv(), x(M)]),
    "a learned bias of distances": (of_distance, [*qkv(), x(2 * M, H)]),
    "a learned bias behind a soft cap": (capped_and_biased, [*qkv(), x(H, M, M)]),
    "a learned bias of the library": (blind, [*qkv(), x(H, M, M)]),
    "learned sinks": (sinks, [*qkv(), x(H)]),
    "a result that lies otherwise": (transposed, qkv()),
    "linear layers": (linear, [x(B, M, 24), x(H * D, 24) * 0.2, x(H * D)]),
    "a layer": (projected, [x(B, M, 24), x(24, 3 * H * D), x(H * D, 16)]),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    fn, inputs = CASES[name]
    said: list[Remark] = []
    got = gradients(compiled(fn, said), inputs)
    assert [r.kind for r in said] == ["passed"], [str(r) for r in said]
    judge(got, fn, inputs)


@pytest.mark.parametrize("name", ["naive", "causal", "spelled out", "window", "soft cap", "shared heads", "library, a mask", "a layer"])
def test_gradients_in_bf16(name: str) -> None:
    fn, inputs = CASES[name]
    said: list[Remark] = []
    got = gradients(compiled(fn, said), inputs, torch.bfloat16)
    assert [r.kind for r in said] == ["passed"], [str(r) for r in said]
    judge(got, fn, inputs, torch.bfloat16)


def test_a_symbolic_length() -> None:
    said: list[Remark] = []
    fn = compiled(causal, said)
    for m in (M, 13, 21):  # the second length makes Dynamo take it for a symbol
        judge(gradients(fn, qkv(m, m)), causal, qkv(m, m))
    assert [r.kind for r in said] == ["passed"] * 2, [str(r) for r in said]


def test_a_bias_of_symbolic_length() -> None:
    said: list[Remark] = []
    fn = compiled(of_distance, said)
    for m in (M, 13, 21):
        inputs = [*qkv(m, m), x(2 * m, H)]
        judge(gradients(fn, inputs), of_distance, inputs)
    assert [r.kind for r in said] == ["passed"] * 2, [str(r) for r in said]


def test_weights_of_all_pairs_are_not_kept() -> None:
    said: list[Remark] = []
    shapes: list[torch.Size] = []
    fn = compiled(causal, said)
    q, k, v = (t.requires_grad_() for t in qkv(33, 33))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        y = torch.ops.graphopt.attention_forward(q, k, v, None, None, None, None, None, 0.3, True, 0, None, None, "zero", 0.0)[0]
    assert all(s[-2:] != (33, 33) for s in shapes) and shapes
    assert torch.allclose(y, fn(q, k, v), atol=1e-5)


def in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    y = naive(q, k, v)
    y += 1.0
    return y


def with_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    w = torch.softmax(q @ k.transpose(-1, -2), -1)
    return torch.cat([w @ v, w], -1)


def constant_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        w = torch.softmax(q @ k.transpose(-1, -2), -1)
    return w @ v


def within_one_function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, o: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    y, _ = F.multi_head_attention_forward(x, x, x, D, H, w, b, None, None, False, 0.0, o, c, need_weights=False)
    return y


DECLINED: dict[str, tuple[Fn, Sequence[torch.Tensor], str]] = {
    "slopes": (lambda q, k, v, s: learned(q, k, v, s[:, None, None] * torch.arange(M)), [*qkv(), x(H)], "its slopes need a gradient"),
    "a learned bias and a mask of numbers": (lambda q, k, v, b, m: learned(q, k, v, b + (1.0 - m) * -1e9),
                                             [*qkv(), x(M, M), torch.arange(M) % 2], "may hide all keys"),
    "half": (lambda *a: causal(*(t.half() for t in a)), qkv(), "it is of f16"),
    "a learned bias of halves": (lambda *a: learned(*(t.bfloat16() for t in a)), [*qkv(), x(M, M)], "would be summed in bf16"),
    "in place": (in_place, qkv(), "changed in place"),
    "mean": (lambda q, k, v, b: torch.softmax((q @ k.transpose(-1, -2)).masked_fill(b > 0, -1e30), -1) @ v, [*qkv(), x(M, M) > 0],
             "a row may see no key"),
    "a bias of large numbers": (lambda q, k, v, b: torch.softmax(q @ k.transpose(-1, -2) + (1.0 - b) * -1e9, -1) @ v,
                                [*qkv(), torch.arange(M) % 2], "may hide all keys"),
    "detached keys": (lambda q, k, v: naive(q, k.detach(), v), qkv(), "stopped on the way, by detach"),
    "weights without a gradient": (constant_weights, qkv(), "stopped on the way"),
    "a learned bias of rows": (learned, [*qkv(), x(M, 1)], "the same for all keys"),
    "one function": (within_one_function, [x(1, M, D), x(3 * D, D), x(3 * D), x(D, D), x(D)], "forward is one function"),
    "a checkpoint": (lambda *a: checkpoint(naive, *a, use_reentrant=False), qkv(), "a checkpoint is not looked into"),
    "weights are a result": (with_weights, qkv(), "read elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    fn, inputs, reason = DECLINED[name]
    said: list[Remark] = []
    compiled(fn, said)(*(t.clone().requires_grad_(t.is_floating_point()) for t in inputs)).sum().backward()
    assert said and all(r.kind == "missed" for r in said) and any(reason in r.message for r in said), [str(r) for r in said]


def test_nothing_is_done_where_nothing_needs_a_gradient() -> None:
    said: list[Remark] = []
    fn = compiled(lambda q, k, v, w: naive(q, k, v) * w, said)
    fn(*qkv(), x(D).requires_grad_()).sum().backward()
    assert not said


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("shared heads", torch.float32), ("shared heads", torch.bfloat16), ("a learned bias of distances", torch.float32)],
)
def test_kernels_of_a_training_step(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("tvm_ffi")
    torch._dynamo.reset()
    clear_reports()
    fn, inputs = CASES[name]
    judge(gradients(torch.compile(fn, backend="graphopt"), inputs, dtype), fn, inputs, dtype)
    forward, backward = reports()
    assert not forward.fallbacks and not backward.fallbacks
    assert "attention_forward" in forward.text_after and "attention_backward" in backward.text_after
    assert any(r.pass_name == "train-attention" and r.kind == "passed" for r in forward.remarks)

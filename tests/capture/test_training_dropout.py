"""Attention with dropout in training: gradients against those of the same choices in f64; what is drawn; and what is no such dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch.nn import functional as F
from training_checks import B, D, Fn, H, M, compiled, gradients, judge, qkv, x

from graphopt import clear_reports, reports
from graphopt.ir.opset.dropout import dropped
from graphopt.remarks import Remark

RATE = 0.25
Drop = Callable[[torch.Tensor], torch.Tensor]
DropFn = Callable[..., torch.Tensor]
MODULE = torch.nn.Dropout(RATE)


def by_function(w: torch.Tensor) -> torch.Tensor:
    return F.dropout(w, RATE, training=True)


def by_module(w: torch.Tensor) -> torch.Tensor:
    return MODULE(w)


def by_draw(w: torch.Tensor) -> torch.Tensor:
    return w * torch.bernoulli(torch.empty(w.shape), 1 - RATE) / (1 - RATE)


def again(seed: int) -> Drop:
    """The choices of the one attention that is compiled under a seed of PyTorch's generator."""
    torch.manual_seed(seed)
    drawn = torch.randint(2**63 - 1, ())
    return lambda w: dropped(w, drawn, RATE)


def naive(drop: Drop, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return drop(torch.softmax(q @ k.transpose(-1, -2) / D**0.5, -1)) @ v


def causal(drop: Drop, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return drop(torch.softmax((q @ k.transpose(-1, -2) * 0.3).masked_fill(hidden, float("-inf")), -1)) @ v


def shared(drop: Drop, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return causal(drop, q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def spelled_out(drop: Drop, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dropped before the sums are divided by: the weights are."""
    s = torch.einsum("bhid,bhjd->bhij", q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return torch.einsum("bhij,bhjd->bihd", drop(e / e.sum(-1, keepdim=True)), v)


def masked(drop: Drop, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    w = torch.softmax((q @ k.transpose(-1, -2) / D**0.5).masked_fill(~mask, float("-inf")), -1)
    return drop(torch.nan_to_num(w)) @ v


def library(**kwargs: bool) -> Fn:
    return lambda q, k, v, mask=None: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=RATE, **kwargs)


def library_causal(drop: Drop, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return causal(drop, q / D**0.5 / 0.3, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


CASES: dict[str, tuple[Fn, DropFn, Sequence[torch.Tensor]]] = {
    "naive": (lambda *a: naive(by_function, *a), naive, qkv()),
    "a module": (lambda *a: naive(by_module, *a), naive, qkv()),
    "drawn by hand": (lambda *a: naive(by_draw, *a), naive, qkv()),
    "cross": (lambda *a: naive(by_function, *a), naive, qkv(n=13)),
    "causal": (lambda *a: causal(by_function, *a), causal, qkv()),
    "shared heads": (lambda *a: shared(by_module, *a), shared, qkv(shared=2)),
    "spelled out": (lambda *a: spelled_out(by_function, *a), spelled_out, qkv()),
    "library": (library(), naive, qkv()),
    "library, causal, shared heads": (library(is_causal=True, enable_gqa=True), library_causal, qkv(shared=2)),
    "library, a row that sees nothing": (library(), masked, [*qkv(), (x(M, M) < 0.5) & (torch.arange(M)[:, None] != 4)]),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    fn, reference, inputs = CASES[name]
    said: list[Remark] = []
    run = compiled(fn, said)
    torch.manual_seed(5)
    got = gradients(run, inputs)
    assert [r.kind for r in said] == ["passed"] and "a rate of 0.25" in said[0].message, [str(r) for r in said]
    drop = again(5)
    judge(got, lambda *a: reference(drop, *a), inputs)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.3])  # 0.9 and 0.7 are no numbers of bf16
@pytest.mark.parametrize("library", [False, True])
def test_bf16(rate: float, library: bool) -> None:
    def trained(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if library:
            return F.scaled_dot_product_attention(q, k, v, None, rate)
        return naive(lambda w: F.dropout(w, rate, training=True), q, k, v)

    said: list[Remark] = []
    fn = compiled(trained, said)
    torch.manual_seed(6)
    got = gradients(fn, qkv(), torch.bfloat16)
    torch.manual_seed(6)
    drawn = torch.randint(2**63 - 1, ())
    assert [r.kind for r in said] == ["passed"] and f"a rate of {rate:g}" in said[0].message
    judge(got, lambda *a: naive(lambda w: dropped(w, drawn, rate), *a), qkv(), torch.bfloat16)


def test_a_symbolic_length() -> None:
    said: list[Remark] = []
    fn = compiled(lambda *a: causal(by_function, *a), said)
    for m in (M, 13, 21):
        torch.manual_seed(m)
        got, drop = gradients(fn, qkv(m, m)), again(m)
        judge(got, lambda *a, drop=drop: causal(drop, *a), qkv(m, m))
    assert [r.kind for r in said] == ["passed"] * 2, [str(r) for r in said]


def test_draws() -> None:
    """The same seed gives the same bits, another call other choices, and two attentions of a call their own."""

    def two(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return naive(by_function, q, k, v), naive(by_function, q * w, k, v)

    said: list[Remark] = []
    fn = compiled(two, said)
    inputs = [t.requires_grad_() for t in (*qkv(), torch.ones(D))]
    torch.manual_seed(1)
    (a, b), (c, _) = fn(*inputs), fn(*inputs)
    torch.manual_seed(1)
    d, e = fn(*inputs)
    assert len(said) == 2 and torch.equal(a, d) and torch.equal(b, e)
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_no_draw_is_made_a_weight() -> None:
    graphs: list[torch.fx.GraphModule] = []
    fn = compiled(lambda *a: naive(by_module, *a), [], keep=graphs.append)
    fn(*(t.requires_grad_() for t in qkv()))
    assert [n.op for n in graphs[0].graph.nodes] == ["placeholder"] * 3 + ["call_module", "output"]


def test_evaluation_has_none() -> None:
    said: list[Remark] = []
    fn = compiled(lambda q, k, v: F.dropout(torch.softmax(q @ k.transpose(-1, -2), -1), RATE, training=False) @ v, said)
    judge(gradients(fn, qkv()), lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), -1) @ v, qkv())
    assert [r.kind for r in said] == ["passed"] and "dropped" not in said[0].message


def test_of_values_is_left_to_them() -> None:
    """It is no dropout of weights: values are dropped as eager does, and then attended to."""
    said: list[Remark] = []
    fn = compiled(lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), -1) @ by_function(v), said)
    torch.manual_seed(2)
    got = fn(*(t.requires_grad_() for t in qkv()))
    assert [r.kind for r in said] == ["passed"] and "dropped" not in said[0].message
    torch.manual_seed(2)
    q, k, v = qkv()
    torch.testing.assert_close(got, torch.softmax(q @ k.transpose(-1, -2), -1) @ by_function(v))


def twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    w = torch.softmax(q @ k.transpose(-1, -2), -1)
    return by_function(w) @ v + by_function(w) @ q


def weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2), -1)


def unscaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (weights(q, k) * torch.bernoulli(torch.empty(B, H, M, M), 0.75)) @ v


def one_draw_a_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (weights(q, k) * by_function(torch.ones(B, H, M, 1))) @ v


CHANGED = "the weights are changed after softmax"
DECLINED: dict[str, tuple[Fn, str]] = {
    "scores": (lambda q, k, v: torch.softmax(by_function(q @ k.transpose(-1, -2)), -1) @ v, "multiplied by a matrix"),
    "twice": (lambda q, k, v: by_function(by_function(weights(q, k))) @ v, CHANGED),
    "whole heads": (lambda q, k, v: F.dropout2d(weights(q, k), RATE) @ v, CHANGED),
    "another mean": (lambda q, k, v: F.alpha_dropout(weights(q, k), RATE, training=True) @ v, CHANGED),
    "rows": (one_draw_a_row, CHANGED),
    "not scaled": (unscaled, CHANGED),
    "two of the same weights": (twice, "read elsewhere"),
    "all": (lambda q, k, v: F.dropout(weights(q, k), 1.0) @ v, "scaled after softmax"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    fn, reason = DECLINED[name]
    said: list[Remark] = []
    run = compiled(fn, said)
    torch.manual_seed(0)
    got = gradients(run, qkv())
    assert said and all(r.kind == "missed" for r in said) and any(reason in r.message for r in said), [str(r) for r in said]
    torch.manual_seed(0)
    for a, b in zip(got, gradients(fn, qkv()), strict=True):  # eager's own draws
        torch.testing.assert_close(a, b)


def test_bert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default dropout of weights: what is kept for the backward is linear in the length; gradients of all parameters."""
    transformers = pytest.importorskip("transformers")
    m, layers = 40, 2
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=24, hidden_dropout_prob=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).train()
    assert config.attention_probs_dropout_prob == 0.1
    with torch.no_grad():
        for p in model.parameters():
            p.add_(x(*p.shape) * (0.1 if p.dim() == 1 else p.shape[-1] ** -0.5))
    ids, inputs = torch.arange(2 * m).reshape(2, m) % 50, dict(model.named_parameters())

    def run(names: Sequence[str], *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (ids,)).last_hidden_state

    said: list[Remark] = []
    shapes: list[torch.Size] = []
    fn = compiled(lambda *a: run(list(inputs), *a), said)
    torch.manual_seed(11)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        got = gradients(fn, list(inputs.values()))
    assert [r.kind for r in said] == ["passed"] * layers and "a rate of 0.1" in said[0].message, [str(r) for r in said]
    assert shapes and all(s[-2:] != (m, m) for s in shapes)

    def again(*values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(11)
        seeds = iter([torch.randint(2**63 - 1, ()) for _ in range(layers)])
        monkeypatch.setattr(F, "dropout", lambda w, p, *_, **__: dropped(w, next(seeds), p) if p else w)
        out = run(list(inputs), *values)
        monkeypatch.undo()
        return out

    judge(got, again, list(inputs.values()))


def test_kernels_of_a_training_step() -> None:
    pytest.importorskip("tvm_ffi")
    torch._dynamo.reset()
    clear_reports()
    fn = torch.compile(lambda *a: shared(by_module, *a), backend="graphopt")
    torch.manual_seed(7)
    got, drop = gradients(fn, qkv(shared=2)), again(7)
    judge(got, lambda *a: shared(drop, *a), qkv(shared=2))
    forward, backward = reports()
    assert "dropout = 0.25" in forward.text_after and "dropout = 0.25" in backward.text_after
    assert not backward.fallbacks and [f.op for f in forward.fallbacks] == ["aten.randint.default"]

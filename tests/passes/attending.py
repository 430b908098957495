"""Spellings of attention as models write them, and near misses. Each takes ``q, k, v`` ``[2, 4, 6, 8]`` and what else it names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.capture.export import exported_graph
from graphopt.capture.fx import capture_fx
from graphopt.ir import Graph, Node, evaluate
from graphopt.pass_manager import PassContext, make_pass, run_passes
from graphopt.passes.pipelines import LEVELS
from graphopt.remarks import Remark

B, H, N, D = 2, 4, 6, 8
SCALE = 1 / math.sqrt(D)
LEAST = torch.finfo(torch.float32).min

_FRONT = LEVELS[2][: LEVELS[2].index("recognise-attention") + 1]


@dataclass
class Case:
    """A program, its inputs beside q, k and v, and the attributes that must be found, or the reason to decline."""

    fn: Callable[..., Tensor]
    extra: tuple[Tensor, ...] = ()
    found: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    inputs: tuple[Tensor, ...] | None = None


class _Module(torch.nn.Module):
    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Tensor:
        return self.fn(*args)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return drawn(B, H, N, D, seed=1), drawn(B, H, N, D, seed=2), drawn(B, H, N, D, seed=3)


def captured(case: Case) -> tuple[Graph, list[Tensor]]:
    """The graph of a case, and its inputs."""
    args = (*(case.inputs or qkv()), *case.extra)
    with torch.no_grad():
        exported = exported_graph(_Module(case.fn), args)
    graph = capture_fx(exported.gm, weights=exported.weights).graph
    kept = [a for a, v in zip(args, exported.gm.graph.find_nodes(op="placeholder")[len(exported.weights) :], strict=True) if v.users]
    assert not exported.weights and len(kept) == len(graph.inputs), "a spelling has no weights, and reads all of its inputs"
    return graph, kept


def recognise(graph: Graph) -> tuple[Graph, list[Remark]]:
    """A copy after all passes up to the recogniser."""
    new, ctx = graph.clone(), PassContext()
    run_passes(new, [make_pass(name) for name in (*_FRONT, "dce")], ctx)
    return new, [r for r in ctx.remarks if r.pass_name == "recognise-attention"]


def attentions(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes() if n.op.name == "attention"]


def check_values(case: Case, old: Graph, new: Graph, inputs: list[Tensor]) -> None:
    """The graph before and after, in f64, and the program itself in f32."""
    before, after = evaluate(old, inputs, wide=True)[0], evaluate(new, inputs, wide=True)[0]
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9, equal_nan=True)
    eager = case.fn(*(case.inputs or qkv()), *case.extra)
    torch.testing.assert_close(evaluate(new, inputs)[0], eager, rtol=2e-2 if eager.dtype != torch.float32 else 1e-5, atol=2e-2 if
                               eager.dtype != torch.float32 else 1e-5, equal_nan=True)  # fmt: skip


# spellings -------------------------------------------------------------------------------------------------------------

T = Callable[..., Tensor]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


def _spelt(change: T) -> T:
    """softmax(change(q k^T / sqrt d, *extra)) v"""
    return lambda q, k, v, *extra: change(scores(q, k), *extra).softmax(-1) @ v


def _causal(n: int = N, m: int = N, shift: int = 0) -> Tensor:
    return torch.arange(n)[None, :] <= torch.arange(m)[:, None] + shift


def _additive(mask: Tensor, number: float = float("-inf")) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, number)


def _safe(s: Tensor) -> Tensor:
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def _no_nan(w: Tensor) -> Tensor:
    return torch.where(w.isnan(), 0.0, w)


def _repeat(x: Tensor, n: int) -> Tensor:
    b, g, s, d = x.shape
    return x[:, :, None].expand(b, g, n, s, d).reshape(b, g * n, s, d)


def _bhqk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE).softmax(-1), v)


def _flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    return (torch.bmm(q, k.transpose(1, 2)) * SCALE).softmax(-1).bmm(v).view(B, H, N, D)


def _baddbmm(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    return torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=SCALE).softmax(-1).bmm(v).view(B, H, N, D)


def _sequence_major(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (scores(q, k).softmax(-1) @ v).transpose(1, 2).reshape(B, N, H * D)


def _fused_qkv(x: Tensor) -> Tensor:
    q, k, v = x.view(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
    return (scores(q, k).softmax(-1) @ v).transpose(1, 2).reshape(B, N, H * D)


def _multi_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q.reshape(B, H * N, D) @ k[:, 0].transpose(1, 2)).view(B, H, N, N) * SCALE
    return (s.softmax(-1).view(B, H * N, N) @ v[:, 0]).view(B, H, N, D)


def _grouped_5d(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.view(B, 2, 2, N, D) @ k[:, :2, None].transpose(-1, -2) * SCALE
    return (s.softmax(-1) @ v[:, :2, None]).view(B, H, N, D)


def _sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    s = torch.cat([scores(q, k), sinks.reshape(1, -1, 1, 1).expand(B, -1, N, -1)], -1)
    return (s - s.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


def _alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return (scores(q, k) + slopes[None, :, None, None] * torch.arange(N)[None, None, None, :]).softmax(-1) @ v


def _alibi_relative(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    gap = torch.arange(N)[None, :] - torch.arange(N)[:, None]
    s = (scores(q, k) + slopes[:, None, None] * gap).masked_fill(gap > 0, float("-inf"))
    return s.softmax(-1) @ v


def _window(s: Tensor, w: int = 3) -> Tensor:
    gap = torch.arange(N)[:, None] - torch.arange(N)[None, :]
    return s.masked_fill((gap < 0) | (gap >= w), LEAST)


def _clamped(s: Tensor) -> Tensor:
    return torch.max(s + _additive(_causal(), LEAST), torch.full((), LEAST))


def _halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * SCALE).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q.float() @ k.float().transpose(-1, -2)) * SCALE).softmax(-1).to(q.dtype) @ v


PAD = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
EMPTY = torch.tensor([[False] * 6, [True] * 6])
CAUSAL = {"causal": True}
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
BIAS = drawn(1, H, N, N)

SPELLINGS: dict[str, Case] = {
    "scaled after": Case(_spelt(lambda s: s)),
    "divided": Case(lambda q, k, v: (q @ k.transpose(-2, -1) / math.sqrt(D)).softmax(-1) @ v),
    "divided by a tensor": Case(lambda q, k, v: (q @ k.transpose(-2, -1) / torch.sqrt(torch.full((), float(D)))).softmax(-1) @ v),
    "queries scaled before": Case(lambda q, k, v: ((q * SCALE) @ k.transpose(-2, -1)).softmax(-1) @ v),
    "keys scaled before": Case(lambda q, k, v: (q @ (k * SCALE).transpose(-2, -1)).softmax(-1) @ v),
    "both scaled by a root": Case(lambda q, k, v: ((q * SCALE**0.5) @ (k * SCALE**0.5).transpose(-2, -1)).softmax(-1) @ v),
    "not scaled": Case(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, found={"scale": 1.0}),
    "negated twice": Case(lambda q, k, v: (-(q @ -k.mT) * SCALE).softmax(-1) @ v),
    "scaled twice": Case(lambda q, k, v: (q @ k.mT * 0.5 / 3.0).softmax(-1) @ v, found={"scale": 1 / 6}),
    "scaled by a tensor of heads": Case(lambda q, k, v, t: (q @ k.mT * t).softmax(-1) @ v, (drawn(H, 1, 1),), {"scale": 1.0}),
    "scaled by a tensor of keys": Case(lambda q, k, v, t: (q @ k.mT * t).softmax(-1) @ v, (drawn(B, 1, 1, N),), {"scale": 1.0}),
    "softmax spelt out": Case(lambda q, k, v: _safe(scores(q, k)) @ v),
    "softmax of the transpose": Case(lambda q, k, v: (k @ q.mT * SCALE).softmax(-2).mT @ v),
    "values on the left": Case(lambda q, k, v: (v.mT @ scores(q, k).softmax(-1).mT).mT),
    "einsum": Case(_bhqk),
    "einsum, sequence-major": Case(
        lambda q, k, v: torch.einsum("bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE).softmax(-1), v),
        inputs=tuple(x.transpose(1, 2).contiguous() for x in qkv()),
    ),
    "bmm of flattened heads": Case(_flattened),
    "baddbmm": Case(_baddbmm, (drawn(B * H, 1, N),)),
    "sequence-major, heads joined": Case(_sequence_major, inputs=tuple(x.transpose(1, 2).contiguous() for x in qkv())),
    "fused projection": Case(_fused_qkv, inputs=(drawn(B, N, 3 * H * D),)),
    "two axes": Case(_spelt(lambda s: s), inputs=tuple(x[0, 0] for x in qkv())),
    "three axes": Case(_spelt(lambda s: s), inputs=tuple(x[0] for x in qkv())),
    "cross attention": Case(_spelt(lambda s: s), inputs=(drawn(B, H, 3, D), drawn(B, H, 7, D), drawn(B, H, 7, 5))),
    "one query": Case(_spelt(lambda s: s), inputs=(drawn(B, H, 1, D), drawn(B, H, 7, D), drawn(B, H, 7, D))),
    "keys of a cache": Case(
        lambda q, k, v, a, b: (q @ torch.cat([a, k], 2).mT * SCALE).softmax(-1) @ torch.cat([b, v], 2),
        (drawn(B, H, 5, D), drawn(B, H, 5, D)),
    ),
    "bias": Case(_spelt(lambda s, b: s + b), (BIAS,)),
    "bias on the left": Case(_spelt(lambda s, b: b + s), (BIAS,)),
    "bias subtracted": Case(_spelt(lambda s, b: s - b), (BIAS,)),
    "two biases": Case(_spelt(lambda s, b, c: s + b + c), (BIAS, drawn(B, 1, 1, N))),
    "bias before the scale": Case(lambda q, k, v, b: ((q @ k.mT + b) * SCALE).softmax(-1) @ v, (BIAS,)),
    "float mask": Case(_spelt(lambda s, m: s + (1.0 - m[:, None, None, :]) * LEAST), (PAD.float(),)),
    "mask of -10000": Case(_spelt(lambda s, m: s + (1.0 - m[:, None, None, :].float()) * -1e4), (PAD,)),
    "boolean mask, -inf": Case(_spelt(lambda s, m: s.masked_fill(~m[:, None, None], float("-inf"))), (PAD,), {"empty": "nan"}),
    "boolean mask, empty rows": Case(_spelt(lambda s, m: s.masked_fill(~m[:, None, None], float("-inf"))), (EMPTY,), {"empty": "nan"}),
    "boolean mask, least number": Case(_spelt(lambda s, m: s.masked_fill(~m[:, None, None], LEAST)), (EMPTY,), {"empty": "mean"}),
    "boolean mask added": Case(_spelt(lambda s, m: s + _additive(m[:, None, None], LEAST)), (EMPTY,), {"empty": "mean"}),
    "boolean mask, times": Case(_spelt(lambda s, m: s + (1.0 - m[:, None, None].float()) * LEAST), (EMPTY,), {"empty": "mean"}),
    "boolean mask compared with 0": Case(_spelt(lambda s, m: s.masked_fill(m[:, None, None] == 0, -1e9)), (EMPTY,), {"empty": "mean"}),
    "nan to zero": Case(
        lambda q, k, v, m: _no_nan(scores(q, k).masked_fill(~m[:, None, None], -math.inf).softmax(-1)) @ v, (EMPTY,), {"empty": "zero"}
    ),
    "causal, where": Case(_spelt(lambda s: torch.where(_causal(), s, float("-inf"))), found={**CAUSAL, "empty": "zero"}),
    "causal, where the other way": Case(_spelt(lambda s: torch.where(~_causal(), LEAST, s)), found=CAUSAL),
    "causal, tril": Case(_spelt(lambda s: s.masked_fill(torch.ones(N, N).tril() == 0, float("-inf"))), found=CAUSAL),
    "causal, triu added": Case(_spelt(lambda s: s + torch.full((N, N), float("-inf")).triu(1)), found=CAUSAL),
    "causal, one less tril, times": Case(_spelt(lambda s: s + (1 - torch.ones(N, N).tril()) * -1e9), found=CAUSAL),
    "causal, clamped": Case(_spelt(_clamped), found=CAUSAL),
    "causal and padding": Case(
        _spelt(lambda s, m: s + _additive(_causal() & m[:, None, None], LEAST)), (PAD,), {**CAUSAL, "empty": "mean"}
    ),
    "causal and padding, apart, -inf": Case(
        _spelt(lambda s, m: (s + _additive(_causal())).masked_fill(~m[:, None, None], -math.inf)), (PAD,), {**CAUSAL, "empty": "nan"}
    ),
    "causal, bottom-right": Case(
        _spelt(lambda s: s.masked_fill(~_causal(7, 3, 4), LEAST)), found={**CAUSAL, "offset": 4},
        inputs=(drawn(B, H, 3, D), drawn(B, H, 7, D), drawn(B, H, 7, D)),
    ),
    "causal with a bias": Case(_spelt(lambda s, b: torch.where(_causal(), s + b, -math.inf)), (BIAS,), CAUSAL),
    "window": Case(_spelt(_window), found={**CAUSAL, "window": 3}),
    "window, two triangles": Case(
        _spelt(lambda s: s + _additive(torch.ones(N, N, dtype=torch.bool).tril().triu(-2))), found={**CAUSAL, "window": 3}
    ),
    "local": Case(
        _spelt(lambda s: s.masked_fill((torch.arange(N)[:, None] - torch.arange(N)).abs() > 2, LEAST)), found={"window": 3, "causal": False}
    ),
    "soft cap": Case(_spelt(lambda s: torch.tanh(s / 2.0) * 2.0), found={"softcap": 2.0}),
    "soft cap, causal": Case(
        _spelt(lambda s: (2.0 * torch.tanh(s / 2.0)).masked_fill(~_causal(), LEAST)), found={"softcap": 2.0, **CAUSAL}
    ),
    "alibi": Case(_alibi, (SLOPES,), {"alibi": True}),
    "alibi, relative and causal": Case(_alibi_relative, (SLOPES,), {"alibi": True, **CAUSAL}),
    "sinks": Case(_sinks, (drawn(H),), {"sinks": True}),
    "relative positions": Case(
        _spelt(lambda s, t: s + t[(torch.arange(N)[:, None] - torch.arange(N)).clamp(-2, 2) + 2].permute(2, 0, 1)), (drawn(5, H),)
    ),
    "grouped, expand": Case(lambda q, k, v: scores(q, _repeat(k[:, :2], 2)).softmax(-1) @ _repeat(v[:, :2], 2), found={"heads": 2}),
    "grouped, repeat_interleave": Case(
        lambda q, k, v: scores(q, k[:, :2].repeat_interleave(2, 1)).softmax(-1) @ v[:, :2].repeat_interleave(2, 1)
    ),
    "grouped, five axes": Case(_grouped_5d, found={"heads": 2}),
    "multi-query": Case(_multi_query, found={"heads": 1}),
    "half precision, softmax in f32": Case(_halves, inputs=tuple(x.to(torch.bfloat16) for x in qkv())),
    "half precision, products in f32": Case(_upcast, inputs=tuple(x.to(torch.float16) for x in qkv())),
    "dropout of an inference": Case(lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 0.1, training=False) @ v),
    "sdpa": Case(F.scaled_dot_product_attention),
    "sdpa, causal": Case(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), found=CAUSAL),
    "sdpa with a triangle": Case(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=_causal()), found=CAUSAL),
    "sdpa of repeated keys": Case(
        lambda q, k, v: F.scaled_dot_product_attention(q, _repeat(k[:, :2], 2), _repeat(v[:, :2], 2)), found={"heads": 2}
    ),
    "sdpa with padding": Case(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m[:, None, None]), (EMPTY,), {"empty": "zero"}
    ),
}  # fmt: skip

"""Near misses of attention: programs that look like it and are something else, each with the reason for which it is declined."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from attending import BIAS, EMPTY, LEAST, PAD, SCALE, B, Case, D, H, N, drawn, scores
from torch import Tensor

T = Callable[..., Tensor]


def _weights(change: T) -> T:
    """change(softmax(q k^T / sqrt d), *extra) v"""
    return lambda q, k, v, *extra: change(scores(q, k).softmax(-1), *extra) @ v


def _scores(change: T) -> T:
    return lambda q, k, v, *extra: change(scores(q, k), *extra).softmax(-1) @ v


def _square(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s * s).softmax(-1) @ v


def _no_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(scores(q, k))
    return e / e.sum(-1, keepdim=True) @ v


def _other_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - s.amax(-2, keepdim=True))
    return e / e.sum(-1, keepdim=True) @ v


def _two_softmaxes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k).softmax(-1) + scores(k, q).softmax(-1)) @ v


def _with_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1)
    return torch.cat([w @ v, w], -1)


def _with_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.cat([s.softmax(-1) @ v, s], -1)


def _talking_heads(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return torch.einsum("bhqk,hg->bgqk", scores(q, k), t).softmax(-1) @ v


def _top_half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1)[..., :3] @ v[:, :, :3]


def _shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1).roll(1, -1) @ v


def _two_masks(s: Tensor, m: Tensor) -> Tensor:
    return torch.where(m[:, None, None], torch.where(m[:, None, :, None], s, LEAST), -1e9)


PLAIN_BIAS = "a mask stays a bias"
AFTER = "changed after softmax"
AXIS = "softmax is not over the axis"

MISSES: dict[str, Case] = {
    "softmax over the queries": Case(lambda q, k, v: scores(q, k).softmax(-2) @ v, why=AXIS),
    "softmax over the heads": Case(lambda q, k, v: scores(q, k).softmax(1) @ v, why=AXIS),
    "softmax over the batch": Case(lambda q, k, v: scores(q, k).softmax(0) @ v, why=AXIS),
    "the transposed weights": Case(lambda q, k, v: scores(q, k).softmax(-1).mT @ v, why=AXIS),
    "permuted keys": Case(lambda q, k, v: (q @ k.reshape(B, H, D, N) * SCALE).softmax(-2) @ v, why=AXIS),
    "scaled after softmax": Case(_weights(lambda w: w * 0.5), why="scaled after softmax"),
    "divided after softmax": Case(_weights(lambda w: w / 3), why="scaled after softmax"),
    "multiplied by a mask after softmax": Case(_weights(lambda w, m: w * m[:, None, None]), (PAD.float(),), why=AFTER),
    "masked after softmax": Case(_weights(lambda w, m: w.masked_fill(~m[:, None, None], 0.0)), (PAD,), why=AFTER),
    "mask added after softmax": Case(_weights(lambda w, b: w + b), (BIAS,), why=AFTER),
    "one less the weights": Case(_weights(lambda w: 1 - w), why=AFTER),
    "causal after softmax": Case(_weights(lambda w: w * torch.ones(N, N).tril()), why=AFTER),
    "weights of two softmaxes": Case(_two_softmaxes, why=AFTER),
    "squared weights": Case(_weights(lambda w: w * w), why=AFTER),
    "residual of weights": Case(lambda q, k, v: (scores(q, k).softmax(-1) - torch.eye(N)) @ v, why=AFTER),
    "relu of the weights": Case(_weights(torch.relu)),
    "the exponential of weights": Case(_weights(torch.exp)),
    "some of the keys only": Case(_top_half, why="stands between"),
    "rolled weights": Case(_shifted),
    "the weights are returned": Case(_with_weights, why="read elsewhere"),
    "the scores are returned": Case(_with_scores, why="read elsewhere"),
    "multiplied by a mask before softmax": Case(_scores(lambda s, m: s * m), (drawn(N, N),), why="of the scores' own shape"),
    "divided by a matrix": Case(_scores(lambda s, m: s / m), (drawn(N, N).abs() + 1,), why="of the scores' own shape"),
    "the scores squared": Case(_square),
    "relu of the scores": Case(_scores(torch.relu), why="no product of queries and keys"),
    "sigmoid in the place of softmax": Case(lambda q, k, v: scores(q, k).sigmoid() @ v),
    "no softmax": Case(lambda q, k, v: scores(q, k) @ v),
    "exp overflows": Case(_no_maximum),
    "the maximum of another axis": Case(_other_maximum),
    "log_softmax": Case(lambda q, k, v: scores(q, k).log_softmax(-1) @ v),
    "no product of queries and keys": Case(lambda q, k, v: (q * k).softmax(-1) @ v.mT, why="no product"),
    "softmax of a parameter": Case(lambda q, k, v, t: t.softmax(-1) @ (v * q * k), (drawn(H, N, N),), why="no product of queries and keys"),
    "talking heads": Case(_talking_heads, (drawn(H, H),)),
    "masked by a soft number": Case(_scores(lambda s, m: s.masked_fill(~m[:, None, None], -100.0)), (PAD,), why="a score like others"),
    "masked by zero": Case(_scores(lambda s, m: s.masked_fill(~m[:, None, None], 0.0)), (PAD,), why="a score like others"),
    "masked by a positive number": Case(_scores(lambda s, m: s.masked_fill(~m[:, None, None], 1e9)), (PAD,), why="a score like others"),
    "masked by another tensor": Case(
        _scores(lambda s, m, b: torch.where(m[:, None, None], s, b)), (PAD, BIAS), why="taken from another tensor"
    ),
    "masked, then biased": Case(
        _scores(lambda s, m, b: s.masked_fill(~m[:, None, None], LEAST) + b), (PAD, BIAS), why="set to a number already"
    ),
    "masked twice by different numbers": Case(_scores(_two_masks), (EMPTY,), why="hidden in several ways"),
    "capped after the mask": Case(
        _scores(lambda s, m: torch.tanh(s.masked_fill(~m[:, None, None], -math.inf)) * 2), (PAD,), why="tanh is taken of scores that were"
    ),
    "capped after the bias": Case(_scores(lambda s, b: torch.tanh(s + b)), (BIAS,), why="tanh is taken of scores that were"),
    "capped twice": Case(_scores(lambda s: torch.tanh(torch.tanh(s) * 3)), why="tanh is taken of scores that were"),
    "clamped to a small number": Case(_scores(lambda s: s.clamp(min=-1.0)), why="a score like others"),
    "negative scores after a mask": Case(
        _scores(lambda s, m: -s.masked_fill(~m[:, None, None], -math.inf)), (torch.ones(B, N, dtype=torch.bool),), why="multiplied by -1"
    ),
}

# recognised, but the mask must stay what it is
BIASES: dict[str, Case] = {
    "a soft mask is a bias": Case(_scores(lambda s, m: s + (1 - m[:, None, None].float()) * -100.0), (PAD,)),
    "-1e9 is added to rows without a key": Case(_scores(lambda s, m: s + (1 - m[:, None, None].float()) * -1e9), (EMPTY,), why=PLAIN_BIAS),
    "two masks are added": Case(
        _scores(lambda s, m: s + torch.full((N, N), LEAST).triu(1) + (1 - m[:, None, None].float()) * LEAST), (EMPTY,), why=PLAIN_BIAS
    ),
    "a float mask from outside, and a causal one": Case(
        _scores(lambda s, m: s + torch.full((N, N), LEAST).triu(1) + m), (drawn(B, 1, N, N),), why=PLAIN_BIAS
    ),
    "no band": Case(_scores(lambda s: s + torch.full((N, N), -math.inf) * 0 + torch.eye(N) * 2.0)),
    "positions squared": Case(_scores(lambda s, t: s + t[:, None, None] * torch.arange(N) ** 2), (drawn(H),)),
}

"""Attention and its gradient, for training. Neither keeps the weights ``[M, N]``: the forward hands over one number a row, and the
backward computes them again.

    forward:   w = exp(s - lse),  lse_i = log sum_j exp(s_ij) [+ exp(sinks[h])],  out = drop(w) v
    backward:  dv = drop(w)^T dout,  ds = w * (drop(dout v^T) - rowsum(dout * out)),  dq = scale ds k,  dk = scale ds^T q

with the scores s of :mod:`~graphopt.ir.opset.attention`, -inf where a key is not seen; under a soft cap ds is also times
``1 - (s / softcap)^2``, with s before anything is added. A row that sees no key has an lse of +inf, so that its weights are zero; or NaN,
if ``empty`` says so.
``drop`` is dropout, which the backward makes again from the seed; it comes behind the softmax, whose sums are of all weights.
Heads that share keys add up their gradients. With ``bias_gradient`` there is that of the bias, too: ds, of the scores behind a soft cap,
added up along the axes that the bias is broadcast along. Slopes and sinks have no gradient here.
Of bf16, all but the operands and results is f32.

Dao, "FlashAttention-2", arXiv:2307.08691, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from graphopt.errors import TypeInferenceError
from graphopt.ir import dims
from graphopt.ir.ops import REQUIRED, Attrs, EvalContext, define
from graphopt.ir.opset import attention
from graphopt.ir.opset.attention import Parts, built_dropout, built_scores, parts, reference_scores, repeated, shared_by_heads
from graphopt.ir.opset.dropout import dropped
from graphopt.ir.types import TensorType, bf16, f32

if TYPE_CHECKING:
    from graphopt.ir.builder import Builder
    from graphopt.ir.graph import Node, Value

GIVEN = 3  # operands of the backward before those of the attention: the result's gradient, the result, the lse
_INF = float("inf")
EMPTY = {"zero": _INF, "nan": float("nan")}  # the lse of a row that sees no key


def _infer_forward(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    (out,) = attention.infer(ts, attrs)
    if attrs["empty"] not in EMPTY:
        raise TypeInferenceError(f"attention_forward: empty is {attrs['empty']!r}, not one of {', '.join(EMPTY)}")
    p = parts(ts, attrs)
    if out.dtype not in (f32, bf16) or not p.q.rank == p.k.rank == p.v.rank:
        raise TypeInferenceError(f"attention_forward: needs f32 or bf16 and operands of one rank, got {p.q}, {p.k}, {p.v}")
    q, k, v = (t.shape[:-2] for t in (p.q, p.k, p.v))
    many, few = (q[-1], k[-1]) if q else (1, 1)
    shared = dims.same(many, few) or (isinstance(many, int) and isinstance(few, int) and few > 0 and many % few == 0)
    if not (shared and dims.same_shape(k, v) and dims.same_shape(q[:-1], k[:-1]) and dims.same_shape(out.shape[:-2], q)):
        raise TypeInferenceError(f"attention_forward: {p.q}, {p.k}, {p.v} have other batches, or keys of other heads than values")
    return [out, TensorType(f32, out.shape[:-1])]


def _infer_backward(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    given, rest = ts[:GIVEN], ts[GIVEN:]
    result, lse = _infer_forward(rest, attrs)
    for t, wanted in zip(given, (result, result, lse), strict=True):
        if t.dtype != wanted.dtype or not dims.same_shape(t.shape, wanted.shape):
            raise TypeInferenceError(f"attention_backward: {t} where the forward has {wanted}")
    by = [*rest[:3]]
    if attrs["bias_gradient"]:
        bias = parts(rest, attrs).bias
        if bias is None:
            raise TypeInferenceError("attention_backward: the gradient of a bias that there is not")
        by.append(bias)
    return [t.logical for t in by]


# reference -------------------------------------------------------------------------------------------------------------


def _evaluate_forward(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> tuple[torch.Tensor, torch.Tensor]:
    p = parts(xs, attrs, [x.dtype for x in xs])  # type: ignore[misc]
    s = reference_scores(p, attrs, ctx)
    every = s if p.sinks is None else torch.cat([s, p.sinks[:, None, None].to(s.dtype).expand(*s.shape[:-1], 1)], -1)
    lse = torch.logsumexp(every, -1)
    lse = torch.where(lse == -_INF, EMPTY[attrs["empty"]], lse)
    return (dropped(torch.exp(s - lse[..., None]), p.seed, attrs["dropout"]) @ shared_by_heads(p, p.v)).to(p.q.dtype), lse


def _evaluate_backward(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> tuple[torch.Tensor, ...]:
    (dout, out, lse), rest = xs[:GIVEN], xs[GIVEN:]
    p = parts(rest, attrs, [x.dtype for x in rest])  # type: ignore[misc]
    k, v = (shared_by_heads(p, x) for x in (p.k, p.v))
    q, dout, out = (x.to(k.dtype) for x in (p.q, dout, out))
    w = torch.exp(reference_scores(p, attrs, ctx) - lse[..., None])
    rate = attrs["dropout"]
    ds = w * (dropped(dout @ v.transpose(-1, -2), p.seed, rate) - (dout * out).sum(-1, keepdim=True))
    of_bias = [ds.sum_to_size(p.bias.shape)] if attrs["bias_gradient"] and p.bias is not None else []
    if (cap := attrs["softcap"]) is not None:
        ds = ds * (1 - torch.tanh(q @ k.transpose(-1, -2) * attrs["scale"] / cap) ** 2)
    ds = ds * attrs["scale"]
    dk, dv = ds.transpose(-1, -2) @ q, dropped(w, p.seed, rate).transpose(-1, -2) @ dout
    return tuple(x.to(p.q.dtype) for x in (ds @ k, _summed(dk, p.k), _summed(dv, p.v), *of_bias))


def _summed(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Gradients of heads of their own, added up for the heads that share."""
    if x.shape == like.shape:
        return x
    *batch, heads, length, size = x.shape
    return x.reshape(*batch, like.shape[-3], heads // like.shape[-3], length, size).sum(-3)


# expansion -------------------------------------------------------------------------------------------------------------


def _expand_forward(b: Builder, node: Node) -> tuple[Value, ...]:
    p, attrs = parts([_wide(b, v) for v in node.operands], node.attrs), node.attrs
    s = built_scores(b, p, attrs, relative=True)
    top = b.max(s, axes=(s.type.rank - 1,), keepdims=True)
    sinks = None if p.sinks is None else b.reshape(p.sinks, shape=(*p.sinks.shape, 1, 1))
    top = top if sinks is None else b.maximum(top, sinks)
    top = b.where(b.eq(top, -_INF), b.constant(0.0, s.dtype), top)
    total = b.sum(b.exp(b.sub(s, top)), axes=(s.type.rank - 1,), keepdims=True)
    total = total if sinks is None else b.add(total, b.exp(b.sub(sinks, top)))
    lse = b.where(b.eq(total, 0.0), b.constant(EMPTY[attrs["empty"]], s.dtype), b.add(top, b.log(total)))
    out = b.matmul(built_dropout(b, b.exp(b.sub(s, lse)), p, attrs), repeated(b, p.v, _share(p)))
    return b.cast(out, node.results[0].dtype), b.reshape(lse, shape=node.results[1].shape)


def _expand_backward(b: Builder, node: Node) -> tuple[Value, ...]:
    operands = [_wide(b, v) for v in node.operands]
    (dout, out, lse), rest = operands[:GIVEN], operands[GIVEN:]
    p, attrs = parts(rest, node.attrs), node.attrs
    k, v = (repeated(b, x, _share(p)) for x in (p.k, p.v))
    s = built_scores(b, p, attrs, relative=True)
    column = (*lse.shape, 1)
    w = b.exp(b.sub(s, b.reshape(lse, shape=column)))
    delta = b.sum(b.mul(dout, out), axes=(out.type.rank - 1,), keepdims=True)
    ds = b.mul(w, b.sub(built_dropout(b, b.matmul(dout, _swapped(b, v)), p, attrs), delta))
    of_bias = [_summed_as(b, ds, p.bias)] if attrs["bias_gradient"] and p.bias is not None else []
    if (cap := attrs["softcap"]) is not None:
        t = b.tanh(b.mul(b.matmul(p.q, _swapped(b, k)), attrs["scale"] / cap))
        ds = b.mul(ds, b.sub(1.0, b.mul(t, t)))
    ds = b.mul(ds, attrs["scale"])
    dk, dv = b.matmul(_swapped(b, ds), p.q), b.matmul(_swapped(b, built_dropout(b, w, p, attrs)), dout)
    found = (b.matmul(ds, k), _added(b, dk, p.k, _share(p)), _added(b, dv, p.v, _share(p)), *of_bias)
    return tuple(b.cast(x, r.dtype) for x, r in zip(found, node.results, strict=True))


def _wide(b: Builder, v: Value) -> Value:
    return b.cast(v, f32) if v.dtype == bf16 else v  # type: ignore[no-any-return]


def _summed_as(b: Builder, x: Value, like: Value) -> Value:
    """The sum along the axes that a value is broadcast along."""
    sizes = (*[1] * (x.type.rank - like.type.rank), *like.shape)
    axes = tuple(i for i, (d, n) in enumerate(zip(sizes, x.shape, strict=True)) if d == 1 and n != 1)
    return b.reshape(b.sum(x, axes=axes, keepdims=True) if axes else x, shape=like.shape)  # type: ignore[no-any-return]


def _share(p: Parts[Value]) -> int:
    return heads_that_share(p.q.type, p.k.type)


def heads_that_share(q: TensorType, k: TensorType) -> int:
    """How many heads of queries read one head of keys, of an attention for training."""
    if q.rank < 3 or dims.same(q.shape[-3], k.shape[-3]):
        return 1
    return int(q.shape[-3]) // int(k.shape[-3])  # type: ignore[call-overload, no-any-return]


def _swapped(b: Builder, x: Value) -> Value:
    return b.transpose(x, perm=(*range(x.type.rank - 2), x.type.rank - 1, x.type.rank - 2))


def _added(b: Builder, x: Value, like: Value, share: int) -> Value:
    if share == 1:
        return x
    *batch, heads, length, size = like.shape
    apart = b.reshape(x, shape=(*batch, heads, share, length, size))
    return b.sum(apart, axes=(len(batch) + 1,))  # type: ignore[no-any-return]


_ATTRS = {"scale": REQUIRED, **attention.DEFAULTS}

define(
    "attention_forward", (3, 8), attrs=_ATTRS, infer=_infer_forward, evaluate=_evaluate_forward, expand=_expand_forward,
    doc="attention, and the logarithm of each row's sum of exponentials, +inf or NaN where it sees no key; of f32 or bf16, the logarithm "
    "in f32; keys and values of one batch with the queries",
)  # fmt: skip
define(
    "attention_backward", (6, 11), attrs={**_ATTRS, "bias_gradient": False}, infer=_infer_backward, evaluate=_evaluate_backward,
    expand=_expand_backward,
    doc="gradients of an attention by q, k, v and, if asked for, the bias; operands: the gradient of its result, its result and lse, and "
    "its own operands",
)  # fmt: skip

"""Attention, in all the forms that models have. The expansion is the definition.

    s = scale * q_i . k_j;   s = softcap * tanh(s / softcap);   s = s + bias[i, j] + slopes[h] * (j - i);   s = -inf where not seen
    out_i = sum_j exp(s - m) v_j / (sum_j exp(s - m) [+ exp(sinks[h] - m)]),   m = max_j s

In training, weights are dropped behind the softmax at the rate ``dropout``, as :mod:`graphopt.ir.opset.dropout` says; a row of it is a
row of one head.

A key j is *seen* by row i if mask[i, j] holds; j <= i + offset, if ``causal``; and i + offset - window < j, if there is a
``window``, which without ``causal`` reaches as far to the other side. Vaswani et al., arXiv:1706.03762; soft cap: Gemma 2,
arXiv:2408.00118; slopes: Press et al., ALiBi, arXiv:2108.12409; sinks: Xiao et al., arXiv:2309.17453; heads that share keys:
Ainslie et al., GQA, arXiv:2305.13245.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from graphopt.errors import TypeInferenceError
from graphopt.ir import dims
from graphopt.ir.dims import Dim, Shape
from graphopt.ir.ops import REQUIRED, Attrs, EvalContext, broadcast_shapes, define
from graphopt.ir.opset.dropout import check_rate, check_seed, dropped
from graphopt.ir.types import DType, TensorType, b1, i64, u8

if TYPE_CHECKING:
    from graphopt.ir.builder import Builder
    from graphopt.ir.graph import Node, Value

BLOCK = (16, 32)  # queries and keys of an element of a mask's table
EMPTY = ("zero", "nan", "mean")  # what a row gives that sees no key: 0, NaN, or the mean of all values

T = TypeVar("T")


@dataclass(frozen=True)
class Parts(Generic[T]):
    """The operands of an attention by name: queries, keys, values, and what is given of the others."""

    q: T
    k: T
    v: T
    bias: T | None = None
    mask: T | None = None
    table: T | None = None
    slopes: T | None = None
    sinks: T | None = None
    seed: T | None = None


def parts(operands: Sequence[T], attrs: Attrs, dtypes: Sequence[DType] | None = None) -> Parts[T]:
    """Tell the operands apart: ``q, k, v [, bias] [, mask [, table]] [, slopes] [, sinks] [, seed]``.

    Args:
        operands: values, types or tensors of an ``attention``.
        attrs: its attributes; ``alibi`` says that there are slopes, ``sinks`` that there are sinks, ``dropout`` that there is a seed.
        dtypes: of the operands, where those have no ``dtype`` of the IR.

    Raises:
        TypeInferenceError: there are too few or too many.
    """
    kinds = list(dtypes) if dtypes is not None else [x.dtype for x in operands]  # type: ignore[attr-defined]
    rest = list(zip(operands[3:], kinds[3:], strict=True))
    seed = rest.pop()[0] if attrs["dropout"] and rest else None
    sinks = rest.pop()[0] if attrs["sinks"] and rest else None
    slopes = rest.pop()[0] if attrs["alibi"] and rest else None
    table = rest.pop()[0] if rest and rest[-1][1] in (u8, torch.uint8) else None
    mask = rest.pop()[0] if rest and rest[-1][1] in (b1, torch.bool) else None
    bias = rest.pop()[0] if rest else None
    if table is not None and mask is None:
        raise TypeInferenceError("attention: a table of no mask")
    told = {"alibi": slopes, "sinks": sinks, "dropout": seed}
    if rest or any(bool(attrs[name]) != (x is not None) for name, x in told.items()):
        raise TypeInferenceError(f"attention: {len(operands)} operands do not fit {', '.join(f'{n} = {attrs[n]}' for n in told)}")
    return Parts(operands[0], operands[1], operands[2], bias, mask, table, slopes, sinks, seed)


def groups(q: Shape, k: Shape) -> int:
    """How many heads of the queries share one head of these keys or values, where that is not plain broadcasting; else 1."""
    if len(q) < 3 or len(k) < 3 or q[-3] == k[-3] or k[-3] == 1 or q[-3] == 1:
        return 1
    many, few = q[-3], k[-3]
    if not (isinstance(many, int) and isinstance(few, int)):
        return 1  # broadcasting decides whether they are the same
    if few == 0 or many % few:
        raise TypeInferenceError(f"attention: {many} heads of queries cannot share {few} heads of keys and values")
    return many // few


def _shared(q: Shape, k: Shape) -> Shape:
    """The batch and head axes of keys, as many heads as the queries have."""
    return (*k[:-3], q[-3]) if groups(q, k) > 1 else k[:-2]


def scores_shape(q: Shape, k: Shape, v: Shape) -> Shape:
    """``[..., H, M, N]`` for queries ``[..., H, M, D]``, keys ``[..., G, N, D]`` and values ``[..., G, N, E]``."""
    return (*broadcast_shapes([q[:-2], _shared(q, k), _shared(q, v)]), q[-2], k[-2])


def table_shape(mask: Shape) -> Shape:
    """Of a table ``u8[..., ceil(M / 16), ceil(N / 32)]`` of a mask ``[..., M, N]``: for each block, 1 if it leaves a pair, and 2 more if it
    leaves all. It says nothing that the mask does not: it is there for kernels, which then need not look through the mask."""
    return (*mask[:-2], *(dims.floordiv(dims.add(d, b - 1), b) for d, b in zip(mask[-2:], BLOCK, strict=True)))


def infer(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    p = parts(ts, attrs)
    q, k, v = p.q, p.k, p.v
    floats = [t for t in (q, k, v, p.bias, p.slopes, p.sinks) if t is not None]
    if not q.dtype.is_float or any(t.dtype != q.dtype for t in floats) or min(t.rank for t in (q, k, v)) < 2:
        raise TypeInferenceError(f"attention: needs float operands of one dtype and two axes at least, got {', '.join(map(str, ts))}")
    if dims.prove(q.shape[-1], "==", k.shape[-1]) is False or dims.prove(k.shape[-2], "==", v.shape[-2]) is False:
        raise TypeInferenceError(f"attention: {q}, {k}, {v} do not agree")
    scores = scores_shape(q.shape, k.shape, v.shape)
    for name, t in (("bias", p.bias), ("mask", p.mask)):
        if t is not None and not dims.same_shape(broadcast_shapes([t.shape, scores]), scores):
            raise TypeInferenceError(f"attention: the {name} {t} does not broadcast to scores of shape {scores}")
    if p.table is not None and p.mask is not None and p.table.shape != table_shape(p.mask.shape):
        raise TypeInferenceError(f"attention: {p.table} is no table of {p.mask}")
    heads = scores[-3] if len(scores) > 2 else 1
    for name, t in (("slopes", p.slopes), ("sinks", p.sinks)):
        if t is not None and not dims.same_shape(t.shape, (heads,)):
            raise TypeInferenceError(f"attention: {name} of type {t} for {dims.format_dim(heads)} heads")
    _check_attrs(attrs)
    if p.seed is not None:
        check_seed("attention", p.seed)
    return [TensorType(q.dtype, (*scores[:-1], v.shape[-1]))]


def _check_attrs(attrs: Attrs) -> None:
    if attrs["empty"] not in EMPTY:
        raise TypeInferenceError(f"attention: empty is {attrs['empty']!r}, not one of {', '.join(EMPTY)}")
    if attrs["window"] is not None and dims.prove(attrs["window"], "<", 1) is True:
        raise TypeInferenceError(f"attention: a window of {attrs['window']} keys")
    if attrs["softcap"] is not None and not attrs["softcap"] > 0:
        raise TypeInferenceError(f"attention: a soft cap of {attrs['softcap']}")
    check_rate("attention", attrs["dropout"])


def sees_a_key(attrs: Attrs, rows: Dim, keys: Dim, symbols: dims.Symbols | None = None) -> bool:
    """Whether the predicates ``causal`` and ``window`` are proven to leave each row a key (``mask`` and ``bias`` not looked at)."""
    offset, window = attrs["offset"], attrs["window"]
    first_has = dims.prove(offset, ">=", 0, symbols) is True
    last_has = window is None or dims.prove(dims.sub(dims.add(rows, offset), window), "<", keys, symbols) is True
    if window is not None and not attrs["causal"]:
        first_has = first_has or dims.prove(dims.add(offset, window), ">", 0, symbols) is True
    return (first_has or not (attrs["causal"] or window is not None)) and last_has


def seen_pairs(attrs: Attrs, rows: Dim, keys: Dim) -> Dim:
    """How many pairs of a row and a key the predicates leave; all where sizes are symbolic."""
    offset, window, causal = attrs["offset"], attrs["window"], attrs["causal"]
    if not all(isinstance(n, int) for n in (rows, keys, offset, window or 0)) or not (causal or window is not None):
        return dims.mul(rows, keys)
    total = 0
    for i in range(int(rows)):
        middle = i + offset
        last = middle if causal else middle + window - 1
        first = 0 if window is None else middle - window + 1
        total += max(0, min(int(keys) - 1, last) - max(0, first) + 1)
    return total


# reference -------------------------------------------------------------------------------------------------------------


def _evaluate(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    p = parts(xs, attrs, [x.dtype for x in xs])  # type: ignore[misc]
    s, v, keys = reference_scores(p, attrs, ctx), shared_by_heads(p, p.v), p.k.shape[-2]
    if p.sinks is not None:
        sinks = p.sinks.to(s.dtype)[:, None, None].expand(*s.shape[:-1], 1)
        w = torch.softmax(torch.cat([s, sinks], -1), -1)[..., :-1]
        return (dropped(w, p.seed, attrs["dropout"]) @ v).to(xs[0].dtype)
    w = torch.softmax(s, -1)
    without = {"zero": 0.0, "nan": float("nan"), "mean": 1.0 / max(keys, 1)}[attrs["empty"]]
    w = w.masked_fill((s == float("-inf")).all(-1, keepdim=True), without)
    return (dropped(w, p.seed, attrs["dropout"]) @ v).to(xs[0].dtype)


def shared_by_heads(p: Parts[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Keys or values, each head as often as it is shared; halves in f32."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x.repeat_interleave(groups(tuple(p.q.shape), tuple(x.shape)), -3) if x.dim() > 2 else x


def reference_scores(p: Parts[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    """The scores ``[..., H, M, N]``, -inf where a key is not seen; of halves in f32."""
    s = shared_by_heads(p, p.q) @ shared_by_heads(p, p.k).transpose(-1, -2) * attrs["scale"]
    if attrs["softcap"] is not None:
        s = attrs["softcap"] * torch.tanh(s / attrs["softcap"])
    if p.bias is not None:
        s = s + p.bias
    rows, keys = s.shape[-2:]
    i, j = torch.arange(rows, device=s.device)[:, None], torch.arange(keys, device=s.device)
    if p.slopes is not None:
        s = s + p.slopes.to(s.dtype)[:, None, None] * (j - i)
    for seen in _seen_by(attrs, i, j, p.mask, ctx):
        s = s.masked_fill(~seen, float("-inf"))
    return s


def _seen_by(attrs: Attrs, i: torch.Tensor, j: torch.Tensor, mask: torch.Tensor | None, ctx: EvalContext) -> list[torch.Tensor]:
    middle = i + ctx.dim(attrs["offset"])
    found = [mask] if mask is not None else []
    if attrs["causal"]:
        found.append(j <= middle)
    if attrs["window"] is not None:
        window = ctx.dim(attrs["window"])
        found.append(j > middle - window)
        if not attrs["causal"]:
            found.append(j < middle + window)
    return found


# expansion -------------------------------------------------------------------------------------------------------------


def repeated(b: Builder, x: Value, times: int) -> Value:
    """Each head as many times as there are heads of queries that share it."""
    if times == 1:
        return x
    *batch, heads, length, size = x.shape
    apart = b.broadcast_to(b.reshape(x, shape=(*batch, heads, 1, length, size)), shape=(*batch, heads, times, length, size))
    return b.reshape(apart, shape=(*batch, dims.mul(heads, times), length, size))


def _expand(b: Builder, node: Node) -> Value:
    p, attrs = parts(node.operands, node.attrs), node.attrs
    s, v = built_scores(b, p, attrs, relative=p.sinks is not None), repeated(b, p.v, groups(p.q.shape, p.v.shape))
    if p.sinks is not None:
        return b.matmul(built_dropout(b, _beside_sinks(b, s, p.sinks), p, attrs), v)  # type: ignore[no-any-return]
    weights = b.softmax(s, axis=s.type.rank - 1)
    whole = p.bias is None and p.mask is None and sees_a_key(attrs, s.shape[-2], s.shape[-1], node.graph.symbols)
    if attrs["empty"] == "zero" and not whole:  # softmax gives NaN there
        weights = b.where(b.isnan(weights), b.constant(0.0, weights.dtype), weights)
    return b.matmul(built_dropout(b, weights, p, attrs), v)  # type: ignore[no-any-return]


def built_dropout(b: Builder, w: Value, p: Parts[Value], attrs: Attrs) -> Value:
    """Dropout of what has the scores' shape, if there is any."""
    return w if p.seed is None else b.dropout(w, p.seed, rate=attrs["dropout"])  # type: ignore[no-any-return]


def built_scores(b: Builder, p: Parts[Value], attrs: Attrs, relative: bool) -> Value:
    """Nodes for the scores; what is not seen is the least number of its dtype, or -inf. For ``relative`` see :func:`_distance`."""
    s = _scores(b, p.q, repeated(b, p.k, groups(p.q.shape, p.k.shape)), attrs)
    if p.bias is not None:
        s = b.add(s, p.bias)
    if p.slopes is not None:
        s = b.add(s, b.mul(b.reshape(p.slopes, shape=(*p.slopes.shape, 1, 1)), _distance(b, s, relative)))
    seen = _seen(b, attrs, *s.shape[-2:])
    if p.mask is not None:
        seen = p.mask if seen is None else b.logical_and(p.mask, seen)
    return s if seen is None else b.where(seen, s, b.constant(_removed(s.dtype, attrs), s.dtype))  # type: ignore[no-any-return]


def _scores(b: Builder, q: Value, k: Value, attrs: Attrs) -> Value:
    perm = (*range(k.type.rank - 2), k.type.rank - 1, k.type.rank - 2)
    scale, cap, late = attrs["scale"], attrs["softcap"], q.dtype.bits >= 32
    # scaling the scores costs no pass over q, as it joins the softmax's kernel; halves are scaled first, lest q k^T overflows
    s = b.matmul(q if late or scale == 1 else b.mul(q, scale), b.transpose(k, perm=perm))
    after = (scale if late else 1.0) / (cap or 1.0)
    if after != 1:
        s = b.mul(s, after)
    return s if cap is None else b.mul(b.tanh(s), cap)


def _distance(b: Builder, s: Value, relative: bool) -> Value:
    """``j - i``; or ``j``, as what is the same along a row falls out of the softmax, unless the row has a sink, too."""
    rows, keys = s.shape[-2:]
    j = b.iota(size=keys)
    return b.cast(b.sub(j, b.reshape(b.iota(size=rows), shape=(rows, 1))) if relative else j, s.dtype)


def _seen(b: Builder, attrs: Attrs, rows: Dim, keys: Dim) -> Value | None:
    """The predicates ``causal`` and ``window`` as a value ``[M, N]``, or None if there are none."""
    offset, window, causal = attrs["offset"], attrs["window"], attrs["causal"]
    if not causal and window is None:
        return None

    def row(shift: Dim) -> Value:
        start = shift if isinstance(shift, int) else 0
        i = b.reshape(b.iota(size=rows, start=start), shape=(rows, 1))
        return i if isinstance(shift, int) else b.add(i, b.constant(shift, i64))

    j = b.iota(size=keys)
    seen = b.le(j, row(offset)) if causal else None
    if window is not None:
        near = b.gt(j, row(dims.sub(offset, window)))
        other = seen if seen is not None else b.lt(j, row(dims.add(offset, window)))
        seen = b.logical_and(other, near)
    return seen


def _removed(dtype: DType, attrs: Attrs) -> float:
    """The score of a key that is not seen; all rows of nothing but the least number have equal weights."""
    return torch.finfo(dtype.torch).min if attrs["empty"] == "mean" and not attrs["sinks"] else float("-inf")


def _beside_sinks(b: Builder, s: Value, sinks: Value) -> Value:
    """The weights where each row has one score more, whose value is zero."""
    last, keys = s.type.rank - 1, s.shape[-1]
    column = b.broadcast_to(b.reshape(sinks, shape=(*sinks.shape, 1, 1)), shape=(*s.shape[:-1], 1))
    weights = b.softmax(b.concat(s, column, axis=last), axis=last)
    return b.slice(weights, axis=last, start=0, stop=keys)  # type: ignore[no-any-return]


DEFAULTS: dict[str, Any] = {
    "causal": False, "offset": 0, "window": None, "softcap": None, "alibi": False, "sinks": False, "empty": "zero", "dropout": 0.0,
}  # fmt: skip

define(
    "attention", (3, 9), attrs={"scale": REQUIRED, **DEFAULTS}, infer=infer, evaluate=_evaluate, expand=_expand,
    doc="softmax(scale * q k^T + bias) v over the keys that are seen; operands q [..., H, M, D], k [..., G, N, D], v [..., G, N, E], G "
    "dividing H [, bias] [, mask [, table: which blocks of 16 x 32 it leaves]] [, slopes [H]] [, sinks [H]] [, seed]; causal keeps column "
    "<= row + offset, window column > row + offset - window; dropout is the rate at which weights are dropped",
)  # fmt: skip

"""Causal products in chunks: what they cost, and the ops that they are made of.

``sum_{j <= i} (q_i . k_j) v_j``, rows in chunks, is the same sum over the rows of the chunk that i is in, and ``q_i S``, with the state S
that is the sum of all ``k_j^T v_j`` of the chunks before.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir import Value, dims, types
from graphopt.ir.dims import Dim, Shape
from graphopt.passes.fusion.cost import LAUNCH, CostModel
from graphopt.rewrite import Rewriter

SIZES = (64, 128, 256)  # of chunks: what the kernels of products divide without a rest
_KERNELS = 6  # products within chunks, of states and with states, two pointwise ones, and the running sum
_HEAD = 128  # what a head of a size that is not known is taken to be, to choose: the largest that is common


@dataclass(frozen=True)
class Sizes:
    """What a causal product is about.

    Attributes:
        lead: leading axes of the result; ``shared``: of keys and values.
        rows: N, of which each sees itself and those before it.
        inner: D, summed by the product of queries and keys; what it is taken to be where it is not known. ``out`` likewise.
        out: E, of a value.
        itemsize: bytes of an element.
    """

    lead: Shape
    shared: Shape
    rows: Dim
    inner: int
    out: int
    itemsize: int

    @staticmethod
    def of(lead: Shape, shared: Shape, rows: Dim, inner: Dim, out: Dim, itemsize: int) -> Sizes:
        """With a guess for the sizes of heads that are not known."""
        known, given = (d if isinstance(d, int) else _HEAD for d in (inner, out))
        return Sizes(lead, shared, rows, known, given, itemsize)

    def all_pairs(self, costs: CostModel) -> tuple[float, float]:
        """Cycles of forming all pairs of rows, writing and reading them, where sizes are least and largest."""
        pairs = dims.numel((*self.lead, self.rows, self.rows))
        flops = dims.mul(2, dims.mul(pairs, dims.add(self.inner, self.out)))
        return _cycles(costs, flops, [dims.mul(pairs, 2 * self.itemsize)], 2)

    def all_states(self, costs: CostModel) -> tuple[float, float]:
        """Cycles of forming a running sum of D x E numbers for each row."""
        states = dims.numel((*self.shared, self.rows, self.inner, self.out))
        flops = dims.mul(2, dims.add(states, dims.numel((*self.lead, self.rows, self.inner, self.out))))
        return _cycles(costs, flops, [dims.mul(states, 2 * self.itemsize)], 2)

    def chunked(self, costs: CostModel, size: int) -> tuple[float, float]:
        """Cycles of the same in chunks."""
        n = _ceildiv(self.rows, size)
        within = dims.numel((*self.lead, n, size, size))
        states, result = dims.numel((*self.shared, n, self.inner, self.out)), dims.numel((*self.lead, n, size, self.out))
        flops = dims.add(dims.mul(within, dims.add(self.inner, self.out)), dims.add(dims.mul(states, size), dims.mul(result, self.inner)))
        moved = [dims.mul(x, times * self.itemsize) for x, times in ((within, 2), (states, 4), (result, 2))]
        return _cycles(costs, dims.mul(2, flops), moved, _KERNELS)

    def best(self, costs: CostModel) -> int:
        """The size of a chunk that takes least time, where sizes are largest."""
        return min(SIZES, key=lambda size: self.chunked(costs, size)[1])


def _ceildiv(rows: Dim, size: int) -> Dim:
    """How many chunks there are; the last one may be short."""
    return dims.floordiv(dims.add(rows, size - 1), size)


def _cycles(costs: CostModel, flops: Dim, moved: list[Dim], kernels: int) -> tuple[float, float]:
    rate = costs.target.flops_per_cycle * costs.target.cores
    traffic = [costs.moved(nbytes) for nbytes in moved]
    low, high = (f / rate + kernels * LAUNCH + sum(t[i] for t in traffic) for i, f in enumerate(costs.amount(flops)))
    return low, high


def chunked(rw: Rewriter, q: Value, k: Value, v: Value, size: int) -> Value:
    """``(q k^T * tril) v`` of q ``[..., N, D]``, k ``[..., N, D]``, v ``[..., N, E]``, leading axes broadcast: ``[..., N, E]``."""
    rows, n = q.shape[-2], _ceildiv(q.shape[-2], size)
    q, k, v = (_split(rw, x, n, size) for x in (q, k, v))
    rank = k.type.rank
    k = rw.transpose(k, perm=(*range(rank - 2), rank - 1, rank - 2))
    at = rw.iota(size=size, dtype=types.i64)
    seen = rw.le(at, rw.reshape(at, shape=(size, 1)))
    scores = rw.matmul(q, k)
    within = rw.matmul(rw.where(seen, scores, rw.constant(0.0, scores.dtype)), v)
    result = rw.add(within, rw.matmul(q, _before(rw, rw.matmul(k, v))))
    *lead, _, _, out = result.shape
    return _front(rw, rw.reshape(result, shape=(*lead, dims.mul(n, size), out)), len(lead), rows)


def running_dot(rw: Rewriter, q: Value, k: Value) -> Value:
    """``sum_{j <= i} q_i . k_j``, that is ``q_i . cumsum(k)_i``: ``[..., N, 1]``. Halves are summed in f32."""
    wide = q.dtype if q.dtype.bits >= 32 else types.f32
    sums = rw.cumsum(rw.cast(k, wide), axis=k.type.rank - 2)
    product = rw.mul(rw.cast(q, wide), sums)
    return rw.cast(rw.sum(product, axes=(product.type.rank - 1,), keepdims=True), q.dtype)


def whole_dot(rw: Rewriter, q: Value, k: Value) -> Value:
    """``sum_j q_i . k_j``: ``[..., N, 1]``. Halves are summed in f32."""
    wide = q.dtype if q.dtype.bits >= 32 else types.f32
    product = rw.mul(rw.cast(q, wide), rw.sum(rw.cast(k, wide), axes=(k.type.rank - 2,), keepdims=True))
    return rw.cast(rw.sum(product, axes=(product.type.rank - 1,), keepdims=True), q.dtype)  # type: ignore[no-any-return]


def _split(rw: Rewriter, x: Value, chunks: Dim, size: int) -> Value:
    """``[..., N, D]`` as ``[..., chunks, size, D]``, zeros behind: they are products with nothing."""
    axis, rows = x.type.rank - 2, x.shape[-2]
    whole = dims.mul(chunks, size)
    if not dims.same(rows, whole):
        more = dims.sub(whole, rows) if isinstance(rows, int) else size  # at least as many as are missing, of a number that is known
        x = rw.pad(x, low=(0,) * x.type.rank, high=(*(0,) * axis, more, 0))
        x = _front(rw, x, axis, whole)
    return rw.reshape(x, shape=(*x.shape[:-2], chunks, size, x.shape[-1]))


def _before(rw: Rewriter, states: Value) -> Value:
    """The sum of all states ``[..., chunks, D, E]`` before each; halves are summed in f32."""
    axis, rank = states.type.rank - 3, states.type.rank
    wide = rw.cast(states, types.f32) if states.dtype.bits < 32 else states
    shifted = rw.pad(wide, low=(*(0,) * axis, 1, 0, 0), high=(0,) * rank)
    return rw.cast(rw.cumsum(_front(rw, shifted, axis, states.shape[axis]), axis=axis), states.dtype)


def _front(rw: Rewriter, x: Value, axis: int, size: Dim) -> Value:
    """The first elements of an axis."""
    return x if dims.same(x.shape[axis], size) else rw.slice(x, axis=axis, start=0, stop=size)

"""((A B^T * tril) / r) C, or a_n . cumsum(b_n c_n^T)  =>  products within chunks of rows, and A times the B^T C of all chunks before

Why: causal attention without a softmax, (phi(q) phi(k)^T * tril) v, spelled with its N x N products: 2 N^2 (D + E) operations and N^2
numbers in memory; or as a running sum of outer products, with N D E numbers. In chunks of S rows these are 2 N S (D + E) + 4 N D E, and
N S + D E N / S.
When: scores are the product of queries and keys, of one length, and on their way to the product with values they are only multiplied or
divided by numbers a row, and masked: torch.tril, where or masked_fill with 0, or a factor of ones and zeros. A mask is proven to be
triangular, by positions or computed (see recognise-attention); that of a buffer is not. The sums of the rows, masked or not, become
products with sums of keys: q_i . cumsum(k)_i. Scores or running sums that something else reads are formed in any case. The size of a
chunk, and whether chunks are worth their kernels, is computed from operations and bytes; a head of unknown size is taken to be one of
128. A length that no chunk divides, or that is not known, is padded with zeros, which are products with nothing. Not in f16, where a sum
over all keys may leave the range. Decay (retention, gates) is no mask: declined with a remark.
Numerics: sums in another order (REASSOCIATES), running sums of halves in f32; what was a running sum alone, carried in f64 by kernels,
becomes f32 products within a chunk (an error of 1.4e-7 where it was 0.6e-7). Features of extreme sizes may leave the range in a state
where scores that are masked did not. What is not finite in a value reaches all rows of its chunk: of masked scores
it reached all rows, as 0 times it does, of running sums those behind it alone.
Reference: Katharopoulos et al., Transformers are RNNs, arXiv:2006.16236, 3.2 (the causal form); Yang et al., Gated Linear Attention,
arXiv:2312.06635, 2.1 (the chunks).
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir import Value, dims, types
from graphopt.pass_manager import RewritePass
from graphopt.passes.attention.axes import Axes, Placed, arrange, same
from graphopt.passes.attention.causal_reading import Causal, Sums, causal_of, states_of
from graphopt.passes.attention.chunks import chunked, running_dot, whole_dot
from graphopt.passes.fusion.cost import CostModel
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, erase_dead, pat, value

w, c = value("w"), value("c")

_WORTH = 1.5  # times less work, for which another order of sums is worth it


class Chunk(Rule):
    """((A B^T * tril) / r) C => ((A B^T * tril within chunks) C + A (B^T C of all chunks before)) / r"""

    pattern = pat.matmul(w, c)
    numerics = Numerics.REASSOCIATES

    def check(self, m: Match) -> Reject | None:
        found = causal_of(m.root)
        if isinstance(found, Reject):
            return found
        costs = CostModel(None, m.root.graph.symbols)
        return _decline(found, costs, found.sizes().all_pairs(costs), "all pairs of")

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        found = causal_of(m.root)
        assert isinstance(found, Causal)
        known: dict[Value, Value] = {}
        for sums in reversed(found.sums):  # those of the scores themselves first
            here, old = Rewriter(rw.graph, sums.node), sums.node.result
            known[old] = self._sums(here, found, sums, known)
            rw.graph.replace(old, known[old])
            erase_dead(rw.graph, sums.node)
        return _in_chunks(m, rw, found, known)

    @staticmethod
    def _sums(rw: Rewriter, found: Causal, sums: Sums, known: dict[Value, Value]) -> Value:
        """The sums of rows from sums of keys."""
        q, k, _ = found.operands(rw)
        total = running_dot(rw, q, k) if sums.masked else whole_dot(rw, q, k)
        total = _through(rw, total, found, sums.behind, known)
        axes = tuple(() if same(g, found.keys) else g for g in sums.axes)
        if not sums.node.attrs["keepdims"]:
            axes = tuple(g for g, of in zip(axes, sums.axes, strict=True) if not same(of, found.keys))
        return _placed(rw, total, (*found.lead, found.rows, ()), axes, sums.node.result)


class ChunkStates(Rule):
    """A cumsum(b^T c) => (A B^T * tril within chunks) C + A (B^T C of all chunks before)"""

    pattern = pat.matmul(w, c)
    numerics = Numerics.REASSOCIATES

    def check(self, m: Match) -> Reject | None:
        found = states_of(m.root)
        if isinstance(found, Reject):
            return found
        costs = CostModel(None, m.root.graph.symbols)
        return _decline(found, costs, found.sizes().all_states(costs), "running sums for each of")

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        found = states_of(m.root)
        assert isinstance(found, Causal)
        return _in_chunks(m, rw, found, {})


class ChunkSummedStates(ChunkStates):
    """sum(a * cumsum(b^T c)) => (A B^T * tril within chunks) C + A (B^T C of all chunks before)"""

    pattern = pat.sum(w)


def _decline(found: Causal, costs: CostModel, now: tuple[float, float], what: str) -> Reject | None:
    """Why not to go on, ``now`` being the cycles of what is there."""
    sizes, dtype = found.sizes(), found.q.value.dtype
    if not dtype.is_float:
        return NOT_THIS
    if dtype == types.f16:
        return Reject("a sum over all keys may leave the range of f16", found.product)
    lost = [_WORTH * t - n for n, t in zip(now, sizes.chunked(costs, sizes.best(costs)), strict=True)]
    if max(lost) > max(-x for x in lost):
        return Reject(f"{what} {dims.format_dim(sizes.rows)} rows are hardly more work than chunks of them", found.product)
    return None


def _in_chunks(m: Match, rw: Rewriter, found: Causal, known: dict[Value, Value]) -> Value:
    """What stands in the place of the match's root."""
    q, k, v = found.operands(rw)
    x = chunked(rw, q, k, v, found.sizes().best(CostModel(None, m.root.graph.symbols)))
    return _placed(rw, _through(rw, x, found, 0, known), (*found.lead, found.rows, found.out), found.result, m.root.result)


def _through(rw: Rewriter, x: Value, found: Causal, behind: int, known: dict[Value, Value]) -> Value:
    """``[lead, N, any]`` through the steps that scores went through."""
    for step in reversed(found.steps[behind:]):
        by = Placed(known.get(step.by.value, step.by.value), step.by.axes)
        x = rw.create(step.op, [x, arrange(rw, by, (*found.lead, found.rows, ()))])
    return x


def _placed(rw: Rewriter, x: Value, axes: Axes, target: Axes, like: Value) -> Value:
    """A value as another one lies."""
    having = tuple(() if d == 1 else g for g, d in zip(axes, x.shape, strict=True))
    return rw.broadcast_to(arrange(rw, Placed(x, having), target), shape=like.shape)  # type: ignore[no-any-return]


class CausalLinearAttention(RewritePass):
    """Multiply the products of causal linear attention chunk by chunk. See the module's header."""

    name = "causal-linear-attention"

    def rules(self) -> Sequence[Rule]:
        return [Chunk(), ChunkStates(), ChunkSummedStates()]

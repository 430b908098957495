"""(A B^T) C  =>  A (B^T C), with what divides the rows of A B^T behind it:  ((A B^T) / r) C  =>  (A (B^T C)) / r

Why: attention without a softmax, phi(q) phi(k)^T v, spelled with its N x N products: 2 N^2 (D + E) operations and N^2 numbers in memory
become 4 N D E operations and D E numbers. What is already bracketed so is left as it is: nothing ever forms N x N.
When: the product in the middle is used here alone, and by sums over its rows, which become products with the sums of B: the
normaliser, r = sum_j A B^T. Between the products there is nothing but factors and divisors of whole rows. Operations are at most two
thirds of what they were, at the worse end of symbolic sizes. Not in f16, where a sum over all keys may leave the range. What differs
along a row, as the mask of causal linear attention, has no such form: see causal-linear-attention.
Numerics: sums in another order (REASSOCIATES), and of other things: features of extreme sizes may leave the range where scores did not.
Reference: Katharopoulos et al., Transformers are RNNs, arXiv:2006.16236; Shen et al., Efficient Attention, arXiv:1812.01243.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.ir import Value, dims, types
from graphopt.ir.graph import Node
from graphopt.ir.ops import broadcast_shapes
from graphopt.pass_manager import RewritePass
from graphopt.passes.fusion.cost import CostModel
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, erase_dead, pat, value

w, c = value("w"), value("c")

_WORTH = 1.5  # times fewer operations, for which another order of sums is worth it


@dataclass(frozen=True)
class Step:
    """What scores go through before they are multiplied by C: ``mul`` or ``div`` by a number a row, or a ``reshape`` of batch axes.

    Attributes:
        by: the number a row; None of a reshape.
        shape: of the result.
    """

    op: str
    by: Value | None
    shape: dims.Shape


@dataclass(frozen=True)
class Chain:
    """What stands between a product and C.

    Attributes:
        steps: after the product, the last one first.
        sums: over rows, each with the number of ``steps`` that stand behind what it sums.
    """

    product: Node
    steps: tuple[Step, ...]
    sums: tuple[tuple[Node, int], ...]


def _chain(m: Match) -> Chain | Reject:
    """Go up from the root to a product."""
    v, reader, steps, sums = m[w], m.root, list[Step](), list[tuple[Node, int]]()
    problem: Reject | None = None  # told only where there is a product at the end
    symbols = m.root.graph.symbols
    while (node := v.producer) is not None:
        last = v.type.rank - 1
        if v is m[c]:
            return NOT_THIS
        for user in v.users:
            if user.op.name == "sum" and [a % (last + 1) for a in user.attrs["axes"]] == [last]:
                sums.append((user, len(steps)))
            elif user is not reader:
                problem = problem or Reject(f"its scores are also used by {user.op.name}: they are formed in any case", user)
        if node.op.name == "matmul":
            if problem is not None:
                return problem
            ranks = [x.type.rank for x in (*node.operands, m[c])]
            return Chain(node, tuple(steps), tuple(sums)) if min(ranks) > 1 else NOT_THIS
        if node.op.name not in ("mul", "div", "reshape"):
            return NOT_THIS
        x, *others = node.operands
        if node.op.name == "mul" and _is_of_rows(x, v) and not _is_of_rows(others[0], v):
            x, others = others[0], [x]
        if others and not _is_of_rows(others[0], v):
            return NOT_THIS
        kept = -2 if node.op.name == "reshape" else 0
        if x.type.rank < 2 or not dims.same_shape(x.shape[kept:], v.shape[kept:], symbols):
            return NOT_THIS
        steps.append(Step(node.op.name, others[0] if others else None, v.shape))
        v, reader = x, node
    return NOT_THIS


def _is_of_rows(factor: Value, scores: Value) -> bool:
    """Whether a factor is one number a row."""
    return factor.type.rank <= scores.type.rank and (factor.type.rank == 0 or (factor.shape[-1] == 1 and scores.shape[-1] != 1))


def _through(rw: Rewriter, x: Value, steps: Sequence[Step], known: dict[Value, Value]) -> Value:
    """Rows of ``[..., M, any]`` through the steps that scores went through, the last one first."""
    for step in reversed(steps):
        if step.by is None:
            x = rw.reshape(x, shape=(*step.shape[:-1], x.shape[-1]))
        else:
            x = rw.create(step.op, [x, known.get(step.by, step.by)])
    return x


class Rebracket(Rule):
    """((A B^T) / r) C => (A (B^T C)) / r"""

    pattern = pat.matmul(w, c)
    numerics = Numerics.REASSOCIATES

    def check(self, m: Match) -> Reject | None:
        found = _chain(m)
        if isinstance(found, Reject):
            return found
        dtype = m.root.results[0].dtype
        if not dtype.is_float:
            return NOT_THIS
        if any(step.by is None for step in found.steps) and not dims.same_shape(m[w].shape[:-2], m[c].shape[:-2], m.root.graph.symbols):
            return NOT_THIS
        if (reason := self._gain(m, found.product)) is not None:
            return reason
        if dtype == types.f16:
            return Reject("a sum over all keys may leave the range of f16", found.product)
        return None

    @staticmethod
    def _gain(m: Match, product: Node) -> Reject | None:
        """Why the other order is no less work."""
        (a, b), last = product.operands, m[c]
        batch = broadcast_shapes([b.shape[:-2], last.shape[:-2]]) if m[w].shape[:-2] == product.results[0].shape[:-2] else b.shape[:-2]
        costs, whole = CostModel(None, m.root.graph.symbols), m.root.results[0].type.numel

        def operations(inner: dims.Dim, first: dims.Dim, second: dims.Dim) -> tuple[float, float]:
            return costs.amount(dims.add(dims.mul(inner, first), dims.mul(whole, second)))

        now = operations(product.results[0].type.numel, a.shape[-1], last.shape[-2])
        then = operations(dims.numel((*batch, b.shape[-2], last.shape[-1])), b.shape[-1], a.shape[-1])
        lost = [_WORTH * t - n for n, t in zip(now, then, strict=True)]
        if max(lost) <= max(-x for x in lost) and min(lost) < 0:
            return None
        if all(t >= n for n, t in zip(now, then, strict=True)):
            return NOT_THIS
        return Reject("the other order is hardly less work", product)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        found = _chain(m)
        assert isinstance(found, Chain)
        (a, b), known = found.product.operands, dict[Value, Value]()
        for node, behind in reversed(found.sums):  # those of the scores themselves first
            here, old = Rewriter(rw.graph, node), node.results[0]
            total = here.matmul(a, here.sum(b, axes=(b.type.rank - 1,), keepdims=True))
            total = _through(here, total, found.steps[behind:], known)
            known[old] = total if node.attrs["keepdims"] else here.reshape(total, shape=old.shape)
            rw.graph.replace(old, known[old])
            erase_dead(rw.graph, node)
        x = known.get(m[c], m[c])
        if any(step.by is None for step in found.steps):
            x = rw.reshape(x, shape=(*found.product.results[0].shape[:-2], *x.shape[-2:]))
        return _through(rw, rw.matmul(a, rw.matmul(b, x)), found.steps, known)


class LinearAttention(RewritePass):
    """Multiply the products of linear attention in the order that never forms all pairs of tokens. See the module's header."""

    name = "linear-attention"

    def rules(self) -> Sequence[Rule]:
        return [Rebracket()]

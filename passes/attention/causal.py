"""((A B^T * tril) / r) C  =>  the products within chunks of rows, and A times the sum of B^T C over the chunks before

Why: causal attention without a softmax, (phi(q) phi(k)^T * tril) v, spelled with its N x N products: 2 N^2 (D + E) operations and N^2
numbers in memory. In chunks of S rows these are 2 N S (D + E) + 4 N D E, and N S + D E N / S.
When: scores are the product of queries and keys, of one length, and on their way to the product with values they are only multiplied or
divided by numbers a row, and masked: torch.tril, where or masked_fill with 0, or a factor of ones and zeros. A mask is proven to be
triangular, by positions or computed (see recognise-attention); that of a buffer is not. The sums of the rows, masked or not, become
products with sums of keys: q_i . cumsum(k)_i. Scores that something else reads are formed in any case. The size of a chunk, and whether
chunks are worth their kernels, is computed from operations and bytes; a head of unknown size is taken to be one of 128. A length that no
chunk divides, or that is not known, is padded with zeros, which are products with nothing. Not in f16, where a sum over all keys may
leave the range. Decay (retention, gates) is no mask: declined with a remark.
Numerics: sums in another order (REASSOCIATES), running sums of halves in f32; features of extreme sizes may leave the range in a state
where scores that are masked did not. What is not finite in a value reaches all rows of its chunk, and not, as 0 times it does, all rows.
Reference: Katharopoulos et al., Transformers are RNNs, arXiv:2006.16236, 3.2 (the causal form); Yang et al., Gated Linear Attention,
arXiv:2312.06635, 2.1 (the chunks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.ir import Value, dims, types
from graphopt.ir.graph import Node
from graphopt.pass_manager import RewritePass
from graphopt.passes.attention.axes import Axes, Group, Placed, aligned, apart, arrange, flat, fresh, same, size, up, within
from graphopt.passes.attention.chunks import Sizes, chunked, running_dot, whole_dot
from graphopt.passes.attention.masks import truth
from graphopt.passes.attention.predicates import Seen, constant_value
from graphopt.passes.fusion.cost import CostModel
from graphopt.passes.recompose.spelling import number
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, erase_dead, pat, value

w, c = value("w"), value("c")

_WORTH = 1.5  # times less work, for which another order of sums is worth it


@dataclass(frozen=True)
class Step:
    """What scores are multiplied (``mul``) or divided (``div``) by, a number a row."""

    op: str
    by: Placed


@dataclass(frozen=True)
class Sums:
    """The sum of each row, at some point between the products.

    Attributes:
        axes: of what is summed.
        behind: how many steps stand behind that.
        masked: whether the mask stands before it.
    """

    node: Node
    axes: Axes
    behind: int
    masked: bool


@dataclass(frozen=True)
class Causal:
    """Causal products as they were found.

    Attributes:
        product: of q and k; both, and v, are below no views.
        lead: the other axes, those that all or some have in common.
        steps: after the product, the last one first.
    """

    product: Node
    q: Placed
    k: Placed
    v: Placed
    lead: Axes
    rows: Group
    keys: Group
    inner: Group
    out: Group
    result: Axes
    steps: tuple[Step, ...]
    sums: tuple[Sums, ...]

    def operands(self, rw: Rewriter) -> tuple[Value, Value, Value]:
        """q and k ``[..., N, D]``, v ``[..., N, E]``."""
        ends = ((self.q, self.rows, self.inner), (self.k, self.keys, self.inner), (self.v, self.keys, self.out))
        q, k, v = (arrange(rw, p, (*self.lead, *last)) for p, *last in ends)
        return q, k, v

    def sizes(self) -> Sizes:
        """Without building anything."""
        having = [[g if within(g, p.atoms) else () for g in self.lead] for p in (self.q, self.k, self.v)]
        lead, shared = (tuple(size(g) if any(h[i] for h in of) else 1 for i, g in enumerate(self.lead)) for of in (having, having[1:]))
        return Sizes.of(lead, shared, size(self.rows), size(self.inner), size(self.out), self.q.value.dtype.itemsize)


class _Walk:
    """The way up from weights to the product that they come from.

    Attributes:
        problem: what is wrong with what was passed, told only where there is a product at the end.
    """

    def __init__(self, root: Node, at: Placed, rows: Group, keys: Group) -> None:
        self.root, self.at, self.rows, self.keys = root, at, rows, keys
        self.reader, self.symbols = root, root.graph.symbols
        self.steps: list[Step] = []
        self.sums: list[tuple[Node, Axes, int, int]] = []
        self.masks = 0  # and other factors that differ along a row
        self.problem: Reject | None = None

    def to_product(self) -> Node | None:
        """Walk; the product, or None if there is none."""
        while (node := self.at.value.producer) is not None:
            self._look_at_users()
            if node.name == "matmul":
                return node
            if (step := up(self.at.value, self.at.axes)) is not None:
                self.at = Placed(*step)
            elif node.name == "where":
                if not self._where(node):
                    return None
            elif node.name in ("mul", "div"):
                self._factor(node)
            else:
                return None
            self.reader = node
        return None

    def _decline(self, why: str, culprit: Value | Node) -> None:
        self.problem = self.problem or Reject(why, culprit)

    def _look_at_users(self) -> None:
        """Others that read the same: sums of rows, or they need it as it is."""
        axes = self.at.axes
        for user in self.at.value.users:
            if user is self.reader:
                continue
            if user.op.name == "sum" and all(same(axes[a], self.keys) for a in user.attrs["axes"]) and len(user.attrs["axes"]) == 1:
                self.sums.append((user, axes, len(self.steps), self.masks))
            else:
                self._decline(f"its scores are also used by {user.op.name}: they are formed in any case", user)

    def _where(self, node: Node) -> bool:
        condition, x, y = node.operands
        kept = x if number(y) == 0 else y if number(x) == 0 else None
        if kept is None:
            return False
        self._take(Placed(condition, aligned(condition.shape, self.at.axes)), kept is y)
        self.at = Placed(kept, aligned(kept.shape, self.at.axes))
        return True

    def _factor(self, node: Node) -> None:
        x, by = (Placed(v, aligned(v.shape, self.at.axes)) for v in node.operands)
        if node.name == "mul" and (apart(x.atoms, self.keys) or not _leads_to_product(x.value)):
            x, by = by, x
        self.at = x
        if apart(by.atoms, self.keys):
            self.steps.append(Step(node.name, by))
        elif node.name == "mul" and (found := self._ones(by)) is not None:
            self._take(*found)
        else:
            self.masks += 1
            self._decline("its scores are changed along a row by what is not proven to be ones and zeros, as decay is not", by.value)

    def _ones(self, p: Placed) -> tuple[Placed, bool] | None:
        """(mask, negated) of a factor that is 1 where a mask holds and 0 elsewhere."""
        p = p.above()
        if (found := truth(p)) is not None:
            return found
        node = p.value.defined_by("where")
        if node is not None and {number(x) for x in node.operands[1:]} == {0.0, 1.0}:
            return Placed(node.operands[0], aligned(node.operands[0].shape, p.axes)), number(node.operands[1]) == 0
        constant = constant_value(p.value)
        return (p, False) if constant is not None and bool(((constant == 0) | (constant == 1)).all()) else None

    def _take(self, mask: Placed, negated: bool) -> None:
        seen = Seen(self.rows, self.keys, self.symbols)
        seen.take(mask, negated)
        if seen.masks:
            self._decline("its mask is not proven to be triangular", mask.value)
        elif seen.band.low is not None or seen.band.high != 0:
            self._decline("its mask is another band than that of each row itself and all before it", mask.value)
        self.masks += 1


def _leads_to_product(v: Value) -> bool:
    """Whether a product is above, through what scores may go through."""
    while (node := v.producer) is not None and node.name in ("reshape", "transpose", "broadcast_to", "mul", "div", "where"):
        wanted = node.operands[1:] if node.name == "where" else node.operands
        v = next((x for x in wanted if number(x) is None and x.type.rank == v.type.rank), wanted[0])
    return node is not None and node.name == "matmul"


def causal_of(root: Node) -> Causal | Reject:
    """Read a matmul as the second of causal products; a Reject without reason if it is not about these."""
    a, b = root.operands
    result = fresh(root.result.shape)
    (keys,), rows, out = fresh((a.shape[-1],)), result[-2], result[-1]
    weights, values = (Placed(x, (*aligned(x.shape[:-2], result[:-2]), *ends))
                       for x, ends in ((a, (rows, keys)), (b, (keys, out))))  # fmt: skip
    walk = _Walk(root, weights, rows, keys)
    product = walk.to_product()
    if product is None or not walk.masks:
        return NOT_THIS
    batch, first, second = walk.at.axes[:-2], *walk.at.axes[-2:]
    (inner,) = fresh((product.operands[0].shape[-1],))
    if not ((same(first, rows) and same(second, keys)) or (same(first, keys) and same(second, rows))):
        return NOT_THIS
    left, right = (Placed(x, (*aligned(x.shape[:-2], batch), *ends))
                   for x, ends in zip(product.operands, ((first, inner), (inner, second)), strict=True))  # fmt: skip
    q, k = (left, right) if same(first, rows) else (right, left)
    q, k, v = (_above(p, own) for p, own in ((q, (*rows, *inner)), (k, (*keys, *inner)), (values, (*keys, *out))))
    lead = tuple((atom,) for g in result[:-2] for atom in flat(g))
    others = tuple(atom for g in lead for atom in g)
    if not all(len(flat(g)) == 1 for g in (rows, keys)) or _is_chunk(root, product):
        return NOT_THIS
    if not all(within(p.atoms, (*others, *own)) for p, own in ((q, (*rows, *inner)), (k, (*keys, *inner)), (v, (*keys, *out)))):
        return NOT_THIS
    if not dims.same(size(rows), size(keys), root.graph.symbols):
        return NOT_THIS
    if walk.problem is not None:
        return walk.problem
    sums = tuple(Sums(node, axes, behind, masks < walk.masks) for node, axes, behind, masks in walk.sums)
    return Causal(product, q, k, v, lead, rows, keys, inner, out, result, tuple(walk.steps), sums)


def _above(p: Placed, own: Group) -> Placed:
    """The same below no views, as long as it has axes of its own: what is broadcast along one of them stays so."""
    while (step := up(p.value, p.axes)) is not None and within(own, Placed(*step).atoms):
        p = Placed(*step)
    return p


def _is_chunk(root: Node, product: Node) -> bool:
    """Whether what the rows have of chunks before is added to these products: they are in chunks already."""
    users = [u for u in root.result.users if u.op.name == "add"]
    others = [x.defined_by("matmul") for u in users for x in u.operands if x is not root.result]
    return any(n is not None and n.operands[0] is product.operands[0] for n in others)


class Chunk(Rule):
    """((A B^T * tril) / r) C => ((A B^T * tril within chunks) C + A (B^T C of all chunks before)) / r"""

    pattern = pat.matmul(w, c)
    numerics = Numerics.REASSOCIATES

    def check(self, m: Match) -> Reject | None:
        found = causal_of(m.root)
        if isinstance(found, Reject):
            return found
        dtype = m.root.result.dtype
        if not dtype.is_float:
            return NOT_THIS
        if dtype == types.f16:
            return Reject("a sum over all keys may leave the range of f16", found.product)
        costs, sizes = CostModel(None, m.root.graph.symbols), found.sizes()
        now, then = sizes.all_pairs(costs), sizes.chunked(costs, sizes.best(costs))
        lost = [_WORTH * t - n for n, t in zip(now, then, strict=True)]
        if max(lost) > max(-x for x in lost):
            return Reject(f"all pairs of {dims.format_dim(sizes.rows)} rows are hardly more work than chunks of them", found.product)
        return None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        found = causal_of(m.root)
        assert isinstance(found, Causal)
        known: dict[Value, Value] = {}
        for sums in reversed(found.sums):  # those of the scores themselves first
            here, old = Rewriter(rw.graph, sums.node), sums.node.result
            known[old] = self._sums(here, found, sums, known)
            rw.graph.replace(old, known[old])
            erase_dead(rw.graph, sums.node)
        q, k, v = found.operands(rw)
        x = chunked(rw, q, k, v, found.sizes().best(CostModel(None, m.root.graph.symbols)))
        return _placed(rw, _through(rw, x, found, 0, known), (*found.lead, found.rows, found.out), found.result, m.root.result)

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
        return [Chunk()]

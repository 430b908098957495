"""Reading causal products without a softmax: scores under a triangular mask, or running sums of outer products."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir import Value, dims
from graphopt.ir.graph import Node
from graphopt.passes.attention.axes import Axes, Group, Placed, aligned, apart, arrange, flat, flat_axes, fresh, same, size, up, within
from graphopt.passes.attention.chunks import Sizes
from graphopt.passes.attention.masks import truth
from graphopt.passes.attention.predicates import Seen, constant_value
from graphopt.passes.recompose.spelling import number
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Reject, Rewriter


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
    if _made_of(v.value, product):
        return Reject("its values are made of its scores: they are formed in any case", v.value)
    sums = tuple(Sums(node, axes, behind, masks < walk.masks) for node, axes, behind, masks in walk.sums)
    return Causal(product, q, k, v, lead, rows, keys, inner, out, result, tuple(walk.steps), sums)


def _above(p: Placed, own: Group) -> Placed:
    """The same below no views, as long as it has axes of its own: what is broadcast along one of them stays so."""
    while (step := up(p.value, p.axes)) is not None and within(own, Placed(*step).atoms):
        p = Placed(*step)
    return p


def _made_of(v: Value, node: Node) -> bool:
    """Whether a value depends on a node."""
    waiting, seen = [v], {v}
    while waiting:
        producer = waiting.pop().producer
        if producer is node:
            return True
        new = [x for x in producer.operands if x not in seen] if producer is not None else []
        seen.update(new)
        waiting += new
    return False


def _is_chunk(root: Node, product: Node) -> bool:
    """Whether what the rows have of chunks before is added to these products: they are in chunks already."""
    users = [u for u in root.result.users if u.op.name == "add"]
    others = [x.defined_by("matmul") for u in users for x in u.operands if x is not root.result]
    return any(n is not None and n.operands[0] is product.operands[0] for n in others)


# --- running sums of outer products ------------------------------------------------------------------------------------------


def states_of(root: Node) -> Causal | Reject:
    """Read a matmul, or a sum of a product, as queries times a running sum of keys times values."""
    if root.name == "matmul":
        result = fresh(root.result.shape)
        (inner,) = fresh((root.operands[0].shape[-1],))
        lines = ((result[-2], inner), (inner, result[-1]))
        sides = [Placed(x, (*aligned(x.shape[:-2], result[:-2]), *ends)) for x, ends in zip(root.operands, lines, strict=True)]
    else:
        node, axes = root.operands[0].defined_by("mul"), root.attrs["axes"]
        if node is None or len(axes) != 1 or not root.operands[0].has_one_use:
            return NOT_THIS
        space = fresh(node.result.shape)
        inner, axis = space[axes[0]], axes[0] % len(space)
        result = (*space[:axis], *([()] if root.attrs["keepdims"] else []), *space[axis + 1 :])
        sides = [Placed(x, aligned(x.shape, space)) for x in node.operands]
    for q, states in (sides, sides[::-1]):
        if (found := _states(root, q, states, inner, result)) is not None:
            return found
    return NOT_THIS


def _states(root: Node, q: Placed, at: Placed, inner: Group, result: Axes) -> Causal | Reject | None:
    """With the running sum on a side that was chosen; None if there is none."""
    problem: Reject | None = None
    steps: list[Step] = []
    while (node := at.value.producer) is not None:
        if not at.value.has_one_use:
            problem = Reject("its running sums are also used elsewhere: they are formed in any case", node)
        if (step := up(at.value, at.axes)) is not None:
            at = Placed(*step)
        elif node.name in ("mul", "div"):
            x, by = (Placed(v, aligned(v.shape, at.axes)) for v in node.operands)
            x, by = (by, x) if node.name == "mul" and apart(x.atoms, inner) else (x, by)
            steps.append(Step(node.name, by))
            at = x
        else:
            break
    if node is None or node.name != "cumsum":
        return None
    rows = at.axes[node.attrs["axis"] % len(at.axes)]
    factors = _outer(Placed(node.operands[0], at.axes))
    if factors is None:
        return None
    k, v = factors if within(inner, factors[0].atoms) else factors[::-1]
    out = tuple(a for a in flat(v.atoms) if a not in flat((*rows, *q.atoms, *k.atoms)))
    others = tuple(a for a in flat_axes(result) if a not in flat((*rows, *out)))
    owns = ((q, (*rows, *inner)), (k, (*rows, *inner)), (v, (*rows, *out)))
    if len(flat(rows)) != 1 or not flat(inner) or not apart(inner, rows) or not out:
        return None
    if not all(within(s.by.atoms, (*others, *rows)) for s in steps):
        return None
    if not all(within(own, p.atoms) and within(p.atoms, (*others, *own)) for p, own in owns):
        return None
    q, k, v = (_above(p, own) for p, own in owns)
    lead = tuple((atom,) for atom in others)
    return problem or Causal(node, q, k, v, lead, rows, rows, inner, out, result, tuple(steps), ())


def _outer(p: Placed) -> tuple[Placed, Placed] | None:
    """The factors of an outer product: a ``mul`` that broadcasts, or a ``matmul`` that sums nothing."""
    p = p.above()
    node = p.value.defined_by("mul", "matmul")
    if node is None or (node.name == "matmul" and node.operands[0].shape[-1] != 1):
        return None
    x, y = (Placed(v, aligned(v.shape, p.axes)).above() for v in node.operands)
    return x, y

"""What an attention's kernel computes when it reads a row of queries, keys or values, instead of reading what a kernel before it wrote.

A row of queries is read once. Whatever is made of it column by column, with columns exchanged, or by scaling it to a norm (a rotary
embedding, an RMS norm over the head), is the same work there, and saves a pass over memory and a launch. Keys and values are
read again by each task of queries and by each head that shares them: what is computed of them is computed again, and copied to
scratch, which is weighed against writing it once.

Reference: Su et al., arXiv:2104.09864; Henry et al., "Query-key normalization for transformers", arXiv:2010.04245.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir.graph import Node, Value
from graphopt.ir.ops import Trait
from graphopt.ir.opset.attention import groups, parts
from graphopt.passes.fusion.attention import FEW, FLOATS
from graphopt.passes.fusion.cost import LAUNCH, CostModel, Price, is_long

_TASK = 256  # query rows, about, for which a task reads keys and values once
_COPY = 4.0  # instructions to write a row that was computed to scratch, and to read it again
_QUARTER = 4  # elements that a vector of the kernel of few queries has at least
_WHOLE = 16  # elements of which a row that is normalized is a multiple: vectors are filled


def row_reject(node: Node, attention: Node, operand: int, users: Sequence[Node], costs: CostModel) -> str | None:
    """Why an attention's kernel does not compute a node when it reads a row; None if it does.

    Args:
        operand: 0 for queries, 1 for keys, 2 for values; others are not read by rows, and -1 is several of them.
        users: the node's readers, which the kernel computes.
    """
    name, x, rows = node.op.name, node.results[0], attention.operands[max(operand, 0)]
    if operand not in (0, 1, 2) or not costs.for_cpu:
        return "an attention's kernel computes nothing but rows of queries, of keys or of values"
    q, queries = parts(attention.operands, attention.attrs).q, attention.result.shape[-2]
    share = groups(q.shape, rows.shape)
    few = isinstance(queries, int) and queries * share <= FEW
    if operand > 0 and x is rows and _joins_rows(node):
        if not x.has_one_use:
            return "what joins keys or values has other readers, too"
        heads = q.shape[-3] if q.type.rank > 2 and rows.type.rank > 2 and rows.shape[-3] == 1 else share  # all share one by broadcasting
        size = rows.shape[-1]
        if few and isinstance(heads, int) and queries * heads <= FEW and isinstance(size, int) and size % _QUARTER == 0:
            return None
        return "an attention's kernel reads joined keys or values part by part only where queries are few and heads fill vectors"
    if any(u.results[0] is rows and _joins_rows(u) for u in users):
        return "keys and values that are joined are read as they are"
    if is_long(node) or x.dtype not in FLOATS:
        return f"an attention's kernel computes no {name} of {x.dtype} on the way"
    if any(u.op.name in ("broadcast_to", "dequantize", "take") for u in users):
        return "an attention's kernel computes no row that others are copies of"
    if name == "rms_norm":
        if node.attrs["axes"] != 1 or x.shape[-1] != rows.shape[-1] or int(rows.shape[-1]) % _WHOLE:
            return "it normalizes other rows than heads of whole vectors"
        if (reason := _Way(x).reject(rows)) is not None:
            return reason
    elif not node.op.has(Trait.POINTWISE) and not _joins_columns(node):
        return f"an attention's kernel does no {name} on the way"
    if operand == 0 or any(u is not attention and not u.op.has(Trait.VIEW) for u in users):
        return None  # nothing is computed again; or it is behind something that was paid for with it
    if few:
        return "where queries are few, keys and values are read as they are"
    price = _price(node, [share * max(1.0, -(-m // _TASK)) for m in costs.amount(queries)], costs)
    return None if price.pays else f"each task of the attention would compute it again: it {price.text}"


def _joins_columns(node: Node) -> bool:
    return node.op.name == "concat" and node.attrs["axis"] % node.results[0].type.rank == node.results[0].type.rank - 1


def _joins_rows(node: Node) -> bool:
    return node.op.name == "concat" and node.attrs["axis"] % node.results[0].type.rank == node.results[0].type.rank - 2


def _price(node: Node, again: Sequence[float], costs: CostModel) -> Price:
    """Computing keys or values so many times in the kernel, instead of once and writing them."""
    t, x = costs.target, node.results[0]
    chain = [node, *_behind(x)]
    work = [sum(costs.work(n).work[end] for n in chain) for end in range(2)]
    copy = [n * _COPY / (t.lanes(4) * t.pipes * t.cores) for n in costs.amount(x.type.numel)]
    moved = costs.moved(x.type.nbytes())
    inside = [n * (w + c) for n, w, c in zip(again, work, copy, strict=True)]
    outside = [max(w, m) + m + LAUNCH for w, m in zip(work, moved, strict=True)]
    return Price((inside[0], inside[1]), (outside[0], outside[1]))


def _behind(v: Value) -> list[Node]:
    """What a kernel of rows computes for a value, up to products and inputs."""
    found: dict[Node, None] = {}
    stack = [v]
    while stack:
        node = stack.pop().producer
        for x in node.operands if node is not None else ():
            p = x.producer
            if p is None or p in found or is_long(p):  # the angles' cosines are a table
                continue
            if p.op.has(Trait.POINTWISE, Trait.VIEW) or _joins_columns(p) or p.op.name == "rms_norm":
                found[p] = None
                stack.append(x)
    return list(found)


class _Way:
    """The views through which rows of x become rows of what is made of it: one way, or a row's norm would not be the row's."""

    def __init__(self, x: Value) -> None:
        self._ways: dict[Value, tuple[Node, ...] | None] = {x: ()}
        self._reason: str | None = None

    def reject(self, v: Value) -> str | None:
        """Why v is not made of x row by row."""
        self._to(v)
        return self._reason

    def _to(self, v: Value) -> tuple[Node, ...] | None:
        if v in self._ways:
            return self._ways[v]
        self._ways[v], node = None, v.producer
        if node is None:
            return None
        found = list(dict.fromkeys(way for x in node.operands if (way := self._to(x)) is not None))
        if not found:
            return None
        if len(found) > 1:
            self._reason = "what is normalized is read by other rows, too"
        self._ways[v] = way = found[0] if not node.op.has(Trait.VIEW) or self._takes_columns(node) else (*found[0], node)
        return way

    def _takes_columns(self, node: Node) -> bool:
        """Whether a view is a part of each row; else it must keep rows whole."""
        last, x = node.results[0].type.rank - 1, node.operands[0]
        if node.op.name == "slice" and node.attrs["axis"] % (last + 1) == last:
            return True
        whole = node.results[0].shape[-1:] == x.shape[-1:] and (node.op.name != "transpose" or node.attrs["perm"][-1] == last)
        if node.op.name not in ("transpose", "reshape") or not whole:
            self._reason = f"what is normalized is read through {node.op.name}"
        return False

"""Index bounds: which index tensors must be checked before a kernel may read by them.

Eager raises IndexError for an index out of range; a generated kernel would read other memory. An index is checked
before the launch unless it is proven to be in range.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir import dims
from graphopt.ir.dims import Dim, Symbols
from graphopt.ir.graph import Graph, Node, Value
from graphopt.rewrite.pattern import scalar_of

_MOVES = ("reshape", "transpose", "broadcast_to", "slice", "flip")


@dataclass(frozen=True)
class IndexCheck:
    """Body input ``operand``, seen through ``views``, must lie in ``low .. high - 1``; ``error`` is what eager raises otherwise."""

    operand: int
    low: Dim
    high: Dim
    error: type[Exception]
    views: tuple[Node, ...] = ()  # in order; only where a slice leaves elements out, which need not be in range


def index_checks(body: Graph) -> list[IndexCheck] | None:
    """The checks that a region needs, or None if an index can be neither proven nor checked beforehand."""
    checks: dict[IndexCheck, None] = {}
    for node in body.nodes():
        if node.op.name not in ("take", "gather") or node.attrs.get("clip"):
            continue
        x, index = node.operands
        size = x.shape[node.attrs["axis"]]
        if _in_range(index, size, body.symbols):
            continue
        found = _source(index, size)
        if found is None:
            return None
        source, low, views = found
        checks[IndexCheck(source.index, low, size, IndexError if node.op.name == "take" else RuntimeError, views)] = None
    return list(checks)


def _source(index: Value, size: Dim) -> tuple[Value, Dim, tuple[Node, ...]] | None:
    """The body input that an index is read from, its least allowed value (``-size`` if negatives are wrapped), and the views
    through which it is read if one of them is a slice."""
    low: Dim = 0
    views: list[Node] = []
    while index.producer is not None:
        node = index.producer
        if node.op.name == "where" and low == 0:
            wrapped = _unwrapped(node, size)
            if wrapped is None:
                return None
            index, low = wrapped, dims.sub(0, size)
        elif node.op.name in _MOVES:
            views.append(node)
            index = node.operands[0]
        elif node.op.name == "cast" and _keeps_indices(node):
            index = node.operands[0]
        else:
            return None
    if not any(n.op.name == "slice" for n in views):
        return index, low, ()
    if any(n.op.name == "flip" for n in views):
        return None
    return index, low, tuple(reversed(views))


def _keeps_indices(cast: Node) -> bool:
    """Whether a conversion keeps the value of every index that memory could be read by: one to i8 would wrap 200 to -56."""
    before, after = cast.operands[0].dtype, cast.result.dtype
    if not before.is_integer or not after.is_integer:
        return False
    return after.kind == "i" and after.bits >= min(32, before.bits + (before.kind == "u"))


def _unwrapped(where: Node, size: Dim) -> Value | None:
    """The index below ``where(index < 0, index + size, index)``."""
    condition, wrapped, index = where.operands
    less, add = condition.defined_by("lt"), wrapped.defined_by("add")
    if less is None or add is None or less.operands[0] is not index or scalar_of(less.operands[1]) != 0:
        return None
    others = [v for v in add.operands if v is not index]
    if index not in add.operands or len(others) != 1:
        return None
    constant = others[0].producer
    while constant is not None and constant.op.name in ("broadcast_to", "reshape"):
        constant = constant.operands[0].producer
    if constant is None or constant.op.name != "constant" or not dims.same(dims.simplify(constant.attrs["value"]), size):
        return None
    return index


def _in_range(index: Value, size: Dim, symbols: Symbols) -> bool:
    """Whether an index is proven to lie in ``0 .. size - 1``."""
    return _within(_interval(index, symbols), 0, dims.sub(size, 1), symbols)


def _within(span: tuple[Dim, Dim] | None, low: Dim, high: Dim, symbols: Symbols) -> bool:
    return span is not None and dims.prove(low, "<=", span[0], symbols) is True and dims.prove(span[1], "<=", high, symbols) is True


def _interval(v: Value, symbols: Symbols) -> tuple[Dim, Dim] | None:
    """Inclusive bounds of an integer value, where they follow from the graph and the dtype does not wrap around."""
    span = _unwrapped_interval(v, symbols)
    if span is None or v.dtype.is_bool or v.dtype.bits >= 64:
        return span
    low = 0 if v.dtype.kind == "u" else -(1 << (v.dtype.bits - 1))
    return span if _within(span, low, low + (1 << v.dtype.bits) - 1, symbols) else None


def _unwrapped_interval(v: Value, symbols: Symbols) -> tuple[Dim, Dim] | None:
    node = v.producer
    if node is None or v.dtype.is_float:
        return None
    number = scalar_of(v)
    if isinstance(number, int):
        return number, number
    operands = node.operands
    if node.op.name in _MOVES or node.op.name == "cast":
        return _interval(operands[0], symbols)
    if node.op.name == "iota":
        start, step, size = (node.attrs[k] for k in ("start", "step", "size"))
        if dims.prove(0, "<=", step, symbols) is not True:
            return None
        return start, dims.add(start, dims.mul(step, dims.sub(size, 1)))
    spans = [_interval(o, symbols) for o in operands]
    if node.op.name in ("maximum", "minimum"):
        bounds = [s for s in spans if s is not None and isinstance(s[0], int) and isinstance(s[1], int)]
        if len(bounds) == 2:
            pick = max if node.op.name == "maximum" else min
            return pick(bounds[0][0], bounds[1][0]), pick(bounds[0][1], bounds[1][1])
        return None
    if any(s is None for s in spans):
        return None
    known = [s for s in spans if s is not None]
    if node.op.name == "add":
        return dims.add(known[0][0], known[1][0]), dims.add(known[0][1], known[1][1])
    if node.op.name == "sub":
        return dims.sub(known[0][0], known[1][1]), dims.sub(known[0][1], known[1][0])
    return None

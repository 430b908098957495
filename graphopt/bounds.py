"""Index bounds: which index tensors must be checked before a kernel may read by them.

Eager raises IndexError for an index out of range; a generated kernel would read other memory. An index is checked
before the launch unless it is proven to be in range; on a GPU beside it (:mod:`graphopt.index_flags`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from graphopt.ir import dims
from graphopt.ir.dims import Dim, Symbols
from graphopt.ir.graph import Graph, Node, Value
from graphopt.rewrite.pattern import scalar_of

_MOVES = ("reshape", "transpose", "broadcast_to", "slice", "flip")


@dataclass(frozen=True)
class IndexCheck:
    """Body input ``operand``, seen through ``views``, must lie in ``low .. high - 1``; ``error`` is what eager raises otherwise.

    ``node`` is the first operation that reads or writes by it.
    """

    operand: int
    low: Dim
    high: Dim
    error: type[Exception]
    views: tuple[Node, ...] = ()  # in order; only where a slice leaves elements out, which need not be in range
    node: Node | None = field(default=None, compare=False)


class IndexOutOfRange(IndexError, RuntimeError):
    """For updates that add: ``index_put`` raises IndexError there, ``index_add`` RuntimeError, and both are one op here."""


INDEXED = ("take", "gather", "put", "scatter")


def index_checks(body: Graph) -> list[IndexCheck] | None:
    """The checks that a region needs, or None if an index can be neither proven nor checked beforehand."""
    checks: dict[IndexCheck, None] = {}
    for node in body.nodes():
        if node.op.name not in INDEXED or node.attrs.get("clip"):
            continue
        x, index = node.operands[:2]
        found = _checks(index, x.shape[node.attrs["axis"]], body.symbols, _error(node))
        if found is None:
            return None
        for check in found:
            checks.setdefault(replace(check, node=node))
    return list(checks)


def can_be_checked(index: Value, size: Dim, symbols: Symbols) -> bool:
    """Whether an index is proven to be in range, or is read from tensors that can be checked before a launch."""
    return _checks(index, size, symbols, IndexError) is not None


def _error(node: Node) -> type[Exception]:
    if node.op.name == "put" and node.attrs["update"] == "add":
        return IndexOutOfRange
    return IndexError if node.op.name in ("take", "put") else RuntimeError


def _checks(index: Value, size: Dim, symbols: Symbols, error: type[Exception]) -> list[IndexCheck] | None:
    if _in_range(index, size, symbols):
        return []
    if (parts := digits(index, size)) is not None:
        found = [_checks(v, n, symbols, error) for v, n in parts]
        return None if any(f is None for f in found) else [c for f in found if f is not None for c in f]
    source = _source(index, size)
    if source is None:
        return None
    tensor, low, views = source
    return [IndexCheck(tensor.index, low, size, error, views)]


def digits(index: Value, size: Dim) -> tuple[tuple[Value, Dim], tuple[Value, Dim]] | None:
    """The parts of a * n + b, an index that counts over two axes, the inner one of size n: each with its own bound."""
    add = _below_views(index).defined_by("add")
    for k in (0, 1) if add is not None else ():
        assert add is not None
        times = _below_views(add.operands[k]).defined_by("mul")
        for j in (1, 0) if times is not None else ():
            assert times is not None
            inner = size_of(times.operands[j])
            if inner is None or inner == 0:
                continue
            outer = dims.floordiv(size, inner)
            if dims.same(dims.mul(outer, inner), size):
                return (times.operands[1 - j], outer), (add.operands[1 - k], inner)
    return None


def _below_views(v: Value) -> Value:
    """What all elements of a value are read from; only where no view leaves an element out."""
    while (node := v.defined_by("reshape", "transpose", "broadcast_to", "flip")) is not None:
        v = node.operands[0]
    return v


def size_of(v: Value) -> Dim | None:
    """The number or size that a value is everywhere."""
    node = _below_views(v).defined_by("constant")
    if node is None or isinstance(node.attrs["value"], bool | float | complex):
        return None
    return dims.simplify(node.attrs["value"])


def _source(index: Value, size: Dim) -> tuple[Value, Dim, tuple[Node, ...]] | None:
    """The body input that an index is read from, its least allowed value (``-size`` if negatives are wrapped), and the views
    through which it is read if one of them is a slice."""
    low: Dim = 0
    views: list[Node] = []
    while index.producer is not None:
        node = index.producer
        if node.op.name == "where" and low == 0:
            inner = _unwrapped(node, size)
            if inner is None:
                return None
            index, low = inner, dims.sub(0, size)
        elif node.op.name == "wrap_index" and low == 0 and dims.same(node.attrs["size"], size):
            index, low = node.operands[0], dims.sub(0, size)
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
    added = size_of(others[0])
    return index if added is not None and dims.same(added, size) else None


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
    if (size := size_of(v)) is not None:
        return size, size
    operands = node.operands
    if node.op.name in _MOVES or node.op.name == "cast":
        return _interval(operands[0], symbols)
    if node.op.name == "iota":
        start, step, size = (node.attrs[k] for k in ("start", "step", "size"))
        if dims.prove(0, "<=", step, symbols) is not True:
            return None
        return start, dims.add(start, dims.mul(step, dims.sub(size, 1)))
    if node.op.name == "remainder":
        divisor = size_of(operands[1])
        positive = divisor is not None and dims.prove(divisor, ">", 0, symbols) is True
        return (0, dims.sub(divisor, 1)) if divisor is not None and positive else None
    if node.op.name == "argmax" or node.op.name == "argmin":
        return 0, dims.sub(operands[0].shape[node.attrs["axis"]], 1)
    spans = [_interval(o, symbols) for o in operands]
    if node.op.name in ("maximum", "minimum"):
        return _clamped(node.op.name == "maximum", [s or _all_of(v) for s, v in zip(spans, operands, strict=True)], symbols)
    if any(s is None for s in spans):
        return None
    known = [s for s in spans if s is not None]
    if node.op.name == "add":
        return dims.add(known[0][0], known[1][0]), dims.add(known[0][1], known[1][1])
    if node.op.name == "sub":
        return dims.sub(known[0][0], known[1][1]), dims.sub(known[0][1], known[1][0])
    if node.op.name == "mul" and all(dims.prove(0, "<=", low, symbols) is True for low, _ in known):
        return dims.mul(known[0][0], known[1][0]), dims.mul(known[0][1], known[1][1])
    return None


def _all_of(v: Value) -> tuple[Dim, Dim]:
    """What the dtype holds."""
    bits = 1 if v.dtype.is_bool else v.dtype.bits
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if v.dtype.kind == "i" else (0, (1 << bits) - 1)


def _clamped(larger: bool, spans: list[tuple[Dim, Dim]], symbols: Symbols) -> tuple[Dim, Dim] | None:
    """Bounds of a maximum or minimum, where it is known which of the operands' bounds counts."""

    def pick(a: Dim, b: Dim) -> Dim | None:
        if dims.prove(a, "<=", b, symbols) is True:
            return b if larger else a
        return (a if larger else b) if dims.prove(b, "<=", a, symbols) is True else None

    low, high = (pick(spans[0][k], spans[1][k]) for k in (0, 1))
    return None if low is None or high is None else (low, high)

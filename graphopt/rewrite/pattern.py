"""Patterns as data: what a rule looks for.

    x, p, q = value("x"), attr("p"), attr("q")
    pattern = pat.transpose(pat.transpose(x, perm=p), perm=q)

A number in a pattern stands for a scalar constant of that value. Commutative ops match in either operand order.
:func:`through` looks through casts or views. A failed match reports how far it came, so that the nearest miss of a rule
can be told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt.ir.graph import Node, Value
from graphopt.ir.ops import Trait, op
from graphopt.ir.types import DType


@dataclass(frozen=True)
class ValuePattern:
    """Any value, bound to a name; used twice, both must be the same value."""

    name: str
    where: Callable[[Value], bool] | None = None


@dataclass(frozen=True)
class ConstPattern:
    """A scalar constant (also one that is broadcast), its number bound to a name; or one given number."""

    name: str = ""
    number: float | None = None


@dataclass(frozen=True)
class AttrPattern:
    """Any attribute value, bound to a name; used twice, both must be equal."""

    name: str


@dataclass(frozen=True)
class OpPattern:
    """A node of one of some ops, with operand and attribute patterns.

    Attributes:
        one_use: the result has no use but the one that the match came by.
        name: when not empty, the node's result is bound to it.
    """

    ops: tuple[str, ...]
    operands: tuple[Pattern, ...] | None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    one_use: bool = False
    name: str = ""

    def named(self, name: str) -> OpPattern:
        return OpPattern(self.ops, self.operands, self.attrs, self.one_use, name)

    def once(self) -> OpPattern:
        """The same pattern, its result used nowhere else."""
        return OpPattern(self.ops, self.operands, self.attrs, True, self.name)


@dataclass(frozen=True)
class ThroughPattern:
    """A pattern, below any number of nodes of the given ops."""

    inner: Pattern
    ops: tuple[str, ...]


@dataclass(frozen=True)
class AnyOf:
    """The first of several patterns that matches."""

    choices: tuple[Pattern, ...]


Pattern = ValuePattern | ConstPattern | OpPattern | ThroughPattern | AnyOf

VIEWS = ("reshape", "transpose", "broadcast_to")
CASTS = ("cast",)


def value(name: str, where: Callable[[Value], bool] | None = None) -> ValuePattern:
    return ValuePattern(name, where)


def const(name: str = "", number: float | None = None) -> ConstPattern:
    return ConstPattern(name, number)


def attr(name: str) -> AttrPattern:
    return AttrPattern(name)


def through(inner: Pattern, *, casts: bool = False, views: bool = False) -> ThroughPattern:
    """Match ``inner`` also below casts and pure views."""
    return ThroughPattern(inner, (CASTS if casts else ()) + (VIEWS if views else ()))


def any_of(*choices: Any) -> AnyOf:
    return AnyOf(tuple(map(_pattern, choices)))


def op_in(ops: tuple[str, ...], *operands: Any, **attrs: Any) -> OpPattern:
    """A node of any of these ops; without operands given, whatever its operands are. Raises UsageError for an op that there is not."""
    for name in ops:
        op(name)
    return OpPattern(ops, tuple(map(_pattern, operands)) or None, attrs)


class _Ops:
    """``pat.add(x, y)``: an OpPattern by attribute access. Raises UsageError for an op that there is not."""

    def __getattr__(self, name: str) -> Callable[..., OpPattern]:
        if name.startswith("__"):  # Python's own, of whoever looks at the object
            raise AttributeError(name)
        op(name)
        return lambda *operands, **attrs: OpPattern((name,), tuple(map(_pattern, operands)), attrs)


pat = _Ops()


def _pattern(p: Any) -> Pattern:
    return ConstPattern(number=p) if isinstance(p, int | float) else p


# --- matching ----------------------------------------------------------------------------------------------------------


@dataclass
class Match:
    """A found pattern: what the names are bound to, and the nodes it covers, root first."""

    root: Node
    bindings: dict[str, Any]
    nodes: list[Node]

    def __getitem__(self, key: str | ValuePattern | ConstPattern | AttrPattern | OpPattern) -> Any:
        return self.bindings[key if isinstance(key, str) else key.name]

    def get(self, key: str, default: Any = None) -> Any:
        return self.bindings.get(key, default)


@dataclass
class Miss:
    """How far the best failed attempt came: nodes matched, the node that did not fit, and why."""

    depth: int
    node: Node | None
    reason: str


class Matcher:
    """One attempt to match a pattern at a node; keeps the best miss."""

    def __init__(self) -> None:
        self.miss = Miss(0, None, "")

    def match(self, pattern: OpPattern, root: Node) -> Match | None:
        """The first match at the node, or None (then ``miss`` tells the nearest)."""
        return next(self.matches(pattern, root), None)

    def matches(self, pattern: OpPattern, root: Node) -> Iterator[Match]:
        """Every way in which the pattern matches at the node; commutative ops give several."""
        if root.op.name in pattern.ops:
            for bindings, nodes in self._node(pattern, root, {}, []):
                yield Match(root, bindings, nodes)

    def _fail(self, depth: int, node: Node | None, reason: str) -> None:
        if depth > self.miss.depth:
            self.miss = Miss(depth, node, reason)

    def _value(self, p: Pattern, v: Value, bound: dict[str, Any], nodes: list[Node]) -> Iterator[tuple[dict[str, Any], list[Node]]]:
        match p:
            case ValuePattern():
                if p.name in bound and bound[p.name] is not v:
                    return self._fail(len(nodes), v.producer, f"two different values stand for {p.name}")
                if p.where is not None and not p.where(v):
                    return self._fail(len(nodes), v.producer, f"{v!r} is not fit for {p.name}")
                yield {**bound, p.name: v}, nodes
            case ConstPattern():
                number = scalar_of(v)
                if number is None:
                    return self._fail(len(nodes), v.producer, f"{v!r} is no scalar constant")
                if p.number is not None and not same_number(number, p.number, v.dtype):
                    return self._fail(len(nodes), v.producer, f"the constant is {number}, not {p.number}")
                if p.name and p.name in bound and not same_number(number, bound[p.name], v.dtype):
                    return self._fail(len(nodes), v.producer, f"two different constants stand for {p.name}")
                yield ({**bound, p.name: number} if p.name else bound), nodes
            case OpPattern():
                node = v.producer
                if node is None or node.op.name not in p.ops:
                    seen = node.op.name if node is not None else "an input"
                    return self._fail(len(nodes), node, f"expected {' or '.join(p.ops)}, found {seen}")
                if p.operands is not None and len(p.operands) != len(node.operands):
                    return self._fail(len(nodes), node, f"{node.op.name} has {len(node.operands)} operands, not {len(p.operands)}")
                if p.one_use and not v.has_one_use:
                    return self._fail(len(nodes) + 1, node, f"the result of {node.op.name} has other uses")
                yield from self._node(p, node, bound, nodes)
            case ThroughPattern():
                skipped = list(nodes)
                while True:
                    found_any = False
                    for found in self._value(p.inner, v, bound, skipped):
                        found_any = True
                        yield found
                    if found_any or v.producer is None or v.producer.op.name not in p.ops:
                        return
                    skipped = [*skipped, v.producer]
                    v = v.producer.operands[0]
            case AnyOf():
                for choice in p.choices:
                    yield from self._value(choice, v, bound, nodes)

    def _node(self, p: OpPattern, node: Node, bound: dict[str, Any], nodes: list[Node]) -> Iterator[tuple[dict[str, Any], list[Node]]]:
        nodes = [*nodes, node]
        for key, wanted in p.attrs.items():
            actual = node.attrs.get(key)
            if isinstance(wanted, AttrPattern):
                if wanted.name in bound and bound[wanted.name] != actual:
                    return self._fail(len(nodes), node, f"{key} is {actual}, elsewhere {bound[wanted.name]}")
                bound = {**bound, wanted.name: actual}
            elif actual != wanted:
                return self._fail(len(nodes), node, f"{key} is {actual}, not {wanted}")
        if p.name:
            bound = {**bound, p.name: node.results[0]}
        if p.operands is None:
            yield bound, nodes
            return
        if len(p.operands) != len(node.operands):
            return self._fail(len(nodes), node, f"{node.op.name} has {len(node.operands)} operands, not {len(p.operands)}")
        orders = [node.operands]
        if node.op.has(Trait.COMMUTATIVE) and node.operands[0] is not node.operands[1]:
            orders.append((node.operands[1], node.operands[0], *node.operands[2:]))
        for order in orders:
            yield from self._all(p.operands, order, bound, nodes)

    def _all(self, patterns: tuple[Pattern, ...], values: tuple[Value, ...], bound: dict[str, Any],
             nodes: list[Node]) -> Iterator[tuple[dict[str, Any], list[Node]]]:  # fmt: skip
        if not patterns:
            yield bound, nodes
            return
        for b, covered in self._value(patterns[0], values[0], bound, nodes):
            yield from self._all(patterns[1:], values[1:], b, covered)


def scalar_of(v: Value) -> float | complex | None:
    """The number of a scalar constant, looking through broadcast, reshape and cast; None if it is none."""
    node = v.producer
    if node is None:
        return None
    if node.op.name in ("broadcast_to", "reshape"):
        return scalar_of(node.operands[0])
    if node.op.name == "cast" and v.dtype.is_float:
        inner = scalar_of(node.operands[0])
        return torch.tensor(float(inner), dtype=v.dtype.torch).item() if isinstance(inner, int | float) else None
    if node.op.name != "constant" or not isinstance(node.attrs["value"], int | float | complex):
        return None
    return node.attrs["value"]  # type: ignore[no-any-return]


_EPS = {"f64": 1e-15, "f32": 2e-7, "f16": 1e-3, "bf16": 8e-3}


def same_number(a: float | complex, b: float | complex, dtype: DType) -> bool:
    """Whether two numbers are the same constant in a dtype, up to its rounding."""
    if isinstance(a, complex) or isinstance(b, complex):
        return a == b
    return math.isclose(a, b, rel_tol=_EPS.get(dtype.name, 0.0)) or (math.isnan(a) and math.isnan(b))

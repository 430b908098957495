"""How to read a formula whatever way it is written: products in any order and association, means, squares, roots.

These helpers only look; none changes the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy

from graphopt.ir import DType, Node, Value, dims
from graphopt.ir.opset.reduce import reduced_shape
from graphopt.rewrite import Reject, Rewriter, scalar_of

_CLOSE = {"f64": 1e-12, "f32": 1e-6, "f16": 1e-3, "bf16": 8e-3}
_DEEPEST = 8  # levels of brackets that a product is followed through
_MOST = 8  # factors, after which a product is not taken further apart


def close(a: float | complex | None, b: float, dtype: DType) -> bool:
    """Whether a constant is the wanted one, up to the way it was written down."""
    return isinstance(a, int | float) and math.isclose(a, b, rel_tol=_CLOSE.get(dtype.name, 0.0))


def number(v: Value) -> float | None:
    """The real number of a scalar constant, or None."""
    found = scalar_of(v)
    return float(found) if isinstance(found, int | float) else None


@dataclass
class Product:
    """``coefficient * prod(factors) / prod(divisors)``."""

    coefficient: float = 1.0
    factors: list[Value] = field(default_factory=list)
    divisors: list[Value] = field(default_factory=list)


def product(v: Value, inner: bool = False, into: Product | None = None, depth: int = 0) -> Product:
    """Read a value as a product, through mul, div, neg and small powers; an inner node with other uses is one factor."""
    out = into if into is not None else Product()
    c, node = number(v), v.producer
    if c is not None:
        out.coefficient *= c
    elif node is None or depth > _DEEPEST or len(out.factors) > _MOST or (inner and len(v.users) > 1):
        out.factors.append(v)
    elif node.name == "mul":
        product(node.operands[0], True, out, depth + 1)
        product(node.operands[1], True, out, depth + 1)
    elif node.name == "neg":
        out.coefficient = -out.coefficient
        product(node.operands[0], True, out, depth + 1)
    elif node.name == "pow" and number(node.operands[1]) in (2.0, 3.0):
        out.factors += [node.operands[0]] * int(number(node.operands[1]) or 0)
    elif node.name == "div":
        divisor = number(node.operands[1])
        if divisor:
            out.coefficient /= divisor
        else:
            out.divisors.append(node.operands[1])
        product(node.operands[0], True, out, depth + 1)
    else:
        out.factors.append(v)
    return out


def powers_of(v: Value, x: Value, depth: int = 0) -> tuple[float, int] | None:
    """(c, n) if the value is c * x^n for n up to 3, looking also into products that are used elsewhere; else None."""
    read = product(v)
    if read.divisors or depth > 2 or len(read.factors) > 3:
        return None
    c, n = read.coefficient, 0
    for f in read.factors:
        if f is x:
            n += 1
        elif f is not v and (deeper := powers_of(f, x, depth + 1)) is not None:
            c, n = c * deeper[0], n + deeper[1]
        else:
            return None
    return c, n


def plus_constant(v: Value) -> tuple[Value, float] | None:
    """(u, c) if the value is u + c, or u - (-c)."""
    node = v.defined_by("add", "sub")
    if node is None:
        return None
    a, b = node.operands
    c = number(b)
    if c is not None:
        return a, c if node.name == "add" else -c
    c = number(a)
    return (b, c) if c is not None and node.name == "add" else None


def square_of(v: Value) -> Value | None:
    """x if the value is x * x or pow(x, 2)."""
    node = v.defined_by("mul", "pow")
    if node is None:
        return None
    a, b = node.operands
    if node.name == "mul":
        return a if a is b else None
    return a if number(b) == 2 else None


def root_of(v: Value) -> Value | None:
    """u if the value is sqrt(u)."""
    node = v.defined_by("sqrt", "pow")
    return node.operands[0] if node is not None and (node.name == "sqrt" or number(node.operands[1]) == 0.5) else None


def inverse_root_of(v: Value) -> Value | None:
    """u if the value is 1 / sqrt(u)."""
    node = v.defined_by("rsqrt", "reciprocal", "pow", "div")
    if node is None:
        return None
    if node.name == "rsqrt" or (node.name == "pow" and number(node.operands[1]) == -0.5):
        return node.operands[0]
    if node.name == "reciprocal":
        return root_of(node.operands[0])
    return root_of(node.operands[1]) if node.name == "div" and number(node.operands[0]) == 1 else None


# --- reductions --------------------------------------------------------------------------------------------------------


def reduction(v: Value, *ops: str) -> Node | None:
    """The reduction that makes a value, if the value lines up with what was reduced as with ``keepdims``."""
    expanded = v.defined_by("broadcast_to")
    u = expanded.operands[0] if expanded is not None else v
    kept = u
    while (view := kept.defined_by("reshape")) is not None:
        kept = view.operands[0]
    node = kept.defined_by(*ops)
    if node is None or not node.operands[0].shape:
        return None
    x, axes, symbols = node.operands[0], axes_of(node), node.graph.symbols
    aligned = dims.same_shape(u.shape, reduced_shape(x.shape, axes, True), symbols)
    leading = axes == tuple(range(len(axes))) and dims.same_shape(u.shape, reduced_shape(x.shape, axes, False), symbols)
    fits = (aligned or leading) and (expanded is None or dims.same_shape(v.shape, x.shape, symbols))
    return node if fits else None


def axes_of(node: Node) -> tuple[int, ...]:
    """The axes of a reduction, nonnegative and sorted."""
    return tuple(sorted(a % node.operands[0].type.rank for a in node.attrs["axes"]))


def mean_of(v: Value) -> tuple[Value, tuple[int, ...]] | None:
    """(x, axes) if the value is the mean of x: mean(x), sum(x) / n or sum(x) * (1 / n)."""
    node = reduction(v, "mean")
    if node is not None:
        return node.operands[0], axes_of(node)
    scaled = v.defined_by("mul", "div")
    if scaled is None:
        return None
    for total, count in (scaled.operands, scaled.operands[::-1]):
        node = reduction(total, "sum")
        if node is None or (scaled.name == "div" and total is not scaled.operands[0]):
            continue
        n = dims.numel([node.operands[0].shape[a] for a in axes_of(node)])
        if _counts(count, n, inverse=scaled.name == "mul"):
            return node.operands[0], axes_of(node)
    return None


def _counts(v: Value, n: dims.Dim, inverse: bool) -> bool:
    """Whether a scalar is the count n, or its inverse."""
    c = number(v)
    if isinstance(n, int):
        return n > 0 and close(c, 1 / n if inverse else n, v.dtype)
    node = v.producer
    while node is not None and node.name in ("cast", "broadcast_to", "reshape"):
        node = node.operands[0].producer
    if inverse or node is None or node.name != "constant" or not isinstance(node.attrs["value"], sympy.Expr):
        return False
    return dims.same(node.attrs["value"], n, node.graph.symbols)


def trailing(axes: Sequence[int], rank: int) -> int | None:
    """How many trailing axes these are, or None if they are not trailing."""
    return len(axes) if axes and tuple(axes) == tuple(range(rank - len(axes), rank)) else None


# --- scale and shift ---------------------------------------------------------------------------------------------------


def check_row(v: Value, norm: Value, axes: int) -> Reject | None:
    """Whether a value can be the scale or shift of a normalization over so many trailing axes."""
    wanted = norm.shape[-axes:]
    extra = v.type.rank - axes
    node = norm.producer
    symbols = node.graph.symbols if node is not None else None
    if extra >= 0 and all(n == 1 for n in v.shape[:extra]) and dims.same_shape(v.shape[extra:], wanted, symbols):
        return None
    return Reject(f"{v.type} is no vector over the normalized axes", v)


def as_row(rw: Rewriter, v: Value, axes: int) -> Value:
    """The value without leading axes of size 1."""
    return rw.reshape(v, shape=v.shape[v.type.rank - axes :])

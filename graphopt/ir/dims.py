"""Symbolic dimensions: a size is an ``int`` or a sympy expression over named, ranged, nonnegative symbols.

Static sizes stay plain ints, so that models without dynamic shapes never pay for sympy. Questions about sizes are
answered by :func:`prove` with three values: ``True``, ``False``, or ``None`` for "not known"; a rewrite that needs an
answer declines on ``None``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import sympy

from graphopt.errors import GraphoptError

Dim: TypeAlias = int | sympy.Expr
Shape: TypeAlias = tuple[Dim, ...]


@dataclass(frozen=True)
class Range:
    """Inclusive bounds of a symbol; ``hi`` of ``None`` means unbounded."""

    lo: int = 0
    hi: int | None = None

    def __contains__(self, value: int) -> bool:
        return self.lo <= value and (self.hi is None or value <= self.hi)


Symbols = Mapping[str, Range]


class FloorDiv(sympy.Function):  # type: ignore[misc]
    """``a // b`` on integers, kept as one node (sympy's own ``floor(a/b)`` prints and simplifies badly)."""

    nargs = (2,)
    is_integer = True

    @classmethod
    def eval(cls, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        if b == 1:
            return a
        if a.is_Integer and b.is_Integer and b != 0:
            return sympy.Integer(int(a) // int(b))
        if a == b and b.is_positive:
            return sympy.Integer(1)
        if isinstance(a, FloorDiv) and all(d.is_Integer and d > 0 for d in (b, a.args[1])):
            return FloorDiv(a.args[0], a.args[1] * b)
        if b.is_Integer and b > 0:
            # Multiples of b come out, so that (n - 4) // 2 + 1 and n // 2 - 1 are one size. Kernels divide toward zero: what is left
            # has to be nonnegative, or its negative turned: -n // b is -((n + b - 1) // b).
            number, rest = a.as_coeff_Add()
            whole = [t for t in sympy.Add.make_args(rest) if (t / b).is_integer]
            left = sympy.Add(*(t for t in sympy.Add.make_args(rest) if t not in whole), number % b)
            out = sympy.Add(number // b, *(t / b for t in whole))
            if left.is_Integer:
                return out
            if left.is_nonnegative:
                return out + FloorDiv(left, b) if out != 0 else None
            if (b - 1 - left).is_nonnegative:
                return out - FloorDiv(b - 1 - left, b)
        return None


def symbol(name: str) -> sympy.Symbol:
    """The symbol of that name. Equal names are equal symbols."""
    return _symbol(name)


@cache
def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


def simplify(value: Any) -> Dim:
    """An ``int`` when the value is one, else the sympy expression."""
    if isinstance(value, int):
        return int(value)
    expr = sympy.sympify(value)
    return int(expr) if expr.is_Integer else expr


def is_static(shape: Iterable[Dim]) -> bool:
    """Whether no size is symbolic."""
    return all(isinstance(d, int) for d in shape)


def floordiv(a: Dim, b: Dim) -> Dim:
    return a // b if isinstance(a, int) and isinstance(b, int) else simplify(FloorDiv(sympy.sympify(a), sympy.sympify(b)))


def add(a: Dim, b: Dim) -> Dim:
    return simplify(a + b)


def sub(a: Dim, b: Dim) -> Dim:
    return simplify(a - b)


def mul(a: Dim, b: Dim) -> Dim:
    return simplify(a * b)


def numel(shape: Iterable[Dim]) -> Dim:
    """Number of elements."""
    total: Dim = 1
    for d in shape:
        total = total * d
    return simplify(total)


def free_symbols(dims: Iterable[Dim]) -> list[str]:
    """Names of the symbols in these sizes, sorted."""
    return sorted({s.name for d in dims if not isinstance(d, int) for s in d.free_symbols})


def evaluate(dim: Dim, bindings: Mapping[str, int]) -> int:
    """The size under concrete bindings. Raises GraphoptError for an unbound symbol."""
    if isinstance(dim, int):
        return dim
    value = dim.subs({symbol(k): v for k, v in bindings.items()}).doit()
    if not value.is_Integer:
        missing = ", ".join(sorted(s.name for s in value.free_symbols)) or str(value)
        raise GraphoptError(f"size {format_dim(dim)} has no value: {missing} is not bound")
    return int(value)


def _bounds(expr: sympy.Expr, symbols: Symbols) -> tuple[Any, Any]:
    """Interval bounds of an expression (sympy numbers or infinities)."""
    if expr.is_Number:
        return expr, expr
    if expr.is_Symbol:
        r = symbols.get(expr.name, Range())
        return sympy.Integer(r.lo), sympy.oo if r.hi is None else sympy.Integer(r.hi)
    parts = [_bounds(a, symbols) for a in expr.args]
    if expr.is_Add:
        return sum((p[0] for p in parts), sympy.Integer(0)), sum((p[1] for p in parts), sympy.Integer(0))
    if expr.is_Mul:
        lo, hi = parts[0]
        for plo, phi in parts[1:]:
            corners = [_times(x, y) for x in (lo, hi) for y in (plo, phi)]
            lo, hi = min(corners), max(corners)
        return lo, hi
    if isinstance(expr, FloorDiv) and expr.args[1].is_Integer and expr.args[1] > 0:
        b = expr.args[1]
        return tuple(x if x.is_infinite else sympy.floor(x / b) for x in parts[0])  # type: ignore[return-value]
    if isinstance(expr, sympy.Mod) and expr.args[1].is_Integer:
        return sympy.Integer(0), expr.args[1] - 1
    if isinstance(expr, sympy.Pow) and expr.args[1].is_Integer and expr.args[1] > 0 and parts[0][0] >= 0:
        return parts[0][0] ** expr.args[1], parts[0][1] ** expr.args[1]
    if isinstance(expr, sympy.Max):
        return max(p[0] for p in parts), max(p[1] for p in parts)
    if isinstance(expr, sympy.Min):
        return min(p[0] for p in parts), min(p[1] for p in parts)
    return -sympy.oo, sympy.oo


def _times(x: Any, y: Any) -> Any:
    return sympy.Integer(0) if x == 0 or y == 0 else x * y  # 0 * oo is 0 for counts


def bounds(dim: Dim, symbols: Symbols) -> tuple[int | None, int | None]:
    """Inclusive bounds of a size, ``None`` where unbounded."""
    if isinstance(dim, int):
        return dim, dim
    lo, hi = _bounds(sympy.expand(dim), symbols)
    return (None if lo == -sympy.oo else int(lo)), (None if hi == sympy.oo else int(hi))


def prove(left: Dim, relation: str, right: Dim, symbols: Symbols | None = None) -> bool | None:
    """Three-valued truth of ``left relation right`` for every value the symbols may take.

    Args:
        relation: one of ``== != < <= > >=``.
        symbols: ranges; a symbol without one is only known to be nonnegative.

    Returns:
        True if it always holds, False if it never does, None if it depends or is not known.
    """
    if isinstance(left, int) and isinstance(right, int):
        return bool(_COMPARE[relation](left, right))
    if relation == "!=":
        same = prove(left, "==", right, symbols)
        return None if same is None else not same
    if relation in (">", ">="):
        return prove(right, "<" if relation == ">" else "<=", left, symbols)
    gap = sympy.expand(sympy.sympify(right) - sympy.sympify(left))
    lo, hi = _bounds(gap, symbols or {})
    if relation == "==":
        if gap == 0 or (lo == 0 and hi == 0):
            return True
        return False if lo > 0 or hi < 0 else None
    least = 1 if relation == "<" else 0
    if lo >= least:
        return True
    return False if hi < least else None


_COMPARE = {
    "==": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
}  # fmt: skip


def same(a: Dim, b: Dim, symbols: Symbols | None = None) -> bool:
    """Whether two sizes are proven equal."""
    return a == b or (not (isinstance(a, int) and isinstance(b, int)) and prove(a, "==", b, symbols) is True)


def same_shape(a: Sequence[Dim], b: Sequence[Dim], symbols: Symbols | None = None) -> bool:
    """Whether two shapes are proven equal, size by size."""
    return len(a) == len(b) and all(same(x, y, symbols) for x, y in zip(a, b, strict=True))


def contiguous_strides(shape: Sequence[Dim]) -> Shape:
    """Row-major strides, in elements. Sizes of 0 and 1 count as 1, as in PyTorch."""
    strides: list[Dim] = []
    step: Dim = 1
    for d in reversed(shape):
        strides.append(step)
        step = step * max(d, 1) if isinstance(d, int) and isinstance(step, int) else simplify(step * d)
    return tuple(reversed(strides))


# --- text ------------------------------------------------------------------------------------------------------------


def format_dim(dim: Dim) -> str:
    """Text of a size, in Python's integer syntax: ``2*B + 1``, ``B // 2``, ``max(A, B)``."""
    return str(dim) if isinstance(dim, int) else _format(dim, 0)


def _format(e: sympy.Expr, outer: int) -> str:
    """Print with the least brackets; ``outer`` is the binding strength of the surroundings (1 add, 2 mul, 3 pow)."""
    if e.is_Symbol or e.is_Integer:
        text = str(e)
        return f"({text})" if e.is_Integer and e < 0 and outer else text
    if e.is_Add:
        head, *rest = e.as_ordered_terms()
        text = _format(head, 1)
        for term in rest:
            coefficient, _ = term.as_coeff_Mul()
            negative = coefficient < 0
            text += (" - " if negative else " + ") + _format(-term if negative else term, 1)
        return f"({text})" if outer > 1 else text
    if e.is_Mul:
        numerator, denominator = e.as_numer_denom()
        if denominator != 1:  # a rational that is known to be whole, e.g. B*(B + 1)/2
            text = f"{_format(numerator, 2)} // {_format(denominator, 3)}"
            return f"({text})" if outer > 1 else text
        text = "*".join(_format(a, 2) for a in e.as_ordered_factors())
        return f"({text})" if outer > 2 else text
    if isinstance(e, FloorDiv | sympy.Mod):
        sign = "//" if isinstance(e, FloorDiv) else "%"
        text = f"{_format(e.args[0], 3)} {sign} {_format(e.args[1], 3)}"
        return f"({text})" if outer > 0 else text
    if e.is_Pow:
        text = f"{_format(e.args[0], 4)}**{_format(e.args[1], 4)}"
        return f"({text})" if outer > 3 else text
    if isinstance(e, sympy.Max | sympy.Min):
        name = "max" if isinstance(e, sympy.Max) else "min"
        return f"{name}({', '.join(_format(a, 0) for a in sorted(e.args, key=str))})"
    raise GraphoptError(f"a size of the form {e!r} has no text")


def parse_dim(text: str) -> Dim:
    """Inverse of :func:`format_dim`. Raises ValueError on anything that is no size expression."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no size expression") from error
    return simplify(_parse(tree, text))


def _parse(t: ast.expr, text: str) -> Any:
    match t:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return sympy.Integer(value)
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_parse(operand, text)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _parse(left, text), _parse(right, text)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.FloorDiv():
                    return FloorDiv(a, b)
                case ast.Mod():
                    return sympy.Mod(a, b)
                case ast.Pow():
                    return a**b
        case ast.Call(func=ast.Name(id="max" | "min" as name), args=args):
            return (sympy.Max if name == "max" else sympy.Min)(*[_parse(a, text) for a in args])
    raise ValueError(f"{text!r} is no size expression")

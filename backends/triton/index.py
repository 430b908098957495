"""Places: an index is a sum of variables times sizes, and of quotients and remainders where a reshape needs them.

What an index map does to a sum is computed here, not by the kernel: a split axis that is joined again is the axis it was, and an
address in row-major memory is one variable. All variables are nonnegative and below their extent; sizes may be symbolic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy

from graphopt.ir import dims
from graphopt.ir.dims import Dim

NO_AXES: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Var:
    """A variable of the kernel.

    Attributes:
        name: in the text; unique.
        extent: it is below this.
        axes: the axes of the tile along which it varies; none for a scalar.
        depth: loops within which it is defined.
        inside: names of the conditions under which a lane counts: that it lies below the extent; none where all lanes do.
    """

    name: str
    extent: Dim
    axes: frozenset[int] = NO_AXES
    depth: int = 0
    inside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quotient:
    """``of // by``, of what is nonnegative."""

    of: Sum
    by: Dim


@dataclass(frozen=True)
class Remainder:
    """``of % by``, of what is nonnegative."""

    of: Sum
    by: Dim


Atom = Var | Quotient | Remainder


@dataclass(frozen=True)
class Sum:
    """``start + atom * step + ...``; the terms in order of their coming."""

    terms: tuple[tuple[Atom, Dim], ...] = ()
    start: Dim = 0

    @property
    def is_constant(self) -> bool:
        return not self.terms


def constant(n: Dim) -> Sum:
    return Sum((), n)


def variable(v: Var) -> Sum:
    """A variable as an index; 0 if it can be nothing else."""
    return Sum() if v.extent == 1 else Sum(((v, 1),))


def variables(s: Sum) -> list[Var]:
    """The variables that an index depends on."""
    found: dict[Var, None] = {}
    for atom, _ in s.terms:
        found.update(dict.fromkeys([atom] if isinstance(atom, Var) else variables(atom.of)))
    return list(found)


def divided(s: Sum) -> list[Var]:
    """The variables that stand within a quotient or a remainder."""
    return [v for atom, _ in s.terms if not isinstance(atom, Var) for v in variables(atom.of)]


def add(a: Sum, b: Sum) -> Sum:
    terms = dict(a.terms)
    for atom, step in b.terms:
        terms[atom] = dims.add(terms[atom], step) if atom in terms else step
    return _joined(terms, dims.add(a.start, b.start))


def shift(s: Sum, by: Dim) -> Sum:
    return Sum(s.terms, dims.add(s.start, by))


def scale(s: Sum, by: Dim) -> Sum:
    if by == 0:
        return Sum()
    return Sum(tuple((atom, dims.mul(step, by)) for atom, step in s.terms), dims.mul(s.start, by))


def _joined(terms: dict[Atom, Dim], start: Dim) -> Sum:
    """``(x // d) * d * c + (x % d) * c  =>  x * c``."""
    for atom, step in list(terms.items()):
        if isinstance(atom, Remainder):
            whole = Quotient(atom.of, atom.by)
            if whole in terms and dims.same(terms[whole], dims.mul(step, atom.by)):
                rest = {a: n for a, n in terms.items() if a not in (atom, whole)}
                return add(Sum(tuple(rest.items()), start), scale(atom.of, step))
    return Sum(tuple((a, n) for a, n in terms.items() if n != 0), start)


def total(parts: Iterable[Sum]) -> Sum:
    out = Sum()
    for p in parts:
        out = add(out, p)
    return out


class Places:
    """Index arithmetic where symbols have ranges."""

    def __init__(self, symbols: dims.Symbols) -> None:
        self.symbols = symbols

    def is_below(self, s: Sum, n: Dim) -> bool:
        """Whether an index is proven to lie in ``0 .. n - 1``."""
        if len(s.terms) == 1 and isinstance(quotient := s.terms[0][0], Quotient) and s.terms[0][1] == 1 and s.start == 0:
            return self.is_below(quotient.of, dims.mul(n, quotient.by))
        span = self._span(s)
        return span is not None and self._holds(span[0], ">=", 0) and self._holds(span[1], "<", n)

    def is_nonnegative(self, s: Sum) -> bool:
        span = self._span(s)
        return span is not None and self._holds(span[0], ">=", 0)

    def quotient(self, s: Sum, by: Dim) -> Sum:
        """``s // by`` of a nonnegative index."""
        if by == 1:
            return s
        whole, rest = self._split(s, by)
        if self.is_below(rest, by):
            return whole
        if isinstance(s.start, int) and s.is_constant and isinstance(by, int):
            return constant(s.start // by)
        return add(whole, Sum(((Quotient(rest, by), 1),))) if self.is_nonnegative(rest) else Sum(((Quotient(s, by), 1),))

    def remainder(self, s: Sum, by: Dim) -> Sum:
        """``s % by`` of a nonnegative index."""
        if by == 1:
            return Sum()
        _, rest = self._split(s, by)
        if self.is_below(rest, by):
            return rest
        if isinstance(s.start, int) and s.is_constant and isinstance(by, int):
            return constant(s.start % by)
        return Sum(((Remainder(rest if self.is_nonnegative(rest) else s, by), 1),))

    def flatten(self, index: Sequence[Sum], shape: Sequence[Dim]) -> Sum:
        """The place of an element in row-major order."""
        return total(scale(i, step) for i, step in zip(index, dims.contiguous_strides(shape), strict=True))

    def unflatten(self, at: Sum, shape: Sequence[Dim]) -> list[Sum]:
        """The index of an element from its place in row-major order."""
        out: list[Sum] = []
        for n in reversed(shape[1:]):
            out.append(Sum() if n == 1 else self.remainder(at, n))
            at = self.quotient(at, n)
        return [*([at if shape[0] != 1 else Sum()] if shape else []), *reversed(out)]

    def _split(self, s: Sum, by: Dim) -> tuple[Sum, Sum]:
        """``s = whole * by + rest``, with what is seen to be a multiple in ``whole``."""
        whole: list[tuple[Atom, Dim]] = []
        rest: list[tuple[Atom, Dim]] = []
        for atom, step in s.terms:
            part = exact(step, by)
            if part is not None:
                whole.append((atom, part))
            else:
                rest.append((atom, step))
        start, left = exact(s.start, by), s.start
        if start is not None:
            left = 0
        elif isinstance(s.start, int) and isinstance(by, int):
            start, left = divmod(s.start, by)
        return Sum(tuple(whole), start or 0), Sum(tuple(rest), left)

    def _span(self, s: Sum) -> tuple[Dim, Dim] | None:
        """Least and greatest value; None where a sign is not known."""
        low = high = s.start
        for atom, step in s.terms:
            most = self._most(atom)
            if most is None:
                return None
            end = dims.mul(most, step)
            if self._holds(step, ">=", 0):
                high = dims.add(high, end)
            elif self._holds(step, "<", 0):
                low = dims.add(low, end)
            else:
                return None
        return low, high

    def _most(self, atom: Atom) -> Dim | None:
        if isinstance(atom, Var):
            return dims.sub(atom.extent, 1)
        if isinstance(atom, Remainder):
            return dims.sub(atom.by, 1)
        span = self._span(atom.of)
        return None if span is None else dims.floordiv(span[1], atom.by)

    def end(self, atom: Atom) -> Dim | None:
        """What a variable, quotient or remainder is below; None where that is not known."""
        most = self._most(atom)
        return None if most is None else dims.add(most, 1)

    def _holds(self, a: Dim, relation: str, b: Dim) -> bool:
        return dims.prove(a, relation, b, self.symbols) is True


def exact(a: Dim, by: Dim) -> Dim | None:
    """``a / by`` if that is a whole number, else None. A kernel's sizes are not 0."""
    if a == 0:
        return 0
    if isinstance(a, int) and isinstance(by, int):
        return a // by if a % by == 0 else None
    part = sympy.cancel(sympy.sympify(a) / sympy.sympify(by))
    return dims.simplify(part) if part.is_integer and part.as_numer_denom()[1] == 1 else None

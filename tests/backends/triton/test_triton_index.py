"""Index arithmetic: what a map does to a sum, against numbers."""

from __future__ import annotations

import itertools
import random

from graphopt.backends.triton.index import Atom, Places, Quotient, Remainder, Sum, Var, constant, scale, shift, variable
from graphopt.ir import dims

B = dims.symbol("B")
PLACES = Places({"B": dims.Range(1)})


def value(s: Sum, at: dict[Var, int], **sizes: int) -> int:
    def number(d: dims.Dim) -> int:
        return dims.evaluate(d, sizes)

    def atom(a: Atom) -> int:
        if isinstance(a, Var):
            return at[a]
        of, by = value(a.of, at, **sizes), number(a.by)
        return of // by if isinstance(a, Quotient) else of % by

    return number(s.start) + sum(atom(a) * number(step) for a, step in s.terms)


def test_a_split_axis_that_is_joined_again_is_the_axis() -> None:
    x = variable(Var("x", 24 * B))
    for shape in ((B, 4, 6), (4, B, 6), (4, 6, B), (1, 24, B), (2, 12 * B)):
        assert PLACES.flatten(PLACES.unflatten(x, shape), shape) == x


def test_joined_axes_that_are_split_again_are_the_axes() -> None:
    shape = (B, 6, 35)
    index = [variable(Var(f"i{k}", n)) for k, n in enumerate(shape)]
    assert PLACES.unflatten(PLACES.flatten(index, shape), shape) == index


def test_an_axis_of_one_is_zero() -> None:
    assert variable(Var("x", 1)) == Sum() == constant(0)
    assert PLACES.unflatten(variable(Var("x", 7)), (1, 7, 1)) == [Sum(), variable(Var("x", 7)), Sum()]


def test_a_quotient_of_what_may_be_negative_goes_down() -> None:
    """Division goes toward zero in a kernel; what is divided there is never negative: ``(4 x + y - 1) // 4 == x - 1 + (y + 3) // 4``."""
    x, y = Var("x", 5), Var("y", 3)
    s = PLACES.quotient(Sum(((x, 4), (y, 1)), -1), 4)
    assert s == Sum(((x, 1), (Quotient(Sum(((y, 1),), 3), 4), 1)), -1)


def test_random_maps_keep_their_values() -> None:
    r = random.Random(0)
    simplified = 0
    for _ in range(200):
        sizes = [r.choice((1, 2, 3, 4, 6, 8)) for _ in range(3)]
        axes = [Var(f"i{k}", n) for k, n in enumerate(sizes)]
        at = PLACES.flatten([variable(v) for v in axes], sizes)
        by, numel = r.choice((1, 2, 3, 4, 6, 12)), sizes[0] * sizes[1] * sizes[2]
        other = [numel // 12, 12] if numel % 12 == 0 else [1, numel]
        maps = [PLACES.quotient(at, by), PLACES.remainder(at, by), shift(scale(at, -1), numel - 1), *PLACES.unflatten(at, other)]
        simplified += not any(isinstance(a, Quotient | Remainder) for m in maps for a, _ in m.terms)
        for numbers in itertools.product(*(range(n) for n in sizes)):
            known = dict(zip(axes, numbers, strict=True))
            flat = value(at, known)
            wanted = [flat // by, flat % by, numel - 1 - flat, flat // other[1], flat % other[1]]
            assert [value(m, known) for m in maps] == wanted, (sizes, by, maps)
    assert simplified > 20

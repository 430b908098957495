"""Sizes: bounds and proofs against brute force, text and back."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import GraphoptError
from graphopt.ir import dims
from graphopt.ir.dims import Dim, Range

A, B = dims.symbol("A"), dims.symbol("B")
SYMBOLS = {"A": Range(1, 6), "B": Range(2, 5)}
POINTS = [{"A": a, "B": b} for a, b in itertools.product(range(1, 7), range(2, 6))]
COMPARE: dict[str, Callable[[int, int], bool]] = {
    "==": int.__eq__, "!=": int.__ne__, "<": int.__lt__, "<=": int.__le__, ">": int.__gt__, ">=": int.__ge__,
}  # fmt: skip


def expressions() -> st.SearchStrategy[Dim]:
    leaves = st.one_of(st.integers(0, 8), st.sampled_from([A, B]))

    def grow(inner: st.SearchStrategy[Dim]) -> st.SearchStrategy[Dim]:
        pairs = st.tuples(inner, inner)
        return st.one_of(
            pairs.map(lambda p: dims.add(*p)),
            pairs.map(lambda p: dims.mul(*p)),
            pairs.map(lambda p: dims.sub(*p)),
            st.tuples(inner, st.integers(1, 5)).map(lambda p: dims.floordiv(*p)),
            st.tuples(inner, st.integers(2, 5)).map(lambda p: dims.simplify(sympy.Mod(*p))),
            pairs.map(lambda p: dims.simplify(sympy.Max(*p))),
            pairs.map(lambda p: dims.simplify(sympy.Min(*p))),
        )

    return st.recursive(leaves, grow, max_leaves=4)


@settings(max_examples=150, deadline=None)
@given(expressions())
def test_text_round_trip(e: Dim) -> None:
    text = dims.format_dim(e)
    back = dims.parse_dim(text)
    for point in POINTS[::5]:
        assert dims.evaluate(back, point) == dims.evaluate(e, point), text
        assert eval(text, {"max": max, "min": min}, dict(point)) == dims.evaluate(e, point), text  # Python's own syntax and meaning


@settings(max_examples=150, deadline=None)
@given(expressions())
def test_bounds_hold(e: Dim) -> None:
    lo, hi = dims.bounds(e, SYMBOLS)
    for point in POINTS:
        value = dims.evaluate(e, point)
        assert lo is None or lo <= value
        assert hi is None or value <= hi


@settings(max_examples=150, deadline=None)
@given(expressions(), expressions(), st.sampled_from(list(COMPARE)))
def test_what_is_proven_is_true(left: Dim, right: Dim, relation: str) -> None:
    verdict = dims.prove(left, relation, right, SYMBOLS)
    truth = {COMPARE[relation](dims.evaluate(left, p), dims.evaluate(right, p)) for p in POINTS}
    if verdict is not None:
        assert truth == {verdict}, (left, relation, right)


@pytest.mark.parametrize(
    ("left", "relation", "right", "verdict"),
    [
        (2 * A, "==", A + A, True), (A, "<", A + 1, True), (A + 1, "==", A, False), (A, "==", B, None), (A, "<=", 6, True),
        (A, ">", 6, False), (A, "!=", 7, True), (A * B, "<=", 30, True), (A * B, ">=", 2, True), (dims.floordiv(2 * A, 2), "==", A, True),
        (dims.floordiv(A, 2), "<=", 3, True), (3, "<", 4, True), ((A + 1) * B, "==", A * B + B, True),
    ],
)  # fmt: skip
def test_what_should_be_provable_is(left: Dim, relation: str, right: Dim, verdict: bool | None) -> None:
    assert dims.prove(left, relation, right, SYMBOLS) is verdict


def test_floordiv_cancels_what_is_whole() -> None:
    assert dims.floordiv(4 * B, 2) == 2 * B
    assert dims.floordiv(7, 2) == 3
    assert dims.evaluate(dims.floordiv(B + 1, 2), {"B": 4}) == 2


def test_numbers_stay_ints() -> None:
    assert type(dims.add(A, dims.sub(3, A))) is int
    assert type(dims.numel((2, 3))) is int
    assert dims.numel(()) == 1


def test_an_unbound_symbol_is_named() -> None:
    with pytest.raises(GraphoptError, match=r"size A \+ B has no value: B is not bound"):
        dims.evaluate(A + B, {"A": 1})


@pytest.mark.parametrize("text", ["", "1.5", "a b", "f(x)", "'x'", "A @ B", "A if B else 1", "(1, 2)", "True"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size expression"):
        dims.parse_dim(text)


@settings(max_examples=150, deadline=None)
@given(expressions(), st.integers(-9, 9), st.integers(1, 5), st.booleans())
def test_multiples_come_out_of_a_division(e: Dim, c: int, b: int, times: bool) -> None:
    more = dims.mul(c, A) if times else c
    inside, outside = dims.floordiv(dims.add(e, dims.mul(more, b)), b), dims.add(dims.floordiv(e, b), more)
    for point in POINTS:
        value = (dims.evaluate(e, point) + dims.evaluate(more, point) * b) // b
        assert dims.evaluate(inside, point) == dims.evaluate(outside, point) == value


def test_sizes_of_strided_windows_are_one_size() -> None:
    assert dims.add(dims.floordiv(dims.sub(A, 4), 2), 1) == dims.sub(dims.floordiv(A, 2), 1)
    third = dims.floordiv(dims.add(B, 1), 3)
    assert dims.floordiv(dims.add(dims.mul(A, 6), dims.add(B, 7)), 3) == dims.add(dims.mul(A, 2), dims.add(third, 2))
    assert dims.floordiv(dims.add(dims.mul(A, 2), 1), 2) == A


@pytest.mark.parametrize("e", [dims.sub(21, A), dims.sub(0, A), dims.sub(dims.mul(A, 2), 5), dims.sub(4, dims.mul(3, dims.add(A, B)))])
@pytest.mark.parametrize("b", [2, 3, 5])
def test_what_is_left_of_a_division_is_nonnegative(e: Dim, b: int) -> None:
    """Kernels divide toward zero."""
    found = dims.floordiv(e, b)
    assert all(d.args[0].is_nonnegative for d in sympy.sympify(found).atoms(dims.FloorDiv))
    for point in POINTS:
        assert dims.evaluate(found, point) == dims.evaluate(e, point) // b

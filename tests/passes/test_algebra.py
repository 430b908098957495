"""algebra: identities that hold, and those that only seem to."""

from __future__ import annotations

import pytest
from writing import B, Expression, constant, written

from graphopt.ir import DType
from graphopt.passes.simplify import Algebra
from graphopt.testing import check_pass, check_rules_fire

CASES: dict[str, tuple[str, Expression, Expression]] = {
    "AddZero": ("f32[B, 4]", lambda b, x: b.add(x, -0.0), lambda b, x: x),
    "AddZero, integers": ("i32[B, 4]", lambda b, x: b.add(x, 0), lambda b, x: x),
    "AddZero, never -0.0": ("f32[B, 4]", lambda b, x: b.add(b.exp(x), 0.0), lambda b, x: b.exp(x)),
    "AddZero, broadcast": ("f32[4]", lambda b, x: b.add(x, b.full((B, 4), -0.0)), lambda b, x: b.broadcast_to(x, shape=(B, 4))),
    "TimesOne": ("f32[B, 4]", lambda b, x: b.mul(1.0, x), lambda b, x: x),
    "TimesOne, quotient": ("f32[B, 4]", lambda b, x: b.div(x, 1.0), lambda b, x: x),
    "TimesZero": ("i64[B, 4]", lambda b, x: b.mul(x, 0), lambda b, x: b.full((B, 4), 0, x.dtype)),
    "SelfDifference": ("i64[B, 4]", lambda b, x: b.sub(x, x), lambda b, x: b.full((B, 4), 0, x.dtype)),
    "SameTwice": ("f32[B, 4]", lambda b, x: b.maximum(x, x), lambda b, x: x),
    "LogicalConstant and": ("b1[B]", lambda b, x: b.logical_and(x, constant(b, True, "b1")), lambda b, x: x),
    "LogicalConstant or": ("b1[B]", lambda b, x: b.logical_or(x, constant(b, True, "b1")), lambda b, x: b.full((B,), True, x.dtype)),
    "LogicalConstant bits": ("i32[B]", lambda b, x: b.bitwise_xor(x, constant(b, 0, "i32")), lambda b, x: x),
    "AppliedTwice": ("f32[B]", lambda b, x: b.neg(b.neg(x)), lambda b, x: x),
    "AppliedTwice, idempotent": ("f32[B]", lambda b, x: b.relu(b.relu(x)), lambda b, x: b.relu(x)),
    "AppliedTwice, not": ("b1[B]", lambda b, x: b.logical_not(b.logical_not(x)), lambda b, x: x),
    "WhereSame": ("b1[B, 4] f32[4]", lambda b, c, x: b.where(c, x, x), lambda b, c, x: b.broadcast_to(x, shape=(B, 4))),
    "WhereSame, constant": ("f32[B] f32[B]", lambda b, x, y: b.where(constant(b, False, "b1"), x, y), lambda b, x, y: y),
    "WhereSame, truth": ("b1[B]", lambda b, c: b.where(c, constant(b, True, "b1"), constant(b, False, "b1")), lambda b, c: c),
    "MergeClamps": ("f32[B]", lambda b, x: b.maximum(b.maximum(x, 1.0), 2.0), lambda b, x: b.maximum(x, 2.0)),
    "CollectTerms": ("f32[B]", lambda b, x: b.add(b.add(x, 1.0), 2.0), lambda b, x: b.add(x, 3.0)),
    "CollectTerms, wrapping": ("i8[B]", lambda b, x: b.add(b.add(x, 100), 100), lambda b, x: b.add(x, -56)),
    "CollectFactors": ("f32[B]", lambda b, x: b.mul(b.mul(x, 3.0), 2.0), lambda b, x: b.mul(x, 6.0)),
    "CommonFactor": ("f32[B] f32[B] f32[B]", lambda b, x, y, z: b.add(b.mul(x, z), b.mul(z, y)), lambda b, x, y, z: b.mul(b.add(x, y), z)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_before_and_after(case: str) -> None:
    inputs, before, after = CASES[case]
    check_pass(Algebra(), written(inputs, before), written(inputs, after))


def test_text() -> None:
    check_pass(
        Algebra(),
        """
        graph @g(%x: f32[B, 4]) -> f32[B, 4] where 1 <= B <= 64 {
          %one: f32[] = constant() {value = 1.0}
          %0: f32[B, 4] = mul(%x, %one)
          %1: f32[B, 4] = neg(%0)
          %2: f32[B, 4] = neg(%1)
          return %2
        }""",
        """
        graph @g(%x: f32[B, 4]) -> f32[B, 4] where 1 <= B <= 64 {
          return %x
        }""",
    )


NEVER: dict[str, tuple[str, Expression, str | None]] = {
    "x + 0.0 of a -0.0": ("f32[B]", lambda b, x: b.add(x, 0.0), "x may be that"),
    "x * 0.0 of an infinity": ("f32[B]", lambda b, x: b.mul(x, 0.0), "infinite x"),
    "x - x of a nan": ("f32[B]", lambda b, x: b.sub(x, x), "nan"),
    "not of a number is no number": ("i32[B]", lambda b, x: b.logical_and(x, x), None),
    "not not of a number": ("f32[B]", lambda b, x: b.logical_not(b.logical_not(x)), None),
    "max and min do not merge": ("f32[B]", lambda b, x: b.minimum(b.maximum(x, 0.0), 6.0), None),
    "an overflowing constant": ("f32[B]", lambda b, x: b.mul(b.mul(x, 1e30), 1e30), "out of the range"),
    "rounding by a large constant": ("f32[B]", lambda b, x: b.add(b.add(x, 12582912.0), -12582912.0), "opposite signs"),
    "a sum that is used": ("f32[B]", lambda b, x: ((y := b.add(x, 1.0)), b.add(y, 2.0)), "other uses"),
    "factors that broadcast": (
        "f32[B, 4] f32[4] f32[B, 4]", lambda b, x, y, z: b.add(b.mul(x, z), b.mul(y, z)), "differ in shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NEVER)
def test_declines(case: str) -> None:
    inputs, before, reason = NEVER[case]
    check_pass(Algebra(), written(inputs, before), fires=False, reason=reason)


def test_every_rule_fires() -> None:
    check_rules_fire(Algebra(), [written(inputs, before) for inputs, before, _ in CASES.values()])


def test_constants_are_of_the_operands_dtype() -> None:
    g = check_pass(Algebra(), written("i16[B]", lambda b, x: b.mul(b.mul(x, 300), 300)))
    (number,) = (n.attrs["value"] for n in g.nodes() if n.name == "constant" and n.results[0].uses)
    assert number == 90000 - 65536 and next(iter(g.nodes())).results[0].dtype == DType.named("i16")

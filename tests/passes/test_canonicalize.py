"""canonicalize: one spelling for each thing, and nothing where the bits would differ."""

from __future__ import annotations

import pytest
from writing import B, Expression, constant, ops, written

from graphopt.passes.simplify import Canonicalize
from graphopt.testing import check_pass, check_rules_fire

Case = tuple[str, Expression, Expression]

CASES: dict[str, Case] = {
    "ConstantSecond": ("f32[B, 4]", lambda b, x: b.add(2.0, x), lambda b, x: b.add(x, 2.0)),
    "ConstantSecond, mirrored": ("f32[B, 4]", lambda b, x: b.lt(2.0, x), lambda b, x: b.gt(x, 2.0)),
    "SubtractConstant": ("f32[B, 4]", lambda b, x: b.sub(x, 3.0), lambda b, x: b.add(x, -3.0)),
    "SubtractConstant, integers": ("i8[B, 4]", lambda b, x: b.sub(x, 3), lambda b, x: b.add(x, -3)),
    "DivideByPowerOfTwo": ("f32[B, 4]", lambda b, x: b.div(x, 8.0), lambda b, x: b.mul(x, 0.125)),
    "DivideOne": ("f32[B, 4]", lambda b, x: b.div(1.0, x), lambda b, x: b.reciprocal(x)),
    "ReciprocalOfRoot": ("f32[B, 4]", lambda b, x: b.div(1.0, b.sqrt(b.exp(x))), lambda b, x: b.rsqrt(b.exp(x))),
    "Power 2": ("f32[B, 4]", lambda b, x: b.pow(x, 2.0), lambda b, x: b.mul(x, x)),
    "Power 3": ("i64[B, 4]", lambda b, x: b.pow(x, 3), lambda b, x: b.mul(b.mul(x, x), x)),
    "Power 1/2": ("f32[B, 4]", lambda b, x: b.pow(b.exp(x), 0.5), lambda b, x: b.sqrt(b.exp(x))),
    "Power -1/2": ("f32[B, 4]", lambda b, x: b.pow(b.exp(x), -0.5), lambda b, x: b.rsqrt(b.exp(x))),
    "TimesMinusOne": ("f32[B, 4]", lambda b, x: b.mul(x, -1.0), lambda b, x: b.neg(x)),
    "AddNegated": ("f32[B, 4] f32[4]", lambda b, x, y: b.add(b.neg(y), x), lambda b, x, y: b.sub(x, y)),
    "SubtractNegated": ("f32[B, 4] f32[4]", lambda b, x, y: b.sub(x, b.neg(y)), lambda b, x, y: b.add(x, y)),
    "ScaleNegated": ("f32[B, 4]", lambda b, x: b.mul(b.neg(x), 3.0), lambda b, x: b.mul(x, -3.0)),
    "NotComparison": ("f32[B, 4] f32[4]", lambda b, x, y: b.logical_not(b.eq(x, y)), lambda b, x, y: b.ne(x, y)),
    "NotComparison, integers": ("i32[B, 4] i32[4]", lambda b, x, y: b.logical_not(b.lt(x, y)), lambda b, x, y: b.ge(x, y)),
    "WhereNot": ("b1[B] f32[B] f32[B]", lambda b, c, x, y: b.where(b.logical_not(c), x, y), lambda b, c, x, y: b.where(c, y, x)),
    "PlainAxes": ("f32[B, 4]", lambda b, x: b.sum(x, axes=(-1, 0)), lambda b, x: b.sum(x, axes=(0, 1))),
    "PlainAxes, one": ("f32[B, 4]", lambda b, x: b.softmax(x, axis=-1), lambda b, x: b.softmax(x, axis=1)),
    "ImplicitBroadcast": ("f32[B, 4] f32[4]", lambda b, x, y: b.add(x, b.broadcast_to(y, shape=(B, 4))), lambda b, x, y: b.add(x, y)),
    "ImplicitBroadcast, reshape": ("f32[B, 4] f32[4]", lambda b, x, y: b.mul(x, b.reshape(y, shape=(1, 4))), lambda b, x, y: b.mul(x, y)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_before_and_after(case: str) -> None:
    inputs, before, after = CASES[case]
    check_pass(Canonicalize(), written(inputs, before), written(inputs, after))


def test_text() -> None:
    check_pass(
        Canonicalize(),
        """
        graph @g(%x: f32[B, 4]) -> f32[B, 4] where 1 <= B <= 64 {
          %c: f32[] = constant() {value = 4.0}
          %0: f32[B, 4] = div(%x, %c)
          return %0
        }""",
        """
        graph @g(%x: f32[B, 4]) -> f32[B, 4] where 1 <= B <= 64 {
          %c: f32[] = constant() {value = 0.25}
          %0: f32[B, 4] = mul(%x, %c)
          return %0
        }""",
    )


NEVER: dict[str, tuple[str, Expression, str | None]] = {
    "a third is not exact": ("f32[B]", lambda b, x: b.div(x, 3.0), None),
    "2^-140 is not normal": ("f32[B]", lambda b, x: b.div(x, 2.0**140), None),
    "the lowest i8 has no negative": ("i8[B]", lambda b, x: b.sub(x, -128), None),
    "unsigned has no negative": ("u8[B]", lambda b, x: b.sub(x, 3), None),
    "a nan compares to nothing": ("f32[B] f32[B]", lambda b, x, y: b.logical_not(b.lt(x, y)), "of a nan"),
    "pow of other exponents": ("f32[B]", lambda b, x: b.pow(x, 2.5), None),
    "the broadcast makes the shape": ("f32[1, 4] f32[4]", lambda b, x, y: b.add(x, b.broadcast_to(y, shape=(B, 4))), None),
    "axes that are plain": ("f32[B, 4]", lambda b, x: b.sum(x, axes=(0, 1)), None),
}  # fmt: skip


@pytest.mark.parametrize("case", NEVER)
def test_declines(case: str) -> None:
    inputs, before, reason = NEVER[case]
    check_pass(Canonicalize(), written(inputs, before), fires=False, reason=reason)


def test_a_broadcast_constant_keeps_the_shape() -> None:
    g = check_pass(Canonicalize(), written("f32[4]", lambda b, x: b.pow(x, b.full((B, 4), 2.0))))
    assert g.outputs[0].shape == (B, 4)
    g = check_pass(Canonicalize(), written("f32[4]", lambda b, x: b.sub(x, b.broadcast_to(constant(b, 1.0, "f32"), shape=(B, 4)))))
    assert g.outputs[0].shape == (B, 4) and "add" in ops(g)


def test_every_rule_fires() -> None:
    check_rules_fire(Canonicalize(), [written(inputs, before) for inputs, before, _ in CASES.values()])

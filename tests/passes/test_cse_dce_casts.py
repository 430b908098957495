"""cse, dce, casts, fold-constants."""

from __future__ import annotations

import pytest
from writing import B, Expression, constant, ops, written

from graphopt.ir import TensorType, Value, dims, types
from graphopt.pass_manager import Fuel, PassContext
from graphopt.passes.simplify import Casts, CommonSubexpressions, DeadCode, FoldConstants
from graphopt.testing import check_pass, check_rules_fire


def test_cse() -> None:
    check_pass(
        CommonSubexpressions(),
        """
        graph @g(%x: f32[B, 4], %y: f32[B, 4]) -> f32[B, 4] where 1 <= B <= 64 {
          %0: f32[B, 4] = add(%x, %y)
          %1: f32[B, 4] = add(%y, %x)
          %2: f32[B, 4] = exp(%0)
          %3: f32[B, 4] = exp(%1)
          %4: f32[B, 4] = mul(%2, %3)
          return %4
        }""",
        """
        graph @g(%x: f32[B, 4], %y: f32[B, 4]) -> f32[B, 4] where 1 <= B <= 64 {
          %0: f32[B, 4] = add(%x, %y)
          %2: f32[B, 4] = exp(%0)
          %4: f32[B, 4] = mul(%2, %2)
          return %4
        }""",
    )


@pytest.mark.parametrize(
    "expression",
    [
        lambda b, x: b.add(b.mul(x, 0.0), b.mul(x, -0.0)),
        lambda b, x: b.add(b.sum(x, axes=(0,)), b.sum(x, axes=(1,))),
        lambda b, x: b.add(b.gelu(x), b.gelu(x, approximate="tanh")),
    ],
)  # fmt: skip
def test_cse_keeps_what_differs(expression: Expression) -> None:
    check_pass(CommonSubexpressions(), written("f32[4, 4]", expression), fires=False)


def random(b, x: Value) -> Value:  # type: ignore[no-untyped-def]
    (r,) = b.aten("aten.rand_like.default", [x], [TensorType(types.f32, x.shape)], ("$0",), effect="random")
    return r  # type: ignore[no-any-return]


def test_effects_are_neither_merged_nor_removed() -> None:
    check_pass(CommonSubexpressions(), written("f32[B]", lambda b, x: b.add(random(b, x), random(b, x))), fires=False)
    check_pass(DeadCode(), written("f32[B]", lambda b, x: [random(b, x), x][1]), fires=False)


def test_dce() -> None:
    g = check_pass(DeadCode(), written("f32[B]", lambda b, x: [b.exp(b.exp(x)), b.neg(x)][1]))
    assert ops(g) == ["neg"]


def test_fuel_leaves_out_single_rewrites() -> None:
    g = written("f32[B]", lambda b, x: b.add(b.add(b.exp(x), b.exp(x)), b.exp(x)))
    ctx = PassContext(fuel=Fuel(skip=[1]))
    assert CommonSubexpressions().run(g, ctx) and ops(g) == ["exp", "exp", "add", "add"]
    g = written("f32[B]", lambda b, x: b.add(b.exp(x), b.exp(x)))
    assert not CommonSubexpressions().run(g, PassContext(fuel=Fuel(limit=0)))


# --- casts -------------------------------------------------------------------------------------------------------------


def through(inner: types.DType, outer: types.DType) -> Expression:
    return lambda b, x: b.create("cast", [b.create("cast", [x], {"dtype": inner})], {"dtype": outer})


def test_casts() -> None:
    check_pass(Casts(), written("f16[B]", through(types.f32, types.f16)), written("f16[B]", lambda b, x: x))
    check_pass(Casts(), written("i8[B]", through(types.f32, types.i64)), written("i8[B]", lambda b, x: b.cast(x, types.i64)))
    check_pass(Casts(), written("b1[B]", through(types.i32, types.f32)), written("b1[B]", lambda b, x: b.cast(x, types.f32)))


@pytest.mark.parametrize(
    ("outer", "inner", "dtype"),
    [
        ("f32", "f16", "f32"), ("f16", "bf16", "f32"), ("i64", "f32", "i64"), ("f32", "i32", "f32"),
        ("i32", "u32", "i64"), ("i32", "b1", "i32"),
    ],
)
def test_casts_that_round_stay(outer: str, inner: str, dtype: str) -> None:
    expression = through(types.DType.named(inner), types.DType.named(dtype))
    check_pass(Casts(), written(f"{outer}[B]", expression), fires=False, reason="does not hold every value")


def test_every_cast_rule_fires() -> None:
    check_rules_fire(Casts(), [written("f16[B]", through(types.f32, types.f16)), written("f16[B]", same)])


def same(b, x: Value) -> Value:  # type: ignore[no-untyped-def]
    return b.create("cast", [x], {"dtype": x.dtype})  # type: ignore[no-any-return]


# --- constants ---------------------------------------------------------------------------------------------------------


def test_fold_constants() -> None:
    def expression(b, x):  # type: ignore[no-untyped-def]
        two = constant(b, 2.0, "f32")
        return b.mul(x, b.sqrt(b.add(two, two)))

    g = check_pass(FoldConstants(), written("f32[B]", expression))
    assert ops(g) == ["constant", "mul"] and next(g.nodes()).attrs["value"] == 2.0


def test_fold_constants_of_a_tensor() -> None:
    g = check_pass(FoldConstants(), written("f32[4]", lambda b, x: b.mul(x, b.exp(b.full((B, 4), 0.0)))))
    assert ops(g) == ["constant", "broadcast_to", "mul"]


def test_fold_constants_keeps_dtypes() -> None:
    g = check_pass(FoldConstants(), written("b1[B]", lambda b, x: b.logical_and(x, b.gt(constant(b, 2, "i8"), constant(b, 1, "i8")))))
    assert next(g.nodes()).attrs == {"value": True, "dtype": types.b1}
    g = check_pass(FoldConstants(), written("u8[B]", lambda b, x: b.add(x, b.add(constant(b, 200, "u8"), constant(b, 100, "u8")))))
    assert next(g.nodes()).attrs == {"value": 44, "dtype": types.u8}


def test_fold_sizes() -> None:
    def expression(b, x):  # type: ignore[no-untyped-def]
        n = b.add(b.mul(constant(b, B, "i64"), constant(b, 2, "i64")), constant(b, 1, "i64"))
        return b.div(x, b.cast(n, types.f32))

    g = check_pass(FoldConstants(), written("f32[B]", expression))
    assert ops(g) == ["constant", "div"] and dims.same(next(g.nodes()).attrs["value"], 2 * B + 1)


def test_fold_constants_declines() -> None:
    check_pass(FoldConstants(), written("f32[B]", lambda b, x: b.add(x, 1.0)), fires=False)
    before = written("i64[B]", lambda b, x: b.add(x, b.floor_div(constant(b, 3, "i64"), constant(b, B - 1, "i64"))))
    check_pass(FoldConstants(), before, fires=False, reason="not known to be positive")
    before = written("i64[B]", lambda b, x: b.add(x, b.floor_div(constant(b, 3, "i64"), constant(b, 0, "i64"))))
    check_pass(FoldConstants(), before, fires=False, reason="not defined")


def test_every_fold_rule_fires() -> None:
    sums = [lambda b, x, n=n: b.add(x, b.add(constant(b, n, "i64"), constant(b, 1, "i64"))) for n in (2, B)]
    check_rules_fire(FoldConstants(), [written("i64[B]", s) for s in sums])

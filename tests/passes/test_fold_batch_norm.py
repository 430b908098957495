"""fold-batch-norm: into convolutions (grouped, with a bias) and matmuls; only where everything is frozen."""

from __future__ import annotations

import pytest
from writing import Expression, ops, written

from graphopt.ir import Builder, Value, types
from graphopt.ir.stage import staged_values
from graphopt.passes.simplify import FoldBatchNorm
from graphopt.testing import check_pass

CONV = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
INPUTS = "f32[B, 4, 8, 8] f32[6, 4, 3, 3] f32[6] f32[6] f32[6] f32[6]"


def norm(b: Builder, x: Value, *parameters: Value) -> Value:
    mean, var, *affine = parameters
    return b.batch_norm(x, mean, b.mul(var, var), *affine)  # type: ignore[no-any-return]


def conv(b: Builder, x: Value, w: Value, *parameters: Value) -> Value:
    return norm(b, b.conv(x, w, **CONV), *parameters)


def folded(inputs: str, expression: Expression) -> None:
    count = inputs.count("[")
    g = check_pass(FoldBatchNorm(), written(inputs, expression, weights=range(1, count)))
    assert "batch_norm" not in ops(g)
    staged = staged_values(g)
    left = [n.name for n in g.nodes() if not staged.node(n)]
    assert left in (["conv", "add"], ["conv_transpose", "add"], ["matmul", "add"]), left


def test_conv() -> None:
    folded(INPUTS, conv)
    folded("f32[B, 4, 8, 8] f32[6, 4, 3, 3] f32[6] f32[6]", conv)


def test_a_weight_that_would_be_rounded_again_is_left() -> None:
    """Sums of f16 in f32: a scaled weight is no f16 any more."""
    inputs = "f16[B, 4, 8, 8] f16[6, 4, 3, 3] f32[6] f32[6] f32[6] f32[6]"
    g = written(inputs, lambda b, x, w, *p: norm(b, b.conv(x, w, acc=types.f32, **CONV), *p), weights=range(1, 6))
    check_pass(FoldBatchNorm(), g, fires=False, reason="its weight is of f16, and would be rounded to it again")


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_conv(groups: int) -> None:
    def transposed(b: Builder, x: Value, w: Value, *parameters: Value) -> Value:
        return norm(b, b.conv_transpose(x, w, **CONV, output_padding=(0, 0), groups=groups), *parameters)

    folded(f"f32[B, 4, 5, 5] f32[4, {6 // groups}, 3, 3] f32[6] f32[6] f32[6] f32[6]", transposed)


def test_conv_with_bias() -> None:
    def biased(b: Builder, x: Value, w: Value, c: Value, *parameters: Value) -> Value:
        return norm(b, b.add(b.conv(x, w, **CONV), b.reshape(c, shape=(6, 1, 1))), *parameters)

    folded("f32[B, 4, 8, 8] f32[6, 4, 3, 3] f32[6] f32[6] f32[6] f32[6] f32[6]", biased)

    def leading(b: Builder, x: Value, w: Value, c: Value, *parameters: Value) -> Value:
        return norm(b, b.add(b.reshape(c, shape=(1, 6, 1, 1)), b.conv(x, w, **CONV)), *parameters)

    folded("f32[B, 4, 8, 8] f32[6, 4, 3, 3] f32[6] f32[6] f32[6] f32[6] f32[6]", leading)


def test_grouped_conv() -> None:
    folded(
        "f32[B, 4, 8, 8] f32[6, 2, 3, 3] f32[6] f32[6] f32[6] f32[6]",
        lambda b, x, w, *p: norm(b, b.conv(x, w, groups=2, **CONV), *p),
    )


def test_conv_in_half_precision() -> None:
    folded(INPUTS.replace("f32", "bf16"), conv)


def test_matmul() -> None:
    folded("f32[B, 4] f32[6, 4] f32[6] f32[6] f32[6]", lambda b, x, w, *p: norm(b, b.matmul(x, b.transpose(w, perm=(1, 0))), *p))


def test_text() -> None:
    check_pass(
        FoldBatchNorm(),
        """
        graph @g(%x: f32[B, 4], weight %w: f32[4, 6], weight %m: f32[6], weight %v: f32[6]) -> f32[B, 6] where 1 <= B <= 8 {
          %0: f32[B, 6] = matmul(%x, %w)
          %e: f32[6] = exp(%v)
          %1: f32[B, 6] = batch_norm(%0, %m, %e)
          return %1
        }""",
        """
        graph @g(%x: f32[B, 4], weight %w: f32[4, 6], weight %m: f32[6], weight %v: f32[6]) -> f32[B, 6] where 1 <= B <= 8 {
          %e: f32[6] = exp(%v)
          %eps: f32[] = constant() {value = 0.00001}
          %0: f32[6] = add(%e, %eps)
          %s: f32[6] = rsqrt(%0)
          %1: f32[4, 6] = mul(%w, %s)
          %2: f32[B, 6] = matmul(%x, %1)
          %3: f32[6] = mul(%m, %s)
          %4: f32[6] = neg(%3)
          %5: f32[B, 6] = add(%2, %4)
          return %5
        }""",
    )


def used_twice(b: Builder, x: Value, w: Value, *p: Value) -> list[Value]:
    y = b.conv(x, w, **CONV)
    return [y, norm(b, y, *p)]


def residual(b: Builder, x: Value, w: Value, *p: Value) -> Value:
    return norm(b, b.add(b.conv(x, w, **CONV), b.sum(x, axes=(1,), keepdims=True)), *p)


@pytest.mark.parametrize(
    ("inputs", "expression", "weights", "reason"),
    [
        (INPUTS, conv, (2, 3, 4, 5), "the weight is not frozen"),
        (INPUTS, conv, (1, 2, 3, 4), "a parameter of the norm is not frozen"),
        (INPUTS, used_twice, range(1, 6), "has other uses"),
        (INPUTS, lambda b, x, w, *p: norm(b, b.relu(b.conv(x, w, **CONV)), *p), range(1, 6), "does not follow"),
        (INPUTS, residual, range(1, 6), "the bias is not frozen"),
        ("f32[B, 6, 4] f32[4, 5] f32[6] f32[6]", lambda b, x, w, *p: norm(b, b.matmul(x, w), *p), range(1, 4), "not the columns"),
    ],
)  # fmt: skip
def test_declines(inputs: str, expression: Expression, weights: range, reason: str) -> None:
    check_pass(FoldBatchNorm(), written(inputs, expression, weights), fires=False, reason=reason)

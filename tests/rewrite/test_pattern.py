"""Patterns: what matches, what does not, and how near a miss came."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt.errors import UsageError
from graphopt.ir import Graph, parse_graph
from graphopt.rewrite import any_of, attr, const, op_in, pat, through, value
from graphopt.rewrite.pattern import Match, Matcher, OpPattern

X, Y = value("x"), value("y")


def graph(*lines: str, inputs: str = "%x: f32[4, 4], %y: f32[4, 4]", out: str = "%r") -> Graph:
    body = "\n".join(lines)
    return parse_graph(f"graph @g({inputs}) -> f32[4, 4] {{\n{body}\nreturn {out}\n}}")


def match(pattern: OpPattern, g: Graph) -> tuple[Match | None, str]:
    root = g.outputs[0].producer
    assert root is not None
    matcher = Matcher()
    return matcher.match(pattern, root), matcher.miss.reason


def bound(pattern: OpPattern, g: Graph) -> dict[str, Any]:
    found, reason = match(pattern, g)
    assert found is not None, reason
    return found.bindings


MUL_EXP = ("%e: f32[4, 4] = exp(%x)", "%r: f32[4, 4] = mul(%y, %e)")


def test_commutative_operands_match_in_either_order() -> None:
    g = graph(*MUL_EXP)
    assert bound(pat.mul(pat.exp(X), Y), g) == {"x": g.inputs[0], "y": g.inputs[1]}
    assert bound(pat.mul(Y, pat.exp(X)), g) == {"x": g.inputs[0], "y": g.inputs[1]}


def test_others_match_in_one_order_only() -> None:
    g = graph("%e: f32[4, 4] = exp(%x)", "%r: f32[4, 4] = sub(%y, %e)")
    assert match(pat.sub(Y, pat.exp(X)), g)[0] is not None
    found, reason = match(pat.sub(pat.exp(X), Y), g)
    assert found is None and reason == "expected exp, found an input"


def test_a_name_used_twice_is_one_value() -> None:
    assert match(pat.mul(X, X), graph("%r: f32[4, 4] = mul(%x, %x)"))[0] is not None
    found, reason = match(pat.mul(X, X), graph("%r: f32[4, 4] = mul(%x, %y)"))
    assert found is None and reason == "two different values stand for x"


def test_backtracking_over_operand_orders() -> None:
    g = graph("%a: f32[4, 4] = mul(%x, %y)", "%b: f32[4, 4] = mul(%y, %x)", "%r: f32[4, 4] = add(%a, %b)")
    assert match(pat.add(pat.mul(X, Y), pat.mul(X, Y)), g)[0] is not None
    three = graph("%a: f32[4, 4] = mul(%x, %y)", "%b: f32[4, 4] = exp(%x)", "%r: f32[4, 4] = add(%a, %b)")
    assert bound(pat.add(pat.mul(Y, X), pat.exp(Y)), three)["y"] is three.inputs[0]


def test_an_op_that_there_is_not() -> None:
    for wrong in (lambda: pat.rellu(value("x")), lambda: op_in(("exp", "rellu"))):
        with pytest.raises(UsageError, match=r"there is no op 'rellu' \(did you mean 'relu'\?\)"):
            wrong()
    assert not hasattr(pat, "__wrapped__")


def test_one_use() -> None:
    shared = graph("%e: f32[4, 4] = exp(%x)", "%m: f32[4, 4] = mul(%e, %y)", "%r: f32[4, 4] = add(%m, %e)")
    pattern = pat.add(pat.mul(pat.exp(X), Y), pat.exp(X))
    assert match(pattern, shared)[0] is not None
    found, reason = match(pat.add(pat.mul(pat.exp(X).once(), Y), pat.exp(X)), shared)
    assert found is None and reason == "the result of exp has other uses"


def test_constants() -> None:
    half = ("%c: f32[] = constant() {value = 0.5}", "%b: f32[4, 4] = broadcast_to(%c) {shape = [4, 4]}")
    g = graph(*half, "%r: f32[4, 4] = mul(%x, %b)")
    assert bound(pat.mul(X, 0.5), g)["x"] is g.inputs[0]
    assert bound(pat.mul(X, const("c")), g)["c"] == 0.5
    found, reason = match(pat.mul(X, 0.25), g)
    assert found is None and reason == "the constant is 0.5, not 0.25"
    found, reason = match(pat.mul(X, const("c")), graph("%r: f32[4, 4] = mul(%x, %y)"))
    assert found is None and "is no scalar constant" in reason


def test_a_constant_matches_up_to_the_rounding_of_its_dtype() -> None:
    g = graph("%c: f32[] = constant() {value = 0.7071067690849304}", "%r: f32[4, 4] = mul(%x, %c)")
    assert match(pat.mul(X, 0.7071067811865476), g)[0] is not None
    assert match(pat.mul(X, 0.7071), g)[0] is None


def test_through_casts_and_views() -> None:
    lines = ("%e: f32[4, 4] = exp(%x)", "%h: f16[4, 4] = cast(%e) {dtype = f16}", "%f: f32[4, 4] = cast(%h) {dtype = f32}",
             "%t: f32[4, 4] = transpose(%f) {perm = [1, 0]}", "%r: f32[4, 4] = neg(%t)")  # fmt: skip
    g = graph(*lines)
    assert match(pat.neg(pat.exp(X)), g)[0] is None
    assert match(pat.neg(through(pat.exp(X), casts=True)), g)[0] is None
    found, _ = match(pat.neg(through(pat.exp(X), casts=True, views=True)), g)
    assert found is not None and [n.op.name for n in found.nodes] == ["neg", "transpose", "cast", "cast", "exp"]
    assert match(pat.neg(through(pat.exp(X), casts=True)), graph("%e: f32[4, 4] = exp(%x)", "%r: f32[4, 4] = neg(%e)"))[0] is not None


def test_attributes() -> None:
    g = graph("%a: f32[4, 4] = transpose(%x) {perm = [1, 0]}", "%r: f32[4, 4] = transpose(%a) {perm = [1, 0]}")
    p = attr("p")
    assert bound(pat.transpose(pat.transpose(X, perm=p), perm=p), g)["p"] == (1, 0)
    assert match(pat.transpose(X, perm=(1, 0)), g)[0] is not None
    found, reason = match(pat.transpose(pat.transpose(X, perm=(0, 1))), g)
    assert found is None and reason == "perm is (1, 0), not (0, 1)"


def test_choices_and_names() -> None:
    g = graph(*MUL_EXP)
    found = bound(pat.mul(Y, any_of(pat.sin(X), pat.exp(X).named("e"))), g)
    assert found["e"].producer.op.name == "exp"
    assert match(op_in(("add", "mul"), X, Y), g)[0] is not None
    assert match(op_in(("add", "mul")), g)[0] is not None
    assert match(op_in(("add", "sub"), X, Y), g)[0] is None


def test_a_condition_on_a_value() -> None:
    square = value("x", where=lambda v: v.type.rank == 3)
    found, reason = match(pat.exp(square), graph("%r: f32[4, 4] = exp(%x)"))
    assert found is None and "is not fit for x" in reason


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (("%a: f32[4, 4] = sin(%x)", "%b: f32[4, 4] = mul(%a, %y)", "%r: f32[4, 4] = tanh(%b)"), "expected exp, found sin"),
        (("%a: f32[4, 4] = add(%x, %y)", "%r: f32[4, 4] = tanh(%a)"), "expected mul, found add"),
    ],
)
def test_the_nearest_miss_is_told(lines: tuple[str, ...], reason: str) -> None:
    found, told = match(pat.tanh(pat.mul(pat.exp(X), Y)), graph(*lines))
    assert found is None and told == reason

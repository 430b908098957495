"""Value checks: wrong passes and rules are caught and named; what cannot be compared is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from graphopt.errors import EquivalenceError, PassError, VerifyError
from graphopt.ir import Builder, Graph, Node, TensorType, Value, parse_graph, types
from graphopt.pass_manager import PASSES, Pass, PassContext, RewritePass, run_passes
from graphopt.rewrite import Fuel, Match, Numerics, Rewriter, Rule, pat, value
from graphopt.testing import assert_equivalent, check_pass, check_rules_fire
from graphopt.value_check import ValueCheck, numerics_of
from graphopt.verification import compare

MODEL = """graph @model(%x: f32[B, 6], weight %w: f32[6, 5], %i: i64[B]) -> (f32[B, 5], f32[B, 6])
where 1 <= B <= 64 {
  %0: f32[B, 5] = matmul(%x, %w)  // model.py:3
  %1: f32[B, 5] = softmax(%0) {axis = 1}  // model.py:4
  %2: f32[B, 6] = take(%x, %i)  // model.py:5
  %3: f32[B, 6] = relu(%2)  // model.py:6
  return %1, %3
}"""


@pytest.fixture(autouse=True, scope="module")
def unregister() -> Iterator[None]:
    yield
    for name in ("test-mixed", "test-good"):
        PASSES.pop(name, None)


def find(g: Graph, op: str) -> Node:
    return next(n for n in g if n.op.name == op)


def scale_outputs(g: Graph) -> None:
    """Every output times 1.002."""
    b = Builder(g)
    g.set_outputs([b.mul(v, 1.002) for v in g.outputs])


def other_axis(g: Graph) -> None:
    softmax = find(g, "softmax")
    g.replace(softmax.result, Builder(g, before=softmax).softmax(softmax.operands[0], axis=0))
    g.erase(softmax)


def drop_relu(g: Graph) -> None:
    relu = find(g, "relu")
    g.replace(relu.result, relu.operands[0])
    g.erase(relu)


def through_f16(g: Graph) -> None:
    b, softmax = Builder(g), find(g, "softmax")
    b.before = softmax
    g.set_operand(softmax, 0, b.cast(b.cast(softmax.operands[0], types.f16), types.f32))


def swap_outputs(g: Graph) -> None:
    g.set_outputs(list(g.outputs)[::-1])


def drop_output(g: Graph) -> None:
    g.set_outputs(g.outputs[:1])


def shift_index(g: Graph) -> None:
    take = find(g, "take")
    g.set_operand(take, 1, Builder(g, before=take).add(g.inputs[2], 1))


def wrong(damage: Callable[[Graph], None], changed: bool = True) -> Pass:
    class Wrong(Pass):
        """A pass that does damage."""

        def run(self, g: Graph, ctx: PassContext) -> bool:
            damage(g)
            return changed

        def __str__(self) -> str:
            return damage.__name__

    return Wrong()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (scale_outputs, r"output 0 differs \(computed in f64\): relative error 2.00e-03"),
        (other_axis, r"output 0 differs \(computed in f64\)"),
        (drop_relu, r"output 1 differs \(computed in f64\)"),
        (through_f16, r"output 0 differs \(in its own precision\)"),
        (swap_outputs, "differs"),
        (drop_output, "the graph had 2 outputs, now it has 1"),
        (shift_index, "cannot be evaluated|output 1 differs"),
    ],
)
def test_a_wrong_pass_is_caught_and_named(damage: Callable[[Graph], None], message: str) -> None:
    with pytest.raises(EquivalenceError, match=f"(?s)pass {damage.__name__} changed.*({message})"):
        run_passes(parse_graph(MODEL), [wrong(damage)], instruments=[ValueCheck()])


def replaced(name: str, make: Callable[[Rewriter, Value], Value], claim: Numerics) -> Pass:
    """A pass that puts something else in the place of an op of one operand."""

    class Other(Rule):
        """op(x)  =>  something else"""

        pattern = getattr(pat, name)(value("x"))
        numerics = claim

        def rewrite(self, m: Match, rw: Rewriter) -> Value:
            return make(rw, m["x"])

    class Replaced(RewritePass):
        """One op's result, as something else."""

        def rules(self) -> list[Rule]:
            return [Other()]

    return Replaced()


def _nearly_tanh(rw: Rewriter, x: Value) -> Value:
    y = rw.exp(rw.mul(x, 2.0))
    return rw.div(rw.sub(y, 1.0), rw.add(y, 1.0))


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize(("name", "make", "claim", "message"), [
    ("relu", lambda rw, x: rw.maximum(rw.minimum(x, 10.0), 0.0), Numerics.APPROXIMATE, "at magnitudes from 1e-3 to 1e2"),
    ("tanh", _nearly_tanh, Numerics.APPROXIMATE, "at magnitudes from 1e-3 to 1e2"),
    ("relu", lambda rw, x: rw.where(rw.gt(x, 0.0), x, rw.mul(x, 0.0)), Numerics.BITWISE, "infinities"),
    ("relu", lambda rw, x: rw.add(rw.maximum(x, 0.0), 1e-30), Numerics.BITWISE, "bit by bit"),
    ("neg", lambda rw, x: rw.sub(0.0, x), Numerics.BITWISE, "bit by bit"),
    ("neg", lambda rw, x: rw.mul(rw.mul(x, -4.0), 0.25), Numerics.BITWISE, "the ends of the range"),
    ("neg", lambda rw, x: rw.mul(rw.mul(x, -0.25), 4.0), Numerics.BITWISE, "the ends of the range"),
    ("neg", lambda rw, x: rw.mul(rw.mul(x, -49.0), 1.0 / 49.0), Numerics.BITWISE, "bit by bit"),
], ids=["clamped", "overflowing", "of infinities", "of zeros", "of the sign of zero", "of the largest", "of the smallest",
        "in the last bit"])  # fmt: skip
def test_what_is_wrong_at_some_numbers_is_caught(rows: int, name: str, make: Any, claim: Numerics, message: str) -> None:
    text = f"graph @g(%x: f32[B, {rows}]) -> f32[B, {rows}] where 1 <= B {{\n %0: f32[B, {rows}] = {name}(%x)\n return %0\n}}"
    with pytest.raises(EquivalenceError, match=f"(?s){message}"):
        check_pass(replaced(name, make, claim), text)


def test_other_bits_are_allowed_where_they_are_not_claimed() -> None:
    text = "graph @g(%x: f32[B, 50]) -> f32[B, 50] where 1 <= B {\n %0: f32[B, 50] = neg(%x)\n return %0\n}"
    check_pass(replaced("neg", lambda rw, x: rw.mul(rw.mul(x, -49.0), 1.0 / 49.0), Numerics.REASSOCIATES), text)
    check_pass(replaced("neg", lambda rw, x: rw.mul(x, -1.0), Numerics.BITWISE), text)
    check_pass(replaced("relu", lambda rw, x: rw.maximum(x, 0.0), Numerics.BITWISE), text.replace("neg", "relu"))


def test_bits_of_small_floats_are_compared_and_products_of_complex_numbers_are_not() -> None:
    f8 = parse_graph("graph @g(%x: f32[9]) -> f8e4m3[9] {\n %0: f8e4m3[9] = cast(%x) {dtype = f8e4m3}\n return %0\n}")
    (check,) = (c for c in compare(f8, f8, numerics=Numerics.BITWISE, draw="ends").checks if c.precision == "bits")
    assert check.ok
    twice = "graph @g(%x: c64[9]) -> c64[9] {\n %0: c64[9] = OP(%x, %x)\n return %0\n}"
    for op, compared in (("mul", False), ("add", True)):
        g = parse_graph(twice.replace("OP", op))
        assert any(c.precision == "bits" for c in compare(g, g, numerics=Numerics.BITWISE).checks) is compared


@pytest.mark.parametrize("damage", [scale_outputs, other_axis, drop_relu, through_f16])
def test_the_message_shows_the_node_and_a_reproducer_that_runs(damage: Callable[[Graph], None]) -> None:
    with pytest.raises(EquivalenceError) as caught:
        check_pass(wrong(damage), MODEL)
    text = str(caught.value)
    excerpt, _, code = text.partition("to reproduce")
    assert "// model.py" in excerpt
    with pytest.raises(EquivalenceError):
        exec(code.partition("\n")[2], {"the_pass": wrong(damage)})


def test_lies_about_changed_are_caught() -> None:
    with pytest.raises(EquivalenceError, match="pass drop_relu changed @model but says that it did not"):
        run_passes(parse_graph(MODEL), [wrong(drop_relu, changed=False)], instruments=[ValueCheck()])

    def nothing(g: Graph) -> None:
        pass

    with pytest.raises(EquivalenceError, match="says that it changed @model, which is as it was"):
        run_passes(parse_graph(MODEL), [wrong(nothing)], instruments=[ValueCheck()])
    with pytest.raises(EquivalenceError, match="says that it did not"):
        check_pass(wrong(drop_relu, changed=False), MODEL)
    with pytest.raises(EquivalenceError, match="as it was"):
        check_pass(wrong(nothing), MODEL)


class GoodRule(Rule):
    """neg(neg(x))  =>  x"""

    pattern = pat.neg(pat.neg(value("x")))
    numerics = Numerics.BITWISE

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return m["x"]  # type: ignore[no-any-return]


class BadRule(Rule):
    """relu(x)  =>  abs(x)"""

    pattern = pat.relu(value("x"))
    numerics = Numerics.REASSOCIATES

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.abs(m["x"])  # type: ignore[no-any-return]


class Mixed(RewritePass):
    """One good rule, one bad."""

    name = "test-mixed"

    def rules(self) -> list[Rule]:
        return [GoodRule(), BadRule()]


NEGS = """graph @negs(%x: f32[B]) -> f32[B] where 1 <= B {
  %0: f32[B] = neg(%x)  // m.py:1
  %1: f32[B] = neg(%0)  // m.py:2
  %2: f32[B] = neg(%1)  // m.py:3
  %3: f32[B] = neg(%2)  // m.py:4
  %4: f32[B] = relu(%3)  // m.py:5
  %5: f32[B] = exp(%4)  // m.py:6
  %6: f32[B] = relu(%5)  // m.py:7
  return %6
}"""


def test_a_wrong_rule_is_found_by_bisecting_the_fuel() -> None:
    ctx = PassContext()
    with pytest.raises(EquivalenceError) as caught:
        run_passes(parse_graph(NEGS), [Mixed()], ctx, instruments=[ValueCheck()])
    assert "rule BadRule of pass test-mixed is the first to go wrong: rewrite number " in str(caught.value)
    assert "relu" in str(caught.value) and "(m.py:5)" in str(caught.value)
    number = int(str(caught.value).split("rewrite number ")[1].split(",")[0])
    run_passes(parse_graph(NEGS), [Mixed()], PassContext(fuel=Fuel(skip=[number])), instruments=[ValueCheck()])


def test_the_number_counts_from_the_start_of_the_run() -> None:
    class Good(RewritePass):
        name = "test-good"

        def rules(self) -> list[Rule]:
            return [GoodRule()]

    ctx = PassContext()
    with pytest.raises(EquivalenceError, match=r"BadRule .* rewrite number 3,"):
        run_passes(parse_graph(NEGS), [Good(), Mixed()], ctx, instruments=[ValueCheck()])


def test_broken_structure_is_caught_first() -> None:
    def damage(g: Graph) -> None:
        find(g, "relu").result.type = TensorType(types.f16, (3,))

    with pytest.raises(VerifyError):
        run_passes(parse_graph(MODEL), [wrong(damage)], structure=False, instruments=[ValueCheck()])


def test_correct_passes_go_through() -> None:
    g = parse_graph(NEGS)
    check_pass(GoodRule(), g)
    assert len(g) == 7  # check_pass works on a copy


def test_random_graphs_are_not_passed_silently() -> None:
    text = """graph @g(%x: f32[4]) -> f32[4] {
      %0: f32[4] = aten(%x) {target = "aten.bernoulli.default", args = [$0], effect = "random"}
      %1: f32[4] = neg(%0)
      %2: f32[4] = neg(%1)
      return %2
    }"""
    found = compare(parse_graph(text), parse_graph(text))
    assert found.ok and not found.checks and "has the effect 'random'" in found.not_compared
    with pytest.raises(EquivalenceError, match="values were not compared"):
        check_pass(GoodRule(), text)
    ctx = PassContext()
    run_passes(parse_graph(text), [Mixed()], ctx, instruments=[ValueCheck()])
    assert any(r.kind == "analysis" and "not compared" in r.message for r in ctx.remarks)


def test_numerics_of_a_pass_is_the_loosest_of_its_rules() -> None:
    assert numerics_of(Mixed()) is Numerics.REASSOCIATES
    assert numerics_of(wrong(drop_relu)) is Numerics.REASSOCIATES


def test_half_precision_is_judged_by_its_own_error() -> None:
    a = "graph @g(%x: f16[B, 64], %y: f16[64]) -> f16[B, 64] where 1 <= B {\n" \
        " %0: f16[B, 64] = add(%x, %y)\n %1: f16[B, 64] = gelu(%0)\n return %1\n}"
    b = a.replace("add(%x, %y)", "add(%y, %x)")
    assert_equivalent(a, b)
    with pytest.raises(EquivalenceError, match="computed in f64"):
        assert_equivalent(a, a.replace("gelu(%0)", 'gelu(%0) {approximate = "tanh"}'), numerics=Numerics.APPROXIMATE)


def test_nan_and_infinity_must_stand_in_the_same_places() -> None:
    a = "graph @g(%x: f32[8]) -> f32[8] {\n %0: f32[8] = sub(%x, %x)\n %1: f32[8] = div(%0, %0)\n return %1\n}"
    b = "graph @g(%x: f32[8]) -> f32[8] {\n %0: f32[] = constant() {value = 1.0}\n" \
        " %1: f32[8] = broadcast_to(%0) {shape = [8]}\n return %1\n}"
    with pytest.raises(EquivalenceError, match="nan and infinity stand at other places"):
        assert_equivalent(a, b)


# check_pass itself


def test_check_pass_tells_what_was_expected() -> None:
    with pytest.raises(AssertionError, match="did not fire"):
        check_pass(GoodRule(), MODEL)
    with pytest.raises(AssertionError, match="fired but should not have"):
        check_pass(GoodRule(), NEGS, fires=False)
    check_pass(GoodRule(), MODEL, fires=False)
    with pytest.raises(AssertionError, match=r"(?s)not as expected.*\n-.*relu.*\n"):
        check_pass(GoodRule(), NEGS, NEGS)
    with pytest.raises(AssertionError, match="gave no reason with 'other uses'"):
        check_pass(GoodRule(), MODEL, fires=False, reason="other uses")


def test_check_pass_runs_again() -> None:
    class Grow(Pass):
        """Doubles a negation each time."""

        def run(self, g: Graph, ctx: PassContext) -> bool:
            b = Builder(g)
            g.set_outputs([b.neg(b.neg(g.outputs[0]))])
            return True

        def __str__(self) -> str:
            return "grow"

    with pytest.raises(AssertionError, match="pass grow has not settled"):
        check_pass(Grow(), NEGS)


def test_the_order_of_independent_nodes_does_not_matter() -> None:
    a = "graph @g(%x: f32[2]) -> f32[2] {\n%a: f32[2] = exp(%x)\n%b: f32[2] = sin(%x)\n%n: f32[2] = neg(%a)\n%m: f32[2] = neg(%n)\n"
    before = a + "%c: f32[2] = add(%m, %b)\nreturn %c\n}"
    after = "%b: f32[2] = sin(%x)\n%a: f32[2] = exp(%x)\n%c: f32[2] = add(%a, %b)\nreturn %c\n}"
    check_pass(GoodRule(), before, "graph @g(%x: f32[2]) -> f32[2] {\n" + after)


def test_idle_rules_are_named() -> None:
    check_rules_fire(Mixed(), [NEGS])
    with pytest.raises(AssertionError, match="fired on none of the graphs: GoodRule"):
        check_rules_fire([GoodRule(), BadRule()], [MODEL])


def test_a_pass_that_does_not_say_whether_it_changed_the_graph_is_no_pass() -> None:
    class Silent(Pass):
        """Says nothing."""

        def run(self, g: Graph, ctx: PassContext) -> bool:
            return None  # type: ignore[return-value]

    with pytest.raises(PassError, match="run returned None"):
        check_pass(Silent(), MODEL, fires=None)

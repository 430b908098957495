"""The driver: fixed point, fuel, remarks, dead nodes, rules that do not settle."""

from __future__ import annotations

import pytest

from graphopt.errors import GraphoptError, PassError
from graphopt.ir import Graph, Value, parse_graph, verify
from graphopt.rewrite import Fuel, Match, Numerics, PassContext, Reject, Rewriter, Rule, apply_rules, const, erase_dead, pat, value


class DoubleNeg(Rule):
    """neg(neg(x))  =>  x"""

    pattern = pat.neg(pat.neg(value("x")))
    numerics = Numerics.BITWISE

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return m["x"]  # type: ignore[no-any-return]


class MulTwo(Rule):
    """x * 2  =>  x + x"""

    pattern = pat.mul(value("x"), const("c"))
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        if m["c"] != 2:
            return Reject(f"the factor is {m['c']}, not 2", m["x"])
        return None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.add(m["x"], m["x"])  # type: ignore[no-any-return]


def negs(count: int) -> Graph:
    lines = "\n".join(f"%{i + 1}: f32[2] = neg(%{i})  // m.py:{i}" for i in range(count))
    return parse_graph(f"graph @g(%0: f32[2]) -> f32[2] {{\n{lines}\nreturn %{count}\n}}")


def test_rewrites_go_on_until_none_is_left() -> None:
    g = negs(9)
    assert apply_rules(g, [DoubleNeg()], PassContext()) is True
    assert [n.op.name for n in g] == ["neg"]
    verify(g)
    assert apply_rules(g, [DoubleNeg()], PassContext()) is False


def test_fuel_limits_and_skips() -> None:
    g, ctx = negs(8), PassContext(fuel=Fuel(limit=2))
    apply_rules(g, [DoubleNeg()], ctx)
    assert len(g) == 4 and [r.number for r in ctx.remarks if r.kind == "passed"] == [1, 2]
    g, ctx = negs(2), PassContext(fuel=Fuel(skip=[1]))
    assert apply_rules(g, [DoubleNeg()], ctx) is False and len(g) == 2
    g, ctx = negs(2), PassContext(fuel=Fuel(limit=0))
    assert apply_rules(g, [DoubleNeg()], ctx) is False and ctx.remarks == []


def test_the_same_fuel_gives_the_same_graph() -> None:
    for limit in range(4):
        texts = []
        for _ in range(2):
            g = negs(8)
            apply_rules(g, [DoubleNeg()], PassContext(fuel=Fuel(limit=limit)))
            texts.append(str(g))
        assert texts[0] == texts[1] and len(parse_graph(texts[0])) == 8 - 2 * limit


def test_remarks_name_rule_equation_node_and_source_line() -> None:
    ctx = PassContext(pass_name="demo")
    apply_rules(negs(2), [DoubleNeg()], ctx)
    (remark,) = ctx.remarks
    assert (remark.kind, remark.pass_name, remark.rule, remark.number) == ("passed", "demo", "DoubleNeg", 1)
    assert remark.message == "neg(neg(x))  =>  x"
    assert remark.loc == "m.py:1" and "neg(" in remark.node
    assert remark.to_json()["rule"] == "DoubleNeg" and "DoubleNeg #1" in str(remark)


def test_a_check_that_declines_gives_its_reason_once() -> None:
    g = parse_graph("graph @g(%x: f32[2]) -> f32[2] {\n%c: f32[] = constant() {value = 3.0}\n%0: f32[2] = mul(%x, %c)\nreturn %0\n}")
    ctx = PassContext()
    assert apply_rules(g, [MulTwo()], ctx) is False
    assert [r.message for r in ctx.remarks if r.kind == "missed"] == ["the factor is 3.0, not 2"]


def test_a_near_miss_is_told_but_not_a_far_one() -> None:
    class Far(DoubleNeg):
        pattern = pat.neg(pat.neg(pat.exp(value("x"))))

    ctx = PassContext()
    apply_rules(negs(2), [Far()], ctx)
    assert [r.message for r in ctx.remarks] == ["expected exp, found an input"]
    ctx = PassContext()
    apply_rules(negs(1), [Far()], ctx)
    assert ctx.remarks == []


def test_dead_operands_go_shared_ones_and_effects_stay() -> None:
    g = parse_graph("""graph @g(%x: f32[2]) -> (f32[2], f32[2]) {
      %a: f32[2] = exp(%x)
      %r: f32[2] = aten(%a) {target = "aten.bernoulli.default", args = [$0], effect = "random"}
      %b: f32[2] = neg(%a)
      %c: f32[2] = neg(%b)
      return %c, %a
    }""")
    apply_rules(g, [DoubleNeg()], PassContext())
    assert [n.op.name for n in g] == ["exp", "aten"]
    erase_dead(g, list(g)[1])
    assert len(g) == 2
    verify(g)


@pytest.mark.parametrize("returned", [True, False, "no"])
def test_a_check_that_returns_something_else(returned: object) -> None:
    class Wrong(DoubleNeg):
        def check(self, m: Match) -> Reject | None:
            return returned  # type: ignore[return-value]

    with pytest.raises(PassError) as caught:
        apply_rules(negs(2), [Wrong()], PassContext(pass_name="demo"))
    wanted = f"rule Wrong of pass demo: check returned {returned!r}; return None to go on, or Reject(reason, value) to decline"
    assert str(caught.value) == wanted and "(m.py:1)" in caught.value.__notes__[0]


@pytest.mark.parametrize("method", ["check", "rewrite"])
def test_a_rule_that_raises_is_named(method: str) -> None:
    def raising(self: Rule, *_: object) -> None:
        raise KeyError("lost")

    wrong = type("Wrong", (DoubleNeg,), {method: raising})
    with pytest.raises(PassError, match=r"^rule Wrong of pass demo failed at .*neg.*: KeyError: 'lost'$"):
        apply_rules(negs(2), [wrong()], PassContext(pass_name="demo"))


def test_rules_that_undo_each_other_are_found_out() -> None:
    class There(Rule):
        """exp(x)  =>  sin(x)"""

        pattern = pat.exp(value("x"))
        numerics = Numerics.BITWISE

        def rewrite(self, m: Match, rw: Rewriter) -> Value:
            return rw.sin(m["x"])  # type: ignore[no-any-return]

    class Back(There):
        """sin(x)  =>  exp(x)"""

        pattern = pat.sin(value("x"))

        def rewrite(self, m: Match, rw: Rewriter) -> Value:
            return rw.exp(m["x"])  # type: ignore[no-any-return]

    g = parse_graph("graph @g(%x: f32[2]) -> f32[2] {\n%0: f32[2] = exp(%x)\nreturn %0\n}")
    with pytest.raises(GraphoptError, match=r"rules do not settle in demo: over .* rewrites, the last by"):
        apply_rules(g, [There(), Back()], PassContext(pass_name="demo"))


def test_new_nodes_take_over_the_source_line() -> None:
    g = parse_graph(
        "graph @g(%x: f32[2]) -> f32[2] {\n%c: f32[] = constant() {value = 2.0}\n%0: f32[2] = mul(%x, %c)  // m.py:3\nreturn %0\n}"
    )
    apply_rules(g, [MulTwo()], PassContext())
    (node,) = list(g)
    assert node.op.name == "add" and str(node.loc) == "m.py:3"

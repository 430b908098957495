"""The graph: def-use links, mutation while iterating, copies, listeners; the builder."""

from __future__ import annotations

import pytest

from graphopt.errors import TypeInferenceError, UsageError, VerifyError
from graphopt.ir import Builder, Graph, Listener, Node, TensorType, Value, dims, parse_graph, structurally_equal, types, verify
from graphopt.ir.ops import op

CHAIN = """graph @chain(%x: f32[4]) -> f32[4] {
  %a: f32[4] = neg(%x)
  %b: f32[4] = exp(%a)
  %c: f32[4] = tanh(%b)
  return %c
}"""


def names(g: Graph) -> list[str]:
    return [n.op.name for n in g]


def chain() -> tuple[Graph, list[Node]]:
    g = parse_graph(CHAIN)
    return g, list(g)


def test_uses_follow_operands() -> None:
    g, (neg, exp, tanh) = chain()
    x = g.inputs[0]
    assert x.uses == [(neg, 0)] and neg.result.users == [exp] and tanh.result.users == [g.ret]
    g.set_operand(tanh, 0, x)
    assert exp.result.uses == [] and [n for n, _ in x.uses] == [neg, tanh]
    g.set_outputs([x, x])
    assert tanh.result.uses == [] and x.uses[-2:] == [(g.ret, 0), (g.ret, 1)]
    verify(g)


def test_replace_moves_all_uses_and_the_name() -> None:
    g, (neg, exp, tanh) = chain()
    b = Builder(g, before=tanh)
    g.replace(exp.result, b.sin(neg.result))
    assert names(g) == ["neg", "exp", "sin", "tanh"] and tanh.operands[0].hint == "b"
    g.erase(exp)
    verify(g)
    with pytest.raises(VerifyError, match="cannot be replaced"):
        g.replace(neg.result, b.constant(1.0))


def test_what_is_used_is_not_erased() -> None:
    g, (neg, *_) = chain()
    with pytest.raises(VerifyError, match="is erased but still used by"):
        g.erase(neg)
    with pytest.raises(VerifyError, match="is still used"):
        g.remove_input(g.inputs[0])


def test_inputs_are_renumbered() -> None:
    g, _ = chain()
    y = g.add_input(TensorType(types.f32, (1,)))
    z = g.add_input(TensorType(types.f32, (2,)))
    g.remove_input(y)
    assert [v.index for v in g.inputs] == [0, 1] and g.inputs[1] is z


# mutation while iterating


def test_a_node_inserted_after_the_current_one_is_visited_one_before_it_is_not() -> None:
    g, (neg, exp, tanh) = chain()
    seen = []
    for node in g:
        seen.append(node.op.name)
        if node is exp:
            Builder(g, before=exp).sin(neg.result)
            Builder(g, before=tanh).cos(neg.result)
    assert seen == ["neg", "exp", "cos", "tanh"] and names(g) == ["neg", "sin", "exp", "cos", "tanh"]


def test_backwards_alike() -> None:
    g, (neg, exp, tanh) = chain()
    seen = []
    for node in reversed(g):
        seen.append(node.op.name)
        if node is exp:
            Builder(g, before=exp).sin(neg.result)
            Builder(g, before=tanh).cos(neg.result)
    assert seen == ["tanh", "exp", "sin", "neg"]


def test_an_erased_node_is_skipped_and_the_current_one_may_be_erased() -> None:
    g, (neg, exp, tanh) = chain()
    seen = []
    for node in g:
        seen.append(node.op.name)
        if node is neg:  # erase the next one
            g.replace(exp.result, neg.result)
            g.erase(exp)
        if node is tanh:
            g.set_outputs([neg.result])
            g.erase(tanh)
    assert seen == ["neg", "tanh"] and names(g) == ["neg"] and len(g) == 1
    verify(g)


def test_erasing_a_run_of_nodes_around_the_current_one() -> None:
    g, (neg, exp, tanh) = chain()
    for node in g:
        if node is exp:
            g.set_outputs([g.inputs[0]])
            for n in (tanh, exp, neg):
                g.erase(n)
    assert names(g) == []
    verify(g)


def test_nodes_move() -> None:
    g = parse_graph("graph @g(%x: f32[2]) -> f32[2] {\n %a: f32[2] = neg(%x)\n"
                    " %b: f32[2] = exp(%x)\n %c: f32[2] = add(%a, %b)\n return %c\n}")  # fmt: skip
    a, b, _ = list(g)
    g.move_before(b, a)
    assert names(g) == ["exp", "neg", "add"] and len(g) == 3
    g.move_before(a, a)
    g.move_before(a, g.ret)
    assert names(g) == ["exp", "add", "neg"]
    with pytest.raises(VerifyError, match="is not defined before its use"):
        verify(g)


def test_a_clone_is_independent() -> None:
    g, _ = chain()
    copy = g.clone()
    assert structurally_equal(g, copy)
    Builder(copy).sin(copy.inputs[0])
    assert len(g) == 3 and len(copy) == 4
    verify(g)
    verify(copy)


def test_listeners_are_told() -> None:
    g, (neg, exp, _) = chain()
    told: list[str] = []

    class Ear(Listener):
        def created(self, node: Node) -> None:
            told.append(f"created {node.op.name}")

        def erasing(self, node: Node) -> None:
            told.append(f"erasing {node.op.name}")

        def replaced(self, old: Value, new: Value) -> None:
            told.append("replaced")

    g.listeners.append(Ear())
    g.replace(exp.result, Builder(g, before=exp).sin(neg.result))
    g.erase(exp)
    assert told == ["created sin", "replaced", "erasing exp"]


# the builder


def test_numbers_in_pointwise_ops_become_constants_of_the_other_dtype() -> None:
    g = Graph("g", {"B": dims.Range(1)})
    x = g.add_input(TensorType(types.f16, (dims.symbol("B"), 3)))
    y = Builder(g).mul(2, x)
    constant = y.producer.operands[0]
    assert y.type == x.type and constant.dtype == types.f16 and constant.producer.attrs["value"] == 2.0


def test_builder_makes_nothing_for_nothing() -> None:
    g, _ = chain()
    b, x = Builder(g), g.inputs[0]
    assert b.cast(x, types.f32) is x and b.transpose(x, (0,)) is x and b.reshape(x, (4,)) is x and b.broadcast_to(x, (4,)) is x
    assert b.full((2, 4), 1.5).shape == (2, 4) and b.full((), 1.5).shape == ()


def test_builder_errors() -> None:
    g, _ = chain()
    b, x = Builder(g), g.inputs[0]
    with pytest.raises(UsageError, match="there is no op 'gellu' \\(did you mean 'gelu'\\?\\)"):
        b.gellu(x)
    with pytest.raises(TypeError, match="operands must be Values"):
        b.matmul(x, 2.0)
    with pytest.raises(TypeInferenceError, match="axis 7 is out of range"):
        b.softmax(x, axis=7)
    with pytest.raises(TypeInferenceError, match="insert a cast"):
        b.add(x, b.constant(1, types.i64))
    with pytest.raises(TypeInferenceError, match="needs its result types"):
        g.create(op("aten"), [x], {"target": "aten.sin", "args": ()})


def test_inline_puts_a_body_in_place() -> None:
    g, (neg, exp, tanh) = chain()
    body = parse_graph("graph @b(%p: f32[4]) -> f32[4] {\n %0: f32[4] = add(%p, %p)\n return %0\n}")
    (new,) = Builder(g, before=exp).inline(body, [neg.result])
    g.replace(exp.result, new)
    assert names(g) == ["neg", "add", "exp", "tanh"] and tanh.operands[0] is new
    verify(g)

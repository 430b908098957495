"""The verifier catches each kind of broken graph, and names the node and its source line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from graphopt.errors import VerifyError
from graphopt.ir import Graph, TensorType, dims, parse_graph, types, verify
from graphopt.ir.ops import OpDef

TEXT = """graph @g(%x: f32[B, 4], %y: f32[4]) -> f32[B, 4]
where 1 <= B {
  %0: f32[B, 4] = add(%x, %y)  // model.py:7
  %1: f32[B, 4] = fusion(%0) {kind = "pointwise"} body (%p: f32[B, 4]) -> f32[B, 4]
  where 1 <= B {
    %e: f32[B, 4] = exp(%p)
    return %e
  }
  %2: f32[B, 4] = softmax(%1) {axis = 1}
  return %2
}"""


def order(g: Graph) -> None:
    add, fusion, _ = list(g)
    g.move_before(fusion, add)


def foreign(g: Graph) -> None:
    other = parse_graph(TEXT)
    g.set_operand(next(iter(g)), 0, other.inputs[0])


def wrong_type(g: Graph) -> None:
    list(g)[2].result.type = TensorType(types.f32, (dims.symbol("B"), 5))


def wrong_dtype(g: Graph) -> None:
    list(g)[2].result.type = TensorType(types.f16, (dims.symbol("B"), 4))


def bad_attribute(g: Graph) -> None:
    list(g)[2].attrs = {"axis": 9}


def unknown_attribute(g: Graph) -> None:
    list(g)[2].attrs = {"axis": 1, "axes": 1}


def unknown_op(g: Graph) -> None:
    list(g)[2].op = OpDef("softmaxx", (1, 1))


def no_range(g: Graph) -> None:
    g.symbols.clear()


def body_arity(g: Graph) -> None:
    body = list(g)[1].body
    assert body is not None
    body.add_input(TensorType(types.f32, ()))


def body_type(g: Graph) -> None:
    body = list(g)[1].body
    assert body is not None
    body.inputs[0].type = TensorType(types.f32, (dims.symbol("B"), 3))


def inside_body(g: Graph) -> None:
    body = list(g)[1].body
    assert body is not None
    next(iter(body)).result.type = TensorType(types.f32, (7,))


def lost_use(g: Graph) -> None:
    g.inputs[1]._uses.clear()


def stale_use(g: Graph) -> None:
    add = next(iter(g))
    g.inputs[1]._uses[(add, 0)] = None


def layouts(g: Graph) -> None:
    g.output_strides.append(None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (order, "is not defined before its use"),
        (foreign, "is not defined before its use"),
        (wrong_type, r"the result is declared f32\[B, 5\], inference gives f32\[B, 4\]"),
        (wrong_dtype, r"the result is declared f16\[B, 4\], inference gives f32\[B, 4\]"),
        (bad_attribute, "axis 9 is out of range"),
        (unknown_attribute, "axes"),
        (unknown_op, "unknown op 'softmaxx'"),
        (no_range, "the symbol B of .* has no range"),
        (body_arity, "the body takes 2 inputs"),
        (body_type, "body"),
        (inside_body, "the result is declared"),
        (lost_use, "does not know of this use"),
        (stale_use, "lists a use that does not exist"),
        (layouts, "2 output layouts for 1 output"),
    ],
)
def test_damage_is_found(damage: Callable[[Graph], None], message: str) -> None:
    g = parse_graph(TEXT)
    verify(g)
    damage(g)
    with pytest.raises(VerifyError, match=message):
        verify(g)


def test_the_source_line_is_named() -> None:
    g = parse_graph(TEXT)
    next(iter(g)).result.type = TensorType(types.f32, (4, 4))
    with pytest.raises(VerifyError, match=r"add\(%x, %y\) \(model.py:7\)"):
        verify(g)

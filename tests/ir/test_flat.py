"""Graphs in pickles: the same text, links within, and objects that refer to nodes and values."""

from __future__ import annotations

from hypothesis import given, settings

from graphopt.ir import flat, parse_graph
from graphopt.ir.graph import Graph
from graphopt.ir.ops import op
from graphopt.ir.verify import verify
from graphopt.testing import graphs

DEEP = 5000  # nodes in a row: deeper than a pickler recurses


@settings(max_examples=50, deadline=None)
@given(graphs(max_nodes=12, fusion=True))
def test_a_graph_comes_back(g: Graph) -> None:
    other = flat.loads(flat.dumps(g))
    assert str(other) == str(g) and other is not g
    verify(other)
    for mine, its in zip(other.inputs, g.inputs, strict=True):
        assert sorted((n.op.name, i) for n, i in mine.uses) == sorted((n.op.name, i) for n, i in its.uses)


def test_a_long_chain() -> None:
    g = parse_graph("graph @g(%x: f32[4]) -> f32[4] {\n return %x\n}")
    value = g.inputs[0]
    for _ in range(DEEP):
        value = g.create(op("exp"), [value]).result
    g.set_outputs([value])
    assert len(flat.loads(flat.dumps(g))) == DEEP


def test_what_refers_to_a_graph_refers_to_the_copy() -> None:
    g = parse_graph(
        "graph @g(%x: f32[4], weight(bf16) %w: f32[4]) -> f32[4] {\n"
        "  %y: f32[4] = fusion(%x, %w) {kind = \"pointwise\"} body(%a: f32[4], %b: f32[4]) -> f32[4] {\n"
        "    %c: f32[4] = add(%a, %b)\n    return %c\n  }\n  return %y\n}"
    )  # fmt: skip
    (node,) = g.nodes()
    assert node.body is not None
    (inner,) = node.body.nodes()
    parts = {"first": [node, g.inputs[1], node.result, node.body.inputs[0], inner], "graph": g, "ret": g.ret}
    found = flat.loads(flat.dumps(parts))
    copy = found["graph"]
    (twin,) = copy.nodes()
    (below,) = twin.body.nodes()
    assert found["first"][0] is twin and found["first"][1] is copy.inputs[1] and found["first"][2] is twin.result
    assert found["first"][3] is twin.body.inputs[0] and found["first"][4] is below and found["ret"] is copy.ret
    assert copy.inputs[1].weight and copy.inputs[1].exact is g.inputs[1].exact
    assert str(copy) == str(g)

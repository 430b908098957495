"""The text form: a round trip for a thousand random graphs, and errors that show where."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from graphopt.errors import ParseError
from graphopt.ir import Graph, parse_graph, print_graph, structural_hash, structurally_equal, verify
from graphopt.testing import graphs, random_graph

MLP = """graph @mlp(%x: f16[B, 1024], weight %w: f16[1024, 4096; 1, 1024], %b: f16[4096]) -> f16[B, 4096; 1, B]
where 1 <= B <= 64 {
  %0: f16[B, 4096] = matmul(%x, %w)  // mlp.py:12
  %1: f16[B, 4096] = add(%0, %b)  // layers.1 (Linear)
  %hidden: f16[B, 4096] = gelu(%1) {approximate = "tanh"}  // mlp.py:13
  return %hidden
}
"""


def test_a_text_is_printed_as_it_was_read() -> None:
    g = parse_graph(MLP)
    assert print_graph(g) == MLP
    assert g.inputs[1].weight and not g.inputs[0].weight
    assert [str(node.loc) for node in g] == ["mlp.py:12", "layers.1 (Linear)", "mlp.py:13"]


def test_round_trip_of_1000_random_graphs() -> None:
    for seed in range(1000):
        g = random_graph(seed, fusion=seed % 2 == 0)
        text = print_graph(g)
        parsed = parse_graph(text)
        assert print_graph(parsed) == text
        assert structural_hash(parsed) == structural_hash(g)
        if seed % 10 == 0:
            verify(parsed)


@settings(max_examples=40, deadline=None)
@given(graphs(fusion=True))
def test_round_trip_by_hypothesis(g: Graph) -> None:
    verify(g)
    assert structurally_equal(parse_graph(print_graph(g)), g)
    assert structurally_equal(g.clone(), g)


def test_attributes_of_every_kind_round_trip() -> None:
    text = """graph @g(%x: f32[2]) -> f32[2] {
  %0: f32[2] = aten(%x) {target = "aten.foo", args = [$0, [1, -2, []], none, true, 1.5, -inf, nan, "a\\"b", f32, B + 1, @strided, \
complex(1.0, -2.0)], kwargs = [["n", 3]], effect = "random", layouts = [none]}
  return %0
}
"""
    g = parse_graph(text)
    assert print_graph(g) == text
    assert next(iter(g)).has_effect


def test_names_and_source_lines_are_not_structure() -> None:
    renamed = MLP.replace("%x", "%y").replace("%hidden", "%5").replace("  // mlp.py:12", "")
    assert structural_hash(parse_graph(renamed)) == structural_hash(parse_graph(MLP))
    for other in (MLP.replace("weight ", ""), MLP.replace("tanh", "none"), MLP.replace("; 1, B]", "]"), MLP.replace("<= 64", "<= 65")):
        assert structural_hash(parse_graph(other)) != structural_hash(parse_graph(MLP))


def test_comments_and_space_are_free() -> None:
    assert structurally_equal(parse_graph("// about\n" + MLP.replace("  return", "  // then\n\n   return")), parse_graph(MLP))


@pytest.mark.parametrize(
    ("old", "new", "message", "shown"),
    [
        ("gelu(%1)", "gellu(%1)", "there is no op 'gellu' (did you mean 'gelu'?)", "gellu"),
        ("add(%0, %b)", "add(%0, %c)", "%c is not defined", "%c"),
        ("add(%0, %b)", "add(%0)", "add takes 2 operands, got 1", "add(%0)"),
        ("%1: f16[B, 4096] = add", "%1: f32[B, 4096] = add", "%1 is declared f32[B, 4096] but add gives f16[B, 4096]", "%1: f32"),
        ("%1: f16[B, 4096] = add", "%0: f16[B, 4096] = add", "%0 is defined twice", "%0: f16[B, 4096] = add"),
        ("f16[4096])", "g16[4096])", "'g16' is no dtype (did you mean '", "g16"),
        ("f16[4096])", "f16[40 96])", "'40 96' is no size", "40 96"),
        ("f16[4096])", "f16[4096; 1, 2])", "one stride an axis is needed", "])"),
        ('{approximate = "tanh"}', "{approximate}", "expected '='", "}"),
        ('{approximate = "tanh"}', '{aproximate = "tanh"}', "'aproximate'", "gelu"),
        ("-> f16[B, 4096; 1, B]", "-> f16[B, 4097]", "the graph returns (f16[B, 4096]), not what its signature says", "f16[B, 4097]"),
        ("where 1 <= B", "where B", "expected a range such as 1 <= B <= 64", "B <= 64"),
        ("  return %hidden\n}", "  return %hidden\n", "expected '}'", ""),
        ("graph @mlp", "grph @mlp", "expected 'graph', found 'grph", "grph"),
    ],
)
def test_errors_show_the_place(old: str, new: str, message: str, shown: str) -> None:
    text = MLP.replace(old, new)
    with pytest.raises(ParseError) as caught:
        parse_graph(text, "mlp.gir")
    error = caught.value
    head, quoted, caret = str(error).split("\n")
    assert head.startswith(f"mlp.gir:{error.line}:{error.column}: ") and message in head
    assert quoted[caret.index("^") :].startswith(shown)
    assert quoted.strip() in text

"""The generator of random graphs: deterministic, well-typed, varied, shrinkable; failing examples print as text."""

from __future__ import annotations

import pytest
from hypothesis import find, given, settings

from graphopt.errors import UsageError
from graphopt.ir import OPS, Graph, dims, parse_graph, structurally_equal, verify
from graphopt.testing import graphs, random_graph
from graphopt.testing.random_graphs import WHEN_ASKED


def test_the_same_seed_gives_the_same_graph() -> None:
    assert [str(random_graph(s)) for s in range(20)] == [str(random_graph(s)) for s in range(20)]


def test_graphs_hold_every_op_symbols_layouts_weights_names_and_fusions() -> None:
    sample = [random_graph(s, fusion=True) for s in range(400)]
    ops = {n.op.name for g in sample for n in g} | {n.op.name for g in sample for f in g if f.body is not None for n in f.body}
    assert ops >= set(OPS) - {"return", "aten", *WHEN_ASKED}
    inputs = [v for g in sample for v in g.inputs]
    assert any(v.weight for v in inputs) and any(v.type.strides for v in inputs) and any(v.hint for v in inputs)
    assert {s for g in sample for v in g.inputs for s in dims.free_symbols(v.shape)} == {"B", "S"}
    assert any(n.loc for g in sample for n in g) and max(len(g) for g in sample) > 12
    assert {v.dtype.name for v in inputs} >= {"f32", "f64", "f16", "bf16", "i64", "i32", "u8", "b1", "c64"}


def test_ops_and_symbols_can_be_chosen() -> None:
    for seed in range(30):
        g = random_graph(seed, ops=["add", "exp"], symbolic=False)
        assert {n.op.name for n in g} <= {"add", "exp", "constant"} and not g.symbols
        assert all(v.type.is_static for v in g.inputs)


@settings(max_examples=30, deadline=None)
@given(graphs(max_nodes=6, fusion=True))
def test_hypothesis_draws_well_typed_graphs(g: Graph) -> None:
    verify(g)


def test_failing_examples_shrink_and_can_be_pasted() -> None:
    quick = settings(max_examples=400, deadline=None, database=None, derandomize=True)
    small = find(graphs(ops=["softmax", "add", "exp"], max_nodes=4), lambda g: any(n.op.name == "softmax" for n in g), settings=quick)
    assert len(small) <= 4
    assert structurally_equal(eval(repr(small), {"parse_graph": parse_graph}), small)


def test_an_op_that_there_is_not_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"no recipe for an op 'rellu' \(did you mean 'relu'\?\)"):
        random_graph(0, ops=["rellu"])

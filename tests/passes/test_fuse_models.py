"""fuse on whole models and on random graphs: values, acyclicity, and the work it takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from fusing import assert_same_values, regions, run
from hypothesis import HealthCheck, given, settings
from models import bert, llama

from graphopt.ir import Builder, Graph, Value, dims, types, verify
from graphopt.ir.dims import Range
from graphopt.ir.types import TensorType
from graphopt.pass_manager import run_passes
from graphopt.passes.expand import Expand
from graphopt.passes.fusion import Fuse
from graphopt.passes.fusion.region import Region
from graphopt.rewrite import PassContext

BERT_LAYER = [
    *[("matmul", ["transpose", "matmul", "add"])] * 3,
    ("matmul", ["reshape", "transpose", "reshape", "transpose", "transpose", "matmul"]),
    ("rowwise", ["mul", "add", "softmax"]),
    ("matmul", ["reshape", "transpose", "matmul"]),
    ("matmul", ["transpose", "transpose", "reshape", "matmul"]),
    ("rowwise", ["add", "add", "layer_norm"]),
    ("matmul", ["transpose", "matmul", "add", "gelu"]),
    ("matmul", ["transpose", "matmul"]),
    ("rowwise", ["add", "add", "layer_norm"]),
]


@pytest.mark.parametrize("symbolic", [False, True])
def test_bert(symbolic: bool) -> None:
    g = bert(2, symbolic=symbolic)
    run(g, [Expand(), Fuse()])
    assert [(kind, sorted(ops)) for kind, ops in regions(g)] == [(kind, sorted(ops)) for kind, ops in BERT_LAYER * 2]
    assert all(n.body is not None for n in g.nodes())


@pytest.mark.parametrize("symbolic", [False, True])
def test_llama(symbolic: bool) -> None:
    g = llama(2, symbolic=symbolic)
    run(g, [Expand(), Fuse()])
    found = regions(g)
    assert sum("matmul" in ops and "silu" in ops and "mul" in ops for _, ops in found) == 2
    assert sum("matmul" in ops and ops[-1] == "add" for _, ops in found) == 4  # residuals
    assert sum(ops == ["rms_norm"] for _, ops in found) == 4
    assert sum(ops.count("concat") for _, ops in found) == 4  # rotary embeddings


# --- work --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [bert, llama])
def test_questions_asked_grow_with_the_layers(model: Callable[..., Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts how often a region is asked, and over how many members: twice the layers, twice the work."""
    work = [0]
    reject, downstream = Region.reject, Region._downstream

    def counted_reject(self: Region, *args: object) -> object:
        work[0] += 1
        return reject(self, *args)  # type: ignore[arg-type]

    def counted_downstream(self: Region, *args: object) -> object:
        work[0] += len(self.members)
        return downstream(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Region, "reject", counted_reject)
    monkeypatch.setattr(Region, "_downstream", counted_downstream)

    def cost(layers: int) -> int:
        work[0] = 0
        run_passes(model(layers), [Expand(), Fuse()])
        return work[0]

    assert cost(8) <= 2.1 * cost(4)


@pytest.mark.slow
@pytest.mark.parametrize("model", [bert, llama])
def test_96_layers_take_at_most_2_5_times_48(model: Callable[..., Graph]) -> None:
    def seconds(layers: int) -> float:
        best = float("inf")
        for _ in range(3):
            g = model(layers)
            start = time.perf_counter()
            run_passes(g, [Expand(), Fuse()])
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(96) <= 2.5 * seconds(48)


# --- random graphs -----------------------------------------------------------------------------------------------------

UNARY = ("neg", "tanh", "sigmoid", "relu", "abs")
BINARY = ("add", "mul", "maximum", "sub")
REDUCTIONS = ("sum", "max", "mean")


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A random DAG over [B, 4, 4]: pointwise ops, views, reductions, row ops, matmuls, copies for several users."""
    g = Graph("random", {"B": Range(1, 8)})
    full = (dims.symbol("B"), 4, 4)
    values: list[Value] = [g.add_input(TensorType(types.f32, full), n) for n in "xy"]
    vector = g.add_input(TensorType(types.f32, (4,)), "v")
    weight = g.add_input(TensorType(types.f32, (4, 4)), "w", weight=True)
    b = Builder(g)

    def some() -> Value:
        return values[draw(st.integers(max(0, len(values) - 5), len(values) - 1))]

    for _ in range(draw(st.integers(1, 24))):
        match draw(st.integers(0, 10)):
            case 0 | 1:
                new = b.create(draw(st.sampled_from(UNARY)), [some()])
            case 2 | 3 | 4:
                new = b.create(draw(st.sampled_from(BINARY)), [some(), draw(st.sampled_from([some(), vector, values[0]]))])
            case 5:
                new = b.transpose(some(), perm=(0, 2, 1))
            case 6:
                new = b.flip(some(), axes=(draw(st.integers(1, 2)),))
            case 7:
                axis = draw(st.integers(1, 2))
                statistic = b.create(draw(st.sampled_from(REDUCTIONS)), [some()], {"axes": (axis,), "keepdims": True})
                new = b.create(draw(st.sampled_from(BINARY)), [some(), draw(st.sampled_from([statistic, b.sigmoid(statistic)]))])
            case 8:
                new = draw(st.sampled_from([b.softmax(some(), axis=2), b.layer_norm(some()), b.rms_norm(some(), vector)]))
            case 9:
                new = b.matmul(some(), draw(st.sampled_from([some(), weight])))
            case _:
                half = b.slice(some(), axis=2, start=0, stop=2)
                new = b.concat(half, b.mul(half, 0.5), axis=2)
        values.append(new)
    g.set_outputs([some() for _ in range(draw(st.integers(1, 3)))])
    return g


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(g=graphs(), max_nodes=st.sampled_from([1, 3, 64]), max_inputs=st.sampled_from([1, 24]))
def test_random_graphs_keep_their_values(g: Graph, max_nodes: int, max_inputs: int) -> None:
    before, p = g.clone(), Fuse(max_nodes=max_nodes, max_inputs=max_inputs)
    run_passes(g, [p], PassContext())
    verify(g)  # each operand is defined before its use: no cycle runs through a region
    assert_same_values(before, g, tolerance=1e-7)
    for node in g.nodes():
        assert node.body is None or (node.attrs["kind"] in ("pointwise", "reduction", "rowwise", "matmul") and len(node.results) == 1)
        assert len(node.operands) == len(dict.fromkeys(node.operands)) or node.body is None
    assert not run_passes(g, [p], PassContext())

"""The captured graph itself: names, layouts, symbols, source lines, and refusals that name the op and the line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import graphopt
from graphopt.capture.captured import AliasResult, ArgumentResult, Captured, Mutation, SizeArgument, Uncapturable, ValueResult
from graphopt.capture.export import exported_graph
from graphopt.capture.fx import capture_fx
from graphopt.capture.source import clean_name
from graphopt.errors import FallbackError
from graphopt.ir import parse_graph, print_graph, verify


def captured(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> Captured:
    """What the first graph of a call is captured as; refusals come out as they are."""
    found: list[Captured | Uncapturable] = []

    def compiler(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        try:
            found.append(capture_fx(gm, name="fn"))
        except Uncapturable as error:
            found.append(error)
        return gm.forward

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, decompositions={}, keep_inference_input_mutations=True)
    with torch.no_grad():
        torch.compile(fn, backend=backend, dynamic=dynamic)(*args)
    first = found[0]
    if isinstance(first, Uncapturable):
        raise first
    verify(first.graph)
    assert print_graph(parse_graph(print_graph(first.graph))) == print_graph(first.graph)
    return first


def test_a_small_graph_as_text() -> None:
    c = captured(lambda x, y: (x.t() @ y).relu(), torch.randn(4, 3).t().contiguous().t(), torch.randn(4, 5))
    lines = [line.split("  //")[0] for line in str(c.graph).splitlines()]
    assert lines == [
        "graph @fn(%arg0_1: f32[4, 3; 1, 4], %arg1_1: f32[4, 5]) -> f32[3, 5] {",
        "  %0: f32[3, 4] = transpose(%arg0_1) {perm = [1, 0]}",
        "  %1: f32[3, 5] = matmul(%0, %arg1_1)",
        "  %2: f32[3, 5] = relu(%1)",
        "  return %2",
        "}",
    ]
    assert "// tests/capture/test_fx.py:" in str(c.graph) or "// test_fx.py:" in str(c.graph)


def test_within_pytorchs_own_modules_the_module_stands_for_the_line() -> None:
    inner = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Tanh())
    model, x = torch.nn.Sequential(torch.nn.ReLU(), inner), torch.randn(3, 4)
    with pytest.raises(FallbackError, match=r"\[1\.0 \(BatchNorm1d\)\]"):
        graphopt.compile(model, (x,), strict=True)  # in training mode
    exported = exported_graph(model.eval(), (x,))
    assert [str(n.loc) for n in capture_fx(exported.gm).graph] == ["0 (ReLU)", "1.0 (BatchNorm1d)", "1.1 (Tanh)"]
    assert [str(n.loc) for n in captured(model, x).graph] == ["0 (ReLU)", "1.0 (BatchNorm1d)", "1.1 (Tanh)"]
    assert str(next(iter(captured(torch.nn.ReLU(), x).graph)).loc) == "(ReLU)"


def test_symbols_and_ranges() -> None:
    x = torch.randn(6, 3)
    torch._dynamo.mark_dynamic(x, 0, min=4, max=64)
    c = captured(lambda x: x[1:-1].reshape(-1) * x.shape[0], x)
    (size, _), (name, span) = c.arguments, next(iter(c.graph.symbols.items()))
    assert isinstance(size, SizeArgument) and str(size.dim) == name and (span.lo, span.hi) == (4, 64)
    assert str(c.graph.outputs[0].type) in (f"f32[3*{name} - 6]", f"f32[3*({name} - 2)]")


def test_results_and_mutations() -> None:
    def fn(x: torch.Tensor) -> Any:
        a = x * 2
        x.add_(1)
        return a, a[1:], x

    c = captured(fn, torch.randn(4, 3))
    assert c.mutations == [Mutation(argument=0, output=0)]
    assert c.results == [ValueResult(1), AliasResult(ValueResult(1), (3, 3), (3, 1), 3)]  # x itself is returned by Dynamo
    view = captured(lambda x: x.t(), torch.randn(4, 3))
    assert view.results == [AliasResult(ArgumentResult(0), (3, 4), (1, 3), 0)]


def test_literals() -> None:
    c = captured(lambda x: x * torch.tensor([1.0, 2.0]) + torch.tensor(3.0), torch.randn(2))
    assert [t.tolist() for t in c.constants.values()] == [[1.0, 2.0]]
    assert any(n.op.name == "constant" and n.attrs["value"] == 3.0 for n in c.graph)


def test_views_are_called_in_their_copying_form() -> None:
    c = captured(lambda x: x.unfold(0, 0, 1).cos(), torch.randn(5))  # windows of nothing
    assert [n.attrs["target"] for n in c.graph if n.op.name == "aten"] == ["aten.unfold_copy.default"]


def test_random_operators_are_effects() -> None:
    c = captured(lambda x: torch.rand_like(x.t()) + 1, torch.randn(2, 3))
    (node,) = (n for n in c.graph if n.op.name == "aten")
    assert node.has_effect and node.attrs["effect"] == "random" and node.attrs["layouts"] == ((1, 3),)


REFUSED: list[tuple[str, Callable[[torch.Tensor], Any], str]] = [
    ("control flow", lambda x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)), "cond"),
    ("quantized", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize(), "quantized|qint8"),
    ("storage outside", lambda x: x[1:].clone().as_strided((2, 2), (9, 1)), "as_strided"),
]


@pytest.mark.parametrize(("name", "fn", "reason"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refusals(name: str, fn: Callable[[torch.Tensor], Any], reason: str) -> None:
    torch._dynamo.reset()
    if name == "storage outside":
        pytest.importorskip("torch")
        with pytest.raises((Uncapturable, RuntimeError)):
            captured(fn, torch.randn(3))
        return
    with pytest.raises(Uncapturable, match=reason) as error:
        captured(fn, torch.randn(3))
    assert error.value.loc is not None and error.value.loc.file.endswith("test_fx.py")


def test_data_dependent_sizes_are_refused() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), pytest.raises(Uncapturable, match="data-dependent size u0"):
        captured(lambda x: x.nonzero() + 1, torch.randn(3))


def test_names() -> None:
    assert clean_name("L['self']._modules['encoder']._modules['0']._parameters['weight']") == "encoder.0.weight"
    assert clean_name("L['x']") == "L.x"

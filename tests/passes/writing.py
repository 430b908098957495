"""Small graphs for pass tests, written through the builder: inputs by type, one expression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graphopt.ir import Builder, DType, Graph, TensorType, Value, dims, parse_graph
from graphopt.ir.dims import Range

B = dims.symbol("B")
Expression = Callable[..., Any]


def types_of(text: str) -> list[TensorType]:
    """Tensor types from text such as ``f32[B, 4] i64[3]``."""
    listed = text.replace("] ", "]|").split("|")
    arguments = ", ".join(f"%a{i}: {t}" for i, t in enumerate(listed))
    g = parse_graph(f"graph @t({arguments}) -> {listed[0]} where 1 <= B <= 64 {{ return %a0 }}")
    return [v.type for v in g.inputs]


def written(inputs: str, expression: Expression, weights: Sequence[int] = ()) -> Graph:
    """The graph of ``expression(builder, *inputs)``, a value or several.

    Args:
        inputs: their types, as text.
        weights: which of them are frozen.
    """
    g = Graph("g", {"B": Range(1, 64)})
    values: list[Value] = [g.add_input(t, f"a{i}", weight=i in weights) for i, t in enumerate(types_of(inputs))]
    result = expression(Builder(g), *values)
    g.set_outputs([result] if isinstance(result, Value) else list(result))
    return g


def constant(b: Builder, value: Any, dtype: str) -> Value:
    return b.constant(value, DType.named(dtype))


def ops(g: Graph) -> list[str]:
    return [n.name for n in g.nodes()]

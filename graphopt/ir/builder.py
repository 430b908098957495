"""Builder: one method an op, at an insertion point. ``b.add(x, 2.0)`` makes the node and returns its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graphopt.ir import types
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph, Loc, Node, Value, copy_nodes
from graphopt.ir.ops import OPS, Trait, op
from graphopt.ir.types import DType, TensorType


class Builder:
    """Creates nodes in a graph.

    Every op of the table is a method: operands are positional, attributes are keywords; the result is the Value (or a
    tuple of them). In pointwise ops a Python number stands for a scalar constant of the other operands' dtype.

    Args:
        graph: where to build.
        before: insertion point; None appends.
        loc: the source line given to new nodes.
    """

    def __init__(self, graph: Graph, before: Node | None = None, loc: Loc | None = None) -> None:
        self.graph, self.before, self.loc = graph, before, loc

    def __getattr__(self, name: str) -> Callable[..., Any]:
        definition = OPS.get(name)
        if definition is None:
            op(name)  # raises with the nearest name
        assert definition is not None

        def build(*operands: Any, **attrs: Any) -> Any:
            return self.create(name, operands, attrs)

        return build

    def create(self, name: str, operands: Sequence[Any], attrs: dict[str, Any] | None = None) -> Any:
        """Create a node of any op; numbers among the operands of a pointwise op become constants."""
        definition = op(name)
        if any(not isinstance(v, Value) for v in operands):
            operands = self._lift(name, definition.has(Trait.POINTWISE), operands)
        node = self.graph.create(definition, operands, attrs, before=self.before, loc=self.loc)
        return node.results[0] if len(node.results) == 1 else node.results

    def _lift(self, name: str, pointwise: bool, operands: Sequence[Any]) -> list[Value]:
        dtypes = [v.dtype for v in operands[1 if name == "where" else 0 :] if isinstance(v, Value)]
        if not pointwise or not dtypes:
            raise TypeError(f"{name}: operands must be Values, got {operands!r}")
        return [v if isinstance(v, Value) else self.constant(v, dtypes[0]) for v in operands]

    def constant(self, value: float | complex | Dim, dtype: DType = types.f32) -> Value:
        """A scalar constant of rank 0; a number is stored as the dtype holds it."""
        if isinstance(value, bool | int | float) and not dtype.is_complex:
            value = bool(value) if dtype.is_bool else float(value) if dtype.is_float else int(value)
        return self.graph.create(op("constant"), (), {"value": value, "dtype": dtype}, before=self.before, loc=self.loc).result

    def full(self, shape: Sequence[Dim], value: float | complex, dtype: DType = types.f32) -> Value:
        """A constant tensor: a scalar, broadcast."""
        scalar = self.constant(value, dtype)
        return self.broadcast_to(scalar, shape=tuple(shape)) if shape else scalar

    def cast(self, x: Value, dtype: DType) -> Value:
        """Convert; nothing is created when the dtype is that already."""
        return x if x.dtype == dtype else self.create("cast", [x], {"dtype": dtype})

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        """Permute axes; nothing is created for the identity."""
        return x if tuple(perm) == tuple(range(x.type.rank)) else self.create("transpose", [x], {"perm": tuple(perm)})

    def reshape(self, x: Value, shape: Sequence[Dim]) -> Value:
        """Reshape; nothing is created when the shape is that already."""
        return x if x.shape == tuple(shape) else self.create("reshape", [x], {"shape": tuple(shape)})

    def broadcast_to(self, x: Value, shape: Sequence[Dim]) -> Value:
        """Broadcast; nothing is created when the shape is that already."""
        return x if x.shape == tuple(shape) else self.create("broadcast_to", [x], {"shape": tuple(shape)})

    def aten(self, target: str, operands: Sequence[Value], types: Sequence[TensorType], args: Any, kwargs: Any = (),
             effect: str = "none", layouts: Any = ()) -> tuple[Value, ...]:  # fmt: skip
        """A library call; see the op ``aten``."""
        attrs = {"target": target, "args": args, "kwargs": kwargs, "effect": effect, "layouts": layouts}
        return self.graph.create(op("aten"), operands, attrs, before=self.before, loc=self.loc, types=types).results

    def inline(self, body: Graph, operands: Sequence[Value]) -> list[Value]:
        """Copy a graph's nodes here, its inputs bound to operands; returns the values of its outputs."""
        mapping = dict(zip(body.inputs, operands, strict=True))
        copy_nodes(body.nodes(), mapping, self.graph, self.before)
        return [mapping[v] for v in body.outputs]

    def expand(self, node: Node) -> Value:
        """Build the expansion of a composite node with one result here."""
        (value,) = self.expand_all(node)
        return value

    def expand_all(self, node: Node) -> tuple[Value, ...]:
        """Build the expansion of a composite node here: a value for each of its results."""
        if node.op.expand is None:
            raise TypeError(f"{node.op.name} has no expansion")
        values = node.op.expand(self, node)
        return values if isinstance(values, tuple) else (values,)

"""What the kernel of an integer product does on the way: rounding its rows, each once before anything is multiplied, and making floats."""

from __future__ import annotations

from graphopt.ir import dims, types
from graphopt.ir.graph import Node, Value
from graphopt.ir.ops import Trait


def rounding_of(product: Node) -> dict[Node, None]:
    """The nodes between a product's left factor as floats and as integers: ``quantize``, and what makes its scales of the same rows.

    Scales that are not made of the rows' largest magnitudes stay outside; nothing, if the factor is not rounded.
    """
    node = product.operands[0].producer if product.op.name == "matmul" and product.attrs["acc"] is not None else None
    if node is None or node.op.name != "quantize" or len(node.operands) != 2 or node.operands[0].dtype != types.f32:
        return {}
    scale = _scale(node.operands[0], node.operands[1])
    return {node: None, **(scale or {})}


def product_of_integers(node: Node) -> Node | None:
    """The integer product that a node makes floats of the sums of; its kernel does that before it writes anything."""
    product = node.operands[0].defined_by("matmul") if node.op.name == "dequantize" else None
    return product if product is not None and product.attrs["acc"] is not None else None


def _scale(x: Value, scale: Value) -> dict[Node, None] | None:
    """The nodes that make scales of ``x``, one a row; None if they are made otherwise."""
    found, stack = dict[Node, None](), [scale]
    while stack:
        v = stack.pop()
        if v.type.rank == 0:  # one number for all rows, which comes from outside
            continue
        node = v.producer
        if node is None:
            return None
        if node.op.has(Trait.CREATION) or node in found:
            continue
        found[node] = None
        if node.op.name == "max":
            inner = v.producer.operands[0].producer if v.producer is not None else None
            last = node.attrs["keepdims"] and [a % x.type.rank for a in node.attrs["axes"]] == [x.type.rank - 1]
            if not last or inner is None or inner.op.name != "abs" or inner.operands[0] is not x:
                return None
            found[inner] = None
        elif node.op.has(Trait.POINTWISE) and dims.same_shape(v.shape, (*x.shape[:-1], 1)):
            stack += node.operands
        else:
            return None
    return found

"""What the kernel of an integer product does on the way: rounding its first factor, before anything is multiplied, and making floats."""

from __future__ import annotations

from graphopt.ir import dims, types
from graphopt.ir.graph import Node, Value, is_view
from graphopt.ir.ops import Trait

INTEGER_PRODUCTS = ("matmul", "conv")


def rounding_of(product: Node) -> dict[Node, None]:
    """The nodes between a product's left factor as floats and as integers: ``quantize``, and what makes its scales of the same rows.

    Scales that are not made of the rows' largest magnitudes stay outside; nothing, if the factor is not rounded. An image is rounded by the
    kernel that computes it, unless its floats are wanted, too: then it is by each convolution that reads it, all scales outside.
    """
    if product.op.name not in INTEGER_PRODUCTS or product.attrs["acc"] is None:
        return {}
    node = product.operands[0].producer
    inner = node.operands[0].defined_by("quantize") if node is not None and node.op.name == "cast" else None
    if node is not None and inner is not None and inner.operands[0].dtype == types.f32:  # to floats of 8 bits, which bf16 holds
        return {node: None, inner: None, **(_scale(*inner.operands) or {})}
    if node is not None and node.op.name == "cast" and node.operands[0].dtype == types.f32:
        x = node.operands[0]
        follows = x.producer is not None and not is_view(x.producer) and x.has_one_use and node.result.has_one_use
        return {} if follows else {node: None}  # where it follows one kernel alone, that may write what is rounded
    if node is None or node.op.name != "quantize" or len(node.operands) != 2 or node.operands[0].dtype != types.f32:
        return {}
    if product.op.name == "conv":
        return {node: None} if _wanted(node.operands[0]) else {}
    scale = _scale(node.operands[0], node.operands[1])
    return {node: None, **(scale or {})}


def _wanted(x: Value) -> bool:
    """Whether floats are in memory anyway: they come from outside or through a view, or more than one rounding reads them."""
    return x.producer is None or is_view(x.producer) or not x.has_one_use


def product_of_integers(node: Node) -> Node | None:
    """The integer product that a node makes floats of the sums of; its kernel does that before it writes anything."""
    product = node.operands[0].defined_by(*INTEGER_PRODUCTS) if node.op.name == "dequantize" else None
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

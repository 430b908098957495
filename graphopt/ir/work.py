"""What a computation must do at least: arithmetic of its products, bytes that it reads and writes. A size where sizes are symbolic.

    flops(matmul(a[M, K], b[K, N])) = 2*M*N*K        bytes = a + b + result, each once

A fusion does what its body does, and moves only what crosses its border.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from graphopt.ir import dims
from graphopt.ir.dims import Dim, Shape
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import Trait
from graphopt.ir.opset.attention import seen_pairs
from graphopt.ir.opset.attention_training import GIVEN


def flops(node: Node) -> Dim:
    """Additions and multiplications of matrix products, convolutions and attention; what is pointwise is not counted.

    Of an attention the keys count that its predicates leave: half of them where it is causal.
    """
    if isinstance(node.body, Graph):
        return _sum(flops(n) for n in node.body.nodes())
    if node.op.name == "matmul":
        return dims.numel([2, *node.result.shape, node.operands[0].shape[-1]])
    if node.op.name == "conv":
        w = node.operands[1].shape
        return dims.numel([2, *node.result.shape, *(w[:-1] if node.attrs["channels_last"] else w[1:])])
    if node.op.name in ("attention", "attention_forward"):
        queries, keys, values = (x.shape for x in node.operands[:3])
        return _products_of_pairs(node, queries, keys, dims.add(queries[-1], values[-1]))
    if node.op.name == "attention_backward":  # scores again, and the gradients of all four factors
        queries, keys, values = (x.shape for x in node.operands[GIVEN : GIVEN + 3])
        return _products_of_pairs(node, queries, keys, dims.add(dims.mul(3, queries[-1]), dims.mul(2, values[-1])))
    return 0


def _products_of_pairs(node: Node, queries: Shape, keys: Shape, depth: Dim) -> Dim:
    """Products over pairs of a row and a key, that sum so much a pair in all."""
    return dims.numel([2, *node.results[0].shape[:-2], seen_pairs(node.attrs, queries[-2], keys[-2]), depth])


def bytes_moved(node: Node) -> Dim:
    """Bytes that a node reads and writes: each operand and each result once; of a table from which rows are taken, those rows."""
    written = _sum(r.type.nbytes() for r in node.results)
    if node.op.has(Trait.VIEW):  # copied as a node of its own
        return dims.add(_least(node.operands[0].type.nbytes(), written), written)
    return _sum([*(_read_by(node, v) for v in dict.fromkeys(node.operands)), written])


def bytes_read(value: Value) -> Dim:
    """Bytes of a value that all of its readers together need, once: none where nobody reads it."""
    return _least(value.type.nbytes(), _sum(_read_by(n, value) for n in value.users))


def _read_by(node: Node, value: Value) -> Dim:
    """Bytes that one node reads of a value: rows that it takes, and of a view what the view's readers read."""
    whole = value.type.nbytes()
    if isinstance(node.body, Graph):
        inside = (x for x, v in zip(node.body.inputs, node.operands, strict=True) if v is value)
        return _least(whole, _sum(map(bytes_read, inside)))
    if node.op.name == "take" and value not in node.operands[1:]:
        return _least(whole, node.result.type.nbytes())
    if node.op.has(Trait.VIEW):
        return _least(whole, bytes_read(node.result))
    return whole


def _sum(sizes: Iterable[Dim]) -> Dim:
    return dims.simplify(sum(sizes))


def _least(a: Dim, b: Dim) -> Dim:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else dims.simplify(sympy.Min(a, b))

"""What a model must do at least, counted from the captured graph: arithmetic of its products, bytes of the weights it reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from graphopt.ir import dims
from graphopt.ir.graph import Graph, Node, Value


@dataclass(frozen=True)
class Work:
    """Attributes:
        flops: additions and multiplications of matrix products, convolutions and attention; what is pointwise is not counted.
        weight_bytes: every weight once; of a table from which only rows are taken, those rows.
    """

    flops: int
    weight_bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.weight_bytes + other.weight_bytes)


def count(graph: Graph) -> Work | None:
    """The work of a graph; None if it has symbolic sizes."""
    if graph.symbols:
        return None
    return Work(sum(_flops(n) for n in graph.nodes()), sum(_bytes_read(v) for v in graph.inputs if v.weight))


def _size(shape: Iterable[dims.Dim]) -> int:
    return prod(int(d) for d in shape)


def _flops(node: Node) -> int:
    if node.op.name == "matmul":
        return 2 * _size(node.result.shape) * _size(node.operands[0].shape[-1:])
    if node.op.name == "conv":
        w = node.operands[1].shape
        return 2 * _size(node.result.shape) * _size(w[:-1] if node.attrs["channels_last"] else w[1:])
    if node.op.name == "attention":
        queries, keys = node.operands[0].shape, node.operands[1].shape
        scores = _size(queries[:-1]) * _size(keys[-2:-1])
        return 2 * scores * (_size(queries[-1:]) + _size(node.result.shape[-1:]))
    return 0


def _bytes_read(weight: Value) -> int:
    whole = int(weight.type.nbytes())
    users = weight.users
    if users and all(n.op.name == "take" and n.operands[0] is weight for n in users):
        return min(whole, sum(int(n.result.type.nbytes()) for n in users))
    return whole if users else 0

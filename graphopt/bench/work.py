"""What a model must do at least, counted from the captured graph: arithmetic of its products, bytes of the weights it reads."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir import work
from graphopt.ir.graph import Graph


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
    weights = (v for v in graph.inputs if v.weight)
    return Work(sum(int(work.flops(n)) for n in graph.nodes()), sum(int(work.bytes_read(w)) for w in weights))

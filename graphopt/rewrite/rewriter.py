"""Rewriter: a builder placed at the node that is rewritten."""

from __future__ import annotations

from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph, Node


class Rewriter(Builder):
    """Builds before a node and takes over its source line."""

    def __init__(self, graph: Graph, at: Node) -> None:
        super().__init__(graph, before=at, loc=at.loc)

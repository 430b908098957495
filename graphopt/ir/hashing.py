"""Structural hash: equal for graphs that differ only in names and source lines."""

from __future__ import annotations

import hashlib

from graphopt.ir.graph import Graph
from graphopt.ir.printer import print_graph


def canonical_text(graph: Graph) -> str:
    """The text that the hash is taken of: no names, no source lines."""
    return print_graph(graph, canonical=True)


def structural_hash(graph: Graph) -> str:
    """SHA-256 of the canonical text, in hex."""
    return hashlib.sha256(canonical_text(graph).encode()).hexdigest()


def structurally_equal(a: Graph, b: Graph) -> bool:
    """Whether two graphs are the same but for names and source lines."""
    return canonical_text(a) == canonical_text(b)

"""The typed IR: sizes, types, ops, graphs, text, reference semantics. See docs/architecture.md."""

import graphopt.ir.opset  # noqa: F401  (fills the op table)
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph, Listener, Loc, Node, Value
from graphopt.ir.hashing import structural_hash, structurally_equal
from graphopt.ir.interpreter import evaluate
from graphopt.ir.ops import OPS, OpDef, Trait
from graphopt.ir.text import parse_graph, print_graph
from graphopt.ir.types import DType, TensorType
from graphopt.ir.verify import verify

__all__ = [
    "OPS", "Builder", "DType", "Graph", "Listener", "Loc", "Node", "OpDef", "TensorType", "Trait", "Value",
    "evaluate", "parse_graph", "print_graph", "structural_hash", "structurally_equal", "verify",
]  # fmt: skip

"""Any region, node by node: each reduction and product gets a loop nest of its own, everything else is computed in place.

The template of pointwise and reduction regions, and the way out for forms that a special template declines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.backends.forms.support import SCANS, SCATTERS, is_materialized, materialized
from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.argreduce import ArgReduction
from graphopt.backends.tvm.code import Code, Index
from graphopt.backends.tvm.elementwise import scratch
from graphopt.backends.tvm.expr import Arguments, Expressions, Source
from graphopt.backends.tvm.loops import Tuning
from graphopt.backends.tvm.narrow import NarrowReduction
from graphopt.backends.tvm.pieces import write_output
from graphopt.backends.tvm.pool import Pool
from graphopt.backends.tvm.product import emit_product
from graphopt.backends.tvm.scan import Scan
from graphopt.backends.tvm.scatter import Scatter
from graphopt.errors import BuildError
from graphopt.ir import dims
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import Trait
from graphopt.ir.opset.window import WINDOWS


def emit_nest(graph: Graph, tuning: Tuning, in_place: bool = False) -> Code:
    """The kernel of a region whose composites are expanded.

    Args:
        in_place: updates by index go into the operand's own memory.
    """
    code = Code(graph.symbols)
    args = Arguments(code, graph)
    sources: dict[Value, Source] = {}
    for node in graph.nodes():
        if is_materialized(node):
            _materialize(args, sources, node, tuning, in_place)
    for k, v in enumerate(graph.outputs):
        if _sole_output(graph, v) is None and not _finished_by_scan(graph, v):
            write_output(args, sources, k, tuning)
    return code


def _finished_by_scan(graph: Graph, v: Value) -> bool:
    """Whether a region is one scan with only pointwise work of its shape after it: each element is finished where it is made."""
    nodes = materialized(graph)
    if len(nodes) != 1 or nodes[0].name not in SCANS or len(graph.outputs) != 1:
        return False
    below = {nodes[0].result: None}
    for node in graph.nodes():
        if any(x in below for x in node.operands):
            if not node.op.has(Trait.POINTWISE) or not dims.same_shape(node.result.shape, nodes[0].result.shape):
                return False
            below[node.result] = None
    return v in below


def _sole_output(graph: Graph, v: Value) -> int | None:
    """Which output a computed node's result is, if it is used for nothing else."""
    if v.producer is None or not is_materialized(v.producer) or len(v.uses) != 1 or v.uses[0][0] is not graph.ret:
        return None
    return v.uses[0][1]


def _materialize(args: Arguments, sources: dict[Value, Source], node: Node, tuning: Tuning, in_place: bool) -> None:
    code, value = args.code, node.result
    k = _sole_output(args.graph, value)
    if node.name in SCATTERS:
        if k is None:
            raise BuildError(f"{node.name} that is not the region's result")
        return Scatter(args, sources, node, tuning, k, in_place).emit()
    before = dict(sources)
    if k is None and _finished_by_scan(args.graph, args.graph.outputs[0]):

        def sink(index: Sequence[Index], v: Any) -> None:
            out = args.graph.outputs[0]
            made = Expressions(args, {**before, value: lambda _: v})
            args.store(0, index, made.at(out, index))
    elif k is not None:

        def sink(index: Sequence[Index], v: Any) -> None:
            args.store(k, index, v)
    else:
        dtype = scalar.STORAGE[value.dtype] if value.dtype.is_bool else scalar.COMPUTE[value.dtype]
        buffer, address = scratch(args, value, dtype)

        def sink(index: Sequence[Index], v: Any) -> None:
            code.store(buffer, address(index), v.astype("uint8") if value.dtype.is_bool else v)

        def source(index: Sequence[Index]) -> Any:
            held = code.load(buffer, address(index))
            return scalar.load(held, value.dtype) if value.dtype.is_bool else held

        sources[value] = source
    known = {v: s for v, s in sources.items() if v is not value}
    if node.name == "matmul":
        emit_product(args, known, node, tuning, sink)
    elif node.name in WINDOWS:
        Pool(args, known, node, tuning, sink).emit()
    elif node.name in SCANS:
        Scan(args, known, node, tuning, sink).emit()
    else:
        kind = ArgReduction if node.name.startswith("arg") else NarrowReduction
        kind(args, known, node, tuning, sink).emit()
    return None

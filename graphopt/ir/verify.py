"""The structural check: what must hold of every graph between two passes."""

from __future__ import annotations

from graphopt.errors import TypeInferenceError, VerifyError, counted
from graphopt.ir import dims
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import OPS
from graphopt.ir.printer import print_node


def verify(graph: Graph) -> None:
    """Check a graph and the graphs nested in it.

    Checked: every operand is defined before its use; use lists agree with operands; ops and attributes are known; types
    are what inference gives; a fusion's operands fit its body; every symbol in a size has a range.

    Raises:
        VerifyError: names the node, with its source line.
    """
    defined: dict[Value, None] = dict.fromkeys(graph.inputs)
    for v in graph.inputs:
        _check_symbols(graph, v, None)
    for node in graph.nodes():
        _check_node(graph, node, defined)
        for r in node.results:
            _check_symbols(graph, r, node)
            defined[r] = None
    _check_links(graph, graph.ret, defined)
    if len(graph.output_strides) != len(graph.outputs):
        layouts, outputs = counted(len(graph.output_strides), "output layout"), counted(len(graph.outputs), "output")
        raise VerifyError(f"@{graph.name}: {layouts} for {outputs}")
    for v in defined:
        for user, i in v.uses:
            if user.erased or user.operands[i] is not v or user.graph is not graph:
                raise VerifyError(f"@{graph.name}: {v!r} lists a use that does not exist: {user!r}")


def _fail(node: Node, message: str) -> VerifyError:
    where = f" ({node.loc})" if node.loc else ""
    return VerifyError(f"@{node.graph.name}: {message}\n  {print_node(node)}{where}")


def _check_links(graph: Graph, node: Node, defined: dict[Value, None]) -> None:
    for i, v in enumerate(node.operands):
        if v not in defined:
            raise _fail(node, f"operand {i} ({v!r}) is not defined before its use")
        if (node, i) not in v._uses:
            raise _fail(node, f"operand {i} ({v!r}) does not know of this use")


def _check_node(graph: Graph, node: Node, defined: dict[Value, None]) -> None:
    _check_links(graph, node, defined)
    if OPS.get(node.op.name) is not node.op:
        raise _fail(node, f"unknown op {node.op.name!r}")
    try:
        node.op.complete(node.attrs)
        if node.body is not None:
            verify(node.body)
            expected = [v.type.logical for v in node.body.outputs]
            inner = [v.type for v in node.body.inputs]
            if len(inner) != len(node.operands):
                raise _fail(node, f"the body takes {counted(len(inner), 'input')}")
            for v, t in zip(node.operands, inner, strict=True):
                if v.dtype != t.dtype or not dims.same_shape(v.shape, t.shape, graph.symbols):
                    raise _fail(node, f"the body expects {t}, the operand is {v.type}")
        elif node.op.infer is not None:
            expected = [t.logical for t in node.op.infer([v.type for v in node.operands], node.attrs)]
        else:
            return
    except TypeInferenceError as error:
        raise _fail(node, str(error)) from error
    for result, t in zip(node.results, expected, strict=True):
        if result.dtype != t.dtype or not dims.same_shape(result.shape, t.shape, graph.symbols):
            raise _fail(node, f"the result is declared {result.type}, inference gives {t}")


def _check_symbols(graph: Graph, value: Value, node: Node | None) -> None:
    for name in dims.free_symbols(value.shape):
        if name not in graph.symbols:
            message = f"the symbol {name} of {value!r} has no range"
            raise _fail(node, message) if node else VerifyError(f"@{graph.name}: {message}")

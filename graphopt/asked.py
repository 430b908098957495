"""What was asked for by name and came to nothing: said in the report, and as a warning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from graphopt.ir.graph import Graph, Node
from graphopt.options import Options
from graphopt.passes.precision.autocast import Autocast
from graphopt.passes.quantization.scheme import Scheme
from graphopt.remarks import Remark


def came_to_nothing(options: Options, graph: Graph, remarks: Iterable[Remark]) -> list[str]:
    """A line for each of ``quantize`` and ``precision`` that was asked for and changed nothing, with the reason.

    Nothing of a graph that has no product with a matrix: of a model in several graphs, some are like that.

    Args:
        graph: after the passes.
        remarks: of the passes.
    """
    remarks, out = list(remarks), list[str]()
    if not any(v.weight and v.type.rank > 1 for v in graph.inputs) and not any(_is_product(n) for n in graph.nodes()):
        return out
    if options.quantize:
        names = {p.name for p in Scheme.parse(options.quantize).make()}
        out.append(_reason(f"quantize={options.quantize!r}", names, graph, remarks))
    if options.precision:
        out.append(_reason(f"precision={options.precision!r}", {Autocast.name}, graph, remarks))
    return [line for line in out if line]


def _is_product(node: Node) -> bool:
    return (node.attrs["kind"] if node.op.name == "fusion" else node.op.name) in ("matmul", "conv")


def _reason(asked: str, passes: set[str], graph: Graph, remarks: list[Remark]) -> str:
    mine = [r for r in remarks if r.pass_name in passes]
    if any(r.kind == "passed" for r in mine):
        return ""
    if not any(v.weight for v in graph.inputs):
        return f"{asked} changed nothing: no weight is frozen, as gradients are recorded: call the model under torch.no_grad()"
    missed = Counter(r.message for r in mine if r.kind == "missed")
    if not missed:
        return f"{asked} changed nothing: no product of f32 with a weight was found"
    return f"{asked} changed nothing: " + "; ".join(f"{message} ({n}x)" if n > 1 else message for message, n in missed.most_common(3))

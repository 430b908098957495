"""What was asked for by name and came to nothing: said in the report, and as a warning."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable

from graphopt.ir.graph import Graph, is_view
from graphopt.ir.ops import Trait
from graphopt.options import Options
from graphopt.passes.precision.autocast import Autocast
from graphopt.passes.quantization.scheme import Scheme
from graphopt.remarks import Remark
from graphopt.report import Report

NOT_FROZEN = "gradients are recorded, so no weight is frozen and nothing is folded or packed ahead: for inference, use torch.no_grad()"
IN_TRAINING_MODE = "the model is in training mode: dropout and batch norm do what they do in training; call model.eval() for inference"


def came_to_nothing(options: Options, products: bool, remarks: Iterable[Remark]) -> list[str]:
    """A line for each of ``quantize`` and ``precision`` that was asked for and changed nothing, with the reason.

    Args:
        products: whether there was a product with a weight, before the passes; of a model in several graphs, some have none.
        remarks: of the passes.
    """
    remarks, out = list(remarks), list[str]()
    if not products or options.fuel is not None or options.skip_rewrites:
        return out
    if options.quantize:
        names = {p.name for p in Scheme.parse(options.quantize).make()}
        out.append(_reason(f"quantize={options.quantize!r}", names, remarks))
    if options.precision:
        out.append(_reason(f"precision={options.precision!r}", {Autocast.name}, remarks))
    return [line for line in out if line]


def has_products(graph: Graph) -> bool:
    """Whether a matrix product, a convolution, or what the IR does not know, reads a frozen matrix, as it is or through views."""
    weights = {v for v in graph.inputs if v.weight and v.type.rank > 1}
    for node in graph.nodes():
        reads = any(x in weights for x in node.operands)
        if reads and (node.op.name in ("matmul", "conv") or node.op.has(Trait.OPAQUE)):
            return True
        if reads and (is_view(node) or node.op.name == "cast"):
            weights |= set(node.results)
    return False


def in_training(options: Options) -> list[str]:
    """What ``quantize`` and ``precision`` come to where gradients are recorded, a line each: nothing."""
    asked = [f"{name}={value!r}" for name, value in (("quantize", options.quantize), ("precision", options.precision)) if value]
    why = "no weight is frozen, as gradients are recorded: call the model under torch.no_grad()"
    return [f"{what} changed nothing: {why}" for what in asked]


def say(report: Report, notes: Iterable[str]) -> None:
    """In the report, and as warnings."""
    for note in notes:
        report.notes.append(note)
        warnings.warn(note, stacklevel=3)


def _reason(asked: str, passes: set[str], remarks: list[Remark]) -> str:
    mine = [r for r in remarks if r.pass_name in passes]
    if any(r.kind == "passed" for r in mine):
        return ""
    missed = Counter(r.message for r in mine if r.kind == "missed")
    if not missed:
        return f"{asked} changed nothing: no product of f32 with a weight was found"
    return f"{asked} changed nothing: " + "; ".join(f"{message} ({n}x)" if n > 1 else message for message, n in missed.most_common(3))

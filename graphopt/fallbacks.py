"""No silent fallback: what runs through library kernels is reported, and an error where nobody asked for it."""

from __future__ import annotations

import torch

from graphopt.compiled import LibraryGraph
from graphopt.errors import FallbackError, counted
from graphopt.graphed import not_recorded
from graphopt.ir.graph import Node
from graphopt.lower import LibraryStep, Lowered
from graphopt.options import Options
from graphopt.report import WHOLE, Fallback, Report, record


def report_fallbacks(report: Report, lowered: Lowered, options: Options) -> None:
    """List the library calls. Raises FallbackError under ``strict`` for one that was not asked for."""
    report.fallbacks = [_fallback(s) for s in lowered.steps if isinstance(s, LibraryStep) and s.node.op.name != "constant"]
    if options.strict and report.unasked_fallbacks:
        raise FallbackError(_strict_message(report))


def _fallback(step: LibraryStep) -> Fallback:
    node = step.node
    operands = ", ".join(str(v.type) for v in node.operands)
    results = ", ".join(str(r.type) for r in node.results)
    return Fallback(operation_name(node), f"({operands}) -> {results}", step.reason, str(node.loc or ""), step.asked)


def operation_name(node: Node) -> str:
    """What to call a node in reports: the ATen operator, the ops of a fused region, or the IR op."""
    if node.op.name == "aten":
        return str(node.attrs["target"])
    if node.body is not None:
        return " + ".join(dict.fromkeys(n.op.name for n in node.body if n.op.name != "constant"))
    return node.op.name


def _strict_message(report: Report) -> str:
    count = len(report.unasked_fallbacks)
    lines = [f"{report.name}: strict is on, and {counted(count, 'operation')} {'has' if count == 1 else 'have'} no kernel:"]
    lines += [f"  {f.op} {f.types}: {f.reason}" + (f"  [{f.loc}]" if f.loc else "") for f in report.unasked_fallbacks[:8]]
    if len(report.unasked_fallbacks) > 8:
        lines.append(f"  ... and {len(report.unasked_fallbacks) - 8} more")
    return "\n".join(lines)


def fallback_graph(gm: torch.fx.GraphModule, reason: str, loc: str, options: Options, *, label: str = "model") -> LibraryGraph:
    """Run a whole graph through library kernels, as it could not be captured; reported, and an error under ``strict``."""
    fallback = Fallback(WHOLE, "", reason, loc, options.backend == "eager")
    report = Report(options.name or label, "library kernels", fallbacks=[fallback])
    if options.strict and report.unasked_fallbacks:
        raise FallbackError(_strict_message(report))
    if options.records:
        not_recorded(report, f"the graph runs through library kernels as a whole: {reason}")
    record(report)
    return LibraryGraph(gm, report)

"""``graphopt opt``: run passes on IR text."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

import graphopt.passes  # noqa: F401  (registers the passes)
from graphopt.errors import UsageError
from graphopt.ir import Graph, parse_graph, print_graph, verify
from graphopt.ir.ops import OPS, REQUIRED
from graphopt.ir.printer import format_attr
from graphopt.pass_manager import PASSES, Fuel, Instrument, Pass, PassContext, load_entry_points, parse_pipeline, run_passes
from graphopt.passes.pipelines import default_pipeline
from graphopt.remarks import Remark
from graphopt.target import Target
from graphopt.value_check import ValueCheck

EXAMPLE = """graph @mlp(%x: f32[B, 64], weight %w: f32[64, 32], %b: f32[32]) -> f32[B, 32]
where 1 <= B <= 64 {
  %0: f32[B, 32] = matmul(%x, %w)  // mlp.py:12
  %1: f32[B, 32] = add(%0, %b)
  %2: f32[B, 32] = gelu(%1)
  return %2
}
"""


class Remarks(str, Enum):
    """Which remarks to show."""

    passed = "passed"
    missed = "missed"
    all = "all"


class PrintAfter(Instrument):
    """Prints the graph after every pass, as text that can be parsed again."""

    def after(self, p: Pass, g: Graph, ctx: PassContext, changed: bool) -> None:
        typer.echo(f"// after {p}{'' if changed else ' (no change)'}", err=True)
        if changed:
            typer.echo(print_graph(g), err=True)


def opt(
    file: Annotated[str, typer.Argument(help="A file of IR text, or - for standard input.")] = "-",
    pipeline: Annotated[str | None, typer.Option("--pipeline", "-p", help="Passes, in order: a,b{option=1},c.")] = None,
    level: Annotated[int | None, typer.Option(help="Run the pipeline of an optimization level instead: 0, 1 or 2.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the result here instead of printing it.")] = None,
    check: Annotated[bool, typer.Option("--verify", help="Compare values before and after every pass, in f64 and as they are.")] = False,
    print_after_all: Annotated[bool, typer.Option("--print-after-all", help="Print the graph after every pass, on stderr.")] = False,
    remarks: Annotated[Remarks | None, typer.Option(help="Print what passes did and declined, and why, on stderr.")] = None,
    fuel: Annotated[int | None, typer.Option(min=0, help="Make at most this many rewrites.")] = None,
    skip_rewrite: Annotated[list[int] | None, typer.Option(help="Leave out the rewrite of this number. May be given again.")] = None,
    list_passes: Annotated[bool, typer.Option("--list-passes", help="List the passes and their options.")] = False,
    target: Annotated[str, typer.Option("--target", help="The processor to choose layouts for, such as cpu:znver4.")] = "cpu",
    list_ops: Annotated[bool, typer.Option("--list-ops", help="List the ops: attributes with defaults, and what each computes.")] = False,
    example: Annotated[bool, typer.Option("--example", help="Take a built-in graph instead of a file.")] = False,
) -> None:
    """Run passes on a graph in text form, and print the result.

    \b
    graphopt opt --example > mlp.gir                       a graph to start from
    graphopt opt mlp.gir                                   check it, print it in standard form
    graphopt opt mlp.gir -p canonicalize,fuse              run two passes
    graphopt opt mlp.gir -p 'fuse{max_nodes=2}'            a pass with an option
    graphopt opt mlp.gir --level 2 --verify                the whole pipeline, values compared after every pass
    graphopt opt mlp.gir --level 2 --print-after-all       the way of the graph, pass by pass
    graphopt opt mlp.gir --level 2 --remarks missed        what was declined, and why
    graphopt opt mlp.gir --level 2 --fuel 7                only the first seven rewrites (halve it to find a culprit)
    cat mlp.gir | graphopt opt - -p fuse -o out.gir        as a filter
    """
    if list_passes:
        typer.echo(describe_passes())
        return
    if list_ops:
        typer.echo(describe_ops())
        return
    if pipeline is not None and level is not None:
        raise UsageError("--pipeline and --level exclude each other")
    passes = parse_pipeline(pipeline) if pipeline is not None else default_pipeline(level) if level is not None else []
    graph = parse_graph(EXAMPLE) if example else read_graph(file)
    ctx = PassContext(target=Target.from_name(target), fuel=Fuel(fuel, skip_rewrite or ()))
    instruments: list[Instrument] = [*([PrintAfter()] if print_after_all else []), *([ValueCheck()] if check else [])]
    run_passes(graph, passes, ctx, instruments)
    show_remarks(ctx.remarks, remarks)
    write(print_graph(graph), output)


def read_graph(file: str) -> Graph:
    """A verified graph from a file, or from standard input. Raises UsageError, ParseError or VerifyError."""
    path = Path(file)
    try:
        text = sys.stdin.read() if file == "-" else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is no text'}") from error
    graph = parse_graph(text, "<stdin>" if file == "-" else file)
    verify(graph)
    return graph


def write(text: str, output: Path | None) -> None:
    """Print a text, or write it to a file. Raises UsageError."""
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text)
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from error


def show_remarks(remarks: list[Remark], wanted: Remarks | None) -> None:
    """Print remarks of a kind on stderr; the analysis ones (what could not be compared, say) always."""
    for r in remarks:
        if r.kind == "analysis" or wanted is Remarks.all or (wanted is not None and wanted.value == r.kind):
            typer.echo(str(r), err=True)


def describe_ops() -> str:
    """One line an op: its name, its attributes with their defaults, and its equation."""
    lines = []
    for name, op in sorted(OPS.items()):
        attrs = ", ".join(k if v is REQUIRED else f"{k} = {format_attr(v)}" for k, v in op.attrs.items())
        lines.append(f"{name + (f' {{{attrs}}}' if attrs else ''):48} {op.doc}".rstrip())
    return "\n".join(lines)


def describe_passes() -> str:
    """One paragraph a pass: its name, the first line of its documentation, its options."""
    load_entry_points()
    lines = []
    for name, cls in sorted(PASSES.items()):
        summary = (cls.__doc__ or "").strip().partition("\n")[0].removesuffix(" See the module's header.")
        lines.append(f"{name:24} {summary}")
        for f in fields(cls):  # type: ignore[arg-type]
            default = "" if f.default is MISSING else f" = {f.default!r}"
            lines.append(f"{'':26}{f.name}: {f.type}{default}")
    return "\n".join(lines)

"""What each call of a compiled program costs: time, arithmetic and memory traffic, call by call.

The program runs as it always does, with a clock around every kernel and library call; what is left of a whole run's time is
what happens between them. A kernel that stands in a program is measured among its neighbours: its operands are where they
left them, in a cache or not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from graphopt.errors import counted
from graphopt.ir import dims, work
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph, Node
from graphopt.lower import KernelStep, LibraryStep
from graphopt.program import Program
from graphopt.run_delay import Undisturbed


@dataclass(frozen=True)
class CallCost:
    """One call of a program.

    Attributes:
        what: operands and result of the heaviest operation, or the operations' names.
        kind: family of the kernel, or ``library``.
        seconds: median of the runs.
        flops: additions and multiplications of matrix products, convolutions and attention.
        bytes: what must be read and written at least: each operand and each result once, of a table the rows that are taken.
        loc: the user's source line.
        step: what is called.
    """

    what: str
    kind: str
    seconds: float
    flops: int
    bytes: int
    loc: str
    step: KernelStep | LibraryStep | None = None

    @property
    def gflops(self) -> float:
        """10^9 floating-point operations a second."""
        return self.flops / self.seconds / 1e9

    @property
    def gbytes(self) -> float:
        """10^9 bytes a second."""
        return self.bytes / self.seconds / 1e9


@dataclass(frozen=True)
class Profile:
    """The calls of a program, in order.

    Attributes:
        seconds: a whole run without clocks inside, median.
        graph, sizes: what the program computes, and the values of its symbols.
    """

    calls: tuple[CallCost, ...]
    seconds: float
    graph: Graph | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    def table(self, limit: int = 30, width: int = 140) -> str:
        """Text for people: the dearest calls first, equal ones together."""
        groups: dict[tuple[str, str], list[CallCost]] = {}
        for c in self.calls:
            groups.setdefault((c.kind, c.what), []).append(c)
        inside = sum(c.seconds for c in self.calls)
        title = f"a run {self.seconds * 1e3:.2f} ms; {counted(len(self.calls), 'call')} {inside * 1e3:.2f} ms, with their clocks"
        table = Table("kind", "computes", "calls", "us", "share", "GFLOP/s", "GB/s", title=title, title_justify="left")
        ranked = sorted(groups.items(), key=lambda item: -sum(c.seconds for c in item[1]))
        for (kind, what), found in ranked[:limit]:
            total = sum(c.seconds for c in found)
            flops = f"{sum(c.flops for c in found) / total / 1e9:.0f}" if found[0].flops else ""
            gbytes = f"{sum(c.bytes for c in found) / total / 1e9:.1f}"
            table.add_row(kind, what, str(len(found)), f"{total / len(found) * 1e6:.1f}", f"{total / inside:.1%}", flops, gbytes)
        if len(ranked) > limit:
            left = sum(c.seconds for _, found in ranked[limit:] for c in found)
            table.add_row("", f"... and {len(ranked) - limit} more", "", "", f"{left / inside:.1%}", "", "")
        console = Console(file=StringIO(), width=width, highlight=False, color_system=None)
        console.print(table)
        assert isinstance(console.file, StringIO)
        return console.file.getvalue()


def profile(program: Program, inputs: Sequence[torch.Tensor], sizes: Mapping[str, int] | None = None, runs: int = 20) -> Profile:
    """Run a program and measure every call of it.

    Args:
        inputs, sizes: as the program takes them; what the program updates in place is updated in a copy.
        runs: runs with clocks, and as many without, in turns; those in which a thread waited for a processor do not count. On a GPU each
            call is waited for, so its time holds the launch, too.
    """
    graph = program.graph
    inputs = [x.clone() if i in program.written else x for i, x in enumerate(inputs)]
    bound = program.read_sizes(inputs, sizes) if graph.symbols else {}
    times: list[list[float]] = [[] for _ in program.calls]
    wait = waits_for(inputs)

    def clocked(i: int, call: Any) -> Any:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = call(*args)
            wait()
            times[i].append(time.perf_counter() - start)
            return result

        return run

    watched, took = program.wrapped(clocked), 0.0
    for _ in range(2):
        start = time.perf_counter()
        watched(inputs, sizes)
        program(inputs, sizes)
        wait()
        took = time.perf_counter() - start
    found = Undisturbed[tuple[float, list[float]]](2 * runs * took)
    while len(found.quiet) < runs and not found.hopeless:
        for seen in times:
            seen.clear()
        start = time.perf_counter()
        watched(inputs, sizes)
        between = time.perf_counter()
        program(inputs, sizes)
        wait()
        end = time.perf_counter()
        found.add(end - start, (end - between, [sum(seen) for seen in times]))
    kept, called = found.best(), [bool(seen) for seen in times]
    calls = []
    for i, step in enumerate(program.calls):
        if called[i]:  # what has no elements is not
            node = step.node
            kind, loc = step.workload.kind if isinstance(step, KernelStep) else "library", str(node.loc or "")
            flops, moved = (dims.evaluate(d, bound) for d in (work.flops(node), work.bytes_moved(node)))
            calls.append(CallCost(describe(node, bound), kind, median(each[i] for _, each in kept), flops, moved, loc, step))
    return Profile(tuple(calls), median(whole for whole, _ in kept), graph, bound)


def waits_for(inputs: Iterable[Any]) -> Callable[[], None]:
    """What waits until work on these tensors is done: a GPU still has it before it when the call returns."""
    devices = dict.fromkeys(x.device for x in inputs if isinstance(x, torch.Tensor) and x.is_cuda)

    def wait() -> None:
        for device in devices:
            torch.cuda.synchronize(device)

    return wait


def _body(node: Node) -> list[Node]:
    return list(node.body.nodes()) if isinstance(node.body, Graph) else [node]


def _sizes(shape: Sequence[Dim], bound: Mapping[str, int]) -> list[int]:
    return [dims.evaluate(d, bound) for d in shape]


def describe(node: Node, bound: Mapping[str, int]) -> str:
    """What a call computes: operands of the heaviest operation, and the names of the others."""

    def size(shape: Sequence[Dim]) -> str:
        return "x".join(map(str, _sizes(shape, bound)))

    return _title(_body(node), [r.shape for r in node.results], node.attrs.get("target", "") or node.op.name, size)


def describe_region(graph: Graph) -> str:
    """What a region computes, in the words of a profile; its sizes may be symbolic."""

    def size(shape: Sequence[Dim]) -> str:
        return "x".join(map(dims.format_dim, shape))

    return _title(list(graph.nodes()), [v.shape for v in graph.outputs], "", size)


def _title(body: Sequence[Node], results: Sequence[Sequence[Dim]], name: str, size: Callable[[Sequence[Dim]], str]) -> str:
    heavy = [n for n in body if n.op.name in ("matmul", "conv")]
    others = [n for n in body if n not in heavy and n.op.name not in ("constant", "reshape", "transpose", "slice", "broadcast_to")]
    names = ", ".join(dict.fromkeys(n.op.name for n in others))
    if not heavy:
        return f"{name if name.startswith('aten') else names or name} -> {', '.join(map(size, results))}"
    parts = []
    for n in heavy:
        stride = n.attrs["stride"][-1] if n.op.name == "conv" else 1
        by = f" / {stride}" if stride > 1 else ""
        parts.append(f"{n.op.name} {size(n.operands[0].shape)}{by} * {size(n.operands[1].shape)}")
    return "; ".join(parts) + (f"; {names}" if names else "")

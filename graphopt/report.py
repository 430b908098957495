"""Reports: what was compiled in this process, what was decided and why, for people and for programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from graphopt.errors import counted
from graphopt.remarks import Remark
from graphopt.rewrite.context import PassRun

_LARGE = 1 << 20  # bytes of staged values that are worth a note
WHOLE = "whole graph"  # Fallback.op of a graph that could not be captured
NEVER_BUILT = "built: this workload was never built here"


@dataclass(frozen=True)
class KernelInfo:
    """One kernel of a program.

    Attributes:
        name: entry point, as in the kernel's file.
        backend, kind: who made it; the family of its region.
        calls: how often a run launches it.
        cache: ``hit``, or ``built: <what differed from the nearest entry>``.
        schedule: as JSON.
        locs: the user's source lines that it implements.
        ops: the operations of its region.
        path: the built artifact; the readable kernel lies beside it.
        tuned: where the schedule is from: ``default schedule``, or ``tuned: 1.31x over the default schedule, measured 2026-01-31``.
    """

    name: str
    backend: str
    kind: str
    calls: int
    cache: str
    schedule: str
    locs: tuple[str, ...]
    ops: tuple[str, ...]
    path: str = ""
    tuned: str = "default schedule"

    @property
    def is_tuned(self) -> bool:
        return self.tuned.startswith("tuned")


@dataclass(frozen=True)
class Fallback:
    """An operation that runs through a library kernel.

    Attributes:
        op: IR or ATen operator.
        types: operand and result types.
        reason: why no kernel was generated.
        loc: the user's source line.
        asked: whether the options asked for it.
    """

    op: str
    types: str
    reason: str
    loc: str
    asked: bool


@dataclass(frozen=True)
class TunedKernel:
    """What ``mode="max-autotune"`` tried for one workload.

    Attributes:
        name: what it computes.
        trials: candidates that were tried, ``failed`` of them in vain.
        default, best: seconds of a call with the default and with the fastest schedule, timed alone; None if not known.
    """

    name: str
    trials: int
    failed: int
    default: float | None
    best: float | None


@dataclass
class GraphCalls:
    """What became of the calls of a program that CUDA graphs were asked for.

    Attributes:
        recorded: graphs that were made; ``replayed``, ``launched``: calls so far, by a graph and one kernel at a time.
        stopped: why none is a replay; empty while that may come.
    """

    recorded: int = 0
    replayed: int = 0
    launched: int = 0
    stopped: str = ""

    def __str__(self) -> str:
        calls = f"{self.recorded} recorded, {counted(self.replayed, 'call')} replayed, {self.launched} launched"
        return f"{calls}; {self.stopped}" if self.stopped else calls


@dataclass
class Report:
    """All about one compiled graph.

    Attributes:
        seconds: stage -> seconds (``passes``, ``lower``, ``tune``, ``build``, ``total``).
        tuning: what ``mode="max-autotune"`` tried.
        memory: ``planned`` (arena bytes), ``unplanned`` (sum of all intermediate buffers), ``weights``, ``staged`` (bytes kept for
            values computed from weights, beside the weights), ``outputs``, ``eager`` (the most that eager's intermediate
            results and outputs take at once), ``graphs`` (what the recordings made so far took: copies of inputs, and the pool of
            memory that CUDA graphs share); None where sizes are symbolic.
        owns_weights: staged values have taken the place of the weights that they were made from.
        pipeline: the passes, with their options.
        key: identity of the compilation: captured graph, target, and the code and options of every pass.
        text_before, text_after: the IR as captured and as lowered.
        program: the straight-line program.
        variants: reports of the variants for some sizes, in the order in which they are tried.
        condition, reason: of a variant: the sizes that it is for, and why it was made.
        runs: calls so far, where there are variants.
        graphs: what became of ``cuda_graphs``, where it was asked for.
    """

    name: str
    target: str
    passes: list[PassRun] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    kernels: list[KernelInfo] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tuning: list[TunedKernel] = field(default_factory=list)
    memory: dict[str, int | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    owns_weights: bool = False
    pipeline: list[str] = field(default_factory=list)
    key: str = ""
    text_before: str = ""
    text_after: str = ""
    program: str = ""
    variants: list[Report] = field(default_factory=list)
    condition: str = ""
    reason: str = ""
    runs: int = 0
    graphs: GraphCalls | None = None

    @property
    def kernels_built(self) -> int:
        return sum(not k.cache.startswith("hit") for k in self.kernels) + sum(v.kernels_built for v in self.variants)

    @property
    def unasked_fallbacks(self) -> list[Fallback]:
        return [f for f in self.fallbacks if not f.asked]

    @property
    def whole(self) -> str:
        """Why the graph runs through library kernels as a whole; empty if it does not."""
        return next((f.reason for f in self.fallbacks if f.op == WHOLE), "")

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        out = {k: v for k, v in vars(self).items() if k not in ("remarks", "kernels", "fallbacks", "tuning", "passes", "variants")}
        out["graphs"] = asdict(self.graphs) if self.graphs is not None else None
        out["passes"] = [run._asdict() for run in self.passes]
        for key in ("remarks", "kernels", "fallbacks", "tuning"):
            out[key] = [asdict(x) for x in getattr(self, key)]
        out["variants"] = [v.to_json() for v in self.variants]
        return out

    def summary(self, remarks: str = "missed", limit: int = 12, width: int = 120) -> str:
        """Text for people.

        Args:
            remarks: which to show: ``none``, ``passed``, ``missed`` or ``all``.
            limit: at most this many lines of each kind.
        """
        console = Console(file=StringIO(), width=width, highlight=False, color_system=None)
        times = ", ".join(f"{k} {v:.2f} s" for k, v in self.seconds.items())
        calls = counted(sum(k.calls for k in self.kernels), "kernel call")
        library = counted(len(self.fallbacks), "library call")
        tuned = sum(k.is_tuned for k in self.kernels)
        kernels = counted(len(self.kernels), "kernel") + (f" ({tuned} tuned)" if tuned else "")
        console.print(f"{self.name} for {self.target}: {calls} of {kernels}, {library}; {times}")
        if self.memory:
            console.print("memory: " + ", ".join(f"{k} {_bytes(v)}" for k, v in self.memory.items()))
            if not self.owns_weights and (self.memory.get("staged") or 0) > _LARGE:
                console.print("note: what is staged lies beside its weights; graphopt.compile(..., own_weights=True) keeps one of them")
        if self.graphs is not None:
            console.print(f"CUDA graphs: {self.graphs}", markup=False)
        for note in self.notes:
            console.print(f"note: {note}")
        self._variants(console)
        self._passes(console)
        self._tuning(console, limit)
        self._kernels(console, limit)
        self._fallbacks(console, limit)
        for kind in ("passed", "missed", "analysis"):
            if remarks in (kind, "all"):
                _remarks(console, kind, [r for r in self.remarks if r.kind == kind], limit)
        file = console.file
        assert isinstance(file, StringIO)
        return file.getvalue()

    def _variants(self, console: Console) -> None:
        if not self.variants:
            return
        table = Table("sizes", "why", "kernel calls", "library calls", "calls so far", title="variants", title_justify="left")
        for v in [*self.variants, self]:
            calls = str(sum(k.calls for k in v.kernels))
            table.add_row(v.condition or "all others", v.reason or "the general program", calls, str(len(v.fallbacks)), str(v.runs))
        console.print(table)

    def _passes(self, console: Console) -> None:
        table = Table("pass", "ms", "rewrites", "declined", "what it did", title="passes", title_justify="left")
        idle = [run for run in self.passes if not run.changed and run.first == run.last]
        for run in self.passes:
            if run in idle:
                continue
            mine = self.remarks[run.first : run.last]
            made = Counter(r.rule for r in mine if r.kind == "passed")
            what = ", ".join(f"{rule} {n}" if n > 1 else rule for rule, n in made.most_common(4)) or ("changed" if run.changed else "")
            declined = sum(r.kind == "missed" for r in mine)
            table.add_row(run.name, f"{run.seconds * 1e3:.1f}", str(made.total()), str(declined), what)
        if idle:
            others = "1 other" if len(idle) == 1 else f"{len(idle)} others"
            table.add_row(others, f"{sum(run.seconds for run in idle) * 1e3:.1f}", "0", "0", "nothing to do")
        console.print(table)

    def _tuning(self, console: Console, limit: int) -> None:
        if not self.tuning:
            return
        table = Table("kernel", "trials", "failed", "before us", "after us", "gain", title="tuned now: kernels alone", title_justify="left")
        for t in self.tuning[:limit]:
            before, after = (f"{s * 1e6:.1f}" if s else "" for s in (t.default, t.best))
            gain = f"{t.default / t.best:.2f}x" if t.default and t.best else ""
            table.add_row(t.name, str(t.trials), str(t.failed or ""), before, after, gain)
        console.print(table)

    def _kernels(self, console: Console, limit: int) -> None:
        tuned = ["schedule"] if any(k.is_tuned for k in self.kernels) else []
        table = Table("kernel", "kind", "calls", "cache", *tuned, "operations", "source", title="kernels", title_justify="left")
        for k in sorted(self.kernels, key=lambda k: -k.calls)[:limit]:
            ops = ", ".join(f"{op} {n}" if n > 1 else op for op, n in Counter(k.ops).items())
            cache = "built" if k.cache == NEVER_BUILT else k.cache
            schedule = [k.tuned.partition(", measured")[0].replace(" over the default schedule", "")] if tuned else []
            table.add_row(k.name, k.kind, str(k.calls), cache, *schedule, ops[:60], k.locs[0] if k.locs else "")
        if len(self.kernels) > limit:
            table.add_row(f"... and {len(self.kernels) - limit} more")
        console.print(table)

    def _fallbacks(self, console: Console, limit: int) -> None:
        if not self.fallbacks:
            return
        table = Table("operator", "calls", "reason", "source", title="library calls", title_justify="left")
        groups = Counter((f.op, f.reason) for f in self.fallbacks)
        first = {(f.op, f.reason): f for f in reversed(self.fallbacks)}
        for key, n in groups.most_common(limit):
            table.add_row(key[0], str(n), key[1], first[key].loc)
        console.print(table)


def _remarks(console: Console, kind: str, remarks: list[Remark], limit: int) -> None:
    groups: dict[tuple[str, str, str], list[Remark]] = {}
    for r in remarks:
        groups.setdefault((r.pass_name, r.rule, r.message), []).append(r)
    if groups:
        console.print(f"{kind}:")
    for (pass_name, rule, message), found in list(groups.items())[:limit]:
        times = f" ({len(found)} times)" if len(found) > 1 else ""
        where = f" [{found[0].loc}]" if found[0].loc else ""
        console.print(f"  {pass_name}/{rule}: {message}{times}{where}", markup=False)
        if found[0].node:
            console.print(f"      {found[0].node}", markup=False)
    if len(groups) > limit:
        console.print(f"  ... and {counted(len(groups) - limit, 'more kind')}")


def _bytes(n: int | None) -> str:
    if n is None:
        return "by size"
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


_REPORTS: list[Report] = []
_KEPT = 1000  # a long-running process that recompiles must not grow without bound


def reports() -> list[Report]:
    """Reports of all graphs compiled in this process, oldest first (the last 1,000)."""
    return list(_REPORTS)


def record(report: Report) -> None:
    """Add a report to the list."""
    _REPORTS.append(report)
    del _REPORTS[:-_KEPT]


def clear_reports() -> None:
    """Forget all reports."""
    _REPORTS.clear()

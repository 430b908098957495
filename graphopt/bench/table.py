"""Results as text: a table of times, one of ratios, and in plain words what is not claimed and why."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.bench.limits import Limits
from graphopt.bench.results import BEST, OURS, ModelResult, Results, SystemResult
from graphopt.bench.systems import system

NOTHING = "-"
LEGEND = """of limit: the time that the model's arithmetic or its weights need at the measured limits, over the median
memory: the peak while it runs, above the process with the model and its weights
compile: capture or conversion + compilation with empty / with filled caches"""
SHORT = {"onnxruntime": "ORT", "openvino": "OpenVINO", "inductor": "Inductor", "eager": "eager", BEST: "best of ORT, OpenVINO"}


def show(results: Results, console: Console) -> None:
    """Print everything."""
    console.print(heading(results))
    console.print(times_table(results))
    console.print(ratio_table(results))
    for line in remarks(results):
        console.print(line)


def heading(results: Results) -> Text:
    """The machine and its limits, in two lines."""
    m = results.machine
    text = Text(f"{m['processor']}, {m['threads']} threads; " + ", ".join(f"{k} {v}" for k, v in m["versions"].items()))
    if results.limits is None:
        return text.append(f"\nlimits not measured: {results.limits_failed}")
    return text.append(
        f"\nmeasured limits: {results.limits.flops / 1e9:.0f} GFLOP/s of f32 multiply-adds, {results.limits.bytes / 1e9:.1f} GB/s read"
    )


def times_table(results: Results) -> Table:
    """A row for each model and system."""
    table = Table(title="time of a call, error against f64, memory, compile time", title_justify="left")
    table.add_column("model")
    table.add_column("system")
    for name in ("median ms", "p10 - p90", "of limit", "error", "memory MB", "compile s"):
        table.add_column(name, justify="right")
    for model in results.models:
        for i, found in enumerate(model.systems.values()):
            label = model.name if i == 0 else _least(model, results.limits) if i == 1 else ""
            style = "bold" if found.name == model.ours else ""
            table.add_row(label, system(found.name).title, *_cells(model, found, results.limits), style=style)
        table.add_section()
    return table


def _least(model: ModelResult, limits: Limits | None) -> str:
    least = model.least_seconds(limits)
    return f"limit {milliseconds(least)} ms" if least else ""


def _cells(model: ModelResult, found: SystemResult, limits: Limits | None) -> list[str]:
    error = NOTHING if found.error is None else f"{found.error:.1e}"
    if found.times is None:
        return ["failed", "", "", "", "", ""]
    fraction = model.fraction(found.name, limits)
    return [
        milliseconds(found.times.median), f"{milliseconds(found.times.p10)} - {milliseconds(found.times.p90)}",
        NOTHING if fraction is None else f"{fraction:.0%}", error,
        NOTHING if found.memory is None else f"{found.memory / 1e6:+.0f}", _compile(found),
    ]  # fmt: skip


def _compile(found: SystemResult) -> str:
    parts = [f"{x:.1f}" for x in (found.cold, found.warm) if x is not None]
    if not parts:
        return NOTHING
    capture = f"{found.capture:.1f} + " if found.capture is not None else ""
    return capture + " / ".join(parts)


def milliseconds(seconds: float) -> str:
    """Three digits that matter."""
    ms = seconds * 1e3
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def ratio_table(results: Results) -> Table:
    """A row for each model: how many times as fast as each peer graphopt is; then the geometric means."""
    peers = results.peers()
    ours = system(results.models[0].ours).title if results.models else OURS
    table = Table(title=f"{ours} against its peers: their median time over its own, with 95% intervals", title_justify="left")
    table.add_column("model")
    for peer in peers:
        table.add_column(SHORT.get(peer, peer), justify="right")
    for model in results.models:
        table.add_row(model.name, *(_ratio(model, peer) for peer in peers))
    table.add_section()
    table.add_row("geometric mean", *(_mean(results, peer) for peer in peers))
    return table


def _ratio(model: ModelResult, peer: str) -> Text:
    value = model.ratio(peer)
    if value is not None:
        sure = value.low > 1 or value.high < 1
        text = verdict(value.value) if sure else Text(f"{int(value.value * 100) / 100:.2f}x (no difference)")
        return text.append(f" ±{math.ceil(value.uncertainty * 100)}%", style="dim")
    return Text("not claimed", style="yellow") if model.measured(peer) else Text(NOTHING, style="dim")


def verdict(ratio: float) -> Text:
    """``1.25x`` or, if graphopt is slower, ``0.80x (slower)``: never rounded in its favour."""
    if ratio >= 1:
        return Text(f"{int(ratio * 100) / 100:.2f}x", style="green")
    return Text(f"{int(ratio * 100) / 100:.2f}x (slower)", style="red")


def _mean(results: Results, peer: str) -> Text:
    mean, count = results.geometric_mean(peer)
    if mean is None:
        return Text(NOTHING, style="dim")
    return verdict(mean).append(f"\n({count} of {len(results.models)})", style="dim")


def remarks(results: Results) -> Iterator[Text]:
    """What failed, what is not claimed and why, what a reader should know."""
    for model in results.models:
        for found in model.systems.values():
            if found.failed:
                yield Text(f"{model.name}: {system(found.name).title} failed: {found.failed}", style="red")
            for note in found.notes:
                yield Text(f"{model.name}: {system(found.name).title}: {note}")
        for complaint in model.complaints():
            yield Text(f"{model.name}: no ratio is claimed: {complaint}", style="yellow")
        if not model.complaints():
            for name in model.systems:
                if name != model.ours and (doubt := model.doubts(name)):
                    yield Text(f"{model.name}: the ratio to {system(name).title} is not claimed: {doubt}", style="yellow")
        if model.before is None and any(s.times for s in model.systems.values()):
            yield Text(f"{model.name}: whether the machine was busy cannot be seen here", style="yellow")
    yield Text(LEGEND, style="dim")

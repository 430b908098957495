"""Results as a picture: a roofline with the machine's measured limits, and each system's share of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from graphopt.bench.limits import Limits
from graphopt.bench.results import Results
from graphopt.bench.systems import system
from graphopt.errors import UsageError

COLORS = {"eager": "#9a9a9a", "graphopt": "#c1272d", "inductor": "#e08a1e", "onnxruntime": "#0f75bc", "openvino": "#5b8c2a",
          "torchao": "#7b3fa0"}  # fmt: skip
LABEL = 0.032  # of the width of the axes: a line of small text
MARKERS = {"eager": "s", "graphopt": "o", "inductor": "^", "onnxruntime": "v", "openvino": "D", "torchao": "X"}


def plot(results: Results, file: Path) -> None:
    """Write a PNG (or what the suffix says).

    Raises:
        UsageError: there is no matplotlib, or there are no limits to draw against.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install matplotlib (or 'graphopt[bench]')") from error
    if results.limits is None:
        raise UsageError(f"--plot needs the machine's limits, which were not measured: {results.limits_failed}")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 2.2 + 0.55 * max(4, len(results.models))
    figure, (roof, bars) = plt.subplots(1, 2, figsize=(14, height), width_ratios=[1.1, 1], constrained_layout=True)
    _roofline(roof, results, results.limits)
    _shares(bars, results, results.limits)
    m = results.machine
    figure.suptitle(f"{m['processor']}, {m['threads']} threads, batch as in the model; medians", fontsize=10)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _roofline(axes: Any, results: Results, limits: Limits) -> None:
    """GFLOP/s over flops for each byte of weights, on logarithmic axes."""
    known = [m for m in results.models if m.work and m.work.flops and m.work.weight_bytes]
    intensities = [m.work.flops / m.work.weight_bytes for m in known if m.work] or [1.0]
    ridge = limits.flops / limits.bytes
    low, high = min(*intensities, ridge) / 3, max(*intensities, ridge) * 3
    axes.plot([low, ridge, high], [low * limits.bytes / 1e9, limits.flops / 1e9, limits.flops / 1e9], color="black", linewidth=1.5)
    axes.annotate(f"{limits.flops / 1e9:.0f} GFLOP/s: measured f32 multiply-adds", (high, limits.flops / 1e9), ha="right", va="bottom",
                  xytext=(0, 3), textcoords="offset points", fontsize=8)  # fmt: skip
    middle = math.sqrt(low * ridge)
    axes.annotate(f"{limits.bytes / 1e9:.1f} GB/s: measured read of memory", (middle, middle * limits.bytes / 1e9), ha="left", va="top",
                  xytext=(8, -2), textcoords="offset points", fontsize=8)  # fmt: skip
    lowest, highest = low * limits.bytes / 1e9, limits.flops / 1e9
    for model, x in zip(known, intensities):
        for name, found in model.systems.items():
            if found.times and model.work:
                y = model.work.flops / found.times.median / 1e9
                lowest, highest = min(lowest, y), max(highest, y)
                color, marker = look(name)
                axes.plot(x, y, marker, color=color, markersize=6, alpha=0.85, zorder=3 if name == model.ours else 2)
    floor = lowest / 4
    places = apart([math.log(x / low) / math.log(high / low) for x in intensities], LABEL)
    for place, x, model in zip(places, intensities, known):
        line = {"arrowstyle": "-", "color": "#c0c0c0", "linewidth": 0.6}
        style = {"textcoords": "axes fraction", "rotation": 90, "ha": "center", "va": "bottom", "fontsize": 8}
        axes.annotate(model.name, (x, lowest / 1.3), xytext=(place, 0.015), arrowprops=line, **style)
    axes.set(xscale="log", yscale="log", xlabel="floating-point operations for each byte of weights", ylabel="GFLOP/s",
             title="where the models stand under the limits", xlim=(low, high), ylim=(floor, highest * 1.6))  # fmt: skip
    axes.grid(which="major", alpha=0.3)


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Places in 0 .. 1, moved as little as a sweep needs so that neighbours are a gap apart; in the order given."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, i in pairwise(order):
        moved[i] = max(moved[i], moved[before] + gap)
    limit = 1.0 - gap / 2
    for i in reversed(order):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


def _shares(axes: Any, results: Results, limits: Limits) -> None:
    """Bars: each system's share of the limit, model by model."""
    names = list(dict.fromkeys(n for m in results.models for n in m.systems))
    most = 1.0
    thick = 0.8 / max(len(names), 1)
    for k, name in enumerate(names):
        for i, model in enumerate(results.models):
            share = model.fraction(name, limits)
            at = i + (k - (len(names) - 1) / 2) * thick
            if share is not None:
                most = max(most, share)
                axes.barh(at, share, thick * 0.92, color=look(name)[0])
            elif model.systems.get(name) is not None and model.systems[name].failed:
                axes.text(0.005, at, "failed", va="center", fontsize=6, color=look(name)[0])
    handles = [_handle(name) for name in names]
    axes.axvline(1.0, color="black", linewidth=1.5)
    axes.set_yticks(range(len(results.models)), [m.name for m in results.models])
    axes.invert_yaxis()
    axes.set(xlabel="least time by the limits (arithmetic or weights) over the median", title="share of the limit", xlim=(0, 1.08 * most))
    axes.legend(handles=handles, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.06), ncols=len(names), frameon=False)


def _handle(name: str) -> Any:
    from matplotlib.lines import Line2D

    color, marker = look(name)
    return Line2D([], [], color=color, marker=marker, linestyle="", label=system(name).title)


def look(name: str) -> tuple[str, str]:
    """Colour and marker of a system: in other bits, or compiled otherwise, a maker's is darker."""
    maker, form = name.partition("-")[::2]
    if not form:
        return COLORS[maker], MARKERS[maker]
    dark = 0.8 if form == "float" else 0.55
    red, green, blue = (round(int(COLORS[maker][i : i + 2], 16) * dark) for i in (1, 3, 5))
    return f"#{red:02x}{green:02x}{blue:02x}", MARKERS[maker]

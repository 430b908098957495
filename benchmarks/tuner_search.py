"""How good the search and its cost model are, judged on recorded measurements: every point of a few spaces was built and timed.

    python benchmarks/tuner_search.py build FOLDER [--only NAME] [--seconds 100]    # kernels; again until nothing is left
    python benchmarks/tuner_search.py time FOLDER [--seconds 30]                    # a quiet machine; again until nothing is left
    python benchmarks/tuner_search.py judge FOLDER [--seeds 5] [--trials 200]

``build`` and ``time`` stop after some seconds and go on where they stopped, so that they can be run in pieces. ``judge`` plays the
search against the recording, with the cost model, without it, and at random, and says after how many trials each has found a
schedule within some percent of the best one (of chance also the median over all its runs, which needs no playing); and how well the
model, after 200 measurements, orders pairs that it has not seen, beside how well one round of the recording orders those of the next.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from graphopt.autotune.cost_model import CostModel, pairwise_accuracy
from graphopt.autotune.records import Measured, Status
from graphopt.autotune.search import Evolution, Model, Search
from graphopt.autotune.space import Knob, Schedule, SearchSpace, Workload
from graphopt.autotune.tuner import round_size
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.backends.tvm.build import KernelBuilder, load_kernel
from graphopt.errors import BuildError
from graphopt.ir.interpreter import evaluate
from graphopt.ir.text import parse_graph
from graphopt.target import detect

Choices = dict[str, tuple[Knob, ...]]
EPSILON = Evolution().epsilon
NEAR = (1.05, 1.02, 1.0)  # times of the best schedule that count as found


def _matmul(m: int, k: int, n: int, nr: int) -> str:
    panels = -(-n // nr)
    return (f"graph @g(%x: f32[{m}, {k}], %w: f32[{panels}, {k}, {nr}], %b: f32[{n}]) -> f32[{m}, {n}] {{\n"
            f" %0: f32[{k}, {panels}, {nr}] = transpose(%w) {{perm = [1, 0, 2]}}\n"
            f" %1: f32[{k}, {panels * nr}] = reshape(%0) {{shape = [{k}, {panels * nr}]}}\n"
            f" %2: f32[{k}, {n}] = slice(%1) {{axis = 1, stop = {n}}}\n %3: f32[{m}, {n}] = matmul(%x, %2)\n"
            f" %4: f32[{m}, {n}] = add(%3, %b)\n return %4\n}}")  # fmt: skip


def _conv(h: int, c: int, o: int, groups: int) -> str:
    return (f"graph @g(%x: f32[1, {h}, {h}, {c}], %w: f32[3, 3, {c // groups}, {o}], %b: f32[{o}]) -> f32[1, {h}, {h}, {o}] {{\n"
            f" %0: f32[1, {h}, {h}, {o}] = conv(%x, %w) {{stride = [1, 1], padding = [1, 1], dilation = [1, 1], groups = {groups},"
            f" channels_last = true}}\n %1: f32[1, {h}, {h}, {o}] = add(%0, %b)\n"
            f" %2: f32[1, {h}, {h}, {o}] = relu(%1)\n return %2\n}}")  # fmt: skip


_SOFTMAX = "graph @g(%x: f32[512, 768]) -> f32[512, 768] {\n %0: f32[512, 768] = softmax(%x) {axis = 1}\n return %0\n}"
_TILE: Choices = {"mr": (8, 4, 6, 12), "nr": (48, 16), "unroll": (4, 1), "group": (16, 2, 8, 4), "block": (128, 256), "parallel": (True,)}
WORKLOADS: dict[str, tuple[str, str, dict[str, Choices]]] = {
    "matmul": ("matmul", _matmul(128, 768, 3072, 48), {"tile": _TILE}),
    "conv3x3": ("conv", _conv(56, 64, 64, 1),
                {"conv": {"rows": (6, 5, 4, 2), "unroll": (4,), "tiles": (12, 4, 48), "block": (512, 128), "tasks": (8, 64),
                          "parallel": (True,)}}),
    "rowwise": ("rowwise", _SOFTMAX, {}),
    "depthwise": ("conv", _conv(112, 96, 96, 96),
                  {"depthwise": {"lines": (8, 2, 14, 56), "tasks": (32, 4, 128), "pixels": (8, 4, 6, 12, 2, 14), "lanes": (16, 32)}}),
}  # fmt: skip


def workload(name: str) -> Workload:
    kind, text, _ = WORKLOADS[name]
    return Workload.of(parse_graph(text), kind)


def spaces_of(name: str) -> list[SearchSpace]:
    """The templates' spaces, cut down to some hundred points; templates without choices given are left out if any are given."""
    w, t, cuts = workload(name), detect(), WORKLOADS[name][2]
    found = []
    for template in TvmBackend().templates(w, t):
        for space in template.spaces(w, t) if not cuts or template.name in cuts else ():
            cut = cuts.get(space.template, {})
            params = tuple(replace(p, choices=tuple(dict.fromkeys((p.choices[0], *(c for c in p.choices if c in cut[p.name])))))
                           if p.name in cut else p for p in space.params)  # fmt: skip
            found.append(replace(space, params=params))
    return found


def points(name: str) -> list[Schedule]:
    return Search(workload(name), detect(), spaces_of(name), seed=0).propose(10**6)


# --- recording ---------------------------------------------------------------------------------------------------------------


def build(folder: Path, names: Sequence[str], seconds: float) -> None:
    end, builder = time.monotonic() + seconds, KernelBuilder()
    for name in names:
        jobs = [(workload(name), s) for s in points(name)]
        for first in range(0, len(jobs), 16):
            if time.monotonic() > end:
                print(f"{name}: {first} of {len(jobs)} built")
                return
            found = builder.build_many(jobs[first : first + 16], detect(), folder / "kernels", errors="return")
            for job, path in zip(jobs[first:], found, strict=False):
                if isinstance(path, BuildError):
                    print(name, job[1].to_json(), str(path).splitlines()[0])
        print(f"{name}: all {len(jobs)} built")
    builder.close()


def record(folder: Path, names: Sequence[str], seconds: float, rounds: int) -> None:
    """Append (workload, schedule, seconds) to ``times.jsonl``; each point ``rounds`` times, in different orders."""
    end, file, builder = time.monotonic() + seconds, folder / "times.jsonl", KernelBuilder()
    done = [(r["workload"], r["schedule"]) for r in map(json.loads, file.read_text().splitlines())] if file.exists() else []
    counts: dict[tuple[str, str], int] = {}
    for key in done:
        counts[key] = counts.get(key, 0) + 1
    with file.open("a") as out:
        for turn in range(rounds):
            for name in names:
                w, left = workload(name), [s for s in points(name) if counts.get((name, s.to_json()), 0) <= turn]
                Random(turn).shuffle(left)
                if not left or time.monotonic() > end:
                    continue
                inputs = [torch.randn([int(d) for d in v.shape]) for v in w.graph.inputs]
                expected = evaluate(w.graph, inputs, wide=True)[0]
                for s in left:
                    if time.monotonic() > end:
                        print(f"round {turn + 1}: {name} is not done")
                        return
                    (path,) = builder.build_many([(w, s)], detect(), folder / "kernels", errors="return")
                    taken = None if isinstance(path, BuildError) else timed(load_kernel(path, w, s), inputs, expected)
                    out.write(json.dumps({"workload": name, "schedule": s.to_json(), "seconds": taken}) + "\n")
    builder.close()
    print("all timed")


def timed(kernel: Callable[..., Any], inputs: Sequence[torch.Tensor], expected: torch.Tensor) -> float | None:
    """Median seconds of a call, 10 ms of calls and three at least; None if the result is wrong."""
    out = torch.full(expected.shape, float("nan"))
    kernel(*inputs, out)
    if not torch.allclose(out.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        return None
    kernel(*inputs, out)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.01 and len(times) < 200):
        start = time.perf_counter()
        kernel(*inputs, out)
        times.append(time.perf_counter() - start)
    return median(times)


def rounds(folder: Path, name: str) -> dict[Schedule, list[float | None]]:
    """The times of each round; None for a wrong result."""
    found: dict[Schedule, list[float | None]] = {}
    for r in map(json.loads, (folder / "times.jsonl").read_text().splitlines()):
        if r["workload"] == name:
            found.setdefault(Schedule.from_json(r["schedule"]), []).append(r["seconds"])
    return found


def recorded(folder: Path, name: str) -> dict[Schedule, Measured]:
    """What was measured, the median over the rounds, of the points that the space has now."""
    out, inside = {}, dict.fromkeys(points(name))
    for s, times in rounds(folder, name).items():
        if s not in inside:
            continue
        fine = [t for t in times if t is not None]
        out[s] = Measured(Status.OK, seconds=median(fine)) if len(fine) == len(times) else Measured(Status.WRONG, reason="wrong")
    return out


# --- judging -----------------------------------------------------------------------------------------------------------------


def play(name: str, table: dict[Schedule, Measured], seed: int, model: Model | None, epsilon: float, batch: int,
         listed: bool = True) -> Iterator[list[tuple[Schedule, Measured]]]:  # fmt: skip
    """Batches of a search that measures by looking up. ``listed``: the space may be enumerated."""
    options = Evolution(epsilon=epsilon) if listed else Evolution(epsilon=epsilon, enumerated=0)
    search = Search(workload(name), detect(), spaces_of(name), seed=seed, model=model, evolution=options)
    while not search.exhausted:
        results = [(s, table[s]) for s in search.propose(round_size(len(search.measured), batch)) if s in table]
        search.observe(results)
        yield results


def trials_until(runs: Iterator[list[tuple[Schedule, Measured]]], limits: Sequence[float], most: int) -> list[int]:
    """Trials until a candidate took no longer than each of the limits, the longest first; ``most`` if none did in as many."""
    found: list[int] = []
    count = 0
    for results in runs:
        for _, m in results:
            count += 1
            while m.seconds is not None and len(found) < len(limits) and m.seconds <= limits[len(found)]:
                found.append(count)
        if count >= most or len(found) == len(limits):
            break
    return found + [most] * (len(limits) - len(found))


def chance(points: int, good: int) -> int:
    """Trials after which half of all random orders of some points have come to a good one."""
    without = 1.0
    for count in range(1, points + 1):
        without *= max(0, points - good - count + 1) / (points - count + 1)
        if without <= 0.5:
            return count
    return points


def judge(folder: Path, names: Sequence[str], seeds: int, trials: int, batch: int) -> None:
    console = Console(width=140)
    ways: dict[str, tuple[bool, float, bool]] = {
        "random": (False, 1.0, True), "evolution": (False, EPSILON, False), "evolution + model": (True, EPSILON, False),
        "model over all": (True, EPSILON, True),
    }  # fmt: skip
    found = Table("workload", "points", "near", "good", "chance", *ways,
                  title=f"median trials until a schedule that near the best was found, {seeds} seeds")  # fmt: skip
    ranks = Table("workload", "unseen", "pairs in order", "apart by 5%", "a round by the one before",
                  title=f"the model after {trials} measurements")  # fmt: skip
    for name in names:
        table = recorded(folder, name)
        ok = [m.seconds for m in table.values() if m.seconds is not None]
        limits = [near * min(ok) for near in NEAR]
        counts = [
            [trials_until(play(name, table, k, CostModel() if learned else None, epsilon, batch, listed), limits, len(table))
             for k in range(seeds)]
            for learned, epsilon, listed in ways.values()
        ]  # fmt: skip
        for i, near in enumerate(NEAR):
            cells = [f"{median(c[i] for c in way):.0f}  ({min(c[i] for c in way)}-{max(c[i] for c in way)})" for way in counts]
            good = sum(t <= limits[i] for t in ok)
            found.add_row(name if i == 0 else "", str(len(ok)), f"{near:.2f}", str(good), str(chance(len(ok), good)), *cells)
        ranks.add_row(name, *rank_quality(name, table, seeds, trials, batch), agreement(folder, name))
    console.print(found)
    console.print(ranks)


def rank_quality(name: str, table: dict[Schedule, Measured], seeds: int, trials: int, batch: int) -> tuple[str, str, str]:
    """(unseen candidates, share of their pairs in the right order, the same of pairs at least 5% apart), medians over seeds."""
    orders: list[tuple[float, float]] = []
    count = 0
    for seed in range(seeds):
        model, seen = CostModel(), dict.fromkeys(list[Schedule]())
        for results in play(name, table, seed, model, EPSILON, batch):
            seen.update(dict.fromkeys(s for s, _ in results))
            if len(seen) >= min(trials, len(table) * 2 // 3):
                break
        unseen = [(s, m.seconds) for s, m in table.items() if s not in seen and m.seconds is not None]
        count = len(unseen)
        scores = model.predict(workload(name), detect(), [s for s, _ in unseen], spaces_of(name))
        assert scores is not None
        seconds = [t for _, t in unseen]
        orders.append((pairwise_accuracy(scores, seconds), pairwise_accuracy(scores, seconds, apart=0.05)))
    return str(count), *(f"{median(o):.3f}  ({min(o):.3f}-{max(o):.3f})" for o in zip(*orders, strict=True))  # type: ignore[return-value]


def agreement(folder: Path, name: str) -> str:
    """Share of all pairs that a round's times put into the order of the next round's: what the noise of one of them leaves."""
    times = [t for t in rounds(folder, name).values() if None not in t]
    found = []
    for first in range(min(map(len, times)) - 1):
        one, other = ([t[first + i] or 0.0 for t in times] for i in (0, 1))
        found.append(pairwise_accuracy([-t for t in one], other))
    return " ".join(f"{x:.3f}" for x in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("build", "time", "judge"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(WORKLOADS))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    names = args.only.split(",")
    if args.step == "build":
        build(args.folder, names, args.seconds)
    elif args.step == "time":
        record(args.folder, names, args.seconds, args.rounds)
    else:
        judge(args.folder, names, args.seeds, args.trials, args.batch)


if __name__ == "__main__":
    main()

"""The tuner on the operator workloads of TVM's own tuners, beside PyTorch and MetaSchedule with as much time.

    python benchmarks/tuner_workloads.py tune FOLDER [--seconds 60] [--only C2D.0,GMM] [--systems tuned,metaschedule]
    python benchmarks/tuner_workloads.py measure FOLDER [--json r.json] [--plot r.png]      # a quiet machine
    python benchmarks/tuner_workloads.py all FOLDER ...                                     # the one, then the other

``tune`` gives each workload its time with graphopt's tuner, and with MetaSchedule (a process of its own, which ends with the round of
trials in which its time is over; what its process needs to start is not counted). What was found is kept in the folder: a workload that
has been tuned for as long is not tuned again.

``measure`` takes all times in one run: a process for each system, all alive at once, in turns, with 20 ms of silence between them.
Systems: graphopt with tuned and with default schedules, a compiled model each, which checks its arguments and gives results memory of
their own; the tuned kernels alone (``kernels``), in memory that is there, as MetaSchedule's are called; PyTorch as fast as it goes:
the best of its layouts, and with oneDNN's packed weights, chosen by a probe; MetaSchedule's best record. Weights are constants to
graphopt and PyTorch, as in a model; TVM's workloads take them as arguments, in the layout that they define, and nothing is packed for
them. Errors are against f64. Each system's threads are bound to cores, a core each: a kernel of the operating system that puts two
on one core, for however short, makes a call take 8 or 16 ms, whoever's it is.

A name without a number is the first configuration of the workload.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from te_workloads import NAMES, Call, TeWorkload, made

from graphopt.bench.stats import geometric_mean, quantile

SILENCE, SLICE = 0.02, 0.03  # seconds of silence before a turn, and of timed calls in it
WORSE = 4.0  # times PyTorch's error, and some units of rounding, that a result may be off
ROUND = 16  # trials that MetaSchedule makes at once
TITLES = {"tuned": "graphopt tuned", "kernels": "its kernels", "default": "graphopt default", "pytorch": "PyTorch",
          "metaschedule": "MetaSchedule"}  # fmt: skip


# --- tuning ------------------------------------------------------------------------------------------------------------


def tune_graphopt(name: str, folder: Path, seconds: float, threads: int, seed: int) -> dict[str, Any]:
    """Tune a workload; what it took, and what each trial ended with."""
    import graphopt
    from graphopt.autotune.database import Database
    from graphopt.autotune.tuner import Budget
    from graphopt.target import detect
    from graphopt.tuning import Run, tune
    from graphopt.tuning_tasks import tasks_of

    torch.set_num_threads(threads)
    w, database = made(name), Database(folder / "tuning.db")
    with torch.no_grad():
        compiled = graphopt.compile(w.module, w.args, cache_dir=folder / "kernels", tuning_db=None)
        found = tasks_of([compiled.profile(*w.args)], detect())
    if not found.tasks:
        return {"trials": 0, "left out": found.left_out}
    outcome = tune(found.tasks, Run(detect(), database, threads, seed), Budget(seconds))
    tasks = [
        {"task": p.task.name, "trials": p.trials, "default": p.default.seconds if p.default else None, "best": p.best, "curve": p.curve,
         "schedule": json.loads(p.incumbent.schedule.to_json()) if p.incumbent else None, "statuses": p.statuses}
        for p in outcome.progress
    ]  # fmt: skip
    return {"seconds": outcome.seconds, "trials": outcome.trials, "rate": outcome.rate, "why": outcome.why, "tasks": tasks}


def tune_metaschedule(name: str, folder: Path, seconds: float, threads: int, seed: int) -> dict[str, Any]:
    """Tune a workload with TVM's own tuner, and build the best that it found."""
    import tvm
    from tvm.ir.utils import derived_object
    from tvm.s_tir import meta_schedule as ms
    from tvm.s_tir.meta_schedule.testing.te_workload import create_te_workload

    own = folder / f"metaschedule-{name}"
    own.mkdir(parents=True, exist_ok=True)
    kind, _, number = name.partition(".")
    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.get_global_func("target.llvm_get_system_cpu")(), "num-cores": threads})
    builder = ms.builder.LocalBuilder(max_workers=threads)
    runner = ms.runner.LocalRunner(evaluator_config=ms.runner.EvaluatorConfig(number=1, repeat=3, min_repeat_ms=20))
    start, trials = time.perf_counter(), [0]

    @derived_object
    class Clock(ms.measure_callback.PyMeasureCallback):
        """Counts trials, and ends the run when its time is over."""

        def apply(self, scheduler: Any, task: int, candidates: Any, built: Any, results: Any) -> None:
            trials[0] += len(candidates)
            if time.perf_counter() - start > seconds:
                raise TimeoutError

    database = ms.database.JSONDatabase(work_dir=str(own))
    mod = tvm.IRModule({"main": create_te_workload(kind, int(number or 0)).with_attr("global_symbol", "main")})
    try:
        ms.tir_integration.tune_tir(
            mod=mod, target=target, work_dir=str(own), max_trials_global=1_000_000, num_trials_per_iter=ROUND, database=database,
            seed=seed + 1, num_tuning_cores=threads, builder=builder, runner=runner,
            measure_callbacks=[ms.measure_callback.AddToDatabase(), ms.measure_callback.UpdateCostModel(), Clock()],
        )  # fmt: skip
    except Exception as error:  # the clock's, behind TVM's own
        if time.perf_counter() - start <= seconds:
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0], "trials": trials[0]}
    taken = time.perf_counter() - start
    best = database.query_schedule(mod, target, "main")
    if best is None:
        return {"failed": "no candidate ran", "trials": trials[0], "seconds": taken}
    tvm.compile(best.mod, target=target).export_library(str(own / "best.so"))
    return {"seconds": taken, "trials": trials[0], "rate": trials[0] / taken}


TUNERS = {"tuned": tune_graphopt, "metaschedule": tune_metaschedule}


def _in_a_process(answers: Connection, run: Callable[..., Any], *args: Any) -> None:
    os.dup2(2, 1)  # what libraries print
    warnings.simplefilter("ignore")
    try:
        answers.send(run(*args))
    except Exception as error:
        answers.send({"failed": f"{type(error).__name__}: {error}".splitlines()[0]})


def apart(run: Callable[..., Any], limit: float, *args: Any) -> dict[str, Any]:
    """What a function returns in a process of its own; why it failed if it takes longer than ``limit`` seconds or dies."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_in_a_process, args=(there, run, *args))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(limit) else {"failed": f"no end after {limit:.0f} s"}
    except EOFError:
        process.join(5)
        return {"failed": f"the process died, exit status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


CONTEXT = multiprocessing.get_context("spawn")


def tune_all(folder: Path, names: Sequence[str], systems: Sequence[str], seconds: float, threads: int, seed: int) -> None:
    """Tune what has not been tuned for as long; ``tuning.json`` says what it took."""
    for name in names:
        for system in systems:
            if system not in TUNERS or _kept(folder).get(name, {}).get(system, {}).get("budget", 0) >= seconds:
                continue
            answer = apart(TUNERS[system], 3 * seconds + 120, name, folder, seconds, threads, seed)
            print(f"{name}, {TITLES[system]}: {answer.get('failed') or _told(answer)}", file=sys.stderr)
            if "failed" not in answer:
                answer["budget"] = seconds
            done = _kept(folder)
            done.setdefault(name, {})[system] = answer
            (folder / "tuning.json").write_text(json.dumps(done, indent=1))


def _told(answer: dict[str, Any]) -> str:
    gains = ", ".join(f"{t['default'] / t['best']:.2f}x" for t in answer.get("tasks", ()) if t["default"] and t["best"])
    return f"{answer['trials']} trials in {answer.get('seconds', 0):.0f} s" + (f"; gains {gains}" if gains else "")


def _kept(folder: Path) -> dict[str, Any]:
    file = folder / "tuning.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


# --- systems -----------------------------------------------------------------------------------------------------------


def _pytorch(w: TeWorkload, folder: Path) -> tuple[Call, str, Callable[[], torch.Tensor]]:
    best: dict[str, float] = {}
    for name, call in w.variants.items():
        call()
        times = []
        while len(times) < 5 or (sum(times) < 0.05 and len(times) < 100):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        best[name] = median(times)
    chosen = min(best, key=best.__getitem__)
    call = w.variants[chosen]
    return call, chosen, lambda: w.plain(call())


def _graphopt(w: TeWorkload, folder: Path, tuned: bool) -> tuple[Call, str, Callable[[], torch.Tensor]]:
    compiled = _compiled(w, folder, tuned)
    calls = [f.op for f in compiled.report.fallbacks]
    return lambda: compiled(*w.args), f"library: {', '.join(calls)}" if calls else "", lambda: compiled(*w.args)


def _kernels(w: TeWorkload, folder: Path) -> tuple[Call, str, Callable[[], torch.Tensor]]:
    """The calls of the tuned program's kernels as one run made them: in the same memory, arguments as the kernels' runtime wants them."""
    import tvm

    compiled, calls = _compiled(w, folder, True), []
    if compiled.report.fallbacks:
        raise ValueError("some of it is a call of the library")
    inputs, sizes = compiled._compiled.operands(compiled._exported.flatten(w.args, {}))

    def recorded(_: int, kernel: Call) -> Call:
        def call(*args: Any) -> None:
            calls.append((kernel, [tvm.runtime.from_dlpack(a.detach()) if isinstance(a, torch.Tensor) else a for a in args]))
            kernel(*args)

        return call

    out = compiled._compiled.program.wrapped(recorded)(inputs, sizes)[0]
    out.fill_(float("nan"))  # what is looked at has to be written again
    (first, given), *others = calls

    def single() -> torch.Tensor:  # as MetaSchedule's are called
        first(*given)
        return out

    def run() -> torch.Tensor:
        first(*given)
        for kernel, args in others:
            kernel(*args)
        return out

    return (run, "", run) if others else (single, "", single)


def _compiled(w: TeWorkload, folder: Path, tuned: bool) -> Any:
    import graphopt

    return graphopt.compile(w.module, w.args, cache_dir=folder / "kernels", tuning_db=folder / "tuning.db" if tuned else None)


def _metaschedule(w: TeWorkload, folder: Path) -> tuple[Call, str, Callable[[], torch.Tensor]]:
    import tvm
    from tvm.s_tir.meta_schedule.testing.te_workload import create_te_workload

    kind, _, number = w.name.partition(".")
    function = create_te_workload(kind, int(number or 0))
    shape = [int(d) for d in function.params[-1].shape]
    module = tvm.runtime.load_module(str(folder / f"metaschedule-{w.name}" / "best.so"))
    kernel, out = module["main"], torch.full(shape, float("nan"))
    args = [tvm.runtime.from_dlpack(x.detach()) for x in (*w.peer, out)]

    def run() -> torch.Tensor:
        kernel(*args)
        return out

    return run, "", run


SYSTEMS: dict[str, Callable[[TeWorkload, Path], tuple[Call, str, Callable[[], torch.Tensor]]]] = {
    "tuned": lambda w, folder: _graphopt(w, folder, True),
    "kernels": _kernels,
    "default": lambda w, folder: _graphopt(w, folder, False),
    "pytorch": _pytorch,
    "metaschedule": _metaschedule,
}


def serve(requests: Connection, system: str, folder: Path, threads: int) -> None:
    """A system's process: prepares workloads, and makes some timed calls when it is asked to."""
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    ready: dict[str, Call] = {}
    while True:
        try:
            what, name, calls = requests.recv()
        except EOFError:
            return
        try:
            if what == "prepare":
                w = made(name)
                ready[name], note, result = SYSTEMS[system](w, folder)
                found, reference = result().double(), w.reference()
                error = float((found - reference.reshape(found.shape)).abs().max() / reference.abs().max())
                requests.send({"error": error if error == error else float("inf"), "note": note, "flops": w.flops})
            else:
                requests.send({"seconds": _timed(ready[name], calls)})
        except Exception as error:
            requests.send({"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]})


def _timed(call: Call, calls: int) -> list[float]:
    gc.disable()
    call()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    gc.enable()
    return times


# --- measuring ---------------------------------------------------------------------------------------------------------


class Served:
    """The other end of :func:`serve`."""

    def __init__(self, system: str, folder: Path, threads: int) -> None:
        self._connection, there = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=serve, args=(there, system, folder, threads), daemon=True)
        self._process.start()
        there.close()

    def send(self, what: str, name: str, calls: int = 0) -> None:
        self._connection.send((what, name, calls))

    def answer(self) -> dict[str, Any]:
        try:
            return dict(self._connection.recv())
        except EOFError:
            return {"failed": f"the process died, exit status {self._process.exitcode}"}

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        self._process.kill()


def measure(folder: Path, names: Sequence[str], systems: Sequence[str], threads: int, rounds: int) -> dict[str, Any]:
    """Times and errors of all systems on all workloads."""
    served, out = dict[str, Served](), dict[str, Any]()
    for s in systems:
        os.environ["OMP_PROC_BIND"] = str(s != "metaschedule").lower()  # read when a process starts; TVM binds its threads itself
        served[s] = Served(s, folder, threads)
    try:
        for name in names:
            rows: dict[str, Any] = {}
            for process in served.values():
                process.send("prepare", name)
            for s, process in served.items():
                rows[s] = {**process.answer(), "seconds": []}
            running, calls = [s for s in systems if "failed" not in rows[s]], {}
            for s in running:
                calls[s] = max(2, min(200, round(SLICE / min(_turn(served[s], name, 2, rows[s]) or [SLICE]))))
            for r in range(rounds):
                for s in running[r % len(running) :] + running[: r % len(running)]:
                    rows[s]["seconds"] += _turn(served[s], name, calls[s], rows[s])
            out[name] = rows
    finally:
        for process in served.values():
            process.close()
    return out


def _turn(process: Served, name: str, calls: int, row: dict[str, Any]) -> list[float]:
    time.sleep(SILENCE)
    process.send("run", name, calls)
    answer = process.answer()
    row.update({k: v for k, v in answer.items() if k == "failed"})
    return list(answer.get("seconds", []))


# --- what came of it ---------------------------------------------------------------------------------------------------


def _time(row: dict[str, Any] | None) -> float | None:
    return median(row["seconds"]) if row and row["seconds"] and "failed" not in row else None


def _cell(row: dict[str, Any] | None) -> str:
    t = _time(row)
    if row is None or t is None:
        return "failed" if row else ""
    ordered = sorted(row["seconds"])
    wide = (quantile(ordered, 0.75) - quantile(ordered, 0.25)) / t
    return f"{t * 1e6:.1f}" + (f" ±{wide:.0%}" if wide > 0.1 else "")


def _against(rows: dict[str, Any], peer: str, own: str = "tuned") -> float | None:
    ours, theirs = _time(rows.get(own)), _time(rows.get(peer))
    return theirs / ours if ours and theirs else None


def show(found: dict[str, Any], tuning: dict[str, Any], console: Console) -> None:
    systems = [s for s in TITLES if any(s in rows for rows in found.values())]
    peers = [s for s in systems if s not in ("tuned", "kernels")]
    table = Table("", *(f"{TITLES[s]} us" for s in systems), *(f"over {TITLES[p]}" for p in peers), "GFLOP/s", "PyTorch's way", "trials",
                  title="medians, one run, in turns; ± where the quartiles are more than a tenth of the median apart")  # fmt: skip
    for name, rows in found.items():
        ratios = [_against(rows, p) for p in peers]
        ours, flops = _time(rows.get("tuned")), rows.get("tuned", {}).get("flops")
        trials = " / ".join(str(tuning.get(name, {}).get(s, {}).get("trials", "-")) for s in TUNERS if s in systems)
        table.add_row(
            name, *(_cell(rows.get(s)) for s in systems), *(f"{int(r * 100) / 100:.2f}x" if r else "" for r in ratios),
            f"{flops / ours / 1e9:.0f}" if flops and ours else "", rows.get("pytorch", {}).get("note", ""), trials,
        )  # fmt: skip
    console.print(table)
    for p in peers:
        for ours in ("tuned", "kernels"):
            ratios = [r for rows in found.values() if (r := _against(rows, p, ours)) is not None]
            if ratios:
                wins, mean = sum(r >= 1.0 for r in ratios), geometric_mean(ratios)
                console.print(f"{TITLES[ours]} at least as fast as {TITLES[p]}: {wins} of {len(ratios)}; geometric mean {mean:.2f}x")
    for name, rows in found.items():
        for s, row in rows.items():
            if "failed" in row:
                console.print(f"{name}, {TITLES[s]}: {row['failed']}")
            elif row["error"] > WORSE * max(own := rows.get("pytorch", {}).get("error", 0.0), 1e-6):
                console.print(f"{name}, {TITLES[s]}: [red]error {row['error']:.1e}[/], PyTorch's {own:.1e}")


def plot(found: dict[str, Any], tuning: dict[str, Any], file: Path) -> None:
    """Bars: how many times as fast as PyTorch each system is; lines: the best time so far against seconds of tuning."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, curves) = plt.subplots(1, 2, figsize=(15, 5), constrained_layout=True)
    systems = [s for s in TITLES if s != "pytorch" and any(s in rows for rows in found.values())]
    for k, s in enumerate(systems):
        pairs = [(_time(rows.get("pytorch")), _time(rows.get(s))) for rows in found.values()]
        bars.bar([i + (k - 1) * 0.27 for i in range(len(found))], [a / b if a and b else 0.0 for a, b in pairs], 0.27, label=TITLES[s])
    bars.axhline(1.0, color="black", linewidth=1)
    bars.set_xticks(range(len(found)), list(found), rotation=45)
    bars.set_ylabel("times as fast as PyTorch")
    bars.legend()
    for name, entry in tuning.items():
        for task in entry.get("tuned", {}).get("tasks", ())[:1]:
            if task["curve"]:
                x, y = zip(*task["curve"], strict=True)
                curves.step([*x, entry["tuned"]["seconds"]], [y[0] / t for t in (*y, y[-1])], where="post", label=name)
    curves.set_xlabel("seconds of tuning")
    curves.set_ylabel("times as fast as the default schedule (first task)")
    curves.legend(fontsize=7, ncols=2)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("tune", "measure", "all"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--seconds", type=float, default=60.0, help="of tuning, for each workload and tuner")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(args.threads)  # read by the processes of MetaSchedule
    args.folder.mkdir(parents=True, exist_ok=True)
    names = [n if "." in n else f"{n}.0" for n in args.only.split(",")]
    systems = args.systems.split(",")
    if unknown := [s for s in systems if s not in SYSTEMS]:
        parser.error(f"--systems: no {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    if args.step in ("tune", "all"):
        tune_all(args.folder, names, systems, args.seconds, args.threads, args.seed)
    if args.step in ("measure", "all"):
        found, tuning = measure(args.folder, names, systems, args.threads, args.rounds), _kept(args.folder)
        show(found, tuning, Console(width=170))
        if args.json:
            args.json.write_text(json.dumps({"measured": found, "tuning": tuning}, indent=1))
        if args.plot:
            plot(found, tuning, args.plot)


if __name__ == "__main__":
    main()

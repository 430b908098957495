"""Tuning kernels for GPUs, without one: interpreted from end to end, compiled ahead, and found by what compiles later."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import tuning_triton
from graphopt.autotune import gpu_bench
from graphopt.autotune.database import Database
from graphopt.autotune.gpu_bench import GpuBench, InterpretedBench
from graphopt.autotune.gpu_clock import GpuClock
from graphopt.autotune.measure import Built, Subject
from graphopt.autotune.records import Status
from graphopt.autotune.runner import Failed, RunnerProcess
from graphopt.autotune.runner_process import Bench
from graphopt.autotune.space import Schedule, Workload
from graphopt.autotune.tasks import Task
from graphopt.autotune.tuner import Budget, Outcome
from graphopt.autotune.turns import take_turns
from graphopt.devices import choose_target
from graphopt.errors import DeviceError, DiskFullError
from graphopt.ir import parse_graph
from graphopt.library_time import _on_gpu, library_seconds
from graphopt.model import CompiledModel
from graphopt.options import Options
from graphopt.target import Target, detect, gpu_of
from graphopt.trials import CPU, _as_tf32, _computed, case_maker, make_case
from graphopt.tuned import device_key
from graphopt.tuning import Run, check_device, spaces_of, tune, versions
from graphopt.tuning_tasks import tasks_of
from graphopt.tuning_triton import TritonCandidates, TritonTuning
from tests.autotune.busy import timing

pytest.importorskip("triton")

from graphopt.backends.triton import offline
from graphopt.backends.triton.backend import TritonBackend
from graphopt.backends.triton.build import write_source

NAME = "cuda:sm_90:4"
TARGET = Target.from_name(NAME)
QUICK = timing(floor=0.002, recheck=0.004, patience=20.0)
X = torch.randn(24, 32)
PRODUCT = Workload.of(parse_graph("""
graph @g(%x: f16[256, 512], %w: f16[512, 256]) -> f16[256, 256] {
  %0: f16[256, 256] = matmul(%x, %w)
  return %0
}"""), "matmul")  # fmt: skip
FLOATS = Workload("matmul", PRODUCT.text.replace("f16", "f32"))


def model() -> nn.Module:
    """A product, and a reduction over rows."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.Softmax(-1)).eval()


def compiled(tmp_path: Path, **options: Any) -> CompiledModel:
    with torch.no_grad():
        given = {"backend": "triton", "target": NAME, "strict": True, "cache_dir": tmp_path / "cache", **options}
        return graphopt.compile(model(), (X,), **given)


def tasks(tmp_path: Path) -> list[Task]:
    """The product, and the reduction."""
    found = tasks_of([compiled(tmp_path, tuning_db=None).profile(X, runs=1)], TARGET).tasks
    return sorted(found, key=lambda t: t.workload.kind)


def tuned(found: Sequence[Task], database: Database, trials: int) -> Outcome:
    return tune(found, Run(TARGET, database, 1, batch=4, timing=QUICK, machine=detect()), Budget(trials=trials))


# --- from end to end, interpreted --------------------------------------------------------------------------------------


def test_a_product_and_a_reduction_are_tuned_and_a_later_compilation_finds_it(tmp_path: Path) -> None:
    found, database = tasks(tmp_path), Database(tmp_path / "t.db")
    assert [t.workload.kind for t in found] == ["matmul", "rowwise"]
    outcome = tuned(found, database, 8)
    assert outcome.why == "trials" and outcome.trials == 8
    records = database.records()
    assert [r.measured.status for r in records] == [Status.OK] * 8, [r.measured.reason for r in records]
    assert {r.workload for r in records} == {t.workload for t in found}
    assert all(r.measured.error is not None and r.measured.error < 1e-5 for r in records)
    assert all(p.default is not None and p.best is not None and p.best <= (p.default.seconds or 0) for p in outcome.progress)
    later = compiled(tmp_path, tuning_db=tmp_path / "t.db")
    best = {p.task.workload.kind: p.incumbent.schedule for p in outcome.progress if p.incumbent}
    assert {k.kind: Schedule.from_json(k.schedule) for k in later.report.kernels} == best, "the stored schedules are used"
    assert all("measured" in k.tuned for k in later.report.kernels), "and the report says so"
    torch.testing.assert_close(later(X), model()(X))


def test_what_was_interpreted_never_counts_on_a_gpu(tmp_path: Path) -> None:
    found, database = tasks(tmp_path), Database(tmp_path / "t.db")
    tuned(found[:1], database, 1)
    (record,) = database.records()
    assert record.target == device_key(TARGET, detect()) != device_key(TARGET) == TARGET.fingerprint
    assert "interpreted on cpu" in record.device
    assert database.best(found[0].workload, record.target, 1, versions(TARGET)) is not None
    assert database.best(found[0].workload, device_key(TARGET), 1, versions(TARGET)) is None
    moved = replace(record, target=device_key(TARGET), measured=replace(record.measured, seconds=1e-9))
    database.add([moved])
    assert database.best(found[0].workload, record.target, 1, versions(TARGET)) == record, "nor the other way round"


def test_max_autotune_tunes_what_it_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.max_autotune.Budget", lambda seconds: Budget(trials=4))
    monkeypatch.setattr("graphopt.max_autotune.Run", lambda *a, **k: Run(*a, **k, batch=2, timing=QUICK))
    report = compiled(tmp_path, tune_budget=5).report
    assert any("4 trials of 2 kernels" in n for n in report.notes), report.notes
    assert all("measured" in k.tuned for k in report.kernels)
    assert {r.target for r in Database(tmp_path / "cache" / "tuning.db").records()} == {device_key(TARGET, detect())}


# --- candidates that are bad on purpose --------------------------------------------------------------------------------

BAD = {
    "wrong": ("_before(*args); args[-1].mul_(1.5)", Status.WRONG, ""),
    "raises": ("raise ValueError('no such tile')", Status.CRASHED, "ValueError: no such tile"),
    "dies": ("import os; os.abort()", Status.CRASHED, "SIGABRT"),
    "writes an input": ("_before(*args); args[0].zero_()", Status.CRASHED, "SIGSEGV"),
    "leaves something out": ("pass", Status.WRONG, ""),
}


class Spoilers(TritonCandidates):
    """Builds all candidates but the default as something that is bad, and, as nothing is timed, fast."""

    default: Schedule
    bad: list[str]

    def build(self, w: Workload, schedules: Sequence[Schedule]) -> list[Built]:
        built = super().build(w, schedules)
        for b in built:
            if b.schedule != self.default and self.bad:
                body = BAD[self.bad.pop(0)][0]
                with open(b.path, "a") as file:
                    file.write(f"\n\n_before = launch\n\n\ndef launch(*args):\n    {body}\n")
        return built


def test_bad_candidates_are_written_down_and_never_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, database = tasks(tmp_path)[0], Database(tmp_path / "t.db")
    monkeypatch.setattr(Spoilers, "default", task.default, raising=False)
    monkeypatch.setattr(Spoilers, "bad", list(BAD), raising=False)
    monkeypatch.setattr(tuning_triton, "TritonCandidates", Spoilers)
    outcome = tuned([task], database, 1 + len(BAD))
    first, *others = database.records()
    assert first.schedule == task.default and first.measured.ok
    assert [(r.measured.status, words in r.measured.reason) for r, (_, _, words) in zip(others, BAD.values(), strict=True)] == [
        (status, True) for _, status, _ in BAD.values()
    ], [r.measured for r in others]
    assert outcome.progress[0].incumbent is not None and outcome.progress[0].incumbent.schedule == task.default
    best = database.best(task.workload, device_key(TARGET, detect()), 1, versions(TARGET))
    assert best is not None and best.schedule == task.default


# --- compiled ahead ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiler() -> Iterator[TritonCandidates]:
    builder = TritonCandidates(Target.from_name("cuda:sm_90"), 2, interpret=False)
    yield builder
    builder.close()


def test_candidates_for_a_gpu_are_compiled_ahead_and_what_cannot_run_says_why(compiler: TritonCandidates) -> None:
    default = spaces_of(PRODUCT, compiler.target)[0].default()
    knobs = dict(default.knobs)
    large = Schedule.make("matmul", "tiled", **{**knobs, "m": 256, "n": 256, "k": 128, "stages": 4, "warps": 8})
    odd = Schedule.make("matmul", "tiled", **{**knobs, "m": 48})
    good, too_large, refused, unknown = compiler.build(PRODUCT, [default, large, odd, Schedule.make("matmal")])
    assert not good.failure and Path(good.path).is_file() and good.entry == Path(good.path).stem and good.seconds > 0
    assert "bytes of shared memory, and a block may have 232448" in too_large.failure
    assert "CompilationError" in refused.failure and "power of 2" in refused.failure, refused.failure
    assert "no template 'matmal'" in unknown.failure


def test_candidates_are_compiled_without_the_tool_that_reads_machine_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(offline, "_read_cuda", None)
    target = Target.from_name("cuda:sm_90")
    template = TritonBackend().templates(PRODUCT, target)[0]
    source = template.emit(PRODUCT, spaces_of(PRODUCT, target)[0].default(), target)
    assert 0 < offline.compile_for_launch(write_source(source, tmp_path), source.payload, target) <= target.shared_memory


def test_a_full_disk_is_no_candidates_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(process: RunnerProcess, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        raise Failed(Status.CRASHED, "BuildError: kernel\n  OSError: [Errno 28] No space left on device\nthe end")

    monkeypatch.setattr(RunnerProcess, "ask", ask)
    builder = TritonCandidates(TARGET, 1, interpret=True)
    try:
        with pytest.raises(DiskFullError, match="TMPDIR"):
            builder.build(PRODUCT, [Schedule.make("any")])
    finally:
        builder.close()


def test_what_goes_wrong_while_candidates_are_built_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_triton, "_built", lambda *args: deque[Built]().popleft())
    builder = TritonCandidates(TARGET, 1, interpret=True)
    try:
        with pytest.raises(IndexError):
            builder.build(PRODUCT, [Schedule.make("any")])
    finally:
        builder.close()


def test_a_round_needs_no_more_compilers_than_it_has_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_triton, "TritonCandidates", lambda target, workers, interpret: workers)
    monkeypatch.setattr(tuning_triton, "detect", lambda: replace(TARGET, cores=192))
    builders = [TritonTuning(TARGET, interpret).builder(workers) for interpret, workers in ((False, 0), (False, 3), (True, 0))]
    assert builders == [Run(TARGET, Database(Path("none")), 1).batch, 3, 1]


def test_if_a_compiler_does_not_start_nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[RunnerProcess] = []

    class Few(RunnerProcess):
        def __init__(self, *args: str) -> None:
            if len(started) == 2:
                raise OSError("too many processes")
            super().__init__(*args)
            started.append(self)

    monkeypatch.setattr(tuning_triton, "RunnerProcess", Few)
    monkeypatch.setattr(tuning_triton, "new_folder", lambda: Path(tempfile.mkdtemp(dir=tmp_path)))
    with pytest.raises(OSError, match="too many"):
        TritonCandidates(TARGET, 4, interpret=True)
    assert [p._process.returncode for p in started] == [-9, -9] and not list(tmp_path.iterdir())


DRIVER = """
import json
import sys
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from graphopt.backends.triton.build import keep_binaries, load_module
import torch

class Driver:  # of a GPU that is not there: kernels are compiled for it, and not launched
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget(*json.loads(sys.argv[2]))
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(Driver())
path = Path(sys.argv[1])
keep_binaries(path.parent)
module = load_module(path)
kernel = getattr(module, path.stem)
x, w, y = (torch.empty(shape, dtype=torch.float16) for shape in ((256, 512), (512, 256), (256, 256)))
launched = []
class Recorded:
    def __getitem__(self, grid): return lambda *args, **how: launched.append(kernel.warmup(*args, grid=grid, **how))
setattr(module, path.stem, Recorded())
before = sorted(p.name for p in (path.parent / "binaries").iterdir())
module.launch(x, w, y)
print(len(launched), before == sorted(p.name for p in (path.parent / "binaries").iterdir()), len(before) > 0)
"""


@pytest.mark.parametrize(("name", "space", "reads"), [
    ("cuda:sm_90", 0, "pointers"), ("hip:gfx942", 0, "pointers"), ("cuda:sm_90", 0, "descriptors"), ("cuda:sm_100", 1, "descriptors"),
])  # fmt: skip
def test_a_launch_finds_what_was_compiled_ahead(name: str, space: int, reads: str) -> None:
    """Of kernels that take tiles one after another, too; and of such whose descriptors the launch makes."""
    target = Target.from_name(name)
    default = spaces_of(PRODUCT, target)[space].default()
    schedule = Schedule.make("matmul", default.sketch, **{**dict(default.knobs), "reads": reads})
    builder = TritonCandidates(target, 1, interpret=False)
    try:
        (built,) = builder.build(PRODUCT, [schedule])
        assert not built.failure
        of = offline._gpu(target)
        how = [sys.executable, "-c", DRIVER, built.path, json.dumps([of.backend, of.arch, of.warp_size])]
        done = subprocess.run(how, capture_output=True, text=True, check=False)
    finally:
        builder.close()
    assert done.stdout.split() == ["1", "True", "True"], done.stderr


# --- one backend alone -------------------------------------------------------------------------------------------------

WITHOUT_TVM = """
import json, sys
sys.modules.update(dict.fromkeys(("tvm", "tvm_ffi")))
from pathlib import Path
from tests.test_tuning_triton import Database, tasks, tuned
folder = Path(sys.argv[1])
outcome = tuned(tasks(folder)[:1], Database(folder / "t.db"), 2)
print(json.dumps([outcome.trials, outcome.progress[0].statuses]))
"""


def test_gpus_need_no_tvm(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", WITHOUT_TVM, tmp_path], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [2, {"ok": 2}]


def test_processors_need_no_triton() -> None:
    code = f"""
import sys
sys.modules["triton"] = None
from graphopt.autotune.space import Workload
from graphopt.target import detect
from graphopt.tuning import spaces_of, versions
print(spaces_of(Workload("matmul", {PRODUCT.text!r}), detect())[0].template, dict(versions(detect())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "'tvm': " in done.stdout, done.stderr


def test_the_key_of_a_gpu_is_its_own() -> None:
    gpu = SimpleNamespace(major=9, minor=0, name="NVIDIA H100 80GB HBM3", multi_processor_count=132, L2_cache_size=50 << 20)
    here = gpu_of(gpu, hip=False)
    assert device_key(here) == here.fingerprint
    assert len({device_key(here), device_key(here, detect()), device_key(TARGET), device_key(TARGET, detect())}) == 4


def test_candidates_on_a_gpu_have_the_time_to_be_compiled_once_more_and_not_thousands_of_flushes() -> None:
    timing = TritonTuning(TARGET, interpret=False).runner(1, None, 0).timing
    assert timing.patience >= tuning_triton.BUILD_SECONDS
    calls = round(timing.slice / 2e-6)
    times = take_turns(lambda turns: [2e-6] * len(turns), calls, timing.recheck, timing.hopeless, alone=False, waited=float)
    assert sum(map(len, times)) * calls < 10_000, "of a kernel of 2 us"


def test_the_gpu_that_is_here_is_tuned_as_a_model_on_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr("graphopt.devices.detect_gpu", lambda index: replace(TARGET, model=f"GPU {index}"))
    assert check_device("cuda") == choose_target(torch.device("cuda", 1), Options()) == replace(TARGET, model="GPU 1")
    with pytest.raises(DeviceError, match="there is no such GPU here"):
        check_device("hip")
    with pytest.raises(DeviceError, match="kernels of processors alone"):
        check_device("cuda", machine=detect())


@pytest.mark.parametrize(("interpret", "bench"), [(True, InterpretedBench), (False, GpuBench)])
def test_which_bench_runs_candidates(interpret: bool, bench: type[Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = TritonTuning(TARGET, interpret, gpu=1).runner(1, None, 0)
    made: list[Bench] = []
    monkeypatch.setattr(gpu_bench, "supervise", lambda get_ready: made.append(get_ready()))
    assert runner.module == gpu_bench.__name__
    gpu_bench.main(runner.loader)
    assert type(made[0]) is bench
    assert interpret or (isinstance(made[0], GpuBench) and made[0].device == torch.device("cuda", 1))


def test_a_gpu_without_room_for_the_librarys_kernels_leaves_their_time_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*args: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("graphopt.library_time.random_inputs", no_room)
    assert library_seconds(Subject(PRODUCT, case_maker(PRODUCT)), device=torch.device("meta")) == 0.0


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("room", ["none", "f32"])
def test_references_are_computed_here_where_a_gpu_has_no_room(room: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, there = torch.device("meta"), []

    def computed(graph: object, inputs: object, sizes: object, wide: bool, device: torch.device) -> list[torch.Tensor]:
        if device == gpu and (wide or room == "none"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        there.append(str(device))
        return _computed(graph, inputs, sizes, wide, CPU)  # type: ignore[arg-type]

    monkeypatch.setattr("graphopt.trials._computed", computed)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    case = make_case(FLOATS, {}, 0, gpu)
    assert there == ["cpu", "cpu" if room == "none" else "meta"]
    x, w = case.inputs
    assert not case.judge([x @ w]).reason
    rounded = case.judge([_as_tf32(x) @ _as_tf32(w)])
    assert bool(rounded.reason) == (precision == "highest" or room == "f32"), "what the GPU may round is judged as such"
    assert case.judge([x.half().float() @ w.to(torch.bfloat16).float()]).reason


def test_rounding_to_tf32() -> None:
    x = torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 3 * 2**-11, 0.0, 3e38])
    assert _as_tf32(x).tolist()[:5] == [1 + 2**-10, 1 + 2**-10, 1, -1 - 2**-9, 0.0]
    assert _as_tf32(x.double()).tolist() == x.double().tolist()


def test_the_library_is_timed_on_the_stream_as_kernels_are() -> None:
    class Clock(GpuClock):
        def time(self, calls: Iterable[Callable[[], object]]) -> list[float]:
            return [float(call() or 0) for call in calls]  # type: ignore[arg-type]

    times = iter([5.0, 0.01, *[0.02, 0.03, 0.01] * 4])
    assert _on_gpu(lambda: next(times), Clock(torch.device("cpu")), 0.09) == 0.02, "the median, without the first"

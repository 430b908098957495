"""Build processes that die or hang, a parent without a guarded main, no linker, no libgomp, threads and forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm import build, launch, provider
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.backends.tvm.build import KernelBuilder, load_kernel
from graphopt.backends.tvm.cache import KernelCache
from graphopt.backends.tvm.worker import build_one
from graphopt.child_process import start_python
from graphopt.errors import BuildError, WorkerError
from graphopt.target import detect


def job(size: int, text: str = "neg") -> tuple[Workload, Schedule]:
    body = f"graph @g(%arg0: f32[{size}]) -> f32[{size}] {{\n  %0: f32[{size}] = {text}(%arg0)\n  return %0\n}}\n"
    w = Workload("pointwise", body)
    return w, TvmBackend().templates(w, detect())[0].space(w, detect()).default()


def reduction(size: int) -> tuple[Workload, Schedule]:
    w = Workload("reduction", f"graph @g(%x: f32[{size}]) -> f32[] {{\n %0: f32[] = sum(%x) {{axes = [0]}}\n return %0\n}}")
    return w, TvmBackend().templates(w, detect())[0].space(w, detect()).default()


def test_a_killed_worker_costs_the_kernel_it_was_at(tmp_path: Path) -> None:
    builder = KernelBuilder()
    builder.prestart(1)
    (worker,) = builder._all
    worker._answer(120.0)  # ready
    worker.ready = True
    os.kill(worker.process.pid, signal.SIGKILL)
    results = builder.build_many([job(11), job(12), job(13)], detect(), tmp_path, workers=1, errors="return")
    assert isinstance(results[0], BuildError) and "f32[11]" in str(results[0])
    assert "died" in str(results[0]) or "is gone" in str(results[0])
    assert all(isinstance(r, Path) for r in results[1:])
    builder.close()


def test_a_hanging_worker_is_replaced(tmp_path: Path) -> None:
    builder = KernelBuilder(seconds=1.0)
    builder.prestart(1)
    (worker,) = builder._all
    worker._answer(120.0)
    worker.ready = True
    os.kill(worker.process.pid, signal.SIGSTOP)
    results = builder.build_many([job(21)], detect(), tmp_path, workers=1, errors="return")
    assert isinstance(results[0], BuildError) and "no answer for 1 s" in str(results[0]) and "f32[21]" in str(results[0])
    builder.seconds = 120.0
    assert isinstance(builder.build_many([job(21)], detect(), tmp_path, workers=1)[0], Path)
    assert worker.process.poll() is not None
    builder.close()


def test_a_worker_that_does_not_start_is_no_candidates_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "start_python", lambda program, errors: start_python("raise ImportError('no tvm here')", errors))
    builder, (w, s) = KernelBuilder(), job(31)
    try:
        with pytest.raises(WorkerError, match=r"can be started: .*no tvm here"):
            builder.build_together(w, [s], detect(), tmp_path, workers=1)
        (result,) = builder.build_many([(w, s)], detect(), tmp_path, workers=1, errors="return")
        assert isinstance(result, BuildError) and "no tvm here" in str(result), "a compilation may do without"
    finally:
        builder.close()


def test_a_parent_without_a_guarded_main(tmp_path: Path) -> None:
    program = f"""
        from pathlib import Path
        from graphopt.autotune.space import Workload
        from graphopt.backends.tvm.backend import TvmBackend
        from graphopt.backends.tvm.build import KernelBuilder
        from graphopt.target import detect
        w = Workload("pointwise", {job(5)[0].text!r})
        s = TvmBackend().templates(w, detect())[0].space(w, detect()).default()
        print(KernelBuilder().build_many([(w, s)], detect(), Path({str(tmp_path)!r}))[0].suffix)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() in (".so", ".o")


def test_an_object_file_serves_where_there_is_no_linker(builder: KernelBuilder, kernels_dir: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    pytest.importorskip("tvm")
    w, s = job(39)
    load_kernel(builder.build_many([(w, s)], detect(), kernels_dir)[0], w, s)  # type: ignore[arg-type]  # sets this process up
    monkeypatch.setattr("graphopt.backends.tvm.link.linker", lambda target: None)
    w, s = job(40)
    path, how = build_one(w, s, detect(), KernelCache(tmp_path))
    assert (path.suffix, how) == (".o", "not linked") and KernelCache(tmp_path).find(w, s, detect()) == path
    x, y = torch.randn(40), torch.empty(40)
    load_kernel(path, w, s)(x, y)
    assert torch.equal(y, -x)


def test_tvms_own_pool_serves_where_there_is_no_libgomp(builder: KernelBuilder, tmp_path: Path) -> None:
    (path,) = builder.build_many([job(300000, "exp")], detect(), tmp_path)
    program = f"""
        import os, torch
        from pathlib import Path
        from graphopt.autotune.space import Schedule, Workload
        from graphopt.backends.tvm import launch, provider
        from graphopt.backends.tvm.build import load_kernel
        launch.find_libgomp = lambda: None
        w, s = Workload("pointwise", {job(300000, "exp")[0].text!r}), Schedule.from_json({job(300000, "exp")[1].to_json()!r})
        kernel = load_kernel(Path({str(path)!r}), w, s)
        cores = os.sched_getaffinity(0)
        x, y = torch.randn(300000), torch.empty(300000)
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            kernel(x, y)
        assert launch.pool() == "tvm" and os.sched_getaffinity(0) == cores
        torch.testing.assert_close(y, x.exp())
        print("right")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "right", done.stderr[-2000:]


def test_threads_get_the_same_bits(builder: KernelBuilder, kernels_dir: Path) -> None:
    w, s = reduction(1 << 20)
    kernel = load_kernel(builder.build_many([(w, s)], detect(), kernels_dir)[0], w, s)  # type: ignore[arg-type]
    x = torch.randn(1 << 20)
    results: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(5):
            y = torch.empty(())
            kernel(x, y)
            results.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 20 and all(torch.equal(r, results[0]) for r in results)


def _workers_used(kernel: object, x: torch.Tensor, y: torch.Tensor) -> int:
    """CPU seconds beyond the wall clock tell whether a second thread ran; counted through the tasks of this process."""
    before = {t: _ticks(t) for t in os.listdir("/proc/self/task")}
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        kernel(x, y)  # type: ignore[operator]
    return sum(_ticks(t) > before.get(t, 0) + 3 for t in os.listdir("/proc/self/task"))


def _ticks(task: str) -> int:
    fields = Path(f"/proc/self/task/{task}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.skipif(not sys.platform.startswith("linux") or len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) < 2, reason="one core")
def test_the_number_of_threads_is_torchs(builder: KernelBuilder, kernels_dir: Path) -> None:
    w, s = job(1 << 22, "tanh")
    kernel = load_kernel(builder.build_many([(w, s)], detect(), kernels_dir)[0], w, s)  # type: ignore[arg-type]
    if launch.pool() != "libgomp":
        pytest.skip("no libgomp here")
    x, y = torch.randn(1 << 22), torch.empty(1 << 22)
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            assert _workers_used(kernel, x, y) == n
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_builds_and_runs(tmp_path: Path) -> None:
    program = f"""
        import os, torch
        torch.set_num_threads(1)
        from pathlib import Path
        from graphopt.autotune.space import Workload
        from graphopt.backends.tvm.backend import TvmBackend
        from graphopt.backends.tvm.build import KernelBuilder, load_kernel
        from graphopt.target import detect
        builder, folder = KernelBuilder(), Path({str(tmp_path)!r})
        def check(text):
            w = Workload("pointwise", text)
            s = TvmBackend().templates(w, detect())[0].space(w, detect()).default()
            x, y = torch.randn(100000), torch.empty(100000)
            load_kernel(builder.build_many([(w, s)], detect(), folder, workers=1)[0], w, s)(x, y)
            return y, x
        y, x = check({job(100000)[0].text!r})
        assert torch.equal(y, -x)
        child = os.fork()
        if child == 0:
            y, x = check({job(100000, "relu")[0].text!r})
            os._exit(0 if torch.equal(y, x.relu()) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        y, x = check({job(100000, "abs")[0].text!r})
        assert torch.equal(y, x.abs())
        print("right")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "right", done.stderr[-2000:]


def test_build_processes_start_early_for_what_was_never_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(KernelBuilder, "prestart", lambda self, workers: started.append(workers))
    provider.prestart(tmp_path, 3)  # before capture: the cache is empty
    provider.prestart(tmp_path, 2, "model")
    assert started == [3, 2]
    provider.remember(tmp_path, "model")
    provider.prestart(tmp_path, 2, "model")
    assert started == [3, 2], "its kernels are there"
    (tmp_path / "kernel.json").write_text("{}")
    provider.prestart(tmp_path, 3)
    assert started == [3, 2]
    provider.prestart(tmp_path, 1, "another")
    assert started == [3, 2, 1]


WARM = """
import sys, torch, graphopt
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU()).eval()
x = torch.linspace(-1, 1, 64).reshape(4, 16)
run = graphopt.compile(model, (x,), cache_dir=sys.argv[1])
torch.testing.assert_close(run(x), model(x))
print(run.report.kernels_built, "tvm" in sys.modules, len(__import__("graphopt.backends.tvm.provider", fromlist=["x"])._builder()._all))
"""


def test_a_second_process_neither_builds_nor_imports_tvm(tmp_path: Path) -> None:
    for cold in (True, False):
        done = subprocess.run([sys.executable, "-c", WARM, str(tmp_path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        built, imported, processes = done.stdout.split()
        assert imported == "False" and (int(built) > 0) == cold and (int(processes) > 0) == cold

"""Threads: one compiled model called from many, compiling beside running, and PyTorch's number of threads in each of them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphopt

pytest.importorskip("tvm_ffi")


class Block(nn.Module):
    """Matmuls, norms, a view and two outputs, one of them a view of the other's memory in eager."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(self.down(torch.nn.functional.gelu(self.up(x))) + x)
        return y, y.softmax(-1).transpose(0, 1)


def in_threads(n: int, work: Callable[[int], None]) -> None:
    """Run ``work(i)`` in n threads at once; raises the first error."""
    errors: list[BaseException] = []
    start = threading.Barrier(n)

    def run(i: int) -> None:
        try:
            start.wait()
            with torch.no_grad():  # a thread starts with gradients on
                work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


def stress(compiled: Callable[..., object], inputs: list[tuple[torch.Tensor, ...]], calls: int) -> None:
    """Every thread has inputs of its own, and keeps its last results: nobody may write into them."""
    expected = [torch.utils._pytree.tree_leaves(compiled(*x)) for x in inputs]

    def work(i: int) -> None:
        kept: list[list[torch.Tensor]] = []
        for _ in range(calls):
            kept = [*kept[-3:], torch.utils._pytree.tree_leaves(compiled(*inputs[i]))]
            for got in kept:
                assert all(map(torch.equal, got, expected[i])), f"thread {i} got other bits"
        pointers = [t.data_ptr() for got in kept for t in got]
        assert len(set(pointers)) == len(pointers), "two results share memory"

    in_threads(len(inputs), work)


@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_eight_threads_get_the_bits_of_one(own: bool) -> None:
    compiled = graphopt.compile(Block().eval(), (torch.randn(20, 64),), own_weights=own)
    stress(compiled, [(torch.randn(20, 64),) for _ in range(8)], calls=200)


@torch.no_grad()
def test_torch_compile_in_eight_threads() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Block().eval(), backend="graphopt")
    stress(compiled, [(torch.randn(20, 64),) for _ in range(8)], calls=50)


@pytest.mark.slow
@torch.no_grad()
def test_eight_threads_call_a_real_model() -> None:
    pytest.importorskip("transformers")
    from benchmarks import models

    model, _ = models.bert(layers=6, tokens=128)
    inputs = [(torch.randint(0, 30000, (1, 128)),) for _ in range(8)]
    stress(graphopt.compile(model, inputs[0]), inputs, calls=200)


@torch.no_grad()
def test_compiling_in_several_threads_at_once() -> None:
    models, x = [Block(32 * (1 + i % 2)).eval() for i in range(4)], torch.randn(6, 64)
    wrong: list[int] = []

    def work(i: int) -> None:
        mine = x[:, : models[i].norm.normalized_shape[0]].contiguous()
        got, want = graphopt.compile(models[i], (mine,))(mine), models[i](mine)
        if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want)):
            wrong.append(i)

    in_threads(4, work)
    assert not wrong


@torch.no_grad()
def test_a_model_runs_while_it_is_compiled_again() -> None:
    """torch.export puts fake tensors into the module while it traces; a call beside it must not see them."""
    model, x = Block().eval(), torch.randn(20, 64)
    compiled = graphopt.compile(model, (x,))
    expected = compiled(x)
    done = threading.Event()
    calls = [0]

    def work(i: int) -> None:
        if i == 0:
            try:
                for _ in range(3):
                    graphopt.compile(model, (x,))
            finally:
                done.set()
            return
        while not done.is_set() or calls[0] < 10:
            got = compiled(x)
            calls[0] += 1
            assert all(map(torch.equal, got, expected))

    in_threads(2, work)


@torch.no_grad()
def test_a_call_from_within_a_call() -> None:
    """A custom operator that calls the compiled model that it is part of: the outer call's arena is not touched."""
    calls: list[torch.Tensor] = []

    @torch.library.custom_op("graphopt_tests::again", mutates_args=())
    def again(x: torch.Tensor) -> torch.Tensor:
        if not calls:
            calls.append(x)
            calls.append(compiled(x + 1.0))
        return x.clone()

    @again.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = torch.tanh(self.a(x))
            return self.b(torch.ops.graphopt_tests.again(kept) + torch.relu(kept))

    model, x = Outer().eval(), torch.randn(20, 64)
    compiled = graphopt.compile(model, (x,))
    calls[:] = [x]  # the reference: no call from within
    expected = compiled(x)
    calls.clear()
    assert torch.equal(compiled(x), expected) and len(calls) == 2
    torch.testing.assert_close(expected, model(x))


COUNTING = """
    import os, threading, time, torch, graphopt
    from pathlib import Path

    def ticks(task):
        try:
            fields = Path(f"/proc/self/task/{task}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended since it was listed
            return 0
        return int(fields[11]) + int(fields[12])

    def used(seconds=0.4):
        before = {t: ticks(t) for t in os.listdir("/proc/self/task")}
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            y = compiled(x)
        assert torch.allclose(y, expected, atol=1e-6)
        return sum(ticks(t) > before.get(t, 0) + 3 for t in os.listdir("/proc/self/task"))

    class Wave(torch.nn.Module):
        def forward(self, x):
            return torch.tanh(x) * 2.0

    x = torch.randn(1 << 20)
    compiled = graphopt.compile(Wave(), (x,))
    expected = Wave()(x)
    found = []
    torch.set_num_threads(1)
    thread = threading.Thread(target=lambda: found.append(used()))  # a thread that has never called into PyTorch's pool
    thread.start(); thread.join()
    for n in (1, 2, 1):
        torch.set_num_threads(n)
        found.append(used())
    torch.set_num_threads(2)
    thread = threading.Thread(target=lambda: found.append(used()))
    thread.start(); thread.join()
    torch.set_num_threads(4 * os.cpu_count())
    assert torch.allclose(compiled(x), expected, atol=1e-6)
    print(found)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) < 2, reason="counts the threads of two cores")
def test_the_number_of_threads_is_torchs_in_every_python_thread() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(COUNTING)], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip().endswith("[1, 1, 2, 1, 2]"), done.stdout + done.stderr[-2000:]

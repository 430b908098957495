"""Joined calls of kernels: which lines of a program are joined, and the same bits as call by call, wherever the weights are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.program import Program
from graphopt.tape import Joined, Launch


def kernel(*_: Any) -> None:
    """Stands for a kernel."""


def joined(lines: list[str], early: tuple[int, ...] = (), weights: tuple[int, ...] = ()) -> Joined:
    """A program of lines; those that begin with ``k(`` are launches."""
    launches = {i: Launch(kernel, tuple(line[2:-1].split(", "))) for i, line in enumerate(lines) if line.startswith("k(")}
    return Joined([], lines, launches, early, weights, staged=2)


def body(source: str) -> list[str]:
    return [line.strip() for line in source.splitlines()[1:]]


def test_launches_that_follow_one_another_are_joined() -> None:
    found = joined(["k(w0, x0, t0)", "k(t0, t1)", "v1 = L1((t1, ), sizes)", "k(t0, v1, t2)", "k(t2, x1, t3)", "return [t3]"], weights=(1,))
    assert body(found.source) == [
        "t1 = arena[1]",
        "t3 = arena[3]",
        "x0 = inputs[0]",
        "run(tapes[0], table, x0)  # 2 kernels",
        "v1 = L1((t1, ), sizes)",
        "run(tapes[1], table, v1)  # 2 kernels",
        "return [t3]",
    ]
    assert [run.values for run in found.runs] == [("x0",), ("v1",)]
    assert found.direct == [1]


def test_memory_of_results_is_made_before_a_run() -> None:
    found = joined(["k(x0, t0)", "v1 = empty((4, ))", "v2 = v1.reshape((2, 2, ))", "k(t0, v1)", "k(v2, t1)", "return [v1]"], early=(1, 2))
    assert body(found.source)[1:] == [
        "v1 = empty((4, ))", "v2 = v1.reshape((2, 2, ))", "run(tapes[0], table, x0, v1, v2)  # 3 kernels", "return [v1]",
    ]  # fmt: skip


def test_a_launch_alone_stays_a_line() -> None:
    found = joined(["k(x0, t0)", "check_index(t0, 0, 4, IndexError)", "k(t0, t1)  # at w7.py:3", "return [t1]"])
    assert not found.runs
    assert body(found.source)[-4:] == ["k(x0, t0)", "check_index(t0, 0, 4, IndexError)", "k(t0, t1)  # at w7.py:3", "return [t1]"]
    assert "w7 =" not in found.source  # a name in a comment is none


class Steps(nn.Module):
    """Kernels with weights read as they are, packed ones, and results in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 64), nn.Linear(64, 48)
        self.first, self.second = nn.LayerNorm(48), nn.LayerNorm(48)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.first(x)
        z = self.second(self.down(torch.tanh(self.up(y))))
        return z, y.reshape(-1), z.softmax(0)


def compiled(**options: Any) -> tuple[Steps, Any, Program]:
    model = Steps().eval()
    made = graphopt.compile(model, [torch.randn(6, 48)], **options)
    program = made._compiled.program  # type: ignore[union-attr]
    assert isinstance(program, Program) and program._joined is not None and len(program._joined.runs) == 1
    return model, made, program


def call_by_call(made: Any, program: Program, x: torch.Tensor) -> list[torch.Tensor]:
    return program.wrapped(lambda i, call: call)(made._exported.flatten((x,), {}))


@pytest.mark.tvm
@torch.no_grad()
def test_the_same_bits_as_call_by_call() -> None:
    _, made, program = compiled()
    for _ in range(3):
        x = torch.randn(6, 48)
        assert all(torch.equal(a, b) for a, b in zip(call_by_call(made, program, x), made(x), strict=True))


@pytest.mark.tvm
@torch.no_grad()
def test_weights_that_move_are_followed() -> None:
    model, made, program = compiled()
    x = torch.randn(6, 48)
    made(x)
    changes: list[Any] = [
        lambda: setattr(model.first.weight, "data", torch.randn(48)),  # another memory
        lambda: setattr(model.second.bias, "data", torch.randn(96)[::2]),  # another layout: copied in each call
        lambda: setattr(model.second.bias, "data", torch.randn(48)),
        lambda: model.up.weight.mul_(2),  # what is packed from it is another tensor
    ]
    for change in changes:
        change()
        for _ in range(2):
            for mine, eager in zip(made(x), model(x), strict=True):
                torch.testing.assert_close(mine, eager)
    assert all(torch.equal(a, b) for a, b in zip(made(x), call_by_call(made, program, x), strict=True))


@pytest.mark.tvm
@torch.no_grad()
def test_weights_that_the_program_owns() -> None:
    model = Steps().eval()
    x = torch.randn(6, 48)
    expected = model(x)
    made = graphopt.compile(model, [x], own_weights=True)
    del model
    for mine, eager in zip(made(x), expected, strict=True):
        torch.testing.assert_close(mine, eager)


@pytest.mark.tvm
@torch.no_grad()
def test_sizes_are_handed_on() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Softmax(-1), nn.LayerNorm(16))
    rows = torch.export.Dim("rows", min=2, max=64)
    made = graphopt.compile(model, [torch.randn(5, 16)], dynamic_shapes=({0: rows},), hot_sizes="none")
    for n in (2, 7, 64):
        x = torch.randn(n, 16)
        torch.testing.assert_close(made(x), model(x))


@pytest.mark.tvm
@torch.no_grad()
def test_errors_of_a_kernel_are_raised() -> None:
    _, made, program = compiled()
    native = program._native
    assert native is not None
    import tvm_ffi

    def broken(*_: Any) -> None:
        raise ValueError("broken here")

    broken_kernel = tvm_ffi.convert(broken)
    joined_ = program._joined
    assert joined_ is not None
    run = joined_.runs[0]
    joined_.runs[0] = type(run)((run.launches[0], Launch(broken_kernel, ("t0",)), *run.launches[1:]), run.values)
    program._arenas.free().clear()
    with pytest.raises(ValueError, match="broken here"):
        made(torch.randn(6, 48))

"""Profiles: every call of a program is measured once a run, with its arithmetic and its bytes; results stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import graphopt
from graphopt.backends.eager import LibraryCall
from graphopt.cli.main import app
from graphopt.errors import UsageError
from graphopt.ir import parse_graph
from graphopt.lower import lower
from graphopt.profile import CallCost, Profile, profile, waits_for
from graphopt.program import Program
from graphopt.target import Target

CPU = torch.device("cpu")

MODEL = """graph @m(%x: f32[B, 8], weight %w: f32[8, 4], %i: f32[1, 3, 9, 9], %f: f32[5, 3, 3, 3]) -> (f32[B, 4], f32[1, 5, 4, 4])
where 0 <= B {
  %0: f32[B, 4] = matmul(%x, %w)  // k1(model.py:3
  %1: f32[B, 4] = exp(%0)
  %2: f32[1, 5, 4, 4] = conv(%i, %f) {stride = [2, 2], padding = [0, 0], dilation = [1, 1]}
  return %1, %2
}"""


def program_of(text: str) -> Program:
    lowered = lower(parse_graph(text), Target("cpu", "x86_64"), None, "the test asks for it", asked=True)
    return Program(lowered, [], lambda node: LibraryCall(node, CPU), CPU)


def test_costs() -> None:
    program = program_of(MODEL)
    inputs = [torch.randn(6, 8), torch.randn(8, 4), torch.randn(1, 3, 9, 9), torch.randn(5, 3, 3, 3)]
    expected = program(inputs)

    found = profile(program, inputs, runs=3)

    assert [c.flops for c in found.calls] == [2 * 6 * 4 * 8, 0, 2 * 5 * 16 * 27]
    assert [c.bytes for c in found.calls] == [4 * (48 + 32 + 24), 4 * (24 + 24), 4 * (243 + 135 + 80)]
    assert all(c.seconds > 0 and c.kind == "library" for c in found.calls)
    assert found.calls[2].what == "conv 1x3x9x9 / 2 * 5x3x3x3"
    for a, b in zip(program(inputs), expected, strict=True):
        assert torch.equal(a, b)


def test_each_gpu_that_has_a_tensor_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    gpus = [torch.device("cuda", i) for i in (1, 0, 1)]

    class OnGpu(torch.Tensor):
        is_cuda = True
        device = property(lambda x: gpus[len(x)])  # type: ignore[assignment]

    waits_for([torch.zeros(2).as_subclass(OnGpu), torch.zeros(0).as_subclass(OnGpu), torch.zeros(3), 1])()
    assert waited == [gpus[2]]
    waited.clear()
    waits_for([torch.zeros(3), None])()
    assert not waited


def test_wrapped_programs_call_everything_through_the_wrapper() -> None:
    program = program_of(MODEL)
    inputs = [torch.randn(6, 8), torch.randn(8, 4), torch.randn(1, 3, 9, 9), torch.randn(5, 3, 3, 3)]
    seen: list[int] = []

    def wrap(i, call):
        return lambda *args: (seen.append(i), call(*args))[1]

    twin = program.wrapped(wrap)
    for a, b in zip(twin(inputs), program(inputs), strict=True):
        assert torch.equal(a, b)
    assert seen == [0, 1, 2]


def test_table() -> None:
    calls = [CallCost("a", "matmul", 1e-3, 2 * 10**6, 4 * 10**6, ""), CallCost("b", "pointwise", 4e-3, 0, 10**6, "")]
    text = Profile((*calls, calls[0]), 7e-3).table()
    lines = [line for line in text.splitlines() if "matmul" in line or "pointwise" in line]
    assert "pointwise" in lines[0] and "66.7%" in lines[0]
    assert [cell.strip() for cell in lines[1].split("│")[1:-1]] == ["matmul", "a", "2", "1000.0", "33.3%", "2", "4.0"]
    assert "and 1 more" in Profile(tuple(calls), 7e-3).table(limit=1)


@pytest.mark.tvm
def test_kernels_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "profiled.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Softmax(-1)), torch.randn(2, 8)\n"
    )
    result = CliRunner().invoke(app, ["explain", f"{tmp_path}/profiled.py:make", "--profile"])
    assert result.exit_code == 0, result.output
    assert "matmul 2x8 * 8x4" in result.output and "GFLOP/s" in result.output


def test_what_has_no_program_says_so() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.qr(x)[0]

    compiled = graphopt.compile(Odd(), (torch.randn(4, 4),))
    if type(compiled._compiled).__name__ == "LibraryGraph":
        with pytest.raises(UsageError, match="as a whole"):
            compiled.profile(torch.randn(4, 4))
    else:
        assert compiled.profile(torch.randn(4, 4), runs=1).calls[0].kind == "library"

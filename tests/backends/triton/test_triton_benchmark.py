"""benchmarks/gpu.py without a GPU: its cases are kernels, right at the size at which it checks them, and it says that there is no GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from triton_check import SM_90, runner, templates

from graphopt.autotune.space import Workload
from graphopt.errors import UsageError
from graphopt.ir.text import parse_graph
from graphopt.sampling import random_inputs
from graphopt.target import Target
from graphopt.testing.kernels import check

FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", FILE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["benchmarks_gpu"] = importlib.util.module_from_spec(spec)  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


GPU = load()


@pytest.mark.parametrize("name", GPU.CASES)
def test_cases_have_kernels(name: str) -> None:
    kind, text = GPU.CASES[name]
    assert templates(parse_graph("graph @g" + text), kind, SM_90)[1]


@pytest.mark.parametrize("name", ["layer norm", "matmul, odd", "sum", "rows added by index"])
def test_small_cases_are_right(name: str) -> None:
    kind, text = GPU.CASES[name]
    graph = parse_graph("graph @g" + GPU.small(text))
    assert max(int(v.type.numel) for v in graph.inputs) < 1 << 17
    check(graph, runner(graph, kind), random_inputs(graph, {}, 0), factor=4.0, slack=2)


@pytest.mark.parametrize("name", GPU.CASES)
def test_schedules(name: str) -> None:
    """Each is for sm_90, at the size that is timed and the one that is checked; what is not for sm_80 tells why."""
    kind, text = GPU.CASES[name]
    for size in (text, GPU.small(text)):
        w = Workload.of(parse_graph("graph @g" + size), kind)
        assert ("tensor_map" in GPU.source_of(name, w, SM_90).text) == (name.endswith((", by descriptor", ", both")))
        if name == "matmul, both":
            with pytest.raises(UsageError, match="sm_80 copies no tiles by descriptor"):
                GPU.source_of(name, w, Target.from_name("cuda:sm_80"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert GPU.main() == GPU.NO_GPU
    assert "There is no GPU here" in capsys.readouterr().out

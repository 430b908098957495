"""``graphopt bench``: wrong requests are named at once; a tiny model is really measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from graphopt.bench.models import MODELS
from graphopt.cli.main import app

MODEL = """
import torch

def make():
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)), (torch.randn(4, 32),)

class Odd(torch.nn.Module):
    def forward(self, x):
        return x.tolist()[0][0]

def odd():
    return Odd(), (torch.randn(4, 32),)
"""


def bench(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", *args])


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ((), "which model?"),
        (("brt",), "bert"),
        (("mlp", "--against", "inducto"), "inductor"),
        (("nowhere.py:make",), "there is no file nowhere.py"),
        (("mlp", "--json", "/nowhere/at/all/r.json"), "there is no folder /nowhere/at/all"),
    ],
)
def test_wrong_requests(args: tuple[str, ...], word: str) -> None:
    done = bench(*args)
    assert done.exit_code == 2
    assert word in done.stderr


def test_the_models_are_listed() -> None:
    done = bench("--list-models")
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(MODELS)


def test_help_teaches() -> None:
    done = bench("--help")
    for word in ("graphopt bench mlp decode --quick", "--against", "--plot", "graphopt[bench]"):
        assert word in done.stdout


def test_a_tiny_model(tmp_path: Path) -> None:
    pytest.importorskip("tvm_ffi")
    (tmp_path / "tiny_for_bench.py").write_text(MODEL)
    spec, file = f"{tmp_path}/tiny_for_bench.py:make", f"{tmp_path}/r.json"
    done = bench(spec, "--against", "none", "--rounds", "2", "--threads", "1", "--json", file)
    assert done.exit_code == 0, done.output
    read = json.loads((tmp_path / "r.json").read_text())
    (found,) = read["models"]
    assert found["work"] == {"flops": 2 * 4 * (32 * 64 + 64 * 8), "weight_bytes": 4 * (32 * 64 + 64 + 64 * 8 + 8)}
    for system in ("eager", "graphopt"):
        got = found["systems"][system]
        assert got["median"] > 0 and got["error"] < 1e-5 and sum(map(len, got["seconds"])) >= 4
    compiled = found["systems"]["graphopt"]
    assert compiled["cold"] > 0 and compiled["warm"] > 0
    assert read["limits"]["flops"] > 1e9 and read["limits"]["bytes"] > 1e8
    assert "geometric mean" in done.stdout


def test_a_model_that_fails_is_shown(tmp_path: Path) -> None:
    pytest.importorskip("tvm_ffi")
    (tmp_path / "odd_for_bench.py").write_text(MODEL.replace("x.tolist()[0][0]", "1 / 0"))
    done = bench(f"{tmp_path}/odd_for_bench.py:odd", "--against", "none", "--quick")
    assert done.exit_code == 1
    assert "failed: ZeroDivisionError" in done.stdout

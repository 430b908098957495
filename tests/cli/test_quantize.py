"""``graphopt quantize``: the ledger as a table and as JSON, the files that it writes, wrong requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from graphopt.cli.main import app
from graphopt.passes.quantization.scheme import SCHEMES

MODEL = '''
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128)).eval(), (torch.randn(2, 128),)
'''


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "quantized_model.py").write_text(MODEL)
    return f"{tmp_path}/quantized_model.py:make"


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["quantize", *args])


def test_table_and_files(model: str, tmp_path: Path) -> None:
    done = run(model, "--scheme", "int4-weight-g32", "--no-measure", "--out", str(tmp_path / "q"))
    assert done.exit_code == 0, done.output
    assert "2 of 2 weights quantized" in done.output and "256x128" in done.output
    loaded = torch.load(tmp_path / "q" / "model.pt", weights_only=False)
    ledger = json.loads((tmp_path / "q" / "ledger.json").read_text())
    assert [e["name"] for e in ledger["entries"]] == ["0", "2"] and loaded(torch.randn(2, 128)).shape == (2, 128)
    assert ledger["bytes_saved"] == 2 * 128 * 256 * 4 - sum(e["bytes"] for e in ledger["entries"])


def test_json_and_keep(model: str) -> None:
    done = run(model, "--keep", "2", "--no-measure", "--json")
    assert [e["verdict"] for e in json.loads(done.output)["entries"]] == ["quantized", "left: as asked"]


def test_calibration(model: str, tmp_path: Path) -> None:
    (tmp_path / "samples_of_it.py").write_text("import torch\ndef make():\n    yield torch.ones(3, 128)\n    yield (torch.ones(1, 128),)")
    samples = f"{tmp_path}/samples_of_it.py:make"
    done = run(model, "--scheme", "int8-static", "--method", "gptq", "--observer", "mse", "--calibration", samples, "--no-measure")
    assert done.exit_code == 0 and "int8-static" in done.output, done.output


def test_fastest_within(model: str, tmp_path: Path) -> None:
    """By a metric that the last layer alone moves: both layers get few bits, or, of that one, none."""
    (tmp_path / "metric_of_it.py").write_text("def judge(m):\n    return float(m[2].weight.abs().sum())\n")
    args = ("--fastest-within", "0.1%", "--metric", f"{tmp_path}/metric_of_it.py:judge", "--no-measure", "--out", str(tmp_path / "q"))
    done = run(model, *args)
    assert done.exit_code == 0, done.output
    assert "within 0.100%" in done.output and "taken" in done.output
    front = json.loads((tmp_path / "q" / "front.json").read_text())
    ledger = json.loads((tmp_path / "q" / "ledger.json").read_text())
    taken = front["points"][front["chosen"]]["schemes"]
    assert taken == {e["name"]: e["scheme"] for e in ledger["entries"] if e["scheme"]} and taken["0"] == "int4-weight"
    assert {o["scheme"] for o in front["options"]} == {"int8-weight", "int4-weight"}
    as_json = json.loads(run(model, "--fastest-within", "0.9", "--no-measure", "--json").output)
    assert as_json["front"]["chosen"] == len(as_json["front"]["points"]) - 1


def test_what_the_model_does_not_take(model: str, tmp_path: Path) -> None:
    (tmp_path / "wrong_samples.py").write_text("import torch\ndef make():\n    return [torch.ones(3, 128), torch.ones(3, 96)]\n")
    (tmp_path / "wrong_metric.py").write_text("def judge(m):\n    return m.no_such_layer\n")
    done = run(model, "--method", "gptq", "--calibration", f"{tmp_path}/wrong_samples.py:make", "--no-measure")
    assert done.exit_code == 2 and done.output.count("\n") == 1, done.output
    assert done.output.startswith("graphopt: error: calibration batch 1: the model raised RuntimeError: mat1 and mat2 shapes")
    done = run(model, "--fastest-within", "1%", "--metric", f"{tmp_path}/wrong_metric.py:judge", "--no-measure")
    assert done.exit_code == 2 and "the metric of the float model raised AttributeError" in done.output


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """It is said before the model is loaded."""
    (tmp_path / "file").write_text("")
    for out, words in (("file", "is a file: give a folder"), ("file/q", "cannot be written: Not a directory")):
        done = run("no_such_model.py:make", "--out", str(tmp_path / out))
        assert done.exit_code == 2 and words in done.output, done.output


def test_a_model_that_cannot_be_pickled(tmp_path: Path) -> None:
    """The ledger is printed and written all the same."""
    (tmp_path / "unpicklable_model.py").write_text(MODEL.replace("torch.nn.ReLU()", "type('Local', (torch.nn.ReLU,), {})()"))
    done = run(f"{tmp_path}/unpicklable_model.py:make", "--no-measure", "--out", str(tmp_path / "q"))
    assert done.exit_code == 2 and "the model cannot be pickled" in done.output and "2 of 2 weights quantized" in done.output
    assert [p.name for p in (tmp_path / "q").iterdir()] == ["ledger.json"]


def test_help_lists_all_schemes() -> None:
    text = run("--help").output
    assert all(name in text for name in SCHEMES) and "-g256" in text and "Without --metric" in " ".join(text.split())


@pytest.mark.parametrize(("args", "words"), [
    (("--fastest-within", "much"), "give a share"), (("--fastest-within", "1%", "--metric", "nothing"), "names no function"),
    (("--fastest-within", "1%", "--schemes", "int4-weight,int5"), "there is no scheme"),
    (("--scheme", "int9-weight"), "there is no scheme"), (("--keep", "7"), "fits none"), (("--method", "gptk"), "there is no method"),
    (("--calibration", "nothing"), "names no samples"),
])  # fmt: skip
def test_wrong_requests(model: str, args: tuple[str, str], words: str) -> None:
    done = run(model, "--no-measure", *args)
    assert done.exit_code == 2 and words in done.output

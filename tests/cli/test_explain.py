"""``graphopt explain`` and ``graphopt doctor``: reports, and every wrong model named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from graphopt.cli.doctor import _sizes
from graphopt.cli.main import app

MODELS = '''
import torch
import {neighbour}

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(8, 4)
    def forward(self, x, scale=None):
        y = torch.softmax(self.a(x), -1)  # the softmax
        return y if scale is None else y * scale

class Bad(torch.nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # depends on data
            return x
        return -x

def make():
    return Net(), (torch.randn(2, 8),)
def with_keywords():
    return Net(), dict(x=torch.randn(2, 8), scale=torch.ones(4))
def one_tensor():
    return Net(), torch.randn(2, 8)
def bad():
    return Bad(), (torch.randn(2, 8),)
def alone():
    return Net()
def swapped():
    return (torch.randn(2, 8),), Net()
def inputs():
    return Net(), 3
def fails():
    raise ValueError("no weights here")
number = 3
'''


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "a_neighbour.py").write_text("x = 1\n")
    file = folder / "models_for_explain.py"
    file.write_text(MODELS.format(neighbour="a_neighbour"))
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "raises.py").write_text("import nowhere_to_be_found\n")
    return file


def explain(spec: str, *args: str) -> Result:
    return CliRunner().invoke(app, ["explain", spec, "--backend", "eager", *args])


def test_a_report_for_people(models: Path) -> None:
    done = explain(f"{models}:make", "--remarks", "all", "--show", "after")
    assert done.exit_code == 0, done.output
    for word in ("fuse", "softmax", models.name, "library calls", "// after\ngraph @"):
        assert word in done.stdout
    assert done.stderr == ""


def test_options_of_the_compiler(models: Path, tmp_path: Path) -> None:
    def report(*args: str) -> dict[str, Any]:
        done = explain(f"{models}:make", "--json", *args)
        assert done.exit_code == 0, done.output
        return dict(json.loads(done.stdout))

    def numbers(*args: str) -> list[int]:
        return [r["number"] for r in report(*args)["remarks"] if r["number"] is not None]

    every = numbers()
    assert len(every) >= 2 and numbers("--fuel", "1") == every[:1] and numbers("--fuel", "0") == []
    assert every[0] not in numbers("--skip-rewrite", str(every[0]))
    assert report("--name", "mine", "--cache-dir", str(tmp_path / "kernels"))["name"] == "mine"


@pytest.mark.parametrize("factory", ["with_keywords", "one_tensor"])
def test_a_report_for_programs(models: Path, factory: str) -> None:
    done = explain(f"{models}:{factory}", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert {"passes", "remarks", "kernels", "fallbacks"} <= set(report) and any(p["name"] == "fuse" for p in report["passes"])


def test_a_module_by_name(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(models.parent))
    assert explain("models_for_explain:make").exit_code == 0


def test_an_exported_program(tmp_path: Path) -> None:
    path = tmp_path / "linear.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(8, 4), (torch.randn(2, 8),)), path)
    done = explain(str(path))
    assert done.exit_code == 0, done.output
    done = explain(str(path), "--profile")
    assert done.exit_code == 0 and "a run " in done.stdout, "measured on the inputs that it was exported with"


def test_an_exported_program_without_inputs_cannot_be_measured(tmp_path: Path) -> None:
    path = tmp_path / "linear.pt2"
    program = torch.export.export(torch.nn.Linear(8, 4), (torch.randn(2, 8),))
    program._example_inputs = None  # as programs made by other tools have it
    torch.export.save(program, path)
    assert explain(str(path)).exit_code == 0, "compiling needs none"
    done = explain(str(path), "--profile")
    assert done.exit_code == 2 and "has no example inputs" in done.stderr and "file.py:factory" in done.stderr


@pytest.mark.parametrize(
    ("spec", "status", "messages"),
    [
        ("{models}:mke", 2, ["has no 'mke' (did you mean 'make'?)"]),
        ("{models}:alone", 2, ["must return (module, example inputs)", "what it returns is of type Net"]),
        ("{models}:swapped", 2, ["the first is a tuple of 1, not a torch.nn.Module"]),
        ("{models}:inputs", 2, ["the second is of type int"]),
        ("{models}:fails", 2, ["ValueError: no weights here", "models_for_explain.py:34: raise ValueError"]),
        ("{models}:number", 2, ["is of type int, not a function"]),
        ("{models}:bad", 6, ["Bad could not be exported", "models_for_explain.py:15"]),
        ("{models}", 2, ["is a file: which factory in it?", "models_for_explain.py:make"]),
        ("nothing", 2, ["names no model; MODEL is file.py:factory, package.module:factory, a .pt2 file, or one of mlp, bert"]),
        ("{folder}/none.py:make", 2, ["there is no file"]),
        ("{folder}/none.pt2", 2, ["there is no file"]),
        ("{folder}/broken.py:f", 2, ["fails when it is imported: SyntaxError"]),
        ("{folder}/raises.py:f", 2, ["fails when it is imported: ModuleNotFoundError", "raises.py:1"]),
        ("no_such_package.models:make", 2, ["there is no module 'no_such_package'"]),
    ],
)
def test_wrong_models(models: Path, spec: str, status: int, messages: list[str]) -> None:
    done = explain(spec.format(models=models, folder=models.parent))
    assert done.exit_code == status, done.output
    assert done.stdout == "" and "Traceback" not in done.stderr
    for message in messages:
        assert message in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--verify", "eachpass"], "option verify='eachpass' is none of off, structure, each-pass (did you mean 'each-pass'?)"),
        (["--pipeline", "fused"], "there is no pass 'fused' (did you mean 'fuse'?)"),
        (["--show", "aftre"], "--show 'aftre' is none of before, after, program (did you mean 'after'?)"),
        (["--remarks", "some"], "'some'"),
    ],
)
def test_wrong_options(models: Path, args: list[str], message: str) -> None:
    done = explain(f"{models}:make", *args)
    assert done.exit_code == 2 and message in done.stderr


def test_doctor() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    found = {f["item"]: f for f in json.loads(done.stdout)}
    assert {"python", "torch", "apache-tvm", "triton", "cpu", "linker", "threads", "kernel cache"} <= set(found)
    assert found["torch"]["status"] == "ok" and found["torch"]["found"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert done.exit_code == (1 if any(f["status"] == "missing" for f in found.values()) else 0)
    assert all(f["hint"] for f in found.values() if f["status"] != "ok")


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.cli.doctor._load_trouble", lambda module: "libcuda.so: no such file" if module == "tvm" else "")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "libcuda.so: no such file; pip install --force-reinstall 'apache-tvm==" in done.stdout


def test_doctor_looks_at_a_cache_that_others_change(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(b"12345")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")  # listed, but no longer there
    assert list(_sizes(tmp_path)) == [5] and list(_sizes(tmp_path / "nothing")) == []


@pytest.mark.parametrize("command", [[], ["opt"], ["explain"], ["doctor"]])
def test_help_teaches(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--help"])
    assert done.exit_code == 0 and "graphopt" in done.stdout
    assert done.stdout.count("\n  graphopt ") >= 2, "help has examples"

"""The processes that run a system: what they compare, and what happens when they fail or die."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from graphopt.bench.measure import label
from graphopt.bench.session import Session
from graphopt.bench.system import Job, SystemFailure, in_a_line
from graphopt.bench.systems import SYSTEMS
from graphopt.bench.worker import errors, tensors

MODEL = """
import os, random, torch

def make():
    return torch.nn.Linear(8, 4), (torch.randn(2, 8),)

class Dies(torch.nn.Module):
    def forward(self, x):
        print("a last word", file=__import__("sys").stderr, flush=True)
        os._exit(7)

def dies():
    return Dies(), (torch.randn(2, 8),)
"""


def test_errors_are_relative_to_the_largest_element_of_each_result() -> None:
    reference = [torch.tensor([1.0, -4.0], dtype=torch.float64), torch.tensor([10.0], dtype=torch.float64)]
    found = [torch.tensor([1.0, -4.2]), torch.tensor([10.1])]
    assert errors(found, reference) == pytest.approx(0.05)
    assert errors([torch.zeros(0)], [torch.zeros(0)]) == 0.0
    with pytest.raises(SystemFailure, match="shapes"):
        errors(found[:1], reference)


def test_results_that_are_no_numbers_are_an_error() -> None:
    assert errors([torch.tensor([float("nan")])], [torch.tensor([1.0])]) == float("inf")


def test_tensors_of_any_result_are_copies() -> None:
    x = torch.ones(2)
    found = tensors({"a": x, "b": (x.numpy(), 3)})
    x.zero_()
    assert [t.tolist() for t in found] == [[1.0, 1.0], [1.0, 1.0]]


def test_an_exception_in_a_line() -> None:
    text = in_a_line(RuntimeError("Check failed\nthe operator foo is not known here\n" + "x" * 500))
    assert text == "RuntimeError: the operator foo is not known here"
    assert len(in_a_line(RuntimeError("a b c " * 200))) == 160


def test_missing_packages_are_named_with_the_command() -> None:
    system = SYSTEMS["openvino"]
    absent = type(system)(system.name, system.title, ("no_such_package",), False, system.load, system.prepare)
    assert "pip install no_such_package" in str(absent.missing())
    assert SYSTEMS["eager"].missing() is None


def test_inputs_in_the_order_of_the_arguments() -> None:
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    job = Job(torch.nn.Identity(), (a, (b, 5)), {"k": c}, 1, Path())
    assert [t.shape[0] for t in job.tensors()] == [1, 2, 3]


@pytest.mark.parametrize(("model", "expected"), [("bert", "bert"), ("a/b.py:make", "b.py:make"), ("m.n:make", "m.n:make")])
def test_labels(model: str, expected: str) -> None:
    assert label(model) == expected


def test_the_same_weights_in_every_process_and_a_death_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model_for_worker.py").write_text(MODEL)
    file = str(tmp_path / "reference.pt")
    with Session(os.environ) as first:
        first.ask("reference", model=f"{tmp_path}/model_for_worker.py:make", file=file)
    request = {"system": "eager", "threads": 1, "folder": str(tmp_path), "cache_dir": "", "reference": file}
    with Session(os.environ) as second:
        assert second.ask("prepare", model=f"{tmp_path}/model_for_worker.py:make", **request)["error"] < 1e-5
        assert len(second.ask("run", calls=3)["seconds"]) == 3
        assert second.ask("memory")["all"] > 1 << 20
        with pytest.raises(SystemFailure, match="there is no file"):
            second.ask("prepare", model="nowhere.py:make", **request)
        with pytest.raises(SystemFailure, match=r"died \(exit status 7\): a last word"):
            second.ask("prepare", model=f"{tmp_path}/model_for_worker.py:dies", **request)

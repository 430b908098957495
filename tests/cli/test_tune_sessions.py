"""What ``graphopt tune`` does at the end: the models measured, and what does them harm withdrawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from graphopt.autotune.database import Database
from graphopt.before_after import BeforeAfter, KernelTimes
from graphopt.cli import tune_sessions
from graphopt.cli.tune_sessions import MEASURED, RemoteSession, Session
from graphopt.remote import Address
from graphopt.target import detect
from graphopt.tuned import device_key
from graphopt.tuning_tasks import Tasks
from tests.autotune.db_check import NOW, record, workload

SPARSE = """
import torch

class Sparse(torch.nn.Module):
    def forward(self, x):
        return x.nonzero()

def make():
    return Sparse(), torch.randn(4, 32)
"""


def ran(name: str, slower: Sequence[str]) -> BeforeAfter:
    kernels = tuple(KernelTimes(key, 1, 1e-3, 2e-3, workloads=(key,)) for key in slower)
    return BeforeAfter(name, (1e-3,) * 20, (1e-3,) * 20, kernels)


class Finish:
    """A session whose models are slower by some kernels, and by fewer each time that they are measured."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, runs: dict[str, list[list[str]]], withdrawn: bool = True) -> None:
        self.measured: list[str] = []
        self.asked: list[list[str]] = []
        self.text = io.StringIO()
        session = Session([], detect(), Database(path / "tuning.db"), {}, 1)
        session.console = session.errors = Console(file=self.text, width=200)
        session.models = [SimpleNamespace(name=name) for name in runs]  # type: ignore[misc]

        def measure(m: Any, *_: object) -> BeforeAfter:
            self.measured.append(m.name)
            left = runs[m.name]
            return ran(m.name, left.pop(0) if left else [])

        def withdraw(_: object, keys: Sequence[str], *__: object) -> int:
            self.asked.append(list(keys))
            return len(keys) if withdrawn else 0

        monkeypatch.setattr(tune_sessions, "_measured", measure)
        monkeypatch.setattr(tune_sessions, "withdraw", withdraw)
        session.finish()


def test_what_does_no_harm_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f = Finish(tmp_path, monkeypatch, {"a": [], "b": []})
    assert f.measured == ["a", "b"] and "withdrawn" not in f.text.getvalue()


def test_all_models_are_measured_again_after_a_withdrawal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f = Finish(tmp_path, monkeypatch, {"a": [], "b": [["k"]]})
    assert f.measured == ["a", "b", "a", "b"] and f.asked == [["k"], []]
    assert "1 kernel of them withdrawn" in f.text.getvalue() and "not measured any more" not in f.text.getvalue()


def test_it_ends_and_says_what_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f = Finish(tmp_path, monkeypatch, {"a": [[f"k{n}"] for n in range(9)]})
    assert f.measured == ["a"] * MEASURED and f.text.getvalue().count("not measured any more") == 1


def test_it_ends_where_nothing_can_be_withdrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Finish(tmp_path, monkeypatch, {"a": [["k"], ["k"]]}, withdrawn=False).measured == ["a"]


def test_a_model_that_cannot_be_captured_is_left_out_for_another_machine_too(tmp_path: Path) -> None:
    (tmp_path / "sparse_model.py").write_text(SPARSE)
    name = f"{tmp_path}/sparse_model.py:make"
    session = RemoteSession([name], "cpu", Address.parse("localhost:9190", "k"), Database(tmp_path / "tuning.db"), 1, 0)
    session.errors = Console(file=(text := io.StringIO()), width=200)
    assert session.of_each(session._estimates) == []
    assert "sparse_model.py:make is left out: the model runs through library kernels as a whole: " in text.getvalue()


@pytest.mark.parametrize(("threads", "warned"), [(2, False), (3, True)])
def test_more_threads_than_cores_are_named(threads: int, warned: bool, tmp_path: Path) -> None:
    session = Session([], detect(), Database(tmp_path / "tuning.db"), {}, threads)
    session.errors = Console(file=(text := io.StringIO()), width=200)
    session.check_threads(2)
    assert ("3 threads are more than the 2 cores there" in text.getvalue()) == warned


@pytest.mark.parametrize(("threads", "hint"), [(1, " with 1 thread (--threads 2, 4 has one)"), (2, " that no other process is at")])
def test_a_run_with_other_threads_is_named(threads: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = workload()
    session = Session([], detect(), Database(tmp_path / "tuning.db"), {}, threads)
    session.errors = Console(file=(text := io.StringIO()), width=300)
    session.found = Tasks([SimpleNamespace(workload=w)])  # type: ignore[list-item]
    monkeypatch.setattr("graphopt.tuning.versions", lambda target: NOW)
    monkeypatch.setattr("graphopt.tuning.going_on", lambda run: threads == 2)  # then it is the run of another process
    session.database.add([record(1, target=device_key(detect()), threads=n, run=f"run-{n}") for n in (2, 4)])
    assert session._run(0, resume=True).run == ""
    assert f"no run of these models on this device{hint} to go on with" in text.getvalue()

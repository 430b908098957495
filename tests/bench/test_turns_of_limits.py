"""The machine's limits, measured in turns with the systems."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt.bench import measure
from graphopt.bench.limits import Limits
from graphopt.bench.measure import Settings, _rounds
from graphopt.bench.results import ModelResult, SystemResult
from graphopt.bench.stats import Times
from graphopt.bench.system import SystemFailure
from graphopt.bench.work import Work


class Answers:
    """A session that answers what it is told to, and then fails."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers)

    def ask(self, what: str, **_: Any) -> dict[str, Any]:
        if not self.answers:
            raise SystemFailure("it died")
        return self.answers.pop(0)


def limits(flops: float, read: float) -> dict[str, Any]:
    return vars(Limits(flops, read, 2, 1 << 20))


def test_medians_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SILENCE", 0.0)
    result, meter = ModelResult("m"), Answers(limits(5e9, 3e9), limits(4e9, 9e9), limits(9e9, 4e9))
    _rounds(result, {}, Settings((), 2, rounds=3), lambda _: None, meter)  # type: ignore[arg-type]
    assert result.limits is not None and (result.limits.flops, result.limits.bytes) == (5e9, 4e9)


def test_a_meter_that_dies_leaves_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SILENCE", 0.0)
    result = ModelResult("m", {"eager": SystemResult("eager")})
    calls = Answers(*[{"seconds": [1.0]}] * 4)
    _rounds(result, {"eager": calls}, Settings((), 2, rounds=3), lambda _: None, Answers(limits(5e9, 3e9)))  # type: ignore[arg-type,dict-item]
    assert result.limits is not None and result.limits.bytes == 3e9
    assert not calls.answers and not result.systems["eager"].failed


@pytest.mark.parametrize(("peer", "rounds"), [([2.0] * 16, 4), ([2.0, 3.0] * 8, 16)])
def test_rounds_go_on_while_they_differ(monkeypatch: pytest.MonkeyPatch, peer: list[float], rounds: int) -> None:
    monkeypatch.setattr(measure, "SILENCE", 0.0)
    result = ModelResult("m", {n: SystemResult(n) for n in ("eager", "graphopt")})
    ready = {"eager": Answers(*[{"seconds": [t]} for t in [2.0, *peer]]), "graphopt": Answers(*[{"seconds": [1.0]}] * 17)}
    samples = _rounds(result, ready, Settings((), 2, rounds=4), lambda _: None, None)  # type: ignore[arg-type]
    assert [len(turns) for turns in samples.values()] == [rounds, rounds]


def test_a_share_is_told_of_work_that_is_known() -> None:
    found = {n: SystemResult(n, Times(((0.01,),))) for n in ("graphopt-float", "graphopt-int8-weight", "onnxruntime-int8")}
    found["graphopt-int8-weight"].work = Work(0, 20_000_000)
    m = ModelResult("m", found, Work(0, 80_000_000), limits=Limits(1e12, 10e9, 2, 1), ours="graphopt-int8-weight")
    assert m.fraction("graphopt-float", None) == pytest.approx(0.8)
    assert m.fraction("graphopt-int8-weight", None) == pytest.approx(0.2)
    assert m.fraction("onnxruntime-int8", None) is None

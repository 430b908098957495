"""What is claimed, what is not, and how it is printed, plotted and written."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from graphopt.bench.limits import Limits
from graphopt.bench.load import Load
from graphopt.bench.plot import apart, plot
from graphopt.bench.results import BEST, ModelResult, Results, SystemResult
from graphopt.bench.stats import Times
from graphopt.bench.table import milliseconds, show, verdict
from graphopt.bench.work import Work
from graphopt.errors import UsageError

QUIET = Load(1.0, 0.0, 0.0, 0.0)
LIMITS = Limits(400e9, 30e9, 2, 1 << 30)


def system(name: str, ms: float, spread: float = 0.01) -> SystemResult:
    base = ms / 1e3
    return SystemResult(name, Times(tuple((base * (1 + spread * k / 2),) for k in (-2, -1, 0, 1, 2))), error=1e-6, memory=5_000_000)


def model(name: str = "m", during: Load = QUIET, **ms: float) -> ModelResult:
    return ModelResult(name, {k: system(k, v) for k, v in ms.items()}, Work(4_000_000_000, 30_000_000), QUIET, during)


def results(*models: ModelResult) -> Results:
    return Results({"processor": "a processor", "threads": 2, "rounds": 3, "versions": {"torch": "2"}}, LIMITS, models=list(models))


def value(m: ModelResult, peer: str) -> float:
    found = m.ratio(peer)
    assert found is not None
    return found.value


def text(r: Results) -> str:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(r, console)
    return console.export_text()


def test_ratios() -> None:
    m = model(eager=40.0, graphopt=20.0, inductor=30.0, onnxruntime=25.0, openvino=15.0)
    assert value(m, "eager") == pytest.approx(2.0)
    assert value(m, "openvino") == pytest.approx(0.75)
    assert m.best_converter() == "openvino"
    assert value(m, BEST) == pytest.approx(0.75)
    assert m.fraction("graphopt", LIMITS) == pytest.approx(0.5)  # 4 GFLOP at 400 GFLOP/s: 10 ms


def test_the_slower_of_arithmetic_and_weights_is_the_limit() -> None:
    assert LIMITS.least_seconds(4e9, 30e6) == pytest.approx(0.01)
    assert LIMITS.least_seconds(1e6, 30e6) == pytest.approx(0.001)


def test_slower_is_printed_as_slower() -> None:
    assert verdict(0.8).plain == "0.80x (slower)"
    assert verdict(1.25).plain == "1.25x"
    assert verdict(0.999).plain == "0.99x (slower)"  # never rounded up to a draw
    assert "slower" in text(results(model(graphopt=20.0, inductor=10.0)))


@pytest.mark.parametrize("load", [Load(1.0, 0.7, 0.0, 0.0), Load(1.0, 0.0, 0.5, 0.0), Load(1.0, 0.0, 0.0, 900.0)])
def test_a_busy_machine_claims_nothing(load: Load) -> None:
    r = results(model(during=load, eager=40.0, graphopt=20.0))
    assert r.models[0].ratio("eager") is None
    assert r.geometric_mean("eager") == (None, 0)
    printed = text(r)
    assert "not claimed" in printed and "no ratio is claimed" in printed and "2.00x" not in printed
    assert "20.00" in printed  # the times themselves are shown


def test_times_that_vary_claim_nothing_against_that_system_only() -> None:
    m = model(eager=40.0, graphopt=20.0)
    m.systems["inductor"] = system("inductor", 30.0, spread=0.5)
    assert m.ratio("inductor") is None
    assert value(m, "eager") == pytest.approx(2.0)
    assert "the ratio to Inductor is not claimed: it lies between" in text(results(m))


def test_how_sure_a_ratio_is_stands_beside_it() -> None:
    assert "2.00x ±" in text(results(model(eager=40.0, graphopt=20.0)))


def test_one_round_claims_nothing() -> None:
    found = {n: SystemResult(n, Times(((t, t, t),))) for n, t in (("eager", 2.0), ("graphopt", 1.0))}
    m = ModelResult("m", found, before=QUIET, during=QUIET)
    assert m.ratio("eager") is None
    assert "fewer than 4 rounds do not tell how sure it is" in text(results(m))


def test_a_failure_is_a_line_not_a_gap() -> None:
    m = model(eager=40.0, graphopt=20.0, onnxruntime=30.0)
    m.systems["openvino"] = SystemResult("openvino", failed="OpConversionFailure: no such operator")
    printed = text(results(m))
    assert "m: OpenVINO failed: OpConversionFailure: no such operator" in printed
    assert value(m, BEST) == pytest.approx(1.5)  # of those that ran
    assert m.ratio("openvino") is None


def test_geometric_mean_is_of_the_claimed_models_and_says_how_many() -> None:
    r = results(model("a", eager=40.0, graphopt=20.0), model("b", eager=10.0, graphopt=20.0),
                model("c", during=Load(1.0, 1.0, 0.0, 0.0), eager=90.0, graphopt=20.0))  # fmt: skip
    assert r.geometric_mean("eager") == (pytest.approx(1.0), 2)
    assert "(2 of 3)" in text(r)


def test_json_round_trip() -> None:
    m = model(eager=40.0, graphopt=20.0)
    m.systems["inductor"] = SystemResult("inductor", failed="no compiler")
    read = json.loads(json.dumps(results(m).to_json()))
    found = read["models"][0]
    assert found["systems"]["graphopt"]["median"] == pytest.approx(0.02)
    assert len(found["systems"]["graphopt"]["seconds"]) == 5
    assert found["systems"]["inductor"]["failed"] == "no compiler" and "median" not in found["systems"]["inductor"]
    assert found["ratios"] == {"eager": pytest.approx(2.0), "inductor": None}
    assert read["geometric_means"]["eager"] == {"ratio": pytest.approx(2.0), "models": 1}
    assert read["limits"]["flops"] == 400e9


@pytest.mark.parametrize(("seconds", "expected"), [(0.0000123, "0.012"), (0.01234, "12.34"), (0.1234, "123")])
def test_milliseconds(seconds: float, expected: str) -> None:
    assert milliseconds(seconds) == expected


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    m = model(eager=40.0, graphopt=20.0)
    m.systems["openvino"] = SystemResult("openvino", failed="no")
    plot(results(m, model("decode", graphopt=12.0)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_labels_are_moved_apart() -> None:
    assert apart([0.1, 0.5], 0.1) == [0.1, 0.5]
    moved = apart([0.9, 0.88, 0.95, 0.2], 0.1)
    assert moved[3] == 0.2 and max(moved) <= 0.95
    ordered = sorted(moved)
    assert all(b - a > 0.0999 for a, b in pairwise(ordered))
    assert moved[1] < moved[0] < moved[2]  # the order stays


def test_a_plot_without_limits_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    r = results(model(graphopt=20.0))
    r.limits, r.limits_failed = None, "no TVM"
    with pytest.raises(UsageError, match="no TVM"):
        plot(r, tmp_path / "a.png")

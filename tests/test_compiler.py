"""The compiler as a whole: strictness, options, pipelines of one compilation, reports, and kernels that cannot be built."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import BuildError, FallbackError, UsageError
from graphopt.ir import Graph
from graphopt.options import Options
from graphopt.pass_manager import PASSES, Pass, PassContext, make_pass

pytest.importorskip("tvm_ffi")
X = torch.linspace(-2, 2, 32).reshape(4, 8)


pytestmark = pytest.mark.usefixtures("fresh")


class Norm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(torch.tanh(x), ord=3, dim=-1)


class Count(Pass):
    """Counts nodes; changes nothing."""

    name = "test-count"
    label: str = "here"

    def run(self, g: Graph, ctx: PassContext) -> bool:
        ctx.analysis(self.name, f"{self.label}: {len(g)} nodes")
        return False


def last() -> graphopt.Report:
    return graphopt.reports()[-1]


def test_a_fallback_is_reported_with_its_reason_and_source_line() -> None:
    compiled = graphopt.compile(Norm(), (X,))
    torch.testing.assert_close(compiled(X), Norm()(X))
    (fallback,) = compiled.report.fallbacks
    assert fallback.op == "aten.linalg_vector_norm.default" and not fallback.asked
    assert "test_compiler.py" in fallback.loc and "no lowering" in fallback.reason
    assert "vector_norm" in compiled.report.summary()


def test_strict_names_op_types_and_source_line() -> None:
    with pytest.raises(FallbackError, match=r"linalg_vector_norm.*f32\[4, 8\].*test_compiler.py:\d+"):
        graphopt.compile(Norm(), (X,), strict=True)


def test_library_kernels_that_were_asked_for_are_no_fallback() -> None:
    compiled = graphopt.compile(Norm(), (X,), backend="eager", strict=True)
    assert not compiled.report.kernels and all(f.asked for f in compiled.report.fallbacks)


def test_a_graph_that_cannot_be_captured_runs_and_is_reported() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))

    torch.testing.assert_close(torch.compile(f, backend="graphopt")(X), f(X))
    assert [x.op for x in last().fallbacks] == ["whole graph"] and "cond" in last().fallbacks[0].reason
    torch._dynamo.reset()
    with pytest.raises(Exception, match="whole graph"):
        torch.compile(f, backend="graphopt", options={"strict": True})(X)


def test_a_pass_is_inserted_for_one_compilation_and_is_part_of_its_key() -> None:
    keys = []
    for edits in (None, {"before": {"fuse": [Count()]}}, {"before": {"fuse": [Count(label="there")]}}):
        report = graphopt.compile(nn.Tanh(), (X,), pipeline=edits).report
        keys.append(report.key)
        assert any(r.pass_name == "test-count" for r in report.remarks) == (edits is not None)
    assert len(set(keys)) == 3
    assert graphopt.compile(nn.Tanh(), (X,)).report.key == keys[0]


def test_passes_of_installed_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "test-from-elsewhere"

        @staticmethod
        def load() -> type[Pass]:
            return Count

    real = importlib.metadata.entry_points
    found: dict[str, Any] = {"group": "graphopt.passes"}
    monkeypatch.setattr("graphopt.pass_manager.entry_points", lambda **k: [Point] if k == found else real(**k))
    try:
        assert make_pass("test-from-elsewhere") == Count()
    finally:
        PASSES.pop("test-from-elsewhere", None)


def test_fuel_switches_rewrites_off_by_number() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    whole = graphopt.compile(model, (X,)).report
    made = [r.number for r in whole.remarks if r.kind == "passed" and r.number]
    assert made
    none = graphopt.compile(model, (X,), fuel=0)
    assert not [r for r in none.report.remarks if r.kind == "passed" and r.number]
    torch.testing.assert_close(none(X), model(X))
    skipped = graphopt.compile(model, (X,), skip_rewrites=(made[0],)).report
    assert made[0] not in [r.number for r in skipped.remarks]


@pytest.mark.parametrize("options", [{"verfy": "off"}, {"verify": "sometimes"}, {"mode": "fast"}, {"pipeline": "no-such-pass"}])
def test_wrong_options_are_usage_errors(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        graphopt.compile(nn.Tanh(), (X,), **options)


def test_a_kernel_that_cannot_be_built_becomes_a_reported_library_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> Path:
        raise BuildError("out of luck")

    monkeypatch.setattr("graphopt.backends.tvm.build.KernelBuilder._build", fail)
    compiled = graphopt.compile(nn.Tanh(), (X,), cache_dir=tmp_path)
    torch.testing.assert_close(compiled(X), X.tanh())
    (fallback,) = compiled.report.unasked_fallbacks
    assert "out of luck" in fallback.reason and "out of luck" in compiled.report.notes[0]
    with pytest.raises(FallbackError, match="out of luck"):
        graphopt.compile(nn.Tanh(), (X,), cache_dir=tmp_path, strict=True)


def test_report_is_json() -> None:
    report = graphopt.compile(nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)), (X,), name="two").report
    data = json.loads(json.dumps(report.to_json()))
    assert data["name"] == "two" and data["kernels"] and data["passes"] and data["remarks"]
    assert {"planned", "unplanned", "weights", "staged", "outputs", "eager"} == set(data["memory"])


def test_equal_regions_share_a_kernel() -> None:
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(8, 8), nn.Tanh())])
    report = graphopt.compile(model, (X,)).report
    assert [(k.kind, k.calls) for k in report.kernels] == [("matmul", 3)]


def test_an_unwritable_cache_warns_and_kernels_run_all_the_same(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with pytest.warns(UserWarning, match="cannot be kept"):
        compiled = graphopt.compile(nn.Tanh(), (X,), cache_dir=blocked, strict=True)
    torch.testing.assert_close(compiled(X), X.tanh())


@pytest.mark.parametrize("options", [{"fuel": "3"}, {"fuel": -1}, {"skip_rewrites": "1,2"}, {"strict": "yes"}, {"workers": -1}, {"name": 3},
                                     {"pipeline": "fuse{max_nodes=two}"}])  # fmt: skip
def test_option_values_of_a_wrong_kind_are_usage_errors(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        graphopt.compile(nn.Tanh(), (X,), **options)


def test_values_of_options_that_are_told() -> None:
    with pytest.raises(UsageError, match=r"option precision='fp16' is none of bf16, f16 \(did you mean 'f16'\?\)"):
        Options(precision="fp16")
    with pytest.raises(UsageError, match="option cache_dir=5 must be a path"):
        Options.make(options={"cache_dir": 5})


def test_options_in_a_dict_are_pointed_to_keywords() -> None:
    with pytest.raises(UsageError, match=r"as keywords: graphopt\.compile\(model, args, strict=True, verify='off'\)"):
        graphopt.compile(nn.Tanh(), (X,), options={"strict": True, "verify": "off"})


@pytest.mark.parametrize("options", [{"backend": "inductor"}, {"pipeline": "lower"}])
def test_names_that_are_far_off_are_not_guessed(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        graphopt.compile(nn.Tanh(), (X,), **options)
    assert "did you mean" not in str(caught.value)


def test_options_are_the_same_however_they_are_given(tmp_path: Path) -> None:
    given = {"verify": True, "skip_rewrites": [1, 2], "cache_dir": str(tmp_path)}
    assert Options(**given) == Options.make(options=given) == Options(verify="each-pass", skip_rewrites=(1, 2), cache_dir=tmp_path)
    assert Options(verify=False).verify == "off" and Options(cache_dir="~/x").cache_dir == Path.home() / "x"  # type: ignore[arg-type]


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    path.write_bytes(b"garbage")
    with pytest.raises(UsageError, match="no exported program"):
        graphopt.compile(path)


def test_refresh_sees_what_leaves_no_trace() -> None:
    model = nn.Linear(64, 64)
    compiled = torch.compile(model, backend="graphopt")
    x = torch.ones(2, 64)
    compiled(x)
    model.weight.data[3, 5] += 100
    graphopt.refresh()
    torch.testing.assert_close(compiled(x), model(x))

"""precision="bf16" from end to end: through torch.compile, beside autocast, and with weights that change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.exact import is_bf16
from graphopt.target import detect

pytestmark = [pytest.mark.tvm, pytest.mark.skipif(not detect().bf16_products, reason="this processor multiplies no bf16")]


def block() -> tuple[nn.Module, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 96), nn.LayerNorm(96)).eval()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) / (p.shape[-1] ** 0.5)
    return model, torch.randn(33, 96, generator=generator)


def error(y: torch.Tensor, true: torch.Tensor) -> float:
    return float((y.double() - true).norm() / true.norm())


def test_through_torch_compile_with_no_larger_error_than_autocast() -> None:
    model, x = block()
    compiled = torch.compile(model, backend="graphopt", options={"precision": "bf16", "strict": True})
    with torch.no_grad():
        y, own = compiled(x), model(x)
        true = model.double()(x.double())
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
    assert y.dtype == own.dtype == torch.float32
    assert 1e-4 < error(y, true) <= error(low, true)
    passed = [r for r in graphopt.reports()[-1].remarks if r.pass_name == "autocast" and r.kind == "passed"]
    assert len(passed) == 2


def test_weights_that_change_are_rounded_again() -> None:
    model, x = block()
    compiled = graphopt.compile(model, (x,), precision="bf16")
    with torch.no_grad():
        compiled(x)
        model[0].weight.mul_(2.0)
        assert error(compiled(x), model(x).double()) < 2e-2


def test_a_model_under_autocast_is_left_as_it_is() -> None:
    model, x = block()
    made = []
    for options in ({}, {"precision": "bf16"}):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="graphopt", options=options)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            made.append((compiled(x), graphopt.reports()[-1]))
    (a, before), (b, after) = made
    assert torch.equal(a, b) and before.text_after == after.text_after


def test_any_number_of_rows() -> None:
    model, x = block()
    rows = torch.export.Dim("rows", min=1, max=200)
    compiled = graphopt.compile(model, (x,), precision="bf16", dynamic_shapes=({0: rows},), hot_sizes="none")
    for n in (1, 17, 150):
        x = torch.randn(n, 96)
        with torch.no_grad():
            assert error(compiled(x), model(x).double()) < 2e-2


def exact_block(rows: int) -> tuple[nn.Module, torch.Tensor]:
    """A model whose matrices are bf16, stored as f32."""
    model, x = block()
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    return model, x[:rows]


@pytest.mark.parametrize("rows", [1, 8, 33])
def test_weights_that_are_bf16_in_truth_are_kept_so_and_lose_nothing(rows: int) -> None:
    if rows > 8 and detect().bf16_products != "amx":
        pytest.skip("more rows need AMX tiles")
    model, x = exact_block(rows)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="graphopt", options={"strict": True})
    with torch.no_grad():
        y, own, true = compiled(x), model(x), model.double()(x.double())
    report = graphopt.reports()[-1]
    assert sum(r.pass_name == "narrow-weights" and r.kind == "passed" and "saves" in r.message for r in report.remarks) == 2
    assert error(y, true) <= 2 * error(own, true)
    assert report.memory["staged"] == 2 * 96 * 128 * 2


def test_weights_that_are_not_exact_any_more_have_the_model_compiled_again() -> None:
    model, x = exact_block(33)
    compiled = graphopt.compile(model, (x,))
    with torch.no_grad():
        compiled(x)
        model[2].weight.mul_(1.1)  # no bf16 any more
        for _ in range(2):
            y, own = compiled(x), model(x)
            torch.testing.assert_close(y, own, rtol=1e-5, atol=1e-5)
        model[0].weight.copy_(torch.randn(128, 96))
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert any("compiled again" in note for note in compiled.report.notes)
    assert not any(r.pass_name == "narrow-weights" and r.kind == "passed" for r in compiled.report.remarks)


def test_what_counts_as_exact() -> None:
    w = torch.randn(40, 50).bfloat16().float()
    assert is_bf16(w) and is_bf16(w.t())
    for value in (1.001, float("inf"), float("nan"), 1e-40):
        other = w.clone()
        other[-1, -1] = value
        assert not is_bf16(other), value
    assert not is_bf16(w.double()) and not is_bf16(w.to("meta"))


def test_what_is_tuned_are_the_kernels_that_run() -> None:
    """Programs of a model for a target, made without building anything, know exact weights, too."""
    from graphopt.model import lowered
    from graphopt.options import Options
    from graphopt.target import Target

    model, x = exact_block(33)
    ((graph, _),) = lowered(model, (x,), None, Target.from_name("cpu:sapphirerapids"), Options())
    assert "bf16[" in str(graph)

"""Fake quantization: the values of the quantized model, gradients straight through, and parameters that are the model's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphopt
from graphopt.bits import fastest_within
from graphopt.errors import UsageError
from graphopt.fake_quantized import FakeQuantized, rounded, straight_through
from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantized_linear import QuantizedLinear, divided

WEIGHTS = ("int8-weight", "int4-weight", "int4-weight-g32-zp", "int2-weight", "fp8-e4m3-weight", "fp8-e5m2-weight")
BOTH = ("int8-dynamic", "int8-static", "fp8-e4m3-dynamic", "fp8-e4m3-static")


def linear() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 64), nn.GELU(), nn.Linear(64, 48, bias=False)), torch.randn(2, 5, 100)


def convolutions() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2)), torch.randn(2, 3, 9, 9)


@pytest.mark.parametrize("scheme", [*WEIGHTS, *BOTH])
def test_results_are_those_of_the_quantized_model(scheme: str) -> None:
    model, x = linear()
    made = graphopt.quantize(model, (x,), scheme=scheme, calibration=[x], measure=False, least=1)
    fake = graphopt.fake_quantize(model, (x,), scheme=scheme, calibration=[x], least=1)
    with torch.no_grad():
        expected, plain = made(x), model(x)
        torch.testing.assert_close(fake(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert float((expected - plain).norm() / plain.norm()) > 1e-3  # which are not those of the float model


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
def test_convolutions(scheme: str) -> None:
    model, x = convolutions()
    made = graphopt.quantize(model, (x,), scheme=scheme, calibration=[x], measure=False, least=1)
    fake = graphopt.fake_quantize(model, (x,), scheme=scheme, calibration=[x], least=1)
    assert isinstance(fake[0], FakeQuantized)  # type: ignore[index]
    with torch.no_grad():
        torch.testing.assert_close(fake(x), made(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fake(x)[0], fake[2](fake[1](fake[0](x[0]))), rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_convolutions_keep_the_integers_that_they_were_trained_with() -> None:
    """Batch norms are folded into them afterwards: a factor for each output, some of them negative."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)), torch.randn(8, 3, 9, 9)
    nn.init.normal_(model[1].weight)  # type: ignore[arg-type]
    fake = graphopt.fake_quantize(model, scheme="int8-dynamic", least=1)
    for _ in range(3):
        fake(x).square().mean().backward()
    made, unfolded = (graphopt.quantize(m.eval(), (x,), scheme="int8-dynamic", measure=False, least=1)[0] for m in (fake, fake[:1]))  # type: ignore[index]
    signs = model[1].weight.sign().to(torch.int8).reshape(-1, 1, 1, 1)  # type: ignore[operator, union-attr]
    assert torch.equal(made.integers, unfolded.integers * signs) and not torch.equal(made.scales, unfolded.scales)
    whole = graphopt.quantize(fake, (x,), scheme="int8-dynamic", measure=False, least=1)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), fake(x), rtol=0, atol=1e-5)


def test_a_matrix_that_lies_the_other_way() -> None:
    modeling = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model, x = nn.Sequential(modeling.Conv1D(48, 96)), torch.randn(4, 96)
    made = graphopt.quantize(model, (x,), scheme="int4-weight-g32", measure=False, least=1)
    fake = graphopt.fake_quantize(model, scheme="int4-weight-g32", least=1)
    torch.testing.assert_close(fake(x), made(x), rtol=1e-5, atol=1e-6)


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    model, x = linear()
    fake = graphopt.fake_quantize(model, scheme="int4-weight", least=1)
    fake(x).square().sum().backward()
    scheme = Scheme.parse("int4-weight")
    near = [rounded(divided(m.weight.detach(), scheme), scheme).flatten(1)[:, : m.weight.shape[1]] for m in (model[0], model[2])]
    leaves = [w.clone().requires_grad_() for w in near]
    functional.linear(functional.gelu(functional.linear(x, leaves[0], model[0].bias)), leaves[1]).square().sum().backward()
    for m, leaf in zip((model[0], model[2]), leaves, strict=True):
        assert m.weight.grad is not None and leaf.grad is not None
        torch.testing.assert_close(m.weight.grad, leaf.grad, rtol=1e-5, atol=1e-4)


def test_no_gradient_where_a_static_range_cuts_off() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    fake = graphopt.fake_quantize(model, scheme="int8-static", calibration=[torch.full((1, 8), 1.27)], least=1)
    x = torch.tensor([[0.5, 1.27, 1.5, 100.0, -1.28, -1.5, 0.0, -0.5]], requires_grad=True)
    fake(x).sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).tolist() == [[True, True, False, False, True, False, True, True]]


def test_rounded_numbers_come_out_to_the_bit() -> None:
    x = torch.randn(1000, requires_grad=True)
    near = (x * 7).round() / 7
    y = straight_through(x, near)
    assert torch.equal(y, near)
    y.sum().backward()
    assert x.grad is not None and bool((x.grad == 1).all())


def test_training_helps_and_trains_the_model_itself() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(256, 32)
    with torch.no_grad():
        wanted = model(x)

    def loss() -> float:
        made = graphopt.quantize(model, (x,), scheme="int2-weight-g32", measure=False, least=1)
        with torch.no_grad():
            return float(functional.mse_loss(made(x), wanted))

    before, fake = loss(), graphopt.fake_quantize(model, scheme="int2-weight-g32", least=1)
    assert {id(p) for p in fake.parameters()} == {id(p) for p in model.parameters()}
    optimizer = torch.optim.Adam(fake.parameters(), 3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        functional.mse_loss(fake(x), wanted).backward()
        optimizer.step()
    assert loss() < 0.85 * before


def test_the_trained_model_is_quantized_as_the_one_behind_it() -> None:
    model, x = linear()
    fake = graphopt.fake_quantize(model, scheme="int4-weight", least=1)
    for given in (fake, graphopt.fake_quantize(fake, scheme="int4-weight", least=1)):
        made = graphopt.quantize(given, (x,), scheme="int4-weight", keep=["2"], measure=False, least=1)
        assert [e.name for e in made.ledger.entries] == ["0", "2"] and not made.ledger.notes
        assert torch.equal(made[2].weight, model[2].weight)  # type: ignore[index]
        assert torch.equal(made(x), graphopt.quantize(model, scheme="int4-weight", keep=["2"], least=1)(x))
    assert isinstance(fake[0], FakeQuantized) and isinstance(fake[2], FakeQuantized)  # type: ignore[index]
    (note,) = graphopt.quantize(fake, (x,), scheme="int8-weight", measure=False, least=1).ledger.notes
    assert note == "trained with rounding by another scheme: int4-weight (2)"
    alone = graphopt.fake_quantize(nn.Linear(64, 32), scheme="int4-weight", least=1)
    assert isinstance(graphopt.quantize(alone, scheme="int4-weight", least=1), QuantizedLinear)
    best, _ = fastest_within(fake, (x,), budget=1.0, measure=False, least=1)
    assert isinstance(best[0], QuantizedLinear)  # type: ignore[index]


@pytest.mark.tvm
@pytest.mark.parametrize("scheme", ["int4-weight", "int8-dynamic"])
def test_compiled_by_graphopt_gradients_are_eagers(scheme: str) -> None:
    model, x = linear()
    fake = graphopt.fake_quantize(model, scheme=scheme, least=1)
    fake(x).square().sum().backward()
    expected = [p.grad.clone() for p in fake.parameters() if p.grad is not None]
    fake.zero_grad()
    torch.compile(fake, backend="graphopt")(x).square().sum().backward()
    for p, e in zip(fake.parameters(), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, e, rtol=1e-3, atol=1e-3 * float(e.abs().max()))


def test_wrong_words_are_errors() -> None:
    model, x = linear()
    with pytest.raises(UsageError, match="there is no scheme"):
        graphopt.fake_quantize(model, scheme="int5-weight")
    with pytest.raises(UsageError, match="there is no observer 'minmix'"):
        graphopt.fake_quantize(model, scheme="int8-static", observer="minmix", calibration=[x])
    with pytest.raises(UsageError, match="fits none of the layers"):
        graphopt.fake_quantize(model, keep=["head"])
    with pytest.raises(UsageError, match="calibrat"):
        graphopt.fake_quantize(model, scheme="int8-static", least=1)


def test_what_is_kept_stays_a_plain_layer() -> None:
    model, _ = linear()
    fake = graphopt.fake_quantize(model, scheme="int8-weight", keep=["2"], least=1)
    assert isinstance(fake[0], FakeQuantized) and fake[2].weight is model[2].weight and type(fake[2]) is nn.Linear  # type: ignore[index]

"""What the ledger says of weights that no scheme takes; and what is derived from nn.Linear, and is quantized or not."""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import graphopt
from graphopt.errors import UsageError
from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantized_linear import QuantizedLinear
from graphopt.unquantized import unquantized


class Named(nn.Linear):
    """A name and a start of its own, no more."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, 0, 0.05)
        nn.init.zeros_(self.bias)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Counting(nn.Linear):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x)


class Padded(nn.Conv2d):
    pass


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place, self.first = nn.Parameter(torch.zeros(1, 9, 32)), nn.Parameter(torch.zeros(1, 1, 32))


def verdicts(model: nn.Module, **given: object) -> dict[str, str]:
    return {e.name: e.verdict for e in graphopt.quantize(model, measure=False, **given).ledger.entries}  # type: ignore[union-attr]


@pytest.mark.parametrize(("module", "shapes", "why"), [
    (nn.MultiheadAttention(32, 4), {"m.in_proj_weight": (96, 32), "m.out_proj": (32, 32)}, "without calling a layer"),
    (nn.LSTM(32, 16), {"m.weight_ih_l0": (64, 32), "m.weight_hh_l0": (64, 16)}, "recurrent"),
    (nn.GRUCell(32, 16), {"m.weight_ih": (48, 32), "m.weight_hh": (48, 16)}, "recurrent"),
    (nn.ConvTranspose2d(3, 5, 2), {"m": (3, 5, 2, 2)}, "transposed"), (nn.Bilinear(3, 4, 5), {"m": (5, 3, 4)}, "bilinear"),
    (Doubled(32, 16), {"m": (16, 32)}, "Doubled is more than the nn.Linear"), (Counting(32, 16), {"m": (16, 32)}, "Counting is more"),
    (Padded(3, 5, 2), {"m": (5, 3, 2, 2)}, "Padded is derived from a convolution"),
    (parametrizations.weight_norm(nn.Linear(32, 16)), {"m": (16, 32)}, "computed at each call"),
    (prune.l1_unstructured(nn.Linear(32, 16), "weight", 0.5), {"m": (16, 32)}, "computed at each call"),
    (Patches(), {"m.place": (1, 9, 32)}, "a parameter of Patches"),
    (QuantizedLinear.of(torch.randn(16, 32), None, Scheme.parse("int4-weight")), {"m": (16, 32)}, "already"),
])  # fmt: skip
def test_what_is_left_is_said(module: nn.Module, shapes: dict[str, tuple[int, ...]], why: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 16), "m": module, "e": nn.Embedding(9, 9), "n": nn.LayerNorm((4, 4)), "z": nn.Linear(16, 8)})
    made = graphopt.quantize(model, scheme="int8-weight", least=1)
    assert [e.name for e in made.ledger.entries] == ["a", *shapes, "z"], "in the model's order"
    mine = made.ledger.entries[1:-1]
    assert [e.shape for e in mine] == [*shapes.values()] and all(why in e.verdict and e.bytes == e.float_bytes > 0 for e in mine)
    assert f"2 of {2 + len(shapes)} weights quantized" in made.ledger.summary()
    assert json.loads(json.dumps(made.ledger.to_json()))["entries"][1]["verdict"] == mine[0].verdict
    torch.save(made.ledger, file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=False) == made.ledger and str(made.ledger)


def test_a_tied_weight_is_told_once() -> None:
    model = nn.Sequential(nn.Linear(32, 32), Doubled(32, 32), Patches(), Patches())
    model[1].weight = model[0].weight
    model[3].place = model[2].place
    assert [*verdicts(model, least=1)] == ["0", "2.place"]


def test_what_is_quantized_already_is_left() -> None:
    once = graphopt.quantize(nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128)), scheme="int2-weight", method="split")
    assert verdicts(once) == dict.fromkeys(("0", "1"), "left: it is quantized already")
    assert [e.scheme for e in unquantized(once[1])[""]] == ["int2-weight, in 3 parts"]  # type: ignore[index]


@pytest.mark.parametrize(("scheme", "method"), [("int4-weight", "gptq"), ("int8-dynamic", "smoothquant"), ("int8-static", "rtn")])
def test_a_derived_linear_layer_that_does_no_more_is_quantized(scheme: str, method: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(128), Named(128, 256), nn.ReLU(), Named(256, 128)).eval(), torch.randn(64, 128) * 5
    x[:, 3] *= 40
    plain = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).eval()
    plain.load_state_dict(model.state_dict())
    made, wanted = (graphopt.quantize(m, (x,), scheme=scheme, method=method, measure=False) for m in (model, plain))
    assert isinstance(made[1], QuantizedLinear) and made.ledger == wanted.ledger  # type: ignore[index]
    with torch.no_grad():
        assert torch.equal(made(x), wanted(x))


def test_a_layer_without_a_shape_is_an_error() -> None:
    model = nn.Sequential(nn.LazyLinear(128), nn.Linear(128, 128))
    with pytest.raises(UsageError, match=r"the weights of 0 have no shape yet \(LazyLinear\): call the model once"):
        graphopt.quantize(model, (torch.randn(2, 128),))

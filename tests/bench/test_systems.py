"""Which systems a run compares, and graphopt in a scheme of quantization as one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt.bench.plot import look
from graphopt.bench.quantized_systems import has_convolutions
from graphopt.bench.results import converters
from graphopt.bench.system import Job
from graphopt.bench.systems import FLOAT, PEERS, SYSTEMS, system
from graphopt.cli.bench import _systems
from graphopt.errors import UsageError


def test_without_a_scheme_the_float_systems_are_compared() -> None:
    assert _systems(None, "") == ("graphopt", ("eager", "graphopt", *PEERS))
    assert _systems("none", "") == ("graphopt", ("eager", "graphopt"))
    assert _systems(FLOAT.name, "") == ("graphopt", ("eager", "graphopt", FLOAT.name))
    assert _systems("openvino, inductor", "") == ("graphopt", ("eager", "graphopt", "inductor", "openvino"))


IN_8_BITS = ("onnxruntime-int8", "openvino-int8")


@pytest.mark.parametrize(("scheme", "peers"), [("int8-static", IN_8_BITS), ("int4-weight-g32", ("torchao-int4",)), ("fp8-e4m3-weight", ())])
def test_a_quantized_model_is_compared_with_its_float_form_and_those_of_as_many_bits(scheme: str, peers: tuple[str, ...]) -> None:
    ours = f"graphopt-{scheme}"
    assert _systems(None, scheme) == (ours, ("eager", ours, FLOAT.name, *peers))


def test_wrong_names_say_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"there is no scheme 'int8-dynamc'.*int8-dynamic"):
        _systems(None, "int8-dynamc")
    with pytest.raises(UsageError, match=r"'openvino-int4' is none of .*openvino-int8"):
        _systems("openvino-int4", "int4-weight")
    with pytest.raises(KeyError):
        system("nothing")


def test_the_best_of_two_runtimes_is_among_those_of_as_many_bits() -> None:
    names = [*SYSTEMS, "graphopt-int8-weight"]
    assert converters(names) == ["onnxruntime", "openvino"]
    assert converters(names, narrow=True) == ["onnxruntime-int8", "openvino-int8"]
    assert converters(["onnxruntime", "onnxruntime-int8"]) == []  # the best of one is no peer of its own


def test_every_system_has_a_colour() -> None:
    assert len({look(n) for n in (*SYSTEMS, "graphopt-int8-dynamic")}) == len(SYSTEMS) + 1


def test_an_embedding_of_patches_does_not_make_a_model_one_of_convolutions() -> None:
    patches = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Linear(8, 8))
    assert not has_convolutions(patches)
    assert has_convolutions(nn.Sequential(patches, nn.Conv2d(8, 8, 3)))


@pytest.mark.tvm
@pytest.mark.parametrize("name", [FLOAT.name, "graphopt-int8-weight"])
def test_graphopt_ahead_of_time(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64)).eval(), torch.randn(3, 256)
    with torch.no_grad():
        expected = model(x)
        prepared = system(name).prepare(Job(model, (x,), {}, 1, tmp_path, tmp_path))
        error = float((prepared.run() - expected).abs().max() / expected.abs().max())
    assert error < 1e-5 if name == FLOAT.name else 1e-5 < error < 2e-2

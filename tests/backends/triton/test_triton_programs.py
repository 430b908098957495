"""Models end to end on the triton backend: under the interpreter, strict, without TVM; and what it says to who asks wrongly."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import MODELS
from torch import nn

import graphopt
from graphopt.errors import DeviceError, UsageError
from graphopt.model import CompiledModel


def compiled(model: nn.Module, *inputs: torch.Tensor, **options: object) -> CompiledModel:
    given = {"backend": "triton", "target": "cuda:sm_90:4", "strict": True, **options}
    with torch.no_grad():
        return graphopt.compile(model, inputs, **given)


def agree(model: nn.Module, compiled: CompiledModel, *inputs: torch.Tensor) -> None:
    """The error against f64 of each result is at most a few times eager's own."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        results = compiled(*inputs), model(*inputs), copy.deepcopy(model).double()(*wide)
    for got, own, true in zip(*(r if isinstance(r, tuple | list) else [r] for r in results), strict=True):
        error, allowed = (got.double() - true).abs().max(), (own.double() - true).abs().max()
        assert error <= 3 * allowed + 4 * torch.finfo(own.dtype).eps * true.abs().max(), (error, allowed)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(31, 65), nn.GELU(), nn.LayerNorm(65), nn.Linear(65, 33), nn.Softmax(-1)).eval()


def test_an_mlp(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(37, 31)
    c = compiled(model, x, cache_dir=str(tmp_path))
    assert [k.backend for k in c.report.kernels] == ["triton"] * 4 and not c.report.fallbacks
    agree(model, c, x)
    text = Path(c.report.kernels[0].path).read_text()
    assert text.startswith("# matmul region for cuda:sm_90") and "@triton.jit" in text
    again = compiled(model, x, cache_dir=str(tmp_path))
    assert [k.cache for k in again.report.kernels] == ["hit"] * 4


SCHEMES = ("int8-weight", "int4-weight", "fp8-e4m3-weight", "fp8-e5m2-weight", "int8-dynamic", "fp8-e4m3-dynamic", "fp8-e5m2-dynamic")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_layers(scheme: str) -> None:
    """The kernels of a GPU compute what those of the CPU do; integers are multiplied as such."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 100), nn.GELU(), nn.Linear(100, 64)).eval(), torch.randn(20, 64)
    made = graphopt.quantize(model, (x,), scheme=scheme, least=1, measure=False)
    c = compiled(made, x)
    with torch.no_grad():
        torch.testing.assert_close(c(x), graphopt.compile(made, (x,), strict=True)(x))
    products = [text for k in c.report.kernels if "matmul(" in (text := Path(k.path).read_text())]
    assert len(products) == 2 and all(("{acc = i32}" in text) == (scheme == "int8-dynamic") for text in products)


QUICK = ("bert", "llama", "vit", "resnet50")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_benchmark_models(name: str) -> None:
    """Every model of the CPU's benchmark, small: no call of the library."""
    model, inputs = MODELS[name]()
    c = compiled(model, *inputs)
    assert not c.report.fallbacks and all(k.backend == "triton" for k in c.report.kernels)
    agree(model, c, *inputs)


def test_a_batch_of_any_size() -> None:
    model, x = mlp(), torch.randn(5, 31)
    with torch.no_grad():
        f = torch.compile(model, backend="graphopt", dynamic=True, options={"backend": "triton", "target": "hip:gfx942:4", "strict": True})
        for n in (5, 1, 40):
            x = torch.randn(n, 31)
            torch.testing.assert_close(f(x), model(x), rtol=1e-5, atol=1e-6)


def test_without_tvm() -> None:
    """Neither package of TVM is there: the compiler and the backend load without them."""
    code = """
import sys
sys.modules["tvm"] = sys.modules["tvm_ffi"] = None
import torch, graphopt
from torch import nn
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
x = torch.randn(3, 8)
with torch.no_grad():
    f = graphopt.compile(model, (x,), backend="triton", target="cuda:sm_90:4", strict=True)
    torch.testing.assert_close(f(x), model(x))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_interpreter_is_not_chosen_by_accident() -> None:
    with pytest.raises(UsageError, match='target="cuda:sm_90"'):
        compiled(mlp(), torch.randn(3, 31), target="cpu")
    with pytest.raises(DeviceError, match='backend="triton" runs them under Triton\'s interpreter'):
        compiled(mlp(), torch.randn(3, 31), backend="auto")

"""Casts to floats of 8 bits, which are made of integers' operations: bit for bit those of PyTorch; machine code of all targets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from casts_to_f8 import F8, SOURCES, assert_as_eager, cast
from test_triton_offline import TARGETS
from triton_check import runner, templates

import graphopt
from graphopt.backends.triton import expr
from graphopt.backends.triton.offline import compile_offline
from graphopt.ir import types
from graphopt.ir.text import parse_graph
from graphopt.target import Target


@pytest.mark.parametrize("to", F8, ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_as_eager(source: str, to: types.DType) -> None:
    if source == str(to):
        pytest.skip("no cast")
    bits, back = runner(cast(source, to), "pointwise")([SOURCES[source]], None)
    assert_as_eager(source, to, [bits, back])
    assert torch.equal(bits.view(torch.uint8), SOURCES[source].to(to.torch).view(torch.uint8))  # and nan keeps its sign


def test_a_pytorch_that_casts_what_lies_beyond_to_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is nearer to 480, which would be the next number, than to 448 has no place."""
    monkeypatch.setattr(expr, "saturates", lambda: False)
    x = SOURCES["f32"]
    bits, _ = runner(cast("f32", types.f8e4m3), "pointwise")([x], None)
    beyond = (x.abs() > 464) | x.isnan()
    assert torch.equal(bits.float().isnan(), beyond) and bool((x.abs() == 464).any())
    assert torch.equal(bits.view(torch.uint8)[~beyond], x[~beyond].to(torch.float8_e4m3fn).view(torch.uint8))


def test_within_a_region() -> None:
    """A product's sums, rounded to 8 bits and back before they are scaled; rows that are divided by their largest."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64, bias=False))
    x = torch.randn(5, 32)

    class Rounded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.inner(x)
            rows = (y / y.abs().amax(-1, keepdim=True) * 448).to(torch.float8_e4m3fn)
            return (y * 1e5).to(torch.float8_e5m2).float() * 0.5, rows

    with torch.no_grad():
        compiled = graphopt.compile(Rounded(), (x,), backend="triton", target="cuda:sm_90:4", strict=True)
        found, want = compiled(x), Rounded()(x)
    for f, w in zip(found, want, strict=True):
        near = (f.float() - w.float()).abs() <= 0.13 * w.float().abs()  # the next number where sums were rounded otherwise
        assert bool((near | (f.float() == w.float())).all()) and (f.float() == w.float()).float().mean() > 0.98
    assert any("to_f8e5m2" in Path(k.path).read_text() for k in compiled.report.kernels)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("to", F8, ids=str)
def test_machine_code(to: types.DType, target: str) -> None:
    """The same operations on all targets, with and without instructions that convert."""
    text = f"(%x: bf16[4096, 1024]) -> {to}[4096, 1024] {{\n %0: {to}[4096, 1024] = cast(%x) {{dtype = {to}}}\n return %0\n}}"
    t = Target.from_name(target)
    w, (template, *_) = templates(parse_graph("graph @g" + text), "pointwise", t)
    c = compile_offline(template.emit(w, template.space(w, t).default(), t), t)
    assert c.spills == 0 and c.registers <= 64
    assert not re.search(r"e4m3|e5m2|cvt\S*fp8|cvt\S*bf8", c.assembly)

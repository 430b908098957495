"""output-order: a transposed result is copied by a kernel; and which results are left as they are."""

from __future__ import annotations

import pytest
import torch
from fusing import run
from torch import nn

import graphopt
from graphopt.ir import parse_graph
from graphopt.passes.layout import OutputOrder
from graphopt.testing import check_pass

HEAD = "graph @g(%x: f32[2, 5, 3]) -> "
REGION = """
      %0: f32[2, 5, 3] = fusion(%x) {kind = "pointwise"} body (%a: f32[2, 5, 3]) -> f32[2, 5, 3] {
        %0: f32[2, 5, 3] = exp(%a)
        return %0
      }
      %1: f32[2, 3, 5] = transpose(%0) {perm = [0, 2, 1]}"""
BEFORE = f"{HEAD}f32[2, 3, 5] {{{REGION}\n      return %1\n    }}"


def test_before_and_after() -> None:
    copied = """
      %1: f32[2, 3, 5] = fusion(%0) {kind = "pointwise"} body (%a: f32[2, 5, 3]) -> f32[2, 3, 5] {
        %0: f32[2, 3, 5] = transpose(%a) {perm = [0, 2, 1]}
        return %0
      }
      return %1
    }"""
    check_pass(OutputOrder(), BEFORE, f"{HEAD}f32[2, 3, 5] {{{REGION.rpartition(chr(10))[0]}{copied}")


@pytest.mark.parametrize(
    ("why", "before"),
    [
        ("it is wanted as it lies", BEFORE.replace("-> f32[2, 3, 5] {", "-> f32[2, 3, 5; 15, 1, 3] {", 1)),
        ("it is read elsewhere", BEFORE.replace("return %1", "%2: f32[2, 3, 5] = neg(%1)\n return %1, %2").replace(
            "-> f32[2, 3, 5] {", "-> (f32[2, 3, 5], f32[2, 3, 5]) {", 1)),
        ("its size is not known", BEFORE.replace("2, 5, 3", "B, 5, 3").replace("2, 3, 5", "B, 3, 5").replace(
            " {", " where 2 <= B {", 1).replace("[B, 5, 3] {\n", "[B, 5, 3] where 2 <= B {\n")),
        ("no memory moves", BEFORE.replace("2, 5, 3", "1, 5, 3").replace("2, 3, 5", "5, 1, 3").replace("[0, 2, 1]", "[1, 0, 2]")),
        ("it is a view of an input", f"{HEAD}f32[2, 3, 5] {{\n %1: f32[2, 3, 5] = transpose(%x) {{perm = [0, 2, 1]}}\n return %1\n}}"),
    ],
)  # fmt: skip
def test_left_as_it_is(why: str, before: str) -> None:
    g = parse_graph(before)
    text = str(g)
    run(g, [OutputOrder()])
    assert str(g) == text, why


@pytest.mark.tvm
@torch.no_grad()
def test_a_network_of_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 40, 1)).eval()
    x = torch.randn(2, 3, 9, 11)
    made = graphopt.compile(model, [x])
    assert "restride" not in made.report.program
    got = made(x)
    torch.testing.assert_close(got, model(x))
    assert got.is_contiguous()

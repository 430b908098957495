"""What passes share: regions that read other operands."""

from __future__ import annotations

import torch

from graphopt.ir import parse_graph
from graphopt.ir.interpreter import evaluate
from graphopt.ir.verify import verify
from graphopt.passes.shared import reread

TWICE = """graph @g(%w: f32[4, 6], %t: f32[6, 4], %x: f32[4, 6]) -> f32[4, 6] {
  %0: f32[4, 6] = fusion(%w, %x, %w) {kind = "pointwise"} body (%a: f32[4, 6], %x: f32[4, 6], %b: f32[4, 6]) -> f32[4, 6] {
    %0: f32[4, 6] = mul(%a, %x)
    %1: f32[4, 6] = add(%0, %b)
    return %1
  }
  return %0
}"""


def test_an_operand_that_stands_twice_is_read_anew_in_both_places() -> None:
    for place in (0, 2):
        g = parse_graph(TWICE)
        w, t, x = g.inputs
        (region,) = g.nodes()
        assert region.body is not None
        new = reread(g, region, region.body.inputs[place], [t], lambda b, given: b.transpose(given[0], perm=(1, 0)))
        verify(g)
        assert new.operands == (t, x) and not w.users
        inputs = [torch.randn(4, 6), torch.randn(6, 4), torch.randn(4, 6)]
        assert torch.equal(evaluate(g, inputs)[0], inputs[1].t() * inputs[2] + inputs[1].t())

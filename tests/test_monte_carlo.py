"""Results with other roundings: they agree where the graph determines its results, differ where it does not, and pardon no more."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.errors import EquivalenceError
from graphopt.ir import Builder, Graph, evaluate, parse_graph, types
from graphopt.monte_carlo import draw_results, nearer
from graphopt.pass_manager import Pass, PassContext
from graphopt.sampling import random_inputs
from graphopt.testing import check_pass


def spread(text: str, *inputs: torch.Tensor, wide: bool = False) -> float:
    """How far the first output's elements move, at most, from what they are without roundings."""
    g = parse_graph(text)
    xs = list(inputs) or random_inputs(g, {})
    (reference, *_), drawn = evaluate(g, xs, wide=True), draw_results(g, xs, {}, wide=wide)
    return max(float((d[0].to(torch.float64) - reference.to(torch.float64)).abs().max()) for d in drawn)


def unary(op: str, dtype: str = "f32", out: str = "f32[8]") -> str:
    return f"graph @g(%x: {dtype}[8]) -> {out} {{\n %0: {out} = {op}\n return %0\n}}"


def test_one_operation_moves_by_the_unit_roundoff_of_what_goes_in_and_comes_out() -> None:
    x = torch.linspace(1, 1.9, 8)
    for dtype, torch_type in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
        u = torch.finfo(torch_type).eps / 2
        assert u < spread(unary("mul(%x, %x)", dtype, f"{dtype}[8]"), x.to(torch_type)) <= 3 * 1.9**2 * u * 1.01
    assert 0 < spread(unary("mul(%x, %x)"), x, wide=True) < 2e-15


@pytest.mark.parametrize(
    ("op", "out"),
    [("relu(%x)", "f32[8]"), ("flip(%x) {axes = [0]}", "f32[8]"), ("max(%x) {axes = [0]}", "f32[]"), ("argmax(%x) {axis = 0}", "i64[]"),
     ("sub(%x, %x)", "f32[8]")],
)  # fmt: skip
def test_what_is_chosen_or_moved_or_zero_stays(op: str, out: str) -> None:
    assert spread(unary(op, out=out), torch.ones(8)) == 0


def test_a_sum_moves_as_far_as_its_terms_let_it() -> None:
    x = torch.tensor([1e4, 1.0, -1e4, 1.0, 1e4, -1e4, 1.0, 1.0])
    assert 1e-4 < spread(unary("sum(%x) {axes = [0]}", out="f32[]"), x) < 8e4 * 2**-24


def test_positions_that_depend_on_no_input_are_no_matter_of_luck() -> None:
    text = """graph @g(%x: f32[4]) -> f32[8] {
      %0: f32[8] = iota() {size = 8, dtype = f32}
      %1: f32[] = constant() {value = 0.5, dtype = f32}
      %2: f32[8] = mul(%0, %1)
      %3: f32[8] = floor(%2)
      %4: i64[8] = cast(%3) {dtype = i64}
      %5: f32[8] = take(%x, %4)
      return %5
    }"""
    assert spread(text) == 0


def test_the_same_seed_draws_the_same() -> None:
    g = parse_graph(unary("exp(%x)"))
    xs = random_inputs(g, {})
    a, b, c = (draw_results(g, xs, {}, wide=False, seed=s)[3][0] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_what_draws_explain_is_taken_off_an_error_and_no_more() -> None:
    reference = torch.tensor([1.0, 1.0, 1.0, math.inf, math.nan, 1.0, 1.0, 1.0], dtype=torch.float64)
    drawn = [reference + torch.tensor([0.25, 0.0, -0.25, 0.0, 0.0, math.inf, 0.5, -1.5], dtype=torch.float64)]
    new = torch.tensor([1.5, 1.5, 1.25, 7.0, 7.0, 7.0, -math.inf, -math.inf])
    left = nearer(new, reference, drawn, factor=1.0)
    assert left.dtype == torch.float32 and left.tolist() == [1.25, 1.5, 1.0, 7.0, 7.0, 1.0, -math.inf, 1.0]
    positions, other = torch.tensor([0, 1, 2]), torch.tensor([5, 5, 5])
    assert nearer(other, positions, [positions, torch.tensor([0, 3, 2])], 1.0).tolist() == [5, 1, 5]


POLE = """graph @g(%x: DT[B, 8], %y: DT[B, 8], %z: DT[B, 8]) -> DT[B, 8] where 4 <= B <= 64 {
  %0: DT[B, 8] = add(%x, %y)
  %1: DT[B, 8] = add(%0, %z)
  %2: DT[B, 8] = reciprocal(%1)
  return %2
}"""


class Instead(Pass):
    """(x + y) + z otherwise: x + (y + z), or as it is with x and y rounded to f16 first."""

    narrow: bool = False

    def run(self, g: Graph, ctx: PassContext) -> bool:
        inner, outer, _ = g
        x, y = inner.operands
        if x is not g.inputs[0] or y is not g.inputs[1]:
            return False
        b, z = Builder(g, before=inner), g.inputs[2]
        if self.narrow:
            g.replace(inner.result, b.add(*(b.cast(b.cast(v, dtype=types.f16), dtype=v.dtype) for v in (y, x))))
        else:
            g.replace(outer.result, b.add(b.add(y, z), x))
            g.erase(outer)
        g.erase(inner)
        return True


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_errors_beside_a_pole_are_those_of_the_graph(dtype: str) -> None:
    check_pass(Instead(), POLE.replace("DT", dtype), seeds=range(40))


def test_lost_precision_is_found_beside_a_pole_too() -> None:
    for seed in range(20):
        with pytest.raises(EquivalenceError, match="native"):
            check_pass(Instead(narrow=True), POLE.replace("DT", "f32"), seeds=[seed])

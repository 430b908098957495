"""Results with other roundings: they agree where the graph determines its results, differ where it does not, and pardon no more."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.errors import EquivalenceError
from graphopt.ir import Builder, Graph, evaluate, parse_graph, types
from graphopt.monte_carlo import draw_results, nearer, pardon
from graphopt.pass_manager import Pass, PassContext
from graphopt.sampling import random_inputs
from graphopt.testing import check_pass
from graphopt.verification import compare


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
    assert 0 < spread(unary("mul(%x, %x)"), x, wide=True) < 2e-14


@pytest.mark.parametrize(
    ("op", "out"),
    [("relu(%x)", "f32[8]"), ("flip(%x) {axes = [0]}", "f32[8]"), ("max(%x) {axes = [0]}", "f32[]"), ("argmax(%x) {axis = 0}", "i64[]"),
     ("sub(%x, %x)", "f32[8]")],
)  # fmt: skip
def test_what_is_chosen_or_moved_or_zero_stays(op: str, out: str) -> None:
    assert spread(unary(op, out=out), torch.ones(8)) == 0


def test_a_sum_moves_as_far_as_its_terms_let_it() -> None:
    x = torch.tensor([1e4, 1.0, -1e4, 1.0, 1e4, -1e4, 1.0, 1.0])
    text = unary("sum(%x) {axes = [0]}", out="f32[]")
    assert 1e-4 < spread(text, x * 1.1) < 9e4 * 2**-24
    assert spread(text, x) == 0  # small integers: exact in any order


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
    drawn = [reference + torch.tensor([0.25, 0.0, -0.25, 0.0, 0.0, math.inf, -1.5, -1e9], dtype=torch.float64)]
    new = torch.tensor([1.5, 1.5, 1.25, 7.0, 7.0, 7.0, -math.inf, -math.inf])
    left = nearer(new, reference, drawn, factor=1.0)
    assert left.dtype == torch.float32 and left.tolist() == [1.25, 1.5, 1.0, 7.0, 7.0, 1.0, -math.inf, 1.0]
    assert nearer(new, reference, drawn, factor=1.0, scale=1e6)[-1] == -math.inf  # no pole for inputs as large
    cells = torch.tensor([1.5 + 1.5j, 1.25 + 1.0j])
    assert nearer(cells, torch.ones(2).cdouble(), [torch.full((2,), 1.25 + 1.0j).cdouble()], 1.0).tolist() == [1.25 + 0.5j, 1.0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float16, torch.float8_e4m3fn, torch.complex64])
def test_elements_with_explained_errors_are_counted(dtype: torch.dtype) -> None:
    wide = dtype if not (dtype.is_floating_point or dtype.is_complex) else torch.complex128 if dtype.is_complex else torch.float64
    new, reference, drawn = torch.ones(3).to(dtype), torch.tensor([1.0, 0.0, 0.0]).to(wide), torch.tensor([0.0, 1.0, 0.0]).to(wide)
    ((left, count),) = pardon([new], [reference], [[drawn]], factor=1.0, scale=1.0, steps=False)
    assert left.dtype == dtype and left.to(wide).tolist() == [1.0, 0.0, 1.0] and count == 1


def test_an_exact_result_is_one_of_the_draws() -> None:
    positions, drawn = torch.tensor([0, 1, 2]), torch.tensor([0, 3, 2])
    assert nearer(torch.tensor([5, 5, 5]), positions, [positions, drawn], 1.0).tolist() == [5, 5, 5]
    assert nearer(torch.tensor([0, 3, 3]), positions, [positions, drawn], 1.0).tolist() == [0, 1, 3]


def test_the_factor_does_not_widen_a_jump() -> None:
    reference = torch.tensor([3.0, 3.0, 3.0], dtype=torch.float64)
    drawn = [reference, torch.tensor([4.0, 4.0, 4.25], dtype=torch.float64), torch.tensor([4.0, 4.0, 4.0], dtype=torch.float64)]
    new = torch.tensor([4.0, 5.0, 4.5])
    assert nearer(new, reference, drawn, 4.0, steps=True).tolist() == [3.0, 4.0, 3.25]
    assert nearer(new, reference, drawn, 4.0).tolist() == [3.0, 3.0, 3.0]


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
        with pytest.raises(EquivalenceError, match="in its own precision"):
            check_pass(Instead(narrow=True), POLE.replace("DT", "f32"), seeds=[seed])


# --- wrong rewrites, in which other roundings must not be an excuse ----------------------------------------------------

_SUMS = """graph @g(%i: i64[256], %j: i64[256], %k: i64[256]) -> b1[256] {
  %a: f32[256] = cast(%i) {dtype = f32}
  %b: f32[256] = cast(%j) {dtype = f32}
  %c: f32[256] = cast(%k) {dtype = f32}
  %s: f32[256] = add(%a, %b)
  %r: b1[256] = ge(%s, %c)
  return %r
}"""
_ZERO = """graph @g(%x: f32[8], %y: f32[8]) -> f32[8] {
  %a: f32[8] = add(%x, %y)
  %b: f32[8] = add(%y, %x)
  %c: f32[8] = sub(%a, %b)
  return %c
}"""
_NORM = """graph @g(%x: f32[8, 1]) -> f32[8, 1] {
  %m: f32[8, 1] = mean(%x) {axes = [1], keepdims = true}
  %c: f32[8, 1] = sub(%x, %m)
  %q: f32[8, 1] = mul(%c, %c)
  %v: f32[8, 1] = mean(%q) {axes = [1], keepdims = true}
  %e: f32[] = constant() {value = 1e-05, dtype = f32}
  %w: f32[8, 1] = add(%v, %e)
  %r: f32[8, 1] = rsqrt(%w)
  %o: f32[8, 1] = mul(%c, %r)
  return %o
}"""
_LARGEST = """graph @g(%x: f32[8, 16]) -> i64[8] {
  %f: f32[8, 16] = round(%x)
  %s: f32[8, 16] = mul(%f, %f)
  %p: i64[8] = argmax(%s) {axis = 1}
  return %p
}"""
_LAST = """%h: f32[8, 16] = flip(%s) {axes = [1]}
  %c: i64[8] = argmax(%h) {axis = 1}
  %n: i64[] = constant() {value = 15, dtype = i64}
  %p: i64[8] = sub(%n, %c)"""
_HALVES = """graph @g(%i: i64[64]) -> f32[64] {
  %a: f32[64] = cast(%i) {dtype = f32}
  %h: f32[] = constant() {value = 0.5, dtype = f32}
  %b: f32[64] = mul(%a, %h)
  %r: f32[64] = floor(%b)
  return %r
}"""
_CEILING = """%c: f32[64] = ceil(%b)
  %o: f32[] = constant() {value = 1.0, dtype = f32}
  %r: f32[64] = sub(%c, %o)"""
_CANCELS = """graph @g(%x: DT[64], %y: DT[64]) -> DT[64] {
  %a: DT[64] = add(%x, %y)
  %c: DT[64] = sub(%a, %x)
  return %c
}"""
_AXIS = """graph @g(%x: f32[8, 8]) -> f32[8] {
  %a: f32[8, 8] = exp(%x)
  %r: f32[8] = sum(%a) {axes = [1]}
  return %r
}"""
_TIE = """graph @g(%x: f32[8, 1], %y: f32[8, 1]) -> i64[8] {
  %i: i64[2] = iota() {size = 2}
  %a: f32[8, 2] = take(%x, %i) {axis = 1, clip = true}
  %b: f32[8, 2] = take(%y, %i) {axis = 1, clip = true}
  %s: f32[8, 2] = mul(%a, %b)
  %p: i64[8] = argmax(%s) {axis = 1}
  return %p
}"""
_BELOW = """%c: i64[8] = argmax(%s) {axis = 1}
  %n: i64[] = constant() {value = 1, dtype = i64}
  %p: i64[8] = sub(%c, %n)"""

WRONG = {
    "an equal number less": (_SUMS, "ge(%s", "gt(%s"),
    "zero by zero": (_ZERO, "%c: f32[8] = sub(%a, %b)\n  return %c", "%d: f32[8] = sub(%a, %b)\n  %c: f32[8] = div(%d, %d)\n  return %c"),
    "no epsilon": (_NORM, "rsqrt(%w)", "rsqrt(%v)"),
    "the last maximum": (_LARGEST, "%p: i64[8] = argmax(%s) {axis = 1}", _LAST),
    "another step": (_HALVES, "%r: f32[64] = floor(%b)", _CEILING),
    "a dropped term, f32": (_CANCELS.replace("DT", "f32"), "sub(%a, %x)", "neg(%x)"),
    "a dropped term, f16": (_CANCELS.replace("DT", "f16"), "return %c", "return %a"),
    "another axis": (_AXIS, "axes = [1]", "axes = [0]"),
    "an index beside two equal ones": (_TIE, "%p: i64[8] = argmax(%s) {axis = 1}", _BELOW),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rewrite_is_found(name: str) -> None:
    text, old, new = WRONG[name]
    assert text.count(old) == 1
    before, after = parse_graph(text), parse_graph(text.replace(old, new))
    assert [seed for seed in range(10) if compare(before, after, seed=seed).ok] == []


def test_either_of_two_equal_ones_is_right() -> None:
    before = parse_graph(_TIE)
    after = parse_graph(
        _TIE.replace("return %p", "%n: i64[] = constant() {value = 1, dtype = i64}\n  %q: i64[8] = sub(%n, %p)\n  return %q")
    )
    assert all(compare(before, after, seed=seed).ok for seed in range(10))


def test_a_message_says_what_is_not_counted() -> None:
    before = POLE.replace("DT", "f32")
    after = before.replace("add(%x, %y)", "add(%y, %z)").replace("add(%0, %z)", "add(%0, %0)")
    bad = compare(parse_graph(before), parse_graph(after), bindings={"B": 4}).first_bad
    assert bad is not None and bad.pardoned == 32
    assert str(bad).endswith("beside what other roundings of the old graph explain in 32 elements")

"""recognise-attention on random spellings: found, with the predicates that were meant, and the same by value in f64."""

from __future__ import annotations

from collections.abc import Callable

from attending import attentions, recognise
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir import Builder, Graph, TensorType, Value, dims, types
from graphopt.passes.attention import RecogniseAttention
from graphopt.testing import assert_equivalent, check_pass

Draw = Callable[[st.SearchStrategy], object]
LEAST = -3.4028234663852886e38


def scaled(b: Builder, draw: Draw, q: Value, k: Value) -> Value:
    """scale * q k^T, the scale before or after, multiplied or divided."""
    swapped, way = b.transpose(k, perm=(0, 1, 3, 2)), draw(st.sampled_from(["after", "divided", "queries", "keys", "none"]))
    if way == "queries":
        return b.matmul(b.mul(q, 0.3), swapped)
    if way == "keys":
        return b.matmul(q, b.mul(swapped, 0.3))
    s = b.matmul(q, swapped)
    return s if way == "none" else b.mul(s, 0.3) if way == "after" else b.div(s, 3.0)


def hidden(b: Builder, draw: Draw, s: Value, seen: Value) -> Value:
    """The scores where a key is seen, and a number that hides it elsewhere."""
    number = draw(st.sampled_from([float("-inf"), LEAST]))
    way = draw(st.sampled_from(["where", "not", "added"]))
    if way == "where":
        return b.where(seen, s, b.constant(number, s.dtype))
    if way == "not":
        return b.where(b.logical_not(seen), b.constant(number, s.dtype), s)
    mask = b.where(seen, b.constant(0.0, s.dtype), b.constant(number, s.dtype))
    return b.add(s, mask) if draw(st.booleans()) else b.add(mask, s)


def positions(b: Builder, draw: Draw, rows: dims.Dim, keys: dims.Dim) -> tuple[Value, dict[str, object]]:
    """Truth values of a causal mask or a window, and the attributes that say the same."""
    i, j = b.reshape(b.iota(size=rows), shape=(rows, 1)), b.iota(size=keys)
    seen = draw(st.sampled_from([lambda: b.le(j, i), lambda: b.ge(i, j), lambda: b.ge(b.sub(i, j), 0), lambda: b.lt(j, b.add(i, 1))]))()
    if not draw(st.booleans()):
        return seen, {"causal": True, "window": None}
    near = b.gt(j, b.sub(i, 3)) if draw(st.booleans()) else b.lt(b.sub(i, j), 3)
    return b.logical_and(seen, near), {"causal": True, "window": 3}


@given(st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_random_spellings(data: st.DataObject) -> None:
    draw: Draw = data.draw
    length = draw(st.sampled_from([5, dims.symbol("S")]))
    g = Graph("g", {} if length == 5 else {"S": dims.Range(4, 16)})
    q, k, v = (g.add_input(TensorType(types.f32, (2, 4, length, 8)), n) for n in "qkv")  # type: ignore[arg-type]
    b, wanted = Builder(g), {"causal": False, "window": None}
    s = scaled(b, draw, q, k)
    if draw(st.booleans()):
        s = b.mul(b.tanh(b.div(s, 5.0)), 5.0)
    if draw(st.booleans()):
        s = b.add(g.add_input(TensorType(types.f32, (4, 1, length)), "bias"), s)  # type: ignore[arg-type]
    mask = draw(st.sampled_from(["none", "positions", "padding", "both"]))
    rivals = len(g.inputs) == 4  # a bias from outside may hide keys itself: a finite mask beside it may have to stay
    if mask in ("positions", "both"):
        seen, wanted = positions(b, draw, length, length)  # type: ignore[arg-type]
        if mask == "both":
            seen = b.logical_and(seen, g.add_input(TensorType(types.b1, (2, 1, 1, length)), "mask"))  # type: ignore[arg-type]
        s = hidden(b, draw, s, seen)
    elif mask == "padding":
        s = hidden(b, draw, s, g.add_input(TensorType(types.b1, (2, 1, 1, length)), "mask"))  # type: ignore[arg-type]
    g.set_outputs([b.matmul(b.softmax(s, axis=3), v)])
    new, remarks = recognise(g)
    found = attentions(new)
    if rivals and mask != "none":
        assert found or any("hidden in several ways" in r.message for r in remarks), f"{g}"
    else:
        assert len(found) == 1, f"{g}"
        assert {n: found[0].attrs[n] for n in wanted} == wanted, f"{g}"
    assert_equivalent(g, new)


BEFORE = """
graph @g(%q: f32[B, 4, S, 8], %k: f32[B, 4, S, 8], %v: f32[B, 4, S, 8]) -> f32[B, 4, S, 8] where 1 <= B <= 4, 1 <= S <= 16 {
  %0: f32[B, 4, 8, S] = transpose(%k) {perm = [0, 1, 3, 2]}
  %1: f32[B, 4, S, S] = matmul(%q, %0)
  %2: i64[S] = iota() {size = S}
  %3: i64[S, 1] = reshape(%2) {shape = [S, 1]}
  %4: b1[S, S] = le(%2, %3)
  %5: f32[] = constant() {value = -inf}
  %6: f32[B, 4, S, S] = where(%4, %1, %5)
  %7: f32[B, 4, S, S] = softmax(%6) {axis = 3}
  %8: f32[B, 4, S, 8] = matmul(%7, %v)
  return %8
}"""

AFTER = """
graph @g(%q: f32[B, 4, S, 8], %k: f32[B, 4, S, 8], %v: f32[B, 4, S, 8]) -> f32[B, 4, S, 8] where 1 <= B <= 4, 1 <= S <= 16 {
  %0: f32[B, 4, S, 8] = attention(%q, %k, %v) {scale = 1.0, causal = true}
  return %0
}"""


def test_causal_of_any_size() -> None:
    check_pass(RecogniseAttention(), BEFORE, AFTER)


def test_softmax_over_the_rows_is_declined() -> None:
    text = BEFORE.replace("{axis = 3}", "{axis = 2}")
    check_pass(RecogniseAttention(), text, fires=False, reason="softmax is not over the axis")



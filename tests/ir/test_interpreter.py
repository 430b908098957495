"""The interpreter: symbols bound from inputs, precision, library calls; inputs that respect what a graph takes for granted."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import GraphoptError
from graphopt.ir import Graph, evaluate, parse_graph
from graphopt.ir.interpreter import bind_symbols
from graphopt.sampling import input_demands, random_inputs, sample_bindings


def one(text: str) -> Graph:
    return parse_graph(text)


def test_symbols_are_bound_from_sizes() -> None:
    g = one("graph @g(%x: f32[2*B, C], %y: f32[C + 1]) -> f32[2*B, C] where 1 <= B, 1 <= C {\n return %x\n}")
    assert bind_symbols(g, [(6, 5), (6,)]) == {"B": 3, "C": 5}
    with pytest.raises(GraphoptError, match=r"size 9 where C \+ 1 = 6"):
        bind_symbols(g, [(6, 5), (9,)])
    with pytest.raises(GraphoptError, match="rank"):
        bind_symbols(g, [(6,), (6,)])


def test_wide_is_f64_all_the_way() -> None:
    g = one("graph @g(%x: f16[4]) -> f16[4] {\n %0: f16[4] = exp(%x)\n %1: f32[4] = cast(%0) {dtype = f32}\n"
            " %2: f16[4] = cast(%1) {dtype = f16}\n return %2\n}")  # fmt: skip
    x = torch.linspace(-1, 1, 4).half()
    (wide,) = evaluate(g, [x], wide=True)
    torch.testing.assert_close(wide, x.double().exp(), rtol=1e-15, atol=0)
    assert evaluate(g, [x])[0].dtype == torch.float16


def test_library_calls() -> None:
    g = one('graph @g(%x: f32[B, 3]) -> (f32[B, 3], i64[B, 3]) where 1 <= B {\n %0: f32[B, 3], %1: i64[B, 3] = '
            'aten(%x) {target = "aten.sort.default", args = [$0, 1, true]}\n return %0, %1\n}')  # fmt: skip
    x = torch.randn(2, 3)
    values, order = evaluate(g, [x])
    assert torch.equal(values, x.sort(1, True).values) and torch.equal(order, x.sort(1, True).indices)


# inputs


def test_indices_stay_within_the_smallest_axis() -> None:
    g = one("""graph @g(%i: i64[B, 2], %t: f32[5, 3], %u: f32[4, 3]) -> (f32[B, 2, 3], f32[2, B, 3]) where 1 <= B {
      %0: f32[B, 2, 3] = take(%t, %i)
      %1: i64[2, B] = transpose(%i) {perm = [1, 0]}
      %2: i32[2, B] = cast(%1) {dtype = i32}
      %3: f32[2, B, 3] = take(%u, %2)
      return %0, %3
    }""")
    seen = torch.cat([random_inputs(g, {"B": 9}, seed)[0].flatten() for seed in range(5)])
    assert int(seen.min()) == 0 and int(seen.max()) == 3


def test_a_shifted_index_stays_within_bounds() -> None:
    g = one("""graph @g(%i: i64[8], %t: f32[5, 3]) -> f32[8, 3] {
      %c: i64[] = constant() {value = 2, dtype = i64}
      %0: i64[8] = add(%i, %c)
      %1: f32[8, 3] = take(%t, %0)
      return %1
    }""")
    i = random_inputs(g, {}, 0)[0]
    assert int(i.min()) >= 0 and int(i.max()) <= 2


@pytest.mark.parametrize("op", ["sqrt", "rsqrt", "log", "log2"])
def test_roots_and_logarithms_get_positive_inputs(op: str) -> None:
    g = one(f"""graph @g(%x: f32[64]) -> f32[64] {{
      %e: f32[] = constant() {{value = 0.5}}
      %0: f32[64] = add(%x, %e)
      %1: f32[64] = {op}(%0)
      return %1
    }}""")
    assert bool((random_inputs(g)[0] > 0).all())


def test_a_square_may_have_any_sign() -> None:
    g = one("""graph @g(%x: f32[64]) -> f32[] {
      %0: f32[64] = mul(%x, %x)
      %1: f32[] = mean(%0) {axes = [0]}
      %2: f32[] = sqrt(%1)
      return %2
    }""")
    assert bool((random_inputs(g)[0] < 0).any())


def test_demands_pass_through_fusion_bodies() -> None:
    g = one("""graph @g(%x: f32[B, 2], %v: f32[2]) -> f32[B, 2] where 1 <= B {
      %0: f32[B, 2] = fusion(%v, %x) body (%p: f32[2], %q: f32[B, 2]) -> f32[B, 2] where 1 <= B {
        %m: f32[2] = neg(%p)
        %r: f32[B, 2] = batch_norm(%q, %m, %p)
        return %r
      }
      return %0
    }""")
    x, v = input_demands(g)
    assert list(v.facts) == ["positive"] and not x.facts


def test_layouts_and_dtypes_are_as_declared() -> None:
    g = one("graph @g(%x: f16[B, 3; 1, B], %e: f32[4, 2; 0, 1], %b: b1[7], %u: u8[9], %c: c64[2],"
            " weight %w: f32[64, 64], %z: f32[0, 2; 2, 1])"
            " -> f16[B, 3] where 1 <= B {\n return %x\n}")  # fmt: skip
    x, e, b, u, c, w, z = random_inputs(g, {"B": 5})
    assert x.stride() == (1, 5) and x.shape == (5, 3) and x.dtype == torch.float16
    assert e.stride() == (0, 1) and torch.equal(e[0], e[3])
    assert b.dtype == torch.bool and b.any() and not b.all()
    assert u.dtype == torch.uint8 and c.dtype == torch.complex64 and z.shape == (0, 2)
    assert 0.1 < float(w.std()) * 8 < 2
    assert all(torch.equal(p, q) for p, q in zip(random_inputs(g, {"B": 5}), [x, e, b, u, c, w, z], strict=True))
    assert not torch.equal(random_inputs(g, {"B": 5}, seed=1)[5], w)


def test_bindings_are_varied_and_in_range() -> None:
    g = one("graph @g(%x: f32[B, S]) -> f32[B, S] where 1 <= B <= 64, 8 <= S {\n return %x\n}")
    found = [b for seed in range(4) for b in sample_bindings(g, seed)]
    assert all(1 <= b["B"] <= 64 and b["S"] >= 8 for b in found)
    assert any(b["B"] == 1 for b in found) and any(b["B"] % 2 and b["B"] > 1 for b in found) and all(b["B"] != b["S"] for b in found[:3])
    assert sample_bindings(one("graph @g(%x: f32[2]) -> f32[2] {\n return %x\n}")) == [{}]


def test_bindings_respect_what_shapes_need() -> None:
    g = one("""graph @g(%x: f32[B, S]) -> f32[B // 4, 4, S] where 1 <= B, 1 <= S {
      %0: f32[B // 4, 4, S] = reshape(%x) {shape = [B // 4, 4, S]}
      return %0
    }""")
    assert all(b["B"] % 4 == 0 for seed in range(3) for b in sample_bindings(g, seed))


def test_large_graphs_get_small_sizes() -> None:
    g = one("graph @g(%x: f32[B, 1000000]) -> f32[B, 1000000] where 1 <= B {\n return %x\n}")
    assert sample_bindings(g, max_elements=10) == [{"B": 1}]

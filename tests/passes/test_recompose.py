"""Recomposition: every spelling is found, and every near miss is declined with its true reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from graphopt.ir import Builder, Graph, TensorType, Value, dims, types
from graphopt.ir.dims import Range
from graphopt.pass_manager import PASSES, RewritePass, make_pass
from graphopt.passes import recompose
from graphopt.testing import check_pass, check_rules_fire

Spelling = Callable[[Builder, Value], Value]
B = dims.symbol("B")


def built(spelling: Spelling, shape: dims.Shape = (B, 8), dtype: types.DType = types.f32) -> Graph:
    """A graph of one input x and the result of a spelling."""
    g = Graph("g", {"B": Range(1, 64)})
    x = g.add_input(TensorType(dtype, shape), "x")
    g.set_outputs([spelling(Builder(g), x)])
    return g


def weight(b: Builder, shape: dims.Shape, name: str = "w", dtype: types.DType = types.f32) -> Value:
    return b.graph.add_input(TensorType(dtype, shape), name, weight=True)


def ops(g: Graph) -> list[str]:
    return [n.name for n in g.nodes()]


def found(name: str, spelling: Spelling, left: list[str], **options: object) -> Graph:
    """Check that a pass turns a spelling into exactly these ops."""
    g = check_pass(make_pass(name), built(spelling, **options))  # type: ignore[arg-type]
    assert ops(g) == left, f"{ops(g)}\n{g}"
    return g


def declined(name: str, spelling: Spelling, reason: str | None, **options: object) -> None:
    check_pass(make_pass(name), built(spelling, **options), fires=False, reason=reason)  # type: ignore[arg-type]


# --- softmax -----------------------------------------------------------------------------------------------------------


def shifted(b: Builder, x: Value, axes: tuple[int, ...] = (1,)) -> Value:
    return b.sub(x, b.max(x, axes=axes, keepdims=True))


def softmax_div(b: Builder, x: Value) -> Value:
    e = b.exp(shifted(b, x))
    return b.div(e, b.sum(e, axes=(1,), keepdims=True))


def softmax_reciprocal(b: Builder, x: Value) -> Value:
    e = b.exp(shifted(b, x))
    return b.mul(b.reciprocal(b.sum(e, axes=(-1,), keepdims=True)), e)


def softmax_unsqueezed(b: Builder, x: Value) -> Value:
    e = b.exp(b.sub(x, b.reshape(b.max(x, axes=(1,)), shape=(B, 1))))
    return b.div(e, b.broadcast_to(b.reshape(b.sum(e, axes=(1,)), shape=(B, 1)), shape=(B, 8)))


def softmax_leading(b: Builder, x: Value) -> Value:
    e = b.exp(b.sub(x, b.max(x, axes=(0,))))
    return b.div(e, b.sum(e, axes=(0,)))


def log_softmax(b: Builder, x: Value) -> Value:
    s = shifted(b, x)
    return b.sub(s, b.log(b.sum(b.exp(s), axes=(1,), keepdims=True)))


def log_softmax_logsumexp(b: Builder, x: Value) -> Value:
    most = b.max(x, axes=(1,), keepdims=True)
    return b.sub(x, b.add(b.log(b.sum(b.exp(b.sub(x, most)), axes=(1,), keepdims=True)), most))


@pytest.mark.parametrize("spelling", [softmax_div, softmax_reciprocal, softmax_unsqueezed, softmax_leading])
def test_softmax(spelling: Spelling) -> None:
    found("recompose-softmax", spelling, ["softmax"])


@pytest.mark.parametrize("spelling", [log_softmax, log_softmax_logsumexp, lambda b, x: b.log(softmax_div(b, x))])
def test_log_softmax(spelling: Spelling) -> None:
    found("recompose-softmax", spelling, ["log_softmax"])


def test_softmax_text() -> None:
    check_pass(
        make_pass("recompose-softmax"),
        """
        graph @g(%x: f32[B, 8]) -> f32[B, 8] where 1 <= B <= 64 {
          %m: f32[B, 1] = max(%x) {axes = [1], keepdims = true}
          %0: f32[B, 8] = sub(%x, %m)
          %e: f32[B, 8] = exp(%0)
          %s: f32[B, 1] = sum(%e) {axes = [1], keepdims = true}
          %1: f32[B, 8] = div(%e, %s)
          return %1
        }""",
        """
        graph @g(%x: f32[B, 8]) -> f32[B, 8] where 1 <= B <= 64 {
          %0: f32[B, 8] = softmax(%x) {axis = 1}
          return %0
        }""",
    )


def test_softmax_declines() -> None:
    def naive(b: Builder, x: Value) -> Value:
        e = b.exp(x)
        return b.div(e, b.sum(e, axes=(1,), keepdims=True))

    def two_axes(b: Builder, x: Value) -> Value:
        e = b.exp(shifted(b, x, (0, 1)))
        return b.div(e, b.sum(e, axes=(0, 1), keepdims=True))

    def other_maximum(b: Builder, x: Value) -> Value:
        e = b.exp(shifted(b, x, (0,)))
        return b.div(e, b.sum(e, axes=(1,), keepdims=True))

    def other_sum(b: Builder, x: Value) -> Value:
        return b.div(b.exp(shifted(b, x)), b.sum(b.exp(x), axes=(1,), keepdims=True))

    def square(b: Builder, x: Value) -> Value:  # [8, 8]: without keepdims the sum lines up with the columns
        e = b.exp(shifted(b, x))
        return b.div(e, b.sum(e, axes=(1,)))

    declined("recompose-softmax", naive, "maximum of x itself is not taken off")
    declined("recompose-softmax", two_axes, "over 2 axes")
    declined("recompose-softmax", other_maximum, "maximum is over the axes")
    declined("recompose-softmax", other_sum, "not of the same exponentials")
    declined("recompose-softmax", square, None, shape=(8, 8))


# --- layer norm --------------------------------------------------------------------------------------------------------


def centred(b: Builder, x: Value, axes: tuple[int, ...] = (1,)) -> Value:
    return b.sub(x, b.mean(x, axes=axes, keepdims=True))


def norm_mul(b: Builder, x: Value) -> Value:
    c = centred(b, x)
    return b.mul(c, b.rsqrt(b.add(b.mean(b.mul(c, c), axes=(1,), keepdims=True), 1e-5)))


def norm_pow_div(b: Builder, x: Value) -> Value:
    c = centred(b, x, (-1,))
    return b.div(c, b.sqrt(b.add(b.mean(b.pow(c, 2.0), axes=(-1,), keepdims=True), 1e-5)))


def norm_var(b: Builder, x: Value) -> Value:
    return b.mul(b.reciprocal(b.sqrt(b.add(b.var(x, axes=(1,), keepdims=True, correction=0), 1e-5))), centred(b, x))


def norm_sums(b: Builder, x: Value) -> Value:
    c = b.sub(x, b.div(b.sum(x, axes=(1,), keepdims=True), 8.0))
    return b.mul(c, b.rsqrt(b.add(b.mul(b.sum(b.mul(c, c), axes=(1,), keepdims=True), 0.125), 1e-5)))


def norm_moments(b: Builder, x: Value) -> Value:
    mean = b.mean(x, axes=(1,), keepdims=True)
    var = b.sub(b.mean(b.mul(x, x), axes=(1,), keepdims=True), b.mul(mean, mean))
    return b.mul(b.sub(x, mean), b.rsqrt(b.add(var, 1e-5)))


NORMS = [norm_mul, norm_pow_div, norm_var, norm_sums, norm_moments]


@pytest.mark.parametrize("spelling", NORMS)
def test_layer_norm(spelling: Spelling) -> None:
    g = found("recompose-layer-norm", spelling, ["layer_norm"])
    (node,) = g.nodes()
    assert node.attrs == {"axes": 1, "eps": 1e-5}


@pytest.mark.parametrize("spelling", NORMS)
def test_layer_norm_affine(spelling: Spelling) -> None:
    def affine(b: Builder, x: Value) -> Value:
        return b.add(weight(b, (8,), "b"), b.mul(weight(b, (8,)), spelling(b, x)))

    found("recompose-layer-norm", affine, ["layer_norm"])


def test_layer_norm_scaled_before_the_division() -> None:
    def scaled_first(b: Builder, x: Value) -> Value:
        c = centred(b, x)
        var = b.mean(b.mul(c, c), axes=(1,), keepdims=True)
        return b.div(b.mul(weight(b, (1, 8)), c), b.sqrt(b.add(var, 1e-5)))

    found("recompose-layer-norm", scaled_first, ["reshape", "layer_norm"])


def test_layer_norm_over_two_axes() -> None:
    def two(b: Builder, x: Value) -> Value:
        c = centred(b, x, (1, 2))
        return b.mul(c, b.rsqrt(b.add(b.mean(b.mul(c, c), axes=(1, 2), keepdims=True), 1e-5)))

    found("recompose-layer-norm", two, ["layer_norm"], shape=(B, 4, 8))


def test_layer_norm_between_casts() -> None:
    def half(b: Builder, x: Value) -> Value:
        return b.mul(b.cast(norm_mul(b, b.cast(x, types.f32)), types.f16), weight(b, (8,), dtype=types.f16))

    found("recompose-layer-norm", half, ["cast", "layer_norm", "cast", "mul"], dtype=types.f16)


def test_layer_norm_with_symbolic_width() -> None:
    def symbolic(b: Builder, x: Value) -> Value:
        n = b.constant(B, types.f32)
        c = b.sub(x, b.div(b.sum(x, axes=(1,), keepdims=True), n))
        return b.mul(c, b.rsqrt(b.add(b.div(b.sum(b.mul(c, c), axes=(1,), keepdims=True), n), 1e-5)))

    found("recompose-layer-norm", symbolic, ["layer_norm"], shape=(4, B))


def test_layer_norm_declines() -> None:
    def bessel(b: Builder, x: Value) -> Value:
        return b.div(centred(b, x), b.sqrt(b.add(b.var(x, axes=(1,), keepdims=True), 1e-5)))

    def eps_outside(b: Builder, x: Value) -> Value:
        return b.div(centred(b, x), b.add(b.sqrt(b.var(x, axes=(1,), keepdims=True, correction=0)), 1e-5))

    def first_axis(b: Builder, x: Value) -> Value:
        c = centred(b, x, (0,))
        return b.mul(c, b.rsqrt(b.add(b.mean(b.mul(c, c), axes=(0,), keepdims=True), 1e-5)))

    def other_axes(b: Builder, x: Value) -> Value:
        c = centred(b, x)
        return b.mul(c, b.rsqrt(b.add(b.mean(b.mul(c, c), axes=(0, 1), keepdims=True), 1e-5)))

    def raw_squares(b: Builder, x: Value) -> Value:
        return b.mul(centred(b, x), b.rsqrt(b.add(b.mean(b.mul(x, x), axes=(1,), keepdims=True), 1e-5)))

    declined("recompose-layer-norm", bessel, "divides by n - 1")
    declined("recompose-layer-norm", eps_outside, "added to the standard deviation")
    declined("recompose-layer-norm", first_axis, "are not the last ones")
    declined("recompose-layer-norm", other_axes, "over different axes")
    declined("recompose-layer-norm", raw_squares, "not of x - mean(x)")


def test_layer_norm_leaves_a_full_scale() -> None:
    g = check_pass(
        make_pass("recompose-layer-norm"), built(lambda b, x: b.mul(norm_mul(b, x), b.exp(x))), reason="no vector over the normalized axes"
    )
    assert ops(g) == ["layer_norm", "exp", "mul"] or sorted(ops(g)) == ["exp", "layer_norm", "mul"]


# --- rms norm ----------------------------------------------------------------------------------------------------------


def mean_square(b: Builder, x: Value) -> Value:
    return b.mean(b.pow(x, 2.0), axes=(-1,), keepdims=True)


def test_rms_norm() -> None:
    found("recompose-rms-norm", lambda b, x: b.mul(x, b.rsqrt(b.add(mean_square(b, x), 1e-6))), ["rms_norm"])
    found("recompose-rms-norm", lambda b, x: b.div(x, b.sqrt(b.add(mean_square(b, x), 1e-6))), ["rms_norm"])


def test_rms_norm_weighted() -> None:
    def weighted(b: Builder, x: Value) -> Value:
        return b.mul(weight(b, (8,)), b.mul(x, b.rsqrt(b.add(mean_square(b, x), 1e-6))))

    found("recompose-rms-norm", weighted, ["rms_norm"])


def test_rms_norm_llama_half() -> None:
    def llama(b: Builder, x: Value) -> Value:
        h = b.cast(x, types.f32)
        return b.mul(weight(b, (8,), dtype=types.bf16), b.cast(b.mul(h, b.rsqrt(b.add(mean_square(b, h), 1e-6))), types.bf16))

    found("recompose-rms-norm", llama, ["cast", "rms_norm", "cast", "mul"], dtype=types.bf16)


def test_rms_norm_declines() -> None:
    def other(b: Builder, x: Value) -> Value:
        return b.mul(b.exp(x), b.rsqrt(b.add(mean_square(b, x), 1e-6)))

    def outside(b: Builder, x: Value) -> Value:
        return b.div(x, b.add(b.sqrt(mean_square(b, x)), 1e-6))

    declined("recompose-rms-norm", other, "of another tensor")
    declined("recompose-rms-norm", outside, "added to the root")
    declined("recompose-rms-norm", norm_mul, "this is a layer norm")
    declined(
        "recompose-rms-norm",
        lambda b, x: b.mul(x, b.rsqrt(b.add(b.mean(b.mul(x, x), axes=(0,), keepdims=True), 1e-6))),
        "not the last ones",
    )


# --- gelu, silu --------------------------------------------------------------------------------------------------------

RT2, WIDTH = 2**0.5, (2 / 3.141592653589793) ** 0.5
ERF: list[Spelling] = [
    lambda b, x: b.mul(b.mul(x, 0.5), b.add(b.erf(b.div(x, RT2)), 1.0)),
    lambda b, x: b.mul(x, b.mul(b.add(b.erf(b.mul(x, 1 / RT2)), 1.0), 0.5)),
    lambda b, x: b.mul(0.5, b.mul(x, b.add(b.constant(1.0), b.erf(b.div(x, RT2))))),
    lambda b, x: b.div(b.mul(x, b.add(1.0, b.erf(b.div(x, RT2)))), 2.0),
    lambda b, x: b.mul(x, b.add(b.mul(b.erf(b.div(x, RT2)), 0.5), 0.5)),
]


def cubic(b: Builder, x: Value) -> Value:
    return b.mul(b.pow(x, 3.0), 0.044715)


TANH: list[Spelling] = [
    lambda b, x: b.mul(b.mul(x, 0.5), b.add(b.tanh(b.mul(b.add(x, cubic(b, x)), WIDTH)), 1.0)),
    lambda b, x: b.mul(0.5, b.mul(x, b.add(1.0, b.tanh(b.mul(WIDTH, b.add(x, b.mul(0.044715, b.mul(b.mul(x, x), x)))))))),
    lambda b, x: b.mul(b.mul(x, 0.5), b.add(b.tanh(b.mul(b.mul(x, WIDTH), b.add(b.mul(b.mul(x, x), 0.044715), 1.0))), 1.0)),
    lambda b, x: b.mul(b.mul(x, 0.5), b.add(b.tanh(b.mul(WIDTH, b.mul(x, b.add(b.mul(b.mul(x, 0.044715), x), 1.0)))), 1.0)),
]


@pytest.mark.parametrize("spelling", ERF)
def test_gelu(spelling: Spelling) -> None:
    (node,) = found("recompose-gelu", spelling, ["gelu"]).nodes()
    assert node.attrs["approximate"] == "none"


@pytest.mark.parametrize("spelling", TANH)
def test_gelu_tanh(spelling: Spelling) -> None:
    (node,) = found("recompose-gelu", spelling, ["gelu"]).nodes()
    assert node.attrs["approximate"] == "tanh"


def test_gelu_declines() -> None:
    declined("recompose-gelu", lambda b, x: b.mul(x, b.add(b.erf(b.div(x, RT2)), 1.0)), "not 0.5")
    declined("recompose-gelu", lambda b, x: b.mul(b.mul(x, 0.5), b.add(b.erf(x), 1.0)), "not of x / sqrt(2)")
    declined("recompose-gelu", lambda b, x: b.mul(b.mul(x, 0.5), b.add(b.erf(b.exp(x)), 1.0)), "something else than a multiple")
    declined("recompose-gelu", lambda b, x: b.mul(b.mul(x, 0.5), b.add(b.tanh(b.mul(x, WIDTH)), 1.0)), "tanh is not of")
    declined("recompose-gelu", lambda b, x: b.mul(x, b.sigmoid(b.mul(x, 1.702))), None)


def test_silu() -> None:
    found("recompose-silu", lambda b, x: b.mul(b.sigmoid(x), x), ["silu"])
    found("recompose-silu", lambda b, x: b.div(x, b.add(b.exp(b.neg(x)), 1.0)), ["silu"])
    found("recompose-silu", lambda b, x: b.mul(x, b.reciprocal(b.add(1.0, b.exp(b.neg(x))))), ["silu"])


def test_silu_declines() -> None:
    declined("recompose-silu", lambda b, x: b.mul(x, b.sigmoid(b.mul(x, 1.702))), "sigmoid of 1.702 x")
    declined("recompose-silu", lambda b, x: b.mul(b.exp(x), b.sigmoid(x)), None)
    declined("recompose-silu", lambda b, x: b.mul(x, b.add(b.sigmoid(x), b.mul(b.sigmoid(x), 2.0))), None)

    def shared(b: Builder, x: Value) -> Value:
        gate = b.sigmoid(x)
        return b.add(b.mul(x, gate), gate)

    declined("recompose-silu", shared, "other uses")
    declined("recompose-silu", lambda b, x: b.div(x, b.add(b.exp(b.neg(x)), 2.0)), "the constant is 2.0, not 1.0")


# --- rope --------------------------------------------------------------------------------------------------------------


def rotary(b: Builder, x: Value, *, low_negated: bool = False, half: int = 4, step: int = 1, axis: int = -1) -> Value:
    cos, sin = (weight(b, (B, 8), n) for n in ("cos", "sin"))
    low, high = b.slice(x, axis=-1, stop=half), b.slice(x, axis=-1, start=half, stop=8)
    if step == 2:
        low, high = b.slice(x, axis=-1, stop=8, step=2), b.slice(x, axis=-1, start=1, stop=8, step=2)
    turned = b.concat(high, b.neg(low), axis=axis) if low_negated else b.concat(b.neg(high), low, axis=axis)
    return b.add(b.mul(x, cos), b.mul(turned, sin))


SEQUENCE = (2, B, 8)


def test_rope() -> None:
    found("recompose-rope", rotary, ["rope"], shape=SEQUENCE)


def test_rope_of_a_slice() -> None:
    def of_slice(b: Builder, x: Value) -> Value:  # as left by merging slices: the halves are slices of the whole
        cos, sin = (weight(b, (B, 8), n) for n in ("cos", "sin"))
        q = b.slice(x, axis=2, start=8, stop=16)
        turned = b.concat(b.neg(b.slice(x, axis=2, start=12, stop=16)), b.slice(x, axis=2, start=8, stop=12), axis=2)
        return b.add(b.mul(turned, sin), b.mul(cos, q))

    found("recompose-rope", of_slice, ["slice", "rope"], shape=(2, B, 24))


def test_rope_declines() -> None:
    declined("recompose-rope", lambda b, x: rotary(b, x, low_negated=True), "turns the other way", shape=SEQUENCE)
    declined("recompose-rope", lambda b, x: rotary(b, x, half=3), "not the upper and the lower half", shape=SEQUENCE)
    declined("recompose-rope", lambda b, x: rotary(b, x, step=2), None, shape=SEQUENCE)


# --- lerp --------------------------------------------------------------------------------------------------------------


def resized(b: Builder, x: Value, *, wide: bool = False) -> Value:
    """Two axes resized by half as PyTorch spells it: neighbours i and i + 1 of each axis, mixed by t."""
    t, i = weight(b, (4,), "t", types.f32 if wide else x.dtype), b.iota(size=4)
    j = b.add(i, b.constant(1, types.i64))
    rows = [b.take(x, k, axis=1, clip=True) for k in (i, j)]
    corners = [b.take(r, k, axis=2, clip=True) for r in rows for k in (i, j)]
    if wide:
        corners = [b.cast(v, dtype=types.f32) for v in corners]
    top, bottom = (b.add(u, b.mul(b.sub(v, u), t)) for u, v in (corners[:2], corners[2:]))
    return b.add(top, b.mul(b.sub(bottom, top), b.reshape(t, shape=(4, 1))))


@pytest.mark.parametrize("wide", [False, True])
def test_lerp(wide: bool) -> None:
    g = built(lambda b, x: resized(b, x, wide=wide), (B, 6, 6), types.f16 if wide else types.f32)
    made = ops(check_pass(make_pass("recompose-lerp"), g))
    assert (made.count("sub"), made.count("mul"), made.count("take")) == (3, 6, 6)


def test_lerp_beside_a_pole() -> None:
    """An interpolated element may be near zero: of its reciprocal, eager's one run in f16 says too little."""
    check_pass(make_pass("recompose-lerp"), built(lambda b, x: b.reciprocal(resized(b, x)), (B, 6, 6), types.f16), seeds=range(20))


def test_lerp_of_what_is_equal() -> None:
    """Past the edge a neighbour is the edge itself, a + 0 t = a, but a (1 - t) + a t may miss it by a bit: either is the largest."""

    def largest(b: Builder, x: Value) -> Value:
        i = b.iota(size=12)
        u, v = (b.take(x, k, axis=1, clip=True) for k in (i, b.add(i, b.constant(1, types.i64))))
        return b.argmax(b.add(u, b.mul(b.sub(v, u), weight(b, (12,), "t", types.f64))), axis=1)

    check_pass(make_pass("recompose-lerp"), built(largest, (B, 3), types.f64), seeds=range(20))


def test_lerp_declines() -> None:
    declined("recompose-lerp", lambda b, x: b.add(x, b.mul(b.sub(b.exp(x), x), weight(b, (8,)))), None)
    other: Spelling = lambda b, x: b.take(weight(b, (B, 8), "other"), b.iota(size=8), axis=1, clip=True)  # noqa: E731
    mixed: Spelling = lambda b, x: b.take(x, b.iota(size=8), axis=1, clip=True)  # noqa: E731
    declined("recompose-lerp", lambda b, x: b.add(u := mixed(b, x), b.mul(b.sub(other(b, x), u), weight(b, (8,)))), None)

    def checked(b: Builder, x: Value) -> Value:  # the user's own indices are not clipped
        u, v = (b.take(x, b.add(b.iota(size=4), b.constant(k, types.i64)), axis=1) for k in (0, 1))
        return b.add(u, b.mul(b.sub(v, u), weight(b, (4,))))

    declined("recompose-lerp", checked, None)


# --- all of them -------------------------------------------------------------------------------------------------------

LOG_OF: Spelling = lambda b, x: b.log(b.softmax(x, axis=1))  # noqa: E731
SIGMOID: Spelling = lambda b, x: b.reciprocal(b.add(b.exp(b.neg(x)), 1.0))  # noqa: E731


def examples() -> list[Graph]:
    scaled: list[Spelling] = [
        lambda b, x: b.add(b.mul(norm_mul(b, x), weight(b, (8,))), weight(b, (8,), "b")),
        lambda b, x: b.mul(b.mul(x, b.rsqrt(b.add(mean_square(b, x), 1e-6))), weight(b, (8,))),
        lambda b, x: b.div(x, b.add(b.exp(b.neg(x)), 1.0)),
    ]
    of_rows = (softmax_div, log_softmax, LOG_OF, *NORMS, *scaled, *ERF, *TANH, SIGMOID)
    return [*map(built, of_rows), built(rotary, SEQUENCE), built(resized, (B, 6, 6))]


@pytest.mark.parametrize("name", sorted(n for n, p in PASSES.items() if p.__module__.startswith(recompose.__name__)))
def test_every_rule_fires(name: str) -> None:
    p = make_pass(name)
    assert isinstance(p, RewritePass)
    check_rules_fire(p, examples())

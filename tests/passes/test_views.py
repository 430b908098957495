"""views: what only moves elements is merged, cancelled, and sunk."""

from __future__ import annotations

import pytest
from writing import B, Expression, written

from graphopt.ir import dims
from graphopt.passes.simplify import Views
from graphopt.testing import check_pass, check_rules_fire

CASES: dict[str, tuple[str, Expression, Expression]] = {
    "IdentityView": ("f32[B, 4]", lambda b, x: b.create("reshape", [x], {"shape": (B, 4)}), lambda b, x: x),
    "IdentityView, pad": ("f32[B, 4]", lambda b, x: b.pad(x, low=(0, 0), high=(0, 0)), lambda b, x: x),
    "IdentityView, flip": ("f32[B, 1]", lambda b, x: b.flip(x, axes=(1,)), lambda b, x: x),
    "MergeReshapes": (
        "f32[B, 4]", lambda b, x: b.reshape(b.reshape(x, shape=(4 * B,)), shape=(B, 2, 2)),
        lambda b, x: b.reshape(x, shape=(B, 2, 2)),
    ),
    "MergeTransposes": (
        "f32[B, 3, 4]", lambda b, x: b.transpose(b.transpose(x, perm=(1, 2, 0)), perm=(1, 2, 0)),
        lambda b, x: b.transpose(x, perm=(2, 0, 1)),
    ),
    "MergeBroadcasts": (
        "f32[4]", lambda b, x: b.broadcast_to(b.broadcast_to(x, shape=(3, 4)), shape=(B, 3, 4)),
        lambda b, x: b.broadcast_to(x, shape=(B, 3, 4)),
    ),
    "BroadcastByReshape": ("f32[B, 4]", lambda b, x: b.broadcast_to(x, shape=(1, B, 4)), lambda b, x: b.reshape(x, shape=(1, B, 4))),
    "TransposeOfOnes": ("f32[B, 1, 4]", lambda b, x: b.transpose(x, perm=(1, 0, 2)), lambda b, x: b.reshape(x, shape=(1, B, 4))),
    "FlipTwice": ("f32[B, 4]", lambda b, x: b.flip(b.flip(x, axes=(1,)), axes=(-1,)), lambda b, x: x),
    "KeepReducedAxes": (
        "f32[B, 4]", lambda b, x: b.reshape(b.sum(x, axes=(1,)), shape=(B, 1)), lambda b, x: b.sum(x, axes=(1,), keepdims=True),
    ),
    "KeepReducedAxes, back": (
        "f32[B, 4]", lambda b, x: b.reshape(b.argmax(x, axis=1, keepdims=True), shape=(B,)), lambda b, x: b.argmax(x, axis=1),
    ),
    "ReduceOnes": ("f32[B, 1]", lambda b, x: b.sum(x, axes=(1,)), lambda b, x: b.reshape(x, shape=(B,))),
    "SliceAll": ("f32[B, 4]", lambda b, x: b.slice(x, axis=0, start=0, stop=B), lambda b, x: x),
    "SliceOfSlice": (
        "f32[B, 16]", lambda b, x: b.slice(b.slice(x, axis=1, start=2, stop=14), axis=1, start=1, stop=9, step=3),
        lambda b, x: b.slice(x, axis=1, start=3, stop=11, step=3),
    ),
    "SliceOfSlice, steps": (
        "f32[B, 16]", lambda b, x: b.slice(b.slice(x, axis=1, start=1, stop=16, step=2), axis=1, start=1, stop=6, step=2),
        lambda b, x: b.slice(x, axis=1, start=3, stop=12, step=4),
    ),
    "SliceOfConcat": (
        "f32[B, 3] f32[B, 5]", lambda b, x, y: b.slice(b.concat(x, y, axis=1), axis=1, start=4, stop=7),
        lambda b, x, y: b.slice(y, axis=1, start=1, stop=4),
    ),
    "SliceOfConcat, symbolic": (
        "f32[B, 3] f32[7, 3]", lambda b, x, y: b.slice(b.concat(x, y, axis=0), axis=0, start=B, stop=B + 7),
        lambda b, x, y: y,
    ),
    "ConcatOne": ("f32[B, 3] f32[B, 0]", lambda b, x, y: b.concat(x, y, axis=1), lambda b, x, y: x),
    "ConcatOfConcat": (
        "f32[B, 3] f32[B, 5]", lambda b, x, y: b.concat(b.concat(x, y, axis=1), x, axis=-1), lambda b, x, y: b.concat(x, y, x, axis=-1),
    ),
    "JoinSlices": (
        "f32[B, 8]", lambda b, x: b.concat(b.slice(x, axis=1, stop=3), b.slice(x, axis=1, start=3, stop=8), axis=1), lambda b, x: x,
    ),
    "TakeRange": (
        "f32[9, B]", lambda b, x: b.take(x, b.iota(size=3, start=2, step=3)),
        lambda b, x: b.slice(x, axis=0, start=2, stop=9, step=3),
    ),
    "SinkView": ("f32[B, 4]", lambda b, x: b.relu(b.transpose(x, perm=(1, 0))), lambda b, x: b.transpose(b.relu(x), perm=(1, 0))),
    "SinkView, through a chain": (
        "f32[B, 4]", lambda b, x: b.transpose(b.exp(b.mul(b.transpose(x, perm=(1, 0)), 2.0)), perm=(1, 0)),
        lambda b, x: b.exp(b.mul(x, 2.0)),
    ),
    "CancelViews": (
        "f32[B, 4] f32[B, 4]",
        lambda b, x, y: b.reshape(b.add(b.reshape(x, shape=(2 * B, 2)), b.reshape(y, shape=(2 * B, 2))), shape=(B, 4)),
        lambda b, x, y: b.add(x, y),
    ),
    "CancelViews, transpose": (
        "f32[B, 4] f32[B, 4]",
        lambda b, x, y: b.transpose(b.mul(b.transpose(x, perm=(1, 0)), b.transpose(y, perm=(1, 0))), perm=(1, 0)),
        lambda b, x, y: b.mul(x, y),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_before_and_after(case: str) -> None:
    inputs, before, after = CASES[case]
    check_pass(Views(), written(inputs, before), written(inputs, after))


def test_text() -> None:
    check_pass(
        Views(),
        """
        graph @g(%x: f32[B, 3, 4]) -> f32[4, B, 3] where 1 <= B {
          %0: f32[3, 4, B] = transpose(%x) {perm = [1, 2, 0]}
          %1: f32[4, B, 3] = transpose(%0) {perm = [1, 2, 0]}
          return %1
        }""",
        """
        graph @g(%x: f32[B, 3, 4]) -> f32[4, B, 3] where 1 <= B {
          %0: f32[4, B, 3] = transpose(%x) {perm = [2, 0, 1]}
          return %0
        }""",
    )


NEVER: dict[str, tuple[str, Expression, str | None]] = {
    "a slice of an unknown part": (
        "f32[B, 3] f32[7, 3]", lambda b, x, y: b.slice(b.concat(x, y, axis=0), axis=0, start=0, stop=3), "not known to lie within",
    ),
    "a slice across": (
        "f32[B, 3] f32[B, 5]", lambda b, x, y: b.slice(b.concat(x, y, axis=1), axis=1, start=2, stop=7),
        "within one operand",
    ),
    "slices of two axes": ("f32[B, 4]", lambda b, x: b.slice(b.slice(x, axis=1, stop=2), axis=0, stop=1), None),
    "slices out of order": (
        "f32[B, 8]", lambda b, x: b.concat(b.slice(x, axis=1, start=3, stop=8), b.slice(x, axis=1, stop=3), axis=1), None,
    ),
    "flips of two axes": ("f32[B, 4]", lambda b, x: b.flip(b.flip(x, axes=(0,)), axes=(1,)), "differ"),
    "indices beyond the axis": ("f32[B, 4]", lambda b, x: b.take(x, b.iota(size=3)), "within the axis"),
    "a view that is used elsewhere": ("f32[B, 4]", lambda b, x: ((y := b.transpose(x, perm=(1, 0))), b.relu(y)), None),
    "two tensors, one view": ("f32[B, 4] f32[4, B]", lambda b, x, y: b.add(b.transpose(x, perm=(1, 0)), y), None),
    "views that do not cancel": (
        "f32[B, 4] f32[4, B]", lambda b, x, y: b.transpose(b.add(b.transpose(x, perm=(1, 0)), y), perm=(1, 0)), None,
    ),
    "a reduction by a true size": ("f32[B, 4]", lambda b, x: b.sum(x, axes=(0,)), None),
}  # fmt: skip


@pytest.mark.parametrize("case", NEVER)
def test_declines(case: str) -> None:
    inputs, before, reason = NEVER[case]
    check_pass(Views(), written(inputs, before), fires=False, reason=reason)


def test_every_rule_fires() -> None:
    check_rules_fire(Views(), [written(inputs, before) for inputs, before, _ in CASES.values()])


def test_a_chain_of_views_takes_linear_time() -> None:
    def chain(b, x):  # type: ignore[no-untyped-def]
        for _ in range(400):
            x = b.exp(b.transpose(x, perm=(1, 0)))
        return x

    g = check_pass(Views(), written("f32[B, 4]", chain), seeds=(0,), bindings=[{"B": 2}])
    assert sum(n.name == "transpose" for n in g.nodes()) == 0 and len(g) == 400
    assert dims.same_shape(g.outputs[0].shape, (B, 4))

"""Attention under Triton's interpreter: every attribute of the op, sizes that fill nothing, any layout; compiled for every target."""

from __future__ import annotations

import pytest
from attention_graphs import attention, inputs
from test_flash import CASES
from test_triton_kernels import draws
from test_triton_offline import TARGETS, judge
from triton_check import runner, templates

from graphopt.target import Target
from graphopt.testing.kernels import check

SIZES = ((1, 1), (5, 9), (70, 20), (33, 150))


@pytest.mark.parametrize("name", CASES)
def test_against_f64(name: str) -> None:
    graph = CASES[name]
    run = runner(graph, "attention")
    for sizes in [dict(zip("MN", s, strict=True)) for s in SIZES] if graph.symbols else [{}]:
        check(graph, run, inputs(graph, **sizes), sizes or None, factor=4.0)


@pytest.mark.parametrize("name", ["odd", "window to both sides", "bf16"])
def test_sampled_schedules(name: str) -> None:
    graph = CASES[name]
    for s in draws(graph, "attention", 3):
        check(graph, runner(graph, "attention", s), inputs(graph), None, factor=4.0)


def test_numbers_that_are_none() -> None:
    """An infinite score gives nan as in eager, nan reaches its own row only, -inf everywhere gives zeros."""
    graph = CASES["odd"]
    run = runner(graph, "attention")
    q, k, v = inputs(graph)
    q[0, 0, 3, 2], q[0, 1, 66, 0], k[0, 1, 100, 5] = float("nan"), float("inf"), float("nan")
    check(graph, run, [q, k, v], factor=4.0)
    graph = CASES["bias"]
    q, k, v, b = inputs(graph)
    b[0, 0, 4], b[0, 1, :, :60], b[0, 1, 7, 65] = float("-inf"), float("-inf"), float("inf")
    check(graph, runner(graph, "attention"), [q, k, v, b], factor=4.0)


def test_large_scores_and_long_rows() -> None:
    """The maximum grows from block to block."""
    graph = attention(20, 600, 16)
    q, k, v = inputs(graph)
    k *= 0.1 + 40 * (k[..., :1] * 0 + 1).cumsum(-2) / 600
    for keys in (k, k.flip(-2)):
        check(graph, runner(graph, "attention"), [q, keys, v], factor=4.0)


LARGE = {
    "heads of 64": attention(1024, 1024, 64, heads=12, dtype="bf16", attrs=", causal = true"),
    "shared heads of 128": attention("M", "N", 128, heads=8, shared=2, dtype="f16", attrs=", causal = true, window = 200",
                                     where=" where 1 <= M <= 9000, 1 <= N <= 9000"),
    "f32": attention(128, 128, 64, heads=12),
    "heads of 256": attention(512, 512, 256, heads=8, dtype="bf16"),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(target: str) -> None:
    judge(LARGE["heads of 64"], "attention", target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LARGE)
def test_all_machine_code(name: str, target: str) -> None:
    judge(LARGE[name], "attention", target)


def test_what_is_no_attention_of_this_kind_is_refused() -> None:
    w, (template, *_) = templates(CASES["odd"], "attention")
    assert template.takes(w, Target.from_name("cuda:sm_80")) is None
    assert template.takes(w.__class__("matmul", w.text), Target.from_name("cuda:sm_80")) == "not an attention region"

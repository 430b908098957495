"""Attention in training under Triton's interpreter: the result with its lse, and the gradients; compiled for every target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attention_graphs import inputs
from test_flashgradient import BIASES, CASES, backward, batched, forward, gradient_inputs
from test_triton_kernels import draws
from test_triton_offline import TARGETS, judge
from torch.nn import functional as F
from triton_check import runner, templates

from graphopt import clear_reports, reports
from graphopt.autotune.space import Schedule
from graphopt.backends.triton.offline import compile_offline
from graphopt.ir.graph import Graph
from graphopt.ir.interpreter import evaluate
from graphopt.target import Target
from graphopt.testing.kernels import check

SIZES = ((1, 1), (5, 9), (70, 20), (33, 90))


def bindings(graph: Graph) -> list[dict[str, int]]:
    return [dict(zip("MN", s, strict=True)) for s in SIZES] if graph.symbols else [{}]


@pytest.mark.parametrize("name", CASES)
def test_forward_against_f64(name: str) -> None:
    graph = CASES[name]
    run = runner(graph, "attention_forward")
    for sizes in bindings(graph):
        check(graph, run, inputs(graph, **sizes), sizes or None, factor=4.0, slack=4.0)


@pytest.mark.parametrize("name", CASES)
def test_gradient_against_f64(name: str) -> None:
    graph = backward(CASES[name])
    run = runner(graph, "attention_backward")
    for sizes in bindings(graph):
        check(graph, run, gradient_inputs(CASES[name], **sizes), sizes or None, factor=4.0, slack=8.0)


HALVES = {
    "of each pair, bf16": batched("2, 4, 50, 70", of="bf16"),
    "of heads that share, bf16": batched("4, 50, 70", shared=2, attrs=", causal = true, offset = 20", of="bf16"),
    "of keys, bf16": batched("70", of="bf16"),
    "of keys and heads, bf16": batched("4, 1, 70", attrs=", dropout = 0.2", of="bf16"),
}


@pytest.mark.parametrize("name", [*BIASES, *HALVES])
def test_gradient_of_a_bias_against_f64(name: str) -> None:
    given = {**BIASES, **HALVES}[name]
    graph = backward(given, bias=True)
    run = runner(graph, "attention_backward")
    for sizes in bindings(graph):
        sizes = {**sizes, "N": max(2, sizes["N"])} if sizes else sizes
        check(graph, run, gradient_inputs(given, **sizes), sizes or None, factor=4.0, slack=8.0)


@pytest.mark.parametrize("name", ["dropout on tiles", "window to both sides"])
def test_pieces_of_the_keys(name: str) -> None:
    """Split-KV finds the same sums, and drops the same weights."""
    graph = CASES[name]
    schedule = Schedule.make("attention", "flash", m=16, n=16, heads=1, warps=2, stages=1, pieces=4, reads="pointers")
    check(graph, runner(graph, "attention_forward", schedule), inputs(graph), factor=4.0, slack=4.0)


@pytest.mark.parametrize("name", ["dropout, everything", "bf16 on tiles"])
def test_sampled_schedules(name: str) -> None:
    graph = backward(CASES[name])
    for s in draws(graph, "attention_backward", 2):
        check(graph, runner(graph, "attention_backward", s), gradient_inputs(CASES[name]), factor=4.0, slack=8.0)


def test_a_row_of_nothing_but_nan_reaches_all_keys() -> None:
    """Rows before the first key: of an ``empty`` that is nan, no block of keys is left out."""
    g = forward(40, 30, attrs=', causal = true, offset = -20, empty = "nan"')
    check(g, runner(g, "attention_forward"), inputs(g), factor=4.0, slack=4.0)
    check(backward(g), runner(backward(g), "attention_backward"), gradient_inputs(g), factor=4.0, slack=8.0)


def test_large_scores_and_long_rows() -> None:
    """Weights that are all but one zero, and sums over many keys."""
    g = forward(20, 600, 16)
    q, k, v = inputs(g)
    k = k * torch.linspace(0.1, 40, 600)[:, None]
    out, lse = evaluate(g, [q, k, v])
    check(backward(g), runner(backward(g), "attention_backward"), [torch.ones_like(out), out, lse, q, k, v], factor=4.0, slack=4.0)


def test_the_bits_are_the_same_each_time() -> None:
    graph = backward(CASES["shared heads"])
    run, given = runner(graph, "attention_backward"), gradient_inputs(CASES["shared heads"])
    for first, second in zip(run(given, None), run(given, None), strict=True):
        assert torch.equal(first.view(torch.int32), second.view(torch.int32))


def steps(layer: Callable[..., torch.Tensor], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, slack: float) -> tuple[Any, ...]:
    """A step forwards and one backwards, with no more than eager's errors; the reports of both."""

    def step(fn: Callable[..., torch.Tensor], wide: torch.dtype) -> list[torch.Tensor]:
        r = torch.Generator().manual_seed(0)
        given = [torch.randn(shape, generator=r).to(dtype).to(wide).requires_grad_() for shape in shapes]
        y = fn(*given)
        y.square().sum().backward()
        return [y.detach(), *(t.grad for t in given if t.grad is not None)]

    torch._dynamo.reset()
    clear_reports()
    made = torch.compile(layer, backend="graphopt", options={"backend": "triton", "target": "cuda:sm_90:4", "strict": True})
    for mine, own, true in zip(step(made, dtype), step(layer, dtype), step(layer, torch.float64), strict=True):
        assert (mine - true).abs().max() <= 4 * (own - true).abs().max() + slack * torch.finfo(dtype).eps * true.abs().max()
    return tuple(reports())


def test_a_training_step() -> None:
    """Both steps of a layer are kernels, and its gradients have no more than eager's errors."""

    def layer(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        q, k, v = ((x @ w).view(2, 9, 2, 8).transpose(1, 2) for w in weights)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 9, 16)

    forward, backward = steps(layer, [(2, 9, 16), *[(16, 16)] * 3], torch.float32, slack=8)
    assert "attention_forward" in forward.text_after and "attention_backward" in backward.text_after


def test_a_bias_of_halves_is_trained() -> None:
    """Its gradient is a kernel's, summed in f32 over batches and rounded once."""

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) + b, -1) @ v

    _, backward = steps(layer, [(3, 2, 9, 8)] * 3 + [(2, 9, 9)], torch.bfloat16, slack=2)
    assert "bias_gradient = true" in backward.text_after and "attention_backward" in backward.text_after


LARGE = {
    "heads of 64": forward(1024, 1024, 64, heads=12, dtype="bf16", attrs=", causal = true"),
    "shared heads of 128": forward("M", "N", 128, heads=8, shared=2, dtype="bf16", attrs=", causal = true, window = 200",
                                   where=" where 1 <= M <= 9000, 1 <= N <= 9000"),
    "dropout": forward(512, 512, 64, heads=12, dtype="bf16", extra=", %seed: i64[]", names=", %seed", attrs=", dropout = 0.1"),
    "f32": forward(128, 128, 64, heads=12),
    "heads of 128 of f32": forward(128, 128, 128, heads=12),
    "heads of 256": forward(512, 512, 256, heads=8, dtype="bf16"),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["heads of 64", "shared heads of 128"])
def test_machine_code(name: str, target: str) -> None:
    judge(backward(LARGE[name]), "attention_backward", target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LARGE)
def test_all_machine_code(name: str, target: str) -> None:
    judge(LARGE[name], "attention_forward", target)
    judge(backward(LARGE[name]), "attention_backward", target)


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_of_the_gradient_of_a_bias(target: str) -> None:
    biased = forward(512, 512, 64, heads=12, dtype="bf16", extra=", %b: bf16[12, 512, 512]", names=", %b")
    judge(backward(biased, bias=True), "attention_backward", target)


def test_every_kernel_multiplies_on_the_matrix_units() -> None:
    """Both kernels of a gradient, not one of them alone."""
    t = Target.from_name("cuda:sm_90")
    w, (template, *_) = templates(backward(LARGE["heads of 64"]), "attention_backward", t)
    code = compile_offline(template.emit(w, template.space(w, t).default(), t), t)
    kernels = code.assembly.split(".version")[1:]
    assert len(kernels) == 2 and all("wgmma.mma_async" in kernel for kernel in kernels)

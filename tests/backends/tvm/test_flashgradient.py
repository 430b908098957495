"""The gradient of an attention in tiles, and the forward that keeps its lse: error against f64 with eager's own as the yardstick."""

from __future__ import annotations

from typing import Any

import torch
from attention_graphs import inputs
from tvm_check import check

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.build import KernelBuilder, load_kernel
from graphopt.backends.tvm.templates import FLASH_GRADIENT
from graphopt.ir import types
from graphopt.ir.graph import Graph
from graphopt.ir.interpreter import evaluate
from graphopt.ir.ops import op
from graphopt.ir.text import parse_graph
from graphopt.target import detect


def forward(m: int | str, n: int | str, d: int = 40, e: int | None = None, heads: int = 2, shared: int | None = None, attrs: str = "",
            extra: str = "", names: str = "", where: str = "", dtype: str = "f32") -> Graph:  # fmt: skip
    """An attention ``[1, heads, m, d]`` over n keys that keeps its lse; ``extra`` are more inputs, ``names`` those that the op reads."""
    e, shared = e or d, shared or heads
    out, lse = f"{dtype}[1, {heads}, {m}, {e}]", f"f32[1, {heads}, {m}]"
    return parse_graph(f"""graph @g(%q: {dtype}[1, {heads}, {m}, {d}], %k: {dtype}[1, {shared}, {n}, {d}],
      %v: {dtype}[1, {shared}, {n}, {e}]{extra}) -> ({out}, {lse}){where} {{
        %0: {out}, %1: {lse} = attention_forward(%q, %k, %v{names}) {{scale = 0.3{attrs}}}
        return %0, %1
    }}""")


def backward(g: Graph, bias: bool = False) -> Graph:
    """The gradient of a forward's attention, for the same inputs behind the result's gradient, the result and the lse; by its bias, too."""
    (node,) = g.nodes()
    out = Graph("g", g.symbols)
    given = [out.add_input(r.type) for r in (node.results[0], *node.results)]
    own = [out.add_input(v.type, v.hint) for v in g.inputs]
    gradient = out.create(op("attention_backward"), [*given, *(own[v.index] for v in node.operands)], {**node.attrs, "bias_gradient": bias})
    out.set_outputs(gradient.results)
    return out


SEED = ", %seed: i64[]"
CASES = {
    "one tile": forward(16, 16, 16),
    "odd": forward(67, 131, 40, 24),
    "few": forward(3, 5, 7, 1),
    "one key": forward(20, 1, 8),
    "wide": forward(50, 70, 80, 100, heads=1),
    "several groups": forward(300, 70, 64, heads=1),
    "causal": forward(130, 130, attrs=", causal = true"),
    "causal, more keys": forward(50, 170, attrs=", causal = true, offset = 120"),
    "causal, blind rows": forward(90, 60, attrs=", causal = true, offset = -30"),
    "window": forward(200, 200, attrs=", causal = true, window = 30"),
    "window to both sides": forward(150, 220, attrs=", window = 25, offset = 40"),
    "soft cap": forward(40, 50, attrs=", softcap = 2.0, causal = true"),
    "shared heads": forward(50, 70, heads=6, shared=2),
    "one head of keys": forward(50, 70, heads=3, shared=1, attrs=", causal = true"),
    "bias": forward(50, 70, extra=", %b: f32[1, 2, 50, 70]", names=", %b"),
    "bias of keys": forward(50, 70, extra=", %b: f32[70]", names=", %b"),
    "mask": forward(50, 70, extra=", %b: b1[1, 1, 50, 70]", names=", %b"),
    "mask, nan": forward(50, 70, extra=", %b: b1[1, 1, 50, 70]", names=", %b", attrs=', empty = "nan"'),
    "bias and mask": forward(50, 70, extra=", %a: f32[2, 50, 70], %b: b1[70]", names=", %a, %b", attrs=", softcap = 3.0"),
    "slopes": forward(50, 70, extra=", %a: f32[2]", names=", %a", attrs=", alibi = true, causal = true, offset = 20"),
    "sinks": forward(50, 70, extra=", %b: b1[50, 70], %a: f32[2]", names=", %b, %a", attrs=", sinks = true"),
    "dropout": forward(67, 131, 40, 24, extra=SEED, names=", %seed", attrs=", dropout = 0.3"),
    "dropout on tiles": forward(67, 131, 64, heads=6, shared=3, extra=SEED, names=", %seed", attrs=", dropout = 0.1, causal = true"),
    "dropout of all but a few": forward(50, 70, 32, extra=SEED, names=", %seed", attrs=", dropout = 0.99"),
    "dropout of all": forward(5, 7, extra=SEED, names=", %seed", attrs=", dropout = 0.99999999999"),
    "dropout, everything": forward(
        50, 70, extra=", %a: f32[2, 50, 70], %b: b1[70], %c: f32[2], %d: f32[2]" + SEED, names=", %a, %b, %c, %d, %seed",
        attrs=", dropout = 0.5, alibi = true, sinks = true, softcap = 3.0, window = 30",
    ),
    "symbolic dropout": forward("M", "N", 32, extra=SEED, names=", %seed", attrs=", dropout = 0.2", where=" where 1 <= M, 1 <= N"),
    "bf16": forward(67, 131, 40, 24, dtype="bf16"),
    "bf16 on tiles": forward(90, 70, 64, heads=6, shared=3, attrs=", causal = true", dtype="bf16"),
    "bf16, everything": forward(
        50, 70, extra=", %a: bf16[2, 50, 70], %b: b1[70], %c: bf16[2], %d: bf16[2]" + SEED, names=", %a, %b, %c, %d, %seed",
        attrs=", dropout = 0.5, alibi = true, sinks = true, softcap = 3.0, window = 30", dtype="bf16",
    ),
    "symbolic bf16": forward("M", "N", 32, attrs=", causal = true", where=" where 1 <= M, 1 <= N", dtype="bf16"),
    "symbolic": forward("M", "N", 24, attrs=", causal = true, offset = 3", where=" where 1 <= M, 1 <= N"),
    "symbolic window": forward("M", "N", 24, attrs=", window = 9", extra=", %b: b1[M, N]", names=", %b", where=" where 1 <= M, 1 <= N"),
}  # fmt: skip
SIZES = ((1, 1), (5, 9), (70, 20), (64, 96))


def gradient_inputs(g: Graph, **sizes: int) -> list[torch.Tensor]:
    """Inputs of a forward's gradient: what the forward gives for its own, in f32."""
    xs = inputs(g, **sizes)
    out, lse = evaluate(g, xs, bindings=sizes)
    return [torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype), out, lse, *xs]


def rounded_lse(graph: Graph, run: Any) -> Any:
    """A run whose lse, which has the error of a score, that is of two parts of bf16 on tiles, is looked at here."""

    def checked(xs: list[torch.Tensor], sizes: dict[str, int] | None) -> list[torch.Tensor]:
        out, lse = run(xs, sizes)
        own = evaluate(graph, xs, bindings=sizes)[1]
        torch.testing.assert_close(lse, own, rtol=2**-14, atol=2**-14)
        return [out, own]

    return checked


def test_forward_against_f64(compile_all) -> None:
    for graph, run in zip(CASES.values(), compile_all([(g, "attention_forward") for g in CASES.values()]), strict=True):
        for sizes in [dict(zip("MN", s, strict=True)) for s in SIZES] if graph.symbols else [{}]:
            halves = graph.outputs[0].dtype == types.bf16
            check(graph, rounded_lse(graph, run) if halves else run, inputs(graph, **sizes), sizes or None, factor=4.0)


def test_gradient_against_f64(compile_all) -> None:
    graphs = {g: backward(g) for g in CASES.values()}
    for (g, graph), run in zip(graphs.items(), compile_all([(g, "attention_backward") for g in graphs.values()]), strict=True):
        for sizes in [dict(zip("MN", s, strict=True)) for s in SIZES] if graph.symbols else [{}]:
            check(graph, run, gradient_inputs(g, **sizes), sizes or None, factor=4.0, slack=8.0)


def batched(bias: str, shared: int = 4, attrs: str = "", where: str = "", m: int | str = 50, n: int | str = 70,
            of: str = "f32") -> Graph:  # fmt: skip
    """Two batches of four heads, with a bias."""
    out, lse = f"{of}[2, 4, {m}, 16]", f"f32[2, 4, {m}]"
    seed = ", %s" if "dropout" in attrs else ""
    return parse_graph(f"""graph @g(%q: {of}[2, 4, {m}, 24], %k: {of}[2, {shared}, {n}, 24], %v: {of}[2, {shared}, {n}, 16],
      %b: {of}[{bias}]{", %s: i64[]" if seed else ""}) -> ({out}, {lse}){where} {{
        %0: {out}, %1: {lse} = attention_forward(%q, %k, %v, %b{seed}) {{scale = 0.3{attrs}}}
        return %0, %1
    }}""")


BIASES = {
    "of each pair": batched("2, 4, 50, 70"),
    "of heads": batched("1, 4, 50, 70", attrs=", causal = true, offset = 20"),
    "of heads, without a batch": batched("4, 50, 70", attrs=", dropout = 0.2"),
    "of heads that share": batched("4, 50, 70", shared=2, attrs=", softcap = 2.0, window = 30"),
    "of batches": batched("2, 1, 50, 70", shared=1),
    "of positions": batched("50, 70"),
    "of keys": batched("70", attrs=", causal = true"),
    "of keys and heads": batched("4, 1, 70"),
    "one row": batched("1, 4, 1, 70", m=1),
    "symbolic": batched("1, 4, M, N", m="M", n="N", attrs=", causal = true", where=" where 1 <= M, 2 <= N"),
}


def test_gradient_of_a_bias_against_f64(compile_all) -> None:
    graphs = {g: backward(g, bias=True) for g in BIASES.values()}
    for (g, graph), run in zip(graphs.items(), compile_all([(g, "attention_backward") for g in graphs.values()]), strict=True):
        assert len(graph.outputs) == 4
        for sizes in [dict(zip("MN", s, strict=True)) for s in ((1, 2), (5, 9), (70, 20), (64, 96))] if graph.symbols else [{}]:
            check(graph, run, gradient_inputs(g, **sizes), sizes or None, factor=4.0, slack=8.0)


def test_the_gradient_of_a_bias_of_halves_is_refused() -> None:
    w = Workload.of(backward(batched("4, 50, 70", of="bf16"), bias=True), "attention_backward")
    assert FLASH_GRADIENT.takes(w, detect()) == "the gradient of a bias that is of halves"


def test_schedules(builder: KernelBuilder, kernels_dir: Any) -> None:
    """Other register tiles and blocks compute the same."""
    graph, target = backward(CASES["window to both sides"]), detect()
    w = Workload.of(graph, "attention_backward")
    space = FLASH_GRADIENT.space(w, target)
    default = dict(space.default().knobs)
    changes: list[dict[str, Any]] = [
        {"vectors": 1, "rows": 12, "block": 96}, {"vectors": 2, "rows": 4, "block": 32}, {"parallel": False, "unroll": 8},
    ]  # fmt: skip
    schedules = [s for c in changes if space.rejection(s := Schedule.make("flash-gradient", **{**default, **c})) is None]
    assert schedules
    for path, s in zip(builder.build_many([(w, s) for s in schedules], target, kernels_dir), schedules, strict=True):
        kernel = load_kernel(path, w, s)  # type: ignore[arg-type]

        def run(xs: Any, _: Any, kernel: Any = kernel) -> list[torch.Tensor]:
            out = [torch.full([int(n) for n in v.shape], 77.0) for v in graph.outputs]
            kernel(*xs, *out)
            return out

        check(graph, run, gradient_inputs(CASES["window to both sides"]), factor=4.0, slack=4.0)


def test_large_scores_and_long_rows(compile_all) -> None:
    """Weights that are all but one zero, and sums over many keys."""
    g = forward(40, 1500, 16)
    graph = backward(g)
    (run,) = compile_all([(graph, "attention_backward")])
    q, k, v = inputs(g)
    k = k * torch.linspace(0.1, 40, 1500)[:, None]
    out, lse = evaluate(g, [q, k, v])
    check(graph, run, [torch.ones_like(out), out, lse, q, k, v], factor=4.0, slack=4.0)


def test_without_heads(compile_all) -> None:
    g = parse_graph("""graph @g(%q: f32[20, 8; 1, 20], %k: f32[33, 8], %v: f32[33, 4; 1, 40]) -> (f32[20, 4], f32[20]) {
      %0: f32[20, 4], %1: f32[20] = attention_forward(%q, %k, %v) {scale = 0.3}
      return %0, %1
    }""")
    (run,) = compile_all([(backward(g), "attention_backward")])
    check(backward(g), run, gradient_inputs(g), factor=4.0, slack=4.0)

"""Attention in tiles: error against f64 with eager's own as the yardstick; sizes that fill nothing, masks of every kind, any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_graphs import attention, inputs
from tvm_check import check

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.forms.flashform import Form, form_of
from graphopt.backends.tvm.build import KernelBuilder, load_kernel
from graphopt.backends.tvm.templates import DECODE, FLASH
from graphopt.ir.text import parse_graph
from graphopt.target import Target, detect

CASES = {
    "one tile": attention(16, 16, 16),
    "odd": attention(67, 131, 40, 24),
    "few": attention(3, 5, 7, 1),
    "one key": attention(20, 1, 8),
    "several groups": attention(300, 70, 64, heads=1),
    "causal": attention(130, 130, attrs=", causal = true"),
    "causal, more keys": attention(50, 170, attrs=", causal = true, offset = 120"),
    "causal, more queries": attention(170, 50, attrs=", causal = true"),
    "causal, blind rows": attention(90, 60, attrs=", causal = true, offset = -30"),
    "causal, blind rows are nan": attention(90, 60, attrs=', causal = true, offset = -30, empty = "nan"'),
    "window": attention(200, 200, attrs=", causal = true, window = 30"),
    "window to both sides": attention(150, 220, attrs=", window = 25, offset = 40"),
    "narrow window": attention(70, 70, attrs=", causal = true, window = 1"),
    "soft cap": attention(40, 50, attrs=", softcap = 2.0, causal = true"),
    "shared heads": attention(50, 70, heads=6, shared=2),
    "one head of keys": attention(50, 70, heads=3, shared=1, attrs=", causal = true"),
    "bias": attention(50, 70, extra=", %b: f32[1, 2, 50, 70]", names=", %b"),
    "bias of keys": attention(50, 70, extra=", %b: f32[70]", names=", %b"),
    "bias of all heads": attention(50, 130, extra=", %b: f32[50, 130]", names=", %b", attrs=", causal = true, offset = 80"),
    "mask": attention(50, 70, extra=", %b: b1[1, 1, 50, 70]", names=", %b"),
    "mask, nan": attention(50, 70, extra=", %b: b1[1, 1, 50, 70]", names=", %b", attrs=', empty = "nan"'),
    "mask, mean": attention(50, 70, extra=", %b: b1[1, 1, 50, 70]", names=", %b", attrs=', empty = "mean", causal = true'),
    "mask of keys": attention(50, 70, extra=", %b: b1[1, 1, 1, 70]", names=", %b"),
    "bias and mask": attention(50, 70, extra=", %a: f32[2, 50, 70], %b: b1[70]", names=", %a, %b", attrs=", softcap = 3.0"),
    "slopes": attention(50, 70, extra=", %a: f32[2]", names=", %a", attrs=", alibi = true, causal = true, offset = 20"),
    "sinks": attention(50, 70, extra=", %b: b1[50, 70], %a: f32[2]", names=", %b, %a", attrs=", sinks = true"),
    "bf16": attention(50, 70, dtype="bf16", attrs=", causal = true, offset = 20"),
    "f16": attention(40, 70, dtype="f16", extra=", %b: f16[40, 70]", names=", %b"),
    "symbolic": attention("M", "N", 24, attrs=", causal = true, offset = 3", where=" where 1 <= M, 1 <= N"),
    "symbolic window": attention("M", "N", 24, attrs=", window = 9", extra=", %b: b1[M, N]", names=", %b", where=" where 1 <= M, 1 <= N"),
    # queries, keys and values within one product's result [B, S, 3 * H * D], heads written side by side
    "in one": parse_graph("""graph @g(%x: f32[2, 70, 192]) -> f32[2, 70, 64] {
      %a: f32[2, 70, 64] = slice(%x) {axis = 2, stop = 64}
      %b: f32[2, 70, 64] = slice(%x) {axis = 2, start = 64, stop = 128}
      %c: f32[2, 70, 64] = slice(%x) {axis = 2, start = 128, stop = 192}
      %d: f32[2, 70, 4, 16] = reshape(%a) {shape = [2, 70, 4, 16]}
      %e: f32[2, 70, 4, 16] = reshape(%b) {shape = [2, 70, 4, 16]}
      %f: f32[2, 70, 4, 16] = reshape(%c) {shape = [2, 70, 4, 16]}
      %q: f32[2, 4, 70, 16] = transpose(%d) {perm = [0, 2, 1, 3]}
      %k: f32[2, 4, 70, 16] = transpose(%e) {perm = [0, 2, 1, 3]}
      %v: f32[2, 4, 70, 16] = transpose(%f) {perm = [0, 2, 1, 3]}
      %0: f32[2, 4, 70, 16] = attention(%q, %k, %v) {scale = 0.3}
      %1: f32[2, 70, 4, 16] = transpose(%0) {perm = [0, 2, 1, 3]}
      %2: f32[2, 70, 64] = reshape(%1) {shape = [2, 70, 64]}
      return %2
    }"""),
    "strides": parse_graph("""graph @g(%q: f32[3, 20, 8; 400, 1, 40], %k: f32[3, 33, 8; 300, 1, 33],
        %v: f32[33, 8; 1, 40]) -> f32[3, 20, 8] {
      %0: f32[3, 20, 8] = attention(%q, %k, %v) {scale = 0.3}
      return %0
    }"""),
}  # fmt: skip
SIZES = ((1, 1), (5, 9), (70, 20), (64, 96), (33, 150))


def test_against_f64(compile_all) -> None:
    for graph, run in zip(CASES.values(), compile_all([(g, "attention") for g in CASES.values()]), strict=True):
        for sizes in [dict(zip("MN", s, strict=True)) for s in SIZES] if graph.symbols else [{}]:
            check(graph, run, inputs(graph, **sizes), sizes or None, factor=4.0)


def test_numbers_that_are_none(compile_all) -> None:
    """An infinite score gives nan as in eager, nan reaches its own row only, -inf everywhere gives zeros."""
    graphs = [CASES["odd"], CASES["bias"]]
    plain, biased = compile_all([(g, "attention") for g in graphs])
    q, k, v = inputs(graphs[0])
    q[0, 0, 3, 2], q[0, 1, 66, 0] = float("nan"), float("inf")
    check(graphs[0], plain, [q, k, v], factor=4.0)
    k = k.clone()
    k[0, 1, 100, 5] = float("nan")
    check(graphs[0], plain, [q, k, v], factor=4.0)
    q, k, v, b = inputs(graphs[1])
    b[0, 0, 4], b[0, 1, :, :60], b[0, 1, 7, 65] = float("-inf"), float("-inf"), float("inf")
    check(graphs[1], biased, [q, k, v, b], factor=4.0)


def test_large_scores_and_long_rows(compile_all) -> None:
    """The maximum grows from block to block; sums over many keys keep their digits."""
    graph = attention(40, 3000, 16)
    (run,) = compile_all([(graph, "attention")])
    q, k, v = inputs(graph)
    check(graph, run, [q, k, v], factor=4.0)
    k *= torch.linspace(0.1, 40, 3000)[:, None]
    check(graph, run, [q, k, v], factor=4.0)
    check(graph, run, [q, k.flip(-2), v], factor=4.0)


@pytest.mark.parametrize("name", ["odd", "window", "bias", "bf16"])
def test_schedules(builder: KernelBuilder, kernels_dir: Any, name: str) -> None:
    """Other register tiles, blocks and tasks compute the same."""
    graph, target = CASES[name], detect()
    w = Workload.of(graph, "attention")
    space = FLASH.space(w, target)
    default = dict(space.default().knobs)
    changes: list[dict[str, Any]] = [
        {"vectors": 1, "rows": 12, "block": 96}, {"vectors": 2, "rows": 4, "block": 32}, {"vectors": 3, "block": 32, "rows": 8},
        {"groups": 4, "block": 32, "rows": 4}, {"stage": not default["stage"], "unroll": 1}, {"parallel": False, "unroll": 8},
    ]  # fmt: skip
    schedules = [Schedule.make("flash", **{**default, **c}) for c in changes]
    schedules = [s for s in schedules if space.rejection(s) is None]
    assert len(schedules) >= 3
    for path, s in zip(builder.build_many([(w, s) for s in schedules], target, kernels_dir), schedules, strict=True):
        kernel = load_kernel(path, w, s)  # type: ignore[arg-type]
        given = inputs(graph)

        def run(xs: Any, _: Any, kernel: Any = kernel) -> list[torch.Tensor]:
            out = torch.full([int(n) for n in graph.outputs[0].shape], 77.0, dtype=graph.outputs[0].dtype.torch)
            kernel(*xs, out)
            return [out]

        check(graph, run, given, factor=4.0)


FEW = {
    "one": attention(1, 300, 64),
    "odd": attention(3, 67, 24, 40, attrs=", causal = true, offset = 64"),
    "split": attention(1, 700, 16, heads=1),
    "shared heads": attention(2, 130, 32, heads=8, shared=2, attrs=", causal = true, offset = 128"),
    "one head of keys": attention(1, 1030, 16, heads=3, shared=1),
    "window": attention(2, 500, 16, heads=1, attrs=", causal = true, offset = 400, window = 90"),
    "window to both sides": attention(2, 300, 16, attrs=", window = 20, offset = 100"),
    "bias, mask, cap": attention(2, 300, 16, extra=", %a: f32[2, 1, 300], %b: b1[2, 300]", names=", %a, %b", attrs=", softcap = 3.0"),
    "mask, nan": attention(2, 70, 16, extra=", %b: b1[2, 70]", names=", %b", attrs=', empty = "nan"'),
    "mask, mean": attention(2, 70, 16, heads=1, extra=", %b: b1[2, 70]", names=", %b", attrs=', empty = "mean"'),
    "blind": attention(3, 70, 16, attrs=", causal = true, offset = -2"),
    "slopes and sinks": attention(2, 600, 16, heads=1, extra=", %a: f32[1], %b: f32[1]", names=", %a, %b",
                                  attrs=", alibi = true, sinks = true"),
    "bf16": attention(1, 150, 64, dtype="bf16", heads=4, shared=1),
    "keys by position": parse_graph("""graph @g(%q: f32[2, 4, 1, 32], %k: f32[2, 131, 2, 32], %v: f32[2, 131, 2, 32]) -> f32[2, 4, 1, 32] {
      %a: f32[2, 2, 131, 32] = transpose(%k) {perm = [0, 2, 1, 3]}
      %b: f32[2, 2, 131, 32] = transpose(%v) {perm = [0, 2, 1, 3]}
      %0: f32[2, 4, 1, 32] = attention(%q, %a, %b) {scale = 0.3}
      return %0
    }"""),
    "joined": parse_graph("""graph @g(%q: f32[2, 4, 2, 32], %k: f32[2, 2, 140, 32], %n: f32[2, 2, 3, 32], %v: f32[2, 2, 70, 32],
        %w: f32[2, 71, 2, 32], %o: f32[2, 2, 2, 32]) -> f32[2, 4, 2, 32] {
      %a: f32[2, 2, 143, 32] = concat(%k, %n) {axis = 2}
      %t: f32[2, 2, 71, 32] = transpose(%w) {perm = [0, 2, 1, 3]}
      %b: f32[2, 2, 143, 32] = concat(%v, %t, %o) {axis = 2}
      %0: f32[2, 4, 2, 32] = attention(%q, %a, %b) {scale = 0.3, causal = true, offset = 141}
      return %0
    }"""),
    "joined by symbol": parse_graph("""graph @g(%q: f32[3, 1, 32], %k: f32[3, N, 32], %n: f32[3, 1, 32],
        %v: f32[3, N, 32]) -> f32[3, 1, 32] where 1 <= N {
      %a: f32[3, N + 1, 32] = concat(%k, %n) {axis = 1}
      %b: f32[3, N + 1, 32] = concat(%n, %v) {axis = 1}
      %0: f32[3, 1, 32] = attention(%q, %a, %b) {scale = 0.3}
      return %0
    }"""),
    "cached integers": parse_graph("""graph @g(%q: f32[1, 8, 1, 64], %k: i8[1, 2, 131, 64], %a: f32[1, 2, 131, 1], %v: i8[1, 131, 2, 64],
        %b: f32[1, 131, 2, 1]) -> f32[1, 8, 1, 64] {
      %0: f32[1, 2, 131, 64] = dequantize(%k, %a)
      %1: f32[1, 131, 2, 64] = dequantize(%v, %b)
      %2: f32[1, 2, 131, 64] = transpose(%1) {perm = [0, 2, 1, 3]}
      %3: f32[1, 8, 1, 64] = attention(%q, %0, %2) {scale = 0.03, causal = true, offset = 128}
      return %3
    }"""),
    "cached integers with zero points": parse_graph("""graph @g(%q: f32[3, 1, 32], %k: u8[3, N, 32], %a: f32[3, N, 1], %z: u8[3, N, 1],
        %v: i8[3, N, 32], %b: f32[32]) -> f32[3, 1, 32] where 1 <= N {
      %0: f32[3, N, 32] = dequantize(%k, %a, %z)
      %1: f32[3, N, 32] = dequantize(%v, %b)
      %2: f32[3, 1, 32] = attention(%q, %0, %1) {scale = 0.003}
      return %2
    }"""),
    "cached in 4 bits": parse_graph("""graph @g(%q: f32[1, 8, 1, 64], %k: u8[1, 2, 131, 32], %a: f32[1, 2, 131, 1], %v: i8[1, 131, 2, 16],
        %b: f32[1, 131, 2, 1]) -> f32[1, 8, 1, 32] {
      %z: u8[] = constant() {value = 8, dtype = u8}
      %i: u8[1, 2, 131, 64] = unpack_bits(%k) {bits = 4, axis = 3, dtype = u8}
      %j: i8[1, 131, 2, 32] = unpack_bits(%v) {bits = 4, axis = 3}
      %0: f32[1, 2, 131, 64] = dequantize(%i, %a, %z)
      %1: f32[1, 131, 2, 32] = dequantize(%j, %b)
      %2: f32[1, 2, 131, 32] = transpose(%1) {perm = [0, 2, 1, 3]}
      %3: f32[1, 8, 1, 32] = attention(%q, %0, %2) {scale = 0.03, causal = true, offset = 128}
      return %3
    }"""),
    "cached in halves of bytes": parse_graph("""graph @g(%q: f32[3, 1, 64], %k: u8[3, N, 32], %a: f32[3, N, 1])
        -> f32[3, 1, 64] where 1 <= N {
      %z: u8[] = constant() {value = 5, dtype = u8}
      %i: u8[3, N, 64] = unpack_bits(%k) {bits = 4, axis = 2, dtype = u8}
      %r: u8[3, N, 32, 2] = reshape(%i) {shape = [3, N, 32, 2]}
      %t: u8[3, N, 2, 32] = transpose(%r) {perm = [0, 1, 3, 2]}
      %h: u8[3, N, 64] = reshape(%t) {shape = [3, N, 64]}
      %0: f32[3, N, 64] = dequantize(%h, %a, %z)
      %2: f32[3, 1, 64] = attention(%q, %0, %0) {scale = 0.003}
      return %2
    }"""),
    "cached in 4 bits, of odd size": parse_graph("""graph @g(%q: f32[2, 3, 48], %k: u8[2, 70, 24], %a: f32[2, 70, 1]) -> f32[2, 3, 48] {
      %i: i8[2, 70, 48] = unpack_bits(%k) {bits = 4, axis = 2}
      %0: f32[2, 70, 48] = dequantize(%i, %a)
      %2: f32[2, 3, 48] = attention(%q, %0, %0) {scale = 0.03}
      return %2
    }"""),
    "pages in 4 bits": parse_graph("""graph @g(%q: f32[2, 4, 1, 32], %k: u8[9, 16, 2, 16], %a: f32[2, 2, 96, 1], %t: i64[2, 6])
        -> f32[2, 4, 1, 32] {
      %b: u8[2, 6, 16, 2, 16] = take(%k, %t) {axis = 0}
      %c: u8[2, 96, 2, 16] = reshape(%b) {shape = [2, 96, 2, 16]}
      %e: u8[2, 2, 96, 16] = transpose(%c) {perm = [0, 2, 1, 3]}
      %i: i8[2, 2, 96, 32] = unpack_bits(%e) {bits = 4, axis = 3}
      %d: f32[2, 2, 96, 32] = dequantize(%i, %a)
      %0: f32[2, 4, 1, 32] = attention(%q, %d, %d) {scale = 0.3, causal = true, offset = 90}
      return %0
    }"""),
    "pages": parse_graph("""graph @g(%q: f32[2, 4, 1, 32], %k: f32[9, 16, 2, 32], %v: f32[9, 16, 2, 32], %t: i64[2, 6])
        -> f32[2, 4, 1, 32] {
      %a: f32[2, 6, 16, 2, 32] = take(%k, %t) {axis = 0}
      %b: f32[2, 6, 16, 2, 32] = take(%v, %t) {axis = 0}
      %c: f32[2, 96, 2, 32] = reshape(%a) {shape = [2, 96, 2, 32]}
      %d: f32[2, 96, 2, 32] = reshape(%b) {shape = [2, 96, 2, 32]}
      %e: f32[2, 2, 96, 32] = transpose(%c) {perm = [0, 2, 1, 3]}
      %f: f32[2, 2, 96, 32] = transpose(%d) {perm = [0, 2, 1, 3]}
      %0: f32[2, 4, 1, 32] = attention(%q, %e, %f) {scale = 0.3, causal = true, offset = 90}
      return %0
    }"""),
    "symbolic": attention(1, "N", 32, heads=1, attrs=", causal = true, offset = N - 1", where=" where 1 <= N"),
    "repeated by views": parse_graph("""graph @g(%q: f32[1, 6, 1, 16], %x: f32[1, 2, 90, 16]) -> f32[1, 1, 96] {
      %a: f32[1, 2, 1, 90, 16] = reshape(%x) {shape = [1, 2, 1, 90, 16]}
      %b: f32[1, 2, 3, 90, 16] = broadcast_to(%a) {shape = [1, 2, 3, 90, 16]}
      %k: f32[1, 6, 90, 16] = reshape(%b) {shape = [1, 6, 90, 16]}
      %0: f32[1, 6, 1, 16] = attention(%q, %k, %k) {scale = 0.3}
      %1: f32[1, 1, 6, 16] = transpose(%0) {perm = [0, 2, 1, 3]}
      %2: f32[1, 1, 96] = reshape(%1) {shape = [1, 1, 96]}
      return %2
    }"""),
}  # fmt: skip


def test_few_queries(compile_all) -> None:
    for graph in FEW.values():
        assert DECODE.takes(Workload.of(graph, "attention"), detect()) is None
    form = form_of(FEW["repeated by views"])
    assert isinstance(form, Form) and form.share == 3
    for graph, run in zip(FEW.values(), compile_all([(g, "attention") for g in FEW.values()]), strict=True):
        for n in (1, 30, 700) if graph.symbols else (0,):
            sizes = {"N": n} if n else {}
            check(graph, run, inputs(graph, **sizes), sizes or None, factor=4.0)


def test_packed_caches_without_a_table(compile_all) -> None:
    """Where no register holds a table, integers are masked and converted."""
    target = Target.from_name("cpu:x86-64-v3:2")
    if why := detect().lacks(target):
        pytest.skip(why)
    names = ("cached in 4 bits", "cached in halves of bytes")
    for name, run in zip(names, compile_all([(FEW[n], "attention") for n in names], target=target), strict=True):
        sizes = {"N": 30} if FEW[name].symbols else {}
        check(FEW[name], run, inputs(FEW[name], **sizes), sizes or None, factor=4.0)


@pytest.mark.parametrize("name", ["odd", "shared heads", "split", "pages", "joined"])
def test_schedules_of_few_queries(builder: KernelBuilder, kernels_dir: Any, name: str) -> None:
    """Other numbers of keys at a time, blocks and parts, asking for rows ahead or not, compute the same."""
    graph, target = FEW[name], detect()
    w = Workload.of(graph, "attention")
    space = DECODE.space(w, target)
    default = dict(space.default().knobs)
    changes: list[dict[str, Any]] = [
        {"keys": 1, "ahead": 0}, {"keys": 2, "block": 32}, {"keys": 4, "sums": 4, "splits": 2}, {"keys": 8, "ahead": 1024},
        {"block": 256, "splits": 8, "parallel": False},
    ]  # fmt: skip
    assert default.get("abreast", False) == (name == "pages")  # where positions stand before heads
    if name == "pages":
        changes = [*changes[2:4], {"abreast": False}, {"splits": 1}]
    schedules = [Schedule.make("decode", **{**default, **c}) for c in changes]
    assert all(space.rejection(s) is None for s in schedules)
    for path, s in zip(builder.build_many([(w, s) for s in schedules], target, kernels_dir), schedules, strict=True):
        kernel, given = load_kernel(path, w, s), inputs(graph)  # type: ignore[arg-type]

        def run(xs: Any, _: Any, kernel: Any = kernel) -> list[torch.Tensor]:
            out = torch.full([int(n) for n in graph.outputs[0].shape], 77.0)
            kernel(*xs, out)
            return [out]

        check(graph, run, given, factor=4.0)


def test_few_queries_and_numbers_that_are_none(compile_all) -> None:
    graph = FEW["split"]
    (run,) = compile_all([(graph, "attention")])
    for place, number in ((3, float("nan")), (650, float("inf")), (2, float("-inf"))):
        q, k, v = inputs(graph)
        k[0, 0, place] = number
        check(graph, run, [q.abs(), k, v], factor=4.0)


REFUSED = {
    "heads of unknown size": "(%q: f32[2, 5, D], %k: f32[2, 7, D], %v: f32[2, 7, 8]) -> f32[2, 5, 8] where 1 <= D {\n"
    " %0: f32[2, 5, 8] = attention(%q, %k, %v) {scale = 0.3}\n return %0\n}",
    "an attention of f64": "(%q: f64[2, 5, 8], %k: f64[2, 7, 8]) -> f64[2, 5, 8] {\n"
    " %0: f64[2, 5, 8] = attention(%q, %k, %k) {scale = 0.3}\n return %0\n}",
    "without elements": "(%q: f32[2, 5, 8], %k: f32[2, 0, 8]) -> f32[2, 5, 8] {\n"
    " %0: f32[2, 5, 8] = attention(%q, %k, %k) {scale = 0.3}\n return %0\n}",
    "neg after the attention": "(%q: f32[2, 5, 8], %k: f32[2, 7, 8]) -> f32[2, 5, 8] {\n"
    " %0: f32[2, 5, 8] = attention(%q, %k, %k) {scale = 0.3}\n %1: f32[2, 5, 8] = neg(%0)\n return %1\n}",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_take(reason: str) -> None:
    found = FLASH.takes(Workload.of(parse_graph("graph @g" + REFUSED[reason]), "attention"), detect())
    assert found is not None and reason in found

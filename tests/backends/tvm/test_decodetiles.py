"""Few queries over caches of small integers on AMX tiles: as exact as sums of f32, whatever the sizes of numbers are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_graphs import inputs
from tvm_check import check

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.build import KernelBuilder, load_kernel
from graphopt.backends.tvm.templates import DECODE_TILES
from graphopt.ir.graph import Graph
from graphopt.ir.text import parse_graph
from graphopt.target import Target, detect

on_tiles = pytest.mark.skipif(detect().int8_products != "amx", reason="needs AMX tiles")
WITH_TILES = Target("cpu", "x86_64", features=("amx_int8", "amx_tile", "avx512f"), cores=2)


def cached(heads: int, shared: int, keys: int | str, size: int = 64, queries: int = 1, batch: int = 1, attrs: str = "", extra: str = "",
           names: str = "", dtype: str = "i8", where: str = "") -> Graph:  # fmt: skip
    """Attention over keys and values of 8-bit integers, a scale a token."""
    q, held, scale = (f"{d}[{batch}, {h}, {n}, {s}]" for d, h, n, s in (
        ("f32", heads, queries, size), (dtype, shared, keys, size), ("f32", shared, keys, 1)))  # fmt: skip
    floats = held.replace(dtype, "f32", 1)
    return parse_graph(f"""graph @g(%q: {q}, %k: {held}, %a: {scale}, %v: {held}, %b: {scale}{extra}) -> {q}{where} {{
      %z: {dtype}[] = constant() {{value = {0 if dtype == "i8" else 128}, dtype = {dtype}}}
      %0: {floats} = dequantize(%k, %a, %z)
      %1: {floats} = dequantize(%v, %b, %z)
      %2: {q} = attention(%q, %0, %1{names}) {{scale = 0.003{attrs}}}
      return %2
    }}""")


CASES = {
    "two heads of keys": cached(8, 2, 131),
    "blocks that fill no step": cached(4, 1, 300, attrs=", causal = true, offset = 290"),
    "8 queries": cached(8, 1, 200),
    "3 heads, 2 tokens": cached(6, 2, 70, queries=2, attrs=", causal = true, offset = 68"),
    "heads of 128": cached(4, 1, 190, size=128),
    "8 queries of 128": cached(4, 1, 129, size=128, queries=2),
    "a zero point": cached(4, 2, 100, dtype="u8", batch=2),
    "fewer keys than a tile": cached(4, 2, 5),
    "mask, cap, window": cached(4, 2, 300, queries=2, extra=", %m: b1[2, 300]", names=", %m",
                                attrs=", softcap = 2.0, causal = true, offset = 298, window = 190"),
    "mask, mean": cached(4, 2, 70, queries=2, extra=", %m: b1[2, 70]", names=", %m", attrs=', empty = "mean"'),
    "slopes and sinks": cached(2, 1, 200, extra=", %s: f32[2], %t: f32[2]", names=", %s, %t", attrs=", alibi = true, sinks = true"),
    "split by keys": cached(4, 1, 4000),
    "any number of keys": cached(4, 2, "N", where=" where 1 <= N", attrs=", causal = true, offset = N - 1"),
    # values by position
    "positions first": parse_graph("""graph @g(%q: f32[1, 8, 1, 64], %k: i8[1, 131, 2, 64], %a: f32[1, 131, 2, 1], %v: i8[1, 131, 2, 64],
        %b: f32[1, 131, 2, 1]) -> f32[1, 8, 1, 64] {
      %0: f32[1, 131, 2, 64] = dequantize(%k, %a)
      %1: f32[1, 131, 2, 64] = dequantize(%v, %b)
      %2: f32[1, 2, 131, 64] = transpose(%0) {perm = [0, 2, 1, 3]}
      %3: f32[1, 2, 131, 64] = transpose(%1) {perm = [0, 2, 1, 3]}
      %4: f32[1, 8, 1, 64] = attention(%q, %2, %3) {scale = 0.003}
      return %4
    }"""),
    "4 bits, two a byte": parse_graph("""graph @g(%q: f32[1, 8, 1, 128], %k: u8[1, 2, 131, 64], %a: f32[1, 2, 131, 1],
        %v: u8[1, 131, 2, 32], %b: f32[1, 131, 2, 1]) -> f32[1, 8, 1, 64] {
      %z: u8[] = constant() {value = 8, dtype = u8}
      %i: u8[1, 2, 131, 128] = unpack_bits(%k) {bits = 4, axis = 3, dtype = u8}
      %j: i8[1, 131, 2, 64] = unpack_bits(%v) {bits = 4, axis = 3}
      %0: f32[1, 2, 131, 128] = dequantize(%i, %a, %z)
      %1: f32[1, 131, 2, 64] = dequantize(%j, %b)
      %2: f32[1, 2, 131, 64] = transpose(%1) {perm = [0, 2, 1, 3]}
      %3: f32[1, 8, 1, 64] = attention(%q, %0, %2) {scale = 0.03}
      return %3
    }"""),
    "4 bits, halves of a row": parse_graph("""graph @g(%q: f32[3, 2, 64], %k: u8[3, N, 32], %a: f32[3, N, 1])
        -> f32[3, 2, 64] where 1 <= N {
      %z: u8[] = constant() {value = 5, dtype = u8}
      %i: u8[3, N, 64] = unpack_bits(%k) {bits = 4, axis = 2, dtype = u8}
      %r: u8[3, N, 32, 2] = reshape(%i) {shape = [3, N, 32, 2]}
      %t: u8[3, N, 2, 32] = transpose(%r) {perm = [0, 1, 3, 2]}
      %h: u8[3, N, 64] = reshape(%t) {shape = [3, N, 64]}
      %0: f32[3, N, 64] = dequantize(%h, %a, %z)
      %2: f32[3, 2, 64] = attention(%q, %0, %0) {scale = 0.003}
      return %2
    }"""),
    "columns that are no neighbours": parse_graph("""graph @g(%q: f32[2, 2, 64], %k: i8[2, 90, 64; 5760, 1, 90], %a: f32[2, 90, 1])
        -> f32[2, 2, 64] {
      %0: f32[2, 90, 64] = dequantize(%k, %a)
      %2: f32[2, 2, 64] = attention(%q, %0, %0) {scale = 0.003}
      return %2
    }"""),
    "pages": parse_graph("""graph @g(%q: f32[2, 4, 1, 64], %k: i8[9, 16, 2, 64], %a: f32[2, 2, 96, 1], %t: i64[2, 6]) -> f32[2, 4, 1, 64] {
      %b: i8[2, 6, 16, 2, 64] = take(%k, %t) {axis = 0}
      %c: i8[2, 96, 2, 64] = reshape(%b) {shape = [2, 96, 2, 64]}
      %e: i8[2, 2, 96, 64] = transpose(%c) {perm = [0, 2, 1, 3]}
      %d: f32[2, 2, 96, 64] = dequantize(%e, %a)
      %0: f32[2, 4, 1, 64] = attention(%q, %d, %d) {scale = 0.003, causal = true, offset = 90}
      return %0
    }"""),
}  # fmt: skip


@on_tiles
def test_against_f64(compile_all) -> None:
    for name, graph in CASES.items():
        assert DECODE_TILES.takes(Workload.of(graph, "attention"), detect()) is None, name
    for graph, run in zip(CASES.values(), compile_all([(g, "attention") for g in CASES.values()]), strict=True):
        for n in (1, 30, 64, 700) if graph.symbols else (0,):
            sizes = {"N": n} if n else {}
            check(graph, run, inputs(graph, **sizes), sizes or None, factor=2.0)


@on_tiles
@pytest.mark.parametrize("scale", [1e-24, 1e-6, 1.0, 1e6])
def test_numbers_of_any_size(compile_all, scale: float) -> None:
    """Outliers among queries, scales that differ from token to token by powers of ten, weights from one to nothing."""
    graph = cached(8, 2, 300)
    (run,) = compile_all([(graph, "attention")])
    q, k, a, v, b = inputs(graph)
    q[..., 7] *= 300.0
    a, b = a.abs(), b.abs() * torch.logspace(-4, 0, 300)[:, None] * scale
    check(graph, run, [q / scale, k, a * scale, v, b], factor=2.0)
    check(graph, run, [q * 3.0, k, a, v, b.flip(-2)], factor=2.0)
    check(graph, run, [q * 0.0, k, a, v, b], factor=2.0)
    k[..., 7] = 0  # the outliers meet zeros: what they take of the other elements is all that there is
    check(graph, run, [q / scale, k, (a + 0.1) * scale, v, b], factor=2.0)


HIDDEN = {
    "a mask": cached(4, 2, 300, extra=", %m: b1[1, 300]", names=", %m"),
    "a mask to add": cached(4, 2, 300, extra=", %m: f32[1, 300]", names=", %m"),
    "nothing but low scores": cached(4, 2, 300),
}


@on_tiles
def test_hidden_tokens_take_no_digits(compile_all) -> None:
    """Slots of a cache that are not filled yet hold any scales; so may tokens whose weight is nothing."""
    for graph, run in zip(HIDDEN.values(), compile_all([(g, "attention") for g in HIDDEN.values()]), strict=True):
        for large in (1e3, 1e9, 1e30):
            q, k, a, v, b, *masks = inputs(graph)
            a, b = a.abs() + 0.1, b.abs() * 0.01 + 0.01
            b[:, :, 100:] *= large
            for mask in masks:
                hidden = torch.arange(300) >= 100
                mask.copy_(~hidden if mask.dtype == torch.bool else hidden * torch.finfo(torch.float32).min)
            if masks:
                a[:, :, 100:] *= large
            else:
                q, k[:, :, :100], k[:, :, 100:], a[:, :, 100:] = q.abs(), k[:, :, :100].abs(), -127, 50.0
            check(graph, run, [q, k, a, v, b, *masks], factor=2.0)


@on_tiles
def test_numbers_that_are_none(compile_all) -> None:
    """A row with a query that is none is nan, whether or not a float would have come of it; so are all that see such a scale of values."""
    graph = cached(8, 2, 200)
    (run,) = compile_all([(graph, "attention")])
    for number in ("nan", "inf", "-inf"):
        given = inputs(graph)
        want = run(given, None)[0]
        given[0][0, 5, 0, 3] = float(number)
        got = run(given, None)[0]
        assert bool(got[0, 5].isnan().all()) and torch.equal(got[0, :5], want[0, :5]) and torch.equal(got[0, 6:], want[0, 6:])
        for scale in (2, 4) if number == "nan" else (4,):
            given = inputs(graph)
            given[scale][0, 1, 150] = float(number)
            got = run(given, None)[0]
            assert bool(got[0, 4:].isnan().all()) and torch.equal(got[0, :4], want[0, :4])


@on_tiles
def test_schedules(builder: KernelBuilder, kernels_dir: Any) -> None:
    """Other blocks, parts and distances compute the same."""
    graph, target = cached(8, 2, 700), detect()
    w = Workload.of(graph, "attention")
    space = DECODE_TILES.space(w, target)
    default = dict(space.default().knobs)
    changes: list[dict[str, Any]] = [{"block": 128, "splits": 8}, {"block": 256, "ahead": False}, {"parallel": False, "splits": 2}]
    schedules = [Schedule.make("decode-tiles", **{**default, **c}) for c in changes]
    assert all(space.rejection(s) is None for s in schedules)
    for path, s in zip(builder.build_many([(w, s) for s in schedules], target, kernels_dir), schedules, strict=True):
        kernel = load_kernel(path, w, s)  # type: ignore[arg-type]

        def run(xs: Any, _: Any, kernel: Any = kernel) -> list[torch.Tensor]:
            out = torch.full([int(n) for n in graph.outputs[0].shape], 77.0)
            kernel(*xs, out)
            return [out]

        check(graph, run, inputs(graph), factor=2.0)


REFUSED = {
    "one query for each head of keys": cached(2, 2, 100),
    "heads that are no multiples of 64": cached(4, 2, 100, size=96),
    "more than a few queries": cached(4, 2, 100, queries=9),
    "not small integers": parse_graph("""graph @g(%q: f32[2, 2, 64], %k: f32[2, 90, 64]) -> f32[2, 2, 64] {
      %0: f32[2, 2, 64] = attention(%q, %k, %k) {scale = 0.003}
      return %0
    }"""),
    "a scale that is not one number a row": parse_graph("""graph @g(%q: f32[2, 2, 64], %k: i8[2, 90, 64], %a: f32[64]) -> f32[2, 2, 64] {
      %0: f32[2, 90, 64] = dequantize(%k, %a)
      %1: f32[2, 2, 64] = attention(%q, %0, %0) {scale = 0.003}
      return %1
    }"""),
    "a zero point that is not a constant": parse_graph("""graph @g(%q: f32[2, 2, 64], %k: i8[2, 90, 64], %a: f32[2, 90, 1],
        %z: i8[2, 90, 1]) -> f32[2, 2, 64] {
      %0: f32[2, 90, 64] = dequantize(%k, %a, %z)
      %1: f32[2, 2, 64] = attention(%q, %0, %0) {scale = 0.003}
      return %1
    }"""),
    "integers that leave 8 bits": parse_graph("""graph @g(%q: f32[2, 2, 64], %k: u8[2, 90, 64], %a: f32[2, 90, 1]) -> f32[2, 2, 64] {
      %0: f32[2, 90, 64] = dequantize(%k, %a)
      %1: f32[2, 2, 64] = attention(%q, %0, %0) {scale = 0.003}
      return %1
    }"""),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_take(reason: str) -> None:
    found = DECODE_TILES.takes(Workload.of(REFUSED[reason], "attention"), WITH_TILES)
    assert found is not None and reason in found


def test_no_tiles_no_kernel() -> None:
    w = Workload.of(CASES["two heads of keys"], "attention")
    assert DECODE_TILES.takes(w, WITH_TILES) is None
    assert "no AMX tiles" in str(DECODE_TILES.takes(w, Target.from_name("cpu:znver4:2")))

"""Attention on AMX tiles: error against f64 with eager's own as the yardstick; what is not finite is left to the vector units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_graphs import attention, inputs
from tvm_check import check

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.build import KernelBuilder, load_kernel
from graphopt.backends.tvm.templates import FLASH_TILES
from graphopt.ir.text import parse_graph
from graphopt.target import Target, detect

on_tiles = pytest.mark.skipif(not detect().f32_thirds, reason="needs AMX tiles")

CASES = {
    "odd": attention(67, 131, 32, 64),
    "causal, blind rows are nan": attention(90, 60, 32, attrs=', causal = true, offset = -30, empty = "nan"'),
    "window": attention(400, 400, 32, attrs=", causal = true, window = 30", heads=1),
    "soft cap, shared heads": attention(60, 70, 32, heads=4, shared=2, attrs=", softcap = 2.0, causal = true"),
    "bias, mask, sinks": attention(50, 70, 32, extra=", %a: f32[2, 50, 70], %b: b1[50, 70], %s: f32[2]", names=", %a, %b, %s",
                                   attrs=", sinks = true"),
    "mask, mean": attention(50, 70, 32, extra=", %b: b1[1, 1, 50, 70]", names=", %b", attrs=', empty = "mean", causal = true'),
    "slopes": attention(50, 170, 32, extra=", %a: f32[2]", names=", %a", attrs=", alibi = true, causal = true, offset = 120"),
    "bf16": attention(90, 170, 64, dtype="bf16", attrs=", causal = true, offset = 80"),
    "symbolic": attention("M", "N", 32, attrs=", causal = true, offset = 3", where=" where 48 <= M, 1 <= N"),
    # keys and values head by head within each position, values of which the columns are no neighbours
    "strides": parse_graph("""graph @g(%q: f32[3, 50, 32], %x: f32[133, 3, 32], %v: f32[3, 133, 32; 4256, 1, 133]) -> f32[3, 50, 32] {
      %k: f32[3, 133, 32] = transpose(%x) {perm = [1, 0, 2]}
      %0: f32[3, 50, 32] = attention(%q, %k, %v) {scale = 0.3}
      return %0
    }"""),
}  # fmt: skip
SIZES = ((48, 1), (70, 20), (64, 96), (90, 150))


@on_tiles
def test_against_f64(compile_all) -> None:
    for graph in CASES.values():
        assert FLASH_TILES.takes(Workload.of(graph, "attention"), detect()) is None
    for graph, run in zip(CASES.values(), compile_all([(g, "attention") for g in CASES.values()]), strict=True):
        for sizes in [dict(zip("MN", s, strict=True)) for s in SIZES] if graph.symbols else [{}]:
            check(graph, run, inputs(graph, **sizes), sizes or None, factor=4.0)


@on_tiles
def test_numbers_that_are_not_finite(compile_all) -> None:
    """An infinite key is not seen, or takes all; an infinite value is seen by those with a weight for it; others have what they had."""
    graph = CASES["odd"]
    (run,) = compile_all([(graph, "attention")])
    for which, number in ((0, "nan"), (1, "-inf"), (1, "inf"), (1, "nan"), (2, "inf"), (2, "nan")):
        given = inputs(graph)
        given[0] = given[0].abs()
        given[which][0, 1, 60, 5] = float(number)
        check(graph, run, given, factor=4.0)


@on_tiles
def test_long_rows(compile_all) -> None:
    """The maximum grows from block to block; sums over many keys keep their digits."""
    graph = attention(64, 3000, 32, heads=1)
    (run,) = compile_all([(graph, "attention")])
    q, k, v = inputs(graph)
    check(graph, run, [q * 1e-3, k, v], factor=4.0)
    k *= torch.linspace(0.1, 20, 3000)[:, None]
    check(graph, run, [q, k, v], factor=4.0)
    check(graph, run, [q, k.flip(-2), v], factor=4.0)


@on_tiles
def test_schedules(builder: KernelBuilder, kernels_dir: Any) -> None:
    """Other blocks and tasks compute the same."""
    graph, target = attention(200, 300, 32, attrs=", causal = true, offset = 100"), detect()
    w = Workload.of(graph, "attention")
    default = dict(FLASH_TILES.space(w, target).default().knobs)
    changes: list[dict[str, Any]] = [{"block": 64, "groups": 1}, {"block": 256, "groups": 8}, {"parallel": False, "groups": 2}]
    schedules = [Schedule.make("flash-tiles", **{**default, **c}) for c in changes]
    for path, s in zip(builder.build_many([(w, s) for s in schedules], target, kernels_dir), schedules, strict=True):
        kernel = load_kernel(path, w, s)  # type: ignore[arg-type]

        def run(xs: Any, _: Any, kernel: Any = kernel) -> list[torch.Tensor]:
            out = torch.full([int(n) for n in graph.outputs[0].shape], 77.0)
            kernel(*xs, out)
            return [out]

        check(graph, run, inputs(graph), factor=4.0)


REFUSED = {
    "heads that are no multiples of 32": attention(64, 64, 40),
    "an attention of f16": attention(64, 64, 32, dtype="f16"),
    "it may have fewer than 48 queries": attention("M", 64, 32, where=" where 1 <= M"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_take(reason: str) -> None:
    with_tiles = Target("cpu", "x86_64", features=("avx512f", "avx512_bf16", "amx_tile", "amx_bf16"), cores=2)
    found = FLASH_TILES.takes(Workload.of(REFUSED[reason], "attention"), with_tiles)
    assert found is not None and reason in found

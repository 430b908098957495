"""Heads that share keys and values as rows of one program: every attribute of the op, keys in pieces, any size; the default."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from attention_graphs import attention, inputs
from test_triton_offline import TARGETS
from torch import nn
from torch.nn import functional as F
from triton_check import runner, templates

import graphopt
from graphopt.autotune.space import Schedule
from graphopt.backends.triton.code import Payload
from graphopt.backends.triton.offline import compile_offline
from graphopt.ir.graph import Graph
from graphopt.ir.text import parse_graph
from graphopt.target import Target
from graphopt.testing.kernels import check


def shared(m: int | str, n: int | str, attrs: str = "", extra: str = "", names: str = "", dtype: str = "f32", where: str = "") -> Graph:
    """Six heads of queries, two of keys: three rows of a tile are of one query."""
    return attention(m, n, 24, 40, heads=6, shared=2, attrs=attrs, extra=extra, names=names, dtype=dtype, where=where)


REPEATED = """graph @g(%q: f32[2, 6, 3, 16], %k: f32[2, 33, 2, 16], %v: f32[2, 33, 2, 16]) -> f32[2, 3, 96] {
  %0: f32[2, 2, 33, 16] = transpose(%k) {perm = [0, 2, 1, 3]}
  %1: f32[2, 2, 1, 33, 16] = reshape(%0) {shape = [2, 2, 1, 33, 16]}
  %2: f32[2, 2, 3, 33, 16] = broadcast_to(%1) {shape = [2, 2, 3, 33, 16]}
  %3: f32[2, 6, 33, 16] = reshape(%2) {shape = [2, 6, 33, 16]}
  %4: f32[2, 2, 33, 16] = transpose(%v) {perm = [0, 2, 1, 3]}
  %5: f32[2, 2, 1, 33, 16] = reshape(%4) {shape = [2, 2, 1, 33, 16]}
  %6: f32[2, 2, 3, 33, 16] = broadcast_to(%5) {shape = [2, 2, 3, 33, 16]}
  %7: f32[2, 6, 33, 16] = reshape(%6) {shape = [2, 6, 33, 16]}
  %8: f32[2, 6, 3, 16] = attention(%q, %3, %7) {scale = 0.3, causal = true, offset = 30}
  %9: f32[2, 3, 6, 16] = transpose(%8) {perm = [0, 2, 1, 3]}
  %10: f32[2, 3, 96] = reshape(%9) {shape = [2, 3, 96]}
  return %10
}"""
TRAINING = """graph @g(%q: f32[1, 6, 5, 24], %k: f32[1, 2, 70, 24], %v: f32[1, 2, 70, 24], %s: i64[]) -> (f32[1, 6, 5, 24], f32[1, 6, 5]) {
  %0: f32[1, 6, 5, 24], %1: f32[1, 6, 5] = attention_forward(%q, %k, %v, %s) {scale = 0.3, dropout = 0.4}
  return %0, %1
}"""
CASES = {
    "one query": shared(1, 70),
    "several": shared(7, 131),
    "more than a tile": shared(50, 70),
    "causal": shared(5, 70, ", causal = true, offset = 65"),
    "causal, many": shared(40, 40, ", causal = true"),
    "causal, blind rows": shared(40, 60, ", causal = true, offset = -13"),
    "causal, blind rows are nan": shared(40, 60, ', causal = true, offset = -13, empty = "nan"'),
    "window": shared(5, 200, ", causal = true, window = 30, offset = 150"),
    "window to both sides": shared(23, 220, ", window = 25, offset = 40"),
    "soft cap": shared(4, 50, ", softcap = 2.0, causal = true, offset = 46"),
    "bias": shared(5, 70, extra=", %b: f32[1, 6, 5, 70]", names=", %b"),
    "bias of heads": shared(5, 70, extra=", %b: f32[1, 6, 1, 70]", names=", %b"),
    "bias of all heads": shared(5, 70, extra=", %b: f32[5, 70]", names=", %b"),
    "mask": shared(5, 70, extra=", %b: b1[1, 6, 5, 70]", names=", %b"),
    "mask, nan": shared(5, 70, extra=", %b: b1[1, 1, 5, 70]", names=", %b", attrs=', empty = "nan"'),
    "mask, mean": shared(5, 70, extra=", %b: b1[1, 6, 5, 70]", names=", %b", attrs=', empty = "mean", causal = true, offset = 65'),
    "mask of keys": shared(1, 70, extra=", %b: b1[70]", names=", %b"),
    "bias and mask": shared(5, 70, extra=", %a: f32[6, 5, 70], %b: b1[70]", names=", %a, %b", attrs=", softcap = 3.0"),
    "slopes": shared(5, 70, extra=", %a: f32[6]", names=", %a", attrs=", alibi = true, causal = true, offset = 65"),
    "slopes, one query": shared(1, 70, extra=", %a: f32[6]", names=", %a", attrs=", alibi = true, causal = true, offset = 69"),
    "sinks": shared(5, 70, extra=", %b: b1[5, 70], %a: f32[6]", names=", %b, %a", attrs=", sinks = true"),
    "bf16": shared(5, 70, ", causal = true, offset = 65", dtype="bf16"),
    "f16": shared(3, 70, dtype="f16", extra=", %b: f16[3, 70]", names=", %b"),
    "symbolic": shared("M", "N", ", causal = true, offset = 3", where=" where 1 <= M, 1 <= N"),
    "symbolic window": shared("M", "N", ", window = 9", extra=", %b: b1[M, N]", names=", %b", where=" where 1 <= M, 1 <= N"),
    "one head of keys": attention(3, 70, heads=5, shared=1, attrs=", causal = true, offset = 67"),
    "batches": parse_graph("""graph @g(%q: f32[B, 6, 2, 16], %k: f32[B, 3, 33, 16], %v: f32[B, 3, 33, 8]) -> f32[B, 6, 2, 8]
      where 1 <= B { %0: f32[B, 6, 2, 8] = attention(%q, %k, %v) {scale = 0.3}
      return %0 }"""),
    "repeated by views": parse_graph(REPEATED),
    "training, dropout": parse_graph(TRAINING),
}  # fmt: skip
SIZES = {"B": (1, 3), "M": (1, 5, 33), "N": (1, 70, 150)}
DECODING = {d: attention(1, 8192, d, heads=8, shared=2, dtype="bf16", attrs=", causal = true, offset = 8191") for d in (64, 128)}


def bound(graph: Graph) -> list[dict[str, int]]:
    """Sizes of symbols, each symbol's own in turn."""
    count = max([len(SIZES[name]) for name in graph.symbols], default=1)
    return [{name: SIZES[name][k % len(SIZES[name])] for name in graph.symbols} for k in range(count)]


def schedule(graph: Graph, pieces: int, heads: int) -> Schedule:
    return Schedule.make("attention", "flash", m=16, n=16, heads=heads, warps=2, stages=1, pieces=pieces, reads="pointers")


def kind_of(graph: Graph) -> str:
    return "attention_forward" if len(graph.outputs) > 1 else "attention"


def share_of(graph: Graph, kind: str) -> int:
    t = Target.from_name("cuda:sm_90")
    w, (template, *_) = templates(graph, kind, t)
    return max(next(p for p in template.space(w, t).params if p.name == "heads").choices)  # type: ignore[type-var, return-value]


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_against_f64(name: str, pieces: int) -> None:
    graph, kind = CASES[name], kind_of(CASES[name])
    share = share_of(graph, kind)
    assert share > 1
    run = runner(graph, kind, schedule(graph, pieces, share))
    for sizes in bound(graph):
        check(graph, run, inputs(graph, **sizes), sizes or None, factor=4.0)


def test_numbers_that_are_none() -> None:
    """A nan or an infinite score reaches its own head's row only."""
    graph = CASES["several"]
    q, k, v = inputs(graph)
    q[0, 0, 3, 2], q[0, 4, 6, 0], k[0, 1, 100, 5] = float("nan"), float("inf"), float("nan")
    for pieces in (1, 4):
        check(graph, runner(graph, "attention", schedule(graph, pieces, 3)), [q, k, v], factor=4.0)
    k[0, 1, 100, 5] = 0.0
    (out,) = runner(graph, "attention", schedule(graph, 1, 3))([q, k, v], None)
    assert torch.isnan(out).any(-1).nonzero().tolist() == [[0, 0, 3], [0, 4, 6]]


def default_of(graph: Graph, target: str = "cuda:sm_90", heads: int | None = None) -> tuple[Schedule, tuple[Payload, ...]]:
    t = Target.from_name(target)
    w, (template, *_) = templates(graph, "attention", t)
    space = template.space(w, t)
    s = space.check(space.default())
    if heads is not None:
        s = space.check(Schedule.make("attention", "flash", **{**dict(s.knobs), "heads": heads}))
    return s, template.emit(w, s, t).payload


@pytest.mark.parametrize(("heads", "reads"), [(None, 2), (1, 8)])
def test_keys_are_read_once_for_all_heads_that_share_them(heads: int | None, reads: int) -> None:
    """Programs of a piece, each of which goes through its keys: two heads of keys are read twice, not eight times."""
    s, (kernel, _) = default_of(DECODING[128], heads=heads)
    tiles, groups, pieces = kernel.launch.grid
    assert (tiles, groups, pieces) == (1, reads, s["pieces"])
    assert math.prod((tiles, groups)) * 8192 * (128 + 128) * 2 == reads * (4 << 20)  # bytes of keys and values


@pytest.mark.parametrize(("graph", "heads"), [
    (DECODING[64], 4),
    (attention(8, 8192, 64, heads=8, shared=2, dtype="bf16"), 4),  # 32 rows of one tile, not 8 of each of four
    (attention(1, 8192, 64, heads=71, shared=1, dtype="bf16"), 71),
    (attention("M", "N", 64, heads=8, shared=2, dtype="bf16", where=" where 1 <= M <= 16, 1 <= N"), 4),
    (attention(4096, 4096, 64, heads=8, shared=2, dtype="bf16"), 1),  # as many tiles either way
    (attention(1, 8192, 64, heads=8, dtype="bf16"), 1),  # nothing is shared
])  # fmt: skip
def test_defaults(graph: Graph, heads: int) -> None:
    assert default_of(graph)[0]["heads"] == heads


def test_keys_that_are_shared_otherwise_than_values_are_read_head_by_head() -> None:
    graph = parse_graph("""graph @g(%q: f32[1, 6, 2, 16], %k: f32[1, 2, 33, 16], %v: f32[1, 3, 33, 16]) -> f32[1, 6, 2, 16] {
      %0: f32[1, 6, 2, 16] = attention(%q, %k, %v) {scale = 0.3}
      return %0 }""")
    assert share_of(graph, "attention") == 1
    check(graph, runner(graph, "attention"), inputs(graph), factor=4.0)


class Decoder(nn.Module):
    """One token of eight heads behind a cache of two."""

    def __init__(self, repeated: bool) -> None:
        super().__init__()
        self.repeated = repeated
        self.q, self.k, self.v = (nn.Linear(64, 16 * heads, bias=False) for heads in (8, 2, 2))

    def forward(self, x: torch.Tensor, *caches: torch.Tensor) -> torch.Tensor:
        q = self.q(x).view(1, 1, 8, 16).transpose(1, 2)
        new = (f(x).view(1, 1, 2, 16).transpose(1, 2) for f in (self.k, self.v))
        k, v = (torch.cat(pair, 2) for pair in zip(caches, new, strict=True))
        if self.repeated:
            k, v = (t[:, :, None].expand(1, 2, 4, t.shape[2], 16).reshape(1, 8, -1, 16) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=not self.repeated).transpose(1, 2).reshape(1, 1, 128)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_decoder(repeated: bool) -> None:
    """However a model has its heads share keys, they are rows of one program."""
    torch.manual_seed(0)
    model, given = Decoder(repeated).eval(), (torch.randn(1, 1, 64), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16))
    with torch.no_grad():
        compiled = graphopt.compile(model, given, backend="triton", target="cuda:sm_90:4", strict=True)
        torch.testing.assert_close(compiled(*given), model(*given))
    (kernel,) = (k for k in compiled.report.kernels if k.name.startswith("attention"))
    assert '"heads": 4' in Path(kernel.path).read_text()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("d", DECODING)
def test_machine_code(d: int, target: str) -> None:
    """No spills; sixteen rows are too few for wgmma and tcgen05."""
    t = Target.from_name(target)
    w, (template, *_) = templates(DECODING[d], "attention", t)
    c = compile_offline(template.emit(w, template.space(w, t).default(), t), t)
    assert c.spills == 0 and 0 < c.registers <= 144 and c.shared <= t.shared_memory
    assert c.uses("mfma" if t.kind == "hip" else "mma")

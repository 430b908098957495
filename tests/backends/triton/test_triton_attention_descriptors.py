"""Queries, keys and values that the device copies tile by tile: every attribute of the op, reasons against it, machine code."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_graphs import attention, inputs
from test_flash import CASES, FEW
from test_triton_attention import LARGE
from test_triton_offline import TARGETS
from test_triton_split_kv import DECODING
from triton_check import runner, templates

from graphopt.autotune.space import Schedule
from graphopt.backends.triton.offline import Compiled, compile_offline
from graphopt.ir.graph import Graph
from graphopt.ir.text import parse_graph
from graphopt.target import Target
from graphopt.testing.kernels import check

SM_90, SM_100 = (Target.from_name(f"cuda:{arch}") for arch in ("sm_90", "sm_100"))
SIZES = ((1, 1), (5, 9), (33, 150))
SHARED = {
    "shared heads": attention(5, 131, 24, 40, heads=6, shared=2, dtype="bf16", attrs=", causal = true, offset = 125"),
    "batches": parse_graph("""graph @g(%q: f16[B, 6, 21, 16], %k: f16[B, 3, 33, 16], %v: f16[B, 3, 33, 8]) -> f16[B, 6, 21, 8]
      where 1 <= B { %0: f16[B, 6, 21, 8] = attention(%q, %k, %v) {scale = 0.3}
      return %0 }"""),
    "heads side by side": parse_graph("""graph @g(%x: bf16[2, 37, 3, 2, 24]) -> bf16[2, 37, 48] {
      %0: bf16[3, 2, 2, 37, 24] = transpose(%x) {perm = [2, 0, 3, 1, 4]}
      %1: bf16[1, 2, 2, 37, 24] = slice(%0) {axis = 0, start = 0, stop = 1}
      %2: bf16[2, 2, 37, 24] = reshape(%1) {shape = [2, 2, 37, 24]}
      %3: bf16[1, 2, 2, 37, 24] = slice(%0) {axis = 0, start = 1, stop = 2}
      %4: bf16[2, 2, 37, 24] = reshape(%3) {shape = [2, 2, 37, 24]}
      %5: bf16[1, 2, 2, 37, 24] = slice(%0) {axis = 0, start = 2, stop = 3}
      %6: bf16[2, 2, 37, 24] = reshape(%5) {shape = [2, 2, 37, 24]}
      %7: bf16[2, 2, 37, 24] = attention(%2, %4, %6) {scale = 0.3}
      %8: bf16[2, 37, 2, 24] = transpose(%7) {perm = [0, 2, 1, 3]}
      %9: bf16[2, 37, 48] = reshape(%8) {shape = [2, 37, 48]}
      return %9 }"""),
}  # fmt: skip


def by_descriptor(**knobs: Any) -> Schedule:
    """Small tiles, so that even a few keys are several."""
    small = {"m": 16, "n": 16, "heads": 1, "warps": 2, "stages": 2, "pieces": 1, "reads": "descriptors"}
    return Schedule.make("attention", "flash", **{**small, **knobs})


def descriptors(graph: Graph, s: Schedule, t: Target = SM_90) -> list[str]:
    """The tensors whose tiles are read so."""
    w, (template, *_) = templates(graph, "attention", t)
    return re.findall(r"tensor_map\((\w+),", template.emit(w, s, t).text)


def judge(graph: Graph, s: Schedule) -> None:
    run = runner(graph, "attention", s)
    for m, n in SIZES if graph.symbols else SIZES[:1]:
        sizes = {name: n if name == "N" else m for name in graph.symbols}
        check(graph, run, inputs(graph, **sizes), sizes or None, factor=4.0, slack=8.0)  # values of 4 bits are up to 8 scales large


@pytest.mark.parametrize("graph", [*CASES.values(), *FEW.values()], ids=[*CASES, *(f"few, {name}" for name in FEW)])
def test_against_f64(graph: Graph) -> None:
    judge(graph, by_descriptor())


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("heads", [1, 3])
def test_heads_that_share_keys(heads: int, pieces: int) -> None:
    """Rows of several heads lie apart, and are read by pointers; keys and values are not."""
    graph, s = SHARED["shared heads"], by_descriptor(heads=heads, pieces=pieces)
    assert descriptors(graph, s) == ["in0", "in1", "in2"][heads > 1 :]
    judge(graph, s)


@pytest.mark.parametrize("name", SHARED)
def test_layouts(name: str) -> None:
    assert len(descriptors(SHARED[name], by_descriptor())) == 3
    judge(SHARED[name], by_descriptor())


def test_a_tensor_that_begins_between_words_is_copied() -> None:
    """And what is described of it is where it was: keys and values within what one product gave."""
    graph = CASES["in one"]
    assert len(descriptors(graph, by_descriptor())) == 3
    (x,) = inputs(graph)
    moved = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    assert moved.data_ptr() % 16 == 4
    check(graph, runner(graph, "attention", by_descriptor()), [moved], factor=4.0)


JOINED = parse_graph("""graph @g(%q: f16[4, 2, 32], %k: f16[4, 40, 32], %n: f16[4, 2, 32], %v: f16[4, 42, 32]) -> f16[4, 2, 32] {
  %0: f16[4, 42, 32] = concat(%k, %n) {axis = 1}
  %1: f16[4, 2, 32] = attention(%q, %0, %v) {scale = 0.3}
  return %1 }""")
PAGES = parse_graph("""graph @g(%q: f16[2, 4, 1, 32], %k: f16[9, 16, 2, 32], %t: i64[2, 6]) -> f16[2, 4, 1, 32] {
  %0: f16[2, 6, 16, 2, 32] = take(%k, %t) {axis = 0}
  %1: f16[2, 96, 2, 32] = reshape(%0) {shape = [2, 96, 2, 32]}
  %2: f16[2, 2, 96, 32] = transpose(%1) {perm = [0, 2, 1, 3]}
  %3: f16[2, 4, 1, 32] = attention(%q, %2, %2) {scale = 0.3}
  return %3 }""")
TURNED = parse_graph("""graph @g(%q: f16[3, 20, 8; 404, 20, 1], %k: f16[3, 33, 8; 300, 1, 33], %v: f16[33, 8; 9, 1]) -> f16[3, 20, 8] {
  %0: f16[3, 20, 8] = attention(%q, %k, %v) {scale = 0.3}
  return %0 }""")


@pytest.mark.parametrize(("graph", "read"), [(JOINED, ["in0", "in3"]), (PAGES, []), (TURNED, []), (CASES["few"], [])])
def test_what_lies_otherwise_is_read_by_pointers(graph: Graph, read: list[str]) -> None:
    assert descriptors(graph, by_descriptor()) == read
    judge(graph, by_descriptor())


@pytest.mark.parametrize("target", TARGETS)
def test_reasons(target: str) -> None:
    t, tf32 = Target.from_name(target), replace(Target.from_name(target), features=("tf32", "tma"))
    even, odd, exact = attention(33, 70, 24, dtype="bf16"), attention(33, 70, 20, dtype="bf16"), attention(33, 70, 24)
    apart = f"{t.arch} copies no tiles by descriptor"

    def reason(graph: Graph, t: Target) -> str | None:
        w, (template, *_) = templates(graph, "attention", t)
        space = template.space(w, t)
        default = dict(space.check(space.default()).knobs)
        assert default["reads"] == "pointers"
        return space.rejection(Schedule.make("attention", "flash", **{**default, "reads": "descriptors"}))

    assert reason(even, t) == (None if t.has("tma") else apart)
    assert reason(odd, t) == ("no queries, keys or values lie in memory in rows of whole 16 bytes" if t.has("tma") else apart)
    assert str(reason(exact, t)).startswith("f32 is multiplied by multiply-adds") == t.has("tma")
    assert reason(exact, tf32) is None


# --- machine code ------------------------------------------------------------------------------------------------------------


def compiled(graph: Graph, t: Target, **knobs: Any) -> Compiled:
    """The default schedule, but for some knobs, with no part of a tile copied by a thread."""
    w, (template, *_) = templates(graph, "attention", t)
    space = template.space(w, t)
    s = space.check(Schedule.make("attention", "flash", **{**dict(space.default().knobs), "reads": "descriptors", **knobs}))
    c = compile_offline(template.emit(w, s, t), t)
    assert len(re.findall(r"cp\.async\.bulk\.tensor\.[2-5]d\S*global", c.assembly)) >= 3
    assert not re.search(r"\bcp\.async\.c[ag]\.", c.assembly)
    assert c.spills == 0 and c.shared <= t.shared_memory
    return c


@pytest.mark.parametrize("t", [SM_90, SM_100], ids=str)
def test_the_device_copies_tiles(t: Target) -> None:
    assert compiled(LARGE["heads of 64"], t).uses(t.matrix_unit)
    assert compiled(DECODING, t).uses("mma")  # sixteen rows are too few for wgmma and tcgen05


@pytest.mark.slow
@pytest.mark.parametrize("t", [SM_90, SM_100], ids=str)
@pytest.mark.parametrize(("name", "knobs"), [("shared heads of 128", {}), ("heads of 64", {"n": 128}), ("heads of 256", {"warps": 8})])
def test_the_device_copies_large_tiles(name: str, knobs: dict[str, int], t: Target) -> None:
    assert compiled(LARGE[name], t, **knobs).uses(t.matrix_unit)

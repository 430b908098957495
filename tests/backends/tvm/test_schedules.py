"""Every sketch of every template, at points of its space that chance picks, computes what the default computes."""

from __future__ import annotations

from math import prod
from random import Random

import pytest
from families import families, inputs
from tvm_check import check

from graphopt.autotune.sketch import sketches_of
from graphopt.autotune.space import LoopNest, Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.backends.tvm.tileform import NEAR, _busiest, variants
from graphopt.ir.text import parse_graph
from graphopt.target import Target, detect

POINTS = 3  # of each sketch
CASES = ("pointwise: functions", "pointwise: transposed", "reduction: sum 0", "rowwise: softmax", "matmul: plain", "matmul: transposed",
         "matmul: f64", "matmul: bf16", "matmul: packed, 7 rows", "matmul: packed, 35 rows", "conv: 3x3 packed",
         "conv: depthwise", "conv: depthwise strided")  # fmt: skip
LARGE = """graph @g(%x: f32[3, 40, 300], %y: f32[300, 100], %z: f32[300, 100]) -> f32[3, 40, 100] {
 %0: f32[3, 40, 100] = matmul(%x, %y)
 %1: f32[3, 40, 100] = matmul(%x, %z)
 %2: f32[3, 40, 100] = silu(%0)
 %3: f32[3, 40, 100] = mul(%2, %1)
 return %3
}"""


def test_points_of_every_sketch_are_right(compile_points) -> None:
    target, rng = detect(), Random(0)
    regions = {name: region for name, region in families(target).items() if name in CASES}
    assert len(regions) == len(CASES)
    regions["two products"] = (parse_graph(LARGE), "matmul")
    jobs, sketches = [], dict.fromkeys(list[str]())
    for graph, kind in regions.values():
        w = Workload.of(graph, kind)
        for template in TvmBackend().templates(w, target):
            for sketch in sketches_of(template.spaces(w, target)):
                sketches[f"{template.name}/{sketch.name}"] = None
                found = (s for s in (sketch.random(rng) for _ in range(1000)) if sketch.space.rejection(s) is None)
                for _ in range(POINTS):
                    jobs.append((graph, w, next(found)))
    assert {"tile/default", "tile/rows-first", "tile/blocked", "tile/blocked-rows-first", "depthwise/pieces"} <= set(sketches)
    for (graph, _, _), run in zip(jobs, compile_points(jobs), strict=True):
        check(graph, run, inputs(graph), {}, factor=4.0)


@pytest.mark.parametrize("name", ["cpu:graniterapids:2", "cpu:x86-64-v3:8", "cpu:aarch64:4", "cpu:neoverse-v1:16"])
def test_defaults_are_in_their_spaces_and_nests_add_up(name: str) -> None:
    """Device-free. The trips of a nest make up the operations that its waste says, where sizes are known."""
    target = Target.from_name(name)
    for region, (graph, kind) in families(target).items():
        w = Workload.of(graph, kind)
        for template in TvmBackend().templates(w, target):
            spaces = template.spaces(w, target)
            assert template.space(w, target).default() == spaces[0].default()
            for sketch in sketches_of(spaces):
                assert sketch.space.rejection(sketch.default()) is None, (region, sketch.name)
                if sketch.space.nest is None:
                    continue
                nest = sketch.space.nest(sketch.default())
                assert isinstance(nest, LoopNest) and nest.waste >= 0.999 and nest.registers >= 0
                assert all(level.trips > 0 and len(level.touched) == len(nest.operands) for level in nest.levels)
                if template.name in ("tile", "conv", "depthwise") and not graph.symbols:
                    done = nest.flops * prod(level.trips for level in nest.levels)
                    (needed,) = {work for node in graph.nodes() if (work := _flops(node))}
                    assert done == pytest.approx(needed * nest.waste, rel=0.35), (region, sketch.name)


def _flops(node) -> float:
    from graphopt.ir.work import flops

    return float(flops(node))


def test_every_sketch_says_which_rules_yielded_it() -> None:
    target, found = detect(), dict.fromkeys(list[str]())
    for graph, kind in families(target).values():
        w = Workload.of(graph, kind)
        for template in TvmBackend().templates(w, target):
            for sketch in sketches_of(template.spaces(w, target)):
                assert sketch.rules and len(set(sketch.rules)) == len(sketch.rules), str(sketch)
                found[str(sketch)] = None
    assert "tile/blocked (inline, multi-level tiling, fused consumer, packed operand, cache write)" in found
    assert "nest/default (flat, inline)" in found


def test_nobody_tries_one_thread_where_there_is_much_to_do() -> None:
    """Device-free. A small workload keeps the choice, and so does one whose size is not known; the default is in the space always."""

    def choices(text: str, kind: str, cores: int = 2) -> set[tuple[bool, ...]]:
        w, target = Workload.of(parse_graph(f"graph @g{text}"), kind), Target.from_name(f"cpu:x86-64-v3:{cores}")
        spaces = [s for t in TvmBackend().templates(w, target) for s in t.spaces(w, target)]
        assert all(s.rejection(s.default()) is None for s in spaces)
        return {p.choices for s in spaces for p in s.params if p.name == "parallel" and "split" not in s.sketches[0]}

    def product(m: object) -> str:
        where = "" if isinstance(m, int) else " where 1 <= N"
        return f"(%x: f32[{m}, 512], %y: f32[512, 256]) -> f32[{m}, 256]{where} {{\n %0: f32[{m}, 256] = matmul(%x, %y)\n return %0\n}}"

    def sine(n: int) -> str:
        return f"(%x: f32[{n}]) -> f32[{n}] {{\n %0: f32[{n}] = sin(%x)\n return %0\n}}"

    assert choices(product(512), "matmul") == choices(sine(1 << 21), "pointwise") == {(True,)}
    assert choices(product(64), "matmul") == choices(sine(1 << 16), "pointwise") == choices(product("N"), "matmul") == {(True, False)}
    assert choices(product(512), "matmul", cores=1) == {(True, False)}
    assert choices(sine(1 << 21), "update") == {(True, False)}  # what it changes may be little


def test_what_a_constraint_rejects_it_rejects_with_a_reason() -> None:
    target, rng = detect(), Random(1)
    graph, kind = families(target)["matmul: packed, 35 rows"]
    w = Workload.of(graph, kind)
    reasons = dict.fromkeys(list[str]())
    for template in TvmBackend().templates(w, target):
        for sketch in sketches_of(template.spaces(w, target)):
            for s in (sketch.random(rng) for _ in range(300)):
                reasons[sketch.space.rejection(s) or ""] = None
    assert "" in reasons
    assert any(len(r.split()) > 3 for r in reasons), reasons


@pytest.mark.parametrize(("rows", "depth", "sketch"), [(128, 512, "blocked-rows-first"), (128, 500, "default"), (24, 512, "default")])
def test_packed_panels_of_some_depth_are_used_in_blocks(rows: int, depth: int, sketch: str) -> None:
    g = parse_graph(f"""
    graph @g(%x: f32[{rows}, {depth}], %w: f32[2, {depth}, 48]) -> f32[{rows}, 80] {{
      %0: f32[{depth}, 2, 48] = transpose(%w) {{perm = [1, 0, 2]}}
      %1: f32[{depth}, 96] = reshape(%0) {{shape = [{depth}, 96]}}
      %2: f32[{depth}, 80] = slice(%1) {{axis = 1, start = 0, stop = 80, step = 1}}
      %3: f32[{rows}, 80] = matmul(%x, %2)
      return %3
    }}""")
    first = variants(g, Target.from_name("cpu:x86-64-v4:2"))[0]
    assert first.sketches[0] == sketch
    assert sketch == "default" or first.default()["block"] == NEAR


def test_row_groups_are_divided_evenly() -> None:
    assert _busiest(11, 16, 16, 2) == 96  # six of eleven panels
    assert _busiest(11, 16, 8, 2) == 88  # eleven halves each
    assert _busiest(4, 25, 16, 2) == 50
    two_thirds = {"last": 2 / 3}  # 512 columns are eleven panels of 48, the last of which has 32
    assert _busiest(11, 16, 8, 2, **two_thirds) == 88  # the core that has not the last panel
    assert _busiest(11, 16, 8, 2, **two_thirds, rows_first=True) == pytest.approx(8 * (10 + 2 / 3))

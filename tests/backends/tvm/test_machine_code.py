"""What the machine code of each target looks like; nothing is run. Registers hold the tile, vectors are as wide as the target's."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("tvm")
from assembly import assembly, count, hot_loop, stack_accesses

from graphopt.autotune.space import Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.target import Target

GEMM = {  # target: (the multiply-add that the inner loop is made of, one that it must not hold)
    "x86-64-v3": (r"vfmadd\d+ps\s.*%ymm", r"%zmm|vfmadd\d+ps\s.*%xmm"),
    "znver3": (r"vfmadd\d+ps\s.*%ymm", r"%zmm"),
    "x86-64-v4": (r"vfmadd\d+ps\s.*%zmm", r"vfmadd\d+ps\s.*%[xy]mm"),
    "znver5": (r"vfmadd\d+ps\s.*%zmm", r"vfmadd\d+ps\s.*%[xy]mm"),
    "neoverse-n1": (r"fmla\s+v\d+\.4s", r"fmla\s+v\d+\.2s|\bz\d+\.s"),
    "neoverse-v2": (r"fmla\s+v\d+\.4s", r"fmla\s+v\d+\.2s"),
    "neoverse-v1": (r"fml[as]\s+z\d+\.s|fmad\s+z\d+\.s", r"fmla\s+v\d+\.4s"),
    "apple-m1": (r"fmla\s+v\d+\.4s", r"\bz\d+\.s"),
}


def packed_product(m: int | str, t: Target, k: int = 512) -> Workload:
    """``[m, k]`` times four panels of the target's width."""
    nr = t.tile[1] * t.lanes(4)
    n = 4 * nr
    return Workload("matmul", f"graph @g(%x: f32[{m}, {k}], %w: f32[4, {k}, {nr}]) -> f32[{m}, {n}]"
                    f"{' where 1 <= M' if isinstance(m, str) else ''} {{\n %0: f32[{k}, 4, {nr}] = transpose(%w) {{perm = [1, 0, 2]}}\n"
                    f" %1: f32[{k}, {n}] = reshape(%0) {{shape = [{k}, {n}]}}\n %2: f32[{k}, {n}] = slice(%1) {{axis = 1, stop = {n}}}\n"
                    f" %3: f32[{m}, {n}] = matmul(%x, %2)\n return %3\n}}")  # fmt: skip


@pytest.mark.parametrize("rows", [96, "M"])
@pytest.mark.parametrize("name", GEMM)
def test_the_inner_loop_of_a_product_stays_in_registers(name: str, rows: int | str) -> None:
    t = Target.from_name(f"cpu:{name}:4")
    w = packed_product(rows, t)
    knobs = TvmBackend().templates(w, t)[0].space(w, t).default()
    loop = hot_loop(assembly(w, t), GEMM[name][0])
    text = "\n".join(loop)
    assert (knobs["mr"], knobs["nr"]) == (t.tile[0], t.tile[1] * t.lanes(4))
    assert count(loop, GEMM[name][0]) == knobs["mr"] * knobs["nr"] // t.lanes(4) * knobs["unroll"], text
    assert count(loop, GEMM[name][1]) == 0, text
    assert not stack_accesses(loop), text


def test_softmax_uses_the_targets_vectors() -> None:
    w = Workload("rowwise", "graph @g(%x: f32[64, 512]) -> f32[64, 512] {\n %0: f32[64, 512] = softmax(%x) {axis = 1}\n return %0\n}")
    for name, wanted in (("x86-64-v3", r"vmulps\s.*%ymm"), ("x86-64-v4", r"vmulps\s.*%zmm"), ("neoverse-n1", r"fmul\s+v\d+\.4s")):
        t = Target.from_name(f"cpu:{name}")
        assert count(assembly(w, t).splitlines(), wanted), name


def test_a_bound_is_one_instruction() -> None:
    text = ("graph @g(%x: f32[4096]) -> f32[4096] {\n %0: f32[] = constant() {value = 0.0}\n %1: f32[] = constant() {value = 6.0}\n"
            " %2: f32[4096] = maximum(%x, %0)\n %3: f32[4096] = minimum(%2, %1)\n return %3\n}")  # fmt: skip
    loop = assembly(Workload("pointwise", text), Target.from_name("cpu:x86-64-v4"))
    assert count(loop.splitlines(), r"vmaxps\s.*%zmm") and count(loop.splitlines(), r"vminps\s.*%zmm")
    assert not re.search(r"vcmp\w*ps|vblendmps|vpmovd2m", loop)

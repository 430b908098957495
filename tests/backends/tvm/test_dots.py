"""Products of few rows by dot products of rows: weights where they lie, several side by side, and pieces of the depth."""

from __future__ import annotations

import ctypes
import mmap
import sys
from random import Random

import pytest
import torch
from tvm_check import check, values

from graphopt.autotune.sketch import sketches_of
from graphopt.autotune.space import Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.backends.tvm.dotsform import lies_by_rows
from graphopt.ir.text import parse_graph
from graphopt.target import Target, detect

ONE = "(%x: f32[{m}, {k}], %y: f32[{n}, {k}], %b: f32[{n}]) -> f32[{m}, {n}] {{\n %t: f32[{k}, {n}] = transpose(%y) {{perm = [1, 0]}}\n" \
      " %0: f32[{m}, {n}] = matmul(%x, %t)\n %1: f32[{m}, {n}] = add(%0, %b)\n return %1\n}}"
BROADCAST = "(%x: f32[{left}], %y: f32[4, 3, 21, 97]) -> f32[4, 3, 2, 21] {{\n" \
            " %0: f32[4, 3, 97, 21] = transpose(%y) {{perm = [0, 1, 3, 2]}}\n %1: f32[4, 3, 2, 21] = matmul(%x, %0)\n return %1\n}}"
REGIONS = {
    "a vector": ONE.format(m=1, k=256, n=128),
    "nothing divides": ONE.format(m=1, k=403, n=131),
    "rows": ONE.format(m=5, k=203, n=71),
    "few columns": ONE.format(m=1, k=5003, n=3),
    "three parts": "(%x: f32[1, 300], %p: f32[70, 300], %q: f32[64, 300], %r: f32[5, 300], %b: f32[139]) -> f32[1, 139] {\n"
    " %0: f32[300, 70] = transpose(%p) {perm = [1, 0]}\n %1: f32[300, 64] = transpose(%q) {perm = [1, 0]}\n"
    " %2: f32[300, 5] = transpose(%r) {perm = [1, 0]}\n %3: f32[300, 139] = concat(%0, %1, %2) {axis = 1}\n"
    " %4: f32[1, 139] = matmul(%x, %3)\n %5: f32[1, 139] = add(%4, %b)\n %6: f32[1, 139] = gelu(%5)\n return %6\n}",
    "parts, one axis more": "(%x: f32[1, 2, 300], %p: f32[70, 300], %q: f32[64, 300]) -> f32[1, 2, 134] {\n"
    " %0: f32[300, 70] = transpose(%p) {perm = [1, 0]}\n %1: f32[300, 64] = transpose(%q) {perm = [1, 0]}\n"
    " %2: f32[300, 134] = concat(%0, %1) {axis = 1}\n %3: f32[1, 2, 134] = matmul(%x, %2)\n return %3\n}",
    "a gate": "(%x: f32[2, 160], %p: f32[90, 160], %q: f32[90, 160]) -> f32[2, 90] {\n %0: f32[160, 90] = transpose(%p) {perm = [1, 0]}\n"
    " %1: f32[160, 90] = transpose(%q) {perm = [1, 0]}\n %2: f32[2, 90] = matmul(%x, %0)\n %3: f32[2, 90] = matmul(%x, %1)\n"
    " %4: f32[2, 90] = silu(%2)\n %5: f32[2, 90] = mul(%4, %3)\n return %5\n}",
    "batches": "(%x: f32[3, 2, 96], %y: f32[3, N, 96]) -> f32[3, 2, N] where 1 <= N {\n"
    " %0: f32[3, 96, N] = transpose(%y) {perm = [0, 2, 1]}\n"
    " %1: f32[3, 2, N] = matmul(%x, %0)\n return %1\n}",
    "heads behind views": "(%x: f32[1, 2, 1, 64], %y: f32[1, 37, 128]) -> f32[1, 2, 1, 37] {\n"
    " %0: f32[1, 37, 2, 64] = reshape(%y) {shape = [1, 37, 2, 64]}\n %1: f32[1, 2, 64, 37] = transpose(%0) {perm = [0, 2, 3, 1]}\n"
    " %2: f32[1, 2, 1, 37] = matmul(%x, %1)\n return %2\n}",
    "f64": ONE.format(m=2, k=1301, n=19).replace("f32", "f64"),
    "bf16": ONE.format(m=1, k=304, n=77).replace("f32", "bf16"),
    "bf16, nothing divides": ONE.format(m=2, k=303, n=77).replace("f32", "bf16"),
    "bf16, few columns": ONE.format(m=1, k=5003, n=3).replace("f32", "bf16"),
    "bf16, computed rows": "(%x: bf16[2, 1, 200], %p: bf16[70, 200], %q: bf16[64, 200]) -> bf16[2, 1, 134] {\n"
    " %0: bf16[2, 1, 200] = relu(%x)\n %1: bf16[200, 70] = transpose(%p) {perm = [1, 0]}\n"
    " %2: bf16[200, 64] = transpose(%q) {perm = [1, 0]}\n %3: bf16[200, 134] = concat(%1, %2) {axis = 1}\n"
    " %4: bf16[2, 1, 134] = matmul(%0, %3)\n return %4\n}",
    "bf16, a function without vectors": "(%x: f64[1, 203], %y: bf16[40, 203]) -> bf16[1, 40] {\n %0: f64[1, 203] = sinh(%x)\n"
    " %1: bf16[1, 203] = cast(%0) {dtype = bf16}\n %2: bf16[203, 40] = transpose(%y) {perm = [1, 0]}\n"
    " %3: bf16[1, 40] = matmul(%1, %2)\n return %3\n}",
    "bf16, one column": "(%x: bf16[3, 50, 96], %w: bf16[1, 96]) -> bf16[3, 50, 1] {\n %0: bf16[96, 1] = transpose(%w) {perm = [1, 0]}\n"
    " %1: bf16[3, 50, 1] = matmul(%x, %0)\n return %1\n}",
    **{f"{dtype}, left {','.join(map(str, left))}": BROADCAST.format(left=", ".join(map(str, left))).replace("f32", dtype)
       for dtype in ("f32", "bf16") for left in ((2, 97), (1, 2, 97), (1, 1, 2, 97), (4, 1, 2, 97), (1, 3, 2, 97))},
    "bf16 batches": "(%x: bf16[3, 2, 96], %y: bf16[3, N, 96]) -> bf16[3, 2, N] where 1 <= N {\n"
    " %0: bf16[3, 96, N] = transpose(%y) {perm = [0, 2, 1]}\n %1: bf16[3, 2, N] = matmul(%x, %0)\n return %1\n}",
    "f16": ONE.format(m=1, k=303, n=77).replace("f32", "f16"),
    "functions without vectors": "(%x: f64[1, 130], %y: f64[40, 130]) -> f64[1, 40] {\n %0: f64[1, 130] = sinh(%x)\n"
    " %1: f64[130, 40] = transpose(%y) {perm = [1, 0]}\n %2: f64[1, 40] = matmul(%0, %1)\n %3: f64[1, 40] = atan(%2)\n"
    " return %3\n}",
}  # fmt: skip
SIZES = {"N": 61}


def graph(text: str):
    return parse_graph(f"graph @g{text}")


def dots(text: str, target: Target):
    w = Workload.of(graph(text), "matmul")
    found = TvmBackend().templates(w, target)
    return w, next((t for t in found if t.name == "dots"), None), found[0].name


@pytest.mark.parametrize("name", REGIONS)
def test_the_default_is_right(name: str, compile_all) -> None:
    g = graph(REGIONS[name])
    _, _, first = dots(REGIONS[name], detect())
    assert first == "dots"
    sizes = {s: SIZES[s] for s in g.symbols}
    check(g, compile_all([(g, "matmul")])[0], values(g, **sizes), sizes, factor=4.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is protected by mprotect")
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_nothing_behind_a_factor_is_read(dtype: str, compile_all) -> None:
    """Of an unknown number of columns, the last panel ends with the last one: the page behind the factor must not be touched."""
    g = graph("(%x: f32[1, 256], %y: f32[N, 256]) -> f32[1, N] where 1 <= N {\n %0: f32[256, N] = transpose(%y) {perm = [1, 0]}\n"
              " %1: f32[1, N] = matmul(%x, %0)\n return %1\n}".replace("f32", dtype))  # fmt: skip
    (run,) = compile_all([(g, "matmul")])
    memory = mmap.mmap(-1, 16 * mmap.PAGESIZE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(at + 15 * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0  # PROT_NONE
    x, y = values(g, N=21)
    last = torch.frombuffer(memory, dtype=y.dtype, count=y.numel(), offset=15 * mmap.PAGESIZE - y.nbytes).view(y.shape).copy_(y)
    check(g, run, [x, last], {"N": 21}, factor=4.0)


def test_points_of_the_space_are_right(compile_points) -> None:
    target, rng, jobs = detect(), Random(0), []
    for text in REGIONS.values():
        w, template, _ = dots(text, target)
        (sketch,) = sketches_of(template.spaces(w, target))
        jobs += [(graph(text), w, s) for s in dict.fromkeys(sketch.random(rng) for _ in range(4))]
    for (g, _, _), run in zip(jobs, compile_points(jobs), strict=True):
        sizes = {s: SIZES[s] for s in g.symbols}
        check(g, run, values(g, **sizes), sizes, factor=4.0)


@pytest.mark.parametrize(("name", "rows"), [("cpu:graniterapids:2", 8), ("cpu:x86-64-v3:8", 4), ("cpu:neoverse-v1:16", 4)])
def test_which_regions_are_for_dot_products(name: str, rows: int) -> None:
    """Device-free."""
    target = Target.from_name(name)
    assert dots(ONE.format(m=rows, k=256, n=80), target)[2] == "dots"
    for other in (ONE.format(m=100, k=256, n=80), ONE.format(m="B", k=256, n=80).replace(" {", " where 1 <= B {", 1),
                  ONE.format(m=1, k=8, n=80),
                  ONE.format(m=1, k=256, n=80).replace("%y: f32[80, 256]", "%y: f32[80, 256; 1, 80]")):  # fmt: skip
        assert dots(other, target)[1] is None, other


@pytest.mark.parametrize(("x", "view", "shape", "expected"), [
    ("f32[4, 6]", "transpose(%x) {perm = [0, 1]}", (4, 6), True),
    ("f32[4, 6; 1, 4]", "transpose(%x) {perm = [0, 1]}", (4, 6), False),
    ("f32[6, 4; 1, 6]", "transpose(%x) {perm = [1, 0]}", (4, 6), True),
    ("f16[4, 6]", "cast(%x) {dtype = f32}", (4, 6), True),
    ("f32[4, 6]", "slice(%x) {axis = 1, stop = 6, step = 2}", (4, 3), False),  # every other term
    ("f32[4, 6]", "slice(%x) {axis = 0, stop = 4, step = 2}", (2, 6), True),  # every other column
    ("f32[4, 12]", "reshape(%x) {shape = [8, 6]}", (8, 6), True),  # parts of rows
    ("f32[4, 6]", "reshape(%x) {shape = [3, 8]}", (3, 8), False),  # across rows
    ("f32[4, 1]", "broadcast_to(%x) {shape = [4, 6]}", (4, 6), False),
])  # fmt: skip
def test_what_lies_by_rows(x: str, view: str, shape: tuple[int, int], expected: bool) -> None:
    n, k = shape
    g = graph(f"(%x: {x}) -> f32[{k}, {n}] {{\n %0: f32[{n}, {k}] = {view}\n %1: f32[{k}, {n}] = transpose(%0) {{perm = [1, 0]}}\n"
              " return %1\n}")  # fmt: skip
    assert lies_by_rows(g.outputs[0]) is expected


def test_pieces_of_the_depth_where_columns_are_few() -> None:
    target = Target.from_name("cpu:graniterapids:2")

    def pieces(k: int, n: int) -> int:
        w, template, _ = dots(ONE.format(m=1, k=k, n=n), target)
        return template.space(w, target).default()["pieces"]

    assert [pieces(*shape) for shape in ((4096, 4096), (1024, 16), (50000, 2), (700, 4))] == [1, 1, 3, 1]

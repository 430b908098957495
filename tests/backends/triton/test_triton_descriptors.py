"""Factors that are read by descriptor, and programs that take tile after tile: values, reasons against it, machine code, launches."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_triton_kernels import PRODUCTS
from test_triton_offline import LARGE, TARGETS
from test_triton_split_k import DEEP
from triton_check import runner, templates

from graphopt.autotune.space import Schedule, SearchSpace
from graphopt.backends.triton.build import load_source
from graphopt.backends.triton.offline import Compiled, compile_offline
from graphopt.backends.triton.tensormap import tensor_map
from graphopt.ir.graph import Graph
from graphopt.ir.interpreter import evaluate
from graphopt.ir.text import parse_graph
from graphopt.sampling import random_inputs
from graphopt.target import Target
from graphopt.testing.kernels import check

FEW = Target.from_name("cuda:sm_100:3")  # three programs, each of which takes several tiles
ALIGNED = {
    "linear": "(%x: bf16[B, 40], %w: bf16[70, 40], %b: bf16[70]) -> bf16[B, 70]\nwhere 1 <= B {\n"
    " %e: bf16[B, 40] = tanh(%x)\n %t: bf16[40, 70] = transpose(%w) {perm = [1, 0]}\n"
    " %0: bf16[B, 70] = matmul(%e, %t)\n %1: bf16[B, 70] = add(%0, %b)\n %2: bf16[B, 70] = gelu(%1)\n return %2\n}",
    "batches of batches": "(%x: f16[2, 3, 21, 24], %y: f16[2, 3, 24, 40]) -> f16[2, 3, 21, 40] {\n"
    " %0: f16[2, 3, 21, 24] = exp(%x)\n %1: f16[2, 3, 21, 40] = matmul(%0, %y)\n %2: f16[2, 3, 21, 40] = relu(%1)\n return %2\n}",
    "heads side by side": "(%x: f32[2, 21, 3, 8], %y: f32[2, 33, 3, 8]) -> f32[2, 3, 21, 33] {\n"
    " %a: f32[2, 3, 21, 8] = transpose(%x) {perm = [0, 2, 1, 3]}\n %b: f32[2, 3, 8, 33] = transpose(%y) {perm = [0, 2, 3, 1]}\n"
    " %0: f32[2, 3, 21, 33] = matmul(%a, %b)\n return %0\n}",
    "integers": "(%x: i8[B, 48], %w: i8[70, 48], %s: f32[B, 1], %t: f32[70]) -> f32[B, 70]\nwhere 1 <= B <= 99 {\n"
    " %0: i8[48, 70] = transpose(%w) {perm = [1, 0]}\n %1: i32[B, 70] = matmul(%x, %0) {acc = i32}\n"
    " %2: f32[B, 70] = mul(%s, %t)\n %3: f32[B, 70] = dequantize(%1, %2)\n return %3\n}",
    "floats of 8 bits": "(%x: bf16[21, 48], %w: f8e4m3[70, 48], %s: bf16[70, 1]) -> bf16[21, 70] {\n"
    " %0: bf16[70, 48] = dequantize(%w, %s)\n %1: bf16[48, 70] = transpose(%0) {perm = [1, 0]}\n"
    " %2: bf16[21, 70] = matmul(%x, %1)\n return %2\n}",
    "gate": "(%x: bf16[2, 21, 40], %y: bf16[40, 48], %z: bf16[40, 48]) -> bf16[2, 21, 48] {\n"
    " %0: bf16[2, 21, 48] = matmul(%x, %y)\n %1: bf16[2, 21, 48] = silu(%0)\n"
    " %2: bf16[2, 21, 48] = matmul(%x, %z)\n %3: bf16[2, 21, 48] = mul(%1, %2)\n return %3\n}",
    "any depth": "(%x: f32[B, 13, 4*H], %y: f32[B, 20, 4*H]) -> f32[B, 13, 20]\nwhere 1 <= B, 1 <= H {\n"
    " %t: f32[B, 4*H, 20] = transpose(%y) {perm = [0, 2, 1]}\n %0: f32[B, 13, 20] = matmul(%x, %t)\n return %0\n}",
    "a part of the columns": "(%x: bf16[21, 96], %y: bf16[70, 40]) -> bf16[21, 70] {\n"
    " %a: bf16[21, 40] = slice(%x) {axis = 1, start = 48, stop = 88}\n %t: bf16[40, 70] = transpose(%y) {perm = [1, 0]}\n"
    " %0: bf16[21, 70] = matmul(%a, %t)\n return %0\n}",
    "a row of each batch": "(%x: f32[2, 3, 40], %y: f32[2, 40, 52]) -> f32[2, 3, 52] {\n %0: f32[2, 3, 52] = matmul(%x, %y)\n return %0\n}",
}  # fmt: skip
WRITTEN = {
    "rows": "(%x: bf16[B, 40], %w: bf16[72, 40], %r: bf16[B, 72]) -> bf16[B, 72]\nwhere 1 <= B {\n"
    " %t: bf16[40, 72] = transpose(%w) {perm = [1, 0]}\n %0: bf16[B, 72] = matmul(%x, %t)\n %1: bf16[B, 72] = add(%0, %r)\n return %1\n}",
    "rows of batches": "(%x: f32[2, 13, 21], %y: f32[21, 36]) -> f32[2, 13, 36] {\n %0: f32[2, 13, 36] = matmul(%x, %y)\n return %0\n}",
    "columns": "(%x: f16[21, 24], %y: f16[24, 40]) -> f16[21, 40; 1, 24] {\n %0: f16[21, 40] = matmul(%x, %y)\n return %0\n}",
    "one of two": "(%x: f32[21, 33], %y: f32[33, 50]) -> (f32[21, 50], f16[21, 50; 56, 1]) {\n %0: f32[21, 50] = matmul(%x, %y)\n"
    " %1: f16[21, 50] = cast(%0) {dtype = f16}\n return %0, %1\n}",
}  # fmt: skip
CASES = {**{f"{name}, {len(text)}": text for group in (PRODUCTS, DEEP) for name, text in group.items()}, **ALIGNED}


def parsed(text: str) -> Graph:
    return parse_graph("graph @g" + text)


def spaces(graph: Graph, t: Target) -> tuple[SearchSpace, SearchSpace]:
    """Programs of a tile each, and programs of several."""
    w, found = templates(graph, "matmul", t)
    tiled, persistent = next(p for p in found if p.name == "matmul").spaces(w, t)
    return tiled, persistent


def schedule(space: SearchSpace, graph: Graph, **knobs: Any) -> Schedule:
    """Small tiles, so that even a small product has several."""
    depth = 16 if graph.inputs[0].dtype.itemsize > 1 else 32
    small = {"m": 16, "n": 16, "k": depth, "warps": 2, "stages": 2, "pieces": 1, "stores": 0, **knobs}
    return Schedule.make("matmul", space.sketches[0], **{**dict(space.default().knobs), **small})


def judge(graph: Graph, s: Schedule) -> None:
    run = runner(graph, "matmul", s, FEW)
    for n in (1, 9, 33) if graph.symbols else (0,):
        sizes = dict.fromkeys(graph.symbols, n)
        check(graph, run, random_inputs(graph, sizes, n), sizes or None, factor=4.0, slack=2)


@pytest.mark.parametrize("name", CASES)
def test_programs_that_take_tile_after_tile(name: str) -> None:
    graph = parsed(CASES[name])
    judge(graph, schedule(spaces(graph, FEW)[1], graph, reads="pointers"))


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_factors_that_are_read_by_descriptor(name: str, persistent: bool) -> None:
    graph = parsed(CASES[name])
    space = spaces(graph, FEW)[persistent]
    s = schedule(space, graph, reads="descriptors")
    if (reason := space.rejection(s)) is None:
        judge(graph, s)
    else:
        assert name not in ALIGNED and reason == "no factor lies in memory in rows of whole 16 bytes"


ROWS_OF_WORDS = ("batches of batches", "gate", "any depth", "a row of each batch", *WRITTEN)  # in their results


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("name", [*ALIGNED, *WRITTEN])
def test_results_that_are_written_by_descriptor(name: str, persistent: bool) -> None:
    """At once, in halves, and in quarters; of several products, too."""
    graph = parsed({**ALIGNED, **WRITTEN}[name])
    space = spaces(graph, FEW)[persistent]
    for stores in (1, 2, 4):
        s = schedule(space, graph, n=64, stores=stores, reads="pointers")
        if name in ROWS_OF_WORDS:
            assert space.rejection(s) is None
            judge(graph, s)
        else:
            assert space.rejection(s) == f"stores = {stores} is not among (0,)"


def test_floats_of_8_bits_are_written_so() -> None:
    graph = parsed("(%x: bf16[21, 33], %y: bf16[33, 48], %s: bf16[48]) -> f8e4m3[21, 48] {\n %0: bf16[21, 48] = matmul(%x, %y)\n"
                   " %1: f8e4m3[21, 48] = quantize(%0, %s) {dtype = f8e4m3, bits = 8}\n return %1\n}")  # fmt: skip
    given, space = random_inputs(graph, {}, 0), spaces(graph, FEW)[0]
    plain, written = (runner(graph, "matmul", schedule(space, graph, n=32, stores=n), FEW)(given, None)[0] for n in (0, 2))
    assert torch.equal(plain.view(torch.uint8), written.view(torch.uint8)) and len(plain.view(torch.uint8).unique()) > 50


@pytest.mark.parametrize("begin", [8, 9])
def test_nothing_is_written_beside_a_result(begin: int) -> None:
    """Wherever it begins: between words, what is written goes to a copy, which is copied back."""
    graph = parsed(WRITTEN["rows"])
    w, found = templates(graph, "matmul", FEW)
    s = schedule(spaces(graph, FEW)[0], graph, n=32, stores=2, reads="descriptors")
    source = next(p for p in found if p.name == "matmul").emit(w, s, FEW)
    assert source.text.count("tiles2.store(") == 2 and "tl.store" not in source.text
    given = random_inputs(graph, {"B": 21}, 0)
    memory = torch.full([21 * 72 + 32], 77.0, dtype=torch.bfloat16)
    assert memory.data_ptr() % 16 == 0
    out = memory[begin : begin + 21 * 72].view(21, 72)
    load_source(source, interpret=True)(*given, out, 21)
    torch.testing.assert_close(out, evaluate(graph, given, bindings={"B": 21})[0], rtol=0.02, atol=0.02)
    assert (memory[:begin] == 77).all() and (memory[begin + 21 * 72 :] == 77).all()


@pytest.mark.parametrize("name", ["linear", "batches of batches"])
def test_pieces_of_the_depth_by_descriptor(name: str) -> None:
    graph = parsed(ALIGNED[name])
    judge(graph, schedule(spaces(graph, FEW)[0], graph, reads="descriptors", pieces=2))


def test_both_factors_are_read_so() -> None:
    """One descriptor for each; what lies beyond the extents is zero, so no lane is left out, and nothing is set to zero."""
    for name in ALIGNED:
        graph = parsed(ALIGNED[name])
        w, found = templates(graph, "matmul", FEW)
        text = next(p for p in found if p.name == "matmul").emit(w, schedule(spaces(graph, FEW)[0], graph, reads="descriptors"), FEW).text
        loop = text[text.index("for k0") : text.index("tl.dot")]
        assert text.count("= tensor_map(") == (3 if name == "gate" else 2), text
        assert ".load([" in loop and (name == "floats of 8 bits" or "tl.load" not in loop), text


def test_a_tensor_that_begins_between_words_is_copied() -> None:
    graph = parsed(ALIGNED["gate"])
    run = runner(graph, "matmul", schedule(spaces(graph, FEW)[0], graph, reads="descriptors"), FEW)
    x, *weights = random_inputs(graph, {}, 0)
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    assert moved.data_ptr() % 16 == 2
    check(graph, run, [moved, *weights], factor=4.0, slack=2)
    assert tensor_map(x, [42, 40], [40, 1], [16, 16]).base is x


@pytest.mark.parametrize("target", TARGETS)
def test_reasons(target: str) -> None:
    t = Target.from_name(target)
    for text, lies_so in ((LARGE["matmul: linear"], True), (PRODUCTS["linear"], False)):
        for space in spaces(parsed(text), t):
            default = dict(space.check(space.default()).knobs)

            def reason(space: SearchSpace = space, default: dict[str, Any] = default, **knobs: Any) -> str | None:
                return space.rejection(Schedule.make("matmul", space.sketches[0], **{**default, **knobs}))

            read = reason(reads="descriptors")
            if not t.has("tma"):
                assert read == f"{t.arch} copies no tiles by descriptor"
            else:
                assert read == (None if lies_so else "no factor lies in memory in rows of whole 16 bytes")
            apart = reason(reads="descriptors" if read is None else "pointers", specialized=True)
            assert (apart is None) == (t.matrix_unit == "tcgen05" and lies_so)
            assert apart is None or apart.startswith("warps are specialized for one product of tcgen05")
    _, persistent = spaces(parsed(LARGE["matmul: linear"]), t)
    crowded = Schedule.make("matmul", "persistent", **{**dict(persistent.default().knobs), "resident": 4})
    assert persistent.rejection(crowded) == "the tiles of all stages, and of all programs of a processor, exceed its shared memory"


def test_products_too_many_for_the_shared_memory_have_a_space() -> None:
    """Nine of one left factor: not even a stage fits, and what does not fit is told."""
    names = [f"%{k}" for k in range(9)]
    given = "".join(f", %w{k}: f16[1024, 4096]" for k in range(9))
    products = "".join(f" %{k}: f16[4096, 4096] = matmul(%x, %w{k})\n" for k in range(9))
    graph = parsed(f"(%x: f16[4096, 1024]{given}) -> ({', '.join(['f16[4096, 4096]'] * 9)}) {{\n{products} return {', '.join(names)}\n}}")
    _, persistent = spaces(graph, Target.from_name("hip:gfx942"))
    assert "shared memory" in str(persistent.rejection(persistent.default()))


# --- machine code ------------------------------------------------------------------------------------------------------------


def compiled(name: str, target: str, persistent: bool, **knobs: Any) -> Compiled:
    """The default of a structure, but for some knobs."""
    t, graph = Target.from_name(target), parsed(LARGE[name])
    w, found = templates(graph, "matmul", t)
    space = spaces(graph, t)[persistent]
    s = Schedule.make("matmul", space.sketches[0], **{**dict(space.default().knobs), **knobs})
    assert space.rejection(s) is None
    c = compile_offline(found[0].emit(w, s, t), t)
    assert c.spills == 0 and c.shared <= t.shared_memory and c.uses(t.matrix_unit)
    return c


def copies(c: Compiled) -> int:
    """Instructions that read a tile by descriptor."""
    return len(re.findall(r"cp\.async\.bulk\.tensor\.[2-5]d\.shared::\w+\.global", c.assembly))


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("target", ["cuda:sm_90", "cuda:sm_100"])
@pytest.mark.parametrize("name", ["matmul: linear", "matmul: gate", "matmul: integers", "matmul: batches"])
def test_the_device_copies_tiles(name: str, target: str, persistent: bool) -> None:
    c = compiled(name, target, persistent, reads="descriptors")
    assert copies(c) >= 2 and not re.search(r"\bcp\.async\.c[ag]\.", c.assembly)  # no thread copies a part of a tile


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("target", ["cuda:sm_90", "cuda:sm_100"])
@pytest.mark.parametrize("name", ["matmul: linear", "matmul: gate", "matmul: integers", "matmul: batches"])
def test_the_device_writes_tiles(name: str, target: str, persistent: bool) -> None:
    """No thread writes a part of one; in parts, what follows the product has fewer registers and less shared memory."""
    whole, halves = (compiled(name, target, persistent, reads="descriptors", stores=n, n=64) for n in (1, 2))
    for c, stores in ((whole, 1), (halves, 2)):
        assert len(re.findall(r"cp\.async\.bulk\.tensor\.[2-5]d\.global\.shared", c.assembly)) >= stores
        assert not re.search(r"\bst\.global", c.assembly)
    assert halves.shared < whole.shared or not persistent


@pytest.mark.parametrize("persistent", [False, True])
def test_warps_that_copy_and_warps_that_multiply(persistent: bool) -> None:
    c = compiled("matmul: linear", "cuda:sm_100", persistent, reads="descriptors", specialized=True)
    assert copies(c) >= 2 and "setmaxnreg" in c.assembly


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["matmul: linear", "matmul: few tiles"])
def test_machine_code_of_programs_that_take_tile_after_tile(name: str, target: str) -> None:
    compiled(name, target, True)
    assert copies(compiled(name, target, True, reads="pointers")) == 0


def test_what_a_launch_tells_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory beside the tensors; and what CUDA asks of a tensor map: boxes of at most 256, rows and strides of whole 16 bytes."""
    offline = pytest.importorskip("graphopt.backends.triton.offline")
    nvidia = pytest.importorskip("triton.backends.nvidia.driver")
    from triton.runtime import driver

    if not hasattr(nvidia, "make_tensordesc_arg"):
        pytest.skip("another version of Triton's launcher")
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(driver, "_active", SimpleNamespace(utils=SimpleNamespace(fill_tma_descriptor_tiled=lambda *a: told.append(a))))
    built: list[Any] = []
    of = offline._compiled
    monkeypatch.setattr(offline, "_compiled", lambda *a: built.append(of(*a)) or built[-1])
    compiled("matmul: batches", "cuda:sm_90", False, reads="descriptors", stores=2, n=128)
    (kernel,) = built
    assert kernel.metadata.global_scratch_size == 0
    shapes = [[12, 128, 64], [12, 64, 128], [12, 128, 128]]
    for (*lead, columns), meta in zip(shapes, kernel.metadata.tensordesc_meta, strict=True):
        x, strides = torch.empty(*lead, columns, dtype=torch.float16), [lead[1] * columns, columns, 1]
        passed = nvidia.make_tensordesc_arg(tensor_map(x, [*lead, columns], strides, meta["block_size"]), meta, None)
        assert passed[1:] == [*lead, columns, *strides]
    assert [shape for *_, shape, _, _ in told] == shapes
    for address, swizzle, size, _, box, _, strides, _ in told:
        assert address % 16 == 0 and all(1 <= n <= 256 for n in box)
        assert box[-1] * size % 16 == 0 and (not swizzle or box[-1] * size <= 16 << swizzle)
        assert strides[-1] == 1 and all(n * size % 16 == 0 and n * size < 1 << 40 for n in strides[:-1])

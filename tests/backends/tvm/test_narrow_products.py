"""Products whose rows or columns fill no tile: narrower last tiles, whose vectors reach back, and one column, which becomes one row."""

from __future__ import annotations

import pytest
from tvm_check import check, values

from graphopt.autotune.space import Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir.text import parse_graph
from graphopt.target import Target

SHAPES = [(7, 40, 17), (49, 32, 49), (33, 70, 100), (5, 200, 31), (2, 90, 130), (10, 65, 20), (1, 300, 37), (100, 70, 1), (3, 130, 1)]


def product(m: int, k: int, n: int, form: str) -> str:
    """A region with a product of matrices that lie so."""
    dtype = {"f64": "f64", "bf16": "bf16", "end without vectors": "f64"}.get(form, "f32")
    factors = {"first transposed": f"{dtype}[{k}, {m}]", "batches": f"{dtype}[3, {m}, {k}]"}
    seconds = {"second transposed": f"{dtype}[{n}, {k}]", "batches": f"{dtype}[3, {k}, {n}]"}
    x, y = factors.get(form, f"{dtype}[{m}, {k}]"), seconds.get(form, f"{dtype}[{k}, {n}]")
    out = f"{dtype}[3, {m}, {n}]" if form == "batches" else f"{dtype}[{m}, {n}]"
    text = [f"graph @g(%x: {x}, %y: {y}, %b: {dtype}[{n}]) -> {out} {{"]
    a, b = "%x", "%y"
    if form == "first transposed":
        text.append(f" %t: {dtype}[{m}, {k}] = transpose(%x) {{perm = [1, 0]}}")
        a = "%t"
    if form == "second transposed":
        text.append(f" %u: {dtype}[{k}, {n}] = transpose(%y) {{perm = [1, 0]}}")
        b = "%u"
    end = "gelu" if form == "heavy end" else "tanh" if form == "end without vectors" else "relu"
    text += [f" %0: {out} = matmul({a}, {b})", f" %1: {out} = add(%0, %b)", f" %2: {out} = {end}(%1)", " return %2", "}"]
    return "\n".join(text)


FORMS = ["plain", "first transposed", "second transposed", "batches", "heavy end", "end without vectors", "f64", "bf16"]


@pytest.mark.parametrize("form", FORMS)
def test_narrow_products_are_right(form: str, compile_all) -> None:
    graphs = [parse_graph(product(*shape, form)) for shape in SHAPES]
    for graph, run in zip(graphs, compile_all([(g, "matmul") for g in graphs]), strict=True):
        check(graph, run, values(graph), factor=4.0)


def test_a_narrow_product_reads_vectors() -> None:
    """No element is fetched by an index of its own: 100 columns are two tiles of 48 and a vector, which begins at column 84."""
    target = Target.from_name("cpu:graniterapids:2")
    w = Workload.of(parse_graph(product(64, 256, 100, "plain")), "matmul")
    template = next(t for t in TvmBackend().templates(w, target) if t.name == "tile")
    text = template.emit(w, template.space(w, target).default(), target).text
    assert "- T.int64(12)" in text and "T.int64(99)" not in text


def test_what_is_divided_without_tuning() -> None:
    """Device-free: the depth, where it is long, and tiles are few, or uneven; not that of a packed weight."""
    target = Target.from_name("cpu:graniterapids:2")

    def default(m: int, k: int, n: int, form: str = "plain") -> str:
        w = Workload.of(parse_graph(product(m, k, n, form)), "matmul")
        return next(t for t in TvmBackend().templates(w, target) if t.name == "tile").space(w, target).default().sketch

    assert default(1, 50176, 10) == default(1, 50176, 10, "second transposed") == default(100, 4096, 100) == "split-depth"
    assert default(4, 4096, 100) == default(33, 50000, 1) == default(10, 100000, 1, "first transposed") == "split-depth"
    assert default(1, 512, 10) == default(128, 768, 768) == default(49, 32, 49, "batches") == default(5000, 64, 1) == "default"

"""Loops over joins and paddings that are read on the way: a loop for each part, and no comparison an element."""

from __future__ import annotations

import re

import pytest
from tvm_check import check, values

from graphopt.autotune.space import Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir.graph import Graph
from graphopt.ir.text import parse_graph
from graphopt.target import Target

TARGET = Target("cpu", "x86_64", features=("avx512f",), cores=2, cache=(48 << 10, 2 << 20, 32 << 20))


def rope(size: int, dtype: str = "f32", rows: str = "9", where: str = "") -> Graph:
    half, full = f"{dtype}[2, 3, {rows}, {size // 2}]", f"{dtype}[2, 3, {rows}, {size}]"
    table = f"{dtype}[{rows}, {size}]"
    return parse_graph(f"""graph @g(%x: {dtype}[2, {rows}, 3, {size}], %c: {table}, %s: {table}) -> {full}{where} {{
      %0: {full} = transpose(%x) {{perm = [0, 2, 1, 3]}}
      %1: {full} = mul(%0, %c)
      %2: {half} = slice(%0) {{axis = 3, start = {size // 2}, stop = {size}}}
      %3: {half} = neg(%2)
      %4: {half} = slice(%0) {{axis = 3, stop = {size // 2}}}
      %5: {full} = concat(%3, %4) {{axis = 3}}
      %6: {full} = mul(%5, %s)
      %7: {full} = add(%1, %6)
      return %7
    }}""")


def joined(parts: int) -> Graph:
    """Columns of width 20, joined, and added to what is padded."""
    pieces = "\n".join(f" %p{k}: f32[40, 20] = slice(%x) {{axis = 1, start = {7 * k}, stop = {7 * k + 20}}}" for k in range(parts))
    names, out = ", ".join(f"%p{k}" for k in range(parts)), f"f32[40, {20 * parts}]"
    return parse_graph(f"""graph @g(%x: f32[40, {7 * parts + 13}], %y: f32[40, {20 * parts - 5}]) -> {out} {{
      {pieces}
      %a: {out} = concat({names}) {{axis = 1}}
      %b: {out} = pad(%y) {{low = [0, 2], high = [0, 3], value = 0.5}}
      %c: {out} = add(%a, %b)
      return %c
    }}""")


def wrapped() -> Graph:
    """Columns from the other end in front, and then again a row above and one below: joins within slices within joins."""
    return parse_graph("""graph @g(%x: f32[40, 50]) -> f32[42, 57] {
      %0: f32[40, 3] = slice(%x) {axis = 1, start = 47, stop = 50}
      %1: f32[40, 53] = concat(%0, %x) {axis = 1}
      %2: f32[1, 53] = slice(%1) {axis = 0, start = 39, stop = 40}
      %3: f32[41, 53] = concat(%2, %1) {axis = 0}
      %4: f32[41, 4] = slice(%3) {axis = 1, start = 3, stop = 7}
      %5: f32[41, 57] = concat(%3, %4) {axis = 1}
      %6: f32[1, 57] = slice(%5) {axis = 0, start = 1, stop = 2}
      %7: f32[42, 57] = concat(%5, %6) {axis = 0}
      return %7
    }""")


GRAPHS = {
    "rope": rope(64), "odd halves": rope(18), "halves of one vector": rope(32), "rope, bf16": rope(64, "bf16"),
    "rows by symbol": rope(64, rows="H", where=" where 1 <= H"), "three parts and a margin": joined(3), "many parts": joined(9),
    "joins in joins": wrapped(),
}  # fmt: skip


def test_against_f64(compile_all) -> None:
    for graph, run in zip(GRAPHS.values(), compile_all([(g, "pointwise") for g in GRAPHS.values()]), strict=True):
        bindings = {"H": 11} if graph.symbols else None
        check(graph, run, values(graph, H=11), bindings)


def text_of(graph: Graph) -> str:
    w, backend = Workload.of(graph, "pointwise"), TvmBackend()
    template = backend.templates(w, TARGET)[0]
    return template.emit(w, template.space(w, TARGET).default(), TARGET).text


@pytest.mark.parametrize("name", ["rope", "odd halves", "rows by symbol", "three parts and a margin"])
def test_nothing_is_compared_an_element(name: str) -> None:
    lines = [line for line in text_of(GRAPHS[name]).splitlines() if "holds" not in line]  # whether there is work for all cores
    assert not any(word in line for line in lines for word in ("Select", "T.min", "T.max"))


def test_joins_in_joins_are_cut_where_each_ends() -> None:
    """Rows are chosen once for all that is in them."""
    assert set(re.findall(r"(?:Select|T\.min|T\.max)\((\w+)", text_of(GRAPHS["joins in joins"]))) == {"row"}


def test_many_parts_are_one_loop() -> None:
    assert "Select" in text_of(GRAPHS["many parts"])

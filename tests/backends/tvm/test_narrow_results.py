"""Reductions to fewer neighbouring results than a vector has lanes; joins of many values."""

from __future__ import annotations

import pytest
import torch
from tvm_check import check, values

from graphopt.autotune.space import Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.ir.text import parse_graph
from graphopt.target import Target

FORMS = {
    "sum": "(%x: f32[5003, 3]) -> f32[3] {\n %0: f32[3] = sum(%x) {axes = [0]}\n return %0\n}",
    "mean of squares": "(%x: f32[4, 1000, 10]) -> f32[4, 1, 10] {\n %0: f32[4, 1000, 10] = mul(%x, %x)\n"
    " %1: f32[4, 1, 10] = mean(%0) {axes = [1], keepdims = true}\n %2: f32[4, 1, 10] = sqrt(%1)\n return %2\n}",
    "max": "(%x: f32[300, 8]) -> f32[8] {\n %0: f32[8] = max(%x) {axes = [0]}\n return %0\n}",
    "prod": "(%x: f32[2, 2, 700, 2]) -> f32[2, 2, 2] {\n %0: f32[2, 2, 2] = prod(%x) {axes = [2]}\n return %0\n}",
    "f64": "(%x: f64[4100, 5]) -> f64[5] {\n %0: f64[5] = sum(%x) {axes = [0]}\n return %0\n}",
    "bf16": "(%x: bf16[999, 15]) -> bf16[15] {\n %0: bf16[15] = sum(%x) {axes = [0]}\n return %0\n}",
    "integers": "(%x: i32[1111, 6]) -> i32[6] {\n %0: i32[6] = sum(%x) {axes = [0]}\n return %0\n}",
    "any": "(%x: f32[777, 4]) -> b1[4] {\n %0: b1[777, 4] = isnan(%x)\n %1: b1[4] = any(%0) {axes = [0]}\n return %1\n}",
    "a factor for each column": "(%x: f32[2000, 3], %y: f32[3]) -> f32[3] {\n %0: f32[2000, 3] = mul(%x, %y)\n"
    " %1: f32[3] = sum(%0) {axes = [0]}\n return %1\n}",
    "rows that lie apart": "(%x: f32[2000, 3; 5, 1]) -> f32[3] {\n %0: f32[3] = sum(%x) {axes = [0]}\n return %0\n}",
    "few rows": "(%x: f32[40, 7]) -> f32[7] {\n %0: f32[7] = sum(%x) {axes = [0]}\n return %0\n}",
    "any number of rows": "(%x: f32[N, 3]) -> f32[3] where 1 <= N {\n %0: f32[3] = sum(%x) {axes = [0]}\n return %0\n}",
}


def test_narrow_results_are_right(compile_all) -> None:
    graphs = [parse_graph(f"graph @g{text}") for text in FORMS.values()]
    for graph, run in zip(graphs, compile_all([(g, "reduction") for g in graphs]), strict=True):
        sizes = {"N": 777} if graph.symbols else {}
        inputs = values(graph, **sizes)
        if graph.inputs[0].type.strides is not None:
            inputs[0] = torch.nn.functional.pad(inputs[0], (0, 2))[:, :3]
        check(graph, run, inputs, sizes, factor=4.0)


@pytest.mark.parametrize("form, vectors", [("sum", True), ("mean of squares", True), ("a factor for each column", False),
                                           ("rows that lie apart", False), ("few rows", False)])  # fmt: skip
def test_rows_that_follow_one_another_fill_vectors(form: str, vectors: bool) -> None:
    """Device-free."""
    target = Target.from_name("cpu:graniterapids:2")
    w = Workload.of(parse_graph(f"graph @g{FORMS[form]}"), "reduction")
    template = TvmBackend().templates(w, target)[0]
    assert ("T.vectorized" in template.emit(w, template.space(w, target).default(), target).text) is vectors


@pytest.mark.parametrize("axis", [0, 1])
def test_a_join_of_many_has_no_test_an_element(axis: int, compile_all) -> None:
    count = 40
    one, all_of_them = ("[5, 33]", [5, 33 * count] if axis else [5 * count, 33])
    inputs, names = ", ".join(f"%x{i}: f32{one}" for i in range(count)), ", ".join(f"%x{i}" for i in range(count))
    out = f"f32{all_of_them}"
    graph = parse_graph(f"graph @g({inputs}) -> {out} {{\n %0: {out} = concat({names}) {{axis = {axis}}}\n return %0\n}}")
    (run,) = compile_all([(graph, "pointwise")])
    check(graph, run, values(graph))
    target = Target.from_name("cpu:graniterapids:2")
    w = Workload.of(graph, "pointwise")
    template = TvmBackend().templates(w, target)[0]
    assert "Select" not in template.emit(w, template.space(w, target).default(), target).text


def test_a_join_of_many_middling_parts_is_divided_among_the_cores(compile_all) -> None:
    count = 40  # none of which is large enough to be divided itself
    inputs, names = ", ".join(f"%x{i}: f32[50, 33]" for i in range(count)), ", ".join(f"%x{i}" for i in range(count))
    graph = parse_graph(f"graph @g({inputs}) -> f32[2000, 33] {{\n %0: f32[2000, 33] = concat({names}) {{axis = 0}}\n return %0\n}}")
    target = Target.from_name("cpu:graniterapids:2")
    w = Workload.of(graph, "pointwise")
    template = TvmBackend().templates(w, target)[0]
    assert "T.parallel" in template.emit(w, template.space(w, target).default(), target).text
    (run,) = compile_all([(graph, "pointwise")])
    check(graph, run, values(graph))

"""PyTorch's kernels as a candidate: what depends on weights alone is computed once, sizes are bound, outputs are filled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from graphopt.autotune import library_kernel
from graphopt.autotune.library_kernel import SUFFIX, TEMPLATE, LibraryBuilder, LibraryKernel, library_space, load_library_kernel
from graphopt.autotune.measure import Built
from graphopt.autotune.space import Schedule, Workload
from graphopt.ir import parse_graph

PACKED = """graph @r(%x: f32[B, 8], %w: f32[2, 8, 2]) -> (f32[B, 4])
where 0 <= B {
  %0: f32[8, 2, 2] = transpose(%w) {perm = [1, 0, 2]}
  %1: f32[8, 4] = reshape(%0) {shape = [8, 4]}
  %2: f32[B, 4] = matmul(%x, %1)
  %3: f32[B, 4] = relu(%2)
  return %3
}"""


def workload(text: str = PACKED, kind: str = "matmul") -> Workload:
    return Workload.of(parse_graph(text), kind)


def expected(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x @ w.transpose(0, 1).reshape(8, 4)).relu()


def test_outputs_are_filled_and_weights_are_unpacked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = LibraryKernel(workload().graph, weights=[1])
    ops: list[str] = []
    evaluate = library_kernel.evaluate_node
    monkeypatch.setattr(library_kernel, "evaluate_node", lambda node, *rest: (ops.append(node.op.name), evaluate(node, *rest))[1])
    w, out = torch.randn(2, 8, 2), torch.full((5, 4), float("nan"))
    for _ in range(2):
        x = torch.randn(5, 8)
        kernel(x, w, out, 5)
        assert torch.allclose(out, expected(x, w))
    assert ops == ["transpose", "reshape", "matmul", "relu", "matmul", "relu"]
    other = torch.randn(2, 8, 2)
    (y,) = kernel.compute(x, other, out, 5)
    assert torch.allclose(y, expected(x, other)) and torch.allclose(out, expected(x, w)), "results have memory of their own"


def test_what_the_library_is_asked_for() -> None:
    assert library_space(workload()) is not None
    assert library_space(workload("graph @r(%x: f32[4]) -> (f32[4]) {\n  %0: f32[4] = relu(%x)\n  return %0\n}", "pointwise")) is None
    narrow = PACKED.replace("%w: f32[", "%q: i8[").replace("{\n", "{\n  %w: f32[2, 8, 2] = cast(%q) {dtype = f32}\n", 1)
    assert library_space(workload(narrow)) is None, "the library would have to be given wide weights"
    strided = PACKED.replace("-> (f32[B, 4])", "-> (f32[B, 4; 1, B])")
    assert library_space(workload(strided)) is None


def test_the_builder_writes_a_file_and_leaves_the_others_to_the_other_one(tmp_path: Path) -> None:
    class Others:
        def build(self, w: Workload, schedules: Sequence[Schedule]) -> list[Built]:
            return [Built(s, "made", "by another") for s in schedules]

    own, other = Schedule.make(TEMPLATE), Schedule.make("tile", n=1)
    first, second = LibraryBuilder(Others(), tmp_path).build(workload(), [other, own])
    assert (first.schedule, first.path) == (other, "made") and second.schedule == own and second.path.endswith(SUFFIX)
    x, w, out = torch.randn(3, 8), torch.randn(2, 8, 2), torch.empty(3, 4)
    load_library_kernel(Path(second.path), [1], "cpu")(x, w, out, 3)
    assert torch.allclose(out, expected(x, w))
    assert LibraryBuilder(Others(), tmp_path).build(workload(), [other]) == [first]

"""What the backend chooses and writes for one region a family: templates, default schedules and the emitted kernel.

After an intended change: ``python tests/backends/tvm/test_golden.py`` writes the files anew; read their difference.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from graphopt.autotune.space import Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.target import Target

FOLDER = Path(__file__).parent / "golden"
TARGET = Target("cpu", "x86_64", "golden", ("avx", "avx2", "avx512f", "f16c", "fma", "sse2"), 4, (32 << 10, 1 << 20, 16 << 20))
REGIONS = {
    "pointwise": "(%x: f32[4, 50], %y: f32[50]) -> f32[50, 4] {\n %0: f32[4, 50] = add(%x, %y)\n %1: f32[4, 50] = relu(%0)\n"
    " %2: f32[50, 4] = transpose(%1) {perm = [1, 0]}\n return %2\n}",
    "reduction": "(%x: f32[9, 40]) -> f32[40] {\n %0: f32[40] = sum(%x) {axes = [0]}\n return %0\n}",
    "rowwise": "(%x: f32[6, 80]) -> f32[6, 80] {\n %0: f32[6, 80] = softmax(%x) {axis = 1}\n return %0\n}",
    "matmul": "(%x: f32[2, 9, 16], %y: f32[2, 20, 16], %b: f32[20]) -> f32[2, 9, 20] {\n"
    " %0: f32[2, 16, 20] = transpose(%y) {perm = [0, 2, 1]}\n %1: f32[2, 9, 20] = matmul(%x, %0)\n"
    " %2: f32[2, 9, 20] = add(%1, %b)\n return %2\n}",
}


def describe(kind: str) -> str:
    """Templates, spaces and the preferred template's kernel, as text."""
    w = Workload(kind, "graph @g" + REGIONS[kind])
    templates = TvmBackend().templates(w, TARGET)
    lines = []
    for template in templates:
        space = template.space(w, TARGET)
        assert space.rejection(space.default()) is None
        lines += [f"# {template.name}"] + [f"#   {p.name}: {', '.join(map(str, p.choices))}" for p in space.params]
    source = templates[0].emit(w, templates[0].space(w, TARGET).default(), TARGET)
    return "\n".join([*lines, source.text.rstrip(), ""])


@pytest.mark.parametrize("kind", REGIONS)
def test_golden(kind: str) -> None:
    pytest.importorskip("tvm")
    expected, found = (FOLDER / f"{kind}.txt").read_text(), describe(kind)
    difference = "\n".join(difflib.unified_diff(expected.splitlines(), found.splitlines(), "golden", "now", lineterm=""))
    assert not difference, f"python {Path(__file__).name} writes the file anew\n{difference}"


def test_emitting_is_repeatable() -> None:
    pytest.importorskip("tvm")
    assert [describe(kind) for kind in REGIONS] == [describe(kind) for kind in REGIONS]


@pytest.mark.parametrize(
    "target",
    [
        Target("cpu", "x86_64", "older", ("avx", "avx2", "f16c", "fma", "sse2")),
        Target("cpu", "x86_64", "oldest", ("sse2",)),
        Target("cpu", "aarch64", "arm", ("asimd",)),
    ],
    ids=lambda t: t.model,
)
def test_other_targets(target: Target, tmp_path: Path) -> None:
    """Kernels compile for machines that are not this one, with their vector widths."""
    pytest.importorskip("tvm")
    from graphopt.backends.tvm.lowering import compile_functions

    for kind, text in REGIONS.items():
        w = Workload(kind, "graph @g" + text)
        for template in TvmBackend().templates(w, target):
            source = template.emit(w, template.space(w, target).default(), target)
            compile_functions({source.name: source.payload}, target).write_to_file(str(tmp_path / "kernel.o"))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in REGIONS:
        (FOLDER / f"{name}.txt").write_text(describe(name))

"""Kernels for Arm, cross-compiled and run by qemu: NEON, and SVE of two widths."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tvm")
from emulated import EmulatedKernel, missing_tools
from families import bindings, families, inputs
from tvm_check import check

from graphopt.target import Target

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing_tools()), reason=missing_tools() or "all tools are there")]

TARGETS = ("neoverse-n1", "neoverse-v1", "a64fx")
NAMES = list(families(Target.from_name("cpu:neoverse-n1")))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("processor", TARGETS)
def test_family(processor: str, name: str, tmp_path: Path) -> None:
    t = Target.from_name(f"cpu:{processor}:4")
    graph, kind = families(t)[name]
    check(graph, EmulatedKernel(graph, kind, t, tmp_path), inputs(graph), bindings(graph), factor=4.0)

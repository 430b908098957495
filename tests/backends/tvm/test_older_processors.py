"""Kernels for processors that are older than this one, run here: narrower vectors and smaller tiles give the right numbers."""

from __future__ import annotations

import random

import pytest
from families import bindings, families, inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm_check import check

from graphopt.sampling import random_inputs
from graphopt.target import Target, detect
from graphopt.testing.random_regions import random_region

NAMES = ("x86-64-v2", "x86-64-v3", "x86-64-v4", "znver4")


def runnable(name: str) -> Target:
    t = Target.from_name(f"cpu:{name}:2")
    if why := detect().lacks(t):
        pytest.skip(f"{name}: {why}")
    return t


@pytest.mark.parametrize("name", NAMES[:3])
def test_every_family(compile_all, name: str) -> None:
    t = runnable(name)
    regions = {k: g for k, g in families(t).items() if name != "x86-64-v2" or "f16" not in k.split()}  # F16C came later
    for (graph, _), run in zip(regions.values(), compile_all(list(regions.values()), target=t), strict=True):
        check(graph, run, inputs(graph), bindings(graph), factor=4.0)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_random_regions_for_avx2(compile_all, seed: int) -> None:
    graph, kind = random_region(random.Random(seed))
    (run,) = compile_all([(graph, kind)], target=runnable("x86-64-v3"))
    check(graph, run, random_inputs(graph, {}, seed), factor=4.0)

"""Random chains of views and pointwise ops around one anchor: the kernel against the interpreter."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm_check import check

from graphopt.sampling import random_inputs
from graphopt.testing.random_regions import random_region


@settings(max_examples=24, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_random_regions(compile_all, seed: int) -> None:
    graph, kind = random_region(random.Random(seed))
    (run,) = compile_all([(graph, kind)])
    check(graph, run, random_inputs(graph, {}, seed), factor=4.0)

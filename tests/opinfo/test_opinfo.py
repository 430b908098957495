"""Operators of PyTorch's OpInfo database give eager's results: a fast sample of them, and (slow) all of them in shards."""

from __future__ import annotations

import pytest
import torch

from tests.opinfo.harness import operators, run
from tests.opinfo.sweep import sweep

SAMPLE = 60
GROUPS = 6
SHARDS = 8
SWEEPS = [("float32", 3), ("bool", 2), ("int64", 2), ("float16", 1), ("bfloat16", 1), ("float64", 1)]


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_sample_of_operators(group: int) -> None:
    """One sample each of operators spread evenly over the database."""
    torch.set_num_threads(1)
    known = operators(torch.float32)
    names = list(known)[:: max(1, len(known) // SAMPLE)][group::GROUPS]
    failures = [o for name in names for o in run(name, known[name], torch.float32, 1, "graphopt") if not o.passed]
    assert not failures, "\n".join(map(str, failures))


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize(("dtype", "samples"), SWEEPS)
def test_every_operator(dtype: str, samples: int, shard: int) -> None:
    """What gives eager's result under ``aot_eager`` gives it under ``graphopt``."""
    _, failures = sweep(dtype, samples, (shard, SHARDS))
    assert not failures, "\n".join(map(str, failures))
